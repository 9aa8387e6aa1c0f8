"""A run's folder: where everything of one run lies, and that no run overwrites another. [shell]"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import OutsideError, UsageError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """``runs/NAME/vN``. ``runs/NAME/last`` is a link to the newest."""

    path: Path

    @property
    def name(self) -> str:
        """What the ledger calls the run: NAME/vN."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.db"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def begun(self) -> bool:
        """It has a ledger, and can be resumed."""
        return (self.path / "resolved.yaml").is_file()

    @property
    def finished(self) -> bool:
        """Training is over and the model is written; what comes after may still be missing."""
        return (self.path / "reports" / "privacy.json").is_file()

    def report(self, name: str) -> Path:
        return self.path / "reports" / f"{name}.json"

    def write_json(self, name: str, value: Any) -> None:
        """Writes ``name`` (relative) whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        path = self.path / name
        scratch = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise OutsideError(f"{path} · could not be written ({error})", next="Free some disk space.") from None

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"run = {self.path} · has no readable {name} ({error})",
                next="Give a run's folder, such as runs/clinic/last.",
            ) from None


def fresh(root: Path, name: str) -> RunFolder:
    """Makes ``root/name/vN`` for the next N, and points ``last`` at it."""
    from sfumato.training import state  # loads torch, which `plan` and `runs` do without

    home = root / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name[1:]) for p in home.glob("v*") if p.name[1:].isdigit()), default=0)
        while True:
            try:
                (home / f"v{number}").mkdir()
                break
            except FileExistsError:  # another run was faster
                number += 1
        state.point_at(home / "last", f"v{number}")
    except OSError as error:
        raise OutsideError(
            f"out = {home} · cannot be written to ({error})", next="Choose another folder with --out."
        ) from None
    return RunFolder(home / f"v{number}")


def existing(path: Path | str) -> RunFolder:
    """The folder of a run that is there; ``last`` is followed. Raises UsageError otherwise."""
    run = RunFolder(Path(path).resolve())
    if not run.begun:
        raise UsageError(
            f"run = {path} · is not a run's folder",
            next="See `sfumato runs`, and give a folder such as runs/clinic/last.",
        )
    return run


def listed(root: Path) -> list[RunFolder]:
    """Every run under ``root``, oldest first."""
    found = [p.parent for p in root.glob("*/v*/resolved.yaml") if p.parent.name[1:].isdigit()]
    return [RunFolder(p) for p in sorted(found, key=lambda p: (p / "resolved.yaml").stat().st_mtime)]
