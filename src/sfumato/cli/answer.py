"""What a verb gives back, and how every error becomes an exit code and one JSON object.   [shell]

Nothing is printed while a verb runs except progress, on standard error. So with ``--json`` the last line on standard
output is always one JSON object, also when the verb failed.
"""

import errno
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import click
import typer.core
import typer.models

from sfumato import __version__
from sfumato.errors import PrivacyRefused, SfumatoError

INTERRUPTED = 130
_DISK = {errno.ENOSPC: "full", errno.EDQUOT: "over its quota", errno.EROFS: "read-only"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A verb's result: for programs, and in words for people. ``exit_code`` is 0 unless the result is itself a no."""

    result: Mapping[str, Any]
    text: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is told."""

    exit_code: int
    code: str
    message: str
    next: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)  # refusals, reasons

    def as_dict(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, "next": self.next}, **self.more}


class Verb(typer.core.TyperCommand):
    """A command with ``--json``. ``main`` looks for it itself, so that a line which cannot be parsed answers in JSON too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(["--json"], is_flag=True, expose_value=False, help="Print one JSON object, as the last line.")
        )
        # some pairs of typer and click lose what an argument's help says
        hints = get_type_hints(inspect.unwrap(self.callback), include_extras=True) if self.callback else {}
        for parameter in self.params:
            for note in getattr(hints.get(parameter.name or ""), "__metadata__", ()):
                if isinstance(note, typer.models.ArgumentInfo):
                    parameter.help = note.help  # pyright: ignore[reportAttributeAccessIssue]

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        pass  # newer clicks would list the arguments a second time

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")  # escaped for rich, which does not print here


def wants_json(arguments: Sequence[str]) -> bool:
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before_dashes


def failure_of(error: BaseException, arguments: Sequence[str]) -> Failure:
    """Which exit code and which words an exception gets. Never raises."""
    match error:
        case PrivacyRefused():
            # `release` calls them reasons, everything else refusals: the same list, so that both readers find it
            return Failure(
                3, error.code, error.message, error.next, {"refusals": error.refusals, "reasons": error.refusals}
            )
        case SfumatoError():
            return Failure(error.exit_code, error.code, error.message, error.next)
        case KeyboardInterrupt() | click.Abort():
            return Failure(
                INTERRUPTED,
                "interrupted",
                "interrupted · what was spent is in the ledger",
                "For a training: the same command with --resume.",
            )
        case click.ClickException():
            context = getattr(error, "ctx", None)
            given = " ".join(arguments)[:200]
            return Failure(
                2,
                "usage",
                f"arguments = {given} · {error.format_message().rstrip('.')}",
                f"See `{context.command_path if context else 'sfumato'} --help`.",
            )
        case ModuleNotFoundError() if (error.name or "").partition(".")[0] != "sfumato":
            return Failure(
                5,
                "missing_dependency",
                f"{error.name} = not installed · this verb needs it",
                "`sfumato doctor` says what is missing and how to get it.",
            )
        case MemoryError():
            return Failure(
                5,
                "memory",
                f"memory = {error} · not enough for this run",
                "Set performance.max_physical_batch_size to a smaller number, or use a machine with more memory.",
            )
        case OSError() if error.errno in _DISK:
            return Failure(
                5,
                "disk",
                f"{error.filename or 'disk'} = {_DISK[error.errno]} · room to write is needed",
                "Free some space, or give another folder; then run the same command with --resume.",
            )
        case PermissionError():
            return Failure(
                5,
                "permission",
                f"{error.filename} = {error.strerror} · must be accessible to this user",
                "Change the permissions, or give another folder.",
            )
    if "No space left on device" in str(error):  # libraries that wrap the system's error in one of their own
        return Failure(5, "disk", "disk = full · room to write is needed", "Free some space; then --resume.")
    return Failure(
        1,
        "internal",
        f"{type(error).__name__}: {error} · this is a mistake of ours",
        f"Please send us {_write_report(error, arguments)} (read it first: it holds the command line and this message).",
    )


def print_answer(answer: Answer, *, as_json: bool) -> None:
    print(to_json(answer.result) if as_json else answer.text)


def print_failure(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        print(to_json(failure.as_dict()))
        return
    print(f"sfumato: {failure.message}", file=sys.stderr)
    for refusal in failure.more.get("refusals", []):
        if refusal["message"] != failure.message:
            print(f"  - {refusal['message']}", file=sys.stderr)
            if refusal["next"]:
                print(f"    next: {refusal['next']}", file=sys.stderr)
    if failure.next:
        print(f"next: {failure.next}", file=sys.stderr)


def to_json(result: Mapping[str, Any]) -> str:
    """One line of strict JSON: infinities and NaN, which JSON has not, become null."""
    return json.dumps(_plain(result), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case Mapping():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case os.PathLike():
            return os.fspath(value)
        case _:
            raise TypeError(f"{type(value).__name__} · has no form in JSON")


def _write_report(error: BaseException, arguments: Sequence[str]) -> str:
    lines = [
        f"sfumato {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "arguments: " + " ".join(arguments),
        "",
        *traceback.format_exception(error),
    ]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sfumato-bug-", suffix=".txt", delete=False) as file:
            file.write("\n".join(lines))
        return file.name
    except OSError:  # nowhere to write it: then the reader gets it at once
        print("\n".join(lines), file=sys.stderr)
        return "the lines above"
