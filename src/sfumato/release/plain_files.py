"""A bundle's folder as a stranger reads it: plain files only, nothing followed, nothing larger than it may be. [shell]"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from sfumato.release import manifest
from sfumato.release.refusing import failed


def walk(folder: Path) -> dict[str, int]:
    """Name to size of every file. Refuses links, devices, empty folders and too many files; follows nothing."""
    found: dict[str, int] = {}
    todo = [("", 0)]
    while todo:
        prefix, depth = todo.pop()
        entries = 0
        with os.scandir(folder / prefix) as listing:
            for entry in listing:
                entries += 1
                name = prefix + entry.name
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) and depth < 8:
                    todo.append((f"{name}/", depth + 1))
                elif stat.S_ISREG(info.st_mode):
                    found[name] = info.st_size
                else:
                    raise failed(f"{name[:120]!a} must be a plain file")
                if len(found) + len(todo) > manifest.MAX_FILES:
                    raise failed(f"there are more than {manifest.MAX_FILES} files")
        if entries == 0 and prefix:
            raise failed(f"{prefix[:120]!a} is an empty folder")
    return found


def open_plain(folder: Path, name: str) -> BinaryIO:
    """Opens a plain file of the bundle; a link that appeared since it was listed is refused."""
    descriptor = os.open(
        folder / name, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise failed(f"{name} must be a plain file")
    return os.fdopen(descriptor, "rb")


def read(folder: Path, name: str, limit: int) -> bytes:
    with open_plain(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise failed(f"{name} is larger than {limit} bytes")
    return data
