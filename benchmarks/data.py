"""How fast records are prepared and drawn from, and with how much memory, on disk (data.store: mapped) or in memory.

    python benchmarks/data.py                    10^6 small records of text; some two minutes on two cores
    python benchmarks/data.py --pictures --records 100000
    python benchmarks/data.py --store memory --records 100000

The records are made up: a sentence, one of three labels, a person with about four records; with --pictures also an 8 x 8
picture as PNG. Each stage runs in a process of its own. "peak" is the largest amount of anonymous memory of that process (what
cannot be dropped and read again), sampled every 20 ms; "start" is the same before the stage, with all modules imported.
Seconds are of the processor.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("prepare", "open", "encode", "draw")
WORDS = ("old", "young", "left", "right", "upper", "lower", "nodule", "cavity", "shadow", "clear", "large", "small")


def write_set(folder: Path, records: int, pictures: bool) -> None:
    """An Arrow folder as ``datasets`` saves it, in parts, so that writing it takes little memory either."""
    import io

    import numpy as np
    import pyarrow as pa
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(out, "PNG")
        images.append(out.getvalue())
    people, part = max(2, records // 4), 100_000
    writer = None
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        for start in range(0, records, part):
            count = min(part, records - start)
            words = rng.integers(0, len(WORDS), (count, 6))
            columns: dict[str, Any] = {
                "text": [" ".join(WORDS[w] for w in row) + f" {start + i}" for i, row in enumerate(words)],
                "person": [f"p{p:07d}" for p in rng.integers(0, people, count)],
                "kind": [WORDS[6 + w] for w in rng.integers(0, 3, count)],
            }
            if pictures:
                columns["image"] = [images[i] for i in rng.integers(0, len(images), count)]
            table = pa.table(columns)
            writer = writer or pa.ipc.new_stream(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def encode(records: Sequence[Any]) -> Any:
    """32 hashed words and, where there is one, the picture: as small as a codec can be, so that the reading is measured."""
    import zlib

    import numpy as np
    import torch

    from sfumato.records import UnitTable

    text = np.zeros((len(records), 32), np.float32)
    for row, record in enumerate(records):
        for word in record.text.split():
            text[row, zlib.crc32(word.encode()) % 32] += 1
    tensors = {"text": torch.from_numpy(text)}
    if records[0].image is not None:
        tensors["image"] = torch.from_numpy(
            np.stack([r.image for r in records]).astype(np.float32).reshape(len(records), -1)
        )
    return UnitTable(tensors, [record.unit for record in records])


class Peak(threading.Thread):
    """The largest RssAnon seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.bytes = anonymous()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("RssAnon = missing in /proc/self/status · this needs Linux")


def stage(name: str, folder: Path, store: str, pictures: bool, steps: int) -> dict[str, Any]:
    """One stage, in this process; what comes before it is found in the cache, or made first and not measured."""
    import numpy as np
    import torch

    from sfumato.data import mapped, prepare
    from sfumato.data.settings import DataSettings
    from sfumato.randomness import TestRandom

    data = DataSettings(
        source="arrow",
        path=str(folder),
        unit_column="person",
        public_units=100,
        image_size=8,
        modalities=("text", "image") if pictures else ("text",),
        store=store,  # type: ignore[arg-type]
    )
    torch.set_num_threads(1)

    def load() -> Any:
        return prepare.load(data, unit="person").private

    def table(records: Any) -> Any:
        return mapped.encoded(records, encode, settings={}) if store == "mapped" else encode(list(records))

    ready: Any = None if name in ("prepare", "open") else load() if name == "encode" else table(load())
    peak = Peak()
    peak.start()
    began = time.process_time()
    if name in ("prepare", "open"):
        count = len(load())
    elif name == "encode":
        count = table(ready).num_records
    else:
        random, count = TestRandom(0), 0
        for _ in range(steps):
            chosen = np.flatnonzero(random.uniform(ready.num_units) < 1024 / ready.num_units)
            batch = ready.batch(chosen, records_per_unit=4, rng=random)
            count += batch.num_rows
    seconds = time.process_time() - began
    peak.stopped.set()
    peak.join()
    return {
        "stage": name,
        "records": count,
        "seconds": seconds,
        "start": peak.start_bytes,
        "peak": max(peak.bytes, anonymous()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--store", choices=("mapped", "memory"), default="mapped")
    parser.add_argument("--steps", type=int, default=200, help="batches of 1,024 units that are drawn")
    parser.add_argument("--folder", type=Path, help="where the set is made; default: a temporary one")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        print(json.dumps(stage(given.stage, given.folder, given.store, given.pictures, given.steps)))
        return
    work = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        write_set(work, given.records, given.pictures)
        size = sum(file.stat().st_size for file in work.iterdir())
        kind = "text and 8 x 8 pictures" if given.pictures else "text"
        print(f"\n{given.records:,} records of {kind}, {size / 1e6:.0f} MB, data.store: {given.store}\n")
        print("| stage | records | seconds | records a second | start, MB | peak, MB |\n|---|---|---|---|---|---|")
        for name in STAGES if given.store == "mapped" else ("prepare", "encode", "draw"):
            arguments = ["--stage", name, "--folder", str(work), "--store", given.store, "--steps", str(given.steps)]
            done = subprocess.run(
                [sys.executable, __file__, *arguments, *(["--pictures"] if given.pictures else [])],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            r = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {r['records']:,} | {r['seconds']:.1f} | {r['records'] / r['seconds']:,.0f} | "
                f"{r['start'] / 1e6:.0f} | {r['peak'] / 1e6:.0f} |",
                flush=True,
            )
        cache = work / ".sfumato" / "cache"
        if cache.is_dir():
            print(
                f"\non disk: {sum(f.stat().st_size for f in cache.rglob('*') if f.is_file()) / 1e6:.0f} MB in the cache"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
