"""Ways to run the same federation: ``{name: run(sites, work, folder) -> the state after the last round}``.

Another engine adds a line. Each is given sites of its own, so none finds the other's ledgers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sfumato.federation import local, rounds, simulate
from sfumato.federation.messages import State
from sfumato.federation.sites import Site, Work
from sfumato.randomness import TestRandom

Engine = Callable[[Sequence[Site], Work, Path], State]


def pure(sites: Sequence[Site], work: Work, folder: Path) -> State:
    """The functions alone: no bytes, no checkpoint, no ledger of the server."""
    state = {name: t for name, t in simulate.start_of(sites, work).items() if name in work.public.holders}
    server, chance = rounds.begin(work.settings, work.public, state, run="r", recipe=work.recipe), TestRandom(0)
    by_name = {site.name: site for site in sites}
    while not server.done:
        server, asked = rounds.asks(server, chance)
        replies = {name: local.answer(by_name[name], work, ask) for name, ask in asked.items()}
        server = rounds.receive(server, replies, chance)
    assert not any(result.left_out or result.discarded for result in server.results), server.results
    return server.state


def in_process(sites: Sequence[Site], work: Work, folder: Path) -> State:
    """``sfumato federate``: through bytes, with checkpoints after every exchange and the server's ledger."""
    result = simulate.simulate(sites, work, run="r", folder=folder, chance=TestRandom(0))
    assert not any(round.left_out or round.discarded for round in result.rounds), result.rounds
    return result.state


ENGINES: dict[str, Engine] = {"pure": pure, "in_process": in_process}
