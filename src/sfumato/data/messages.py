"""Conversations in JSON lines, in the shape that chat models are fine-tuned on, with pictures and sounds.

    {"messages": [{"role": "user", "content": "<image>What is it?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "An ankle."}]}],
     "images": ["a.png"], "audios": [], "person": "p-17"}

The record keeps the whole conversation in its metadata, and fills its modalities by this rule:

- ``text``: what the assistant says, its turns joined by a line break; where it says nothing, what the user says.
  The marks ``<image>`` and ``<audio>`` are taken out. Instructions to the system are never the text.
- ``image``, ``audio``: the only one of its kind. Of several none is chosen: they are decoded to see that they can be,
  and stay in ``metadata["images"]``, ``metadata["audios"]`` (paths) for who trains on conversations.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.data import media
from sfumato.data.entries import Columns, Entries, Entry, inside, missing_column
from sfumato.data.rows import columns_of, read_lines
from sfumato.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_MARKS = re.compile(r"<(image|audio)>")
_USED = ("messages", "images", "audios")


class Messages(Entries):
    """A file of JSON lines, or the .jsonl files of a folder. Paths are relative to the file's folder."""

    def __init__(self, path: Path | str, *, columns: Columns | None = None) -> None:
        self.path, self.how = Path(path), columns or Columns()
        self.name = self.path.resolve().stem
        self.files = sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]
        if not self.files or not all(file.is_file() for file in self.files):
            raise DataError(
                f"path = {path} · must be a .jsonl file, or a folder of them",
                next="Check data.path.",
                code="missing_file",
            )
        if self.how.text is not None:
            raise DataError(
                f"text_column = {self.how.text} · the text is what the messages say",
                next="Leave data.text_column out.",
                code="missing_column",
            )
        for file in self.files:
            there = columns_of(file, file.name)
            for name in ("messages", *([self.how.unit] if self.how.unit is not None else [])):
                if name not in there:
                    raise missing_column(name, there, file.name)

    def entries(self) -> Iterator[Entry]:
        for file in self.files:
            for number, row in read_lines(file, file.name):
                name = f"{file.name}:{number}"
                if isinstance(row, DataError):
                    yield Entry(id=name, unit=None, problem=row)
                    continue
                unit = None
                if self.how.unit is not None:
                    given = row.get(self.how.unit)
                    unit = "" if given is None else str(given)
                try:
                    yield _entry(row, name, unit, file.parent, self.how)
                except DataError as problem:
                    yield Entry(id=name, unit=unit, problem=problem)


def _entry(row: Mapping[str, Any], name: str, unit: str | None, root: Path, how: Columns) -> Entry:
    messages = _messages(row.get("messages"), name)
    files = {kind: _files(row.get(column), column, name, root) for kind, column in _FILES.items()}
    for kind, paths in files.items():
        marks = sum(marked(message["content"], kind) for message in messages)
        if marks not in (0, len(paths)):
            raise _bad(f"{name}: {kind} = {marks} marks for {len(paths)} files", "as many of the one as of the other")
    metadata = {key: value for key, value in row.items() if key not in _USED}
    metadata["messages"] = messages
    values: dict[str, Any] = {}
    others: list[tuple[str, media.Media]] = []
    for kind, paths in files.items():
        if kind not in how.modalities:
            continue
        metadata[_FILES[kind]] = tuple(str(path) for path in paths)
        if len(paths) == 1:
            values[kind] = paths[0]
        else:
            others += [(kind, path) for path in paths]
    if "text" in how.modalities:
        text = said(messages)
        if text or not how.may_lack:
            values["text"] = text
    return Entry(id=name, unit=unit, metadata=metadata, others=tuple(others), **values)


_FILES = {"image": "images", "audio": "audios"}


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The turns, as they are given; raises DataError for any other shape."""
    if not isinstance(value, list) or not value:
        raise _bad(f"{name}: messages = {str(value)[:60]}", "must be a list of turns, at least one")
    for number, message in enumerate(value):
        where = f"{name}: messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise _bad(f"{where}.role = {str(role)[:60]!r}", f"must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise _bad(f"{where}.content = {str(content)[:60]}", "must be a string or a list of parts")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image", "audio") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise _bad(f"{where}.content: {str(part)[:60]}", "must be of type text (with its text), image or audio")
            if set(part) - {"type", "text"}:
                raise _bad(
                    f"{where}.content: {', '.join(sorted(set(part) - {'type', 'text'}))}",
                    "files are named in images and audios, in the order of their parts",
                )
    return value


def _files(value: Any, column: str, name: str, root: Path) -> list[Path]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        raise _bad(f"{name}: {column} = {str(value)[:60]}", "must be a list of paths")
    return [inside(root, path, f"{name}: {column}") for path in value]


def marked(content: str | list[dict[str, Any]], kind: str) -> int:
    """How many pictures (or sounds) a turn stands for: parts of that type, and ``<image>`` in its words."""
    if isinstance(content, str):
        return content.count(f"<{kind}>")
    return sum(part["type"] == kind for part in content) + sum(
        part["text"].count(f"<{kind}>") for part in content if part["type"] == "text"
    )


def words(content: str | list[dict[str, Any]]) -> str:
    """The words of a turn, without marks."""
    text = content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")
    return _MARKS.sub("", text).strip()


def said(messages: list[dict[str, Any]]) -> str:
    """What the assistant says in all its turns; where nothing, the user."""
    for role in ("assistant", "user"):
        turns = [words(message["content"]) for message in messages if message["role"] == role]
        if text := "\n".join(turn for turn in turns if turn):
            return text
    return ""


def spoken(metadata: Mapping[str, Any]) -> str:
    """All that is said in a record's conversation; nothing where it has none of this shape."""
    if "messages" not in metadata:
        return ""
    try:
        turns = _messages(metadata["messages"], "")
    except DataError:
        return ""
    return "\n".join(words(turn["content"]) for turn in turns)


def _bad(what: str, expected: str) -> DataError:
    return DataError(f"{what} · {expected}", next="Correct the line.", code="row")
