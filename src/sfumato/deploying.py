"""Engines of a federated run that are more than this process: Flower's simulation, and real processes on this machine.

    simulated(...)   Ray, through Flower's simulation
    deployed(...)    SuperLink and SuperNodes with TLS and registered keys, a process for every site

Both are given to `federating.run`. A site's process has its own copy of the recipe (the run's ``resolved.yaml``) and takes
its own share of the records; from the run it gets messages and nothing else.   [shell: processes, files]
"""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import building, federating, prompting, stages
from sfumato import recipe as recipes_file
from sfumato.errors import MissingDependency
from sfumato.federation import credentials
from sfumato.federation import policy as policies
from sfumato.federation.processes import LOOPBACK, Child, Status, ended, python
from sfumato.stages import Progress
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from sfumato.federation.messages import Ask, Reply
    from sfumato.federation.serving import Exchange
    from sfumato.federation.sites import Site, Work

WAIT = 3600.0  # seconds that a round waits for the slowest site
ABSENCE = 120.0  # seconds that it waits for one that is not there at all
POLICY, KEY, LAST_REPLY = "policy.yaml", "site.key", "last-reply"


def require_flower() -> None:
    """Raises MissingDependency where flwr or ray is not installed."""
    from importlib.util import find_spec

    for name in ("flwr", "ray"):
        if find_spec(name) is None:
            raise MissingDependency(
                f"{name} = not installed · this engine needs it", next="pip install 'sfumato[federation]'."
            )


# -- a site of a run on this machine ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _member(run: Path, number: int) -> "tuple[Site, Work]":
    """Site ``number`` (from 0) of a run that was begun, as this process sees it."""
    recipe = recipes_file.load(run / "resolved.yaml")
    prepared = stages.load(recipe)
    prompting.ready(recipe, prepared)
    members = federating.members_here(recipe, prepared, building.build(recipe), None)
    members = [replace(site, ledger=run / site.ledger) for site in members]
    work = federating.work_for(recipe, members)
    site = members[number]
    return replace(site, policy=policies.load(site.folder / POLICY)), work


def _answer_of(run: Path, number: int) -> "Callable[[Ask], Reply]":
    """What site ``number`` answers. Its records are read when it is asked first: until then it is there already, so that reading
    them counts as work, and not as absence."""

    def answer(ask: "Ask") -> "Reply":
        from sfumato.federation import local
        from sfumato.federation.deployment import remembering

        site, work = _member(run, number)
        return remembering(lambda asked: local.answer(site, work, asked), site.folder / LAST_REPLY)(ask)

    return answer


def _write_policies(members: "Sequence[Site]") -> None:
    import yaml

    for site in members:
        credentials.private_folder(site.folder)
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(site.policy).items()}
        (site.folder / POLICY).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def main(run: str, number: str, folder: str, name: str, server: str, authority: str) -> None:
    """The process of one site of `deployed`."""
    from sfumato.federation.deployment import Node

    os.umask(0o077)
    home = Path(folder)
    node = Node(home, server=server, authority=Path(authority), key=home / KEY)
    with suppress(KeyboardInterrupt), ended([node.child]):
        node.serve(_answer_of(Path(run), int(number)), site=name, stopped=lambda: False)


# -- engines ---------------------------------------------------------------------------------------------------------------


def deployed(progress: Progress, *, wait: float = WAIT, absence: float = ABSENCE) -> "federating.Engine":
    """Real processes on this machine, bound to loopback; ended when the run is, whatever ends it. A site that died is started
    again. Logs and keys lie in the run's folder."""
    require_flower()

    @contextmanager
    def engine(members: "Sequence[Site]", work: "Work", folder: RunFolder) -> "Iterator[Exchange]":
        from sfumato.federation.deployment import Server

        home = folder.path / federating.SERVER
        server = Server(home / "link", home / "keys", hosts=[LOOPBACK])
        _write_policies(members)
        keys = {site.name: credentials.for_site(site.folder / KEY) for site in members}
        children = [
            Child(
                site.name,
                python(
                    "sfumato.deploying",
                    folder.path,
                    number,
                    site.folder,
                    site.name,
                    f"{LOOPBACK}:{server.port}",
                    server.authority,
                ),
                site.folder / "site.log",
            )
            for number, site in enumerate(members)
        ]
        status = Status(home, what="server", run=folder.name, address=f"{LOOPBACK}:{server.port}", sites=list(keys))
        try:
            with ended([*children, server.child]):
                for child in children:  # in the main thread: the system ends them with it
                    child.start()
                server.start(keys)
                progress(f"SuperLink on {LOOPBACK}:{server.port}, {len(children)} sites in processes of their own")
                yield watched(server.exchange, status, children, wait=wait, absence=absence)
                server.link.close()
        finally:
            traffic = server.link.traffic
            status.say(bytes_up=traffic.up, bytes_down=traffic.down, by_site=traffic.by_site)
            status.close()

    return engine


def watched(
    exchange: "Callable[..., dict[str, Reply]]",
    status: Status,
    children: Sequence[Child],
    *,
    wait: float,
    absence: float,
) -> "Exchange":
    """An exchange that tells the status file, and starts again who died of ``children``."""

    def told(asked: "dict[str, Ask]") -> "Mapping[str, Reply]":
        first = next(iter(asked.values()), None)
        if first is not None:
            status.say(round=first.round, exchange=first.exchange, asked=sorted(asked))
        replies = exchange(asked, wait=wait, absence=absence, meanwhile=restart)
        status.say(answered=sorted(replies), pids={child.name: child.pid for child in children})
        return replies

    def restart() -> None:
        for child in children:
            child.start_again()

    return told


def simulated(*, processors: int | None = None) -> "federating.Engine":
    """Flower's simulation: sites in Ray's processes on this machine."""
    require_flower()

    @contextmanager
    def engine(members: "Sequence[Site]", work: "Work", folder: RunFolder) -> "Iterator[Exchange]":
        from sfumato.federation import flower_app

        _write_policies(members)
        run, names = folder.path, [site.name for site in members]
        asking: queue.Queue[Any] = queue.Queue()
        answered: queue.Queue[Any] = queue.Queue()

        def rounds(exchange: "flower_app.Exchange") -> None:
            while (asked := asking.get()) is not None:
                answered.put(exchange(asked))

        def flower() -> None:
            try:
                flower_app.simulate(
                    rounds,
                    lambda number: _answer_of(run, number),
                    sites=names,
                    processors=processors or os.cpu_count() or 1,
                )
            except BaseException as error:
                answered.put(error)

        def exchange(asked: "dict[str, Ask]") -> "Mapping[str, Reply]":
            asking.put(asked)
            got = answered.get()
            if isinstance(got, BaseException):
                raise got
            return got

        thread = threading.Thread(target=flower, name="flower")
        thread.start()
        try:
            yield exchange
        finally:
            asking.put(None)
            thread.join()
            flower_app.end_simulation()

    return engine


if __name__ == "__main__":
    main(*sys.argv[1:])
