"""What a federation costs in quality, at equal epsilon: tables of mechanisms, of unlike sites, of hostile ones.

    .venv/bin/python benchmarks/federation.py --rows central unlike-8 emoji-unlike-8 --out benchmarks/results/federation

Two benches: generated patients (``federation_clinic.py``) and emoji (``federation_emoji.py``, whose rows are named emoji-...), each with
one small model. Every row changes one thing. Each is written as it is done, so a benchmark that was cut goes on (``--again``
measures anew). A row that is hostile is so in ``hostile.py``, by changing what one site replies; no recipe can ask for that.
Settings were chosen on these data: not charged, and declared public. Prints Markdown; writes a JSON for each row and the table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import federation_clinic
import federation_emoji
import torch

from sfumato import building
from sfumato.federation.local_training import load_trained, trained_state

BENCHES: tuple[Any, ...] = (federation_clinic, federation_emoji)
ROWS = {f"{bench.PREFIX}{name}": (bench, name) for bench in BENCHES for name in (*bench.ROWS, bench.NOISE)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    arguments.add_argument(
        "--work",
        type=Path,
        default=Path("runs/federation-benchmark"),
        help="ledgers, while a row runs; weights",
    )
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/federation"))
    arguments.add_argument("--again", action="store_true", help="measure rows anew that are done")
    arguments.add_argument(
        "--train-only", action="store_true", help="keep weights in --work, for a later call to measure"
    )
    given = arguments.parse_args()
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    for module in BENCHES:
        names = [name for name in given.rows if ROWS[name][0] is module]
        wanted = [name for name in names if given.again or not (given.out / f"{name}.json").is_file()]
        if not wanted:
            continue
        say(f"reading the data: {module.__name__}")
        bench = module.Bench(given.work)
        for name in wanted:
            row, weights = ROWS[name][1], given.work / f"{name}.pt"
            if row != module.NOISE and (given.again or not weights.is_file()):
                model, found = bench.train(row, module.ROWS[row])
                torch.save((trained_state(model), found), weights)
                say(f"{name}: trained, {found['processor_seconds']:.0f} s of processor time")
            if given.train_only:
                continue
            found = bench.noise() if row == module.NOISE else measured(bench, weights)
            say(f"{name}: kappa {found['kappa']:.3f}")
            text = json.dumps({**found, "row": row}, indent=1, sort_keys=True) + "\n"
            (given.out / f"{name}.json").write_text(text, encoding="utf-8")
            (given.out / "table.md").write_text(table(given.out), encoding="utf-8")
    (given.out / "table.md").write_text(table(given.out), encoding="utf-8")
    print(table(given.out))


def measured(bench: Any, weights: Path) -> dict[str, Any]:
    """Of weights that were trained, by this process or by another one."""
    state, found = torch.load(weights, weights_only=True)
    model = building.build(bench.recipe)
    load_trained(model, state, home={})
    return {**found, **bench.measure(model.eval())}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(out: Path) -> str:
    """Every row that is done, in the order of the rows."""
    return "\n\n".join("\n".join(bench.table(out)) for bench in BENCHES) + "\n"


if __name__ == "__main__":
    main()
