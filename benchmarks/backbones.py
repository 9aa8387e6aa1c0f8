"""Which denoiser learns more from the same budget of time and privacy on this machine: ours, or the U-Net of diffusers?

    .venv/bin/python benchmarks/backbones.py --seconds 240 --out benchmarks/results/backbones.md

Each is trained on the phantom clinic with the recipe's privacy (epsilon 8 per patient), with as many steps as fit into
the same seconds (timed beforehand on steps that are thrown away), and read by the same judge. Ours has the recipe's batch
and learning rate; the U-Net, which is slower for each picture, smaller batches and a smaller learning rate, so that it has
more than a handful of steps. Prints Markdown: steps, kappa of each fact, Fréchet distance.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sfumato.data import prepare
from sfumato.evaluation import report
from sfumato.models import model as models
from sfumato.models.settings import Mlp, Pixels, UNet
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.planning import automatic_delta
from sfumato.recipe import Recipe
from sfumato.recipes import named
from sfumato.training import loop, watch

CANDIDATES = {
    "residual MLP on 16 x 16 cosine coefficients": (None, None, 2_048, 1e-2),
    "diffusers U-Net (16, 32, 48) on pixels": (Pixels(), UNet(channels=(16, 32, 48)), 256, 2e-3),
    "diffusers U-Net (16, 32, 48) on 16 x 16 cosine coefficients": (None, UNet(channels=(16, 32, 48)), 256, 2e-3),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=240.0)
    arguments.add_argument("--patients", type=int, default=30_000)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    recipe = named("clinic")
    recipe = replace(recipe, data=replace(recipe.data, units=given.patients))
    prepared = prepare.load(recipe.data, unit="person")
    rows = []
    for name, (codec, backbone, batch, learning_rate) in CANDIDATES.items():
        settings = replace(recipe.model, image=codec or recipe.model.image, backbone=backbone or recipe.model.backbone)
        assert isinstance(settings.backbone, Mlp | UNet)
        training = replace(recipe.training, expected_batch_size=batch, learning_rate=learning_rate)
        rows.append(_row(name, replace(recipe, model=settings, training=training), prepared, given.seconds))
        print(rows[-1], file=sys.stderr, flush=True)
    facts = list(prepared.facts)
    table = [
        f"Made by `benchmarks/backbones.py --seconds {given.seconds:g} --patients {given.patients}`.",
        "",
        "| denoiser | parameters | expected batch | learning rate | steps | seconds | "
        + " | ".join(f"κ {fact}" for fact in facts)
        + " | Fréchet distance |",
        "|" + "---|" * (7 + len(facts)),
    ]
    for row in rows:
        cells = [f"{row['figures'][f'kappa: {fact}']:.2f}" for fact in facts]
        cells.append(f"{row['figures']['Fréchet distance']:.1f}")
        table.append(
            f"| {row['name']} | {row['parameters']:,} | {row['batch']:,} | {row['learning_rate']:g} | {row['steps']} | "
            f"{row['seconds']:.0f} | " + " | ".join(cells) + " |"
        )
    text = "\n".join(table) + "\n"
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")


def _row(name: str, recipe: Recipe, prepared: prepare.Prepared, seconds: float) -> dict:
    side = recipe.data.image_size
    shape = (side, side, recipe.data.channels)
    table = models.build(recipe.model, picture_shape=shape).encode(prepared.private)
    _, once, often = (_train(recipe, shape, table, count, name)[1] for count in (2, 2, 7))  # the first ever is slower
    steps = max(2, int(seconds / ((often - once) / 5)))
    model, took = _train(recipe, shape, table, steps, name)
    quality = report.evaluate(
        lambda captions: model.generate(captions, seed=1),
        prepared.public,
        prepared.facts,
        replace(recipe.evaluation, samples=500),  # the U-Net draws a few pictures a second
    )
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": recipe.training.expected_batch_size,
        "learning_rate": recipe.training.learning_rate,
        "steps": steps,
        "seconds": took,
        "figures": {figure.name: figure.value for figure in quality.figures},
    }


def _train(recipe: Recipe, shape: tuple[int, int, int], table, steps: int, name: str):
    """A private training of so many steps; the model and its seconds."""
    plan = DpSgd.calibrated(
        epsilon=8.0,
        population=table.num_units,
        expected_batch_size=recipe.training.expected_batch_size,
        steps=steps,
        delta=automatic_delta(table.num_units),
        max_grad_norm=recipe.privacy.max_grad_norm,
        unit="person",
        records_per_unit=recipe.privacy.records_per_unit,
    )
    model = models.build(recipe.model, picture_shape=shape)
    settings = replace(recipe.training, steps=steps, picture_every_seconds=1e9, checkpoint_every_seconds=1e9)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        loop.train(
            model,
            table,
            plan,
            settings,
            replace(recipe.performance, max_physical_batch_size=256),
            checkpoints=Path(folder),
            watchers=[watch.Line(lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True), every_seconds=20)],
        )
    return model, time.monotonic() - began


if __name__ == "__main__":
    main()
