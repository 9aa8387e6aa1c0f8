"""Text -> image by diffusion: a denoiser told what a trained layer makes of the text.

Shapes: R records, K draws, D latent entries, E condition width.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.backbones.mlp import ResidualMlp
from sfumato.models.codecs import sentence
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.codecs.text_features import TextFeatures
from sfumato.models.generative import Direction, Generative, write_json
from sfumato.models.objectives import diffusion
from sfumato.models.settings import Diffusion, FrozenSentence, Mlp, ModelSettings, Sampling, Transformer, UNet
from sfumato.models.shapes import Shapes
from sfumato.records import Batch, Modality


class TextEncoder(nn.Module):
    """What the codec made of a text -> the condition, (R, V or S) -> (R, E). Trained with the model, privately.

    The first layer starts as a random projection with unit-scale output: bags of words differ from the first step on,
    and private training need not spend its budget on making them differ.
    """

    def __init__(self, inputs: int, width: int, first_std: float) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.mix = nn.Linear(width, width)
        nn.init.normal_(self.project.weight, std=first_std)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(features)
        mixed = projected + self.mix(nn.functional.silu(projected))
        return nn.functional.layer_norm(mixed, mixed.shape[-1:])


class DiffusionModel(Generative):
    """Its folders are those of a diffusers pipeline; a U-Net loads there."""

    family = "diffusion"

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        image, text = self.codecs.get("image"), self.codecs.get("text")
        assert isinstance(settings.objective, Diffusion)
        self.objective = settings.objective
        if not isinstance(image, PictureCodec) or not isinstance(text, TextFeatures):
            raise UsageError(
                "model.objective.kind = diffusion · makes pictures of texts: it needs a picture codec and a text condition",
                next="Set model.image and model.text.",
            )
        self.image, self.text = image, text
        self.scale = image.scale
        condition = text.settings.width
        self.text_encoder = TextEncoder(text.width, condition, text.first_std())
        match settings.backbone:
            case Mlp(width=hidden, depth=depth):
                self.denoiser: nn.Module = ResidualMlp(self.scale.numel(), condition, width=hidden, depth=depth)
            case UNet() as unet:
                from sfumato.models.backbones.unet import UNetDenoiser

                self.denoiser = UNetDenoiser(image.shape, condition, unet)
            case Transformer():
                raise UsageError(
                    "model.backbone.kind = transformer · says tokens, diffusion takes numbers away from noise",
                    next="Set model.backbone.kind to mlp or unet, or model.objective.kind: autoregressive.",
                )

    @property
    def directions(self) -> tuple[Direction, ...]:
        return (Direction(("text",), ("image",)),)

    def condition(self, encoded: Tensor, present: Tensor) -> Tensor:
        """Encoded texts -> (R, E); zero where a text is missing, which is what "no condition" means to the denoiser."""
        features = self.text.features(encoded).to(self.text_encoder.project.weight.dtype)
        return self.text_encoder(features) * present[:, None]

    # -- the objective --

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,): each the mean over K draws of noise level and noise."""
        objective = self.objective
        rows, present = batch.num_rows, batch.present["text"]
        if generator is None or draws is None:
            present = present & (torch.rand(rows) >= objective.condition_dropout)
            shape = (rows, objective.noise_multiplicity)
            sigma = diffusion.noise_levels(objective, shape)
            noise = torch.randn(*shape, self.scale.numel())
        else:
            middle = (torch.arange(draws) + 0.5) / draws
            level = torch.special.ndtri(middle) * objective.log_sigma_std + objective.log_sigma_mean
            sigma = level.exp().expand(rows, -1)
            noise = torch.randn(rows, draws, self.scale.numel(), generator=generator)
        return self._record_losses(batch, self.condition(batch.tensors["text"], present), sigma, noise)

    def _record_losses(self, batch: Batch, condition: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Args: condition (R, E), sigma (R, K), noise (R, K, D)."""
        values = diffusion.record_losses(
            self.denoiser,
            batch.tensors["image"],
            condition,
            sigma,
            noise,
            self.scale,
            self.objective.sigma_data,
        )
        return values * batch.present["image"]  # a record without a picture has nothing to lose

    def draw(
        self,
        encoded: Mapping[Modality, Tensor],
        present: Mapping[Modality, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        condition = self.condition(encoded["text"], present["text"])
        denoiser = diffusion.guided(self.denoiser, condition, self.scale, sampling.guidance)
        start = torch.randn(len(condition), self.scale.numel(), generator=generator)
        return {"image": diffusion.sample(denoiser, start, self.objective, sampling, generator)}

    # -- on disk: the folders of a diffusers pipeline --

    def parts(self) -> dict[str, nn.Module]:
        name, part = self._denoiser_part()
        return {"text_encoder": self.text_encoder, name: part}

    def file_of(self, part: str) -> str:
        return f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"

    def write(self, folder: Path) -> None:
        name, part = self._denoiser_part()
        super().write(folder)
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        write_json(folder / "model_index.json", self._index(name))
        write_json(folder / "scheduler" / "scheduler_config.json", self._scheduler())
        write_json(folder / "text_encoder" / "config.json", self._text_config())
        match self.settings.backbone:
            case UNet():
                write_json(folder / name / "config.json", _unet_config(part))
            case Mlp(width=width, depth=depth):
                write_json(
                    folder / name / "config.json", {"_class_name": "ResidualMlp", "width": width, "depth": depth}
                )

    def _denoiser_part(self) -> tuple[str, nn.Module]:
        match self.settings.backbone:
            case UNet():
                return "unet", self.denoiser.get_submodule("unet")
            case _:
                return "denoiser", self.denoiser

    def _index(self, name: str) -> dict[str, Any]:
        denoiser = ["diffusers", "UNet2DConditionModel"] if name == "unet" else ["sfumato", "ResidualMlp"]
        return {
            "_class_name": "TextToImage",
            name: denoiser,
            "text_encoder": ["sfumato", "TextEncoder"],
            "scheduler": ["diffusers", "EDMEulerScheduler"],
        }

    def _scheduler(self) -> dict[str, Any]:
        objective = self.objective
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": objective.sigma_min,
            "sigma_max": objective.sigma_max,
            "sigma_data": objective.sigma_data,
            "rho": 7.0,
            "prediction_type": "epsilon",
        }

    def _text_config(self) -> dict[str, Any]:
        text = self.settings.text
        frozen = sentence.fingerprint(text.name) if isinstance(text, FrozenSentence) else None
        return {"_class_name": "TextEncoder", "features": self.text.settings.kind, "frozen_encoder_sha256": frozen}


def _unet_config(unet: nn.Module) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    assert isinstance(unet, UNet2DConditionModel)
    return json.loads(unet.to_json_string())
