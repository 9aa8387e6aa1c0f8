"""Diffusion on released latents, against the closed form in one dimension and on tables."""

import math

import pytest
import torch

from sfumato.models.objectives import released

S0, RATIO = 0.8, 1.5  # noise of the release; level of the question in units of it


def mixture_mean(noisy: torch.Tensor, at: torch.Tensor, weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[value | noisy] for a discrete clean law: values ``at`` with ``weight``, seen through N(0, sigma^2). (R,)"""
    log = -((noisy[:, None] - at) ** 2) / (2 * sigma**2) + weight.log()
    return (torch.softmax(log, dim=1) * at).sum(dim=1)


def released_posterior(
    noisy: torch.Tensor, at: torch.Tensor, weight: torch.Tensor, s0: float, st: float
) -> torch.Tensor:
    """E[z~ | z_t], from the joint Gaussian of z~ and z_t given z0: z0 + (s0^2 / st^2) (z_t - z0), averaged over z0 | z_t."""
    return mixture_mean(noisy, at, weight, st) * (1 - (s0 / st) ** 2) + noisy * (s0 / st) ** 2


def test_the_clean_mean_is_the_closed_form_and_the_released_mean_is_not():
    """Three points on a line, float64: 1e-12 against the truth; taking E[z~ | z_t] for E[z0 | z_t] is off by 1.4."""
    at = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    weight = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    noisy = torch.linspace(-4, 5, 901, dtype=torch.float64)
    sigma_0, sigma_t = torch.tensor(S0, dtype=torch.float64), torch.tensor(S0 * RATIO, dtype=torch.float64)
    truth = mixture_mean(noisy, at, weight, S0 * RATIO)
    regressed = released_posterior(noisy, at, weight, S0, S0 * RATIO)
    exact = released.clean_mean(noisy, regressed, sigma_t, sigma_0)
    assert float((exact - truth).abs().max()) < 1e-12
    assert float((regressed - truth).abs().max()) == pytest.approx(1.4, abs=0.1)
    assert torch.allclose(released.released_mean(noisy, truth, sigma_t, sigma_0), regressed, atol=1e-12)


def test_the_posterior_of_the_release_is_what_integration_gives():
    """The oracle's oracle: E[z~ | z_t] by a Riemann sum over z~, no formula of ours in it."""
    at, weight = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    st = S0 * RATIO
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)[None]
    noisy = torch.tensor([-2.0, 0.1, 3.3], dtype=torch.float64)
    density = (weight[:, None] * torch.exp(-((grid - at[:, None]) ** 2) / (2 * S0**2))).sum(0)
    joint = density * torch.exp(-((noisy[:, None] - grid) ** 2) / (2 * (st**2 - S0**2)))
    integrated = (joint * grid).sum(1) / joint.sum(1)
    assert torch.allclose(integrated, released_posterior(noisy, at, weight, S0, st), atol=1e-10)


def test_a_regression_on_releases_finds_the_clean_mean():
    """Least squares on 400,000 released numbers with the loss that training uses; the naive target fails the same test.
    The tolerance is 6 standard errors: false-alarm probability below 1e-8 a coefficient."""
    generator = torch.Generator().manual_seed(0)
    count, mean, spread = 400_000, 0.7, 1.1
    clean = mean + spread * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    sigma_0 = torch.tensor([S0], dtype=torch.float64)
    seen = clean + sigma_0 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 1, 1, generator=generator, dtype=torch.float64)
    ratio = torch.full((count, 1), RATIO, dtype=torch.float64)
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def losses(naive: bool) -> torch.Tensor:
        def denoiser(noisy: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return coefficients[0] + coefficients[1] * noisy

        if naive:
            noisy = released.noised(seen[:, None], RATIO * sigma_0, sigma_0, noise)
            return ((denoiser(noisy, ratio) - seen[:, None]) ** 2).mean(dim=(1, 2))
        return released.record_losses(denoiser, seen, sigma_0, ratio, noise)

    def fitted(naive: bool) -> torch.Tensor:  # the losses are quadratic: one Newton step is the answer
        start = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            coefficients.copy_(start)
        (gradient,) = torch.autograd.grad(losses(naive).mean(), coefficients, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, coefficients, retain_graph=True)[0] for g in gradient])
        return torch.linalg.solve(hessian, -gradient.detach())

    slope = spread**2 / (spread**2 + (S0 * RATIO) ** 2)
    truth = torch.tensor([mean * (1 - slope), slope], dtype=torch.float64)
    tolerance = 6 * 3.0 / math.sqrt(count)  # the target's standard deviation, divided by share, is below 3
    assert (fitted(naive=False) - truth).abs().max() < tolerance
    assert (fitted(naive=True) - truth).abs().max() > 3 * tolerance


def test_each_entry_has_its_own_level():
    sigma_0 = torch.tensor([0.5, 2.0], dtype=torch.float64)
    seen = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    draws = torch.tensor([[[0.3, -0.7]]], dtype=torch.float64)
    ratio = torch.tensor([[1.5]], dtype=torch.float64)
    asked: list[torch.Tensor] = []

    def denoiser(noisy: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        asked.append(noisy)
        assert given.shape == (1, 1)
        return torch.zeros_like(noisy)

    loss = released.record_losses(denoiser, seen, sigma_0, ratio, draws)
    expected = torch.tensor([1.0 + 0.3 * 0.5 * math.sqrt(1.25), -3.0 - 0.7 * 2.0 * math.sqrt(1.25)])
    assert torch.allclose(asked[0][0, 0], expected.double(), atol=1e-7)
    predicted = asked[0][0, 0] * (1 / 1.5**2)
    assert float(loss) == pytest.approx(float((((predicted - seen[0]) / sigma_0) ** 2).mean()))


def test_levels_lie_between_least_and_most():
    ratio = released.levels(torch.tensor([2.0]), 1.1, 5.0, torch.tensor([[0.0, 0.5, 1.0]]))[..., 0] / 2.0
    assert torch.allclose(ratio, torch.tensor([[1.1, math.sqrt(5.5), 5.0]]))


def test_sampling_from_a_known_law_ends_at_the_clean_mean():
    """A Gaussian law: the sampler's variance is that of E[z0 | z_t], (s^2)^2 / (s^2 + sigma_t^2); never more is learnt.
    Monte Carlo over 200,000 draws, 200 steps: 3 % is more than 10 standard errors and the discretisation."""
    spread, sigma_0 = 1.5, torch.tensor([S0], dtype=torch.float64)

    def denoiser(noisy: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        variance = (ratio[..., None] * sigma_0) ** 2
        return noisy * spread**2 / (spread**2 + variance)

    start = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratios = torch.exp(torch.linspace(math.log(60.0), math.log(1.02), 200, dtype=torch.float64))
    drawn = released.sample(denoiser, start, sigma_0, ratios)
    expected = spread**4 / (spread**2 + (1.02 * S0) ** 2)
    assert float(drawn.var()) == pytest.approx(expected, rel=0.03)
    assert float(drawn.var()) < spread**2
