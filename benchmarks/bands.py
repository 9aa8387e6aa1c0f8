"""How many bands? The noise of the prefix sums at equal epsilon: sigma (rises with b, as the rate b B / N does) times error (falls).

    .venv/bin/python benchmarks/bands.py --population 30000 --batch 2048 --steps 800 --epsilon 8

Prints Markdown: for each b, the calibrated sigma, the error of the strategy for sigma = 1, and their product against b = 1.
"""

import argparse

from sfumato.privacy.correlated import error, toeplitz
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.planning import automatic_delta


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--population", type=int, default=30_000)
    arguments.add_argument("--batch", type=float, default=2_048.0)
    arguments.add_argument("--steps", type=int, default=800)
    arguments.add_argument("--epsilon", type=float, default=8.0)
    arguments.add_argument("--momentum", type=float, default=0.0)
    given = arguments.parse_args()
    most = min(given.steps, int(given.population / given.batch))
    print("| bands | sigma | error for sigma = 1 | noise of the sums against b = 1 |", "|---|---|---|---|", sep="\n")
    first = None
    for bands in sorted({1, most, *(2**k for k in range(1, 12) if 2**k <= most)}):
        plan = DpSgd.calibrated(
            epsilon=given.epsilon,
            population=given.population,
            expected_batch_size=given.batch,
            steps=given.steps,
            delta=automatic_delta(given.population),
            bands=bands,
        )
        size = error(toeplitz(bands, given.steps, given.momentum))
        first = first or plan.noise_multiplier * size
        ratio = plan.noise_multiplier * size / first
        print(f"| {bands} | {plan.noise_multiplier:.3f} | {size:.2f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
