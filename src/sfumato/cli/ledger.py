"""``sfumato ledger``: what was spent, and whether the record of it is whole."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import Answer, Verb
from sfumato.errors import UsageError

app = typer.Typer(rich_markup_mode=None, help="Shows and checks what was spent.")
Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="A ledger or an account (.db), or a run's folder.")]


@app.command(cls=Verb)
def show(path: Path_) -> Answer:
    """The events and what they add up to: of one run, or of all runs on an account.

    \b
    Example:
      sfumato ledger show runs/clinic/last
      sfumato ledger show .sfumato/account.db --json
    """
    from sfumato.privacy import ledger

    path = _file(path)
    result = {**ledger.show(path), "trajectory": ledger.trajectory(path)}
    return Answer(result, _words(result))


@app.command(cls=Verb)
def verify(
    path: Path_,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The signer's public key; else the keys that you trust.")
    ] = None,
) -> Answer:
    """Recomputes the chain of hashes and checks who signed it.

    Exit code 4 if an entry was changed, if signed entries were taken away, or if the signer is not known.

    \b
    Example:
      sfumato ledger verify runs/clinic/last/ledger.db --key signing-key.pub.pem
    """
    from sfumato.privacy import ledger
    from sfumato.release import keys

    if key is not None:
        public = keys.read_public(key)
        trusted = {public.id: public}
    else:
        trusted = keys.trusted()
    result = ledger.verify(_file(path), trusted)  # it reads every entry again
    return Answer(result, _words(result), exit_code=0 if result["valid"] else 4)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    sites = sorted(path.glob("sites/*/ledger.db"), key=lambda site: (len(site.parent.name), site.parent.name))
    if sites and not (path / "ledger.db").exists():
        raise UsageError(
            f"ledger = {path} · is a federation's run: each of its {len(sites)} sites has a ledger",
            next=f"Give one of them, such as {sites[0].parent}.",
        )
    server = path / "server" / "ledger.db"  # of a federation whose server adds the noise
    return server if server.exists() and not (path / "ledger.db").exists() else path / "ledger.db"


def _words(result: dict[str, Any]) -> str:
    rows = [
        (event["mechanism"], event["count"], event["sampling_rate"], event["noise_multiplier"])
        for event in result["events"]
    ]
    parts = [words.table(("mechanism", "times", "sampling rate", "noise multiplier"), rows)]
    if result.get("runs"):
        runs = [
            (run["run"], sum(event["count"] for event in run["events"]), run["epsilon"], run["delta"], run["unit"])
            for run in result["runs"]
        ]
        parts.append(words.table(("run", "events", "epsilon", "delta", "unit"), runs))
    for limit in result.get("limits", []):
        parts.append(
            f"limit: epsilon <= {limit['epsilon']:g} at delta = {limit['delta']:.3g}, {limit['spent']:.1%} of it spent"
        )
    parts.append(
        words.pairs(
            [
                ("epsilon", result["epsilon"]),
                ("delta", result["delta"]),
                ("accountant", result.get("accountant")),
                ("valid", result["valid"]),
                ("", result.get("detail")),
                *(("note", note) for note in result.get("notes", [])),
            ]
        )
    )
    return "\n\n".join(parts)
