"""Pictures to latents and back."""

import math

import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models.codecs.image import ImageCoder, cosine_matrix
from sfumato.models.settings import Cosine, Pixels


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_transform_is_the_orthonormal_cosine_transform():
    matrix = cosine_matrix(9, 9)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(9, dtype=torch.float64), atol=1e-12, rtol=0)
    slow = torch.zeros(9, 9, dtype=torch.float64)
    for k in range(9):
        for n in range(9):
            slow[k, n] = math.cos(math.pi * (2 * n + 1) * k / 18) * math.sqrt((1 if k == 0 else 2) / 9)
    torch.testing.assert_close(matrix, slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("settings", [Pixels(), Cosine(kept=8)], ids=["pixels", "all frequencies"])
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_is_lost_where_every_frequency_is_kept(settings, channels):
    coder = ImageCoder(settings, 8, 8, channels)
    given = pictures(5, 8, 8, channels)
    assert coder.decode(coder.encode(given)).equal(given)


def test_what_is_kept_is_the_nearest_band_limited_picture():
    coder = ImageCoder(Cosine(kept=4), 8, 8, 1)
    latents = coder.encode(pictures(3, 8, 8, 1))
    assert latents.shape == (3, *coder.latent_shape) == (3, 1, 4, 4)
    smooth = coder.decode(latents * 0.3)  # within the grey range, so that nothing is clipped
    torch.testing.assert_close(
        coder.encode(smooth), latents * 0.3, atol=2 * 0.5 / 127.5, rtol=0
    )  # rounding to grey levels


def test_a_flat_picture_has_one_latent_entry_on_the_scale_of_the_shrunk_picture():
    coder = ImageCoder(Cosine(kept=4), 16, 16, 1)
    latents = coder.encode(torch.full((1, 16, 16, 1), 255, dtype=torch.uint8))
    assert latents[0, 0, 0, 0].item() == pytest.approx(4.0, abs=1e-5)  # 1.0 in each of 4 x 4 pixels: norm 4
    assert latents.abs().sum().item() == pytest.approx(4.0, abs=1e-4)


def test_the_spectrum_is_a_constant_that_falls_with_the_frequency():
    settings = Cosine(kept=3, amplitude=1.5, decay=2.0)
    spectrum = ImageCoder(settings, 8, 8, 3).spectrum(sigma_data=0.5)
    assert spectrum.shape == (3, 3, 3)
    for i in range(3):
        for j in range(3):
            expected = 1.5 / (1 + math.hypot(i, j)) ** 2
            assert spectrum[:, i, j].tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert ImageCoder(Pixels(), 8, 8, 1).spectrum(sigma_data=0.5).unique().tolist() == [0.5]


def test_values_outside_the_grey_range_are_clipped():
    decoded = ImageCoder(Pixels(), 1, 2, 1).decode(torch.tensor([[[[-7.0, 7.0]]]]))
    assert decoded.flatten().tolist() == [0, 255]


@pytest.mark.parametrize("kept", [0, 9])
def test_frequencies_that_a_picture_does_not_have_are_refused(kept):
    with pytest.raises(UsageError, match=rf"model.image.kept = {kept} · must be between 1 and the picture's side, 8"):
        ImageCoder(Cosine(kept=kept), 8, 8, 1)
