"""Rules for the layer classes of ``transformers`` and ``diffusers``; those of ``peft`` are in ``adapters.py``.

Nothing is imported from these packages: a class is known by its qualified name, and what it computes is compared with
what the rule computes, on numbers, before the rule is used. A name alone proves nothing. A module that fails the
comparison goes row by row, which is always right.

Shapes: R rows, T positions, D inputs, O outputs.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.gradients import products
from sfumato.privacy.gradients.root_mean_square import one_tensor, probe, root_mean_square
from sfumato.privacy.gradients.rules import (
    Call,
    EmbeddingRule,
    Record,
    RowByRow,
    Rule,
    _Embedding,
    _swapped,
    plain_forward,
    rule_finder,
    sum_of,
    trainable,
)
from sfumato.privacy.gradients.rules.copies import Copies
from sfumato.privacy.gradients.rules.registry import once
from sfumato.privacy.gradients.terms import Outer, PerRow, Term


@rule_finder
def find(module: nn.Module) -> Rule | None:
    """The rule of a class of ``transformers`` or ``diffusers``, or of any class that computes what one of them does."""
    own = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
    if not own:
        if _package(module) == "transformers" and _has_position_bias(module):
            return RowwiseMethod("compute_bias", "relative_attention_bias")
        return _WHOLE if _folds_rows(module) and trainable(module) else None
    if is_a(module, "transformers.pytorch_utils.Conv1D"):
        return _CONV1D if _computes_a_product(module) else None
    if isinstance(module, nn.Embedding):
        return _EMBEDDING if type(module).forward is not nn.Embedding.forward and set(own) == {"weight"} else None
    if set(own) == {"weight"} and "Norm" in type(module).__name__:
        return root_mean_square(module)
    if any(name.startswith(("logit_scale", "logit_bias")) for name in own) and _package(module) == "transformers":
        return Coupled()
    if _package(module) == "transformers" and _are_aliases(module, own):
        return Aliases()
    if set(own) <= _bare_names(module):
        return BareParameters()
    return None


def is_a(module: nn.Module, name: str) -> bool:
    """Whether the module is of the class of that qualified name, or of a subclass with the same ``forward``."""
    for base in type(module).__mro__:
        if f"{base.__module__}.{base.__qualname__}" == name:
            return type(module).forward is base.forward  # type: ignore[attr-defined]
    return False


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


# ------------------------------------------------------------------------------------------------- Conv1D of GPT-2


class _Product(Function):
    """x weight + bias, where weight is (D, O)."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return products.linear(x, weight.t(), bias)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(x, g)
        gradient = products.input_gradient(g, weight.t().to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return None, gradient, None, None


class Conv1DRule(Rule):
    """``transformers.pytorch_utils.Conv1D``: a linear layer whose weight is (D, O)."""

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        x = one_tensor(module, args, kwargs, least=2)
        return _Product.apply(record, x, module.weight, module.bias)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        a, g = (torch.cat([_by_position(call[i]) for call in calls], 1) for i in (0, 1))
        terms: list[Term] = []
        if module.weight.requires_grad:
            terms.append(Outer(module.weight, None, g, a))  # (D, O): inputs and output gradients change places
        if module.bias.requires_grad:
            terms.append(PerRow(module.bias, g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))))
        return terms


def _computes_a_product(module: Any) -> bool:
    with torch.no_grad():
        x = probe(2, module.weight.shape[0], module.weight)
        return _close(plain_forward(module)(x), torch.addmm(module.bias, x, module.weight), module.weight.dtype)


def _by_position(x: Tensor) -> Tensor:
    """(R, ..., D) -> (R, T, D)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


# ----------------------------------------------------------------------------------- embeddings with a forward of their own


class _Intercept(TorchFunctionMode):
    """Inside a module's forward, hands every torch function that gets one of some tensors to ``replace``."""

    def __init__(self, watched: dict[int, Any], replace: Callable[..., Any]) -> None:
        super().__init__()
        self.watched, self.replace = watched, replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(id(x) in self.watched for x in (*args, *kwargs.values())):
            return self.replace(func, args, kwargs)
        return func(*args, **kwargs)


def _refuse_use(module: nn.Module, func: Any) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"{type(module).__name__} · uses its parameter in {getattr(func, '__name__', func)}, in a way that is not known",
        next="Freeze this parameter with requires_grad_(False), or leave the option out that asks for this.",
    )


def _harmless(result: Any) -> bool:
    """Whether no gradient can come back through it: a shape, a type, a tensor that asks for none."""
    tensors = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
    return not any(x.requires_grad for x in tensors)


class EmbeddingSubclassRule(EmbeddingRule):
    """A subclass of nn.Embedding that looks up other words than it was given, or changes what it found.

    (Positions of OPT, BART and Whisper, scaled words of Gemma.)
    """

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Any:
        padding = -1 if module.padding_idx is None else module.padding_idx
        rows = record.rows
        positions = _package(module) == "transformers" and type(module).__name__.endswith("PositionalEmbedding")

        def replace(func: Any, args: Any, kwargs: Any) -> Any:
            if func is torch.nn.functional.embedding and (len(args) < 2 or args[1] is module.weight):
                words = args[0] if args else kwargs["input"]
                if rows is not None and words.dim() > 1 and words.shape[0] == 1:
                    words = words.expand(rows, *words.shape[1:])
                return _Embedding.apply(record, words, module.weight, padding)
            if getattr(func, "__name__", "") == "__getitem__" and positions and rows is not None:
                words = torch.arange(len(module.weight), device=module.weight.device)[args[1]]
                words = words.expand(rows, *words.shape[-1:])
                return _Embedding.apply(record, words, module.weight, padding)  # with rows, where they were left out
            result = func(*args, **kwargs)
            if not _harmless(result):
                raise _refuse_use(module, func)
            return result

        with _Intercept({id(module.weight): module.weight}, replace):
            return plain_forward(module)(*args, **kwargs)


# ------------------------------------------------------------------------------------- parameters that no layer holds


class BareParameters(Rule):
    """Parameters that a module adds to, multiplies with, or puts beside what its layers gave, rows first.

    The module runs as it is, but for the parameter there are copies, one per row, where it meets the rows: in a sum or
    a product with a tensor of R rows, in ``expand``, or with None as its first index. The layers below keep their rules.
    """

    piecewise = True

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), None)
        rows = record.rows if record.rows is not None or given is None else given.shape[0]
        if rows is None:
            raise UnsupportedLayer(
                f"{type(module).__name__} · is called without a tensor, so its rows are unknown",
                next="Give the module the batch's rows as its first tensor.",
            )
        copies = {id(p): Copies.apply(record, i, rows, p) for i, p in enumerate(self.treats(module))}
        watched: dict[int, Any] = {id(p): p for p in self.treats(module)}

        def replace(func: Any, args: Any, kwargs: Any) -> Any:
            of = [i for i, x in enumerate(args) if id(x) in watched]
            name = getattr(func, "__name__", "")
            if len(of) == 1 and not any(id(x) in watched for x in kwargs.values()):
                p, rest = args[of[0]], args[: of[0]] + args[of[0] + 1 :]
                own = copies[id(p)]
                if name == "to":
                    cast = func(*args, **kwargs)
                    if cast is not p:
                        watched[id(cast)], copies[id(cast)] = cast, func(own, *rest, **kwargs)
                    return cast
                shaped = _meeting_rows(name, p, own, rest, rows)
                if shaped is not None:
                    if name in ("__getitem__", "unsqueeze"):
                        return shaped
                    return func(*args[: of[0]], shaped, *args[of[0] + 1 :], **kwargs)
            result = func(*args, **kwargs)
            if not _harmless(result):
                raise _refuse_use(module, func)
            return result

        with _Intercept(watched, replace):
            return plain_forward(module)(*args, **kwargs)

    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]:
        return terms_of_copies(self.treats(module), calls)


_ELEMENTWISE = {"add", "sub", "mul", "div", "true_divide", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__"}
_ELEMENTWISE |= {"__rmul__", "__truediv__", "__rtruediv__", "rsub", "multiply", "subtract", "divide"}


def _meeting_rows(name: str, p: Tensor, copies: Tensor, rest: tuple[Any, ...], rows: int) -> Tensor | None:
    """The copies (R, ...) in the shape that the function must get instead of the parameter; None: not known."""
    if name in _ELEMENTWISE and len(rest) == 1 and isinstance(rest[0], Tensor):
        x = rest[0]
        if x.dim() == 0 or x.shape[0] != rows or torch.broadcast_shapes(x.shape, p.shape)[0] != rows:
            return None
        return _behind_rows(p, copies, x.dim())
    if name == "expand":
        size = tuple(rest[0]) if len(rest) == 1 and not isinstance(rest[0], int) else rest
        return _behind_rows(p, copies, len(size)) if size[0] == rows else None
    if name == "unsqueeze":
        return copies if rest == (0,) else None
    if name == "__getitem__":
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        if index and all(i is None for i in index):
            return copies.view(rows, *[1] * (len(index) - 1), *p.shape)
    return None


def _behind_rows(p: Tensor, copies: Tensor, dimensions: int) -> Tensor | None:
    if p.dim() == dimensions:
        return copies.squeeze(1) if p.shape[0] == 1 else None
    return copies.view(copies.shape[0], *[1] * (dimensions - 1 - p.dim()), *p.shape) if p.dim() < dimensions else None


_TOKENS = {"cls_token", "class_embedding", "distillation_token", "mask_token", "position_embeddings", "register_tokens"}


def _bare_names(module: nn.Module) -> set[str]:
    if _package(module) == "transformers" and type(module).__name__.endswith("Embeddings"):
        return _TOKENS
    return {"scale_shift_table"} if _package(module) == "diffusers" else set()


# --------------------------------------------------------------------------- a method whose result all rows share


class RowwiseMethod(Rule):
    """A module whose method computes, from a part's parameters alone, something (1, ...) that all rows share.

    It is computed for every row from the row's own copy: (R, ...). What else the module holds keeps its rules.
    (The position bias of T5: the embedding is looked up by (query, key), where no row is seen.)
    """

    piecewise = True

    def __init__(self, method: str, part: str) -> None:
        self.method, self.part = method, part

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return trainable(getattr(module, self.part))

    def covers(self, module: nn.Module) -> list[nn.Module]:
        return [getattr(module, self.part)]

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), None)
        rows = record.rows if record.rows is not None or given is None else given.shape[0]
        if rows is None:
            raise UnsupportedLayer(
                f"{type(module).__name__} · is called without a tensor, so its rows are unknown",
                next="Give the module the batch's rows as its first tensor.",
            )
        part, parameters = getattr(module, self.part), self.treats(module)
        method = getattr(type(module), self.method).__get__(module)

        def of_all_rows(*a: Any, **k: Any) -> Tensor:
            copies: list[Any] = [Copies.apply(record, i, rows, p) for i, p in enumerate(parameters)]

            def of_one_row(own: list[Tensor]) -> Tensor:
                with _swapped(part, parameters, own):
                    return self.call(module, method, *a, **k).squeeze(0)

            return torch.func.vmap(of_one_row, randomness="different")(copies)

        vars(module)[self.method] = of_all_rows
        try:
            return plain_forward(module)(*args, **kwargs)
        finally:
            del vars(module)[self.method]

    def call(self, module: nn.Module, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The method for one row: (1, ...)."""
        return method(*args, **kwargs)

    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]:
        return terms_of_copies(self.treats(module), calls)


def _has_position_bias(module: nn.Module) -> bool:
    table = module._modules.get("relative_attention_bias")
    return isinstance(table, nn.Embedding) and bool(trainable(table)) and hasattr(type(module), "compute_bias")


# --------------------------------------------------------------------------------------------------- special cases


class Aliases(Rule):
    """A module that only keeps another name for parameters of a layer below it (the head of BERT and its bias).

    Should its forward use one all the same, the gradient would not come through the records, and the engine refuses.
    """

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return []

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any:
        return plain_forward(module)(*args, **kwargs)

    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]:
        return []


def _are_aliases(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    below = {id(p) for child in module.children() for p in child.parameters()}
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and all(id(p) in below and name not in code.co_names for name, p in own.items())


class Coupled(Aliases):
    """A model that compares every text of the batch with every image of it (CLIP, SigLIP, CLAP)."""

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return Rule.treats(self, module)

    def problem(self, module: nn.Module) -> str | None:
        names = ", ".join(name for name, p in module._parameters.items() if p is not None and p.requires_grad)
        return (
            f"{names} belongs to a loss that compares every pair of the batch, so units influence each other: freeze it "
            "with requires_grad_(False), and make a loss of each pair of embeddings alone"
        )


_CONV1D = Conv1DRule()
_EMBEDDING = EmbeddingSubclassRule()
_WHOLE = RowByRow(whole=True)


def _folds_rows(module: nn.Module) -> bool:
    """Whether layers inside see the tokens of all rows in one list: mixtures of experts, and the layers of OPT."""
    names = set(module._modules)
    experts = "experts" in names and bool(names & {"gate", "router"})
    return _package(module) == "transformers" and (experts or type(module).__name__ == "OPTDecoderLayer")


# ---------------------------------------------------------------------------------------------------------- helpers


def terms_of_copies(parameters: list[nn.Parameter], calls: list[Call]) -> list[Term]:
    """From what the backward pass of copies recorded: (index of the parameter, gradient of every row's copy)."""
    terms: list[Term] = []
    for i, parameter in enumerate(parameters):
        gradients = [g for index, g in calls if int(index) == i]
        if gradients:
            terms.append(PerRow(parameter, sum_of(gradients)))
    return terms


def _close(a: Tensor, b: Tensor, kind: torch.dtype) -> bool:
    tolerance = 2e-2 if kind in (torch.float16, torch.bfloat16) else 1e-5
    return a.shape == b.shape and float((a - b).norm()) <= tolerance * float(b.norm())
