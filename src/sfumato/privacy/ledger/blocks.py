"""How many steps are reserved at once, and which of them have been handed out. Nothing here is durable.

A reservation is one durable write of w seconds. Where a step takes t seconds, n steps are reserved at once so that the
share of the ledger, w / (n t), is about ``SHARE``. A crash wastes the rest of a block: at most n steps, thus about
w / SHARE seconds of work, a second or so on the disks tried; and never more than 1 % of what is left of the plan.
n is a power of two, so that the entries of a long run are few different ones, and its export is short.
"""

from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

from sfumato.privacy.accounting import Event

SHARE = 0.005  # of a step's time, for the ledger: seldom above 2 % on a disk that is slow now and then
MOST = 1024  # steps in a block
OF_THE_PLAN = 100  # a block is at most so small a part of what is left
_SEEN = 9  # of the last steps and writes


class Pace:
    """What writes and steps have taken lately. Time comes in as seconds of a clock that does not go back."""

    def __init__(self) -> None:
        self._writes: deque[float] = deque(maxlen=_SEEN)
        self._steps: deque[float] = deque(maxlen=_SEEN)
        self._left: float | None = None  # when the last reservation was given out

    def asked(self, now: float) -> None:
        """A step is asked for; what lies between is the time of the one before."""
        if self._left is not None:
            self._steps.append(now - self._left)

    def wrote(self, seconds: float) -> None:
        self._writes.append(seconds)

    def gave(self, now: float) -> None:
        self._left = now

    def at_once(self, left: int, ahead: int) -> int:
        """How many to reserve of the ``left`` steps of a plan, ``ahead`` of which will follow: 1 until a few were seen."""
        if len(self._steps) < 3:
            return 1
        most = min(MOST, left // OF_THE_PLAN, ahead)
        step = median(self._steps)  # a picture or a checkpoint in between is no step
        wanted = fmean(self._writes) / SHARE
        number = 1
        while 2 * number <= most and number * step < wanted:
            number *= 2
        return number


@dataclass(slots=True)
class Block:
    """Steps ``first`` to ``first + size - 1``, reserved by entry ``sequence``, handed out in their order."""

    sequence: int
    event: Event  # with count 1
    first: int
    size: int
    taken: int = 0
    committed: int = 0
    told: bool = False  # a ``used`` entry says how much of it was handed out
    dropped: bool = False  # no more of it is handed out, after a write that may or may not have said so

    def holds(self, event: Event, step: int) -> bool:
        return self.rest > 0 and step == self.first + self.taken and event == self.event

    @property
    def rest(self) -> int:
        """How many steps can still be handed out."""
        return 0 if self.told or self.dropped else self.size - self.taken
