"""The objective and the sampler against the paper's formulas, written out one number at a time."""

import math

import pytest
import torch

from sfumato.models.objectives import diffusion
from sfumato.models.settings import Diffusion, Sampling

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


@pytest.mark.parametrize("churn", [0.0, 0.2])
def test_the_sampler_draws_the_distribution_that_the_denoiser_knows(churn):
    """Of a Gaussian the best denoiser is known; 4,000 draws must have its mean and spread to five standard errors and 2 %
    for the discretisation: false alarm below 1e-5; the seed is fixed."""
    mean, spread = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 0.6])

    def best(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma[..., None]
        return (spread**2 * noisy + s**2 * mean) / (spread**2 + s**2)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4_000, 2, generator=generator)
    drawn = diffusion.sample(best, start, Diffusion(), Sampling(steps=40, churn=churn), generator)
    for d in range(2):
        s = spread[d].item()
        assert drawn[:, d].mean().item() == pytest.approx(mean[d].item(), abs=5 * s / 4_000**0.5 + 0.02 * s)
        assert drawn[:, d].std().item() == pytest.approx(s, abs=5 * s / 8_000**0.5 + 0.02 * s)
