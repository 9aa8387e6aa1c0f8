"""The loop of a server, the same over every engine. [shell: reads the clock, writes the server's checkpoint and ledger]

The order of an exchange: the server's account is charged, durably -> the state is kept -> the sites are asked -> what they
reply is received -> the state is kept. So whatever is killed when, no asked round is uncharged, and what was kept is of one
moment: model, round and what was charged.
"""

import time
from collections.abc import Callable, Mapping

from sfumato.errors import LedgerError
from sfumato.federation import mechanisms, rounds
from sfumato.federation.keeping import Keeper
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.rounds import ServerState
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
    if plan is not None and (ledger is None or _rounds(ledger, plan) < server.charged):
        raise LedgerError(
            f"ledger = {'none' if ledger is None else f'{_rounds(ledger, plan)} rounds charged'} · the server has opened "
            f"{server.charged}: the ledger is missing, or older than the checkpoint",
            next="Restore the ledger that belongs to the checkpoint.",
            code="ledger_older_than_checkpoint",
        )
    # By one it is ahead where the server died between its ledger and its checkpoint: nobody had been asked. By more, rounds that
    # were charged once would be noised a second time, and sites send the same reply again to the same ask.
    if plan is not None and ledger is not None and _rounds(ledger, plan) > server.charged + 1:
        raise LedgerError(
            f"checkpoint = {server.charged} rounds opened · the ledger has charged {_rounds(ledger, plan)}: the checkpoint is "
            "missing, or older than the ledger",
            next="Restore the checkpoint that belongs to the ledger, or begin a new run.",
            code="checkpoint_older_than_ledger",
        )
    while (
        not server.done
        and (until is None or server.round <= until)
        and not (pause is not None and server.open is None and pause())
    ):
        server, asked = rounds.asks(server, chance)
        if plan is not None and ledger is not None:
            while _rounds(ledger, plan) < server.charged:
                ledger.commit(ledger.reserve(plan.event(1), _rounds(ledger, plan)))
        if keeper is not None:
            keeper.keep(server)
        began = time.monotonic()
        replies = exchange(asked)
        server = rounds.receive(server, replies, chance, seconds=time.monotonic() - began)
        if server.open is None and on_round is not None:
            server = on_round(server) or server
        if keeper is not None:
            keeper.keep(server)
    return server


def _rounds(ledger: Ledger, plan: SiteUpdates) -> int:
    return ledger.spent_steps // plan.event(1).count
