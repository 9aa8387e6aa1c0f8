"""One stage of a run that begins at public weights: the model trained on public records, before anything private is learnt. [shell]

Claim: nothing here reads a private record, so it costs no privacy; the private steps' guarantee holds for whatever weights they
begin at. What is claimed of the public records, that none of them is one of the protected, is the word of whoever wrote the
recipe; their source, how many they are and their sha256 are said with the claim.

What the quality is measured on stays unseen: of the public records those are left out that are named as a measured concept, or copy a
measured record (``data.held_out``).

Kept in RUN/public, resumable at each boundary (``starting``).
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato import building
from sfumato.data.settings import DataSettings
from sfumato.errors import DataError, UsageError
from sfumato.recipe import Recipe
from sfumato.release.boundary import PUBLIC_START
from sfumato.starting import Start, steps_have_begun
from sfumato.training.folder import RunFolder
from sfumato.training.public_start import PublicStart
from sfumato.training.settings import TrainingSettings

FOLDER = "public"
CARD = f"{FOLDER}/card.json"


def refuse(recipe: Recipe) -> None:
    """Raises UsageError where the public records lie where the private ones do, before anything is read."""
    if recipe.public_start is None:
        return
    ours, theirs = _place(recipe.data), _place(recipe.public_start.data)
    if ours is None or theirs is None:
        return
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise UsageError(
            f"public_start.data = {theirs} · holds, or is part of, the records that are to be protected",
            next="Begin with records that are nobody's among these, or leave public_start out.",
        )


def begin(run: RunFolder, recipe: Recipe, prepared: Any, model: Any, progress: Callable[[str], None]) -> str:
    """Trains ``model``, all of it, on the public records; or takes the weights that an attempt before this one made.

    Guarantee: the model's weights, and everything in RUN/public, depend on the public records alone (and on the public units that
    are measured: none of their concepts is among them).

    Returns: how it stopped, "steps" or "interrupted". Raises: DataError where the public records are others than before.
    """
    asked, start = _settings(recipe), _start(run)
    if steps_have_begun(run):
        return "steps"
    if start.there:
        start.load(model)
        return "steps"
    progress(f"public start: reading {asked.data.source}")
    records, card = _records(asked, recipe, prepared)
    before = run.read_json(CARD) if (run.path / CARD).is_file() else card
    if before != card:
        raise DataError(
            f"public_start.data = others than {run.path} began with · their sha256 was {before.get('sha256')}, and is {card['sha256']}",
            next="Restore them, or start a new run without --resume.",
        )
    run.write_json(CARD, card)
    progress(f"public start: {card['records']:,} records of {card['name']}; {_left_out(card)}")
    with model.whole():
        if not start.train(
            "training", model, building.encode(model, recipe, records), _steps(asked, recipe), recipe, progress
        ):
            return "interrupted"
    start.save(model)
    progress("public start: done; the private steps begin at its weights")
    return "steps"


def load(run: RunFolder, model: Any) -> None:
    """The weights that the private steps begin at."""
    _start(run).load(model)


def alone(run: RunFolder, recipe: Recipe) -> Any:
    """The model as the public records made it: what the private steps must be better than."""
    model = building.build(recipe)
    load(run, model)
    return model.eval()


def boundary(run: RunFolder, recipe: Recipe, model: Any) -> list[str]:
    """Sentences for the claim."""
    asked, card = _settings(recipe), run.read_json(CARD)
    held = sum(parameter.numel() for parameter in model.held)
    inside = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sentences = [
        f"{PUBLIC_START}{card['name']} ({card['origin']}): {card['records']:,} records, sha256 {card['sha256']}, {asked.steps:,} steps, "
        "before any private record was trained on. Whoever wrote the recipe says that none of the protected is among these "
        "records; if one is, the guarantee says nothing of what is learnt from them there.",
        f"What measures the quality was kept from that training too, as far as names and copies tell; {_left_out(card)}.",
    ]
    if held:
        sentences.append(
            f"The private steps trained {inside:,} of {inside + held:,} numbers ({', '.join(asked.trained)}); the others are frozen, "
            "as the public records made them."
        )
    return sentences


def _place(data: DataSettings) -> Path | None:
    """Where records lie, or would after they were fetched; generated ones lie nowhere."""
    from sfumato.data.fetch import EXAMPLES, cache_home

    if data.path is not None:
        return Path(data.path).resolve()
    if data.source not in EXAMPLES:
        return None
    return (cache_home() / "data" / f"{data.source}-{EXAMPLES[data.source].version}").resolve()


def _left_out(card: dict[str, Any]) -> str:
    return f"left out: {', '.join(f'{count:,} {reason}' for reason, count in card['left_out'].items())}"


def _records(asked: PublicStart, recipe: Recipe, prepared: Any) -> tuple[Any, dict[str, Any]]:
    """Those that are trained on, and what is said of them."""
    from sfumato.data import held_out, mapped, prepare

    public = prepare.load(asked.data, unit="record", need=recipe.data.needed, private=False)
    stay, left_out = held_out.without_measured(public.private, prepared.public)
    if not len(stay):
        raise DataError(
            "public_start: records = 0 · all are of concepts that the quality is measured on",
            next="Name other public records, or set fewer public units aside.",
        )
    records = mapped.select(public.private, stay)
    return records, {
        "name": public.card["name"],
        "origin": public.card["origin"],
        "license": public.card["license"],
        "records": len(records),
        "sha256": _sha256(records),
        "left_out": left_out,
    }


def _sha256(records: Any) -> str:
    """Of the contents as they are trained on, in order."""
    from sfumato.data.checking import content_digest

    digest = hashlib.sha256()
    for record in records:
        digest.update(content_digest(record))
    return digest.hexdigest()


def _steps(asked: PublicStart, recipe: Recipe) -> TrainingSettings:
    return replace(
        recipe.training,
        steps=asked.steps,
        expected_batch_size=asked.records_at_once,
        learning_rate=asked.learning_rate,
        ema_decay=asked.ema_decay,
        optimizer="adamw",
        schedule="cosine",
        weight_decay=0.0,
    )


def _start(run: RunFolder) -> Start:
    return Start(run, FOLDER, "public start", unspent="public")


def _settings(recipe: Recipe) -> PublicStart:
    assert recipe.public_start is not None  # or it is not asked
    return recipe.public_start
