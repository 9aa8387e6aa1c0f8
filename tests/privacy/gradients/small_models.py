"""Small models of ``transformers`` and ``diffusers`` with random weights, their data, and the comparison they all pass.

There are as many rows as positions, so that nothing is right only because the two cannot be confused. The packages are
imported inside functions: each takes seconds.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tests.oracles import one_unit_at_a_time, relative, released, table_of
from torch import Tensor, nn

from sfumato.records import Batch

TOLERANCE = 1e-6
COUNTS = [1, 3, 2]  # rows of the units
ROWS = sum(COUNTS)
POSITIONS = ROWS
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4,
}  # fmt: skip
CONDITIONED = {
    **UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of other packages about other packages are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def words(*shape: int) -> Tensor:
    ids = torch.randint(3, 31, (ROWS, *shape))
    ids[:, -1] = 2  # CLIP looks for the end
    return ids


def floats(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, dtype=torch.float64)


def of(name: str, **config: Any) -> Callable[[], nn.Module]:
    """The model class of that name, with its configuration class found by the model's."""

    def make() -> nn.Module:
        with quiet():
            import transformers

            transformers.logging.set_verbosity_error()
            kind = getattr(transformers, name)
            return kind(kind.config_class(**config))

    return make


def diffuser(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with quiet():
            import diffusers

            diffusers.utils.logging.set_verbosity_error()
            return getattr(diffusers, name)(**config)

    return make


def gpt2() -> nn.Module:
    return of(
        "GPT2LMHeadModel", vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS,
    )()  # fmt: skip


def unet() -> nn.Module:
    return diffuser("UNet2DConditionModel", **CONDITIONED)()


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch.tensors["input_ids"]
    logits = model(input_ids=ids).logits
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return batch.per_unit(each.mean(1))


def losses(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    """Of all that comes out first: logits, hidden states, or a sample."""
    y = model(**batch.tensors, **options)[0].flatten(1)
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)
    return batch.per_unit((y - target).square().mean(1))


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def of_different_size(loss: Any) -> Callable[[nn.Module, Batch], Tensor]:
    """The losses times a number of each row's own: without it, the units of random models are nearly alike."""

    def scaled(model: nn.Module, batch: Batch) -> Tensor:
        tensors = {name: tensor for name, tensor in batch.tensors.items() if name != "size"}
        return loss(model, replace(batch, tensors=tensors)) * batch.per_unit(batch.tensors["size"])

    return scaled


def require_equal(model: nn.Module, tensors: dict[str, Tensor], loss: Any, **options: Any) -> None:
    """Of three units one is clipped hard, one a little, one not at all."""
    plain = copy.deepcopy(model)
    scaled = of_different_size(loss)
    table = table_of({**tensors, "size": torch.linspace(0.1, 3, ROWS, dtype=torch.float64)}, COUNTS)
    norms = []
    for unit in range(table.num_units):
        batch = table.batch([unit], records_per_unit=100)
        norms.append(float(one_unit_at_a_time(plain, scaled, batch, 1e300).norm()))
    small, middle, large = sorted(norms)
    c = 0.9 * middle
    assert 0 < small < c < large / 1.2, norms
    sums, batch = released(model, scaled, table, max_grad_norm=c, **options)
    assert relative(sums, one_unit_at_a_time(plain, scaled, batch, c)) <= TOLERANCE
