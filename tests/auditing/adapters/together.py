"""A few processes that wait for work: gloo over the loopback, started once, because the suite asks for many single steps."""

import atexit
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST = 4
PATIENCE = 240.0  # seconds; the first call waits until the processes have loaded torch


@lru_cache(maxsize=1)
def _workers() -> list[Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "sfumato.privacy.engine", __name__])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server starts with it, and not with sys.path
    store = Path(tempfile.mkdtemp(prefix="together-")) / "store"
    pipes = []
    for rank in range(MOST):
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, store, rank), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    atexit.register(lambda: [pipe.close() for pipe in pipes])  # which ends them
    return pipes


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(group, rank, size, *arguments)`` in 2 or 4 processes. Returns what each returned, by rank; raises what one raised."""
    pipes = _workers()[:size]
    for pipe in pipes:
        pipe.send_bytes(pickle.dumps((size, work, arguments)))
    answers = []
    for pipe in pipes:
        if not pipe.poll(PATIENCE):
            raise TimeoutError(f"nothing came within {PATIENCE} seconds")
        answers.append(pickle.loads(pipe.recv_bytes()))
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _serve(pipe: Connection, store: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=timedelta(seconds=PATIENCE / 2)
    )
    groups = {2: dist.new_group([0, 1]), MOST: dist.group.WORLD}
    while True:
        try:
            size, work, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = work(groups[size], rank, size, *arguments)
        except Exception as error:
            answer = RuntimeError(f"process {rank}: {type(error).__name__}: {error}")
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch would hand tensors over in shared memory
