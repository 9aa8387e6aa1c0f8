"""A model is a composition: codecs (modality <-> tensors), a backbone (tensors -> tensors), an objective (losses, samples).

Shapes: R records, B units, K draws, D latent entries, E condition width, H W C of a picture.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import DataError, OutsideError, UsageError
from sfumato.models.backbones.mlp import ResidualMlp
from sfumato.models.codecs import sentence, terms, text
from sfumato.models.codecs.image import ImageCoder
from sfumato.models.objectives import diffusion
from sfumato.models.settings import FrozenSentence, HashedWords, Mlp, ModelSettings, Sampling, Terms, UNet
from sfumato.records import Batch, Record, UnitTable

ROWS_AT_ONCE = 512  # pictures drawn in one pass


class TextEncoder(nn.Module):
    """What the codec made of a text -> the condition, (R, V or S) -> (R, E). Trained with the model, privately.

    The first layer starts as a random projection with unit-scale output: bags of words differ from the first step on,
    and private training need not spend its budget on making them differ.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.mix = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(features)
        mixed = projected + self.mix(nn.functional.silu(projected))
        return nn.functional.layer_norm(mixed, mixed.shape[-1:])


class TextToImage(nn.Module):
    """Text -> image by diffusion. ``build`` makes one from settings, ``load`` from a folder.

    ``state_dict`` holds exactly the trained tensors; the assumed spectrum is a constant of the settings.
    """

    def __init__(self, settings: ModelSettings, picture_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.settings = settings
        self.picture_shape = picture_shape
        height, width, channels = picture_shape
        self.coder = ImageCoder(settings.image, height, width, channels)
        self.scale = self.coder.spectrum(settings.objective.sigma_data).flatten()
        latent = self.scale.numel()
        match settings.text:
            case HashedWords(buckets=buckets, width=condition):
                self.text_encoder = TextEncoder(buckets, condition)
                nn.init.normal_(self.text_encoder.project.weight)  # of a bag of unit length: unit scale
            case FrozenSentence(width=condition):
                self.text_encoder = TextEncoder(condition, condition)
                nn.init.normal_(self.text_encoder.project.weight, std=condition**-0.5)
            case Terms(axes=axes, width=condition):
                self.text_encoder = TextEncoder(len(axes), condition)
                nn.init.normal_(self.text_encoder.project.weight, std=len(axes) ** -0.5)
        nn.init.zeros_(self.text_encoder.project.bias)
        match settings.backbone:
            case Mlp(width=hidden, depth=depth):
                self.denoiser: nn.Module = ResidualMlp(latent, condition, width=hidden, depth=depth)
            case UNet() as unet:
                from sfumato.models.backbones.unet import UNetDenoiser

                self.denoiser = UNetDenoiser(self.coder.latent_shape, condition, unet)

    # -- codecs --

    def encode(self, records: Sequence[Record]) -> UnitTable:
        """Records as the tensors that ``losses`` wants, grouped by unit."""
        texts, has_text = self._encode_texts([record.text for record in records])
        has_image = torch.tensor([record.image is not None for record in records], dtype=torch.bool)
        return UnitTable(
            {"image": self._encode_images(records), "text": texts},
            [record.unit for record in records],
            {"image": has_image, "text": has_text},
        )

    def _encode_images(self, records: Sequence[Record]) -> Tensor:
        blank = np.zeros(self.picture_shape, np.uint8)
        latents = torch.zeros(len(records), self.scale.numel())
        for start in range(0, len(records), 4096):
            part = records[start : start + 4096]
            for record in part:
                if record.image is not None and record.image.shape != self.picture_shape:
                    raise DataError(
                        f"record {record.id}: image.shape = {record.image.shape} · must be {self.picture_shape}",
                        next="Prepare the records with the recipe's data.image_size and data.channels.",
                    )
            stacked = np.stack([blank if record.image is None else record.image for record in part])
            latents[start : start + len(part)] = self.coder.encode(torch.from_numpy(stacked)).flatten(1)
        return latents

    def _encode_texts(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        match self.settings.text:
            case HashedWords(buckets=buckets):
                return text.encode(texts, buckets)
            case FrozenSentence(name=name):
                return sentence.encode(name, texts)
            case Terms(axes=axes):
                return terms.encode(texts, axes)

    def condition(self, encoded: Tensor, present: Tensor) -> Tensor:
        """Encoded texts -> (R, E); zero where a text is missing, which is what "no condition" means to the denoiser."""
        match self.settings.text:
            case HashedWords(buckets=buckets):
                features = text.bag(encoded, buckets).to(self.text_encoder.project.weight.dtype)
            case FrozenSentence() | Terms():
                features = encoded
        return self.text_encoder(features) * present[:, None]

    # -- the objective --

    def losses(self, batch: Batch) -> Tensor:
        """One loss per unit, (B,): the mean over its records, each the mean over K draws of noise."""
        objective = self.settings.objective
        rows = batch.num_rows
        keep = torch.rand(rows) >= objective.condition_dropout
        condition = self.condition(batch.tensors["text"], batch.present["text"] & keep)
        shape = (rows, objective.noise_multiplicity)
        sigma = diffusion.noise_levels(objective, shape)
        noise = torch.randn(*shape, self.scale.numel())
        per_record = self._record_losses(batch, condition, sigma, noise)
        return batch.per_unit(per_record)

    def row_losses(self, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
        """One loss per record, (R,), on ``draws`` evenly spread noise levels: what a membership attack looks at."""
        objective = self.settings.objective
        middle = (torch.arange(draws) + 0.5) / draws
        level = torch.special.ndtri(middle) * objective.log_sigma_std + objective.log_sigma_mean
        sigma = level.exp().expand(batch.num_rows, -1)
        noise = torch.randn(batch.num_rows, draws, self.scale.numel(), generator=generator)
        condition = self.condition(batch.tensors["text"], batch.present["text"])
        return self._record_losses(batch, condition, sigma, noise)

    def _record_losses(self, batch: Batch, condition: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        values = diffusion.record_losses(
            self.denoiser,
            batch.tensors["image"],
            condition,
            sigma,
            noise,
            self.scale,
            self.settings.objective.sigma_data,
        )
        return values * batch.present["image"]  # a record without a picture has nothing to lose

    @torch.no_grad()
    def generate(self, texts: Sequence[str | None], *, seed: int, sampling: Sampling | None = None) -> np.ndarray:
        """Pictures for texts (None: unconditional), (N, H, W, C) uint8. The same seed gives the same pictures."""
        sampling = sampling or self.settings.sampling
        generator = torch.Generator().manual_seed(seed)
        training = self.training
        self.eval()
        pictures = [
            self._draw(texts[i : i + ROWS_AT_ONCE], sampling, generator) for i in range(0, len(texts), ROWS_AT_ONCE)
        ]
        self.train(training)
        return np.concatenate(pictures) if pictures else np.zeros((0, *self.picture_shape), np.uint8)

    def _draw(self, texts: Sequence[str | None], sampling: Sampling, generator: torch.Generator) -> np.ndarray:
        condition = self.condition(*self._encode_texts(texts))
        denoiser = diffusion.guided(self.denoiser, condition, self.scale, sampling.guidance)
        start = torch.randn(len(texts), self.scale.numel(), generator=generator)
        latents = diffusion.sample(denoiser, start, self.settings.objective, sampling, generator)
        return self.coder.decode(latents.reshape(-1, *self.coder.latent_shape)).numpy()

    def bytes_per_row(self) -> int:
        """About how much memory one record takes on its way through the model: what each layer reads and writes, twice.

        Measured on one invented record, not on data.
        """
        seen = 0

        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal seen
            seen += sum(t.numel() * t.element_size() for t in (*inputs, output) if isinstance(t, Tensor))

        leaves = [m for m in self.modules() if not list(m.children())]
        hooks = [leaf.register_forward_hook(count) for leaf in leaves]
        try:
            draws = self.settings.objective.noise_multiplicity
            width = self.text_encoder.project.in_features
            with torch.no_grad():
                condition = self.text_encoder(torch.zeros(1, width))[:, None].expand(-1, draws, -1)
                self.denoiser(torch.zeros(1, draws, self.scale.numel()), torch.zeros(1, draws), condition)
        finally:
            for hook in hooks:
                hook.remove()
        return 2 * seen

    # -- on disk: the folders of a diffusers pipeline --

    def save(self, folder: Path | str) -> None:
        """Writes the model as ``model_index.json`` and one folder a component, weights in safetensors. [shell]

        Raises OutsideError where the disk does not take it.
        """
        from safetensors import SafetensorError

        try:
            self._write(Path(folder))
        except (OSError, SafetensorError) as error:  # a full disk is an OSError to some, and not to safetensors
            raise OutsideError(
                f"model = {folder} · could not be written ({error})", next="Free some disk space, then --resume."
            ) from None

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        name, part = self._denoiser_part()
        for sub in ("text_encoder", name, "scheduler"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        _write_json(folder / "model_index.json", self._index(name))
        _write_json(folder / "sfumato.json", self.describe())
        _write_json(folder / "scheduler" / "scheduler_config.json", self._scheduler())
        _write_json(folder / "text_encoder" / "config.json", self._text_config())
        save_file(_plain(self.text_encoder), folder / "text_encoder" / "model.safetensors")
        if name == "unet":
            _write_json(folder / name / "config.json", _unet_config(part))
        else:
            _write_json(folder / name / "config.json", {"_class_name": "ResidualMlp", **self._mlp_config()})
        save_file(_plain(part), folder / name / "diffusion_pytorch_model.safetensors")

    def describe(self) -> dict[str, Any]:
        """Everything that ``load`` needs besides the weights."""
        from pydantic import TypeAdapter

        settings = TypeAdapter(ModelSettings).dump_python(self.settings, mode="json")
        return {"format": 1, "picture_shape": list(self.picture_shape), "settings": settings}

    def _denoiser_part(self) -> tuple[str, nn.Module]:
        match self.settings.backbone:
            case UNet():
                unet = self.denoiser.get_submodule("unet")
                return "unet", unet
            case Mlp():
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
        objective = self.settings.objective
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": objective.sigma_min,
            "sigma_max": objective.sigma_max,
            "sigma_data": objective.sigma_data,
            "rho": 7.0,
            "prediction_type": "epsilon",
        }

    def _text_config(self) -> dict[str, Any]:
        kind = self.settings.text.kind
        frozen = (
            sentence.fingerprint(self.settings.text.name) if isinstance(self.settings.text, FrozenSentence) else None
        )
        return {"_class_name": "TextEncoder", "features": kind, "frozen_encoder_sha256": frozen}

    def _mlp_config(self) -> dict[str, Any]:
        assert isinstance(self.settings.backbone, Mlp)
        return {"width": self.settings.backbone.width, "depth": self.settings.backbone.depth}


def build(settings: ModelSettings, *, picture_shape: tuple[int, int, int], seed: int = 0) -> TextToImage:
    """A fresh model. ``seed`` fixes the initial weights, which are public, and leaves torch's own generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextToImage(settings, picture_shape)


def build_for_release(kind: str, settings: ModelSettings, *, picture_shape: tuple[int, int, int], seed: int = 0) -> Any:
    """A model that learns from what was released: ``from_latents``, ``from_mean`` or ``from_codes``."""
    from sfumato.models.from_codes import FromCodes
    from sfumato.models.from_latents import FromLatents
    from sfumato.models.from_mean import FromMean

    kinds = {of.kind: of for of in (FromLatents, FromMean, FromCodes)}
    if kind not in kinds:
        raise UsageError(f"kind = {kind!r} · must be one of {', '.join(kinds)}", next="Use the version that wrote it.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[kind](settings, picture_shape)


def load(folder: Path | str) -> Any:
    """Reads what ``save`` wrote. [shell] Raises UsageError where something is missing or does not fit."""
    from pydantic import TypeAdapter, ValidationError
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        described = json.loads((folder / "sfumato.json").read_text(encoding="utf-8"))
        settings = TypeAdapter(ModelSettings).validate_python(described["settings"])
        shape, kind = tuple(described["picture_shape"]), described.get("kind")
        if kind is not None:
            of_release = build_for_release(kind, settings, picture_shape=shape)
            parts = [path.parent.name for path in sorted(folder.glob("*/model.safetensors"))]
            of_release.restore(described, {part: load_file(folder / part / "model.safetensors") for part in parts})
            return of_release.eval()
        model = build(settings, picture_shape=shape)
        name, part = model._denoiser_part()
        model.text_encoder.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"))
        part.load_state_dict(load_file(folder / name / "diffusion_pytorch_model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ValidationError, SafetensorError) as error:
        raise UsageError(
            f"model = {folder} · is not a model that this version wrote ({type(error).__name__}: {str(error)[:200]})",
            next="Give the folder of a run or a bundle.",
        ) from None
    return model.eval()


def named_tensors(model: TextToImage) -> Iterator[tuple[str, str]]:
    """(file relative to the model's folder, tensor name) of every tensor that ``save`` writes: all of them trained."""
    name, part = model._denoiser_part()
    yield from (("text_encoder/model.safetensors", key) for key in model.text_encoder.state_dict())
    yield from ((f"{name}/diffusion_pytorch_model.safetensors", key) for key in part.state_dict())


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def _unet_config(unet: nn.Module) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    assert isinstance(unet, UNet2DConditionModel)
    return json.loads(unet.to_json_string())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
