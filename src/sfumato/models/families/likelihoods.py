"""What a codec's tensors are to a linear layer, and which likelihood they have: one class for each kind of codec.

Shapes: R records, P passes (draws, subsets), D numbers, L tokens, V vocabulary, A axes, Z latent entries.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.backbones.mlp import Stack
from sfumato.models.codecs.text_features import TextFeatures
from sfumato.models.settings import HashedWords, Mlp, Terms

TOKEN_WIDTH = 32  # of a token's embedding, in and out


class Inputs(nn.Module, ABC):
    """Encoded records (R, ...) -> (R, ``width``), entries of about unit scale (a bag: of unit length)."""

    width: int
    first_std: float | None = None  # of the layer after it

    def stack(self, outputs: int, mlp: Mlp, *, more: int = 0) -> Stack:
        """The network after it. Args: more: inputs that stand beside these."""
        return Stack(self.width + more, outputs, width=mlp.width, depth=mlp.depth, first_std=self.first_std)

    @abstractmethod
    def forward(self, encoded: Tensor) -> Tensor: ...


class Numbers(Inputs):
    """Continuous codecs: entries over their public scale."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.width, self.scale = scale.numel(), scale

    def forward(self, encoded: Tensor) -> Tensor:
        return encoded / self.scale.to(encoded)


class Features(Inputs):
    """Texts that are a condition only, as their codec says."""

    def __init__(self, codec: TextFeatures) -> None:
        super().__init__()
        self.width, self.codec, self.first_std = codec.width, codec, codec.first_std()

    def forward(self, encoded: Tensor) -> Tensor:
        return self.codec.features(encoded)


class Tokens(Inputs):
    """An embedding of every token, side by side; the padding is one token more."""

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__()
        self.width = length * TOKEN_WIDTH
        self.table = nn.Embedding(vocabulary + 1, TOKEN_WIDTH)

    def forward(self, encoded: Tensor) -> Tensor:
        return self.table(encoded).flatten(1)


def inputs_of(codec: Any) -> Inputs:
    """Args: a codec of any kind."""
    match codec.kind:
        case "continuous":
            return Numbers(codec.scale)
        case "tokens":
            return Tokens(codec.shape[0], codec.vocabulary)
        case _:
            return Features(codec)


class Likelihood(nn.Module, ABC):
    """A decoder and what is lost by it: (R, P, Z) and encoded records (R, ...) -> (R, P), minus the log-likelihood up to a
    constant. Those of codecs that decode have ``likeliest``: (R, P, Z) -> encoded records (R, P, ...)."""

    def __init__(self, latent: int, outputs: int, mlp: Mlp) -> None:
        super().__init__()
        self.stack = Stack(latent, outputs, width=mlp.width, depth=mlp.depth)

    @abstractmethod
    def lost(self, z: Tensor, encoded: Tensor) -> Tensor: ...


class Gaussian(Likelihood):
    """Independent entries, with their codec's public scale as standard deviation."""

    def __init__(self, scale: Tensor, latent: int, mlp: Mlp) -> None:
        super().__init__(latent, scale.numel(), mlp)
        self.scale = scale

    def lost(self, z: Tensor, encoded: Tensor) -> Tensor:
        return (self.stack(z) - (encoded / self.scale.to(encoded))[:, None]).square().sum(-1) / 2

    def likeliest(self, z: Tensor) -> Tensor:
        return self.stack(z) * self.scale.to(z)


class Categorical(Likelihood):
    """Independent tokens; the padding of a short record is one token more, which only texts are made with."""

    def __init__(self, length: int, vocabulary: int, latent: int, mlp: Mlp, *, pads: bool) -> None:
        super().__init__(latent, length * TOKEN_WIDTH, mlp)
        self.length, self.kinds = length, vocabulary + pads
        self.head = nn.Linear(TOKEN_WIDTH, vocabulary + 1)

    def _scores(self, z: Tensor) -> Tensor:
        """(R, P, L, V + 1)."""
        return self.head(self.stack(z).unflatten(-1, (self.length, TOKEN_WIDTH)))

    def lost(self, z: Tensor, encoded: Tensor) -> Tensor:
        told = encoded[:, None, :, None].expand(-1, z.shape[1], -1, -1)
        return -self._scores(z).log_softmax(-1).gather(-1, told).squeeze(-1).sum(-1)

    def likeliest(self, z: Tensor) -> Tensor:
        return self._scores(z)[..., : self.kinds].argmax(-1)


class ThreeValued(Likelihood):
    """Terms: every axis is -1, 0 or 1."""

    def __init__(self, axes: int, latent: int, mlp: Mlp) -> None:
        super().__init__(latent, 3 * axes, mlp)
        self.axes = axes

    def lost(self, z: Tensor, encoded: Tensor) -> Tensor:
        scores = self.stack(z).unflatten(-1, (self.axes, 3)).log_softmax(-1)
        told = (encoded.round().clamp(-1, 1).long() + 1)[:, None, :, None].expand(-1, z.shape[1], -1, -1)
        return -scores.gather(-1, told).squeeze(-1).sum(-1)


class Words(Likelihood):
    """Hashed words: every feature of a text is a draw from one distribution over the buckets."""

    def __init__(self, buckets: int, latent: int, mlp: Mlp) -> None:
        super().__init__(latent, buckets, mlp)
        self.buckets = buckets

    def lost(self, z: Tensor, encoded: Tensor) -> Tensor:
        there = torch.zeros(len(encoded), self.buckets + 1, dtype=z.dtype, device=z.device)
        there.scatter_(1, encoded.long(), 1.0)
        return -(self.stack(z).log_softmax(-1) * there[:, None, : self.buckets]).sum(-1)


def of(codec: Any, latent: int, mlp: Mlp) -> Likelihood:
    """The likelihood of a codec's tensors."""
    match codec.kind:
        case "continuous":
            return Gaussian(codec.scale, latent, mlp)
        case "tokens":
            return Categorical(codec.shape[0], codec.vocabulary, latent, mlp, pads=codec.modality == "text")
        case _:
            return _of_features(codec, latent, mlp)


def _of_features(codec: TextFeatures, latent: int, mlp: Mlp) -> Likelihood:
    match codec.settings:
        case HashedWords(buckets=buckets):
            return Words(buckets, latent, mlp)
        case Terms(axes=axes):
            return ThreeValued(len(axes), latent, mlp)
        case _:
            return Gaussian(torch.ones(codec.width), latent, mlp)
