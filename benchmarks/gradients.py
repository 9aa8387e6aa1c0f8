"""What a private step costs against the same step without privacy: processor time and peak memory, as ratios.

    .venv/bin/python benchmarks/gradients.py --out benchmarks/results/gradients

The engines take turns within one process, in a new order each round, so that a busy machine slows all of them alike; a
ratio is taken within its round. "plain again" is the plain step a second time: the measurement is repeated until its
median is within 0.02 of 1. Peak memory is read in a process of its own for each engine. Ours draws its noise as a release
does. Opacus runs as its documentation has it, with torch's own generator (its secure mode needs another package), on the
same rows. A CUDA device is used where there is one (``--device``); time is then that of the device, with synchronisation.
Writes Markdown and JSON.
"""

import argparse
import copy
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.records import UnitTable

MAX_GRAD_NORM, NOISE_MULTIPLIER = 1.0, 1.0
AGREEMENT = 0.02  # of plain with plain again
Losses = Callable[[nn.Module, dict[str, Tensor]], Tensor]  # (B,), one loss per unit


# ---------------------------------------------------------------------------------------------------------- the models


class Block(nn.Module):
    """Pre-norm transformer block; (B, T, width) -> the same."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 8192, width: int = 256, layers: int = 6, length: int = 128) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device).expand(words.shape)
        x = self.words(words) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_word_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    words = batch["words"]
    logits = model(words[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), words[:, 1:], reduction="none").mean(1)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained product of rank r beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: Gpt, rank: int) -> Gpt:
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoraLinear(getattr(block, name), rank))
    return model


class Vit(nn.Module):
    def __init__(self, width: int = 256, layers: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, 4, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.places(torch.arange(64, device=x.device).expand(x.shape[0], 64))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def label_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


class MelNet(nn.Module):
    """Residual 1-d convolutions over a mel spectrogram: (B, 64 bands, 128 frames) -> classes."""

    def __init__(self, bands: int = 64, width: int = 192, layers: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv1d(bands, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(layers))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = h + convolution(F.silu(norm(h)))
        return self.head(h.mean(2))


class Denoiser(nn.Module):
    """A residual MLP on noised vectors: (B, K, width) -> (B, K, width), K draws of noise for every row."""

    def __init__(self, width: int = 500, depth: int = 5) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + F.silu(block(h))
        return self.last(h)


def denoising_losses(draws: int) -> Losses:
    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        noise = torch.randn(x.shape[0], draws, x.shape[1], device=x.device)
        return (model(x.unsqueeze(1) + noise) - noise).square().mean((1, 2))

    return losses


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def diffusion_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["x"]
    noise, time_ = torch.randn_like(x), torch.randint(0, 1000, (x.shape[0],), device=x.device)
    return (model(x + noise, time_).sample - noise).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Case:
    title: str
    model: Callable[[], nn.Module]
    rows: int
    data: Callable[[int], dict[str, Tensor]]
    losses: Losses


def _words(rows: int) -> dict[str, Tensor]:
    return {"words": torch.randint(0, 8192, (rows, 129))}


def _images(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 3, 32, 32), "label": torch.randint(0, 10, (rows,))}


def _mels(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 64, 128), "label": torch.randint(0, 10, (rows,))}


CASES = {
    "gpt": Case("GPT, d = 256, 6 layers, T = 128", Gpt, 32, _words, next_word_losses),
    "unet": Case("U-Net of diffusers, 32 x 32", unet, 64, _images, diffusion_losses),
    "lora": Case("the GPT with LoRA, r = 8", lambda: with_lora(Gpt(), 8), 32, _words, next_word_losses),
    "vit": Case("ViT, d = 256, 6 layers, 64 patches", Vit, 64, _images, label_losses),
    "mel": Case("convolutions over a mel spectrogram", MelNet, 64, _mels, label_losses),
    "mlp": Case(
        "MLP denoiser, 5 layers of 500, K = 32",
        Denoiser,
        256,
        lambda rows: {"x": torch.randn(rows, 500)},
        denoising_losses(32),
    ),
}


# --------------------------------------------------------------------------------------------------------- the engines

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    case: Case
    device: str
    dtype: torch.dtype | None  # of autocast

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.autocast():
            return self.case.losses(model, batch)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def plain_step(setting: Setting, model: nn.Module, data: dict[str, Tensor]) -> Step:
    optimizer = _adamw(model)

    def step() -> None:
        setting.losses(model, data).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(setting: Setting, model: nn.Module, data: dict[str, Tensor]) -> Step:
    optimizer = _adamw(model)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=MAX_GRAD_NORM, noise_multiplier=NOISE_MULTIPLIER)
    engine.attach(optimizer)
    rows = next(iter(data.values())).shape[0]
    table = UnitTable({name: tensor.cpu() for name, tensor in data.items()}, [str(i) for i in range(rows)])
    batches = engine.batches(table, expected_batch_size=rows, steps=10**9)  # rate 1: the same rows as the others

    def step() -> None:
        batch = next(batches)  # type: ignore[call-overload]
        drawn = {name: tensor.to(setting.device) for name, tensor in batch.tensors.items()}
        setting.losses(model, drawn).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_step(mode: str) -> Callable[[Setting, nn.Module, dict[str, Tensor]], Step]:
    def make(setting: Setting, model: nn.Module, data: dict[str, Tensor]) -> Step:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        rows = next(iter(data.values())).shape[0]
        options = {"noise_multiplier": NOISE_MULTIPLIER, "max_grad_norm": MAX_GRAD_NORM, "expected_batch_size": rows}
        if mode == "ghost":
            ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True)
            outer = DPOptimizerFastGradientClipping(_adamw(model), **options)

            def step() -> None:
                DPTensorFastGradientClipping(ghost, outer, setting.losses(ghost, data)).backward()
                outer.step()
                outer.zero_grad()

            return step
        wrapped = GradSampleModule(model, force_functorch=mode == "functorch")
        optimizer = DPOptimizer(_adamw(model), **options)

        def step() -> None:
            setting.losses(wrapped, data).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


ENGINES: dict[str, Callable[[Setting, nn.Module, dict[str, Tensor]], Step]] = {
    "plain": plain_step,
    "plain again": plain_step,
    "sfumato": our_step,
    "Opacus hooks": opacus_step("hooks"),
    "Opacus functorch": opacus_step("functorch"),
    "Opacus ghost": opacus_step("ghost"),
}


def make_step(setting: Setting, engine: str) -> Step:
    torch.manual_seed(0)
    model = setting.case.model().to(setting.device)
    data = {name: tensor.to(setting.device) for name, tensor in setting.case.data(setting.case.rows).items()}
    return ENGINES[engine](setting, copy.deepcopy(model), data)


# -------------------------------------------------------------------------------------------------------- the measuring


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def times(setting: Setting, engines: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per engine and round; and why an engine is not there."""
    steps, left_out = {}, {}
    for name in engines:
        try:
            steps[name] = make_step(setting, name)
            steps[name]()
            steps[name]()  # what is measured once per shape is measured here
        except Exception as error:  # whatever another library raises on a model is its result
            if name in ("plain", "plain again", "sfumato"):
                raise
            steps.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds):
        order = list(steps)
        random.Random(round_number).shuffle(order)
        for name in order:
            gc.collect()
            start = clock(setting.device)
            steps[name]()
            seconds[name].append(clock(setting.device) - start)
    return seconds, left_out


def ratios(seconds: dict[str, list[float]], engine: str) -> list[float]:
    return [a / b for a, b in zip(seconds[engine], seconds["plain"], strict=True)]


def peak_bytes(setting: Setting, engine: str) -> int:
    """The high-water mark of this process, or of the device, over three steps; less what was there before the first."""
    torch.set_num_threads(1)
    step = make_step(setting, engine)
    if setting.device != "cpu":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what there is now
    before = _memory("VmRSS")
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """Bytes of this process, as the kernel tells them (getrusage's mark would be that of the process that started it)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def peak_in_own_process(arguments: argparse.Namespace, case: str, engine: str) -> int | None:
    command = [sys.executable, __file__, "--peak-of", engine, "--cases", case, "--device", arguments.device]
    command += ["--bf16"] * arguments.bf16
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None


def measure(arguments: argparse.Namespace, name: str) -> dict:
    case = CASES[name]
    setting = Setting(case, arguments.device, torch.bfloat16 if arguments.bf16 else None)
    engines = [engine for engine in ENGINES if engine in arguments.engines]
    for attempt in range(1, arguments.attempts + 1):
        seconds, left_out = times(setting, engines, arguments.rounds)
        agreement = statistics.median(ratios(seconds, "plain again"))
        print(f"{name}: attempt {attempt}, plain again {agreement:.3f}", file=sys.stderr, flush=True)
        if abs(agreement - 1) <= AGREEMENT:
            break
    peaks = (
        {e: peak_in_own_process(arguments, name, e) for e in seconds if e != "plain again"} if arguments.peak else {}
    )
    rows = {}
    for engine in engines:
        if engine in left_out:
            rows[engine] = {"left_out": left_out[engine]}
            continue
        values = ratios(seconds, engine)
        rows[engine] = {
            "seconds": statistics.median(seconds[engine]),
            "ratio": [statistics.median(values), min(values), max(values)],
            "peak_bytes": peaks.get(engine),
        }
    model = case.model()
    return {
        "case": case.title,
        "rows": case.rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "attempts": attempt,
        "engines": rows,
    }


def markdown(results: list[dict], arguments: argparse.Namespace) -> str:
    engines = [e for e in ENGINES if e in arguments.engines and e != "plain"]
    lines = [
        "Time of a step against the plain step, median [min, max]; peak memory against the plain step's in brackets.",
        "",
        "| model | rows | trained | " + " | ".join(engines) + " |",
        "|" + "---|" * (3 + len(engines)),
    ]
    notes = []
    for result in results:
        plain = result["engines"]["plain"]
        cells = []
        for engine in engines:
            row = result["engines"][engine]
            if "left_out" in row:
                notes.append(f"{result['case']}, {engine}: {row['left_out']}")
                cells.append("–")
                continue
            median, low, high = row["ratio"]
            text = f"{median:.2f} [{low:.2f}, {high:.2f}]"
            if row["peak_bytes"] and plain["peak_bytes"]:
                text += f" ({row['peak_bytes'] / plain['peak_bytes']:.2f})"
            cells.append(text)
        lines.append(f"| {result['case']} | {result['rows']} | {result['trained']:,} | " + " | ".join(cells) + " |")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    lines += ["", *[f"- {note}" for note in notes], ""] if notes else [""]
    lines.append(
        f"torch {torch.__version__}, {device}, {arguments.threads} thread(s), {arguments.rounds} rounds, "
        f"{'autocast to bfloat16' if arguments.bf16 else 'float32'}, Python {platform.python_version()}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--attempts", type=int, default=3, help="at most, until plain agrees with plain again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--no-peak", dest="peak", action="store_false")
    parser.add_argument("--peak-of", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        dtype = torch.bfloat16 if arguments.bf16 else None
        print(peak_bytes(Setting(CASES[arguments.cases[0]], arguments.device, dtype), arguments.peak_of))
        return
    results = [measure(arguments, name) for name in arguments.cases]
    text = markdown(results, arguments)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
