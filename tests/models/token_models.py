"""Small models of tokens."""

from dataclasses import replace

from sfumato.models.settings import (
    Autoregressive,
    Bytes,
    MelSpectrogram,
    MelTokens,
    ModelSettings,
    MuLaw,
    PatchTokens,
    Sampling,
    Transformer,
    Words,
)
from sfumato.models.shapes import Shapes

WORDS = ("patient", " visit", " number", " left", " right", " film")
TINY_TOKENS = ModelSettings(
    text=Words(words=WORDS, longest=16),
    image=PatchTokens(levels=(4, 3)),
    backbone=Transformer(width=16, depth=2, heads=2, inner=24),
    objective=Autoregressive(),
    sampling=Sampling(guidance=0.5),
)
TINY_BYTES = replace(TINY_TOKENS, text=Bytes(longest=32), image=None)
TINY_SOUNDS = replace(TINY_TOKENS, text=Bytes(longest=8), audio=MuLaw(levels=16))
TINY_MEL = replace(
    TINY_TOKENS,
    text=Bytes(longest=32),
    image=None,
    audio=MelTokens(mel=MelSpectrogram(bands=8, window=64, hop=32, iterations=4), levels=((4, 3), (3,))),
)
SHORT = Shapes(picture=(8, 8, 1), samples=12, sample_rate=800)
