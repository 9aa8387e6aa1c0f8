"""``sfumato generate``: pictures, texts and sounds from a trained run or a bundle; spends nothing."""

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer


def generate(
    run_or_bundle: Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run's folder, or a bundle.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="What it is told; may be repeated.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture that it is told; may be repeated.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", metavar="FILE", help="A sound that it is told; may be repeated.")
    ] = None,
    want: Annotated[
        list[str] | None,
        typer.Option(metavar="text|image|audio", help="What is made; repeat for several together.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many of each.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")] = Path("generated"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
) -> Answer:
    """Makes what the model was trained to make: PNG, WAV or TXT files. Spends nothing.

    Without --want: what the model's first direction gives that takes what is told.

    \b
    Example:
      sfumato generate runs/mnist/last --text "a handwritten seven" --count 8
    """
    from sfumato import workflow

    result = workflow.generate(
        run_or_bundle,
        texts=text or [],
        images=image or [],
        audios=audio or [],
        want=want or [],
        count=count,
        out=out,
        seed=seed,
    )
    made = result.get("made") or [""] * len(result["files"])
    lines = "\n".join(str(file) for file in result["files"])
    if any(made):
        lines += "\n" + "\n".join(f"  {line}" for line in made)
    return Answer(result, lines + "\n" + words.pairs([("model", result["model"])]))
