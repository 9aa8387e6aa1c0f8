"""Arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A named recipe, or the path of a YAML file.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value of the recipe; may be repeated."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where runs are kept: DIR/NAME/vN.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/clinic/last.")]
LimitUnits = Annotated[
    int | None, typer.Option("--limit-units", metavar="N", help="Only N units: a small clean sample first, then all.")
]
