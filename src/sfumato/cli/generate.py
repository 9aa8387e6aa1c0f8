"""``sfumato generate``: pictures from a trained run or a bundle; spends nothing."""

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer


def generate(
    run_or_bundle: Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run's folder, or a bundle.")],
    text: Annotated[list[str], typer.Option("--text", help="What the picture shows; may be repeated.")],
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of each text.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")] = Path("generated"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
) -> Answer:
    """Draws pictures for a text. Spends nothing.

    \b
    Example:
      sfumato generate runs/mnist/last --text "a handwritten seven" --count 8
    """
    from sfumato import workflow

    result = workflow.generate(run_or_bundle, texts=text, count=count, out=out, seed=seed)
    return Answer(
        result, "\n".join(str(file) for file in result["files"]) + "\n" + words.pairs([("model", result["model"])])
    )
