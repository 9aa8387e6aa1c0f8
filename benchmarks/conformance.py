"""How often right trainers are convicted, and wrong ones on their row: the table of docs/conformance.md, with its command.

    python benchmarks/conformance.py --repetitions 100 --out benchmarks/results/conformance.md

A pass states a false-conviction rate of 1e-3. Each repetition is a whole pass with another seed. Runs from a checkout, with the
tests' adapters and museum.
"""

import argparse
import importlib
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from tests.auditing import museum  # noqa: E402
from tests.auditing.adapters import loop, opacus_engine, ours  # noqa: E402

from sfumato.auditing.conformance import Trainer, suite  # noqa: E402
from sfumato.auditing.conformance.outcome import FAILURES  # noqa: E402

OFTEN = ("a plain loop", "sfumato, flat")


def right() -> dict[str, Callable[[], Trainer]]:
    return {
        "a plain loop": loop.trainer,
        "a plain loop over persons": loop.of_persons,
        **{f"sfumato, {kind}": (lambda kind=kind: ours.trainer(kind)) for kind in ours.KINDS},
        "Opacus, guarded against NaN": opacus_engine.trainer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repetitions", type=int, default=100, help="of a plain loop and of sfumato with flat clipping"
    )
    parser.add_argument("--others", type=int, default=100, help="repetitions of the other right trainers")
    parser.add_argument("--museum", type=int, default=5, help="repetitions of every wrong trainer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    options = f"--repetitions {arguments.repetitions} --others {arguments.others} --museum {arguments.museum}"
    lines = [
        "# Conformance: who is convicted",
        "",
        f"`python benchmarks/conformance.py {options}` · every pass has another seed and states a false-conviction rate of "
        f"{suite.FALSE_ALARM:g}. Positive controls are made in the first pass of each; they change no conviction.",
        "",
        "| right trainer | passes | convicted | rows consistent | inconclusive | processor s a pass |",
        "|---|---|---|---|---|---|",
    ]
    passes = convictions = 0
    for name, make in right().items():
        count = arguments.repetitions if name in OFTEN else arguments.others
        first = suite.audit(make(), seed=1000)
        convicted = bool(first.convicted)
        before = time.process_time()
        for seed in range(1, count):
            convicted += bool(suite.audit(make(), seed=1000 + seed, controls=False).convicted)
        seconds = (time.process_time() - before) / max(count - 1, 1)
        passes, convictions = passes + count, convictions + convicted
        consistent = sum(row.verdict == "CONSISTENT" for row in first.rows)
        open_ = ", ".join(str(row.number) for row in first.rows if row.verdict == "INCONCLUSIVE")
        told = f"| {name} | {count} | {convicted} | {consistent} | {open_} | {seconds:.1f} |"
        lines.append(told)
        print(told, file=sys.stderr, flush=True)
    lines += [
        "",
        f"{convictions} false convictions in {passes} passes; {passes * suite.FALSE_ALARM:g} are allowed on average.",
        "",
        "| wrong trainer | row | failure | convicted there | also on | claimed ε | true ε |",
        "|---|---|---|---|---|---|---|",
    ]
    pieces = [importlib.import_module(f"tests.auditing.museum.{m.name}") for m in pkgutil.iter_modules(museum.__path__)]
    for piece in sorted(pieces, key=lambda piece: (piece.RIGHT_ROW, piece.__name__)):
        rows: Counter[int] = Counter()
        for seed in range(arguments.museum):
            rows.update(suite.audit(piece.wrong(), seed=2000 + seed, controls=False).convicted)
        hits = rows.pop(piece.RIGHT_ROW, 0)
        also = ", ".join(map(str, sorted(rows))) or "-"
        name = piece.__name__.rpartition(".")[2]
        claimed, true = (_epsilon(value) for value in (piece.CLAIMED_EPSILON, piece.TRUE_EPSILON))
        where = f"{piece.RIGHT_ROW} | {FAILURES[piece.RIGHT_ROW]} | {hits} of {arguments.museum} | {also}"
        told = f"| `{name}` | {where} | {claimed} | {true} |"
        lines.append(told)
        print(told, file=sys.stderr, flush=True)
    lines += ["", f"{time.process_time() - started:.0f} s of processor time, one thread, torch {torch.__version__}."]
    text = "\n".join(lines) + "\n"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


def _epsilon(value: float | None) -> str:
    return "see its file" if value is None else "∞" if value == float("inf") else f"{value:g}"


if __name__ == "__main__":
    main()
