"""What a private step costs against the same step without privacy, as a ratio of processor times.

    python benchmarks/gradients.py --rows 256 2048 --rounds 15

The engines take turns within one process, in a new order each round, so that a busy machine slows all of them alike; a
ratio is taken within its round. "plain again" is the plain step a second time: how far it is from 1 is the error of the
measurement. Ours draws its noise as a release does. Opacus runs as its documentation has it, with torch's own generator
(its secure mode needs another package), on the same data. Prints Markdown.
"""

import argparse
import copy
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.records import Batch, UnitTable

MAX_GRAD_NORM, NOISE_MULTIPLIER = 1.0, 1.0
FITS_BYTES = 3 * 2**30  # an engine that would need more for its per-example gradients is left out, and said so


class Denoiser(nn.Module):
    """A residual MLP on noised vectors: (R, K, width) -> (R, K, width), K draws of noise for every row."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))
        self.last = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + nn.functional.silu(block(h))
        return self.last(h)


def losses_of(model: nn.Module, x: Tensor, draws: int) -> Tensor:
    """(R,): each row's mean over its draws."""
    noise = torch.randn(x.shape[0], draws, x.shape[1])
    return (model(x.unsqueeze(1) + noise) - noise).square().mean((1, 2))


def plain_step(model: nn.Module, x: Tensor, draws: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        losses_of(model, x, draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model: nn.Module, x: Tensor, draws: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=MAX_GRAD_NORM, noise_multiplier=NOISE_MULTIPLIER)
    engine.attach(optimizer)
    table = UnitTable({"x": x}, [str(i) for i in range(x.shape[0])])
    batches = engine.batches(table, expected_batch_size=x.shape[0], steps=10**9)  # rate 1: the same rows as the others

    def step() -> None:
        batch: Batch = next(batches)  # type: ignore[call-overload]
        losses_of(model, batch.tensors["x"], draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_step(mode: str) -> Callable[[nn.Module, Tensor, int], Callable[[], None]]:
    def make(model: nn.Module, x: Tensor, draws: int) -> Callable[[], None]:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        rows = x.shape[0]
        inner = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        options = {"noise_multiplier": NOISE_MULTIPLIER, "max_grad_norm": MAX_GRAD_NORM, "expected_batch_size": rows}
        if mode == "ghost":
            ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True)
            outer = DPOptimizerFastGradientClipping(inner, **options)

            def step() -> None:
                DPTensorFastGradientClipping(ghost, outer, losses_of(ghost, x, draws)).backward()
                outer.step()
                outer.zero_grad()

            return step
        wrapped = GradSampleModule(model, force_functorch=mode == "functorch")
        optimizer = DPOptimizer(inner, **options)

        def step() -> None:
            losses_of(wrapped, x, draws).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


ENGINES: dict[str, Callable[[nn.Module, Tensor, int], Callable[[], None]]] = {
    "plain": plain_step,
    "plain again": plain_step,
    "sfumato": our_step,
    "Opacus ghost": opacus_step("ghost"),
    "Opacus hooks": opacus_step("hooks"),
    "Opacus functorch": opacus_step("functorch"),
}
FORMS_ALL = ("Opacus hooks", "Opacus functorch")  # these hold every per-example gradient at once


def compare(rows: int, width: int, depth: int, draws: int, rounds: int) -> list[str]:
    """Lines of a Markdown table."""
    torch.manual_seed(0)
    model, x = Denoiser(width, depth), torch.randn(rows, width)
    parameters = sum(p.numel() for p in model.parameters())
    needed = rows * parameters * 4
    steps, left_out = {}, {}
    for name, make in ENGINES.items():
        if name in FORMS_ALL and needed > FITS_BYTES:
            left_out[name] = f"left out: its per-example gradients take {needed / 2**30:.0f} GiB"
            continue
        try:
            steps[name] = make(copy.deepcopy(model), x, draws)
        except ImportError as error:
            left_out[name] = f"left out: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(-2, rounds):  # two rounds to warm up
        order = list(steps)
        random.Random(round_number).shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            if round_number >= 0:
                seconds[name].append(time.process_time() - start)
    lines = [
        f"MLP denoiser, {depth} layers of {width} x {width} ({parameters:,} parameters), {rows} rows, K = {draws}, "
        f"{rounds} rounds",
        "",
        "| engine | processor time against plain, median [min, max] |",
        "|---|---|",
    ]
    for name in ENGINES:
        if name in left_out:
            lines.append(f"| {name} | {left_out[name]} |")
            continue
        if name != "plain":
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            lines.append(f"| {name} | {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 2048], help="rows of a batch, one table each")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2, help="K, noise draws for every row")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(arguments.threads)
    for rows in arguments.rows:
        lines = compare(rows, arguments.width, arguments.depth, arguments.draws, arguments.rounds)
        print("\n".join(lines), end="\n\n")
    python = platform.python_version()
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {platform.machine()}, Python {python}")


if __name__ == "__main__":
    main()
