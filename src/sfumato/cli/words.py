"""Values in words for people: aligned lines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """Name and value, one a line, aligned; a None is left out."""
    shown = [(name, number(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns, aligned."""
    cells = [list(head), *[["-" if cell is None else number(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reasons(items: Iterable[Mapping[str, Any]]) -> str:
    """Refusals or warnings: the sentence, and the next step below it."""
    return "\n".join(f"- {item['message']}\n  next: {item.get('next', '')}" for item in items)


def quality(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a figure, with its interval and its baselines."""
    rows = []
    for name, figure in figures.items():
        interval = None if figure.get("low") is None else f"[{figure['low']:.3g}, {figure['high']:.3g}]"
        baselines = ", ".join(f"{other} {number(value)}" for other, value in (figure.get("baseline") or {}).items())
        rows.append((name, figure.get("value"), interval, baselines or None))
    return table(("figure", "value", "95 %", "beside it"), rows)
