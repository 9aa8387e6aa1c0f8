"""What diffusion and flow matching share: a target, conditions with trained layers, a denoiser, the folders of a pipeline.

The target is a picture's or a sound's latent; every other modality of the model is a condition that may be missing, and each is
dropped by chance in training, so that any subset of them conditions the target.

Shapes: R records, K draws, D latent entries of the target, E width of the conditions together.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.models.backbones.mlp import ResidualMlp
from sfumato.models.codecs import sentence
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.families.conditions import ConditionEncoder, Told, beside
from sfumato.models.families.reading import ANSWERS, FEATURES, Bank, PictureReader
from sfumato.models.generative import Direction, Generative, Origin, write_json
from sfumato.models.settings import (
    Diffusion,
    Flow,
    FrozenSentence,
    Mlp,
    ModelSettings,
    Sampling,
    TextCondition,
    Transformer,
    UNet,
)
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Batch, Modality, Record


class Denoising(Generative):
    """Its folders are those of a diffusers pipeline; a U-Net loads there."""

    def __init__(self, settings: ModelSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        objective = settings.objective
        assert isinstance(objective, Diffusion | Flow)
        self.target: Modality = objective.target
        codec = self.codecs.get(self.target)
        if codec is None or codec.kind != "continuous":
            raise UsageError(
                f"model.objective.target = {self.target} · {objective.kind} needs a codec of numbers for it",
                next=f"Set model.{self.target}, or model.objective.target.",
            )
        self.scale: Tensor = codec.scale
        self.augmentations, self.copies = objective.augmentations, objective.augmentation_multiplicity
        if self.augmentations and not isinstance(codec, PictureCodec):
            raise UsageError(
                f"model.objective.augmentations = {list(self.augmentations)} · are of pixels, which model.image.kind = "
                f"{codec.settings.kind} cannot be led back to",
                next="Leave them out, or set model.image: {kind: pixels} or {kind: cosine}.",
            )
        widths = dict.fromkeys(MODALITIES, objective.condition_width)
        if isinstance(settings.text, TextCondition):
            widths["text"] = settings.text.width
        self.told: dict[Modality, Told] = {
            name: Told(self.codecs[name], widths[name])
            for name in MODALITIES
            if name in self.codecs and name != self.target
        }
        for name, told in self.told.items():
            self.add_module(f"{name}_encoder", told.encoder())
        condition = sum(told.width for told in self.told.values())
        match settings.backbone:
            case Mlp(width=hidden, depth=depth):
                self.denoiser: nn.Module = ResidualMlp(self.scale.numel(), condition, width=hidden, depth=depth)
            case UNet() as unet:
                from sfumato.models.backbones.unet import UNetDenoiser

                self.denoiser = UNetDenoiser(_as_picture(codec.shape), condition, unet)
            case Transformer():
                raise UsageError(
                    f"model.backbone.kind = transformer · says tokens, {self.family} takes numbers away from noise",
                    next="Set model.backbone.kind to mlp or unet, or model.objective.kind: autoregressive.",
                )

        self.reader: PictureReader | None = None
        if settings.reader is not None:
            if not isinstance(codec, PictureCodec):
                raise UsageError(
                    f"model.reader · sees pixels, which model.image.kind = {codec.settings.kind} cannot be led back to",
                    next="Set model.image: {kind: pixels} or {kind: cosine}, or leave out the reader.",
                )
            self.needs_public = True  # it has no texts to answer with before
            self.reader = PictureReader(settings.reader, codec)
            self.reader_texts = Bank()

    # -- what an objective says --

    @property
    @abstractmethod
    def dropout(self) -> float:
        """The chance that a condition is dropped."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """K."""

    @abstractmethod
    def levels(self, shape: tuple[int, int]) -> Tensor:
        """Noise levels or times of a batch, (R, K), from torch's global chance."""

    @abstractmethod
    def even_levels(self, draws: int) -> Tensor:
        """(K,): the same distribution's quantiles."""

    @abstractmethod
    def latent_losses(self, clean: Tensor, condition: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """(R,). Args: clean (R, D), or (R, K, D) of copies; condition (R, E), levels (R, K), noise (R, K, D)."""

    @abstractmethod
    def drawn(self, condition: Tensor, start: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """(R, D) from ``start`` (R, D) standard normal."""

    @abstractmethod
    def scheduler(self) -> dict[str, Any]:
        """scheduler/scheduler_config.json."""

    # -- the family --

    @property
    def directions(self) -> tuple[Direction, ...]:
        drawn = Direction(tuple(self.told), (self.target,))
        return (drawn,) if self.reader is None else (drawn, Direction((self.target,), ("text",)))

    def tell_public(self, records: Sequence[Record]) -> None:
        """A reader answers with their texts."""
        if self.reader is not None:
            self.reader_texts.take(records)

    def origin(self, part: str) -> Origin:
        return "public" if part == "reader_texts" else super().origin(part)

    def boundary(self) -> list[str]:
        if self.reader is None:
            return []
        asked = ", ".join(question.name for question in self.reader.settings.questions)
        return [
            f"What a picture is read for is a public list of questions, which is in the recipe ({asked}); the reader, one linear layer "
            "over fixed features of pictures, is trained inside the guarantee. It takes part in drawing pictures for texts.",
            "Declared public: the texts of half of the public units. They are saved with the model, and it answers with them.",
        ]

    def _encoded(self, records: Sequence[Record]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        encoded, present = super()._encoded(records)
        if self.reader is not None:
            encoded[FEATURES], _ = self.reader.blank(len(records))
            seen = present[self.target]
            encoded[FEATURES][seen] = self.reader.features(encoded[self.target][seen])
            encoded[ANSWERS] = self.reader.answers([record.text for record in records])
            present |= dict.fromkeys((FEATURES, ANSWERS), seen & present["text"])
        return encoded, present

    def blank(self, rows: int) -> dict[str, Tensor]:
        blank = super().blank(rows)
        if self.reader is not None:
            blank[FEATURES], blank[ANSWERS] = self.reader.blank(rows)
        return blank

    def condition(self, encoded: Mapping[Any, Tensor], present: Mapping[Any, Tensor]) -> Tensor:
        """Encoded records -> (R, E); a missing part is zero, which is what "no condition" means to the denoiser."""
        parts = []
        for name, told in self.told.items():
            encoder = self.get_submodule(f"{name}_encoder")
            assert isinstance(encoder, ConditionEncoder)
            features = told.features(encoded[name]).to(encoder.project.weight.dtype)
            parts.append(encoder(features) * present[name][:, None])
        return beside(parts, len(encoded[self.target]))

    def record_losses(self, batch: Batch, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """(R,): each the mean over K draws of noise level and noise, for every one of M copies of its picture.

        An attack (``generator``) looks at the picture as it is.
        """
        rows, present, clean = batch.num_rows, dict(batch.present), batch.tensors[self.target]
        if generator is None or draws is None:
            for name in self.told:
                present[name] = present[name] & (torch.rand(rows) >= self.dropout)
            draws = self.draws * self.copies
            codec = self.codecs[self.target]
            if self.augmentations and isinstance(codec, PictureCodec):
                clean = codec.augmented(clean, self.augmentations, self.copies).repeat_interleave(self.draws, dim=1)
            levels = self.levels((rows, draws))
            noise = torch.randn(rows, draws, self.scale.numel())
        else:
            levels = self.even_levels(draws).expand(rows, -1)
            noise = torch.randn(rows, draws, self.scale.numel(), generator=generator)
        return self._record_losses(batch, self.condition(batch.tensors, present), levels, noise, clean)

    def _record_losses(
        self, batch: Batch, condition: Tensor, levels: Tensor, noise: Tensor, clean: Tensor | None = None
    ) -> Tensor:
        """Args: condition (R, E), levels (R, K), noise (R, K, D); clean: copies (R, K, D) in place of the batch's (R, D)."""
        values = self.latent_losses(batch.tensors[self.target] if clean is None else clean, condition, levels, noise)
        values = values * batch.present[self.target]  # a record without the target has nothing to lose
        if self.reader is None:
            return values
        read = self.reader.losses(batch.tensors[FEATURES], batch.tensors[ANSWERS])
        return values + self.reader.settings.weight * read * batch.present[ANSWERS]

    def draw(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        wanted: tuple[Modality, ...],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> dict[Modality, Tensor]:
        sampling.check_for(self.family)
        if wanted == ("text",):
            return {"text": self._read(encoded, present, sampling, generator)}
        if sampling.candidates > 1:
            return {self.target: self._candidate(encoded, present, sampling, generator)}
        condition = self.condition(encoded, present)
        start = torch.randn(len(condition), self.scale.numel(), generator=generator)
        return {self.target: self.drawn(condition, start, sampling, generator)}

    def decode(self, name: Modality, drawn: Tensor) -> Sequence[Any]:
        if name == "text" and self.reader is not None:
            texts = self.reader_texts.texts()
            return [texts[number] for number in drawn.tolist()]
        return super().decode(name, drawn)

    def _read(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Tensor:
        """Pictures -> numbers of the bank's texts; of no picture, any of them."""
        assert self.reader is not None  # or texts are not among the directions
        if not len(self.reader_texts.lengths):
            raise UsageError(
                "public texts = none · a reader answers with public texts",
                next="Set data.public_units; in a loop of your own, call tell_public(records).",
            )
        found = self.reader.texts(encoded[FEATURES], self.reader_texts, sampling.temperature, generator)
        anyone = torch.randint(len(self.reader_texts.lengths), found.shape, generator=generator)
        return torch.where(present[self.target], found, anyone)

    def _candidate(
        self,
        encoded: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Tensor:
        """Several pictures of every condition, (R, n, D), and the one that the reader takes, (R, D)."""
        if self.reader is None:
            raise UsageError(
                f"sampling.candidates = {sampling.candidates} · one of them is taken by a reader, and this model has none",
                next="Set it to 1, or train a model with model.reader.",
            )
        count = sampling.candidates
        condition = self.condition(encoded, present).repeat_interleave(count, 0)
        start = torch.randn(len(condition), self.scale.numel(), generator=generator)
        drawn = self.drawn(condition, start, sampling, generator)
        return self.reader.chosen(drawn.unflatten(0, (-1, count)), encoded[ANSWERS], generator)

    # -- on disk: the folders of a diffusers pipeline --

    def parts(self) -> dict[str, nn.Module]:
        name, part = self._denoiser_part()
        found = {**{f"{told}_encoder": self.get_submodule(f"{told}_encoder") for told in self.told}, name: part}
        if self.reader is None:
            return found
        return {**found, "reader": self.reader, "reader_texts": self.reader_texts}

    def file_of(self, part: str) -> str:
        ours = part.endswith("_encoder") or part.startswith("reader")
        return f"{part}/{'model' if ours else 'diffusion_pytorch_model'}.safetensors"

    def write(self, folder: Path) -> None:
        name, part = self._denoiser_part()
        super().write(folder)
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        write_json(folder / "model_index.json", self._index(name))
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler())
        for told in self.told:
            write_json(folder / f"{told}_encoder" / "config.json", self._encoder_config(told))
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
        scheduler = self.scheduler()["_class_name"]
        return {
            "_class_name": "-".join([*self.told, "to", self.target]),
            name: denoiser,
            **{f"{told}_encoder": ["sfumato", "ConditionEncoder"] for told in self.told},
            "scheduler": ["diffusers" if scheduler == "EDMEulerScheduler" else "sfumato", scheduler],
        }

    def _encoder_config(self, name: Modality) -> dict[str, Any]:
        text = self.settings.text
        frozen = sentence.fingerprint(text.name) if name == "text" and isinstance(text, FrozenSentence) else None
        return {
            "_class_name": "ConditionEncoder",
            "features": self.codecs[name].settings.kind,
            "frozen_encoder_sha256": frozen,
        }


def _as_picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of a picture as it is; (1, bands, frames) of a spectrogram."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2 and shape[0] > 1:
        return 1, shape[0], shape[1]
    raise UsageError(
        f"model.backbone.kind = unet · sees rows and columns, and the target's shape is {shape}",
        next="Set model.backbone: {kind: mlp}, or model.audio: {kind: mel}.",
    )


def _unet_config(unet: nn.Module) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    assert isinstance(unet, UNet2DConditionModel)
    return json.loads(unet.to_json_string())
