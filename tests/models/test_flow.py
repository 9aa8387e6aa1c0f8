"""Flow matching: the loss against its formula, one number at a time, and the solvers against exact paths."""

import math

import pytest
import torch
from tests.models.test_diffusion import numbers

from sfumato.errors import UsageError
from sfumato.models.objectives import flow
from sfumato.models.settings import Flow, ModelSettings, Sampling, Solver

R, K, D, E = 3, 2, 4, 5
SCALE = torch.tensor([0.5, 0.2, 1.3, 0.7])


def network(latents: torch.Tensor, level: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Any function of the three; rows and draws apart from each other."""
    return torch.sin(latents) + 0.3 * level[..., None] + condition.mean(dim=-1, keepdim=True)


def test_the_loss_is_the_squared_error_of_the_velocity_one_number_at_a_time():
    clean, condition = numbers(R, D), numbers(R, E, seed=1)
    time, noise = numbers(R, K, seed=2).sigmoid(), numbers(R, K, D, seed=3)
    fast = flow.record_losses(network, clean, condition, time, noise, SCALE)
    assert fast.shape == (R,)
    mean_square = sum(s**2 for s in SCALE.tolist()) / D
    for r in range(R):
        total = 0.0
        for k in range(K):
            t = time[r, k].item()
            z = [clean[r, d].item() / SCALE[d].item() for d in range(D)]
            n = [noise[r, k, d].item() for d in range(D)]
            path = [(1 - t) * z[d] + t * n[d] for d in range(D)]
            length = math.sqrt((1 - t) ** 2 + t**2)
            told = network(torch.tensor(path) / length, torch.tensor(math.log(t / (1 - t)) / 4), condition[r])
            for d in range(D):
                estimate = (2 * t - 1) / length**2 * path[d] + told[d].item() / length
                total += SCALE[d].item() ** 2 / mean_square * (estimate - (n[d] - z[d])) ** 2
        assert fast[r].item() == pytest.approx(total / (K * D), rel=1e-4)


def test_more_draws_give_the_mean_of_the_losses_of_one_draw():
    clean, condition = numbers(R, D), numbers(R, E, seed=1)
    time, noise = numbers(R, 6, seed=2).sigmoid(), numbers(R, 6, D, seed=3)
    together = flow.record_losses(network, clean, condition, time, noise, SCALE)
    single = [
        flow.record_losses(network, clean, condition, time[:, k : k + 1], noise[:, k : k + 1], SCALE) for k in range(6)
    ]
    torch.testing.assert_close(together, torch.stack(single).mean(0))


def test_times_are_logit_normal():
    """Mean and spread of the logits of 20,000 times within five standard errors: false alarm below 2e-6; the seed is fixed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = flow.times(Flow(logit_time_mean=-0.4, logit_time_std=1.3), (20_000,)).logit()
    assert logits.mean().item() == pytest.approx(-0.4, abs=5 * 1.3 / 20_000**0.5)
    assert logits.std().item() == pytest.approx(1.3, abs=5 * 1.3 / 40_000**0.5)
    even = flow.even_times(Flow(logit_time_mean=-0.4, logit_time_std=1.3), 1_001)
    assert even.logit().median().item() == pytest.approx(-0.4, abs=1e-4)


def silent(latents: torch.Tensor, level: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(latents)


def far(steps: int, solver: Solver, mean: float, spread: float) -> float:
    """How far the paths end from where they end exactly, mean + spread n, where the velocity is that of Gaussian data."""

    def exact(z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """E[n - z0 | z_t] of z0 ~ N(mean, spread^2)."""
        t = time[..., None]
        variance = (1 - t) ** 2 * spread**2 + t**2
        return -mean + (t - (1 - t) * spread**2) / variance * (z - (1 - t) * mean)

    start = numbers(50, 2).double()
    drawn = flow.sample(exact, start, Sampling(steps=steps, solver=solver))
    return float((drawn - (mean + spread * start)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_a_solver_follows_the_exact_path_to_its_order(solver, order):
    """Four times the steps, about 4^order times nearer; and near, in the end."""
    assert far(160, solver, 0.5, 0.4) < far(40, solver, 0.5, 0.4) / 4 ** (order - 0.35)
    assert far(160, solver, 0.5, 0.4) < {1: 0.03, 2: 1e-3}[order]


def test_an_untrained_network_is_the_exact_flow_of_data_with_the_assumed_scale():
    """Zeros in, noise stays what it is: N(0, 1) in units of the scale."""
    start = numbers(20, D)
    velocity = flow.guided(silent, numbers(20, E, seed=1), 0.0)
    drawn = flow.sample(velocity, start, Sampling(steps=100, solver="midpoint"))
    torch.testing.assert_close(drawn, start, rtol=1e-3, atol=1e-3)


def test_guidance_is_of_velocities_and_zero_is_the_conditional_model_alone():
    condition, path, time = numbers(R, E), numbers(R, 1, D, seed=1), torch.full((R, 1), 0.4)
    plain = flow.velocity(network, path, time, condition[:, None])
    free = flow.velocity(network, path, time, torch.zeros(R, 1, E))
    assert flow.guided(network, condition, 0.0)(path, time).equal(plain)
    torch.testing.assert_close(flow.guided(network, condition, 1.5)(path, time), plain + 1.5 * (plain - free))


@pytest.mark.parametrize("sampling", [{"solver": "dpmpp_2m"}, {"solver": "ancestral"}, {"churn": 1.0}])
def test_what_a_flow_cannot_do_is_refused(sampling):
    with pytest.raises(UsageError, match=r"model.sampling.(solver|churn) = "):
        ModelSettings(objective=Flow(), sampling=Sampling(**sampling))
