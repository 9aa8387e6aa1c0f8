"""What a site keeps between two messages, in its folder: which ask it has answered, what a secure aggregation needs next, parts of the
model that stay at home. [shell]"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import LedgerError
from sfumato.federation.keeping import read_part, write_part
from sfumato.federation.messages import Ask, Json, Part, State
from sfumato.federation.policy import PolicyRefused
from sfumato.federation.sites import Site
from sfumato.privacy.ledger.storage import Lock

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Attributes:
    answered: (round, exchange) of the last ask of this run that was taken up, answered well or not.
    rounds: in which an update was made.
    collecting: of the open round.
    home: parameters that are trained here and sent to nobody.
    """

    path: Path
    run: str
    answered: tuple[int, int] = (0, -1)  # before the opening
    rounds: int = 0
    collecting: Part = field(default_factory=Part)
    home: State = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, site: Site, ask: Ask) -> "Iterator[Memory]":
        """Of this run; one process at a time. Raises PolicyRefused where another run is kept here, LedgerError if it is busy."""
        path = site.ledger.with_suffix(".kept")
        site.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(path, ask.run)
        try:
            if not path.exists():
                if site.ledger.exists():
                    raise LedgerError(
                        f"{path} · is gone, and the ledger {site.ledger} is not: asks could be answered twice",
                        next="Restore the site's folder, or begin a new run in a new one.",
                        code="memory_missing",
                    )
                yield cls(path=path, run=ask.run)
                return
            part = read_part(path)
            values: Any = part.values
            if values["run"] != ask.run:
                raise PolicyRefused(
                    f"run = {ask.run!r} · this site's folder is of another run", next="Give each run its own folder.",
                    code="other_run",
                )  # fmt: skip
            yield cls(
                path=path,
                run=ask.run,
                answered=(values["answered"][0], values["answered"][1]),
                rounds=values["rounds"],
                collecting=Part(tensors=_under("collecting/", part.tensors), values=values["collecting"]),
                home=_under("home/", part.tensors),
            )
        finally:
            lock.release()

    def answering(self, ask: Ask) -> "Memory":
        """Noted, before anything is done for it. What an earlier round left of its exchanges is forgotten."""
        kept = self.collecting if ask.exchange else Part()
        return replace(self, answered=(ask.round, ask.exchange), collecting=kept)

    def write(self) -> None:
        tensors = {f"home/{name}": tensor for name, tensor in self.home.items()}
        tensors |= {f"collecting/{name}": tensor for name, tensor in self.collecting.tensors.items()}
        values: dict[str, Json] = {
            "run": self.run,
            "answered": list(self.answered),
            "rounds": self.rounds,
            "collecting": dict(self.collecting.values),
        }
        write_part(self.path, Part(tensors=tensors, values=values))


def kept_at_home(site: Site) -> "dict[str, Tensor]":
    """The parameters that this site trained for itself, as the last round left them: for its own use, never to be sent."""
    path = site.ledger.with_suffix(".kept")
    return _under("home/", read_part(path).tensors) if path.exists() else {}


def _under(prefix: str, tensors: State) -> "dict[str, Tensor]":
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
