"""The source that the settings name, and the settings that a path means."""

from pathlib import Path

from sfumato.data import places
from sfumato.data.entries import Columns, Source
from sfumato.data.folder import Folder, table_of
from sfumato.data.messages import Messages
from sfumato.data.settings import BUILT_IN, DataSettings
from sfumato.data.shards import WebDataset
from sfumato.data.tables import Arrow, Parquet
from sfumato.errors import DataError, UsageError


def open_source(settings: DataSettings) -> Source:
    """The records of ``settings`` that are for training; built-in public parts are opened by ``prepare.load``."""
    from sfumato.data import examples

    path, columns = settings.path or "", Columns.of(settings)
    match settings.source:
        case "folder":
            return Folder(path, columns=columns)
        case "parquet":
            return Parquet(path, columns=columns)
        case "arrow":
            return Arrow(path, columns=columns)
        case "messages":
            return Messages(path, columns=columns)
        case "webdataset":
            return WebDataset(path, columns=columns, index=places.cache_of(settings))
        case "dicom":
            from sfumato.data.dicom import Dicom

            return Dicom(path, columns=columns, tags=settings.dicom_tags)
        case _:
            return examples.open_example(settings)


def settings_for(target: str | Path, *, unit_column: str | None = None) -> DataSettings:
    """What ``data check PATH`` means: a built-in set, or a folder or file whose kind is told by what is in it."""
    if str(target) in BUILT_IN:
        return DataSettings(source=str(target), unit_column=unit_column)  # type: ignore[arg-type]
    path = Path(target)
    if not path.exists():
        raise DataError(
            f"path = {path} · does not exist",
            next=f"Give a folder, a file, or {', '.join(BUILT_IN)}.",
            code="missing_file",
        )
    source = _in_folder(path) if path.is_dir() else _of_file(path)
    return DataSettings(source=source, path=str(path), unit_column=unit_column)  # type: ignore[arg-type]


def _of_file(path: Path) -> str:
    kinds = {".parquet": "parquet", ".jsonl": "messages", ".tar": "webdataset", ".dcm": "dicom"}
    if path.suffix not in kinds or path.name == "metadata.jsonl":
        raise UsageError(
            f"path = {path} · must be a folder or a {', '.join(kinds)} file",
            next="Put the records in a folder with metadata.jsonl, and give the folder.",
        )
    return kinds[path.suffix]


def _in_folder(path: Path) -> str:
    def holds(pattern: str) -> bool:
        return any(path.glob(pattern))

    if table_of(path):
        return "folder"
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or holds("*.arrow"):
        return "arrow"
    for pattern, source in (
        ("*.parquet", "parquet"),
        ("*.tar", "webdataset"),
        ("*.jsonl", "messages"),
        ("*.dcm", "dicom"),
    ):
        if holds(pattern):
            return source
    return "folder" if not holds("**/*.dcm") else "dicom"
