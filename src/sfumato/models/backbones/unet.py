"""``UNet2DConditionModel`` of diffusers as a denoiser: what we train, diffusers users can load.

Shapes: R records, K draws, C channels, h w latent sides, E condition width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.settings import UNet

_HEAD = 8


class UNetDenoiser(nn.Module):
    """Called like ``ResidualMlp``. The K draws are K calls, so that every layer sees R rows (the engine adds calls up)."""

    def __init__(self, latent_shape: tuple[int, int, int], condition: int, settings: UNet) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.latent_shape = latent_shape
        self.condition_width = condition or _HEAD  # without any condition it attends to one token of zeros
        channels, height, _ = latent_shape
        levels = len(settings.channels)
        blocks: dict[str, Any] = {
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            "up_block_types": ("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        }
        self.unet = UNet2DConditionModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=settings.channels,
            layers_per_block=settings.layers_per_block,
            cross_attention_dim=self.condition_width,
            attention_head_dim=_HEAD,
            norm_num_groups=8,
            **blocks,
        )

    def forward(self, latents: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        rows = latents.shape[0]
        condition = nn.functional.pad(condition, (0, self.condition_width - condition.shape[-1])).to(latents.dtype)
        if rows == 0:  # Poisson sampling may draw nobody; the attention of diffusers cannot view no rows
            first = self.unet.conv_in(latents.reshape(0, *self.latent_shape))
            return latents * (condition.sum(dim=-1, keepdim=True) + first.sum())  # of the weights, so backward() works
        draws = [
            self.unet(
                latents[:, k].reshape(rows, *self.latent_shape),
                level[:, k] * 250.0,  # log(sigma)/4 in about [-1, 1], on the scale of the 1,000 steps it was made for
                encoder_hidden_states=condition[:, k, None, :],
            ).sample.flatten(1)
            for k in range(latents.shape[1])
        ]
        return torch.stack(draws, dim=1)
