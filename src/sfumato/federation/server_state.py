"""What the server knows between two messages, and the same as one part of a checkpoint: values, no decision."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.federation.messages import Part, Refusal, State
from sfumato.federation.public import Public
from sfumato.federation.settings import FederationSettings

if TYPE_CHECKING:
    from torch import Tensor


_PARTS = ("collecting", "mechanism", "optimizer", "losses", "released")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A site that was asked in a round and is not in it, with the reason: its own, or the server's. Under secure aggregation a
    site may be in the sum, and have been left out of what came after: silent then, or with wrong shares."""

    site: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What happened in a round.

    Attributes:
      asked: the sites that were drawn for it.
      sites: of them, whose update was used; none in a discarded round.
      steps: local steps of the sites that said so, together.
      charged: by site, events in its ledger by the end of the round, where it says so; a function of its plan.
      bytes_up, bytes_down: of tensors, over all its exchanges, also to and from sites that were then left out.
      discarded: why the state stayed as it was; "" if it did not.
      unchanged: parameters that stayed as they were in a round that was not discarded: too few sites sent them.
      seconds: as the engine measured; 0 where nobody did.
      lengths, cosines: by site in it, the L2 norm of what it sent, and the cosine between that and the step that was made of
        all: a site that sends too much, or the wrong way, shows. Only where each update is private by itself.
    """

    round: int  # from 1; 0 is the opening, where there is one
    asked: tuple[str, ...]
    sites: tuple[str, ...] = ()
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    charged: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    discarded: str = ""
    unchanged: int = 0
    seconds: float = 0.0
    lengths: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything that the server knows between two exchanges; ``to_part`` is what a checkpoint holds.

    Attributes:
      recipe: the sha256 of the resolved recipe, which a site compares with its own.
      state: the trained parameters, all names that any site holds.
      round: the one that is open, or comes next; from 1, or from 0 where sites release something before the first.
      released: what they released then, together.
      exchange: of the open round, from 0.
      waiting: the sites that have been asked and have not been received; None where nobody is being asked.
      open: what the open round has come to so far.
      charged: rounds that were charged to the server's account: all that were opened.
      mechanism, optimizer, losses: the memories of the mechanism, of the server's step, and of what sites told.
    """

    run: str
    recipe: str
    settings: FederationSettings
    public: Public
    state: State
    round: int = 1
    exchange: int = 0
    waiting: tuple[str, ...] | None = None
    open: RoundResult | None = None
    collecting: Part = field(default_factory=Part)
    mechanism: Part = field(default_factory=Part)
    optimizer: Part = field(default_factory=Part)
    losses: Part = field(default_factory=Part)
    released: Part = field(default_factory=Part)
    charged: int = 0
    stopped: str = ""  # why no further round is opened, before the last one
    results: tuple[RoundResult, ...] = ()

    @property
    def done(self) -> bool:
        return self.open is None and (self.round > self.public.rounds or bool(self.stopped))


def to_part(server: ServerState) -> Part:
    """The whole state for a checkpoint: tensors by name, and JSON values."""
    tensors = {f"state/{name}": tensor for name, tensor in server.state.items()}
    for which in _PARTS:
        tensors |= {f"{which}/{name}": tensor for name, tensor in getattr(server, which).tensors.items()}
    values = {
        "run": server.run,
        "recipe": server.recipe,
        "settings": _plain(asdict(server.settings)),
        "public": _plain(asdict(server.public)),
        "round": server.round,
        "exchange": server.exchange,
        "waiting": None if server.waiting is None else list(server.waiting),
        "open": None if server.open is None else _plain(asdict(server.open)),
        "charged": server.charged,
        "stopped": server.stopped,
        "results": [_plain(asdict(result)) for result in server.results],
        "memories": {which: _plain(dict(getattr(server, which).values)) for which in _PARTS},
    }
    return Part(tensors=tensors, values=values)


def from_part(part: Part, settings: FederationSettings, public: Public, *, recipe: str = "") -> ServerState:
    """What ``to_part`` gave. Raises UsageError where it is of another federation than these settings and constants."""
    values: Any = part.values
    given = {"settings": _plain(asdict(settings)), "public": _plain(asdict(public)), "recipe": recipe}
    changed = [name for name, value in given.items() if values.get(name) != value]
    if changed:
        raise UsageError(
            f"{', '.join(changed)} = others than the checkpoint's · a run keeps its federation",
            next="Resume with the recipe and the sites that the run began with.",
        )

    def under(which: str) -> "dict[str, Tensor]":
        return {name.removeprefix(f"{which}/"): t for name, t in part.tensors.items() if name.startswith(f"{which}/")}

    memories = {which: Part(tensors=under(which), values=values["memories"][which]) for which in _PARTS}
    return ServerState(
        run=values["run"],
        recipe=recipe,
        settings=settings,
        public=public,
        state=under("state"),
        round=values["round"],
        exchange=values["exchange"],
        waiting=None if values["waiting"] is None else tuple(values["waiting"]),
        open=None if values["open"] is None else _result(values["open"]),
        charged=values["charged"],
        stopped=values["stopped"],
        results=tuple(_result(result) for result in values["results"]),
        **memories,
    )


def _result(values: Any) -> RoundResult:
    return RoundResult(
        **{
            **values,
            "asked": tuple(values["asked"]),
            "sites": tuple(values["sites"]),
            "left_out": tuple(LeftOut(**one) for one in values["left_out"]),
        }
    )


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(value))


def refusals(server: ServerState, site: str) -> tuple[Refusal, ...]:
    """The rounds that a site was asked for and is not in."""
    return tuple(
        Refusal(round=result.round, code=out.code, message=out.message)
        for result in server.results
        for out in result.left_out
        if out.site == site
    )
