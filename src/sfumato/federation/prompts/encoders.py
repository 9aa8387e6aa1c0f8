"""What a prompt is learnt for: a frozen pair of encoders of pictures and texts, and CLIP from a folder on disk.

Shapes: K texts, M context vectors, W width of a token, L tokens, N pictures, V patches, E entries of a feature.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import UsageError


@dataclass(frozen=True, slots=True)
class Texts:
    """Attributes: ids: (K, L) int64, with places for M context vectors after the first token. end: (K,), where each is read off."""

    ids: Tensor
    end: Tensor


class Encoders(Protocol):
    """Frozen; every feature has length 1, and depends on its own text or picture alone."""

    width: int
    features: int

    @property
    def scale(self) -> float:
        """What a likeness is multiplied by before the softmax."""
        ...

    def texts(self, names: Sequence[str], tokens: int) -> Texts:
        """Of the names of classes, each with places for so many context vectors."""
        ...

    def read(self, texts: Texts, context: Tensor) -> Tensor:
        """(K, E): the features of texts with their context. Args: context: (K, M, W)."""
        ...

    def hand_written(self, names: Sequence[str]) -> Tensor:
        """(K, E): of the usual prompt, written by hand."""
        ...

    def look(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """(N, 1 + V, E): of whole pictures, and of their patches. Args: pictures: (H, W, C) uint8 each."""
        ...


class ClipEncoders(nn.Module):
    """A ``transformers`` checkpoint of CLIP with its tokenizer and its picture processor, from a folder; nothing is downloaded.

    Context vectors take the place of token embeddings, after the first token and before the class's name, and get position
    embeddings like any token. Causal attention: what follows a text's end changes nothing.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"folder = {folder} · has no config.json",
                next="Give the folder of a CLIP checkpoint as transformers saves it.",
            )
        local: dict[str, Any] = {"local_files_only": True}
        self.clip = CLIPModel.from_pretrained(folder, attn_implementation="eager", **local)
        self.clip.requires_grad_(False).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
        self._processor = CLIPImageProcessor.from_pretrained(folder, **local)
        text: Any = self.clip.text_model
        self._embeddings, self._text = text.embeddings, text
        self.width = int(self._embeddings.token_embedding.weight.shape[1])
        self.features = int(self.clip.text_projection.weight.shape[0])

    @property
    def scale(self) -> float:
        return float(self.clip.logit_scale.detach().exp())

    def train(self, mode: bool = True) -> "ClipEncoders":
        """Always as in use: no dropout."""
        return super().train(False)

    def texts(self, names: Sequence[str], tokens: int) -> Texts:
        first, last = int(self._tokenizer.bos_token_id), int(self._tokenizer.eos_token_id)
        rows = [
            [first, *[last] * tokens, *self._tokenizer(f"{name}.", add_special_tokens=False)["input_ids"], last]
            for name in names
        ]
        longest, most = max(map(len, rows)), int(self._embeddings.position_embedding.weight.shape[0])
        if longest > most:
            raise UsageError(
                f"tokens = {tokens} · with the longest name these are {longest} tokens, and the encoder reads {most}",
                next="Take fewer context vectors.",
            )
        ids = torch.tensor([row + [last] * (longest - len(row)) for row in rows])
        return Texts(ids, torch.tensor([len(row) - 1 for row in rows]))

    def read(self, texts: Texts, context: Tensor) -> Tensor:
        embedded = self._embeddings.token_embedding(texts.ids)
        told = torch.cat([embedded[:, :1], context.to(embedded), embedded[:, 1 + context.shape[1] :]], 1)
        hidden = self._embeddings(inputs_embeds=told)
        future = torch.full((told.shape[1],) * 2, torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        hidden = self._text.encoder(inputs_embeds=hidden, attention_mask=future[None, None], is_causal=True)
        hidden = self._text.final_layer_norm(hidden.last_hidden_state)
        chosen = hidden[torch.arange(len(hidden)), texts.end]
        return nn.functional.normalize(self.clip.text_projection(chosen), dim=-1)

    @torch.no_grad()
    def hand_written(self, names: Sequence[str]) -> Tensor:
        texts = self.texts([f"a photo of a {name}" for name in names], 0)
        return self.read(texts, torch.zeros(len(names), 0, self.width))

    @torch.no_grad()
    def look(self, pictures: Sequence[np.ndarray]) -> Tensor:
        coloured = [np.repeat(p, 3, 2) if p.shape[2] == 1 else p for p in pictures]
        pixels = self._processor(images=coloured, return_tensors="pt")["pixel_values"]
        seen: Any = self.clip.vision_model
        hidden = seen.post_layernorm(
            seen(pixel_values=pixels).last_hidden_state
        )  # the first place is the whole picture
        return nn.functional.normalize(self.clip.visual_projection(hidden), dim=-1)


def fingerprint(folder: Path | str) -> str:
    """sha256 of the weights, the tokenizer and the picture processor of a checkpoint."""
    patterns = (
        "*.safetensors",
        "*.bin",
        "config.json",
        "preprocessor_config.json",
        "tokenizer*",
        "vocab.json",
        "merges.txt",
    )
    whole = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in Path(folder).glob(pattern)}):
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()
