"""Records of messages, and what of them is read and what is written.

A record is ``{"messages": [{"role", "content"}, ...], "images": [paths], "audios": [paths]}``; ``content`` is a text, in which
``<image>`` and ``<audio>`` stand for the next of the files, or a list of ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and
``{"type": "audio"}``. What the assistant says is learnt; the rest is what it is said to.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_FILES = {"image": "images", "audio": "audios"}


def conversation(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages, every content a list of parts, the files counted. Raises DataError, naming what is wrong."""
    messages = record.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f"record = {sorted(record)} · must have messages, a list",
            next='Give {"messages": [{"role": ..., "content": ...}]}.',
        )
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"role = {role!r} · must be one of {', '.join(ROLES)}", next="Correct the role.")
        parts = _parts_of_text(content) if isinstance(content, str) else [_part(part) for part in content or []]
        found.append({"role": role, "content": parts})
    for kind, files in _FILES.items():
        used = count_of(found, kind)
        given = len(record.get(files) or [])
        if used != given:
            raise DataError(
                f"{files} = {given} · the messages speak of {used}",
                next=f"Give a file for every {kind}, in their order.",
            )
    return found


def count_of(messages: Sequence[Mapping[str, Any]], kind: str) -> int:
    return sum(part["type"] == kind for message in messages for part in message["content"])


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages with texts for contents, as chat templates of pure text models expect them."""
    return [{"role": m["role"], "content": "".join(part["text"] for part in m["content"])} for m in messages]


def pictures(record: Mapping[str, Any]) -> list[Any]:
    """The images, (H, W) RGB of Pillow. Raises DataError where one cannot be read."""
    from PIL import Image, UnidentifiedImageError

    found = []
    for given in record.get("images") or []:
        try:
            image = Image.open(Path(given)) if isinstance(given, str | Path) else given
            found.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, AttributeError) as error:
            raise DataError(
                f"image = {given} · cannot be read ({type(error).__name__})",
                next="Correct the path, or leave the record out.",
            ) from None
    return found


def turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which of the messages are the assistant's. Raises DataError if there is none: nothing would be learnt."""
    found = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not found:
        raise DataError(
            "messages · have none of the assistant, so that there is nothing to learn", next="Add its answer."
        )
    return found


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _FILES:
        return {"type": kind}
    raise DataError(
        f"content = {str(part)[:80]} · must be a text, or parts of type text, image or audio",
        next="Correct the content.",
    )


def _parts_of_text(text: str) -> list[dict[str, Any]]:
    pieces = re.split(r"<(image|audio)>", text)
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
