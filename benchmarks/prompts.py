"""Prompts learnt by sites together, at equal true epsilon: DP-FPL, with and without its residual, PromptFL, FedOTP and FedPGP.

    nice .venv/bin/python benchmarks/prompts.py --out benchmarks/results/prompts.md

CLIP's weights cannot be had here, so the frozen encoders are a small pair (``sfumato.federation.prompts.small``) trained on public
captions of 6,000 pictures of mnist and fashion-mnist (``sfumato data fetch`` first). Each site has four classes that no other has, and
its own scanner, which turns or mirrors its pictures: other ones than the public. Picture features are cached. All methods run on the
same federation (record_level, every site in every round), from the same first prompts, with the same plan: Poisson samples, clip per
record and block, one joint event a step, so the same epsilon by PLD, which the sites' ledgers confirm.

local: a site's prompt on its own classes, held-out pictures of its own scanner, told apart from each other. neighbour: on another
site's classes and scanner, the mean over the others. Learning rates are chosen for each row from the same small grid by local
accuracy on seeds that the table does not use; that choice is not private, and the same help for every method.

The last table asks when the residual matters: the same training at sites whose scanners turn their pictures, and at sites whose pictures
are as the public ones are, so that the prompt written by hand is nearly right already and there is something to spoil.

What was written by hand of the tables stands in ``prompts-said.md`` beside the page, and is put at its end.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import ndimage

from sfumato.data.examples import CLOTHES, DIGITS, read_idx
from sfumato.data.fetch import fetch
from sfumato.federation import simulate, site_memory
from sfumato.federation.local_training import load_trained
from sfumato.federation.policy import SitePolicy
from sfumato.federation.prompts import small
from sfumato.federation.prompts.methods import PromptModel
from sfumato.federation.prompts.settings import HOME, DpFpl, FedOTP, FedPGP, Method, PromptFL, PromptSettings
from sfumato.federation.prompts.training import PromptSteps
from sfumato.federation.settings import FederationSettings
from sfumato.federation.sites import Site
from sfumato.privacy.plan import DpSgd, NotPrivate, TrainingPlan
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable

NAMES = (*DIGITS["en"], *CLOTHES["en"])
CAPTIONS = ("a picture of {}", "{}")
SCANNERS = (
    lambda x: ndimage.rotate(x, 60, axes=(1, 2), reshape=False, order=1),
    lambda x: x[:, ::-1].copy(),
    lambda x: ndimage.rotate(x, -60, axes=(1, 2), reshape=False, order=1),
)
CLASSES = tuple((2 * k, 2 * k + 1, 10 + 2 * k, 11 + 2 * k) for k in range(len(SCANNERS)))
PUBLIC, PER_CLASS, TEST_PER_CLASS = 3000, 250, 100
BATCH, ROUNDS, LOCAL_STEPS, DELTA, CLIP = 100, 10, 3, 1e-4, 0.2
TOKENS, WIDTH, RANK = 8, 32, 4
EPSILONS = (None, 8.0, 2.0, 0.5, 0.1)
RATES = {True: (0.3, 1.0, 3.0), False: (0.03, 0.1, 0.3)}  # gradients with a clip, and without


@dataclass(frozen=True)
class Row:
    name: str
    method: Method
    releases: str = "each"
    rounds: int = ROUNDS


ROWS = (
    Row("DP-FPL", DpFpl(rank=RANK)),
    Row("DP-FPL, no residual: the rest of p_L", DpFpl(rank=RANK, residual="dropped")),
    Row("DP-FPL, no residual: as the paper's code", DpFpl(rank=RANK, residual="replaced")),
    Row("FedPGP", FedPGP(rank=RANK)),
    Row("FedOTP", FedOTP(iterations=20)),
    Row("PromptFL", PromptFL()),
    Row("DP-FPL, one release", DpFpl(rank=RANK), "once"),
)


# -- data --


def pictures(split: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for number, name in enumerate(("mnist", "fashion-mnist")):
        folder = Path(fetch(name)["path"])
        found[0].append(read_idx(folder / f"{split}-images-idx3-ubyte"))
        found[1].append(read_idx(folder / f"{split}-labels-idx1-ubyte").astype(np.int64) + 10 * number)
    return found


def encoders(steps: int, cache: Path | None) -> small.SmallEncoders:
    sizes = {"width": WIDTH, "features": 16, "layers": 1}
    if cache is not None and cache.is_file():
        words = [word for caption in CAPTIONS for name in NAMES for word in small.words_of(caption.format(name))]
        model = small.SmallEncoders(words, **sizes)
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.requires_grad_(False).eval()
    images, labels = pictures("train")
    shown = np.concatenate([x[:PUBLIC] for x in images])
    told = [CAPTIONS[i % 2].format(NAMES[c]) for i, c in enumerate(np.concatenate([y[:PUBLIC] for y in labels]))]
    model = small.trained(torch.from_numpy(shown).float()[:, None] / 255, told, steps=steps, **sizes)
    if cache is not None:
        torch.save(model.state_dict(), cache)
    return model


@dataclass(frozen=True)
class Data:
    """Of one site: cached features, and labels numbered as in its classes."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def sites_data(model: small.SmallEncoders, scanners: Sequence[Callable[[np.ndarray], np.ndarray]]) -> list[Data]:
    out = []
    for classes, scanner in zip(CLASSES, scanners, strict=True):
        parts = []
        for split, first, count in (("train", PUBLIC, PER_CLASS), ("t10k", 0, TEST_PER_CLASS)):
            images, labels = pictures(split)
            shown, numbers = [], []
            for number, c in enumerate(classes):
                x, y = images[c // 10], labels[c // 10]
                where = np.flatnonzero(y == c)
                where = where[where >= first][:count]
                shown.append(x[where])
                numbers += [number] * len(where)
            parts.append((model.look(list(scanner(np.concatenate(shown))[..., None])), torch.tensor(numbers)))
        out.append(Data(*parts))
    return out


# -- one federation --


@lru_cache
def plan_for(epsilon: float | None, population: int, rounds: int) -> TrainingPlan:
    values = {"population": population, "expected_batch_size": float(BATCH), "steps": rounds * LOCAL_STEPS}
    if epsilon is None:
        return NotPrivate(**values)
    return DpSgd.calibrated(epsilon=epsilon, **values, delta=DELTA, max_grad_norm=CLIP)


def federated(
    model: small.SmallEncoders, data: Sequence[Data], row: Row, epsilon: float | None, rate: float, seed: int
) -> tuple[float, float, float | None]:
    """(local accuracy, neighbour accuracy, the largest epsilon in the sites' ledgers)."""
    settings = PromptSettings(
        method=row.method, tokens=TOKENS, learning_rate=rate, local_learning_rate=rate, seed=seed,
        releases="once" if row.releases == "once" else "each",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sites = []
        for k, own in enumerate(data):
            plan = plan_for(epsilon, len(own.train[1]), row.rounds)
            parts = settings.parts(CLIP)
            if isinstance(plan, DpSgd) and parts:
                plan = replace(plan, parts=parts, max_grad_norm=CLIP * len(parts) ** 0.5)
            units = [f"{k}-{i:05d}" for i in range(len(own.train[1]))]
            sites.append(
                Site(
                    name=f"site-{k}",
                    table=UnitTable({"image": own.train[0], "label": own.train[1]}, units),
                    plan=plan,
                    ledger=Path(folder) / f"site-{k}" / "ledger.db",
                    policy=SitePolicy(allow_not_private=epsilon is None),
                    build=partial(PromptModel, model, [NAMES[c] for c in CLASSES[k]], settings),
                )
            )
        home = tuple(name for name in HOME if name in sites[0].build().trained())  # pyright: ignore[reportOptionalCall]
        work = simulate.work_of(
            sites,
            build=sites[0].build,  # pyright: ignore[reportArgumentType]
            train_steps=PromptSteps(TestRandom(seed)),
            settings=FederationSettings(sites=len(sites), rounds=row.rounds, local_steps=LOCAL_STEPS, home=home),
            random=lambda: TestRandom(seed),
        )
        result = simulate.simulate(sites, work, run="prompts", chance=TestRandom(seed))
        own_accuracy, others = [], []
        for k, site in enumerate(sites):
            for j, other in enumerate(data):
                trained = PromptModel(model, [NAMES[c] for c in CLASSES[j]], settings)
                load_trained(trained, result.state, home=site_memory.kept_at_home(site))
                accuracy = trained.accuracy(*other.test, trained.cut(TestRandom(seed)))
                (own_accuracy if j == k else others).append(accuracy)
        return float(np.mean(own_accuracy)), float(np.mean(others)), result.epsilon


def untrained(model: small.SmallEncoders, data: Sequence[Data], row: Row, seed: int) -> float:
    """Local accuracy of the first prompts, which are drawn from a public seed: what training starts from."""
    settings = PromptSettings(method=row.method, tokens=TOKENS, seed=seed)
    found = []
    for classes, of in zip(CLASSES, data, strict=True):
        first = PromptModel(model, [NAMES[c] for c in classes], settings)
        found.append(first.accuracy(*of.test, first.cut(TestRandom(seed))))
    return float(np.mean(found))


def by_hand(model: small.SmallEncoders, data: Sequence[Data]) -> tuple[float, float]:
    own = []
    for classes, of in zip(CLASSES, data, strict=True):
        told = model.hand_written([NAMES[c] for c in classes])
        own.append(float(((of.test[0][:, 0] @ told.T).argmax(1) == of.test[1]).float().mean()))
    return float(np.mean(own)), float(np.mean(own))


# -- the table --

# -- when the residual matters --

RANKS = (1, 4, 8)
RESIDUAL_EPSILONS = (None, 0.5, 0.1)
RESIDUALS = ("kept", "dropped", "replaced")
LONG, LONG_EPSILON = 100, 0.5
PLAIN = (lambda x: x,) * len(SCANNERS)


def residual_rows() -> list[Row]:
    return [Row(f"{how}, rank {k}", DpFpl(rank=k, residual=how)) for k in RANKS for how in RESIDUALS]


Values = tuple[list[float], list[float], float | None, float]  # local, neighbour, by seed; epsilon; learning rate
Found = dict[tuple[str, float | None], Values]
_shared: list[tuple[small.SmallEncoders, list[Data]]] = []  # of a worker


def _share(model: small.SmallEncoders, data: list[Data]) -> None:
    torch.set_num_threads(1)
    _shared[:] = [(model, data)]


def _cell(task: tuple[Row, float | None, int, int]) -> tuple[Values, dict[float, float], float]:
    """One cell of the table, what was tried for it, and the processor time."""
    row, epsilon, tuning_seeds, seeds = task
    model, data = _shared[0]
    began, tried = time.process_time(), {}
    for rate in RATES[epsilon is not None]:
        runs = [federated(model, data, row, epsilon, rate, 1000 + seed)[0] for seed in range(tuning_seeds)]
        tried[rate] = round(float(np.mean(runs)), 3)
    best = max(tried, key=lambda rate: tried[rate])
    runs = [federated(model, data, row, epsilon, best, seed) for seed in range(seeds)]
    values = ([r[0] for r in runs], [r[1] for r in runs], runs[0][2], best)
    return values, tried, time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--encoder-steps", type=int, default=200)
    parser.add_argument("--encoders", type=Path, help="a file: the encoders of an earlier call, or where to keep them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--long", action="store_true", help=f"instead: the residual after {LONG} rounds at epsilon {LONG_EPSILON}"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.kept, began = given.encoders is not None and given.encoders.is_file(), time.process_time()
    model = encoders(given.encoder_steps, given.encoders)
    data = sites_data(model, SCANNERS)
    hand = by_hand(model, data)
    print(f"encoders and features: {time.process_time() - began:.0f} s; by hand: {hand[0]:.3f}", flush=True)
    if given.long:
        page = long_report(model, {"turned": data, "as public": sites_data(model, PLAIN)}, given, began)
        print(page)
        if given.out is not None:
            given.out.write_text(page, encoding="utf-8")
        return
    found: Found = {}
    tasks = [(row, epsilon, given.tuning_seeds, given.seeds) for epsilon in EPSILONS for row in ROWS]
    spent = cells(found, tasks, model, data, given.processes)
    first = {row.name: [untrained(model, data, row, seed) for seed in range(given.seeds)] for row in ROWS}
    page = report(found, first, hand, given, time.process_time() - began + spent)
    places = {"turned": data, "as public": sites_data(model, PLAIN)}
    page += "\n" + residual_report(model, places, given, began - spent)
    print(page)
    if given.out is not None:
        said = given.out.with_name(f"{given.out.stem}-said.md")
        page += "\n" + said.read_text(encoding="utf-8") if said.is_file() else ""
        given.out.write_text(page, encoding="utf-8")


def cells(
    found: Found,
    tasks: Sequence[tuple[Row, float | None, int, int]],
    model: small.SmallEncoders,
    data: list[Data],
    processes: int,
) -> float:
    """Fills ``found``. Returns: processor seconds of the workers."""
    whole = 0.0
    with ProcessPoolExecutor(processes, initializer=_share, initargs=(model, data)) as pool:
        for (row, epsilon, *_), (values, tried, spent) in zip(tasks, pool.map(_cell, tasks), strict=True):
            found[row.name, epsilon] = values
            whole += spent
            means = ", ".join(f"{np.mean(v):.3f}" for v in values[:2])
            print(f"{row.name}, epsilon {epsilon}: {tried} -> {means}; {whole:.0f} s", flush=True)
    return whole


def residual_report(
    model: small.SmallEncoders, places: dict[str, list[Data]], given: argparse.Namespace, began: float
) -> str:
    rows = residual_rows()
    said = ["## When the residual matters: local classes", ""]
    head = "| pictures | by hand | untrained | residual |"
    for e in RESIDUAL_EPSILONS:
        told = "no privacy" if e is None else f"ε = {e:g}"
        head += "".join(f" {told}, rank {k} |" for k in RANKS)
    said += [head, "|" + " --- |" * (head.count("|") - 1)]
    for name, data in places.items():
        found: Found = {}
        tasks = [(row, epsilon, given.tuning_seeds, given.seeds) for epsilon in RESIDUAL_EPSILONS for row in rows]
        began -= cells(found, tasks, model, data, given.processes)
        for how in RESIDUALS:
            first = [
                untrained(model, data, Row("", DpFpl(rank=RANK, residual=how)), seed) for seed in range(given.seeds)
            ]
            line = f"| {name} | {100 * by_hand(model, data)[0]:.1f} | {_mean(first)} | {how} |"
            for e in RESIDUAL_EPSILONS:
                line += "".join(f" {_mean(found[f'{how}, rank {k}', e][0])} |" for k in RANKS)
            said.append(line)
    said += ["", f"With this table {time.process_time() - began:.0f} s of processor time in all.", ""]
    return "\n".join(said)


def long_report(
    model: small.SmallEncoders, places: dict[str, list[Data]], given: argparse.Namespace, began: float
) -> str:
    rows = [Row(how, DpFpl(rank=RANK, residual=how), rounds=LONG) for how in RESIDUALS]
    said = [
        f"# The residual of DP-FPL after {LONG} rounds", "",
        f"nice .venv/bin/python benchmarks/prompts.py --long --seeds {given.seeds} --out benchmarks/results/prompts-long.md", "",
        f"As prompts.md, rank {RANK} of {TOKENS} tokens, {LONG} rounds of {LOCAL_STEPS} steps, epsilon = {LONG_EPSILON}, "
        f"mean ± standard error of {given.seeds} seeds.", "",
        "| pictures | residual | learning rate | local classes | neighbour classes |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, data in places.items():
        found: Found = {}
        tasks = [(row, LONG_EPSILON, given.tuning_seeds, given.seeds) for row in rows]
        began -= cells(found, tasks, model, data, given.processes)
        for row in rows:
            own, others, _, rate = found[row.name, LONG_EPSILON]
            said.append(f"| {name} | {row.name} | {rate:g} | {_mean(own)} | {_mean(others)} |")
    return "\n".join([*said, "", f"{time.process_time() - began:.0f} s of processor time.", ""])


def _mean(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


BASELINES = ("FedPGP", "FedOTP", "PromptFL")


def report(
    found: Found, first: dict[str, list[float]], hand: tuple[float, float], given: argparse.Namespace, seconds: float
) -> str:
    head, _, rest = (__doc__ or "").partition("\n\n")
    said = [f"# {head}", "", rest.strip(), ""]
    kept = " (the encoders were kept from an earlier call)" if given.kept else ""
    said.append(
        f"{len(CLASSES)} sites, {4 * PER_CLASS} records each; {ROUNDS} rounds of {LOCAL_STEPS} steps, B = {BATCH}, delta = {DELTA:g}, "
        f"add or remove one; {TOKENS} x {WIDTH} context vectors, rank {RANK}; clip {CLIP:g}; learning rates {RATES[True]}, without privacy "
        f"{RATES[False]}. Mean ± standard "
        f"error of {given.seeds} seeds, per cent. The prompt written by hand: {100 * hand[0]:.1f}. {seconds:.0f} s of processor time{kept}."
    )
    for title, which in (("local classes", 0), ("neighbour classes", 1)):
        before = " untrained |" if which == 0 else ""
        said += ["", f"## {title}", "", f"| |{before} " + " | ".join(_title(found, e) for e in EPSILONS) + " |"]
        said.append("|" + " --- |" * (len(EPSILONS) + 1 + (which == 0)))
        for row in ROWS:
            columns = [first[row.name]] if which == 0 else []
            columns += [found[row.name, e][0] if which == 0 else found[row.name, e][1] for e in EPSILONS]
            said.append(f"| {row.name} | " + " | ".join(map(_mean, columns)) + " |")
    said += ["", "## The paper's order, on local classes", "", *_orders(found), ""]
    return "\n".join(said)


def _title(found: Found, epsilon: float | None) -> str:
    spent = found["DP-FPL", epsilon][2]
    return "no privacy" if spent is None else f"ε = {spent:.3f}"


def _orders(found: Found) -> list[str]:
    """Claims of the paper, held against this table: a difference counts from two standard errors on."""
    said = []
    for epsilon in EPSILONS:
        ours = np.array(found["DP-FPL", epsilon][0])
        verdicts = []
        for name in (*BASELINES, ROWS[1].name, ROWS[2].name):
            other = np.array(found[name, epsilon][0])
            gap = 100 * (ours - other)  # the same seeds
            error = gap.std(ddof=1) / len(gap) ** 0.5
            word = "above" if gap.mean() > 2 * error else "below" if gap.mean() < -2 * error else "level with"
            verdicts.append(f"{word} {name} ({gap.mean():+.1f} ± {error:.1f})")
        said.append(f"- {_title(found, epsilon)}: DP-FPL is {'; '.join(verdicts)}.")
    return said


if __name__ == "__main__":
    main()
