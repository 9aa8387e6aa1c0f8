"""Who reads the facts off a record: one reader a modality, made from public records, used for every direction and the twin.

A fact is *shown* by a modality: what ``facts`` names by pictures (and by sounds, where they have no facts of their own), a
murmur and a wheeze by sounds, all of them by texts. A direction is asked for the facts that both sides show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sfumato.data import spectrogram
from sfumato.errors import UsageError
from sfumato.evaluation import audio, judge, text
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.records import Modality, Record

AUDIBLE = ("murmur", "wheeze")
HEART_RATE = "heart_rate"  # a number in the metadata, beats a minute
MOST_TEXTS = 3_000  # public texts that a reader learns from
MOST_LETTERS = 1_000  # public texts that the letter model learns from

Facts = dict[str, list[str | None]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Attributes:
    facts: that it reads; () where none is known.
    read: the facts' values, one a record.
    features: (N, D), what a Fréchet distance is measured on; None where the modality has none.
    rate: heart rates, (N,), NaN where none is said; None where the public records have no heart rates.
    name: of the network, with its sha256.
    how: a sentence for the report.
    stopped: the time box, not the number of passes, ended its training.
    """

    facts: tuple[str, ...] = ()
    read: Callable[[Sequence[Record]], dict[str, list[str]]] = lambda records: {}
    features: Callable[[Sequence[Record]], np.ndarray] | None = None
    rate: Callable[[Sequence[Record]], np.ndarray] | None = None
    name: str = ""
    how: str = ""
    stopped: bool = False


def value_of(record: Record, fact: str) -> str | None:
    """What is known of a record; truth values are "yes" and "no"."""
    value = record.metadata.get("facts", {}).get(fact)
    if value is None and fact in AUDIBLE:
        value = record.metadata.get(fact)
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return None if value is None else str(value)


def known(records: Sequence[Record], names: Sequence[str]) -> Facts:
    """The values of those facts that are known of at least one record."""
    found: Facts = {name: [value_of(record, name) for record in records] for name in names}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def rates_of(records: Sequence[Record]) -> np.ndarray:
    """Heart rates as they are known, (N,), NaN where they are not."""
    return np.array([float(record.metadata.get(HEART_RATE) or np.nan) for record in records])


def audible(records: Sequence[Record]) -> bool:
    """Whether the sounds have facts of their own."""
    return bool(known(records, AUDIBLE))


def shown(modality: Modality, names: Sequence[str], own: bool) -> tuple[str, ...]:
    """Which facts a modality shows. Args: names: of the source's facts; own: the sounds have facts of their own."""
    of_pictures = tuple(name for name in names if name not in (*AUDIBLE, HEART_RATE))
    match modality:
        case "image":
            return of_pictures
        case "audio":
            return AUDIBLE if own else of_pictures
        case "text":
            return (*of_pictures, *AUDIBLE)


def make(
    modality: Modality, learnt: Sequence[Record], names: Sequence[str], settings: EvaluationSettings, *, seed: int
) -> Reader:
    """A reader of ``modality``, from public records that have it.

    Raises UsageError where pictures have several sizes, or sounds several sample rates.
    """
    facts = known(learnt, shown(modality, names, audible(learnt)))
    match modality:
        case "text":
            return _of_texts(learnt, facts)
        case "image" | "audio":
            return _of_views(modality, learnt, facts, settings.judge_seconds, seed)


def views(modality: Modality, records: Sequence[Record]) -> np.ndarray:
    """Pictures as they are, sounds as spectrograms: (N, H, W, C) uint8."""
    match modality:
        case "image":
            return pictures_of(records)
        case "audio":
            sounds, rate = sounds_of(records)
            return spectrogram.spectrograms(sounds, rate)
        case "text":
            raise UsageError("views of texts · have none", next="Ask for image or audio.")


def pictures_of(records: Sequence[Record]) -> np.ndarray:
    shapes = {record.image.shape for record in records if record.image is not None}
    if len(shapes) != 1:
        raise UsageError(
            f"pictures have {len(shapes)} shapes, {sorted(shapes)[:3]} · must have one", next="Resize them."
        )
    return np.stack([record.image for record in records if record.image is not None])


def sounds_of(records: Sequence[Record]) -> tuple[np.ndarray, int]:
    """(N, T), and the sample rate."""
    rates = {record.sample_rate for record in records}
    rate = next(iter(rates))
    if len(rates) != 1 or rate is None:
        raise UsageError(
            f"sounds have {len(rates)} sample rates, {sorted(map(str, rates))[:3]} · must have one",
            next="Resample them.",
        )
    return spectrogram.stack([record.audio for record in records]), rate


def texts_of(records: Sequence[Record]) -> list[str]:
    return [record.text or "" for record in records]


def _of_views(modality: Modality, learnt: Sequence[Record], facts: Facts, seconds: float, seed: int) -> Reader:
    """A small convolutional network, and of sounds also what is measured without one."""
    rate = _measured_rate if modality == "audio" and np.isfinite(rates_of(learnt)).any() else None
    what = {"image": "pictures", "audio": "sounds, seen as spectrograms"}[modality]
    if not facts:
        return Reader(rate=rate, how=f"No facts are known of these {what.split(',')[0]}.")
    trained = judge.train(views(modality, learnt), facts, seconds=seconds, seed=seed)
    return Reader(
        facts=tuple(facts),
        read=lambda records: trained.read(views(modality, records)),
        features=lambda records: trained.features(views(modality, records)),
        rate=rate,
        name=trained.name
        if modality == "image"
        else f"{trained.name}, on spectrograms of {spectrogram.BANDS} mel bands",
        how=f"The judge is a small convolutional network trained on {trained.pictures} public {what} "
        f"({trained.epochs:.0f} passes), none of which is measured.",
        stopped=trained.stopped_early,
    )


def _measured_rate(records: Sequence[Record]) -> np.ndarray:
    return audio.beats(*sounds_of(records)).rate


def _of_texts(learnt: Sequence[Record], facts: Facts) -> Reader:
    def said(records: Sequence[Record]) -> np.ndarray:
        found = [text.heart_rate(told) for told in texts_of(records)]
        return np.array([np.nan if rate is None else rate for rate in found])

    rate = said if np.isfinite(rates_of(learnt)).any() else None
    if not facts:
        return Reader(rate=rate, how="No facts are known of these texts.")
    few = learnt[:MOST_TEXTS]
    trained = text.train_reader(texts_of(few), {name: values[: len(few)] for name, values in facts.items()})
    return Reader(
        facts=tuple(facts),
        read=lambda records: trained.read(texts_of(records)),
        rate=rate,
        name=trained.name,
        how=f"Texts are read by a logistic regression on words, trained on {trained.texts} public texts, none of which is measured.",
    )


def murmur_by_energy(learnt: Sequence[Record]) -> Callable[[Sequence[Record]], list[str]] | None:
    """Whether there is a murmur, by how loud the pause between first and second sound is; the cut is set on public sounds."""
    told = [value_of(record, "murmur") for record in learnt]
    if not {"yes", "no"} <= set(told):
        return None

    def scores(records: Sequence[Record]) -> np.ndarray:
        sounds, rate = sounds_of(records)
        return audio.murmurs(sounds, rate, audio.beats(sounds, rate))

    sure = [record for record, value in zip(learnt, told, strict=True) if value is not None]
    cut = audio.threshold(scores(sure), np.array([value_of(record, "murmur") == "yes" for record in sure]))
    return lambda records: ["yes" if score > cut else "no" for score in scores(records)]


def told_by(given: Sequence[Modality], names: Sequence[str], own: bool) -> set[str]:
    """The facts that the condition of a direction shows."""
    return {fact for modality in given for fact in shown(modality, names, own)}
