"""``sfumato verify``: what a stranger can check of a bundle; needs no torch."""

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The signer's public key; else the keys that you trust.")
    ] = None,
) -> Answer:
    """Checks a bundle as a stranger would.

    Hashes, signature, epsilon recomputed from the ledger's events, taint of the weights. Exit code 4 if anything is wrong.

    \b
    Example:
      sfumato verify runs/clinic/last/bundle --key signer.pub.pem
    """
    from sfumato.release.refusing import AGAIN
    from sfumato.release.verify import verify as check

    result = check(bundle, key_file=key)
    rows = [("ok" if item["ok"] else "FAILED", item["name"], item["detail"]) for item in result["checks"]]
    if result["valid"]:
        verdict = f"valid · ({result['epsilon']:.4g}, {result['delta']:.3g})-DP"
    else:
        wrong = next(item for item in result["checks"] if not item["ok"])
        verdict = f"NOT VALID\nnext: {wrong.get('next', AGAIN)}"
    return Answer(
        result, words.table(("", "check", "detail"), rows) + f"\n\n{verdict}", exit_code=0 if result["valid"] else 4
    )
