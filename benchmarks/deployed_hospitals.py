"""The recipe `hospitals` over real processes, undisturbed and with processes killed in the middle of a round.

    .venv/bin/python benchmarks/deployed_hospitals.py "one process" undisturbed site supernode superlink server same --folder DIR
    .venv/bin/python benchmarks/deployment.py --sites 4 --parameters 67782 --rounds 5 > DIR/wire.json
    .venv/bin/python benchmarks/deployed_hospitals.py --folder DIR --page > benchmarks/results/deployment.md

Each case is a command line as a user types it, ``sfumato federate hospitals --engine deployment``, with accounts and keys of its own
below DIR/CASE. A process is killed (SIGKILL) in round 3 after a site has charged steps of it and before it has
sent anything:

    site        the process that reads the site's records (its SuperNode ends with it)
    supernode   what carries that site's messages
    superlink   what carries everybody's
    server      the command itself; then the same command with --resume

``same``: with chance that both can repeat, and the noise on, real processes give the weights that one process gives (fewer
patients, since nothing of it depends on their number). Its runs are no releases.

What is checked, and fails the case if it is not so: every site's chain is whole; its account has what its ledger has; what it
has charged is one release before the first round, 25 steps for every round that its update is in, and for a round that it was
asked for and is not in between none and 25; all updates that were used had all of their 25 noisy steps; messages weigh at most
1.02 of what they carry, where none was sent twice.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sfumato import building, deploying, federating, stages, workflow
from sfumato.federation import credentials, local, rounds, server_state, simulate, sites
from sfumato.federation.deployment import Node, Server
from sfumato.federation.keeping import read_part
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.policy import SitePolicy
from sfumato.federation.processes import LOOPBACK, Child, ended, status
from sfumato.federation.serving import serve
from sfumato.privacy import ledger
from sfumato.randomness import TestRandom
from sfumato.training.rounds import LocalTraining

UNDISTURBED, IN_ONE = "undisturbed", "one process"
CASES = (IN_ONE, UNDISTURBED, "site", "supernode", "superlink", "server")
KILLED_IN = 3
MOST = 1.02  # bytes of a message / bytes of the trained parameters
HERE = Path(__file__).resolve().parents[1]


# -- the command, as a user types it --


class Command:
    """A command line in a process of its own, in ``folder``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        home = {f"XDG_{name}_HOME": str(folder / "home" / name.lower()) for name in ("DATA", "CONFIG", "CACHE")}
        self.output = folder / "output.json"
        with self.output.open("w") as output, (folder / "progress.log").open("a") as progress:
            self.process = psutil.Popen(
                [sys.executable, "-c", "from sfumato.cli.main import main; main()", *arguments, "--json"],
                cwd=folder,
                stdout=output,
                stderr=progress,
                env={**os.environ, **home, "PYTHONPATH": str(HERE / "src"), "OMP_NUM_THREADS": "1"},
            )

    def find(self, word: str, below: int | None = None) -> int:
        """The process of ours whose command has this word; below: among those that this process started."""
        top = psutil.Process(self.process.pid if below is None else below)
        (pid,) = [child.pid for child in top.children(recursive=True) if word in child.cmdline()]
        return pid

    def wait(self) -> int:
        return self.process.wait()


class Middle:
    """Finds a site in the middle of a round: it has begun it, charged some of it, and sent nothing of it."""

    def __init__(self, place: Path, number: int) -> None:
        self.place, self.number, self.before = place, number, {}

    def __call__(self) -> Path | None:
        for site in _sites(self.place):
            with suppress(FileNotFoundError):
                kept, book = (site / "ledger.kept").stat().st_mtime_ns, (site / "ledger.db").stat().st_mtime_ns
                begun = read_part(site / "ledger.kept").values["answered"] == [self.number, 0]
                events = _events(site)
                if begun and book > kept and events > self.before.get(site, events):
                    return site
                if not begun:
                    self.before[site] = events
        return None


def wait_for(what: Callable[[], Any], process: psutil.Popen, seconds: float = 1800.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"it did not happen; the command {'ended' if process.poll() is not None else 'goes on'}")
        time.sleep(0.05)
    return found


def run(case: str, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Runs the case, killing what it says, and gives what it came to (`measured`)."""
    engine = "simulation" if case == IN_ONE else "deployment"
    arguments = ["federate", "hospitals", "--engine", engine, "--set", "federation.rounds=5"]
    arguments += [word for one in settings for word in ("--set", one)]
    command, began = Command(folder, *arguments), time.monotonic()
    place = folder / "runs" / "hospitals-federated" / "v1"
    killed = None
    if case not in (IN_ONE, UNDISTURBED):
        site = wait_for(Middle(place, KILLED_IN), command.process)
        name = status(place / "server")
        assert name is not None
        if case == "server":
            pid = command.process.pid
        elif case == "superlink":
            pid = command.find("superlink")
        else:
            own = name["pids"][name["sites"][int(site.name.removeprefix("site-")) - 1]]
            pid = own if case == "site" else command.find("supernode", below=own)
        os.kill(pid, signal.SIGKILL)
        killed = {"what": case, "site": name["sites"][int(site.name.removeprefix("site-")) - 1], "pid": pid}
        killed["events_then"] = _events(site)
    code = command.wait()
    if case == "server":
        command = Command(folder, *arguments, "--resume")
        code = command.wait()
    if code != 0:
        raise RuntimeError(f"{case} = ended with {code}; see {folder / 'progress.log'}")
    found = measured(place)
    found = {
        "case": case,
        "settings": settings,
        "killed": killed,
        "wall_seconds": round(time.monotonic() - began),
        **found,
    }
    if case == UNDISTURBED:
        found["wrong"] += [
            f"{site}: {way} = {ratio:.4f} of its parameters" for site, _, *both in ratios(found)
            for way, ratio in zip(("down", "up"), both, strict=True) if ratio > MOST
        ]  # fmt: skip
    return found


def _sites(place: Path) -> list[Path]:
    return sorted((place / "sites").glob("site-*"))


def _events(site: Path) -> int:
    return sum(event.count for event in ledger.events_of_jsonl(ledger.export_jsonl(site / "ledger.db")))


# -- what it came to --


def measured(place: Path) -> dict[str, Any]:
    """Rounds, ledgers, bytes and quality of a run that is finished; ``wrong`` lists what is not as it must be."""
    report = json.loads((place / "reports" / "federation.json").read_text())
    kept: Any = read_part(place / "server" / "server.safetensors").values
    said = status(place / "server") or {"by_site": {}}  # without messages, in one process
    public, steps = kept["public"], kept["settings"]["local_steps"]
    parameters = dict.fromkeys(public["populations"], 0)
    for tensor, holders in public["holders"].items():
        size = 1
        for length in public["shapes"][tensor]:
            size *= length
        for holder in holders:
            parameters[holder] += size
    released = dict.fromkeys(public["populations"], 0)
    for part, holders in public["releasing"].items():
        for holder in holders:
            released[holder] += math.prod(public["released"][part])
    trained = [one for one in report["rounds"] if one["round"]]
    wrong, sites = [], []
    for number, site in enumerate(report["sites"], start=1):
        name, folder = site["name"], place / "sites" / f"site-{number}"
        book, account = ledger.show(folder / "ledger.db"), _account(place, number, len(report["sites"]))
        rounds_in = [one["round"] for one in trained if name in one["sites"]]
        rounds_out = [one["round"] for one in trained if name in one["asked"] and name not in one["sites"]]
        opened = sum(event["mechanism"] == "gaussian" for event in book["events"])
        lost = book["steps"] - opened - steps * len(rounds_in)
        if opened != sum(name in one["sites"] for one in report["rounds"] if not one["round"]):
            wrong.append(f"{name}: {opened} releases charged")
        if not book["valid"]:
            wrong.append(f"{name}: {book['detail']}")
        if account != book["events"]:
            wrong.append(f"{name}: account {account}, ledger {book['events']}")
        if not 0 <= lost <= steps * len(rounds_out):
            wrong.append(f"{name}: {book['steps']} events for {len(rounds_in)} rounds in, {len(rounds_out)} out")
        before = 0
        for one in trained:  # an update has its 25 steps, and what was lost before it lies in rounds that are out
            if name in one["sites"]:
                new = one["charged"][name] - before
                missed = [number for number in rounds_out if number < one["round"]]
                if not steps <= new <= steps * (1 + len(missed)):
                    wrong.append(f"{name}, round {one['round']}: {new} events for its update")
                before = one["charged"][name]
        ways = said["by_site"].get(name, {"up": 0, "down": 0})
        sites.append(
            {
                "name": name,
                "parameters": parameters[name],
                "released": released[name],
                "rounds_in": rounds_in,
                "rounds_out": {one["round"]: _why(one, name) for one in report["rounds"] if one["round"] in rounds_out},
                "events": book["steps"],
                "lost": lost,
                "epsilon": book["epsilon"],
                "up": ways["up"],
                "down": ways["down"],
            }
        )
    quality = json.loads((place / "reports" / "quality.json").read_text())
    return {
        "rounds": [
            {key: one[key] for key in ("round", "seconds", "asked", "sites", "discarded", "quality")}
            for one in report["rounds"]
        ],
        "sites": sites,
        "wrong": wrong,
        "quality": quality,
        "load": os.getloadavg()[0],
    }


def _account(place: Path, number: int, sites: int) -> list[dict[str, Any]]:
    (path,) = place.parents[2].glob(f"home/data/**/.sfumato/account-site-{number}-of-{sites}.db")
    return ledger.show(path)["events"]


def _why(one: dict[str, Any], site: str) -> str:
    return next((out["code"] for out in one["left_out"] if out["site"] == site), "discarded")


def ratios(found: dict[str, Any]) -> list[tuple[str, int, float, float]]:
    """(site, bytes of its parameters, down, up), of a run in which no message was sent twice: of all messages over all that they
    carry, the parameters of every round and, up, what was released before the first."""
    rounds_ = sum(1 for one in found["rounds"] if one["round"])
    return [
        (
            site["name"],
            4 * site["parameters"],
            site["down"] / (4 * site["parameters"] * rounds_),
            site["up"] / (4 * site["parameters"] * rounds_ + 8 * site["released"]),
        )
        for site in found["sites"]
    ]


# -- the same numbers in one process and in many --


def _work(run: Path) -> tuple[list[sites.Site], sites.Work]:
    """Everybody's records and plans, with chance of (site, round) in place of the system's."""
    recipe = workflow.federated("hospitals", json.loads((run / "settings.json").read_text()))
    prepared = stages.load(recipe)
    policy = SitePolicy(allow_not_private=True)
    members = federating.members_here(recipe, prepared, building.build(recipe), policy)
    members = [replace(site, ledger=run / site.ledger, account=None) for site in members]

    def train_steps(model: Any, table: Any, plan: Any, book: Any, *, steps: int, first_step: int) -> None:
        chance = TestRandom(1_000 * plan.population + first_step)
        own = LocalTraining(recipe.training, recipe.performance, chance, proximal=recipe.federation.proximal)
        own(model, table, plan, book, steps=steps, first_step=first_step)

    return members, replace(federating.work_for(recipe, members), train_steps=train_steps, random=lambda: TestRandom(1))


@lru_cache(maxsize=1)
def _here(run: Path) -> tuple[list[sites.Site], sites.Work]:
    return _work(run)


def site_of_same(name: str, run: str, server: str, authority: str) -> None:
    members, work = _here(Path(run))
    site = next(site for site in members if site.name == name)

    def answer(ask: Ask) -> Reply:
        return local.answer(site, work, ask)

    node = Node(site.folder, server=server, authority=Path(authority), key=site.folder / deploying.KEY)
    with suppress(KeyboardInterrupt), ended([node.child]):
        node.serve(answer, site=name, stopped=lambda: False)


def same(folder: Path, settings: list[str]) -> dict[str, Any]:
    """The largest difference of any weight after the rounds, in one process and over SuperLink and SuperNodes."""
    states = {}
    for place in (folder / "one", folder / "many"):
        place.mkdir(parents=True)
        (place / "settings.json").write_text(json.dumps(["federation.rounds=5", *settings]))
        members, work = _work(place)
        begun = rounds.begin(work.settings, work.public, _start(members, work), run="same/v1", recipe=work.recipe)
        after = _serve_here(begun, members, work) if place.name == "one" else _serve_there(begun, members, place)
        if any(result.left_out or result.discarded for result in after.results):
            raise RuntimeError(f"{place.name}: {after.results}")
        states[place.name] = after.state
    begun_at = _start(*_here(folder / "one"))
    difference = max(float((states["one"][name] - states["many"][name]).abs().max()) for name in states["one"])
    moved = max(float((states["one"][name] - begun_at[name]).abs().max()) for name in begun_at)
    wrong = [] if difference <= 1e-6 else [f"the weights differ by {difference}"]
    return {"case": "same", "settings": settings, "difference": difference, "moved": moved, "wrong": wrong}


def _serve_here(
    begun: server_state.ServerState, members: list[sites.Site], work: sites.Work
) -> server_state.ServerState:
    return serve(begun, simulate.exchange_here(members, work), chance=TestRandom(0))


def _serve_there(begun: server_state.ServerState, members: list[sites.Site], place: Path) -> server_state.ServerState:
    server = Server(place / "server" / "link", place / "server" / "keys", hosts=[LOOPBACK])
    keys = {site.name: credentials.for_site(site.folder / deploying.KEY) for site in members}
    own = [str(place), f"{LOOPBACK}:{server.port}", str(server.authority)]
    children = [
        Child(site.name, [sys.executable, __file__, "--site", site.name, *own], site.folder / "site.log")
        for site in members
    ]
    with ended([*children, server.child]):
        for child in children:
            child.start()
        server.start(keys)
        after = serve(begun, lambda asked: server.exchange(asked, wait=3600), chance=TestRandom(0))
        server.link.close()
    return after


def _start(members: list[sites.Site], work: sites.Work) -> dict[str, torch.Tensor]:
    return {name: t for name, t in simulate.start_of(members, work).items() if name in work.public.holders}


# -- the page --


def page(folder: Path) -> str:
    found = {}
    for case in (*CASES, "same"):
        path = folder / case.replace(" ", "-") / "found.json"
        if path.is_file():
            found[case] = json.loads(path.read_text())
    lines = ["# `hospitals` over real processes", "", *_about(found)]
    if UNDISTURBED in found:
        lines += ["", "## Bytes", "", *_bytes(found[UNDISTURBED])]
    if (folder / "wire.json").is_file():
        lines += ["", *_wire(json.loads((folder / "wire.json").read_text()))]
    lines += ["", "## Rounds and ledgers", "", *_table(found)]
    if "same" in found:
        one = found["same"]
        lines += [
            "",
            "## The same numbers",
            "",
            f"With chance that both repeat, noise on, `{' '.join(one['settings'])}`: after five rounds the weights of one process "
            f"and those over SuperLink and SuperNodes differ by {one['difference']:.3g} at most; the largest had moved by "
            f"{one['moved']:.3g}.",
        ]
    return "\n".join(lines) + "\n"


def _about(found: dict[str, Any]) -> list[str]:
    by_settings: dict[str, list[str]] = {}
    for case, one in found.items():
        if case != "same":
            by_settings.setdefault(" ".join(one["settings"]), []).append(case)
    own = "; ".join(f"{', '.join(cases)}: `{settings or 'nothing'}`" for settings, cases in by_settings.items())
    return [
        "`benchmarks/deployed_hospitals.py`: `sfumato federate hospitals --engine deployment --set federation.rounds=5`, and set "
        f"besides, {own}.",
        "",
        "SuperLink, four sites and their SuperNodes in processes of their own, TLS, registered keys. Killed: SIGKILL in round "
        f"{KILLED_IN}, after a site had charged steps of it and before it sent anything. Two cores, which other jobs used too (load in the "
        "table). The first of the seconds are those of the release, with the reading of "
        "the records in them, as has the round after a restart. κ is of a small "
        "reader on public records, after the last round.",
    ]


def _bytes(found: dict[str, Any]) -> list[str]:
    lines = [
        "| site | parameters | bytes of them | released once, bytes | messages down | messages up |",
        "|---|---|---|---|---|---|",
    ]
    released = {site["name"]: 8 * site["released"] for site in found["sites"]}
    for name, size, down, up in ratios(found):
        lines.append(f"| {name} | {size // 4:,} | {size:,} | {released[name]:,} | {down:.4f} | {up:.4f} |")
    return [
        *lines,
        "",
        "Serialised messages of all rounds over the bytes of the parameters that the site trains, in each, and of what it released before "
        "the first; nothing compressed.",
    ]


def _wire(found: dict[str, Any]) -> list[str]:
    def mean(way: str) -> float:
        return sum(one[way] for one in found["rounds"]) / len(found["rounds"])

    return [
        f"On the wire, with TLS, the SuperNodes' polling and heartbeats (`benchmarks/deployment.py --sites {found['sites']} --parameters "
        f"{found['bytes'] // 4}`, its own messages of that size): {mean('socket_down'):.3f} down and {mean('socket_up'):.3f} up. What is "
        f"more than {MOST} there is polling, some kB a second and site, whatever the model: of 1,250,000 parameters it is 1.003 and 1.006.",
    ]


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| killed | rounds used, discarded | who was hit: rounds in, out | events charged (lost) | all ledgers right | "
        "s a round | s in all, load | mean κ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, one in found.items():
        if case == "same":
            continue
        rounds_ = [each for each in one["rounds"] if each["round"]]
        used = [each for each in rounds_ if not each["discarded"]]
        hit = one["killed"]["site"] if one["killed"] else None
        at = "; ".join(
            f"{site['name']}: {len(site['rounds_in'])} in"
            + "".join(f", round {number} {why}" for number, why in site["rounds_out"].items())
            for site in one["sites"]
            if site["rounds_out"] or site["name"] == hit
        )
        lost = {site["name"]: f" ({site['lost']})" if site["lost"] else "" for site in one["sites"]}
        charged = ", ".join(f"{site['events']}{lost[site['name']]}" for site in one["sites"])
        seconds = ", ".join(f"{each['seconds']:.0f}" for each in one["rounds"])
        last = (one["rounds"][-1]["quality"] or {}).get("kappa_mean")
        lines.append(
            f"| {f'nothing, {case}' if hit is None else f'{case} ({hit})'} | {len(used)}, {len(rounds_) - len(used)} | {at or '—'} | "
            f"{charged} | {'; '.join(one['wrong']) or 'yes'} | {seconds} | {one['wall_seconds']}, {one['load']:.0f} | "
            f"{'—' if last is None else f'{last:.3f}'} |"
        )
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--site"]:
        site_of_same(*sys.argv[2:])
        return
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("cases", nargs="*", metavar="CASE", help=", ".join((*CASES, "same")))
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings")
    arguments.add_argument("--page", action="store_true", help="what was found in the folder, as Markdown")
    given = arguments.parse_args()
    if unknown := set(given.cases) - {*CASES, "same"}:
        arguments.error(f"{', '.join(sorted(unknown))}: no such case")
    failed = False
    for case in given.cases:
        folder = given.folder.resolve() / case.replace(" ", "-")
        found = same(folder, given.settings) if case == "same" else run(case, folder, given.settings)
        (folder / "found.json").write_text(json.dumps(found, indent=1))
        print(f"{case}: {'; '.join(found['wrong']) or 'right'}", file=sys.stderr, flush=True)
        failed = failed or bool(found["wrong"])
    if given.page:
        print(page(given.folder.resolve()), end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
