"""Pictures as latents of a frozen public autoencoder, a small random one on disk: scale, sizes, channels, what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.combinations import vae_folder
from tests.models.conftest import SHAPE, TINY, records

from sfumato.data.settings import DataSettings
from sfumato.errors import DataError, MissingDependency, PrivacyRefused, UsageError
from sfumato.models import model as models
from sfumato.models.codecs.vae import VaeCodec
from sfumato.models.from_mean import FromMean
from sfumato.models.settings import VaeLatents
from sfumato.recipe import Recipe, from_mapping
from sfumato.records import Record
from sfumato.stages import boundary


@pytest.fixture
def folder() -> Path:
    return vae_folder()


def colour(count: int, shape: tuple[int, int, int]) -> list[Record]:
    rng = np.random.default_rng(0)
    return [Record(id=str(i), unit=str(i), image=rng.integers(0, 256, shape, dtype=np.uint8)) for i in range(count)]


def test_latents_are_the_mode_times_the_scaling_factor(folder: Path):
    """Against diffusers' own calls, one picture at a time."""
    from diffusers import AutoencoderKL

    theirs: Any = AutoencoderKL.from_pretrained(folder)
    codec = VaeCodec(VaeLatents(folder=str(folder)), (12, 8, 3))
    given = colour(3, (12, 8, 3))
    latents, present = codec.encode([*given, Record(id="x", unit="x", text="none")])
    assert codec.shape == (2, 6, 4)
    assert latents.shape == (4, 48)
    assert present.tolist() == [True, True, True, False]
    assert not latents[3].any()
    decoded = codec.decode(latents[:3])
    for row, record in enumerate(given):
        x = torch.from_numpy(np.asarray(record.image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean = theirs.encode(x).latent_dist.mean
            torch.testing.assert_close(latents[row], (mean * 0.18215).flatten(), rtol=1e-4, atol=1e-6)
            back = ((theirs.decode(mean).sample[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
        assert np.abs(decoded[row].astype(int) - back.numpy()).max() <= 1
    assert codec.scale.unique().tolist() == [1.0]
    assert not any(p.requires_grad for p in codec._vae.parameters())


def test_a_shift_is_taken_off_before_the_factor_and_put_back(tmp_path):
    plain = VaeCodec(VaeLatents(folder=str(vae_folder(tmp_path / "a"))), SHAPE)
    moved = VaeCodec(VaeLatents(folder=str(vae_folder(tmp_path / "b", shift_factor=0.5, scaling_factor=2.0))), SHAPE)
    given = records([1, 1])
    torch.testing.assert_close(
        moved.encode(given)[0], (plain.encode(given)[0] / 0.18215 - 0.5) * 2, atol=1e-5, rtol=1e-4
    )
    one, two = (codec.decode(codec.encode(given)[0]) for codec in (plain, moved))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(one, two, strict=True))


def test_grey_pictures_go_through_a_colour_autoencoder_and_stay_grey(folder: Path):
    codec = VaeCodec(VaeLatents(folder=str(folder)), SHAPE)
    given = records([1, 1])
    made = codec.decode(codec.encode(given)[0])
    assert [picture.shape for picture in made] == [SHAPE, SHAPE]
    as_colour = VaeCodec(VaeLatents(folder=str(folder)), (8, 8, 3))
    three = [replace(record, image=np.repeat(np.asarray(record.image), 3, axis=2)) for record in given]
    torch.testing.assert_close(as_colour.encode(three)[0], codec.encode(given)[0])


def test_colour_through_a_grey_autoencoder_and_odd_sides_are_refused(tmp_path):
    grey = VaeLatents(folder=str(vae_folder(tmp_path / "grey", channels=1)))
    assert VaeCodec(grey, SHAPE).encode(records([1]))[0].shape == (1, 32)
    with pytest.raises(UsageError, match=r"takes 1 channels and gives 1, the pictures have 3"):
        VaeCodec(grey, (8, 8, 3))
    with pytest.raises(UsageError, match="picture = 9 x 8 · this autoencoder needs sides that are multiples of 2"):
        VaeCodec(grey, (9, 8, 1))
    with pytest.raises(DataError, match=r"record 0-0: image.shape = \(8, 8, 1\) · must be \(10, 8, 1\)"):
        VaeCodec(grey, (10, 8, 1)).encode(records([1]))


def test_it_is_named_by_its_sum_and_another_one_is_refused_at_load(tmp_path):
    folder = vae_folder(tmp_path / "vae")
    model = models.build(replace(TINY, image=VaeLatents(folder=str(folder))), picture_shape=SHAPE)
    model.save(tmp_path / "model")
    digest = hashlib.sha256()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        digest.update((folder / name).read_bytes())
    described = json.loads((tmp_path / "model" / "sfumato.json").read_text())
    assert described["frozen"] == {"image": digest.hexdigest()}
    assert not [name for name in model.state_dict() if "vae" in name]  # it is no part of what is trained or saved
    sentences = boundary(Recipe(name="x", data=DataSettings(), model=model.settings))
    assert [s for s in sentences if digest.hexdigest() in s and s.startswith("Declared public: the autoencoder")]
    assert models.load(tmp_path / "model").frozen() == described["frozen"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    with pytest.raises(UsageError, match=r"is not a model that this version wrote .*frozen weights"):
        models.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["sfumato.json", "ledger.db", "privacy.json"])
def test_one_of_private_records_is_refused(tmp_path, name: str):
    """What a run or a bundle of ours holds beside a model tells that its weights are of private records."""
    folder = vae_folder(tmp_path / "vae")
    with pytest.raises(PrivacyRefused, match=r"said to be fitted on private records: .* has a budget of its own"):
        VaeCodec(VaeLatents(folder=str(folder), trained_on="private"), SHAPE)
    (tmp_path / name).write_text("{}")
    with pytest.raises(PrivacyRefused, match=rf"a folder of this package \({name}\)"):
        VaeCodec(VaeLatents(folder=str(folder)), SHAPE)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(MissingDependency, match=r"holds no config.json"):
        VaeCodec(VaeLatents(folder=str(tmp_path)), SHAPE)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UsageError, match=r"is no AutoencoderKL of diffusers with safetensors"):
        VaeCodec(VaeLatents(folder=str(tmp_path)), SHAPE)
    with pytest.raises(UsageError, match=r"model.image.kind = vae · what is released"):
        FromMean(replace(TINY, image=VaeLatents(folder=str(vae_folder()))), SHAPE)


def test_a_recipe_names_it_by_its_folder():
    recipe = from_mapping({"name": "x", "model": {"image": {"kind": "vae", "folder": "there"}}})
    assert recipe.model.image == VaeLatents(folder="there")
