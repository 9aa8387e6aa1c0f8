"""A small data set of the user's kind, on disk, and a cache and data folder of the test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


def picture(seed: int, size: int = 24, channels: int = 3) -> np.ndarray:
    """Smooth and unlike the pictures of other seeds."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of ``count`` records of ``people`` persons; ``change`` may alter the rows before they are written."""

    def make(count: int = 12, people: int = 4, change: Callable[[list[dict[str, Any]]], Any] | None = None) -> Path:
        root = tmp_path / "records"
        root.mkdir()
        rows: list[dict[str, Any]] = []
        for i in range(count):
            Image.fromarray(picture(i)).save(root / f"{i}.png")
            rows.append(
                {"file_name": f"{i}.png", "text": f"picture number {i}", "person": f"p{i % people}", "license": "CC0"}
            )
        if change is not None:
            change(rows)
        (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return root

    return make
