"""What accounting costs: processor seconds of epsilon, of its curve and of a calibration; PLD beside RDP.

    .venv/bin/python benchmarks/accounting.py --out benchmarks/results/accounting.md

Every figure is measured with empty caches. Epsilon is of T Poisson-sampled Gaussian steps at rate q and noise multiplier
sigma, on the grid of 1e-4 that decides (finer where the steps ask for it). The calibration finds the sigma that spends
this epsilon. "sigma by RDP" is what the same epsilon would need if RDP decided. "curve" is all of its seven deltas. One thread.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from sfumato.privacy import accounting, gaussian
from sfumato.privacy.accounting import Adjacency, Event

CASES: list[tuple[float, float, int, float, Adjacency]] = [  # q, sigma, T, delta, adjacency
    (0.01, 1.0, 10_000, 1e-5, "add_or_remove"),
    (0.01, 1.0, 100_000, 1e-5, "add_or_remove"),
    (0.001, 0.7, 100_000, 1e-6, "add_or_remove"),
    (0.05, 4.0, 100_000, 1e-6, "add_or_remove"),
    (0.002, 1.5, 100_000, 1e-7, "add_or_remove"),
    (0.001, 20.0, 100_000, 1e-6, "add_or_remove"),
    (4096 / 60_000, 2.38, 4_394, 1e-5, "add_or_remove"),
    (0.01, 1.0, 100_000, 1e-5, "zero_out"),
    (0.01, 2.0, 100_000, 1e-5, "replace_one"),
]


def forget() -> None:
    for held in vars(accounting).values():
        if hasattr(held, "cache_clear"):
            held.cache_clear()
    gaussian.epsilon_of(1.0, 1e-5)  # imports


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    forget()
    before = time.process_time()
    value = function()
    return time.process_time() - before, value


def row(q: float, sigma: float, steps: int, delta: float, adjacency: Adjacency) -> list[str]:
    events = [Event(sampling_rate=q, noise_multiplier=sigma, count=steps)]
    pld_time, pld = timed(lambda: accounting.epsilon(events, delta, adjacency=adjacency))
    rdp_time, rdp = timed(lambda: accounting.epsilon(events, delta, "rdp", adjacency))
    curve_time, _ = timed(lambda: accounting.curve(events, adjacency=adjacency))
    of = {"epsilon": pld, "delta": delta, "sampling_rate": q, "steps": steps, "adjacency": adjacency}
    calibrate_time, found = timed(lambda: accounting.calibrate(**of))
    by_rdp = "" if rdp is None else f"{sigma_by_rdp(pld, q, steps, delta):.4g}"
    return [
        f"{q:.4g}", f"{sigma:g}", f"{steps:,}", f"{delta:g}", adjacency, f"{pld:.4f}", "none" if rdp is None else f"{rdp:.4f}",
        f"{pld_time:.2f}", f"{rdp_time:.2f}", f"{curve_time:.2f}", f"{found:.5g}", f"{calibrate_time:.2f}", by_rdp,
    ]  # fmt: skip


def sigma_by_rdp(target: float, q: float, steps: int, delta: float) -> float:
    low, high = 0.05, 100.0
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        spent = accounting.epsilon([Event(sampling_rate=q, noise_multiplier=middle, count=steps)], delta, "rdp")
        low, high = (low, middle) if spent is not None and spent <= target else (middle, high)
    return high


def table(rows: Sequence[Sequence[str]]) -> str:
    head = ["q", "σ", "T", "δ", "adjacency", "ε by PLD", "ε by RDP", "s of PLD", "s of RDP", "s of the curve"]
    head += ["σ found", "s of calibration", "σ by RDP"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    chosen = parser.parse_args()
    accounting.epsilon([Event(sampling_rate=0.5, noise_multiplier=3.0)], 1e-5)  # imports
    rows = []
    for case in CASES[: chosen.cases]:
        rows.append(row(*case))
        print(" ".join(rows[-1]), flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "dp-accounting"))
    text = (
        "# What accounting costs\n\n"
        f"`.venv/bin/python benchmarks/accounting.py --out {chosen.out or 'FILE'}`, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}. "
        "Processor seconds with empty caches, "
        "one thread; a calibration must take at most 20 for 10^5 steps.\n\n" + table(rows) + "\n"
    )
    print(text)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
