"""One loss for every row of a batch, for models of ``transformers``: each row's own mean, of nothing but that row.

The ``loss`` that these models return is a mean over all tokens of the batch, whose divisor counts every row's tokens. Here
the divisor of a row is its own number of labels. Shapes: R rows, T positions, V classes.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import UsageError

IGNORED = -100  # a label that nothing is predicted for
_SHIFTED = ("ForCausalLM", "LMHead", "ForConditionalGeneration")  # position t predicts label t + 1
_ALIGNED = ("ForMaskedLM", "ForTokenClassification")
_OF_A_ROW = (
    "ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification",
)  # fmt: skip


def row_losses(model: nn.Module, inputs: Mapping[str, Any], *, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
    """Runs ``model`` and takes each row's loss from its logits: (R,) losses, and what the model returned.

    A causal model, one that writes about images or sounds, one that reads a sequence and writes another, a masked one, and
    one that labels tokens: the mean over the row's own labels that are not -100, 0 where it has none. A classifier: cross-entropy,
    binary cross-entropy or squared error, as the model's own loss chooses. Answers in a text: the mean over start and end.

    Raises: UsageError for a model or inputs of another kind.
    """
    base = unwrapped(model)
    inputs = dict(inputs)
    _refuse_coupled(base)
    if "start_positions" in inputs and "end_positions" in inputs:
        ends = [inputs.pop("start_positions"), inputs.pop("end_positions")]
        outputs = model(**inputs)
        pairs = zip((outputs.start_logits, outputs.end_logits), ends, strict=True)
        return torch.stack([_position_losses(logits, place) for logits, place in pairs]).mean(0), outputs
    labels = inputs.pop("labels", None)
    if not isinstance(labels, Tensor):
        raise UsageError(
            f"inputs = {sorted(inputs)} · must hold labels, a tensor, one row for each example",
            next="Let the data collator make them (DataCollatorForLanguageModeling(mlm=False) for a causal model), or override "
            "compute_losses.",
        )
    kind = kind_of(base)
    if kind == "sequence to sequence" and "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(base, labels)
    outputs = model(**inputs)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    match kind:
        case "causal":
            labels = _as_long_as(logits, labels, model)
            return token_means(logits[:, :-1], labels[:, 1:], label_smoothing), outputs
        case "sequence to sequence" | "tokens":
            return token_means(logits, labels, label_smoothing), outputs
        case _:
            return _class_losses(base, logits, labels, label_smoothing), outputs


def token_means(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(R, T, V), (R, T) -> (R,): each row's mean cross-entropy over its own labels that are not -100; 0 without any."""
    if logits.shape[:-1] != labels.shape:
        raise UsageError(
            f"labels.shape = {tuple(labels.shape)} · must be that of the logits, {tuple(logits.shape[:-1])}",
            next="Give one label for each position, -100 where nothing is predicted, or override compute_losses.",
        )
    losses = functional.cross_entropy(
        _wide(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def kind_of(base: nn.Module) -> str:
    """causal, sequence to sequence, tokens or classes, by the name that ``transformers`` gives the class."""
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and any(x in name for x in _SHIFTED):
        return "sequence to sequence"
    for kind, names in (("causal", _SHIFTED), ("tokens", _ALIGNED), ("classes", _OF_A_ROW)):
        if any(x in name for x in names):
            return kind
    raise UsageError(
        f"model = {name} · is none that a loss of one row is known for",
        next="Override compute_losses(model, inputs) so that it returns one loss for each row, from that row alone.",
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model below an adapter of ``peft``."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model  # pyright: ignore[reportReturnType]


def accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(unwrapped(model).forward).parameters


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _refuse_coupled(base: nn.Module) -> None:
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        raise UsageError(
            "output_router_logits = True · asks for a loss that balances the experts over all tokens of the batch, which couples "
            "the examples",
            next="Set model.config.output_router_logits = False.",
        )


def _decoder_inputs(base: nn.Module, labels: Tensor) -> Tensor:
    shift: Any = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise UsageError(
            f"inputs · must hold decoder_input_ids: {type(base).__name__} does not make them from labels",
            next="Use DataCollatorForSeq2Seq(tokenizer, model=model), or add them in your collator.",
        )
    return shift(labels=labels)


def _as_long_as(logits: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
    """Prompt tuning puts positions before the text, which nothing is predicted for."""
    more = logits.shape[1] - labels.shape[1] if labels.dim() == 2 else 0
    tuned = getattr(model, "active_peft_config", None)
    if more <= 0 or not getattr(tuned, "is_prompt_learning", False):
        return labels
    return functional.pad(labels, (more, 0), value=IGNORED)


def _class_losses(base: nn.Module, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(R, V) logits -> (R,), as ``transformers.loss.loss_utils.ForSequenceClassificationLoss`` chooses the problem."""
    config: Any = base.config
    problem = getattr(config, "problem_type", None)
    if problem is None:
        whole = not labels.dtype.is_floating_point
        problem = "regression" if config.num_labels == 1 else "single" if whole else "multi_label_classification"
    if problem == "regression":
        return (
            (_wide(logits).reshape(len(logits), -1) - labels.to(_wide(logits).dtype).reshape(len(logits), -1))
            .square()
            .mean(1)
        )
    if problem == "multi_label_classification":
        if smoothing:
            raise UsageError(
                f"label_smoothing_factor = {smoothing} · has no meaning for several labels at once", next="Set it to 0."
            )
        return functional.binary_cross_entropy_with_logits(
            _wide(logits), labels.to(_wide(logits).dtype), reduction="none"
        ).mean(1)
    return functional.cross_entropy(_wide(logits), labels.view(-1), reduction="none", label_smoothing=smoothing)


def _position_losses(logits: Tensor, places: Tensor) -> Tensor:
    """(R, T), (R,) -> (R,): a place beyond the text counts nothing."""
    places = places.view(-1).clamp(0, logits.shape[1])
    padded = functional.cross_entropy(_wide(logits), places, ignore_index=logits.shape[1], reduction="none")
    return padded
