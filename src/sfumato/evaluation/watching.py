"""Quality while a model trains, on public records: its loss, and where asked the facts that it makes. [shell]

``quality.jsonl`` in the run's folder: one object a look. The records are public and the weights are a release, so of a private
training all of it is post-processing. So is ``checkpoints/best``: the averaged weights with the lowest public loss so far.
Only the half of the public records that ``report`` learns from is looked at: what chooses is not what is measured with.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.errors import OutsideError
from sfumato.evaluation import agreement, readers, report
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models import model as models
from sfumato.models.generative import Generative
from sfumato.records import Record
from sfumato.training import state

FILE = "quality.jsonl"
BEST = "best"
RECORDS = 400  # public records whose loss is watched
ASKED = 150  # records that are asked for where facts are watched
DRAWS = 4  # of chance inside a record's loss, the same at every look
SURE = 4.0  # standard errors that a rise must have: by chance in one look of 30,000
WORTH = 0.01  # and the share of the lowest loss that it must be


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What is asked of the first direction that has facts, and who reads the answers."""

    direction: Any
    reader: readers.Reader
    records: list[Record]
    asked: readers.Facts


class QualityWatch:
    """A watcher of the loop, which calls ``picture`` with the averaged weights in the model.

    Args:
      folder: of the run.
      model: to encode the public records with.
      names: of the known facts.
      say: gets a line where quality falls.
      private: of the training: what a rise may mean, and what covers the lines.
      of_sites: the noise is on updates of whole sites, not in the steps.
    """

    def __init__(
        self,
        folder: Path,
        model: Generative,
        public: Sequence[Record],
        names: Sequence[str],
        settings: EvaluationSettings,
        say: Callable[[str], None],
        *,
        private: bool,
        of_sites: bool = False,
        seed: int = 0,
    ) -> None:
        self._file, self._checkpoints = folder / FILE, folder / "checkpoints"
        self._say, self._private, self._of_sites, self._seed = say, private, of_sites, seed
        learnt, _ = report.halves(public, seed)
        self._table = model.encode(learnt[:RECORDS]) if learnt else None
        self._best: np.ndarray | None = None  # the losses of the best weights, one a record
        self._risen = self._fallen = False
        self._highest: tuple[float, float] | None = None  # the best agreement so far, and the low end of its interval
        self._facts = _watched_facts(model, learnt, names, settings, seed) if settings.watch_seconds else None
        if self._table is not None and (self._checkpoints / BEST).exists():  # of an attempt before this one
            self._best = self._losses(models.load(self._checkpoints / BEST))

    def figures(self, values: Mapping[str, Any]) -> None:
        """Those are of private records; nothing here is."""

    def picture(self, step: int, model: Generative) -> bool:
        """Looks, writes a line, keeps the weights if they are the best, and says where quality falls. Returns: whether they are."""
        if self._table is None:
            return False
        losses = self._losses(model)
        loss = float(losses.mean())
        line: dict[str, Any] = {
            "step": step,
            "public_loss": loss if math.isfinite(loss) else None,
            "standard_error": _standard_error(losses) if math.isfinite(loss) else None,
            "records": len(losses),
        }
        if self._facts is not None:
            line |= self._agreement(model, step)
        best = math.isfinite(loss) and (self._best is None or loss < float(self._best.mean()))
        if best:
            self._keep(step, model)
            self._best, self._risen = losses, False
        else:
            line["note"] = self._rise(step, losses)
        line |= {"best": best, "covered_by": "post-processing" if self._private else "internal"}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: v for k, v in line.items() if v != ""}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutsideError(
                f"quality = {self._file} · could not be written ({error})", next="Free some disk space, then --resume."
            ) from None
        return best

    def _losses(self, model: Generative) -> np.ndarray:
        """(R,), the same draws of chance at every look; torch's own chance is as it was."""
        assert self._table is not None
        batch = self._table.batch(range(self._table.num_units), records_per_unit=self._table.num_records)
        training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            losses = model.row_losses(batch, DRAWS, torch.Generator().manual_seed(self._seed))
        model.train(training)
        return losses.double().cpu().numpy()

    def _rise(self, step: int, losses: np.ndarray) -> str:
        """What to change where the loss is surely above its best; "" where it is not, or was said before."""
        loss = float(losses.mean())
        if not math.isfinite(loss):
            said = f"the public loss is no number at step {step}: lower training.learning_rate."
        else:
            assert self._best is not None
            lowest, gap = float(self._best.mean()), losses - self._best
            if gap.mean() <= SURE * _standard_error(gap) or gap.mean() <= WORTH * abs(lowest):
                return ""
            said = f"the public loss rose from {lowest:.4g} to {loss:.4g} at step {step}. {self._advice()}"
        if self._risen:
            return ""
        self._risen = True
        self._say(f"quality: {said}")
        return said

    def _advice(self) -> str:
        kept = "The weights before it are in checkpoints/best."
        if self._of_sites:
            return (
                "Noise on the updates of whole sites now moves the weights more than what the sites say: more sites, fewer rounds, or "
                f"protect records (federation.mechanism: {{kind: record_level}}). {kept}"
            )
        if self._private:
            return (
                "Noise now moves the weights more than what they learn: lower training.learning_rate, raise training.ema_decay "
                f"or training.expected_batch_size, or take fewer steps, which leaves less noise in each. {kept}"
            )
        return f"Without privacy that is learning by heart: fewer steps, a smaller model, more training.weight_decay. {kept}"

    def _agreement(self, model: Generative, step: int) -> dict[str, Any]:
        """The facts asked against those read off what the model makes now, and a line where they fall."""
        facts = self._facts
        assert facts is not None
        prompts = [report.told(record, facts.direction.given) for record in facts.records]
        made = model.sample(prompts, facts.direction.wanted, seed=self._seed)
        value, low, high = agreement.mean_kappa(facts.asked, facts.reader.read(made), resamples=100, seed=self._seed)
        if self._highest is None or value > self._highest[0]:
            self._highest, self._fallen = (value, low), False
        elif high < self._highest[1] and not self._fallen:
            self._fallen = True
            self._say(
                f"quality: what is made agrees less with what was asked, kappa {value:.2f} at step {step} after "
                f"{self._highest[0]:.2f}. Lower training.learning_rate, or raise training.ema_decay."
            )
        return {"direction": str(facts.direction), "kappa_mean": value, "kappa_low": low, "kappa_high": high}

    def _keep(self, step: int, model: Generative) -> None:
        """The weights as ``checkpoints/best-NNNNNN``, the link ``best`` to it, and none of the older ones."""
        kept = self._checkpoints / f"{BEST}-{step:06d}"
        model.save(kept)
        try:
            state.point_at(self._checkpoints / BEST, kept.name)
        except OSError as error:
            raise OutsideError(
                f"checkpoint = {kept} · could not be linked ({error})", next="Free some disk space, then --resume."
            ) from None
        for old in self._checkpoints.glob(f"{BEST}-*"):
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)


def history(folder: Path) -> list[dict[str, Any]]:
    """The looks of a run so far, by step; a torn last line is left out."""
    if not (folder / FILE).is_file():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def note(looks: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for the report where the last weights are not the best ones by the public loss."""
    known = [look for look in looks if look.get("public_loss") is not None]
    if not known or not any(look.get("note") for look in looks):
        return ""
    lowest, last = min(known, key=lambda look: look["public_loss"]), looks[-1]
    end = "is no number" if last.get("public_loss") is None else f"was {last['public_loss']:.4g}"
    return (
        f"While training, the loss on public records was lowest at step {lowest['step']} ({lowest['public_loss']:.4g}) and {end} "
        f"at step {last['step']}: {next(look['note'] for look in reversed(looks) if look.get('note'))}"
    )


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _watched_facts(
    model: Generative, learnt: Sequence[Record], names: Sequence[str], settings: EvaluationSettings, seed: int
) -> _Facts | None:
    """A reader made from half of ``learnt``, and the other half to ask with; None where no direction has facts."""
    taught, asked = report.halves(learnt, seed + 1)
    for direction in report.chosen(model.directions, settings.directions):
        wanted = direction.wanted[0]
        needed = (*direction.given, *direction.wanted)
        ours = [record for record in taught if report.has(record, wanted)]
        told = [record for record in asked if all(report.has(record, name) for name in needed)][:ASKED]
        own = readers.audible(ours)
        common = readers.told_by(direction.given, names, own) & set(readers.shown(wanted, names, own))
        if not readers.known(ours, sorted(common)) or len(told) < report.FEWEST:
            continue
        short = EvaluationSettings(judge_seconds=settings.watch_seconds)
        reader = readers.make(wanted, ours, tuple(names), short, seed=seed)
        facts = readers.known(told, [fact for fact in reader.facts if fact in common])
        if facts:
            return _Facts(direction=direction, reader=reader, records=told, asked=facts)
    return None
