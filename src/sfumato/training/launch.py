"""Several processes for one training on this machine; this process becomes number 0. [shell]

The others are started here, get what they need through a pipe (private records never touch a disk), and talk to each
other over the loopback. Each ends when its pipe closes, so none outlives this process, however that ends. They are out of
the terminal's reach: a Ctrl-C comes to process 0 alone, which tells the others at the end of the step.
"""

import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from sfumato.errors import OutsideError, SfumatoError
from sfumato.privacy.processes import Processes

_GOODBYE = 60.0  # seconds that a process may take to end after the last step
_START = (
    "import pickle, sys; n = int.from_bytes(sys.stdin.buffer.read(8), 'big'); pickle.loads(sys.stdin.buffer.read(n))()"
)


@contextmanager
def together(
    size: int, work: Callable[..., Any], *arguments: Any, threads: int | None, **named: Any
) -> Iterator[Processes]:
    """Inside, this process is the first of ``size``; the others run ``work(*arguments, **named)``, in a ``together`` of theirs.

    In a process that belongs to a group already (one of those others, or under torchrun) it is that group, and nobody is
    started. ``work`` must be a module's function, the arguments must be picklable; each process gets copies.

    Args: threads: of each process; None shares the cores out.
    Raises: OutsideError if a process ends before its time, with how it ended.
    """
    if size == 1 or dist.is_initialized():
        with _threads(threads):
            yield Processes.current()
        return
    share = threads or max(1, len(os.sched_getaffinity(0)) // size)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log, _threads(share):
        store = Path(folder) / "store"
        job = partial(work, *arguments, **named)
        others = [_start(partial(_other, rank, size, str(store), share, job), log) for rank in range(1, size)]
        try:
            for rank, other in enumerate(others, start=1):
                assert other.stdout is not None
                if other.stdout.read(1) != b"!":  # a dead process would never come to the group's first meeting
                    raise _ended(rank, other, log)
            _join(0, size, store)
            try:
                yield Processes.current()
            except OutsideError as error:
                if error.code != "process_ended":
                    raise
                raise _who_ended(others, log, error) from error
            for other in others:
                with suppress(subprocess.TimeoutExpired):
                    other.wait(_GOODBYE)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for other in others:
                other.kill()
                other.communicate()  # waits, and closes the pipes


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(job: Callable[[], None], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    other = subprocess.Popen(
        [sys.executable, "-c", _START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    payload = pickle.dumps(job)
    assert other.stdin is not None
    with suppress(BrokenPipeError):  # it is dead: noticed when it does not answer
        other.stdin.write(len(payload).to_bytes(8, "big") + payload)
        other.stdin.flush()  # and stays open: its end is the end of this process
    return other


def _other(rank: int, size: int, store: str, threads: int, job: Callable[[], Any]) -> None:
    """The life of a process other than the first."""
    os.write(sys.stdout.fileno(), b"!")
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    torch.seed()  # draws inside the losses (times, noises) differ from those of the other processes
    _join(rank, size, Path(store))
    try:
        job()
        dist.destroy_process_group()
    except SfumatoError as error:  # announced to the first process, or noticed there
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)


def _end_with_the_first() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


def _join(rank: int, size: int, store: Path) -> None:
    before, hook = os.environ.get("GLOO_SOCKET_IFNAME"), sys.excepthook
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # sums without noise stay on this machine
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    finally:
        sys.excepthook = hook  # torch puts one around it at every call, which writes "[rank0]:" before each line
        os.environ.pop("GLOO_SOCKET_IFNAME")
        if before is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def _who_ended(others: "list[subprocess.Popen[bytes]]", log: IO[bytes], error: OutsideError) -> OutsideError:
    """The process that ended by itself, not those that ended because another one had."""
    for other in others:
        with suppress(subprocess.TimeoutExpired):
            other.wait(5)
    codes = [other.returncode for other in others]
    first = min(range(len(codes)), key=lambda i: (codes[i] in (None, 0, OutsideError.exit_code), i))
    return error if codes[first] in (None, 0) else _ended(first + 1, others[first], log)


def _ended(rank: int, other: "subprocess.Popen[bytes]", log: IO[bytes]) -> OutsideError:
    code = other.wait(_GOODBYE)
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    log.seek(0, io.SEEK_END)
    log.seek(max(0, log.tell() - 2000))
    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
    return OutsideError(
        f"process {rank} · {how}{': ' + last[0] if last else ''}",
        next="What was spent is in the ledger: the same command with --resume goes on, also with fewer --processes.",
        code="process_ended",
    )
