"""``sfumato federate``: several sites, each with its own ledger; only noisy updates leave a site."""

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import words
from sfumato.cli.answer import INTERRUPTED, Answer
from sfumato.cli.arguments import Assignments, Out, Recipe
from sfumato.cli.progress import to_stderr
from sfumato.errors import UsageError

ENGINES = (
    "simulation: all sites in this process. flower: Flower's simulation (Ray). deployment: a SuperLink and a SuperNode for "
    "each site on this machine, with TLS and registered keys."
)


class Engine(StrEnum):
    simulation = "simulation"  # all sites in this process
    flower = "flower"
    deployment = "deployment"


def federate(
    recipe: Recipe,
    sites: Annotated[int | None, typer.Option(metavar="N", help="Default: the recipe's.")] = None,
    rounds: Annotated[int | None, typer.Option(metavar="R", help="Default: the recipe's.")] = None,
    engine: Annotated[Engine, typer.Option(help=ENGINES)] = Engine.simulation,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What every site allows; default: nothing without a guarantee.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run of this recipe.")] = False,
    assignments: Assignments = None,
    out: Out = Path("runs"),
) -> Answer:
    """Trains across sites that keep their records.

    The recipe's federation.mechanism says what makes an update private: by default DP-SGD at each site on its own
    records. A ledger for each site, which has the last word.

    \b
    Example:
      sfumato federate clinic --sites 3 --rounds 3
      sfumato federate clinic --sites 3 --rounds 3 --engine deployment

    Over several machines: federate server, federate site, federate status.
    """
    from sfumato import workflow

    result = workflow.federate(
        recipe,
        assignments=assignments or [],
        out=out,
        sites=sites,
        rounds=rounds,
        engine=engine.value,
        policy=policy,
        resume=resume,
        progress=to_stderr,
    )
    interrupted = result.get("stopped") == "interrupted"
    return Answer(result, _words(result), exit_code=INTERRUPTED if interrupted else 0)


def server(
    recipe: Recipe,
    site: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="A site and its public key; once for each.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What the sites call this machine: a name or an address; may be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(help="The one port that sites must reach.")] = 9443,
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Certificates, database, logs; the same for every run.")
    ] = Path("federation/server"),
    rounds: Annotated[int | None, typer.Option(metavar="R", help="Default: the recipe's.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Public records here, to show and measure; default: the recipe's."),
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a round waits for a site that works.")
    ] = 3600,
    absence: Annotated[float, typer.Option(metavar="SECONDS", help="How long it waits for one that is gone.")] = 120,
    patience: Annotated[float, typer.Option(metavar="SECONDS", help="How long all sites have to join.")] = 86_400,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run of this recipe.")] = False,
    assignments: Assignments = None,
    out: Out = Path("runs"),
) -> Answer:
    """Leads a federation across machines.

    The whole way is in docs/federation.md. Makes its certificates at the first start. Sites get authority.pem of its
    folder and the address; who has no registered key gets nothing.

    \b
    Example:
      sfumato federate server clinic --site north=north.pub --site south=south.pub --host fed.example.org --bind 0.0.0.0
    """
    from sfumato import workflow

    result = workflow.federate_server(
        recipe,
        sites=_named(site),
        folder=folder,
        hosts=host or ["127.0.0.1"],
        bind=bind,
        port=port,
        rounds=rounds,
        data=data,
        wait=wait,
        absence=absence,
        patience=patience,
        resume=resume,
        assignments=assignments or [],
        out=out,
        progress=to_stderr,
    )
    interrupted = result.get("stopped") == "interrupted"
    return Answer(result, _words(result), exit_code=INTERRUPTED if interrupted else 0)


def site(
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What this site allows; read again for every message.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="This site's records.")] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Without it: makes the key, and shows it.")
    ] = None,
    authority: Annotated[
        Path, typer.Option(metavar="FILE", help="The certificate that the server's administrator sent.")
    ] = Path("authority.pem"),
    folder: Annotated[Path, typer.Option(metavar="DIR", help="This site's key, ledgers and logs. Keep it.")] = Path(
        "federation/site"
    ),
    population: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of units, declared public; default: counted, and public by that."),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Only the K-th of N shares of the records: to try a federation out."),
    ] = None,
) -> Answer:
    """Takes part with the records of this machine.

    The site asks the server and is never asked: no port is opened to others. What the policy forbids is refused before a
    record is read. Runs until Ctrl-C.

    \b
    Example:
      sfumato federate site                      makes the key; send federation/site/site.key.pub to the server
      sfumato federate site --policy policy.yaml --data records --server fed.example.org:9443
    """
    from sfumato import workflow

    result = workflow.federate_site(
        policy=policy,
        data=data,
        server=server,
        authority=authority,
        folder=folder,
        population=population,
        share=share,
        progress=to_stderr,
    )
    if "line" in result:
        return Answer(
            result,
            f"public key  {result['public_key']}\n{result['line']}\nidentity    {result['identity']}\n"
            "next: send the key to the server's administrator, and the identity to the other sites.",
        )
    return Answer(result, "ended; ledgers and key stay in " + str(result["folder"]))


def status(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="--folder of a server or a site, or the folder of a run.")
    ] = Path("federation/server"),
) -> Answer:
    """Says what a server or a site is doing.

    \b
    Example:
      sfumato federate status federation/site
    """
    from sfumato import workflow

    said = workflow.federate_status(folder)
    lines = [(name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in said.items()]
    plain = [
        (name, value) for name, value in lines if not isinstance(value, dict) and name not in ("since", "at", "ended")
    ]
    return Answer(
        said, words.pairs([*plain, ("last word", datetime.fromtimestamp(said["at"]).isoformat(" ", "seconds"))])
    )


def _named(sites: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in sites:
        name, _, path = text.partition("=")
        if not name or not path or name in named:
            raise UsageError(
                f"site = {text!r} · must be NAME=FILE, each name once", next="Such as --site north=north.pub."
            )
        named[name] = Path(path)
    return named


def _rounds(result: dict[str, Any]) -> str:
    discarded = ", ".join(map(str, result.get("discarded", ())))
    return f"{result['rounds']}" + (f" · discarded: {discarded}" if discarded else "")


def _words(result: dict[str, Any]) -> str:
    sites = [(site["name"], site.get("epsilon"), site.get("rounds"), site.get("refused")) for site in result["sites"]]
    parts = [
        words.pairs(
            [
                ("run", result["run"]),
                ("rounds", _rounds(result)),
                ("bytes up", result.get("bytes_up")),
                ("bytes down", result.get("bytes_down")),
            ]
        ),
        words.table(("site", "epsilon", "rounds", "refused"), sites),
    ]
    if result.get("stopped") == "interrupted":
        parts.append(
            "Interrupted after a round; what was spent is in the ledgers. next: the same command with --resume."
        )
    if result.get("quality"):
        parts.append(words.quality(result["quality"]))
    return "\n\n".join(parts)
