"""Anything -> a picture or a sound by flow matching on straight paths.

Shapes: R records, K draws, D latent entries, E condition width.
"""

from typing import Any

import torch
from torch import Tensor

from sfumato.models.families.denoising import Denoising
from sfumato.models.objectives import flow
from sfumato.models.settings import Flow, Sampling


class FlowModel(Denoising):
    family = "flow"

    @property
    def objective(self) -> Flow:
        assert isinstance(self.settings.objective, Flow)
        return self.settings.objective

    @property
    def dropout(self) -> float:
        return self.objective.condition_dropout

    @property
    def draws(self) -> int:
        return self.objective.noise_multiplicity

    def levels(self, shape: tuple[int, int]) -> Tensor:
        return flow.times(self.objective, shape)

    def even_levels(self, draws: int) -> Tensor:
        return flow.even_times(self.objective, draws)

    def latent_losses(self, clean: Tensor, condition: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        return flow.record_losses(self.denoiser, clean, condition, levels, noise, self.scale)

    def drawn(self, condition: Tensor, start: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        velocity = flow.guided(self.denoiser, condition, sampling.guidance)
        return flow.sample(velocity, start, sampling) * self.scale

    def scheduler(self) -> dict[str, Any]:
        return {"_class_name": "StraightFlow", "logit_preconditioned": True, "times": "1 to 0, equal steps"}
