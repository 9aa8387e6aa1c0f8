"""Norms and sums of gradients are computed in the arithmetic that their bounds are about."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside: no autocast, and no shortened products (TF32, bfloat16) of float32 numbers, whatever the user has set."""
    before = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = convolutions
