"""Texts with places for values: the report's page and the model card. HTML is escaped, Markdown is not."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def fill(name: str, /, **values: Any) -> str:
    """The template ``name`` with its values. A value that it names and nobody gave is our mistake: raises."""
    return _environment().get_template(f"{name}.jinja").render(**values)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
