"""Anything -> a picture or a sound by diffusion (EDM).

Shapes: R records, K draws, D latent entries, E condition width.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.models.families.denoising import Denoising
from sfumato.models.objectives import diffusion
from sfumato.models.settings import Diffusion, Sampling


class DiffusionModel(Denoising):
    family = "diffusion"

    @property
    def objective(self) -> Diffusion:
        assert isinstance(self.settings.objective, Diffusion)
        return self.settings.objective

    @property
    def dropout(self) -> float:
        return self.objective.condition_dropout

    @property
    def draws(self) -> int:
        return self.objective.noise_multiplicity

    def levels(self, shape: tuple[int, int]) -> Tensor:
        return diffusion.noise_levels(self.objective, shape)

    def even_levels(self, draws: int) -> Tensor:
        return diffusion.even_noise_levels(self.objective, draws)

    def latent_losses(self, clean: Tensor, condition: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        of = self.objective
        return diffusion.record_losses(
            self.denoiser, clean, condition, levels, noise, self.scale, of.sigma_data, of.prediction
        )

    def drawn(self, condition: Tensor, start: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        denoiser = diffusion.guided(self.denoiser, condition, self.scale, sampling.guidance, self.objective.prediction)
        return diffusion.sample(denoiser, start, self.objective, sampling, generator)

    def scheduler(self) -> dict[str, Any]:
        of = self.objective
        return {
            # the scheduler of diffusers knows EDM's own preconditioning, which it calls "epsilon"
            "_class_name": "EDMEulerScheduler" if of.prediction == "v" else "EdmLevels",
            "sigma_min": of.sigma_min,
            "sigma_max": of.sigma_max,
            "sigma_data": of.sigma_data,
            "rho": 7.0,
            "prediction_type": "epsilon" if of.prediction == "v" else of.prediction,
        }
