"""Several processes for a test: gloo over the loopback, forked from one server that has torch loaded already."""

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds; what hangs longer than this fails
_LOADED = ["pytest", "scipy.stats", "torch.distributed.fsdp", "torch.distributed.optim", "sfumato.privacy.engine",
           "cryptography.hazmat.primitives.ciphers.modes", "dp_accounting.pld",
           "torch._dynamo", "torch._inductor.test_operators", "tests.oracles"]  # fmt: skip


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(rank, size, *arguments)`` in ``size`` processes of one group. Returns what each returned, by rank.

    ``work`` must be a module's function. Raises AssertionError with the traceback if one raises, or one hangs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_LOADED, work.__module__])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server starts with it, and not with sys.path
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_one, args=(theirs, Path(folder) / "store", rank, size, work, arguments))
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        try:
            answers = [_answer(pipe, time.monotonic() + PATIENCE) for pipe in pipes]
        finally:
            for worker in workers:
                worker.join(5)
                worker.kill()
                worker.join()
                worker.close()
    failed = [f"process {rank}:\n{text}" for rank, (kind, text) in enumerate(answers) if kind != "done"]
    assert not failed, "\n\n".join(failed)
    return [value for _, value in answers]


def _answer(pipe: Connection, until: float) -> tuple[str, Any]:
    with pipe:
        if not pipe.poll(max(0.0, until - time.monotonic())):
            return "hung", f"nothing came within {PATIENCE} seconds"
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return "ended", "it ended without an answer"


def _one(pipe: Connection, store: Path, rank: int, size: int, work: Callable[..., Any], arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("error", module=r"sfumato\.")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE / 2)
        )
        result = work(rank, size, *arguments)
        with contextlib.suppress(
            RuntimeError
        ):  # so that nobody leaves while others meet; some may have died on purpose
            dist.barrier()
        answer = ("done", result)
    except BaseException:
        answer = ("failed", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))  # by value: torch would hand tensors over in shared memory
    os._exit(0)  # no orderly goodbye, which would wait for processes that may have died on purpose
