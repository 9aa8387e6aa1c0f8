"""The README's picture from a run's folder: asked for, made in private, and real, side by side.

.venv/bin/python scripts/picture.py runs/clinic/last docs/images/clinic.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato.data import prepare
from sfumato.models import model as models
from sfumato.recipe import load

SIDE = 128
COUNT = 8


def main(run: Path, out: Path) -> None:
    recipe = load(run / "resolved.yaml")
    prepared = prepare.load(recipe.data, unit=recipe.privacy.unit)
    seen: set[str] = set()
    chosen = [r for r in prepared.public if not (r.unit in seen or seen.add(r.unit))][:COUNT]
    model = models.load(run / "model")
    made = model.generate([r.text for r in chosen], seed=recipe.training.seed)
    claim = json.loads((run / "reports" / "privacy.json").read_text(encoding="utf-8"))
    rows = [
        (f"private, epsilon {claim['epsilon']:.3g}", made),
        ("real, held out", np.stack([r.image for r in chosen if r.image is not None])),
    ]
    label, words = 96, 96
    sheet = Image.new("RGB", (label + COUNT * (SIDE + 6), words + len(rows) * (SIDE + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(size=11)
    for column, record in enumerate(chosen):
        facts = record.metadata.get("facts") or {"": record.text}
        text = "\n".join(f"{key} {value}".strip() for key, value in facts.items())
        pen.multiline_text((label + column * (SIDE + 6), 4), text, fill="black", font=small)
    for row, (name, pictures) in enumerate(rows):
        top = words + row * (SIDE + 6)
        pen.text((4, top + SIDE // 2 - 6), name, fill="black", font=small)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
            sheet.paste(
                tile.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"), (label + column * (SIDE + 6), top)
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
