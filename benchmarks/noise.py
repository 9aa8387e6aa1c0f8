"""What noise costs: processor time for a normal of each source against torch.randn, in one run.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/noise.py --out benchmarks/results/noise.md

Every source draws the same count, round after round, interleaved. Prints Markdown: nanoseconds of processor time for each number,
and the ratio to torch.randn in float64 and in float32, medians over the rounds [min, max]. The float mitigation (grid, rounding,
adding the sum exactly) is part of every row of ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.privacy.correlated import Stream, toeplitz
from sfumato.privacy.discrete import discrete
from sfumato.privacy.noise import GaussianSource, gaussian
from sfumato.randomness import SecretRandom

DOUBLE, SINGLE = "torch.randn, float64", "torch.randn, float32"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=2**20)
    arguments.add_argument("--rounds", type=int, default=31)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    candidates = sources(given.count)
    for draw in candidates.values():
        draw()  # tables, memory, and the full window of the correlated stream
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(given.rounds):
        for name, draw in candidates.items():
            began = time.process_time()
            draw()
            times[name].append((time.process_time() - began) / given.count * 1e9)
    text = "\n".join(
        [
            f"`benchmarks/noise.py --count {given.count} --rounds {given.rounds}`, one thread, torch {torch.__version__}. "
            "Processor time of one number, and its ratio to the two of torch: median [min, max].",
            "",
            "| source | ns | against randn, float64 | against randn, float32 |",
            "|---|---|---|---|",
            *(row(name, times) for name in times),
        ]
    )
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n", encoding="utf-8")


def row(name: str, times: dict[str, list[float]]) -> str:
    ratios = [
        [own / other for own, other in zip(times[name], times[reference], strict=True)]
        for reference in (DOUBLE, SINGLE)
    ]
    return f"| {name} | {cell(times[name], 1)} | {cell(ratios[0], 2)} | {cell(ratios[1], 2)} |"


def cell(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def sources(count: int) -> dict[str, Callable[[], torch.Tensor]]:
    random, sums = SecretRandom(), torch.randn(count)
    streams = {bands: Stream(toeplitz(bands, 4096), count, 1.0, GaussianSource()) for bands in (4, 16)}
    for bands, stream in streams.items():
        for _ in range(bands):
            stream.next(random)
    return {
        DOUBLE: lambda: torch.randn(count, dtype=torch.float64),
        SINGLE: lambda: torch.randn(count),
        "gaussian": lambda: gaussian(count, 1.0, random),
        "gaussian, plus a float32 sum": lambda: gaussian(count, 1.0, random, plus=sums),
        "discrete": lambda: discrete(count, 1.0, random),
        "discrete, plus a float32 sum": lambda: discrete(count, 1.0, random, plus=sums),
        "correlated, 4 bands, plus a float32 sum": lambda: streams[4].next(random, plus=sums),
        "correlated, 16 bands, plus a float32 sum": lambda: streams[16].next(random, plus=sums),
    }


if __name__ == "__main__":
    main()
