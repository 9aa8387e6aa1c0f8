"""Pictures and sounds: refused before they are decoded, or for a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data import media
from sfumato.errors import DataError


def picture(seed: int, size: int = 24, channels: int = 3) -> np.ndarray:
    """Smooth, and unlike the pictures of other seeds."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises an enormous picture."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 10), (10, 8193), (7000, 7000), (20_990, 29_700), (2**31 - 1, 2**31 - 1)])
def test_a_huge_picture_is_refused_from_its_header(size, monkeypatch):
    def decode(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(DataError) as refused:
        media.read_image(bomb(*size), name="r1")
    assert refused.value.code == "huge"
    assert "r1" in str(refused.value)


def test_the_largest_allowed_side_is_decoded():
    assert media.read_image(encoded(np.zeros((3, media.MAX_SIDE), np.uint8)), name="r").shape == (3, media.MAX_SIDE, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(kind):
    whole = encoded(picture(1, 64), kind)
    with pytest.raises(DataError, match="cannot be decoded") as refused:
        media.read_image(whole[: len(whole) // 2], name="r2")
    assert refused.value.code == "unreadable"


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(0, 255))
def test_damaged_bytes_give_a_picture_or_a_data_error(junk, position, value):
    whole = bytearray(encoded(picture(2, 16)))
    whole[position % len(whole)] = value
    for given_bytes in (junk, bytes(whole), bytes(whole) + junk):
        try:
            outcome = str(media.read_image(given_bytes, name="r").dtype)
        except DataError as error:
            outcome = error.code
        assert outcome in ("uint8", "unreadable", "huge", "channels", "frames")


@pytest.mark.parametrize(
    ("mode", "code"), [("CMYK", "channels"), ("I;16", "channels"), ("F", "channels"), ("LAB", "channels")]
)
def test_pictures_of_another_kind_are_refused(mode, code):
    out = io.BytesIO()
    Image.new(mode, (4, 4)).save(out, "TIFF")
    with pytest.raises(DataError, match=mode) as refused:
        media.read_image(out.getvalue(), name="r")
    assert refused.value.code == code


def test_an_animation_is_refused():
    out = io.BytesIO()
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="frames = 3"):
        media.read_image(out.getvalue(), name="r")


def test_transparency_lies_on_white_and_grey_stays_grey():
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = [10, 20, 30, 255]
    pixels = media.read_image(encoded(clear), name="r")
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert media.read_image(encoded(picture(1, channels=1)), name="r").shape == (24, 24, 1)


def test_a_photograph_is_turned_as_its_orientation_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert media.read_image(encoded(np.zeros((4, 8, 3), np.uint8), "JPEG", exif=exif), name="r").shape == (8, 4, 3)


def test_fit_pads_with_the_border_and_loses_nothing():
    tall = np.full((40, 20, 3), 200, np.uint8)
    tall[18:22, 8:12] = 0
    fitted = media.fit(tall, size=20, channels=3)
    assert fitted.shape == (20, 20, 3)
    assert abs(int(fitted[0, 0, 0]) - 200) <= 1
    assert fitted[9:11, 9:11].max() < 40
    assert media.fit(tall, size=20, channels=1).shape == (20, 20, 1)
    assert media.fit(tall[:20, :, :1], size=20, channels=3).shape == (20, 20, 3)


def test_halving_averages_boxes():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 10
    expected = pixels[:, :, 0].reshape(2, 2, 2, 2).mean((1, 3))
    np.testing.assert_allclose(media.fit(pixels, size=2, channels=1)[:, :, 0], expected, atol=1)


def wav(samples: np.ndarray, rate: int = 4000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV")
    return out.getvalue()


def test_a_mono_sound_is_read():
    wave = np.sin(np.arange(4000) / 20).astype(np.float32) * 0.5
    samples, rate = media.read_audio(wav(wave), name="r")
    assert rate == 4000
    np.testing.assert_allclose(samples, wave, atol=1e-4)


def test_stereo_empty_and_torn_sounds_are_refused(tmp_path):
    for sound, code in (
        (wav(np.zeros((100, 2))), "channels"),
        (wav(np.zeros(0)), "huge"),
        (b"RIFF not a sound", "unreadable"),
        (tmp_path / "none.wav", "missing_file"),
    ):
        with pytest.raises(DataError) as refused:
            media.read_audio(sound, name="r")
        assert refused.value.code == code


def test_a_rescaled_copy_has_nearly_the_same_difference_hash():
    original = picture(5, 64)
    copy = media.fit(original, size=48, channels=3)
    jpeg = media.read_image(encoded(copy, "JPEG", quality=80), name="r")
    one, other = (media.difference_hash(pixels)[0] for pixels in (original, jpeg))
    assert (one ^ other).bit_count() <= 3
    assert (one ^ media.difference_hash(picture(6, 64))[0]).bit_count() > 10
