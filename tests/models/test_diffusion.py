"""The objective and the sampler against the paper's formulas, written out one number at a time."""

import math

import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models.objectives import diffusion
from sfumato.models.settings import Diffusion, ModelSettings, Sampling, Solver

R, K, D, E = 3, 2, 4, 5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(latents: torch.Tensor, level: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Any function of the three; rows and draws apart from each other."""
    return torch.sin(latents) + 0.3 * level[..., None] + condition.mean(dim=-1, keepdim=True)


def test_preconditioning_is_the_papers_table_1():
    noisy, sigma, condition = numbers(R, K, D), numbers(R, K, seed=1).exp(), numbers(R, K, E, seed=2)
    scale = torch.tensor([0.5, 0.2, 1.3, 0.7])
    fast = diffusion.denoise(network, noisy, sigma, condition, scale)
    for r in range(R):
        for k in range(K):
            s = sigma[r, k].item()
            c_in = [1 / math.sqrt(s**2 + sd**2) for sd in scale.tolist()]
            x = torch.tensor([noisy[r, k, d].item() * c_in[d] for d in range(D)])
            f = network(x, torch.tensor(math.log(s) / 4), condition[r, k])
            for d in range(D):
                sd = scale[d].item()
                c_skip = sd**2 / (s**2 + sd**2)
                c_out = s * sd / math.sqrt(s**2 + sd**2)
                slow = c_skip * noisy[r, k, d].item() + c_out * f[d].item()
                assert fast[r, k, d].item() == pytest.approx(slow, rel=1e-5, abs=1e-6)


def test_the_loss_of_a_record_is_the_mean_over_its_draws_of_the_weighted_error():
    clean, condition = numbers(R, D), numbers(R, E, seed=1)
    sigma, noise = numbers(R, K, seed=2).exp(), numbers(R, K, D, seed=3)
    scale, sigma_data = torch.tensor([0.5, 0.2, 1.3, 0.7]), 0.4
    fast = diffusion.record_losses(network, clean, condition, sigma, noise, scale, sigma_data)
    assert fast.shape == (R,)
    for r in range(R):
        total = 0.0
        for k in range(K):
            s = sigma[r, k]
            estimate = diffusion.denoise(
                network, (clean[r] + s * noise[r, k])[None, None], s[None, None], condition[r][None, None], scale
            )[0, 0]
            for d in range(D):
                sd = scale[d].item()
                edm = (s.item() ** 2 + sd**2) / (s.item() * sd) ** 2  # lambda(sigma), table 1
                total += edm * (sd / sigma_data) ** 2 * (estimate[d] - clean[r, d]).item() ** 2
        assert fast[r].item() == pytest.approx(total / (K * D), rel=1e-5)


def test_more_draws_give_the_mean_of_the_losses_of_one_draw():
    clean, condition, scale = numbers(R, D), numbers(R, E, seed=1), torch.full((D,), 0.5)
    sigma, noise = numbers(R, 6, seed=2).exp(), numbers(R, 6, D, seed=3)
    together = diffusion.record_losses(network, clean, condition, sigma, noise, scale, 0.5)
    single = [
        diffusion.record_losses(network, clean, condition, sigma[:, k : k + 1], noise[:, k : k + 1], scale, 0.5)
        for k in range(6)
    ]
    torch.testing.assert_close(together, torch.stack(single).mean(0))


def test_a_network_of_zero_is_the_wiener_filter_of_the_spectrum():
    scale = torch.tensor([1.0, 0.1])
    estimate = diffusion.denoise(
        lambda x, level, told: torch.zeros_like(x), torch.ones(1, 1, 2), torch.ones(1, 1), torch.zeros(1, 1, E), scale
    )
    assert estimate.flatten().tolist() == pytest.approx([1 / 2, 0.01 / 1.01])


def test_noise_levels_are_log_normal():
    """Mean and spread of 20,000 logarithms within five standard errors: false alarm below 2e-6; the seed is fixed."""
    settings = Diffusion(log_sigma_mean=-0.7, log_sigma_std=1.5)
    levels = diffusion.noise_levels(settings, (20_000,), torch.Generator().manual_seed(0)).log()
    assert levels.mean().item() == pytest.approx(-0.7, abs=5 * 1.5 / 20_000**0.5)
    assert levels.std().item() == pytest.approx(1.5, abs=5 * 1.5 / 40_000**0.5)


def test_the_schedule_is_the_papers_equation_5():
    levels = diffusion.schedule(0.02, 20.0, 5)
    expected = [(20.0 ** (1 / 7) + i / 4 * (0.02 ** (1 / 7) - 20.0 ** (1 / 7))) ** 7 for i in range(5)]
    assert levels.tolist() == pytest.approx([*expected, 0.0], rel=1e-5)
    assert diffusion.schedule(0.02, 20.0, 1).tolist() == pytest.approx([20.0, 0.0])


def test_guidance_zero_is_the_conditional_model_alone():
    condition, scale = numbers(R, E), torch.full((D,), 0.5)
    noisy, sigma = numbers(R, 1, D, seed=1), torch.full((R, 1), 0.8)
    calls = []

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return network(*arguments)

    plain = diffusion.denoise(network, noisy, sigma, condition[:, None], scale)
    free = diffusion.denoise(network, noisy, sigma, torch.zeros(R, 1, E), scale)
    assert diffusion.guided(counting, condition, scale, 0.0)(noisy, sigma).equal(plain)
    assert len(calls) == 1  # and it costs one evaluation
    torch.testing.assert_close(
        diffusion.guided(network, condition, scale, 1.5)(noisy, sigma), plain + 1.5 * (plain - free)
    )


# ---- what the network is asked for ----


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_a_network_that_says_what_it_is_asked_for_gives_the_clean_latent(prediction):
    """Told the truth in each paper's own terms, the denoiser returns the clean latent: eps is the noise, x0 the clean latent
    over its scale, v is alpha eps - sigma' x0 at alpha^2 + sigma'^2 = 1 (Salimans & Ho 2022), with its sign turned."""
    clean, noise, sigma = numbers(R, 1, D), numbers(R, 1, D, seed=1), numbers(R, 1, seed=2).exp()
    scale = torch.tensor([0.5, 0.2, 1.3, 0.7])
    ratio = sigma[..., None] / scale
    alpha, spread = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    truth = {"x0": clean / scale, "eps": noise, "v": -(alpha * noise - spread * clean / scale)}[prediction]
    noisy = clean + sigma[..., None] * noise
    found = diffusion.denoise(lambda x, level, told: truth, noisy, sigma, numbers(R, 1, E), scale, prediction)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_the_loss_weighs_the_networks_own_error_alike_at_every_level(prediction):
    """An error of .1 in what the network says loses .01 (scale / sigma_data)^2, whatever the noise level."""
    clean, noise, sigma = numbers(R, D), numbers(R, K, D, seed=1), numbers(R, K, seed=2).exp()
    scale = torch.tensor([0.5, 0.2, 1.3, 0.7])
    wide = sigma[..., None]
    x, total = clean[:, None], (wide**2 + scale**2).sqrt()
    exact = {"x0": x / scale + 0 * wide, "eps": noise, "v": (wide * x / scale - scale * noise) / total}[prediction]
    loss = diffusion.record_losses(
        lambda x, level, told: exact + 0.1, clean, numbers(R, E), sigma, noise, scale, 0.4, prediction
    )
    expected = 0.01 * (scale / 0.4).square().mean().item()
    assert loss.tolist() == pytest.approx([expected] * R, rel=1e-3)


# ---- samplers, on Gaussian data, whose best denoiser is known ----

MEAN, SPREAD = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)


def best(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x | noisy] of data N(MEAN, SPREAD^2)."""
    s = sigma[..., None]
    return (SPREAD**2 * noisy + s**2 * MEAN) / (SPREAD**2 + s**2)


def far(steps: int, solver: Solver) -> float:
    """How far the paths of the probability flow end from where they end exactly: it is linear here,
    x(0) = MEAN + SPREAD / (SPREAD^2 + sigma_max^2)^(1/2) (x(sigma_max) - MEAN)."""
    objective = Diffusion()
    start = numbers(50, 2).double()
    exact = MEAN + SPREAD / (SPREAD**2 + objective.sigma_max**2).sqrt() * (start * objective.sigma_max - MEAN)
    drawn = diffusion.sample(best, start, objective, Sampling(steps=steps, solver=solver), torch.Generator())
    return float((drawn - exact).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_a_deterministic_sampler_follows_the_exact_path_to_its_order(solver, order):
    """Four times the steps, 4^order times nearer; the last, plain step from sigma_min to 0 is the same for all, below 1e-3."""
    assert far(160, solver) < far(40, solver) / 4 ** (order - 0.35) + 1e-3
    assert far(160, solver) < {1: 0.05, 2: 2e-3}[order]


def test_second_order_is_worth_its_name():
    assert far(20, "heun") < far(20, "euler") / 5
    assert far(20, "dpmpp_2m") < far(20, "euler") / 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(steps=60),
        Sampling(steps=60, churn=12.0),
        Sampling(steps=60, churn=40.0, churn_min=0.05, churn_max=5.0),
        Sampling(steps=200, churn=20.0, solver="euler"),
        Sampling(steps=60, solver="dpmpp_2m"),
        Sampling(steps=400, solver="ancestral"),
    ],
    ids=["heun", "churn", "churn between", "euler churn", "dpmpp", "ancestral"],
)
def test_a_sampler_draws_the_distribution_that_the_denoiser_knows(sampling):
    """The mean and spread of 4,000 draws, to five standard errors and 2 % for the discretisation: false alarm below 1e-5 for
    each sampler; the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4_000, 2, generator=generator)
    drawn = diffusion.sample(best, start, Diffusion(), sampling, generator)
    for d in range(2):
        s = SPREAD[d].item()
        assert drawn[:, d].mean().item() == pytest.approx(MEAN[d].item(), abs=5 * s / 4_000**0.5 + 0.02 * s)
        assert drawn[:, d].std().item() == pytest.approx(s, abs=5 * s / 8_000**0.5 + 0.02 * s)


def test_ancestral_steps_keep_the_law_of_every_level():
    """One step, from the exact law at one level: x' = clean + keep (x - clean) + then (1 - keep)^(1/2) n is linear in x, so its
    mean and variance are known. 20,000 draws, five standard errors: false alarm below 2e-6; the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([1.0, 0.4])
    x = MEAN + (SPREAD**2 + 1.0).sqrt() * torch.randn(20_000, 1, 2, generator=generator)
    after = diffusion._ancestral(best, x, levels, generator)[:, 0]
    keep = 0.4**2
    for d in range(2):
        s2 = SPREAD[d].item() ** 2
        slope = s2 / (s2 + 1)  # of the clean estimate in x
        variance = (slope + keep * (1 - slope)) ** 2 * (s2 + 1) + 0.4**2 * (1 - keep)
        assert after[:, d].mean().item() == pytest.approx(MEAN[d].item(), abs=5 * (variance / 20_000) ** 0.5)
        assert after[:, d].var().item() == pytest.approx(variance, rel=5 * (2 / 20_000) ** 0.5)


def test_churn_is_the_papers_formula():
    """One step: gamma = min(S_churn / steps, 2^(1/2) - 1), noise of S_noise (raised^2 - now^2)^(1/2), then Euler from there."""
    start = numbers(3, 2).double()
    for churn, churn_noise in ((0.3, 1.0), (5.0, 1.1)):
        sampling = Sampling(steps=1, churn=churn, churn_noise=churn_noise, solver="euler")
        drawn = diffusion.sample(best, start, Diffusion(), sampling, torch.Generator().manual_seed(4))
        noise = torch.randn(3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        raised = 20.0 * (1 + min(churn, math.sqrt(2) - 1))
        x = 20.0 * start + churn_noise * math.sqrt(raised**2 - 400.0) * noise[:, 0]
        expected = best(x[:, None], torch.full((3, 1), raised, dtype=torch.float64))[:, 0]
        torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)
    outside = Sampling(steps=4, churn=5.0, churn_min=30.0)
    still = diffusion.sample(best, start, Diffusion(), outside, torch.Generator())
    assert still.equal(diffusion.sample(best, start, Diffusion(), Sampling(steps=4), torch.Generator()))


@pytest.mark.parametrize(
    "sampling", [{"solver": "midpoint"}, {"solver": "dpmpp_2m", "churn": 1.0}, {"solver": "ancestral", "churn": 1.0}]
)
def test_what_a_solver_cannot_do_is_refused(sampling):
    with pytest.raises(UsageError, match=r"model.sampling.(solver|churn) = "):
        ModelSettings(sampling=Sampling(**sampling))
