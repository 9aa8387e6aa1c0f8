"""What the ledger adds to a step, how large it grows, and how long it takes to check one of a million steps.

    .venv/bin/python benchmarks/ledger.py --out benchmarks/results/ledger.md

Steps are sleeps, so that the processor time is the ledger's alone. The long ledgers are made without waiting for the disk
(their steps would take hours), with the blocks that the measured times ask for; what is measured of them is size and reading.
"""

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from pathlib import Path

from sfumato.privacy.ledger import Ledger, events_of_jsonl, export_jsonl, run, verify_chain
from sfumato.privacy.plan import DpSgd

STEPS = 1_000_000


def plan() -> DpSgd:
    return DpSgd(population=10**6, expected_batch_size=1000.0, steps=STEPS, noise_multiplier=20.0, delta=1e-7)


class Clock:
    """A clock on which every step and every write takes as long as was measured, and no time passes."""

    def __init__(self, write: float) -> None:
        self.now, self.write = 0.0, write

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.8e9 + self.now


def live(folder: Path, step: float, seconds: float, *, blocks: bool, account: bool = True) -> dict[str, float]:
    """Real steps of so many seconds each, with every write on the disk. What the ledger took of each."""
    event, waited, steps = plan().event(1), 0.0, int(seconds / step)
    with Ledger.open(
        folder / "ledger.db", run="r", plan=plan(), account=folder / "account.db" if account else None
    ) as ledger:
        processor, before = time.process_time(), ledger.sequence
        for number in range(steps):
            began = time.perf_counter()
            sequence = ledger.reserve(event, number, steps - number if blocks else 1)
            waited += time.perf_counter() - began
            time.sleep(step)
            began = time.perf_counter()
            ledger.commit(sequence)
            waited += time.perf_counter() - began
        processor = time.process_time() - processor
        entries = ledger.sequence - before
    asleep = _sleeping(step, steps)
    return {
        "steps": steps,
        "wall": waited / steps,
        "processor": (processor - asleep) / steps,
        "share": waited / steps / step,
        "entries": entries,
    }


def _sleeping(step: float, steps: int) -> float:
    """Processor time of the sleeps themselves, from a tenth of them."""
    few = max(1, steps // 10)
    before = time.process_time()
    for _ in range(few):
        time.sleep(step)
    return (time.process_time() - before) * steps / few


def long(folder: Path, step: float, write: float, *, blocks: bool) -> dict[str, float]:
    """A ledger of a million steps, written without syncs, then read as anybody would."""
    clock, real, append = Clock(write), run.time, Ledger._append
    run.time = clock  # type: ignore[assignment]

    def quick(self: Ledger, bodies: object, **how: object) -> None:
        clock.now += clock.write
        append(self, bodies, **how)  # type: ignore[arg-type]

    Ledger._append = quick  # type: ignore[method-assign]
    try:
        with Ledger.open(folder / "ledger.db", run="r", plan=plan()) as ledger:
            ledger._connection.execute("PRAGMA synchronous = OFF")
            event = plan().event(1)
            for number in range(STEPS):
                ledger.commit(ledger.reserve(event, number, STEPS - number if blocks else 1))
                clock.now += step
    finally:
        run.time, Ledger._append = real, append  # type: ignore[assignment, method-assign]
    path = folder / "ledger.db"
    connection = sqlite3.connect(path)
    (entries,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    connection.close()
    began, processor = time.perf_counter(), time.process_time()
    assert verify_chain(path)["valid"]
    verified, processor = time.perf_counter() - began, time.process_time() - processor
    began = time.perf_counter()
    text = export_jsonl(path)
    exported = time.perf_counter() - began
    began = time.perf_counter()
    assert events_of_jsonl(text) == [plan().event(STEPS)]
    return {
        "entries": entries,
        "bytes": path.stat().st_size,
        "verify": verified,
        "processor": processor,
        "export": exported,
        "export_bytes": len(text),
        "import": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0, help="of every live measurement")
    arguments = parser.parse_args()
    lines = [
        "# What the ledger costs",
        "",
        "    .venv/bin/python benchmarks/ledger.py --out benchmarks/results/ledger.md",
        "",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, SQLite "
        f"{sqlite3.sqlite_version}. Every step is reserved before it begins and committed after it; the account is charged too.",
        "",
        "| step | entries | steps | entries written | wall time added, ms a step | share of the step | processor, ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    write = 0.0
    for step in (0.005, 0.02, 0.1):
        for blocks in (False, True):
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # the disk of the runs, not one in memory
                found = live(Path(folder), step, arguments.seconds, blocks=blocks)
            write = max(write, found["wall"]) if not blocks else write
            lines.append(
                f"| {step * 1000:.0f} ms | {'in blocks' if blocks else 'one a step'} | {found['steps']} | {found['entries']} | "
                f"{found['wall'] * 1000:.3f} | {found['share']:.2%} | {found['processor'] * 1000:.3f} |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        f"A ledger of {STEPS:,} steps of 20 ms, with {write * 1000:.1f} ms for a write, the slowest mean above:",
        "",
        "| entries | number | file | verify: wall, processor | export, its size | reading the export |",
        "|---|---|---|---|---|---|",
    ]
    for blocks in (True, False):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            found = long(Path(folder), 0.02, write, blocks=blocks)
        lines.append(
            f"| {'in blocks' if blocks else 'one a step'} | {found['entries']:,.0f} | {found['bytes'] / 2**20:.1f} MiB | "
            f"{found['verify']:.1f} s, {found['processor']:.1f} s | {found['export']:.1f} s, {found['export_bytes'] / 2**10:.0f} KiB | "
            f"{found['import']:.1f} s |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
