"""Every kind of layer, over random shapes: the engine's step is that of the slow reference, relative 1e-6."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.privacy.gradients.comparing import TOLERANCE, difference, gradients_by_backward, reference_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

Pick = Callable[..., Any]  # pick(low, high) draws a number, pick([...]) one of some things
Case = tuple[nn.Module, Callable[[int], list[Tensor]]]  # a model, and its inputs for R rows
CASES: dict[str, Callable[[Pick], Case]] = {}


def case(make: Callable[[Pick], Case]) -> Callable[[Pick], Case]:
    CASES[make.__name__] = make
    return make


def floats(*shape: int) -> Callable[[int], list[Tensor]]:
    return lambda rows: [torch.randn(rows, *shape)]


def words(high: int, *shape: int, kind: torch.dtype = torch.int64) -> Callable[[int], list[Tensor]]:
    return lambda rows: [torch.randint(0, high, (rows, *shape), dtype=kind)]


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in names)
    return layer


class Of(nn.Module):
    """A layer, and how it is used."""

    def __init__(self, use: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.use = use
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.use(self, *args)


# ------------------------------------------------------------------------------------------------- linear, convolutions


@case
def linear(pick: Pick) -> Case:
    between = [pick(1, 4) for _ in range(pick(0, 3))]
    width = pick(1, 6)
    return nn.Linear(width, pick(1, 6), bias=pick([True, False])), floats(*between, width)


@case
def linear_with_a_frozen_half(pick: Pick) -> Case:
    """Of a frozen weight the input may change afterwards, as in torch."""
    half = pick(["weight", "bias"])

    def use(model: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        y = model.layer(x)
        return y + x.mul_(2).sum(-1, keepdim=True) if half == "weight" else y

    return Of(use, layer=frozen(nn.Linear(3, 4), half)), floats(pick(1, 3), 3)


PADDINGS = ["zeros", "reflect", "replicate", "circular"]


def convolution_of(dimensions: int, pick: Pick) -> Case:
    groups = pick(1, 3)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        groups * pick(1, 2),
        groups * pick(1, 3),
        kernel_size=tuple(pick(1, 3) for _ in range(dimensions)),
        stride=tuple(pick(1, 2) for _ in range(dimensions)),
        padding=tuple(pick(0, 2) for _ in range(dimensions)),
        dilation=tuple(pick(1, 2) for _ in range(dimensions)),
        groups=groups,
        bias=pick([True, False]),
        padding_mode=pick(PADDINGS),
    )
    space = [pick(5, 7) if dimensions < 3 else 5 for _ in range(dimensions)]
    return layer, floats(layer.in_channels, *space)


@case
def conv1d(pick: Pick) -> Case:
    return convolution_of(1, pick)


@case
def conv2d(pick: Pick) -> Case:
    return convolution_of(2, pick)


@case
def conv3d(pick: Pick) -> Case:
    return convolution_of(3, pick)


@case
def convolution_with_named_padding(pick: Pick) -> Case:
    """(An even kernel with "same" is padded unequally; there torch warns that it copies.)"""
    kernel, named = (pick(1, 4), pick(1, 4)), pick(["same", "valid"])
    layer = nn.Conv2d(2, 3, kernel, padding=named, padding_mode=pick(PADDINGS), dilation=pick(1, 2))

    def use(m: Any, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
            return m.layer(x)

    return Of(use, layer=layer), floats(2, 7, 8)


@case
def convolution_with_a_frozen_half(pick: Pick) -> Case:
    return frozen(nn.Conv1d(2, 3, 2), pick(["weight", "bias"])), floats(2, pick(2, 6))


def transposed_of(dimensions: int, pick: Pick) -> Case:
    groups = pick(1, 2)
    strides = [pick(1, 3) for _ in range(dimensions)]
    given_size = pick([True, False])
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1](
        groups * pick(1, 2),
        groups * pick(1, 2),
        kernel_size=tuple(pick(2, 3) for _ in range(dimensions)),
        stride=tuple(strides),
        padding=tuple(pick(0, 1) for _ in range(dimensions)),
        output_padding=tuple(0 if given_size else pick(0, s - 1) for s in strides),
        groups=groups,
        dilation=pick(1, 2) if max(strides) == 1 else 1,
    )
    space = [pick(2, 4) for _ in range(dimensions)]
    more = [pick(0, s - 1) for s in strides]

    def use(model: Any, x: Tensor) -> Tensor:
        if not given_size:
            return model.layer(x)
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + m
            for n, s, p, d, k, m in zip(
                space, strides, layer.padding, layer.dilation, layer.kernel_size, more, strict=True
            )
        ]
        return torch.cat([model.layer(x, output_size=size).flatten(1), model.layer(x.cos()).flatten(1)], 1)

    return Of(use, layer=layer), floats(layer.in_channels, *space)


@case
def transposed_conv1d(pick: Pick) -> Case:
    return transposed_of(1, pick)


@case
def transposed_conv2d(pick: Pick) -> Case:
    return transposed_of(2, pick)


@case
def transposed_conv3d(pick: Pick) -> Case:
    return transposed_of(3, pick)


# ------------------------------------------------------------------------------------- embeddings, norms, activations


@case
def embedding(pick: Pick) -> Case:
    layer = nn.Embedding(7, pick(1, 4), padding_idx=pick([None, 0, 3, -1]))
    return layer, words(7, *[pick(1, 4) for _ in range(pick(0, 2))], kind=pick([torch.int64, torch.int32]))


@case
def bag_of_embeddings(pick: Pick) -> Case:
    layer = nn.EmbeddingBag(7, pick(1, 4), mode=pick(["sum", "mean", "max"]), padding_idx=pick([None, 2]))
    return layer, words(7, pick(1, 4))


@case
def layer_norm(pick: Pick) -> Case:
    shape = [pick(2, 4) for _ in range(pick(1, 2))]
    layer = nn.LayerNorm(shape, bias=pick([True, False]))
    return nn.Sequential(layer, nn.Tanh()), floats(*[pick(1, 3) for _ in range(pick(0, 2))], *shape)


@case
def rms_norm(pick: Pick) -> Case:
    shape = [pick(2, 4) for _ in range(pick(1, 2))]
    layer = nn.RMSNorm(shape, eps=pick([None, 1e-3]))
    return nn.Sequential(layer, nn.Tanh()), floats(*[pick(1, 3) for _ in range(pick(0, 2))], *shape)


@case
def group_norm(pick: Pick) -> Case:
    groups, per_group, space = pick(1, 3), pick(1, 3), [pick(1, 4) for _ in range(pick(0, 3))]
    if per_group == 1:
        space.append(2)  # one number alone is always normalised to zero
    return nn.Sequential(nn.GroupNorm(groups, groups * per_group), nn.Tanh()), floats(groups * per_group, *space)


@case
def instance_norm(pick: Pick) -> Case:
    dimensions, channels = pick(1, 3), pick(1, 3)
    layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1](channels, affine=True)
    return nn.Sequential(layer, nn.Tanh()), floats(channels, *[pick(2, 3) for _ in range(dimensions)])


@case
def prelu(pick: Pick) -> Case:
    channels = pick(1, 3)
    layer = nn.PReLU(pick([1, channels]))
    return nn.Sequential(Of(lambda m, x: x * 2, first=nn.Identity()), layer), floats(
        channels, *[pick(1, 3) for _ in range(pick(0, 2))]
    )


@case
def bilinear(pick: Pick) -> Case:
    layer = nn.Bilinear(3, pick(1, 3), pick(1, 3), bias=pick([True, False]))
    return Of(lambda m, x: m.layer(x, x[..., : layer.in2_features].sin()), layer=layer), floats(3)


# ------------------------------------------------------------------------------------------- attention, recurrent cells


class Attention(nn.Module):
    """With masks (B H, L, S) or (L, S), of numbers or of bits, padding per row, and one call or two."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.heads = pick(1, 3)
        self.width = self.heads * pick(1, 2)
        same = pick([True, False])
        self.kdim, self.vdim = (self.width, self.width) if same else (pick(1, 4), pick(1, 4))
        self.crossed = pick([True, False]) or (self.kdim, self.vdim) != (self.width, self.width)
        self.twice = pick([True, False]) and self.kdim == self.vdim == self.width
        self.mask, self.padded = pick(["none", "shared", "bits", "rows", "causal"]), pick([True, False])
        self.options = {"need_weights": pick([True, False]), "average_attn_weights": pick([True, False])}
        self.attention = nn.MultiheadAttention(
            self.width,
            self.heads,
            bias=pick([True, False]),
            add_bias_kv=pick([True, False]),
            add_zero_attn=pick([True, False]),
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=True,
        )
        for name in ("in_proj_weight", "in_proj_bias", "bias_k", "out_proj.weight", "q_proj_weight"):
            found = dict(self.attention.named_parameters()).get(name)
            if found is not None and pick(0, 5) == 0:
                found.requires_grad_(False)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter)
        self.length, self.other = pick(1, 3), pick(1, 3)

    def inputs(self, rows: int) -> list[Tensor]:
        shapes = [(self.length, self.width), (self.other, self.kdim), (self.other, self.vdim)]
        return [torch.randn(rows, *shape) for shape in shapes]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = [self.call(q, k, v) if self.crossed else self.call(q, q, q)]
        if self.twice:
            found.append(self.call(q, q, q) if self.crossed else self.call(q.sin(), q.sin(), q.sin()))
        return torch.cat([y.flatten(1) for pair in found for y in pair if y is not None], 1)

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        rows, length, other = len(q), q.shape[1], k.shape[1]
        options: dict[str, Any] = dict(self.options)
        if self.mask == "shared":
            options["attn_mask"] = torch.linspace(-1, 1, length * other, dtype=q.dtype).view(length, other)
        elif self.mask == "bits":
            options["attn_mask"] = torch.ones(length, other, dtype=torch.bool).triu(1 + other - 1)
        elif self.mask == "rows":
            options["attn_mask"] = torch.stack([row.mean() * torch.ones(length, other).double() for row in q])
            options["attn_mask"] = options["attn_mask"].detach().repeat_interleave(self.heads, 0)
        elif self.mask == "causal" and length == other:
            options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(length, dtype=q.dtype)
            options["is_causal"] = True
        if self.padded:
            bits = k[:, :, 0] > 0
            bits[:, 0] = False  # something is left to look at
            options["key_padding_mask"] = bits
            if options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool:
                options["key_padding_mask"] = torch.zeros(rows, other, dtype=q.dtype).masked_fill(bits, -torch.inf)
        return self.attention(q, k, v, **options)


@case
def attention(pick: Pick) -> Case:
    model = Attention(pick)
    return model, model.inputs


@case
def transformer_layers(pick: Pick) -> Case:
    options: dict[str, Any] = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(
        4, 2, norm_first=pick([True, False]), activation=pick(["relu", "gelu"]), bias=pick([True, False]), **options
    )
    model: nn.Module = layer
    if pick([True, False]):
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    model.train(pick([True, False]))  # in evaluation torch has a fast path
    length, padded = pick(2, 3), pick([True, False])

    def use(m: Any, x: Tensor) -> Tensor:
        padding = x[:, :, 0] > 0.5
        padding[:, 0] = False
        return m.body(x, src_key_padding_mask=padding) if padded else m.body(x)

    return Of(use, body=model), floats(length, 4)


@case
def transformer_with_a_decoder(pick: Pick) -> Case:
    model = nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True)
    lengths = pick(1, 3), pick(1, 3)
    mask = nn.Transformer.generate_square_subsequent_mask(lengths[1], dtype=torch.float64)

    def use(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.body(x, y, tgt_mask=mask, tgt_is_causal=True)

    return Of(use, body=model), lambda rows: [torch.randn(rows, n, 4) for n in lengths]


@case
def recurrent_cells(pick: Pick) -> Case:
    kind = pick([nn.RNNCell, nn.LSTMCell, nn.GRUCell])
    options = {"nonlinearity": pick(["tanh", "relu"])} if kind is nn.RNNCell else {}
    width, hidden, starts = pick(1, 3), pick(1, 3), pick([True, False])

    def use(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        if starts:
            state = x.new_ones(x.shape[0], hidden)
            state = (state, state) if kind is nn.LSTMCell else state
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return torch.cat(state, 1) if kind is nn.LSTMCell else state

    cell = kind(width, hidden, bias=pick([True, False]), **options)
    return Of(use, cell=cell), floats(pick(1, 3), width)


# ------------------------------------------------------------------------------------- bare and computed parameters


class Vision(nn.Module):
    """A class token, positions and a scale on the model itself, around layers of every kind."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 5, 4))
        self.scale = nn.Parameter(torch.randn(()))
        self.words = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.inplace = pick([True, False])
        self.masked = pick([True, False])

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.places
        h = h + self.words(torch.arange(5))  # nothing of a row in it
        mask = torch.ones(5, 5).triu(1).bool() if self.masked else None
        h = h + self.attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = self.layer(h)
        h = F.relu(self.norm(h), inplace=self.inplace) * self.scale
        return self.head(h[:, 0])


@case
def a_vision_transformer(pick: Pick) -> Case:
    return Vision(pick), floats(1, 4, 4)


class Gated(nn.Module):
    """Bare parameters in the middle of a model, with a layer inside that is also used outside."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.gate, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))
        self.inner = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.gate) + self.shift.sum(0)


@case
def bare_parameters_around_a_shared_layer(pick: Pick) -> Case:
    shared: nn.Module = pick([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU())])
    order = [Gated(shared), shared]
    return nn.Sequential(*(order if pick([True, False]) else order[::-1])), floats(*[pick(1, 3)] * pick(0, 1), 3)


@case
def a_parameter_with_control_flow_on_values(pick: Pick) -> Case:
    """vmap cannot: row after row, with the layer inside too."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = [
                self.layer(row * self.weight if float(row.detach().sum()) > 0 else row + self.weight)
                for row in x.split(1)
            ]
            return torch.cat(rows)

    return Branching(), floats(3)


WEIGHTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal by exponential": lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp"),
    "orthogonal by reflections": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"),
    "orthogonal by Cayley": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),  # type: ignore[arg-type]
}


@case
def computed_weights(pick: Pick) -> Case:
    kind = pick(sorted(WEIGHTS))
    make = pick([lambda: nn.Linear(3, 4), lambda: nn.Conv1d(3, 2, 2), lambda: nn.ConvTranspose1d(3, 2, 2)])
    if "orthogonal" in kind:
        make = lambda: nn.Linear(3, 3)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the forms by hooks
        layer = WEIGHTS[kind](make())
    if kind.startswith("weight") and pick([True, False]):
        next(layer.parameters()).requires_grad_(False)
    twice = pick([True, False])

    def use(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if isinstance(m.layer, nn.Linear) else x
        y = m.layer(x).flatten(1)
        return torch.cat([y, m.layer(x.sin()).flatten(1)], 1) if twice else y

    return Of(use, layer=layer), floats(3, 4)


@case
def computed_weights_inside_bare_parameters(pick: Pick) -> Case:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    parametrizations.weight_norm(attention.out_proj)
    parametrizations.weight_norm(attention, "in_proj_weight")

    def use(m: Any, x: Tensor) -> Tensor:
        return m.gate(m.attention(x, x, x)[0])

    gate = Gated(parametrizations.spectral_norm(nn.Linear(3, 3)))
    gate = nn.Sequential(nn.Linear(4, 3), gate)
    return Of(use, attention=attention, gate=gate), floats(pick(1, 3), 4)


# --------------------------------------------------------------------------------------------------- ways of using them


@case
def tied_weights(pick: Pick) -> Case:
    body, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=pick([True, False]))
    head.weight = body.weight
    return nn.Sequential(body, nn.LayerNorm(3), head), words(6, pick(1, 4))


@case
def one_layer_called_on_several_shapes(pick: Pick) -> Case:
    layer = pick([nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)])

    def use(m: Any, x: Tensor) -> Tensor:
        found = [m.layer(x), m.layer(x[:, :1, 0]), m.layer(m.layer(x[:, 0]).sin())]
        return torch.cat([y.flatten(1) for y in found], 1)

    return Of(use, layer=layer), floats(pick(1, 3), pick(1, 3), 4)


@case
def one_convolution_called_on_several_shapes(pick: Pick) -> Case:
    def use(m: Any, x: Tensor) -> Tensor:
        return torch.cat(
            [m.layer(x).flatten(1), m.layer(x[:, :, 1:]).flatten(1), m.layer(x.repeat(1, 1, 2)).flatten(1)], 1
        )

    return Of(use, layer=nn.Conv1d(2, 2, pick(1, 2))), floats(2, pick(3, 5))


ACTIVATIONS = [nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Hardtanh, nn.Mish]


@case
def activations_in_place(pick: Pick) -> Case:
    before = pick(
        [
            lambda: nn.Linear(5, 5),
            lambda: nn.Conv1d(2, 2, 3, padding=1),
            lambda: nn.LayerNorm(5),
            lambda: nn.GroupNorm(1, 2),
            lambda: nn.RMSNorm(5),
            lambda: nn.PReLU(2),
            lambda: nn.ConvTranspose1d(2, 2, 1),
        ]
    )

    def use(m: Any, x: Tensor) -> Tensor:
        y = m.act(m.first(x))
        z = m.second(y.clone())
        z += y
        z.mul_(0.5).add_(1.0)
        return m.act(z)

    return Of(use, first=before(), second=before(), act=pick(ACTIVATIONS)(inplace=True)), floats(2, 5)


@case
def checkpointed(pick: Pick) -> Case:
    return checkpointed_as(False, pick)


@case
def checkpointed_reentrant(pick: Pick) -> Case:
    return checkpointed_as(True, pick)


def checkpointed_as(reentrant: bool, pick: Pick) -> Case:
    """With and without a layer outside; one inside another."""
    nested = pick([True, False])

    def run(part: Any, x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # one inside another
            return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)

    def use(m: Any, x: Tensor) -> Any:
        h = m.first(x) if pick_outside else x * torch.ones((), dtype=x.dtype, requires_grad=True)
        body = (lambda h: run(m.body[2:], run(m.body[:2], h))) if nested else m.body
        return run(body, h)

    pick_outside = pick([True, False])
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))
    layers = {"first": nn.Linear(4, 4), "body": body} if pick_outside else {"body": body}
    return Of(use, **layers), floats(*[2] * pick(0, 1), 4)


@case
def expanded_and_shared_inputs(pick: Pick) -> Case:
    """A dimension of stride 0, and one tensor (1, ...) for all rows, positional or by name."""

    def use(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(3).unsqueeze(0)
        h = m.layer(x.unsqueeze(1).expand(-1, 3, -1))
        h = h + (m.places(places) if pick_name else m.places(input=places))
        canvas = torch.linspace(-1, 1, 8, dtype=h.dtype).view(1, 2, 4)
        return torch.cat([h.flatten(1), m.convolution(canvas).expand(len(x), -1, -1).flatten(1)], 1)

    pick_name = pick([True, False])
    return Of(use, layer=nn.Linear(4, 3), places=nn.Embedding(3, 3), convolution=nn.Conv1d(2, 2, 2)), floats(4)


@case
def frozen_parts(pick: Pick) -> Case:
    parts = [nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.LayerNorm(4)), nn.Linear(4, 4), nn.Linear(4, 2)]
    for part in parts[: pick(1, 3)]:
        part.requires_grad_(False)
    return nn.Sequential(*parts), floats(4)


@case
def hooks(pick: Pick) -> Case:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layer = model[pick(0, 2)]
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, y: y.sin() + args[0])
    if layer is not model[0]:  # (whose input needs no gradient: torch warns)
        layer.register_full_backward_hook(lambda m, before, after: tuple(g * 1.5 for g in before))
    return model, floats(4)


class Quantised(nn.Module):
    """A base of 8-bit integers, which is not trained, and a low-rank addition, which is: as layers, or bare."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.register_buffer("base", torch.randint(-127, 127, (3, 4), dtype=torch.int8))
        self.register_buffer("step", torch.tensor(0.01))
        if bare:
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        else:
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base.to(x.dtype) * self.step)
        if hasattr(self, "a"):
            return y + F.linear(F.linear(x, self.a), self.b)
        return y + self.up(self.down(x))


@case
def a_quantised_base(pick: Pick) -> Case:
    return nn.Sequential(Quantised(pick([True, False])), nn.Tanh(), nn.Linear(3, 2)), floats(4)


# ------------------------------------------------------------------------------------------------------------ the test


WHOLE = {"computed_weights", "computed_weights_inside_bare_parameters"}  # a power iteration for every forward pass


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data(), seed=st.integers(0, 2**31), counts=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_the_step_is_the_references(name, data, seed, counts):
    """Units of one to three rows, whole or in physical parts."""
    check(name, data, seed, counts)


@settings(max_examples=80, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data(), seed=st.integers(0, 2**31), counts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_attention_with_all_its_options_together(data, seed, counts):
    check("attention", data, seed, counts)


def check(name: str, data: Any, seed: int, counts: list[int]) -> None:
    def pick(*choice: Any) -> Any:
        if len(choice) == 2:
            return data.draw(st.integers(*choice))
        return data.draw(st.sampled_from(choice[0]))

    torch.manual_seed(seed)
    model, make = CASES[name](pick)
    at_once = None if name in WHOLE else pick([None, 1, 2])
    reference = gradients_by_backward if name == "checkpointed_reentrant" else reference_gradients
    inputs = make(sum(counts))
    assert difference(model, inputs, counts, reference=reference, at_once=at_once, seed=seed) <= TOLERANCE
