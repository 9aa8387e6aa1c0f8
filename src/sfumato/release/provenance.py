"""Where a run comes from: code version, dependencies, recipe, data card, and where each tensor comes from. [shell]"""

import json
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sfumato.errors import OutsideError, UsageError, VerificationFailed
from sfumato.release import manifest, tensors

Origin = Literal["dp-sgd", "released", "public", "constant"]
ORIGINS = ("dp-sgd", "released", "public", "constant")

DEPENDENCIES = (
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "diffusers",
    "transformers",
    "dp-accounting",
    "cryptography",
    "pydantic",
    "PyYAML",
    "pillow",
)


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything known about how a run was made. Complete: ``boundary`` reduces it before it leaves."""
    run_dir = Path(run_dir)
    return {
        "code": code_version(),
        "dependencies": dependencies(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "recipe": read_recipe(run_dir),
        "data_card": read_json(run_dir / "data_card.json") or {},
    }


def code_version() -> dict[str, Any]:
    """The installed version, and the commit where this file is tracked by a repository."""
    try:
        version = metadata.version("sfumato")
    except metadata.PackageNotFoundError:
        version = "not installed"
    here = Path(__file__).resolve()
    commit, dirty = None, None
    if (
        _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    ):  # not merely inside somebody's repository
        commit = _git(here.parent, "rev-parse", "HEAD")
        dirty = bool(_git(here.parent, "status", "--porcelain", "--untracked-files=no"))
    return {"name": "sfumato", "version": version, "commit": commit, "changed_since_commit": dirty}


def dependencies() -> dict[str, str]:
    """Versions of the packages on which the result depends; those that are not installed are left out."""
    versions: dict[str, str] = {}
    for name in DEPENDENCIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe (or, without it, what was asked) as plain values; empty if there is neither."""
    import yaml

    for name in ("resolved.yaml", "recipe.yaml"):
        path = Path(run_dir) / name
        if path.is_file():
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UsageError(
                    f"{path} · must be readable YAML ({error})", next="Restore the run's folder."
                ) from None
            return values if isinstance(values, dict) else {}
    return {}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object of a run's folder; None if the file is not there. Raises UsageError for one that cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} · must be a JSON file ({error})", next="Run the step that writes it again.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} · must hold a JSON object", next="Run the step that writes it again.")
    return value


def tensor_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape of a safetensors file."""
    try:
        with open(path, "rb") as file:
            length = tensors.header_length(file.read(8), path.name)
            return tensors.read_header(file.read(length), path.stat().st_size - 8 - length, path.name)
    except OSError as error:
        raise OutsideError(f"{path} · must be readable ({error.strerror})", next="Check the run's folder.") from None


def write_taint(run_dir: Path, origin: Callable[[str, str], str]) -> dict[str, Any]:
    """Writes RUN/taint.json: for each tensor of RUN/model by what it is covered, for each other file that it is public.

    Args:
      origin: (file relative to model/, tensor name) -> one of ORIGINS (anything else no bundle takes): "dp-sgd" (trained by the
        private mechanism, averages included),
        "released" (computed from what the private mechanism released, and from nothing else private),
        "public" (frozen weights from elsewhere) or "constant" (fixed by the code or the recipe).
    """
    run_dir = Path(run_dir)
    listed: dict[str, Any] = {"tensors": {}, "files": {}}
    for path in sorted((run_dir / "model").rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(run_dir / "model").as_posix()
        if path.suffix == ".safetensors":
            listed["tensors"][name] = {tensor: origin(name, tensor) for tensor in tensor_names(path)}
        else:
            listed["files"][name] = "constant"
    (run_dir / "taint.json").write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return listed


def taint_problems(taint: Any, found: dict[str, dict[str, tuple[int, ...]] | None]) -> list[str]:
    """Why a taint list does not cover a model; empty if it does.

    Args:
      taint: the list as ``write_taint`` makes it.
      found: every file of model/ by its relative name: its tensors, or None for what is not safetensors.
    """
    listed = taint.get("tensors") if isinstance(taint, dict) else None
    files = taint.get("files") if isinstance(taint, dict) else None
    if not isinstance(listed, dict) or not isinstance(files, dict):
        return ["the taint list is missing or malformed"]
    wrong: list[str] = []
    for name, shapes in found.items():
        if shapes is None:
            if files.get(name) not in ("public", "constant"):
                wrong.append(f"{name} is not declared public or constant")
            continue
        origins = listed.get(name)
        if not isinstance(origins, dict):
            wrong.append(f"{name} is not in the taint list")
            continue
        for tensor in shapes:
            if origins.get(tensor) not in ORIGINS:
                wrong.append(f"{name}: {tensor[:80]} is not covered (listed as {str(origins.get(tensor))[:40]!r})")
        wrong += [f"{name}: {tensor[:80]} is listed but not there" for tensor in origins if tensor not in shapes]
    wrong += [f"{name[:80]} is listed but not there" for name in (*listed, *files) if name not in found]
    return wrong


def model_files(model_dir: Path) -> tuple[dict[str, dict[str, tuple[int, ...]] | None], list[str]]:
    """Every file of a run's model folder with its tensors, and the names of what may not leave."""
    found: dict[str, dict[str, tuple[int, ...]] | None] = {}
    unsafe: list[str] = []
    for path in sorted(model_dir.rglob("*")):
        name = path.relative_to(model_dir).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink() or not path.is_file() or not name.endswith(manifest.MODEL_SUFFIXES):
            unsafe.append(name)
        elif path.suffix == ".safetensors":
            try:
                found[name] = tensor_names(path)
            except VerificationFailed as error:
                unsafe.append(f"{name} ({error.message})")
        else:
            found[name] = None
    return found, unsafe


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None where git is missing, slow, or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
