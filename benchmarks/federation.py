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

BENCHES: tuple[Any, ...] = (federation_clinic, federation_emoji)
ROWS = {f"{bench.PREFIX}{name}": (bench, name) for bench in BENCHES for name in (*bench.ROWS, bench.NOISE)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    arguments.add_argument(
        "--work",
        type=Path,
        default=Path("runs/federation-benchmark"),
        help="ledgers, while a row runs; weights of icons",
    )
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/federation"))
    arguments.add_argument("--again", action="store_true", help="measure rows anew that are done")
    given = arguments.parse_args()
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    for module in BENCHES:
        names = [name for name in given.rows if ROWS[name][0] is module]
        wanted = [name for name in names if given.again or not (given.out / f"{name}.json").is_file()]
        if not wanted:
            continue
        say(f"reading the data, training the judges: {module.__name__}")
        bench = module.Bench(given.work)
        for name in wanted:
            row = ROWS[name][1]
            found = {**(bench.noise() if row == module.NOISE else bench.measure(row, module.ROWS[row])), "row": row}
            say(f"{name}: kappa {found['kappa']:.3f}, {found.get('processor_seconds', 0):.0f} s of processor time")
            text = json.dumps(found, indent=1, sort_keys=True) + "\n"
            (given.out / f"{name}.json").write_text(text, encoding="utf-8")
            (given.out / "table.md").write_text(table(given.out), encoding="utf-8")
    (given.out / "table.md").write_text(table(given.out), encoding="utf-8")
    print(table(given.out))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(out: Path) -> str:
    """Every row that is done, in the order of the rows."""
    return "\n\n".join("\n".join(bench.table(out)) for bench in BENCHES) + "\n"


if __name__ == "__main__":
    main()
