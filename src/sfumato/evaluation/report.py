"""Everything that is measured of a generator, as one ``QualityReport``.

Only public records are touched: one half teaches the measuring network, the captions of the other half are what the
generator is asked for. So a figure is post-processing of the trained model and public data. A generator that was trained
without privacy has no such excuse: its figures are ``internal``, and the caller says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sfumato.errors import UsageError
from sfumato.evaluation import agreement, image, judge, pairing
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.records import Record
from sfumato.reports import Covered, Figure, QualityReport

FEWEST = 20  # records in each half; below this no figure is worth its interval
MOST_PAIRS = 1_500  # public pairs that the retrieval heads learn from: MiniLM reads about 100 texts a second

Generate = Callable[[list[str]], np.ndarray]  # captions -> (N, H, W, C) uint8


def evaluate(
    generate: Generate,
    public: Sequence[Record],
    facts: Mapping[str, Sequence[str]],
    settings: EvaluationSettings,
    *,
    seed: int = 0,
    covered_by: Covered = "post-processing",
    twin: Generate | None = None,
) -> QualityReport:
    """Asks for pictures by held-out public captions and measures them.

    Args:
      facts: the known label sets (keys are looked up in ``record.metadata["facts"]``); {} measures retrieval instead.
      covered_by: of the figures; "internal" for a model trained without privacy.
      twin: a second generator, trained without privacy on the same records: its figures stand beside the first one's as
        the baseline "non-private twin", which is internal and never leaves the run.
    """
    usable = [record for record in public if record.image is not None and record.text]
    learnt, measured = halves(usable, seed)
    rng = np.random.default_rng(seed)
    measured = [measured[i] for i in rng.permutation(len(measured))[: settings.samples]]
    if min(len(learnt), len(measured)) < FEWEST:
        too_few = (
            f"Not measured: {len(usable)} public records with a picture and a text are too few "
            f"(at least {FEWEST} in each half). Set data.public_units higher."
        )
        return QualityReport(notes=[too_few])
    captions = [str(record.text) for record in measured]
    real = _stack(measured)
    known = {fact: [_fact(record, fact) for record in learnt] for fact in facts}
    known = {fact: values for fact, values in known.items() if any(value is not None for value in values)}
    if known:
        reader = judge.train(_stack(learnt), known, seconds=settings.judge_seconds, seed=seed)
        asked = {fact: [_fact(record, fact) for record in measured] for fact in known}
        read_real, features_real = reader.read(real), reader.features(real)

        def figures_of(pictures: np.ndarray) -> list[Figure]:
            order = np.random.default_rng(seed)
            return [
                *_facts_figures(asked, reader.read(pictures), read_real, reader.name, covered_by, order),
                _frechet_figure(reader.features(pictures), features_real, reader.name, covered_by, seed),
            ]

        how = (
            f"The judge is a small convolutional network trained on {reader.pictures} public pictures "
            f"({reader.epochs:.0f} passes), none of which is measured."
        )
        stopped = reader.stopped_early
    else:
        learnt = learnt[:MOST_PAIRS]
        pairs = pairing.train(
            _stack(learnt), [str(r.text) for r in learnt], [group_of(r) for r in learnt],
            seconds=settings.judge_seconds, seed=seed,
        )  # fmt: skip
        features_real = pairs.picture_features(real)

        def figures_of(pictures: np.ndarray) -> list[Figure]:
            order = np.random.default_rng(seed)
            features = pairs.picture_features(pictures)
            return [
                *_retrieval_figures(pairs, pictures, real, measured, covered_by, order),
                _frechet_figure(features, features_real, pairs.picture_extractor, covered_by, seed),
            ]

        how = f"No facts are known of these records; two heads learnt from {pairs.pairs} public pairs, none of which is measured."
        stopped = pairs.stopped_early
    figures = figures_of(_drawn(generate, captions, real))
    if twin is not None:
        beside = {figure.name: figure.value for figure in figures_of(_drawn(twin, captions, real))}
        figures = [replace(f, baseline={**f.baseline, "non-private twin": beside[f.name]}) for f in figures]
    notes = [how]
    if stopped:
        notes.append("The measuring network was stopped by evaluation.judge_seconds; more time may read better.")
    return QualityReport(figures=figures, notes=notes)


def _drawn(generate: Generate, captions: list[str], real: np.ndarray) -> np.ndarray:
    """The generator's pictures, one per caption, of the same kind as the real ones."""
    pictures = generate(captions)
    if pictures.dtype != np.uint8 or pictures.shape != real.shape:
        raise UsageError(
            f"generate(...) = {pictures.dtype} {pictures.shape} · must be uint8 {real.shape}",
            next="Give one picture per caption, in the size and channels of the public records.",
        )
    return pictures


def group_of(record: Record) -> str:
    """What must not be on both sides of a split: the concept where a source names one, else the unit."""
    return str(record.metadata.get("concept") or record.unit)


def halves(records: Sequence[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Two halves that share no unit and no concept, the same for the same seed whatever the order of the records."""
    groups = sorted({group_of(record) for record in records})
    order = np.random.default_rng(seed).permutation(len(groups))
    first = {groups[i] for i in order[: len(groups) // 2]}
    return [r for r in records if group_of(r) in first], [r for r in records if group_of(r) not in first]


def _facts_figures(
    asked: dict[str, list[str | None]],
    of_generated: dict[str, list[str]],
    of_real: dict[str, list[str]],
    extractor: str,
    covered_by: Covered,
    rng: np.random.Generator,
) -> list[Figure]:
    order = rng.permutation(len(next(iter(asked.values()))))
    shuffled = {fact: [values[i] for i in order] for fact, values in asked.items()}
    common: dict[str, Any] = {"extractor": extractor, "covered_by": covered_by}

    def figure(name: str, measure: Callable[[Any, Any], tuple[float, float, float]], samples: int, note: str) -> Figure:
        value, low, high = measure(asked, of_generated)
        baseline = {
            "real held-out": measure(asked, of_real)[0],
            "shuffled captions": measure(shuffled, of_generated)[0],
        }
        return Figure(
            name=name, value=value, low=low, high=high, baseline=baseline, samples=samples, note=note, **common
        )

    def of_fact(measure: Callable[..., tuple[float, float, float]], fact: str):
        def on(values: dict[str, list[str | None]], read: dict[str, list[str]]) -> tuple[float, float, float]:
            known = [(v, r) for v, r in zip(values[fact], read[fact], strict=True) if v is not None]
            return measure([v for v, _ in known], [r for _, r in known])

        return on

    counts = {fact: sum(value is not None for value in values) for fact, values in asked.items()}
    present = {fact: count for fact, count in counts.items() if count}
    figures = [
        figure(f"kappa: {fact}", of_fact(agreement.kappa, fact), count, "asked against read, Cohen's kappa")
        for fact, count in present.items()
    ]
    if len(present) == 1:
        fact, count = next(iter(present.items()))
        figures.append(
            figure(f"accuracy: {fact}", of_fact(agreement.accuracy, fact), count, "share of pictures read as asked")
        )
    elif present:
        figures.append(figure("kappa: mean", agreement.mean_kappa, len(order), "mean of the facts' kappas"))
    return figures


def _retrieval_figures(
    pairs: pairing.Pairing,
    generated: np.ndarray,
    real: np.ndarray,
    measured: list[Record],
    covered_by: Covered,
    rng: np.random.Generator,
) -> list[Figure]:
    """Recall among one pair per concept: a caption of the same concept in another style is not a wrong answer."""
    seen: set[str] = set()
    chosen = [i for i, r in enumerate(measured) if not (group_of(r) in seen or seen.add(group_of(r)))]
    texts = pairs.texts([str(measured[i].text) for i in chosen])
    shapes = {name: pairs.images(pictures[chosen]) for name, pictures in (("generated", generated), ("real", real))}
    of_generated = agreement.retrieval(shapes["generated"], texts)
    of_real = agreement.retrieval(shapes["real"], texts)
    of_shuffled = agreement.retrieval(shapes["generated"], texts[rng.permutation(len(texts))])
    return [
        Figure(
            name=f"{direction} R@{k}",
            value=value,
            low=low,
            high=high,
            baseline={
                "real held-out": of_real[direction][k][0],
                "shuffled captions": of_shuffled[direction][k][0],
                "chance": min(k / len(chosen), 1.0),
            },
            extractor=pairs.name,
            samples=len(chosen),
            covered_by=covered_by,
            note=f"among {len(chosen)} held-out concepts, one pair each",
        )
        for direction, by_k in of_generated.items()
        for k, (value, low, high) in by_k.items()
    ]


def _frechet_figure(
    of_generated: np.ndarray, of_real: np.ndarray, extractor: str, covered_by: Covered, seed: int
) -> Figure:
    a, b = slice(0, None, 2), slice(1, None, 2)
    wide = of_real.shape[1] > 256
    value, low, high = image.crossed_distance(
        (of_generated[a], of_real[b]), (of_generated[b], of_real[a]), resamples=20 if wide else 60, seed=seed
    )
    return Figure(
        name="Fréchet distance",
        value=value,
        low=low,
        high=high,
        better="lower",
        baseline={"real held-out": image.frechet_distance(of_real[a], of_real[b])},
        extractor=extractor,
        samples=len(of_real),
        covered_by=covered_by,
        note=f"Fréchet distance ({extractor}); not FID. Between halves of {len(of_real[b])} pictures, as its baseline is.",
    )


def _fact(record: Record, fact: str) -> str | None:
    value = record.metadata.get("facts", {}).get(fact)
    return None if value is None else str(value)


def _stack(records: Sequence[Record]) -> np.ndarray:
    shapes = {record.image.shape for record in records if record.image is not None}
    if len(shapes) != 1:
        raise UsageError(
            f"public pictures have {len(shapes)} shapes, {sorted(shapes)[:3]} · must have one", next="Resize them."
        )
    return np.stack([record.image for record in records if record.image is not None])
