"""A clipping bound that follows a quantile of the gradients' norms, and what its knowledge costs.

One step asks the same Poisson sample of units two things: the sum of gradients clipped to C, with noise z C, and how many
of them were no longer than C. The second is released as the sum over units of 1[norm <= C] - 1/2, which one unit moves by
at most 1/2, plus N(0, b^2). Both together are one Gaussian mechanism of noise multiplier

    sigma = (z^-2 + (2 b)^-2)^(-1/2),

and this sigma is what is charged: the gradient gets the larger z = (sigma^-2 - (2 b)^-2)^(-1/2). From the noisy count
follows C <- C exp(-eta (count / B + 1/2 - gamma)), with B the expected batch size. That is post-processing: the next C
may be looked at and stored. The steps compose as if C were fixed, because the ratios of noise to sensitivity are.

Source: Andrew et al. 2021, arXiv:1905.03871, Theorem 1 and Algorithm 1 (eta = 0.2, b = B / 20).
Differs: Poisson sampling and the expected batch size, where they have a batch of fixed size.
"""

import math
from dataclasses import dataclass
from typing import Any

from sfumato import checks
from sfumato.errors import PrivacyRefused

RANGE = 1e9  # C stays within this factor of where it began, so that no noise can make it 0 or infinite


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveClip:
    """Clipping to a quantile of the norms; the engine's ``max_grad_norm`` is where C begins.

    Attributes:
      quantile: gamma, in (0, 1): the share of units that should be no longer than C.
      learning_rate: eta > 0, of log C.
      count_noise: b, the standard deviation of the noise on the count, in units; None is B / 20.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        checks.probability(quantile=self.quantile)
        checks.positive(quantile=self.quantile, learning_rate=self.learning_rate)
        if self.count_noise is not None:
            checks.positive(count_noise=self.count_noise)

    def count_std(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """b; 0 where nothing gets noise and nothing is claimed."""
        if noise_multiplier == 0:
            return 0.0
        return expected_batch_size / 20 if self.count_noise is None else self.count_noise

    def gradient_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """z, with which gradient and count together cost sigma = ``noise_multiplier``.

        Raises: PrivacyRefused where the count alone would cost as much, or more.
        """
        if noise_multiplier == 0:
            return 0.0
        std = self.count_std(noise_multiplier, expected_batch_size)
        left = noise_multiplier**-2 - (2 * std) ** -2
        if left <= 0:
            raise PrivacyRefused(
                f"noise_multiplier = {noise_multiplier:g} · counting with noise {std:g} alone costs as much: it must be "
                f"below {2 * std:g}",
                next="Raise count_noise or the expected batch size, or use another clipping.",
                code="count_noise",
            )
        return left**-0.5

    def count(self, norms: Any, bound: float) -> float:
        """The sum over units of 1[norm <= C] - 1/2; a norm that is no number is not short. Args: norms: a tensor (B,)."""
        return float((norms <= bound).sum()) - norms.shape[0] / 2

    def next_bound(self, bound: float, noisy_count: float, expected_batch_size: float, initial: float) -> float:
        """C of the next step. Args: noisy_count: the sum over units of 1[norm <= C] - 1/2, with its noise."""
        excess = noisy_count / expected_batch_size + 0.5 - self.quantile
        exponent = max(-100.0, min(100.0, -self.learning_rate * excess))
        return min(max(bound * math.exp(exponent), initial / RANGE), initial * RANGE)
