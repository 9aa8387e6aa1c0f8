"""DP-AdamBC: Adam on noised gradients, whose second moment is freed of the noise's share.

The square of a noised gradient is on average the square of the gradient plus the variance of the noise, (sigma C / B)^2 for
independent noise. Where that is the larger one, as it usually is, Adam divides every coordinate by the same number, and is
SGD with momentum. Here it is subtracted:

    m_t = beta1 m_{t-1} + (1 - beta1) g_t          v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
    n_t = beta2 n_{t-1} + (1 - beta2) Var[noise_t]
    update = m^_t / sqrt(max(v^_t - n^_t, floor n^_t) + eps^2),       x^_t = x_t / (1 - beta^t),

so that the denominator of a coordinate without gradient is max(0 on average, floor). Post-processing: it costs no privacy.
n is a constant, the square of sigma C / B, as long as that does not change; with adaptive clipping and correlated noise it does.

Source: Tang, Shpilevskiy, Lécuyer 2024, arXiv:2312.14334, Algorithm 1 (section 3.2).
Differs: the floor is a share of the noise's variance, so that it means the same at every scale, where theirs is a number of
its own; n follows a variance that changes; weight decay as in AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import UsageError

Variance = Callable[[nn.Parameter], float]


class DpAdamBC(torch.optim.Optimizer):
    """Adam with the noise's variance taken off its second moment.

    Args:
      noise_variance: of every coordinate of a parameter's ``.grad`` in this step: ``engine.noise_variance``. It may be set
        later, as an attribute, but before the first step.
      floor: the least that is left of the second moment, as a share of that variance. After subtraction, a coordinate
        without gradient has a standard deviation of about sqrt((1 - beta2) / (1 + beta2) 2) of it, 0.03 for beta2 = 0.999.
      eps: in place of the floor where there is no noise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        noise_variance: Variance | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        checks.non_negative(lr=lr, weight_decay=weight_decay, floor=floor)
        checks.positive(eps=eps)
        checks.probability(beta1=betas[0], beta2=betas[1])
        if max(betas) >= 1:
            raise UsageError(f"betas = {betas} · must be below 1", next="Take (0.9, 0.999).")
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "eps": eps, "weight_decay": weight_decay})
        self.noise_variance = noise_variance

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.noise_variance is None:
            raise UsageError(
                "noise_variance = None · must be known before a step",
                next="Give DpAdamBC(..., noise_variance=engine.noise_variance).",
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, float(self.noise_variance(parameter)))
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], variance: float) -> None:
        checks.non_negative(noise_variance=variance)
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"], state["noise"] = 0, 0.0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["noise"] = beta2 * state["noise"] + (1 - beta2) * variance
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        noise = state["noise"] / second
        left = (square / second).sub_(noise).clamp_(min=group["floor"] * noise).add_(group["eps"] ** 2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, left.sqrt_(), value=-group["lr"] / first)
