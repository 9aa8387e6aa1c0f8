"""Every family x codec that is built, by name: a row here, and the contract (``test_contract.py``) holds it to its word.

A family adds its rows: the smallest settings of each codec and backbone that it works with.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.models.conftest import SHAPE, TINY, TINY_UNET
from tests.models.token_models import SHORT, TINY_BYTES, TINY_MEL, TINY_SOUNDS, TINY_TOKENS

from sfumato.models.settings import (
    Adversarial,
    Alignment,
    Diffusion,
    Flow,
    HashedWords,
    MelSpectrogram,
    Mlp,
    ModelSettings,
    Question,
    Reader,
    Sampling,
    TermAxis,
    Terms,
    VaeLatents,
    Variational,
    Waveform,
)
from sfumato.models.shapes import Shapes
from sfumato.records import MODALITIES, Modality, Record

SAMPLES, SAMPLE_RATE = 400, 800
PICTURES = Shapes(picture=SHAPE)
EVERYTHING = Shapes(picture=SHAPE, samples=SAMPLES, sample_rate=SAMPLE_RATE)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Attributes:
    prepare: called before the model is built.
    learning_rate: of Adam, for the test that training lowers the loss.
    largest: of the oracle's float64 and the engine's float32, how far apart, relative.
    outside: how the names of tensors begin that no private step moves: post-processing, or public.
    stays: how the names of tensors begin that are not saved with the model.
    """

    settings: ModelSettings
    prepare: Callable[[], object] | None = None
    shapes: Shapes = PICTURES
    learning_rate: float = 1e-2
    largest: float = 2e-5
    outside: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()


_SIDES = Question(name="side", answers=(TermAxis(name="left", more=("left",)), TermAxis(name="right", more=("right",))))
_TERMS = Terms(axes=(TermAxis(name="side", more=("left",), less=("right",)),), width=8)
_MEL = MelSpectrogram(bands=8, window=64, hop=32, iterations=4)  # 8 bands of 16 frames
_SOUNDS = replace(TINY, image=None, audio=replace(_MEL, kept=(4, 6)))

_VAE = tempfile.TemporaryDirectory(prefix="sfumato-vae-")  # removed when the tests end


def vae_folder(folder: Path | None = None, *, channels: int = 3, **config: Any) -> Path:
    """A small autoencoder of random weights, saved as diffusers saves one: 8 x 8 pictures become 2 x 4 x 4 latents."""
    from diffusers import AutoencoderKL

    folder = folder or Path(_VAE.name)
    if not (folder / "config.json").is_file():
        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = AutoencoderKL(
                in_channels=channels,
                out_channels=channels,
                latent_channels=2,
                norm_num_groups=4,
                **{**blocks, **config},
            )
        vae.save_pretrained(folder)
    return folder


COMBINATIONS: dict[str, Combination] = {
    "diffusion-cosine-words-mlp": Combination(settings=TINY),
    "diffusion-pixels-words-unet": Combination(settings=TINY_UNET),
    "diffusion-cosine-terms-mlp": Combination(settings=replace(TINY, text=_TERMS)),
    "diffusion-alone-mlp": Combination(settings=replace(TINY, text=None)),
    "diffusion-alone-unet": Combination(settings=replace(TINY_UNET, text=None)),
    "diffusion-x0": Combination(settings=replace(TINY, objective=Diffusion(prediction="x0"))),
    "diffusion-eps": Combination(settings=replace(TINY, objective=Diffusion(prediction="eps"))),
    "diffusion-outline-words-mlp": Combination(
        settings=replace(_SOUNDS, objective=Diffusion(target="audio", noise_multiplicity=3)), shapes=EVERYTHING
    ),
    "diffusion-waveform-words-mlp": Combination(
        settings=replace(_SOUNDS, audio=Waveform(), objective=Diffusion(target="audio")),
        shapes=EVERYTHING,
        largest=1e-4,  # samples vary by .1 only: at low noise the error is a small difference of float32 numbers
    ),
    "diffusion-mel-words-unet": Combination(
        settings=replace(TINY_UNET, image=None, audio=_MEL, objective=Diffusion(target="audio")), shapes=EVERYTHING
    ),
    "diffusion-image-of-text-and-sound": Combination(
        settings=replace(TINY, audio=_MEL, objective=Diffusion(condition_width=8)), shapes=EVERYTHING
    ),
    "diffusion-sound-of-text-and-image": Combination(
        settings=replace(TINY, audio=_MEL, objective=Diffusion(target="audio", condition_width=8)), shapes=EVERYTHING
    ),
    "diffusion-vae-words-mlp": Combination(
        settings=replace(TINY, image=VaeLatents(folder=_VAE.name)), prepare=vae_folder
    ),
    "diffusion-reader": Combination(
        settings=replace(TINY, reader=Reader(questions=(_SIDES,)), sampling=Sampling(steps=2, candidates=3)),
        outside=("reader_texts.",),
    ),
    "flow-reader-all-three": Combination(
        settings=replace(
            TINY, audio=_MEL, objective=Flow(condition_width=8), reader=Reader(questions=(_SIDES,), weight=0.5)
        ),
        shapes=EVERYTHING,
        outside=("reader_texts.",),
    ),
    "flow-cosine-words-mlp": Combination(settings=replace(TINY, objective=Flow(noise_multiplicity=3))),
    "flow-pixels-words-unet": Combination(settings=replace(TINY_UNET, objective=Flow())),
    "flow-sound-of-text-and-image": Combination(
        settings=replace(TINY, audio=_MEL, objective=Flow(target="audio", condition_width=8)), shapes=EVERYTHING
    ),
}

_MLP = Mlp(width=12, depth=1)
_WORDS = HashedWords(buckets=16, width=8)


def _variational(**settings: Any) -> ModelSettings:
    objective = Variational(latent=4, **{k: settings.pop(k) for k in ("experts", "draws") if k in settings})
    return ModelSettings(**{"image": TINY.image, "text": _WORDS, "backbone": _MLP, **settings}, objective=objective)


def _adversarial(*, largest: float = 2e-5, **settings: Any) -> Combination:
    objective = Adversarial(
        noise=4, discriminator_steps=50, **{k: settings.pop(k) for k in ("loss", "fakes") if k in settings}
    )
    given = {"image": TINY.image, "text": _WORDS, "backbone": _MLP, **settings}
    outside = ("generator.", "first", "second", "taken")
    return Combination(
        settings=ModelSettings(**given, objective=objective),
        shapes=EVERYTHING,
        outside=outside,
        largest=largest,
        stays=("discriminator.", *outside[1:]),
    )


COMBINATIONS |= {
    "variational-product-words": Combination(settings=_variational(draws=2)),
    "variational-product-terms": Combination(settings=_variational(text=_TERMS)),
    "variational-mixture-words": Combination(settings=_variational(experts="mixture")),
    "variational-all-three": Combination(
        settings=_variational(experts="mixture_of_products", audio=Waveform()), shapes=EVERYTHING
    ),
    "variational-sounds-alone": Combination(
        settings=_variational(image=None, text=None, audio=Waveform()), shapes=EVERYTHING
    ),
    "variational-tokens": Combination(
        settings=replace(TINY_SOUNDS, backbone=_MLP, objective=Variational(latent=4)), shapes=SHORT
    ),
    "variational-bytes-to-pixels": Combination(
        settings=replace(TINY_BYTES, image=TINY.image, backbone=_MLP, objective=Variational(latent=4))
    ),
    "alignment-tokens": Combination(
        settings=replace(
            TINY_SOUNDS, text=TINY_BYTES.text, backbone=_MLP, objective=Alignment(width=6, temperature=3.0)
        ),
        shapes=SHORT,
        outside=("bank.",),
    ),
    "alignment-words": Combination(
        settings=ModelSettings(image=TINY.image, text=_WORDS, backbone=_MLP, objective=Alignment(width=6)),
        outside=("bank.",),
    ),
    "alignment-all-three": Combination(
        settings=ModelSettings(
            image=TINY.image,
            text=_TERMS,
            audio=Waveform(),
            backbone=_MLP,
            objective=Alignment(width=6, temperature=0.3),
        ),
        shapes=EVERYTHING,
        outside=("bank.",),
    ),
    "adversarial-words": _adversarial(),
    "adversarial-all-three-hinge": _adversarial(audio=Waveform(), text=_TERMS, loss="hinge", fakes=3, largest=1e-4),
    "adversarial-pictures-alone": _adversarial(text=None),
    "autoregressive-words-patches": Combination(settings=TINY_TOKENS),
    "autoregressive-bytes": Combination(settings=TINY_BYTES, shapes=Shapes()),
    "autoregressive-bytes-mel": Combination(settings=TINY_MEL, shapes=EVERYTHING),
    "autoregressive-bytes-patches-mu_law": Combination(settings=TINY_SOUNDS, shapes=SHORT),
}


def records(
    counts: Sequence[int], modalities: Sequence[Modality], *, seed: int = 0, shapes: Shapes = EVERYTHING
) -> list[Record]:
    """Unit number i has counts[i] records of these modalities, all different; another seed, entirely other records."""
    rng = np.random.default_rng(seed)
    made = []
    for unit, count in enumerate(counts):
        for number in range(count):
            words = f"patient {unit} visit {number} number {rng.integers(1000)} " + ("left" if unit % 2 else "right")
            picture = rng.integers(0, 256, shapes.picture or SHAPE, dtype=np.uint8)
            samples, rate = shapes.samples or SAMPLES, shapes.sample_rate or SAMPLE_RATE
            tone = np.sin(2 * np.pi * rng.uniform(20, rate / 2 - 20) * np.arange(samples) / rate + rng.uniform(0, 6))
            sound = (0.4 * tone + 0.05 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32)
            values = {"text": words, "image": picture, "audio": sound}
            made.append(
                Record(
                    id=f"{unit}-{number}",
                    unit=f"unit-{unit:03d}",
                    sample_rate=rate if "audio" in modalities else None,
                    **{name: values[name] for name in MODALITIES if name in modalities},
                )
            )
    return made
