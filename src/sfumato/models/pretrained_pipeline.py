"""A text-to-image pipeline of ``diffusers``, trained privately: its U-Net or transformer; autoencoder and text encoder are frozen.  [shell]

The loss of a record (Ho et al. 2020, arXiv:2006.11239; v-prediction: Salimans & Ho 2022, arXiv:2202.00512): its picture's
latent is noised at a random step, and the mean squared error of what the network predicts is taken, over ``draws`` of step and
noise, which costs no privacy (Dockhorn et al. 2023, arXiv:2210.09929).
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import DataError, OutsideError, UsageError
from sfumato.models.messages import conversation, pictures
from sfumato.models.pretrained import Pretrained, unreachable
from sfumato.models.tuning import Tuning, tuned

CAPTION_DROPOUT = 0.1  # of captions are left out, so that guidance has an unconditional model to go away from


def read_pipeline(name: Path | str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    try:
        read = DiffusionPipeline.from_pretrained(name)  # in float32; its word for the type differs between versions
        return read if dtype == torch.float32 else read.to(dtype)
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from None


class Denoiser(nn.Module):
    """The network of a pipeline, with adapters, as something that a trainer takes for a model of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, steps: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """(B, C, H, W) noised latents, (B,) steps, what was read of the texts -> (B, C, H, W)."""
        network: Any = self.network
        if "attention_mask" not in texts:
            return network(latents, steps, texts["states"], return_dict=False)[0]
        out = network(
            latents, texts["states"], timestep=steps, encoder_attention_mask=texts["attention_mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return out[:, : latents.shape[1]]  # a variance may follow, which is not trained


class TextToImage(Pretrained):
    """Stable Diffusion and its like (a U-Net), PixArt (a diffusion transformer).

    Args: draws: of step and noise for each record, averaged inside its loss.
    """

    def __init__(self, pipeline: Any, tuning: Tuning, *, draws: int = 1) -> None:
        self.pipeline, self.tuning, self.draws = pipeline, tuning, draws
        self._place = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
        self._check()
        for part in (pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()
        self.model = Denoiser(tuned(getattr(pipeline, self._place), tuning))

    def _check(self) -> None:
        kind = type(self.pipeline).__name__
        known = (
            self._place == "unet"
            and hasattr(self.pipeline, "text_encoder")
            and not hasattr(self.pipeline, "text_encoder_2")
        )
        known = known or kind.startswith("PixArtAlpha")
        predicts = self.pipeline.scheduler.config.get("prediction_type")
        if not known or predicts not in ("epsilon", "v_prediction", "sample"):
            raise UsageError(
                f"pipeline = {kind}, prediction_type = {predicts} · is none that a loss of one record is written for",
                next="Use a pipeline with one text encoder and a U-Net, or PixArt-alpha; or give its network to an engine with a loss "
                "of your own.",
            )
        network = getattr(self.pipeline, self._place)
        if network.config.get("use_additional_conditions"):
            raise UsageError(
                "use_additional_conditions = True · asks for resolutions that records do not give",
                next="Take a 512 model.",
            )

    def collate(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [self._read(record) for record in records]
        return {"pixels": torch.stack([pixels for pixels, _ in rows]), "captions": [caption for _, caption in rows]}

    def _read(self, record: Mapping[str, Any]) -> tuple[Tensor, str]:
        """The one picture, (3, S, S) in [-1, 1], and what the record says of it."""
        messages, images = conversation(record), pictures(record)
        if len(images) != 1:
            raise DataError(
                f"images = {len(images)} · must be one, which the text is about", next="Give one picture a record."
            )
        size = self._size
        pixels = np.asarray(images[0].resize((size, size)), dtype=np.float32) / 127.5 - 1.0
        words = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        return torch.from_numpy(pixels).permute(2, 0, 1), " ".join(words).strip()

    @property
    def _size(self) -> int:
        scale = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return int(getattr(self.pipeline, self._place).config.sample_size) * scale

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(B,). Chance (steps, noise, captions left out) is torch's."""
        vae, scheduler = self.pipeline.vae, self.pipeline.scheduler
        pixels: Tensor = inputs["pixels"]
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        texts = self._texts(inputs["captions"], pixels.device)
        total = torch.zeros(len(pixels), device=pixels.device)
        for _ in range(self.draws):  # one after another: every layer has the records as its rows
            noise = torch.randn_like(latents)
            steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            noised = scheduler.add_noise(latents, noise, steps)
            match scheduler.config.prediction_type:
                case "epsilon":
                    target = noise
                case "v_prediction":
                    target = scheduler.get_velocity(latents, noise, steps)
                case _:
                    target = latents
            error = (model(noised, steps, texts) - target).float().square()
            total = total + error.flatten(1).mean(1)
        return total / self.draws

    @torch.no_grad()
    def _texts(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """As the pipeline reads them: padded to one length for all texts there are, so that no text sees another's."""
        kept = ["" if float(torch.rand(())) < CAPTION_DROPOUT else caption for caption in captions]
        self.pipeline.text_encoder.to(device)
        if self._place == "unet":
            states = self.pipeline.encode_prompt(kept, device, 1, False)[0]
            return {"states": states}
        states, mask, *_ = self.pipeline.encode_prompt(kept, do_classifier_free_guidance=False, device=device)
        return {"states": states, "attention_mask": mask}

    def save(self, folder: Path | str) -> None:
        """All weights or named modules: the whole pipeline. An adapter: as ``peft`` writes it, and, where the pipeline reads such a
        file, also as ``diffusers`` does (``load_lora_weights``)."""
        network: Any = self.model.network
        try:
            if not self.tuning.is_adapter:
                self.pipeline.save_pretrained(folder)
                return
            network.save_pretrained(folder)
            if self.tuning.how == "lora" and self._place == "unet":
                self._write_lora(folder, network)
        except OSError as error:
            raise OutsideError(f"folder = {folder} · cannot be written ({error})", next="Free some space.") from None

    def _write_lora(self, folder: Path | str, network: Any) -> None:
        """As ``load_lora_weights`` reads it, where this version of ``diffusers`` keeps alpha beside it: without, the scale is lost."""
        write = getattr(self.pipeline, "save_lora_weights", None)
        if write is None or "unet_lora_adapter_metadata" not in inspect.signature(write).parameters:
            return
        from peft import get_peft_model_state_dict

        own = "base_model.model."  # which peft puts before every name
        layers = {name.removeprefix(own): tensor for name, tensor in get_peft_model_state_dict(network).items()}
        settings = network.active_peft_config.to_dict()
        write(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=_plain(settings))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Sets as lists, for a header of JSON."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
