"""Products by either library: the same up to float32 rounding, whichever was chosen. u = 2^-24."""

import pytest
import torch
import torch.nn.functional as F

from sfumato.privacy.gradients import products

U = 2.0**-24


@pytest.fixture(params=[False, True], ids=["the usual one", "oneDNN"])
def library(request, monkeypatch):
    """Every shape goes to one library, however small."""
    if request.param and not products._AVAILABLE:
        pytest.skip("this build of torch has no product of oneDNN's")

    class Always(dict):
        def __contains__(self, key):
            return True

        def __missing__(self, key):
            return request.param

    monkeypatch.setattr(products, "_chosen", Always())
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_LEAST_OF_ONE", 0)


def close(a, b, terms):
    """Sums of ``terms`` products of numbers of size about 1: far less than terms u apart."""
    torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * terms * U)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (4, 1, 8, 2), (3, 6, 1, 1), (2, 33, 20, 40)])
@pytest.mark.parametrize("strided", [False, True])
def test_products_equal_those_in_float64(library, shape, strided):
    torch.manual_seed(0)
    count, positions, width, height = shape
    x, g, weight, bias = (
        torch.randn(count, positions, width),
        torch.randn(count, positions, height),
        torch.randn(height, width),
        torch.randn(height),
    )
    if strided:
        x, g = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, g))
        weight = weight.t().contiguous().t()
    wide = [t.double() for t in (x, g, weight, bias)]
    close(products.linear(x, weight, bias), F.linear(wide[0], wide[2], wide[3]), width + 1)
    close(products.linear(x, weight, None), F.linear(wide[0], wide[2]), width)
    close(products.input_gradient(g, weight), wide[1] @ wide[2], height)
    flat = products.weight_gradient(g.flatten(0, 1), x.flatten(0, 1))
    close(flat, wide[1].flatten(0, 1).t() @ wide[0].flatten(0, 1), count * positions)
    units = torch.cat(products.unit_gradients(g, x, 2))
    close(units, wide[1].transpose(1, 2) @ wide[0], positions)
    close(products.grams(x), wide[0] @ wide[0].transpose(1, 2), width)


def test_each_shape_is_timed_once_and_the_faster_library_stays(monkeypatch):
    if not products._AVAILABLE:
        pytest.skip("this build of torch has no product of oneDNN's")
    calls: list[str] = []
    seconds = {"usual": 2.0, "other": 1.0}
    monkeypatch.setattr(products, "_chosen", {})
    monkeypatch.setattr(products, "_seconds", lambda way: seconds[way()])

    def usual():
        calls.append("usual")
        return "usual"

    def other():
        calls.append("other")
        return "other"

    for _ in range(3):
        assert products._either(("x", 1, 1, 1), usual, other) == "other"
    assert calls.count("usual") == products._TRIES
    seconds["other"] = 1.95  # not worth it
    assert products._either(("y", 1, 1, 1), usual, other) == "usual"


def test_other_kinds_of_numbers_go_the_usual_way():
    x = torch.randn(4096, 4096)
    assert products._possible(x, x) == products._AVAILABLE
    for a in (x.double(), x.bfloat16(), x.to("meta")):
        assert not products._possible(a, a)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products._possible(x, x)
