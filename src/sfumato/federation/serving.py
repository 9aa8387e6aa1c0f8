"""The loop of a server, the same over every engine. [shell: reads the clock, writes the server's checkpoint and ledger]

The order of an exchange: the state is kept -> the server's account is charged, durably -> the sites are asked -> what they
reply is received -> the state is kept. So whatever is killed when, no asked round is uncharged, what was kept is of one
moment (model, round and what was charged), and the account is never ahead of it: a checkpoint with fewer rounds than the account
is an older copy, whose next round would be noised a second time and charged once.
"""

import time
from collections.abc import Callable, Mapping

from sfumato.errors import LedgerError
from sfumato.federation import mechanisms, rounds
from sfumato.federation.keeping import Keeper
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.server_state import ServerState
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import SiteUpdates
from sfumato.randomness import Random, SecretRandom

Exchange = Callable[[dict[str, Ask]], Mapping[str, Reply]]  # a site that is silent is missing


def serve(
    server: ServerState,
    exchange: Exchange,
    *,
    chance: Random | None = None,
    keeper: Keeper | None = None,
    ledger: Ledger | None = None,
    on_round: Callable[[ServerState], ServerState | None] | None = None,
    pause: Callable[[], bool] | None = None,
    until: int | None = None,
) -> ServerState:
    """Goes on with ``server`` to its last round, or to the one after which ``pause`` says so.

    Args:
      server: from ``rounds.begin``, or ``rounds.interrupted(keeper.load(...))`` after a restart.
      chance: of selection and of the server's noise; by default the operating system's.
      ledger: the server's, opened with the promise's ``at_server`` plan; needed where there is one.
      until: the last round; the recipe's last by default.
      on_round: sees the state after every round; it may give back another, a stopped one for example.
    Raises: LedgerError: ledger and state are not of one moment.
    """
    chance = SecretRandom() if chance is None else chance
    plan = mechanisms.build(server.settings).promise(server.public).at_server
    if plan is not None:
        if ledger is None:
            raise _not_of_one_moment("ledger = none", server, "the ledger is missing", "ledger_older_than_checkpoint")
        _check(server, _rounds(ledger, plan))
        _charge(server, ledger, plan)  # the round in which it died between checkpoint and ledger: nobody had been asked
    while (
        not server.done
        and (until is None or server.round <= until)
        and not (pause is not None and server.open is None and pause())
    ):
        server, asked = rounds.asks(server, chance)
        if keeper is not None:
            keeper.keep(server)
        if plan is not None and ledger is not None:
            _charge(server, ledger, plan)
        began = time.monotonic()
        replies = exchange(asked)
        server = rounds.receive(server, replies, chance, seconds=time.monotonic() - began)
        if keeper is not None:
            keeper.keep(server)  # before anybody is told of the round: a kill while it is looked at must not lose it
        changed = on_round(server) if server.open is None and on_round is not None else None
        if changed is not None:
            server = changed
            if keeper is not None:
                keeper.keep(server)
    return server


def _check(server: ServerState, charged: int) -> None:
    """Raises LedgerError unless state and ledger are of one moment, or the server died between the two in a round that is discarded."""
    said = f"ledger = {charged} rounds charged"
    died = bool(server.results) and server.results[-1].discarded == rounds.INTERRUPTED
    if charged < server.charged - died:
        raise _not_of_one_moment(
            said, server, "the ledger is missing, or older than the checkpoint", "ledger_older_than_checkpoint"
        )
    if charged > server.charged:
        raise _not_of_one_moment(
            said, server, "the checkpoint is missing, or older than the ledger", "checkpoint_older_than_ledger"
        )


def _not_of_one_moment(said: str, server: ServerState, why: str, code: str) -> LedgerError:
    return LedgerError(
        f"{said} · the server has opened {server.charged}: {why}",
        next="Restore the two that belong together, or begin a new run.",
        code=code,
    )


def _charge(server: ServerState, ledger: Ledger, plan: SiteUpdates) -> None:
    while _rounds(ledger, plan) < server.charged:
        ledger.commit(ledger.reserve(plan.event(1), _rounds(ledger, plan)))


def _rounds(ledger: Ledger, plan: SiteUpdates) -> int:
    return ledger.spent_steps // plan.event(1).count
