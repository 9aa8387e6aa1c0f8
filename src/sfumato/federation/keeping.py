"""Tensors and values in one file that is there whole or not at all: the server's checkpoint, a site's memory. [shell]

One file, so that model, round and accounts can never be of different moments: it is written beside its place, synced, renamed
into it, and the folder synced. It holds no noise, no key stream and no record.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import OutsideError, UsageError
from sfumato.federation import server_state
from sfumato.federation.messages import Json, Part
from sfumato.federation.public import Public
from sfumato.federation.server_state import ServerState
from sfumato.federation.settings import FederationSettings

FORMAT = "sfumato-kept/1"


def write_part(path: Path, part: Part) -> None:
    """Replaces ``path``. Raises OutsideError where the disk says no; then the file is as it was."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in part.tensors.items()}
    text = json.dumps(dict(part.values), allow_nan=False, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(
            os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        )  # private keys; older safetensors ask the umask
        save_file(tensors, scratch, metadata={"format": FORMAT, "values": text})
        _sync(scratch)
        os.replace(scratch, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise OutsideError(f"{path} · could not be written ({error})", next="Free some disk space.") from None


def read_part(path: Path) -> Part:
    """Raises UsageError for a file that is not one of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            values: Mapping[str, Json] = json.loads(metadata["values"])
            return Part(tensors={name: file.get_tensor(name) for name in file.keys()}, values=values)  # noqa: SIM118
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{path} · cannot be continued ({type(error).__name__}: {str(error)[:200]})",
            next="Restore it from a copy that is whole, or begin a new run.",
        ) from None


@dataclass(frozen=True)
class Keeper:
    """The server's checkpoint: ``folder/server.safetensors``."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "server.safetensors"

    def keep(self, server: ServerState) -> None:
        write_part(self.path, server_state.to_part(server))

    def load(self, settings: FederationSettings, public: Public, *, recipe: str = "") -> ServerState | None:
        """None where nothing was kept. Raises UsageError for a checkpoint of another federation."""
        return (
            server_state.from_part(read_part(self.path), settings, public, recipe=recipe)
            if self.path.exists()
            else None
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
