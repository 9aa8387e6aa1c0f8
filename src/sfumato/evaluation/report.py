"""Everything that is measured of a generator, in every direction that it has, as one ``QualityReport``.

Only public records are touched: one half teaches the networks that read, the records of the other half are what the
generator is told. So a figure is post-processing of the trained model and public data. A generator that was trained
without privacy has no such excuse: its figures are ``internal``, and the caller says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from sfumato.errors import UsageError
from sfumato.evaluation import agreement, audio, pairing, readers, text, usefulness
from sfumato.evaluation.figures import Maker
from sfumato.evaluation.readers import Reader
from sfumato.evaluation.settings import EvaluationSettings
from sfumato.models.generative import Direction
from sfumato.records import MODALITIES, Modality, Record, prompt
from sfumato.reports import Covered, Figure, QualityReport

FEWEST = 20  # records in each half; below this no figure is worth its interval
MOST_PAIRS = 1_500  # public pairs that the retrieval heads learn from: MiniLM reads about 100 texts a second
NOUN = {"text": "texts", "image": "pictures", "audio": "sounds"}


class Sampler(Protocol):
    """What is measured: any trained model of ours."""

    @property
    def directions(self) -> tuple[Direction, ...]: ...

    def sample(self, given: Sequence[Record], wanted: Sequence[Modality], *, seed: int) -> list[Record]: ...


def evaluate(
    model: Sampler,
    public: Sequence[Record],
    facts: Mapping[str, Sequence[str]],
    settings: EvaluationSettings,
    *,
    seed: int = 0,
    covered_by: Covered = "post-processing",
    twin: Sampler | None = None,
    start: Sampler | None = None,
) -> QualityReport:
    """Tells the model what held-out public records hold, asks for the rest, and measures what it makes.

    Args:
      facts: the known label sets (keys are looked up in ``record.metadata["facts"]``); {} measures retrieval instead.
      covered_by: of the figures; "internal" for a model trained without privacy.
      twin: a second generator, trained without privacy on the same records: its figures stand beside the first one's as
        the baseline "non-private twin", which is internal and never leaves the run.
      start: the model as public records made it, before its first private step: the baseline "public start alone".

    Raises: UsageError where a direction is asked for that the model has not, or where it does not give what it was asked for.
    """
    directions = chosen(model.directions, settings.directions)
    learnt, measured = halves(public, seed)
    bench = _Bench(learnt=learnt, names=tuple(facts), settings=settings, seed=seed)
    figures: list[Figure] = []
    notes: list[str] = []
    for direction in directions:
        asked = _Asked.of(direction, measured, learnt, settings.samples, seed)
        if min(len(asked.records), len(asked.learnt)) < FEWEST:
            notes.append(_too_few(direction, public))
            continue
        found = bench.figures(asked, asked.made_by(model, seed), model, covered_by)
        for name, other in (("public start alone", start), ("non-private twin", twin)):
            if other is not None:
                made = asked.made_by(other, seed)
                beside = {figure.name: figure.value for figure in bench.figures(asked, made, other, covered_by)}
                found = [replace(f, baseline={**f.baseline, name: beside[f.name]}) for f in found]
        figures += found
    return QualityReport(figures=figures, notes=[*notes, *bench.notes()])


def chosen(known: Sequence[Direction], asked: Sequence[str]) -> list[Direction]:
    """The directions named by ``asked``, all of them where none is. "->" is "→". Raises UsageError for an unknown one."""
    if not asked:
        return list(known)
    by_name = {str(direction): direction for direction in known}
    wanted = [name.replace("->", "→").replace(" ", "") for name in asked]
    for name in wanted:
        if name not in by_name:
            raise UsageError(
                f"evaluation.directions = {name} · this model knows {', '.join(by_name)}", next="Name one of these."
            )
    return [by_name[name] for name in dict.fromkeys(wanted)]


def group_of(record: Record) -> str:
    """What must not be on both sides of a split: the concept where a source names one, else the unit."""
    return str(record.metadata.get("concept") or record.unit)


def halves(records: Sequence[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Two halves that share no unit and no concept, the same for the same seed whatever the order of the records."""
    groups = sorted({group_of(record) for record in records})
    order = np.random.default_rng(seed).permutation(len(groups))
    first = {groups[i] for i in order[: len(groups) // 2]}
    return [r for r in records if group_of(r) in first], [r for r in records if group_of(r) not in first]


def has(record: Record, modality: Modality) -> bool:
    """Whether there is anything to tell or to compare with: an empty text is none."""
    return bool(record.text) if modality == "text" else getattr(record, modality) is not None


def told(record: Record, given: Sequence[Modality]) -> Record:
    """What a model is told of a record: the ``given`` modalities and nothing else."""
    values: dict[str, Any] = {name: getattr(record, name) for name in given}
    return prompt(**values, sample_rate=record.sample_rate if "audio" in given else None)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One direction: the held-out records that it is asked with, and the public ones that it may learn from."""

    direction: Direction
    records: list[Record]
    learnt: list[Record]
    order: np.ndarray  # a permutation of ``records``

    @staticmethod
    def of(
        direction: Direction, measured: Sequence[Record], learnt: Sequence[Record], samples: int, seed: int
    ) -> "_Asked":
        needed: set[Modality] = {*direction.given, *direction.wanted}
        usable, ours = ([r for r in part if all(has(r, name) for name in needed)] for part in (measured, learnt))
        rng = np.random.default_rng(seed)
        records = [usable[i] for i in rng.permutation(len(usable))[:samples]]
        order = np.random.default_rng(seed).permutation(len(records))
        return _Asked(direction=direction, records=records, learnt=ours, order=order)

    def made_by(self, model: Sampler, seed: int) -> list[Record]:
        """The model's records, one for each, of the same kind as the real ones."""
        made = model.sample([told(r, self.direction.given) for r in self.records], self.direction.wanted, seed=seed + 1)
        if len(made) != len(self.records):
            raise UsageError(f"sample(...) = {len(made)} records · must be {len(self.records)}", next="Give one each.")
        for real, record in zip(self.records, made, strict=True):
            for name in self.direction.wanted:
                _require_like(name, real, record)
        return made


def _require_like(name: Modality, real: Record, made: Record) -> None:
    if name == "text" and isinstance(made.text, str):
        return
    if name == "image" and made.image is not None and real.image is not None:
        if made.image.dtype == np.uint8 and made.image.shape == real.image.shape:
            return
    if name == "audio" and made.audio is not None and made.sample_rate == real.sample_rate:
        return
    given = getattr(made, name)
    kind = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
    raise UsageError(
        f"sample(...).{name} = {kind} · must be as the public records' {NOUN[name]} are",
        next="Give one a record, in the size, channels and sample rate of the public records.",
    )


@dataclass(kw_only=True)
class _Bench:
    """The networks that read, each made once, from the half of the public records that is not measured."""

    learnt: Sequence[Record]
    names: tuple[str, ...]
    settings: EvaluationSettings
    seed: int
    _readers: dict[Modality, Reader] = field(default_factory=dict)
    _pairs: dict[Modality, pairing.Pairing] = field(default_factory=dict)
    _letters: text.LetterModel | None = None
    _murmur: Callable[[Sequence[Record]], list[str]] | None = None

    def notes(self) -> list[str]:
        said = [reader.how for reader in self._readers.values()]
        said += [
            f"{'No facts are known of these records; two' if not self.names else 'Two'} heads learnt from {pairs.pairs} public "
            "pairs, none of which is measured."
            for pairs in self._pairs.values()
        ]
        if any(reader.stopped for reader in self._readers.values()) or any(
            p.stopped_early for p in self._pairs.values()
        ):
            said.append("The measuring network was stopped by evaluation.judge_seconds; more time may read better.")
        return list(dict.fromkeys(said))

    def reader(self, modality: Modality) -> Reader:
        if modality not in self._readers:
            having = [record for record in self.learnt if has(record, modality)]
            self._readers[modality] = readers.make(modality, having, self.names, self.settings, seed=self.seed)
        return self._readers[modality]

    def pairs(self, view: Modality) -> pairing.Pairing:
        if view not in self._pairs:
            both = [record for record in self.learnt if has(record, view) and has(record, "text")][:MOST_PAIRS]
            self._pairs[view] = pairing.train(
                readers.views(view, both), readers.texts_of(both), [group_of(record) for record in both],
                seconds=self.settings.judge_seconds, seed=self.seed, pretrained=view == "image",
            )  # fmt: skip
        return self._pairs[view]

    def letters(self) -> text.LetterModel:
        if self._letters is None:
            having = [record for record in self.learnt if has(record, "text")]
            self._letters = text.LetterModel(readers.texts_of(having[: readers.MOST_LETTERS]))
        return self._letters

    def figures(self, asked: _Asked, made: list[Record], model: Sampler, covered_by: Covered) -> list[Figure]:
        direction = asked.direction
        maker = Maker(
            direction=str(direction),
            covered_by=covered_by,
            shuffled="shuffled captions" if direction.given == ("text",) else "shuffled conditions",
            order=asked.order,
            seed=self.seed,
        )
        figures: list[Figure] = []
        for modality in direction.wanted:
            figures += self._agreement(maker, asked, made, modality)
            figures += self._likeness(maker, asked, made, modality)
            figures += self._usefulness(maker, asked, made, modality)
        if direction.wanted == ("text",) and hasattr(model, "bits_per_byte"):
            figures.append(self._own_bits(maker, asked, model))
        figures += self._retrieval(maker, asked, made)
        figures += self._together(maker, asked, made)
        return figures

    # -- does it say what it was told? --

    def _facts(self, asked: _Asked, modality: Modality) -> readers.Facts:
        """The facts that both the condition and ``modality`` show, as they were asked."""
        common = readers.told_by(asked.direction.given, self.names, readers.audible(self.learnt))
        names = [fact for fact in self.reader(modality).facts if fact in common]
        return readers.known(asked.records, names)

    def _agreement(self, maker: Maker, asked: _Asked, made: list[Record], modality: Modality) -> list[Figure]:
        reader, facts = self.reader(modality), self._facts(asked, modality)
        suffix = _suffix(asked, modality)
        figures: list[Figure] = []
        if facts:
            found = maker.of_facts(facts, reader.read(made), reader.read(asked.records), reader.name, NOUN[modality])
            figures += [replace(figure, name=figure.name + suffix) for figure in found]
        if reader.rate is not None and {"text", "audio"} & set(asked.direction.given):
            rates = readers.rates_of(asked.records)
            if np.isfinite(rates).sum() >= FEWEST:
                usual = float(np.nanmean(readers.rates_of(self.learnt)))
                how = (
                    "a public rule on the words"
                    if modality == "text"
                    else f"correlation with ideal hearts, {audio.LOW:.0f}-{audio.HIGH:.0f} Hz"
                )
                figures += maker.of_rates(rates, reader.rate(made), reader.rate(asked.records), usual, how)
        if modality == "audio" and "murmur" in facts:
            if self._murmur is None:
                self._murmur = readers.murmur_by_energy(asked.learnt)
            if self._murmur is not None:
                found = maker.of_facts(
                    {"murmur": facts["murmur"]},
                    {"murmur": self._murmur(made)},
                    {"murmur": self._murmur(asked.records)},
                    "noise between first and second sound against after it, cut set on public sounds",
                    "sounds",
                )
                figures += [replace(figure, name=f"{figure.name}, by energy between the beats") for figure in found]
        return figures

    def _retrieval(self, maker: Maker, asked: _Asked, made: list[Record]) -> list[Figure]:
        """Recall among one pair per concept: a caption of the same concept in another style is not a wrong answer."""
        direction = asked.direction
        sides = {*direction.given, *direction.wanted}
        views: list[Modality] = [name for name in ("image", "audio") if name in sides]
        if "text" not in sides or not (self.settings.retrieval or not self._has_facts(asked)):
            return []
        seen: set[str] = set()
        rows = [i for i, r in enumerate(asked.records) if not (group_of(r) in seen or seen.add(group_of(r)))]
        real = [asked.records[i] for i in rows]
        figures: list[Figure] = []
        for view in views:
            if not {"text", view} & set(direction.wanted):
                continue
            pairs = self.pairs(view)

            def of(name: Modality, pairs: pairing.Pairing = pairs) -> tuple[np.ndarray, np.ndarray]:
                """Features of the made one where it was made, of the real one where it was told; and of the real one."""
                there = [made[i] for i in rows] if name in direction.wanted else real
                if name == "text":
                    return pairs.texts(readers.texts_of(there)), pairs.texts(readers.texts_of(real))
                return pairs.images(readers.views(name, there)), pairs.images(readers.views(name, real))

            seen_views, seen_texts = of(view), of("text")
            figures += maker.of_pairs(pairs, (seen_views[0], seen_texts[0]), (seen_views[1], seen_texts[1]), view)
        return figures

    def _has_facts(self, asked: _Asked) -> bool:
        if not asked.direction.given:
            return any(self.reader(name).facts for name in asked.direction.wanted)
        return any(self._facts(asked, name) for name in asked.direction.wanted)

    def _together(self, maker: Maker, asked: _Asked, made: list[Record]) -> list[Figure]:
        """Of a joint sample: do its parts say the same?"""
        figures: list[Figure] = []
        wanted = asked.direction.wanted
        for i, first in enumerate(wanted):
            for second in wanted[i + 1 :]:
                names = [fact for fact in self.reader(first).facts if fact in self.reader(second).facts]
                if not names:
                    continue
                read = [
                    {fact: self.reader(name).read(part)[fact] for fact in names}
                    for part in (made, asked.records)
                    for name in (first, second)
                ]
                shuffled = {fact: maker.shuffle(values) for fact, values in read[0].items()}
                figures.append(
                    maker.figure(
                        f"{first} and {second} agree, kappa: mean",
                        agreement.mean_kappa(read[0], read[1]),
                        baseline={
                            "real held-out": agreement.mean_kappa(read[2], read[3])[0],
                            maker.shuffled: agreement.mean_kappa(shuffled, read[1])[0],
                        },
                        extractor=f"{self.reader(first).name}; {self.reader(second).name}",
                        samples=len(made),
                        note=f"{', '.join(names)}: read off both parts of the same generated record",
                    )
                )
        return figures

    # -- is it like the real ones? --

    def _likeness(self, maker: Maker, asked: _Asked, made: list[Record], modality: Modality) -> list[Figure]:
        suffix = _suffix(asked, modality)
        if modality == "text":
            real, ours = readers.texts_of(asked.records), readers.texts_of(made)
            found = maker.of_texts(ours, real, self.letters(), bool(asked.direction.given))
            return [replace(figure, name=figure.name + suffix) for figure in found]
        reader = self.reader(modality)
        if reader.features is not None:
            features, name = reader.features, reader.name
        elif any(has(record, "text") and has(record, modality) for record in self.learnt):
            pairs = self.pairs(modality)
            features, name = (
                (lambda records: pairs.picture_features(readers.views(modality, records))),
                pairs.picture_extractor,
            )
        else:
            return []  # nothing to learn features from
        found = maker.of_sets(features(made), features(asked.records), name, NOUN[modality])
        return [replace(found, name=found.name + suffix)]

    def _own_bits(self, maker: Maker, asked: _Asked, model: Any) -> Figure:
        """Of the held-out texts, in ten groups: what the model itself thinks of them, told nothing else."""
        few = asked.records[: readers.MOST_LETTERS]
        groups = [[told(record, ("text",)) for record in few[start::10]] for start in range(10)]
        letters = self.letters()
        by_letters = float(np.mean([letters.bits_per_byte(said) for said in readers.texts_of(few)]))
        return maker.of_held_out([model.bits_per_byte(group) for group in groups], by_letters, len(few))

    # -- can one learn from it? --

    def _usefulness(self, maker: Maker, asked: _Asked, made: list[Record], modality: Modality) -> list[Figure]:
        """Accuracy on real held-out records of what learnt from generated ones, labelled as they were asked."""
        facts = self._facts(asked, modality)
        if not facts or not self.settings.usefulness:
            return []
        taught = asked.learnt[: len(made)]
        suffix = _suffix(asked, modality)
        if modality == "text":
            return [_learnt_texts(maker, facts, made, asked.records, taught, suffix)]
        return [
            _learnt_views(maker, facts, modality, made, asked.records, taught, network, self.seed, suffix)
            for network in self.settings.usefulness
        ]


def _suffix(asked: _Asked, modality: Modality) -> str:
    """Where several are wanted together their figures need names of their own."""
    return f" ({modality})" if len(asked.direction.wanted) > 1 else ""


def _learnt_views(
    maker: Maker,
    facts: readers.Facts,
    modality: Modality,
    made: list[Record],
    real: list[Record],
    taught: list[Record],
    network: usefulness.Network,
    seed: int,
    suffix: str,
) -> Figure:
    views = {"made": readers.views(modality, made), "real": readers.views(modality, real)}
    views["taught"] = readers.views(modality, taught)

    def accuracy(source: str, fact: str, labels: Sequence[str | None]) -> usefulness.Accuracy:
        rows = [i for i, label in enumerate(labels) if label is not None]
        tested = [i for i, label in enumerate(facts[fact]) if label is not None]
        return usefulness.train_on_synthetic(
            views[source][rows], [str(labels[i]) for i in rows],
            views["real"][tested], [str(facts[fact][i]) for i in tested],
            network=network, seed=seed,
        )  # fmt: skip

    ours = [accuracy("made", fact, values) for fact, values in facts.items()]
    theirs = [accuracy("taught", fact, [readers.value_of(r, fact) for r in taught]) for fact in facts]
    words = network.replace("_", " ")
    value = tuple(float(np.mean([getattr(a, end) for a in ours])) for end in ("value", "low", "high"))
    return maker.figure(
        f"train on synthetic, accuracy: {words}{suffix}",
        (value[0], value[1], value[2]),
        baseline={
            "real held-out": float(np.mean([a.value for a in theirs])),
            "chance": float(np.mean([a.majority for a in ours])),
        },
        extractor=ours[0].network if len(ours) == 1 else usefulness.WORDS[network],
        samples=ours[0].tested_on,
        note=f"{_mean_of(facts)}learnt from {ours[0].trained_on} generated {NOUN[modality]}, tested on real ones, {ours[0].chosen_by}; "
        f"beside it the same network on {theirs[0].trained_on} real ones, and the most frequent answer",
    )


def _learnt_texts(
    maker: Maker,
    facts: readers.Facts,
    made: list[Record],
    real: list[Record],
    taught: list[Record],
    suffix: str,
) -> Figure:
    """The same with the reader of texts."""
    ours = text.train_reader(readers.texts_of(made), facts).read(readers.texts_of(real))
    labels = {fact: [readers.value_of(record, fact) for record in taught] for fact in facts}
    theirs = text.train_reader(readers.texts_of(taught), labels).read(readers.texts_of(real))
    right = {
        name: np.array(
            [
                np.mean([read[fact][i] == v[i] for fact, v in facts.items() if v[i] is not None])
                for i in range(len(real))
            ]
        )
        for name, read in (("ours", ours), ("theirs", theirs))
    }
    most = [max(values.count(v) for v in set(values)) / len(values) for values in facts.values()]
    return maker.figure(
        f"train on synthetic, accuracy: logistic regression on words{suffix}",
        agreement.mean_interval(right["ours"], 300, maker.seed),
        baseline={"real held-out": float(right["theirs"].mean()), "chance": float(np.mean(most))},
        extractor="logistic regression on hashed words",
        samples=len(real),
        note=f"{_mean_of(facts)}learnt from {len(made)} generated texts, tested on real ones; beside it the same on "
        f"{len(taught)} real ones, and the most frequent answer",
    )


def _mean_of(facts: readers.Facts) -> str:
    return f"mean of {len(facts)} facts; " if len(facts) > 1 else ""


def _too_few(direction: Direction, public: Sequence[Record]) -> str:
    needed: list[Modality] = [name for name in MODALITIES if name in (*direction.given, *direction.wanted)]
    usable = sum(all(has(record, name) for name in needed) for record in public)
    what = " and a ".join({"text": "text", "image": "picture", "audio": "sound"}[name] for name in needed)
    return (
        f"Not measured, {direction}: {usable} public records with a {what} are too few "
        f"(at least {FEWEST} in each half). Set data.public_units higher."
    )
