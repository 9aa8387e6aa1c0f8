"""From what was asked, made and read to figures: each with its interval, its baselines, its extractor, and what covers it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.evaluation import agreement, image, text
from sfumato.evaluation.pairing import Pairing
from sfumato.reports import Covered, Figure

Interval = tuple[float, float, float]  # value, low, high
RESAMPLES = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """What the figures of one direction have in common.

    Attributes: order: a permutation of the measured records, for the baseline of shuffled conditions.
    """

    direction: str
    covered_by: Covered
    shuffled: str  # name of the baseline
    order: np.ndarray
    seed: int

    def figure(self, name: str, value: Interval, **fields: Any) -> Figure:
        first = "" if self.direction == "text→image" else f"{self.direction}: "
        return Figure(
            name=first + name, value=value[0], low=value[1], high=value[2], direction=self.direction,
            covered_by=self.covered_by, **fields,
        )  # fmt: skip

    def shuffle(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self.order]

    # -- facts --

    def of_facts(
        self,
        asked: Mapping[str, Sequence[str | None]],
        of_made: Mapping[str, Sequence[str]],
        of_real: Mapping[str, Sequence[str]],
        extractor: str,
        what: str = "pictures",
    ) -> list[Figure]:
        """Kappa of every fact, and the mean of several; of a single one its accuracy too."""
        present = {fact: values for fact, values in asked.items() if any(value is not None for value in values)}

        def one(measure: Callable[..., Interval], fact: str, name: str, note: str) -> Figure:
            def on(values: Sequence[str | None], read: Sequence[str]) -> Interval:
                pairs = [(v, r) for v, r in zip(values, read, strict=True) if v is not None]
                return measure([v for v, _ in pairs], [r for _, r in pairs])

            values = present[fact]
            return self.figure(
                f"{name}: {fact}",
                on(values, of_made[fact]),
                baseline={
                    "real held-out": on(values, of_real[fact])[0],
                    self.shuffled: on(self.shuffle(values), of_made[fact])[0],
                },
                extractor=extractor,
                samples=sum(value is not None for value in values),
                note=note,
            )

        figures = [one(agreement.kappa, fact, "kappa", "asked against read, Cohen's kappa") for fact in present]
        if len(present) == 1:
            figures.append(one(agreement.accuracy, next(iter(present)), "accuracy", f"share of {what} read as asked"))
        elif present:
            shuffled = {fact: self.shuffle(values) for fact, values in present.items()}
            figures.append(
                self.figure(
                    "kappa: mean",
                    agreement.mean_kappa(present, of_made),
                    baseline={
                        "real held-out": agreement.mean_kappa(present, of_real)[0],
                        self.shuffled: agreement.mean_kappa(shuffled, of_made)[0],
                    },
                    extractor=extractor,
                    samples=len(self.order),
                    note="mean of the facts' kappas",
                )
            )
        return figures

    def of_rates(
        self, asked: np.ndarray, of_made: np.ndarray, of_real: np.ndarray, usual: float, extractor: str
    ) -> list[Figure]:
        """Heart rates asked against read: correlation, and mean error. What is not said counts as the ``usual`` rate."""
        there = np.isfinite(asked)
        silent = int((~np.isfinite(of_made))[there].sum())
        told = asked[there]
        made, real = (np.where(np.isfinite(read), read, usual)[there] for read in (of_made, of_real))
        order = self.order[np.isin(self.order, np.flatnonzero(there))]
        shuffled = asked[order]
        note = f"; {silent} of {len(told)} say no rate and count as {usual:.0f}" if silent else ""
        common: dict[str, Any] = {"extractor": extractor, "samples": len(told)}
        return [
            self.figure(
                f"heart rate: {name}",
                _over(measure, told, made, self.seed),
                baseline={"real held-out": measure(told, real), self.shuffled: measure(shuffled, made)},
                better=better,
                note=words + note,
                **common,
            )
            for name, measure, better, words in (
                ("correlation", _correlation, "higher", "Pearson's, asked against read"),
                ("mean error", _mean_error, "lower", "beats a minute, asked against read"),
            )
        ]

    # -- sets --

    def of_sets(self, of_made: np.ndarray, of_real: np.ndarray, extractor: str, what: str) -> Figure:
        """The Fréchet distance of features, between halves, so that the baseline has the same bias."""
        a, b = slice(0, None, 2), slice(1, None, 2)
        wide = of_real.shape[1] > 256
        value = image.crossed_distance(
            (of_made[a], of_real[b]), (of_made[b], of_real[a]), resamples=20 if wide else 60, seed=self.seed
        )
        return self.figure(
            "Fréchet distance",
            value,
            better="lower",
            baseline={"real held-out": image.frechet_distance(of_real[a], of_real[b])},
            extractor=extractor,
            samples=len(of_real),
            note=f"Fréchet distance ({extractor}); not FID. Between halves of {len(of_real[b])} {what}, as its baseline is.",
        )

    def of_pairs(
        self, pairs: Pairing, made: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray], view: str
    ) -> list[Figure]:
        """Recall at 1, 5 and 10 both ways. Args: made, real: (features of views, features of texts), (N, D) each."""
        count = len(made[0])
        of_made, of_real = agreement.retrieval(*made), agreement.retrieval(*real)
        order = np.random.default_rng(self.seed).permutation(count)
        of_shuffled = agreement.retrieval(made[0], made[1][order])
        return [
            self.figure(
                f"{name.replace('image', view)} R@{k}",
                value,
                baseline={
                    "real held-out": of_real[name][k][0],
                    self.shuffled: of_shuffled[name][k][0],
                    "chance": min(k / count, 1.0),
                },
                extractor=pairs.name,
                samples=count,
                note=f"among {count} held-out concepts, one pair each",
            )
            for name, by_k in of_made.items()
            for k, value in by_k.items()
        ]

    # -- texts --

    def of_texts(
        self, made: Sequence[str], real: Sequence[str], letters: text.LetterModel, told_anything: bool
    ) -> list[Figure]:
        """How usual, how varied, and how near to what was really written."""
        usual = {name: np.array([letters.bits_per_byte(t) for t in texts]) for name, texts in _both(made, real).items()}
        alike = {name: text.self_similarity(texts, seed=self.seed) for name, texts in _both(made, real).items()}
        figures = [
            self.figure(
                "bits per byte",
                agreement.mean_interval(usual["made"], RESAMPLES, self.seed),
                better="lower",
                baseline={"real held-out": float(usual["real"].mean())},
                extractor=letters.name,
                samples=len(made),
                note="of the generated texts under a public letter model: far above real ones is gibberish, far below repetition",
            ),
            self.figure(
                "self-similarity",
                agreement.mean_interval(alike["made"], RESAMPLES, self.seed),
                better="lower",
                baseline={"real held-out": float(alike["real"].mean())},
                samples=len(alike["made"]),
                note="mean over texts of the best BLEU-like score among the others (after self-BLEU); 1 where texts repeat",
            ),
            self.figure(
                "distinct-2",
                _distinct_interval(made, self.seed),
                baseline={"real held-out": text.distinct(real)},
                samples=len(made),
                note="different pairs of words among all; the interval from texts left out, for repeats would lower it",
            ),
        ]
        if told_anything:
            reached = np.array([text.rouge_l(a, b) for a, b in zip(made, real, strict=True)])
            by_chance = np.array([text.rouge_l(a, b) for a, b in zip(made, self.shuffle(real), strict=True)])
            figures.append(
                self.figure(
                    "ROUGE-L",
                    agreement.mean_interval(reached, RESAMPLES, self.seed),
                    baseline={self.shuffled: float(by_chance.mean())},
                    samples=len(made),
                    note="words in common with what was really written of the same record, in order",
                )
            )
        return figures

    def of_held_out(self, per_group: Sequence[float], by_letters: float, samples: int) -> Figure:
        """Bits that the model itself needs for a byte of real held-out texts. Args: per_group: of groups of them."""
        values = np.array(per_group)
        half = 1.96 * float(values.std(ddof=1) / np.sqrt(len(values)))
        mean = float(values.mean())
        return self.figure(
            "bits per byte of held-out texts",
            (mean, max(0.0, mean - half), mean + half),
            better="lower",
            baseline={"public letter model": by_letters},
            extractor="the model's own probabilities",
            samples=samples,
            note="told nothing else; perplexity per byte is 2 to this. Beside it the letter model, which learnt from public texts",
        )


def _both(made: Sequence[str], real: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"made": made, "real": real}


def _over(measure: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray, seed: int) -> Interval:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.quantile([measure(a[row], b[row]) for row in rows], agreement.INTERVAL)
    return measure(a, b), float(low), float(high)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one side is constant: nothing was shown."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _mean_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def _distinct_interval(texts: Sequence[str], seed: int) -> Interval:
    """A jackknife over ten groups of texts: resamples with repeats would have fewer distinct pairs (Efron & Stein 1981)."""
    value, groups = text.distinct(texts), 10
    part = np.random.default_rng(seed).permutation(len(texts)) % groups
    left = np.array([text.distinct([t for t, p in zip(texts, part, strict=True) if p != g]) for g in range(groups)])
    spread = 1.96 * float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    return value, max(0.0, value - spread), min(1.0, value + spread)
