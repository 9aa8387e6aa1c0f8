"""Pictures as latents of a frozen public autoencoder: ``AutoencoderKL`` of diffusers, from a local folder.

Claim: nothing of it is trained here, and it was fitted on public data. One fitted on private records is itself a release of them:
its training must be private, with a budget that is composed with this one (docs/privacy.md). Two such are refused: one that is
said to be private, and a folder in which this package wrote a run or a bundle.

The latent is the mode of the encoder's distribution, minus the configured shift, times the configured scaling factor, which is
there to give entries unit variance (Rombach et al. 2022, arXiv:2112.10752, appendix G). So the assumed scale is 1.

Shapes: R records, H W pixels, C channels of a picture, c channels of a latent, f pixels a side of a latent entry.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import DataError, MissingDependency, PrivacyRefused, UsageError
from sfumato.models.settings import VaeLatents
from sfumato.records import Modality, Record

_AT_ONCE = 64  # pictures encoded together
_OURS = ("sfumato.json", "ledger.db", "ledger.jsonl", "privacy.json")  # what a run or a bundle of this package holds


@dataclass(frozen=True)
class VaeCodec:
    """Records' pictures as flat latents (R, c H/f W/f), and back. Grey pictures go through a colour autoencoder as three equal
    channels and come back as their mean; colour ones through a grey autoencoder are refused."""

    settings: VaeLatents
    picture_shape: tuple[int, int, int]
    modality: ClassVar[Modality] = "image"

    def __post_init__(self) -> None:
        require_public(self.settings)
        height, width, channels = self.picture_shape
        config = self._vae.config
        if height % self._side or width % self._side:
            raise UsageError(
                f"picture = {height} x {width} · this autoencoder needs sides that are multiples of {self._side}",
                next="Change data.image_size.",
            )
        if config.latents_mean is not None or config.latents_std is not None:
            raise UsageError(
                f"model.image.folder = {self.settings.folder} · normalises channel by channel, which is not built",
                next="Give an autoencoder with a scaling factor.",
            )
        if (
            config.in_channels not in (1, 3)
            or channels > config.in_channels
            or config.out_channels != config.in_channels
        ):
            raise UsageError(
                f"model.image.folder = {self.settings.folder} · takes {config.in_channels} channels and gives "
                f"{config.out_channels}, the pictures have {channels}",
                next="Change data.channels, or give another autoencoder.",
            )

    @property
    def kind(self) -> Literal["continuous"]:
        return "continuous"

    @cached_property
    def _vae(self) -> Any:
        return _loaded(self.settings.folder, self._digest)

    @cached_property
    def _digest(self) -> str:
        return fingerprint(self.settings.folder)

    @property
    def _side(self) -> int:
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, _ = self.picture_shape
        return self._vae.config.latent_channels, height // self._side, width // self._side

    @cached_property
    def scale(self) -> Tensor:
        channels, height, width = self.shape
        return torch.ones(channels * height * width)

    def fingerprint(self) -> str:
        """Of the weights that are in use."""
        return self._digest

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        latents = self.blank(len(records))
        there = [row for row, record in enumerate(records) if record.image is not None]
        for start in range(0, len(there), _AT_ONCE):
            rows = there[start : start + _AT_ONCE]
            latents[rows] = self._latents(np.stack([self._picture(records[row]) for row in rows]))
        return latents, torch.tensor([record.image is not None for record in records], dtype=torch.bool)

    def blank(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.scale.numel())

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        return [picture for part in encoded.split(_AT_ONCE) for picture in self._pictures(part)] if len(encoded) else []

    def _picture(self, record: Record) -> np.ndarray:
        assert record.image is not None
        if record.image.shape != self.picture_shape:
            raise DataError(
                f"record {record.id}: image.shape = {record.image.shape} · must be {self.picture_shape}",
                next="Prepare the records with the recipe's data.image_size and data.channels.",
            )
        return record.image

    @torch.no_grad()
    def _latents(self, pictures: np.ndarray) -> Tensor:
        """(R, H, W, C) uint8 -> (R, D)."""
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        x = x.expand(-1, self._vae.config.in_channels, -1, -1).contiguous()
        mode = self._vae.encode(x).latent_dist.mode()
        return ((mode - self._shift) * self._vae.config.scaling_factor).flatten(1)

    @torch.no_grad()
    def _pictures(self, latents: Tensor) -> np.ndarray:
        """(R, D) -> (R, H, W, C) uint8."""
        z = latents.float().reshape(-1, *self.shape) / self._vae.config.scaling_factor + self._shift
        x = self._vae.decode(z).sample
        if self.picture_shape[2] == 1:
            x = x.mean(dim=1, keepdim=True)
        return ((x.permute(0, 2, 3, 1) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    @property
    def _shift(self) -> float:
        return self._vae.config.shift_factor or 0.0


def require_public(settings: VaeLatents) -> None:
    """Raises PrivacyRefused for an autoencoder that is said, or seen, to be fitted on private records."""
    folder = Path(settings.folder)
    found = [name for place in (folder, folder.parent) for name in _OURS if (place / name).exists()]
    if settings.trained_on == "private" or found:
        seen = "said to be fitted on private records" if not found else f"a folder of this package ({found[0]})"
        raise PrivacyRefused(
            f"model.image.folder = {settings.folder} · {seen}: an autoencoder of private records has a budget of its own",
            next="Use a public one. Composing the two budgets is not built: train both in one account by hand.",
            code="private_encoder",
        )


@lru_cache(maxsize=2)
def _loaded(folder: str, digest: str) -> Any:
    """Args: digest: so that another file in the same place is another autoencoder."""
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"model.image.folder = {folder} · is no AutoencoderKL of diffusers with safetensors ({str(error)[:200]})",
            next="Give the vae folder of a pipeline.",
        ) from None
    assert isinstance(vae, AutoencoderKL)
    return vae.float().eval().requires_grad_(False)


def fingerprint(folder: str) -> str:
    """sha256 of the configuration and the weights, for the report and to load again."""
    if not (Path(folder) / "config.json").is_file():
        raise MissingDependency(
            f"model.image.folder = {folder} · holds no config.json",
            next="Give a folder with an AutoencoderKL of diffusers.",
        )
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
