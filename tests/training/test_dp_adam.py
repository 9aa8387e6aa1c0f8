"""DP-AdamBC against its formula, and against what the formula is for."""

import json
import math

import pytest
import torch
from torch import nn

from sfumato.errors import UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.noise import gaussian
from sfumato.randomness import TestRandom
from sfumato.training import loop, state
from sfumato.training.dp_adam import DpAdamBC
from sfumato.training.settings import TrainingSettings


def slow(gradients, variances, *, x=0.0, lr=0.1, beta1=0.9, beta2=0.99, floor=0.1, eps=1e-8, decay=0.0) -> float:
    """One coordinate, in Python's floats."""
    m = v = n = 0.0
    for t, (g, variance) in enumerate(zip(gradients, variances, strict=True), start=1):
        m, v, n = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2, beta2 * n + (1 - beta2) * variance
        m_hat, v_hat, n_hat = m / (1 - beta1**t), v / (1 - beta2**t), n / (1 - beta2**t)
        x = x * (1 - lr * decay) - lr * m_hat / math.sqrt(max(v_hat - n_hat, floor * n_hat) + eps**2)
    return x


def taken(gradients: torch.Tensor, variances, **options) -> torch.Tensor:
    """(d,) after the steps of gradients (T, d)."""
    x = nn.Parameter(torch.full((gradients.shape[1],), options.pop("x", 0.0), dtype=gradients.dtype))
    now = iter(variances)
    optimizer = DpAdamBC([x], 0.1, betas=(0.9, 0.99), noise_variance=lambda parameter: next(now), **options)
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    return x.detach()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("variances", [[0.25] * 40, [0.0] * 40, [0.1 + 0.01 * t for t in range(40)]])
def test_steps_are_those_of_the_formula(variances, decay):
    torch.manual_seed(0)
    gradients = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0, 0.0])
    ours = taken(gradients, variances, weight_decay=decay, x=0.7)
    expected = [slow(column.tolist(), variances, decay=decay, x=0.7) for column in gradients.T]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_without_noise_it_is_adam_but_for_where_eps_stands():
    torch.manual_seed(1)
    gradients = torch.randn(30, 8, dtype=torch.float64)
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    adam = torch.optim.AdamW([x], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for gradient in gradients:
        x.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(taken(gradients, [0.0] * 30), x.detach(), rtol=1e-6, atol=1e-9)


def test_on_pure_noise_the_second_moment_is_zero_on_average_and_adams_is_not():
    """200,000 coordinates of noise alone, through the engine's noise; the mean of v^ - n^ is within 4.9 standard errors of 0:
    false-alarm probability 1e-6. Without the correction it is the variance of the noise."""
    count, steps, std, beta2 = 200_000, 30, 0.3, 0.9
    random, x = TestRandom(4), nn.Parameter(torch.zeros(200_000, dtype=torch.float64))
    optimizer = DpAdamBC([x], 0.1, betas=(0.9, beta2), noise_variance=lambda parameter: std**2)
    for _ in range(steps):
        x.grad = gaussian(count, std, random)
        optimizer.step()
    held = optimizer.state[x]
    corrected = (held["exp_avg_sq"] - held["noise"]) / (1 - beta2**steps)
    error = float(corrected.std()) / math.sqrt(count)
    assert abs(float(corrected.mean())) < 4.9 * error
    assert float(held["exp_avg_sq"].mean()) / (1 - beta2**steps) > 100 * error
    assert held["noise"] / (1 - beta2**steps) == pytest.approx(std**2)


def test_small_gradients_under_noise_are_told_apart_where_adam_sees_one_size():
    """What it is for: two coordinates of gradients 1 and 0.2 under noise of variance 1; Adam moves them by about 1.2 : 0.2, the
    corrected one by nearly the same length."""
    torch.manual_seed(2)
    gradients = torch.tensor([1.0, 0.2], dtype=torch.float64) + torch.randn(3000, 2, dtype=torch.float64)

    def distance(variance: float) -> torch.Tensor:
        x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = DpAdamBC([x], 1e-3, noise_variance=lambda parameter: variance, floor=0.01)
        for gradient in gradients:
            x.grad = gradient.clone()
            optimizer.step()
        return -x.detach()

    adam, corrected = distance(0.0), distance(1.0)
    assert float(adam[0] / adam[1]) > 3.0
    assert float(corrected[0] / corrected[1]) < 2.0


def test_the_engine_says_the_variance_of_what_it_releases():
    """The mean square of a released gradient without data, against ``noise_variance``; chi-square, false-alarm 1e-6."""
    from scipy.stats import chi2

    model = nn.Linear(200, 50)
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=2.0, noise_multiplier=1.5, random=TestRandom(3), expected_batch_size=20, sampling_rate=0.1
    )
    optimizer = DpAdamBC(model.parameters(), 1e-3, noise_variance=engine.noise_variance)
    engine.attach(optimizer)
    model(torch.zeros(0, 200)).sum().backward()
    optimizer.step()
    weight = model.weight
    assert weight.grad is not None
    assert engine.noise_variance(weight) == pytest.approx((1.5 * 2.0 / 20) ** 2, rel=1e-4)
    statistic = float(weight.grad.double().square().sum()) / engine.noise_variance(weight)
    assert chi2.ppf(5e-7, weight.numel()) < statistic < chi2.ppf(1 - 5e-7, weight.numel())


def test_the_setting_makes_it_and_the_loop_gives_it_the_variance():
    model = nn.Linear(3, 2)
    settings = TrainingSettings(optimizer="dp_adam_bc", learning_rate=0.02, weight_decay=0.1)
    optimizer = loop.make_optimizer(model, settings)
    assert isinstance(optimizer, DpAdamBC)
    assert optimizer.param_groups[0]["lr"] == 0.02 and optimizer.param_groups[0]["weight_decay"] == 0.1
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0), expected_batch_size=4, sampling_rate=0.1
    )
    with loop.attached(engine, optimizer):
        assert optimizer.noise_variance is not None
        assert optimizer.noise_variance(model.weight) == pytest.approx(1 / 16, rel=1e-4)


def test_its_state_goes_through_a_checkpoint():
    torch.manual_seed(3)
    gradients = torch.randn(12, 5)

    def steps(optimizer: DpAdamBC, x: nn.Parameter, rows: torch.Tensor) -> None:
        for gradient in rows:
            x.grad = gradient.clone()
            optimizer.step()

    x = nn.Parameter(torch.zeros(5))
    optimizer = DpAdamBC([x], noise_variance=lambda parameter: 0.5)
    steps(optimizer, x, gradients[:6])
    tensors, numbers = state._flatten(optimizer)
    y = nn.Parameter(x.detach().clone())
    resumed = DpAdamBC([y], noise_variance=lambda parameter: 0.5)
    state._unflatten(resumed, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)))
    steps(optimizer, x, gradients[6:])
    steps(resumed, y, gradients[6:])
    assert torch.equal(x, y)


def test_wrong_use_is_refused_by_name():
    x = nn.Parameter(torch.zeros(1))
    x.grad = torch.ones(1)
    with pytest.raises(UsageError, match="noise_variance = None"):
        DpAdamBC([x]).step()
    with pytest.raises(UsageError, match="noise_variance = -1"):
        DpAdamBC([x], noise_variance=lambda parameter: -1.0).step()
    with pytest.raises(UsageError, match="betas"):
        DpAdamBC([x], betas=(0.9, 1.0))
    with pytest.raises(UsageError, match="floor"):
        DpAdamBC([x], floor=-1.0)
