"""What ``PrivateTrainer`` looks at before it trains: units, checkpoints, callbacks, collators, and whether rows are alone."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import LedgerError, UnsupportedLayer, UsageError
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.settings import PrivacySettings
from sfumato.privacy.watch import left_alone
from sfumato.records import UnitTable
from sfumato.training.arguments import PUBLIC_EVALUATION

_log = logging.getLogger(__name__)
LOOKED_AT = 32  # rows, of which the shortest and the longest are compared
TOLERANCE = 1e-3  # of a gradient in float32: padding changes the order of sums, and no more
ROUGH_TOLERANCE = 0.05  # in sixteen bits


def units_of(dataset: Any, unit: str | None) -> UnitTable:
    """The row numbers of ``dataset``, by unit: each row by itself, or all that have one value in the column ``unit``."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UsageError(
            f"train_dataset = {type(dataset).__name__} · must have a length and an index, so that units can be drawn",
            next="Give a map-style dataset.",
        )
    count = len(dataset)
    names = [f"{i:012d}" for i in range(count)] if unit is None else _names(dataset, unit, count)
    return UnitTable({"row": torch.arange(count)}, names)


def _names(dataset: Any, unit: str, count: int) -> list[str]:
    columns = getattr(dataset, "column_names", None)
    try:
        found = list(dataset[unit]) if columns is not None else [dataset[i][unit] for i in range(count)]
    except (KeyError, TypeError, IndexError):
        raise UsageError(
            f"unit = {unit!r} · is no column of train_dataset" + (f", which has {columns}" if columns else ""),
            next="Name the column that says whose a row is, or leave unit out: then every row is a unit.",
        ) from None
    empty = [i for i, name in enumerate(found) if name is None or not str(name).strip()]
    if empty:
        raise UsageError(
            f"unit = {unit!r} · is empty in {len(empty)} rows, the first of them row {empty[0]}",
            next="Fill the column: nobody's rows would be one person's.",
        )
    return [str(name) for name in found]


def check_unit(privacy: PrivacySettings | DpSgd, column: str | None) -> None:
    if not isinstance(privacy, PrivacySettings | DpSgd):
        raise UsageError(
            f"privacy = {type(privacy).__name__} · must be PrivacySettings or a DpSgd plan",
            next="Give privacy=PrivacySettings(epsilon=8.0), for example.",
        )
    if (privacy.unit == "record") != (column is None):
        raise UsageError(
            f"unit = {column!r}, privacy.unit = {privacy.unit} · a column is for persons, and persons need a column",
            next="Give PrivacySettings(unit='person', records_per_unit=...) and unit='the column', or neither.",
        )


def one_account(given: Any, of_settings: Any) -> Any:
    if given is not None and of_settings is not None and Path(given) != Path(of_settings):
        raise UsageError(f"account = {given} · privacy.account says {of_settings}", next="Say it in one place.")
    return given if given is not None else of_settings


def checkpoint_of(asked: Any, folder: str) -> str | None:
    """What ``resume_from_checkpoint`` means: a path, the last one of the folder (True), or none."""
    if asked is None or asked is False:
        return None
    if asked is not True:
        return str(asked)
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is None:
        raise UsageError(f"output_dir = {folder} · has no checkpoint to resume from", next="Begin a new run.")
    return last


def state_of(checkpoint: str, name: str) -> tuple[dict[str, Any], int]:
    """What a checkpoint says of its spending, and how many steps its weights have taken."""
    try:
        state = json.loads((Path(checkpoint) / name).read_text(encoding="utf-8"))
        taken = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        return {"engine": state["engine"]}, int(taken)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"checkpoint = {checkpoint} · does not say what was spent for it ({type(error).__name__})",
            next=f"Resume from a checkpoint that has {name} and trainer_state.json, or begin a new run from these weights and "
            "say where they come from.",
            code="checkpoint_without_privacy",
        ) from None


def refuse_overridden(kind: type, ours: type) -> None:
    """A subclass that changes what is drawn or differentiated would be ignored, or would be unprotected."""
    instead = {
        "compute_loss": "Override compute_losses(model, inputs), which returns one loss for each row.",
        "training_step": "Override compute_losses(model, inputs); the step itself is the mechanism.",
        "get_train_dataloader": "Give train_dataset and data_collator; who is drawn is the mechanism.",
        "_get_train_sampler": "Give train_dataset and data_collator; who is drawn is the mechanism.",
    }
    for name, step in instead.items():
        definer = next((c for c in kind.__mro__ if name in vars(c)), ours)
        if definer is not ours and issubclass(definer, ours):
            raise UsageError(f"{definer.__name__}.{name} · would not be called by a private training", next=step)


def refuse_collator(collator: Any) -> None:
    for kind in type(collator).__mro__:
        if kind.__name__ == "DataCollatorWithFlattening" or getattr(collator, "padding_free", False):
            raise UsageError(
                f"data_collator = {type(collator).__name__} · puts several units into one row, whose gradients cannot be told apart",
                next="Use a collator that pads: DataCollatorForLanguageModeling(mlm=False), DataCollatorForSeq2Seq.",
            )


def seeded_collator(collator: Any) -> list[dict[str, str]]:
    """Chance of a collator's own is not the engine's (``privacy.chance``): one row more shifts that of all rows after it."""
    while isinstance(collator, functools.partial):
        collator = collator.func
    collator = getattr(collator, "__self__", collator)  # of a method
    return [
        {
            "code": "seeded",
            "message": f"data_collator.{name} = {value if isinstance(value, int) else type(value).__name__} · "
            f"{type(collator).__name__} would draw chance that somebody knows, which tells the rows of a batch apart",
            "next": f"Leave {name} out: the collator then draws from torch's own generator, which the engine fills with secret "
            "chance.",
        }
        for name in ("seed", "generator")
        for value in [getattr(collator, name, None)]
        if value is not None
    ]


def without_column(collate: Callable[[list[Any]], Any], column: str | None) -> Callable[[list[Any]], Any]:
    if column is None:
        return collate
    return lambda rows: collate([{k: v for k, v in row.items() if k != column} for row in rows])


def choosing_callbacks(callbacks: Sequence[Any]) -> list[dict[str, str]]:
    return [
        {
            "code": "training_argument",
            "message": f"callbacks = {type(callback).__name__} · stops by the evaluation data, uncharged",
            "next": PUBLIC_EVALUATION,
        }
        for callback in callbacks
        if any(kind.__name__ == "EarlyStoppingCallback" for kind in type(callback).__mro__)
    ]


def same_data(train: Any, evaluation: Any) -> list[dict[str, str]]:
    held = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    if not any(data is train for data in held):
        return []
    return [
        {
            "code": "training_argument",
            "message": "eval_dataset = train_dataset · is what the guarantee protects, so it is not public",
            "next": "Evaluate on other data, or leave out evaluation_is_public.",
        }
    ]


def one_loss_per_row(losses: Any, rows: int, whose: str) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == (rows,):
        return losses
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    raise UsageError(
        f"{whose}: shape = {shape} · must be ({rows},): one loss for each row, from that row alone",
        next="Take losses with reduction='none', and their mean over each row's own positions. A mean over the batch has no "
        "gradient of one unit.",
    )


def check_rows_alone(trainer: Any) -> None:
    """Raises UnsupportedLayer where a row's loss or gradient is another one in the company of a longer row.

    Padding that is not masked, positions counted from the padding on, a divisor of the whole batch: all of that shows
    here. Chance is repeated from torch's seed; where the collator draws some, nothing can be compared, and that is logged.
    """
    rows, collate, model = trainer._rows, trainer._collate, trainer.model_wrapped
    if len(rows) < 2 or not any(p.requires_grad for p in model.parameters()):
        return
    order = sorted(range(min(len(rows), LOOKED_AT)), key=lambda i: (_size(rows[i]), i))
    shortest, longest = rows[order[0]], rows[order[-1]]
    rough = trainer.args.bf16 or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    tolerance = ROUGH_TOLERANCE if rough else TOLERANCE
    training = model.training
    model.eval()  # no dropout: its masks have the shape of the batch
    try:
        with left_alone(model):
            alone = _observed(trainer, model, collate, [shortest], seed=0)
            if _differ(alone, _observed(trainer, model, collate, [shortest], seed=1), tolerance):
                _log.warning(
                    "the loss has chance in it, so whether one row's depends on another's could not be looked at"
                )
                return
            together = _observed(trainer, model, collate, [shortest, longest], seed=0)
    finally:
        model.train(training)
    if _differ(alone, together, tolerance):
        raise UnsupportedLayer(
            f"loss of one row = {alone[0]:.6g} alone, {together[0]:.6g} beside a longer row; its gradient moves by "
            f"{_distance(alone[1], together[1]):.2g} of its length · one unit's gradient depends on another unit's data",
            next="Pad on the right (tokenizer.padding_side = 'right') and mask it with -100 in the labels and an attention_mask, "
            "or give position_ids; and let compute_losses divide by the row's own number of labels.",
        )


def _observed(trainer: Any, model: nn.Module, collate: Any, rows: list[Any], seed: int) -> tuple[float, list[Tensor]]:
    """Loss of the first row, and its gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = trainer._prepare_inputs(collate(rows))
        losses = trainer._losses_of_rows(model, inputs, len(rows))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(losses[0], trained, allow_unused=True, materialize_grads=True)
    return float(losses[0].detach()), [g.detach().float() for g in gradients]


def _differ(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]], tolerance: float) -> bool:
    """NaN is the same as NaN: a unit whose numbers are not finite counts as zero."""
    distance = _distance(one[1], other[1])
    loss = abs(one[0] - other[0]) / max(abs(one[0]), 1e-6)
    return distance > tolerance or loss > tolerance


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    apart = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True)) ** 0.5
    length = sum(float(a.square().sum()) for a in one) ** 0.5
    return apart / max(length, 1e-12)


def _size(row: Any) -> int:
    if isinstance(row, dict):
        return sum(_size(value) for value in row.values())
    if isinstance(row, Tensor):
        return row.numel()
    return (
        sum(_size(x) for x in row)
        if isinstance(row, list | tuple) and row and isinstance(row[0], list)
        else _length(row)
    )


def _length(value: Any) -> int:
    size = getattr(value, "size", None)
    if isinstance(size, int):
        return size
    return len(value) if hasattr(value, "__len__") else 1
