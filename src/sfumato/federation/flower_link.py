"""Deployed, over Flower's SuperLink and SuperNodes: the server's end, a site's end, and how their processes are started.

With ``--isolation process`` Flower hands a task to whoever knows a secret, and leaves it to run it. Both ends here are that
executor, in processes of our own: a site never runs code that the server sends (a Flower app bundle holds some; ours is
empty, and what another one holds is not looked at), and imports torch once, not once a message.   [shell]
"""

import hashlib
import hmac
import io
import logging
import math
import os
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from sfumato import __version__
from sfumato.errors import OutsideError, UsageError
from sfumato.federation.flower_app import LOOK, QUIET_ENVIRONMENT, Answer, Traffic, ask_nodes, client_app, guarded
from sfumato.federation.messages import Ask, Reply

_ADMINISTRATOR = "x-sfumato-administrator"  # the header that opens everything but what SuperNodes ask
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_GONE = (RunNotRunningException, ObjectPullError, ObjectPushError)
_NODE_INTERVAL = 10  # seconds between two signs of life that a SuperNode promises; Flower's least
_HEARTBEAT = 10.0  # seconds; Flower forgets a task after two minutes without


# -- deployed: the server's side -----------------------------------------------------------------------------------------


class Link:
    """The server's end of a SuperLink: registers the sites' keys, submits a run, and exchanges messages in it.

    A SuperLink that was killed comes back from its database with nodes and keys, but never resumes a run; so the rest of an
    exchange goes through a new one. Sites answer what they were asked before with what they answered before.

    Args:
      address: host:port of its one port.
      authority: PEM of the certificates that are trusted; no others are.
      secret: shared with the SuperLink; who has it may take its tasks.
      administrator: opens everything that SuperNodes do not need (see `guard`).
    """

    def __init__(self, address: str, *, authority: bytes, secret: bytes, administrator: str) -> None:
        logging.getLogger("flwr").setLevel(logging.WARNING)  # what it does is not what the user asked for
        self._address, self._authority, self._secret, self._administrator = address, authority, secret, administrator
        self._names: dict[str, str] = {}  # public key -> site
        self._grid: HttpGrid | None = None
        self._beat: _Heartbeat | None = None
        self.traffic = Traffic()
        self.runs = 0  # how many were submitted

    def register(self, keys: Mapping[str, str]) -> None:
        """Makes these the sites: {name: public key, PEM}. A key that the SuperLink knows already stays what it was; one that
        it knows and that is not given is unregistered. Raises httpx.HTTPError where the SuperLink does not answer."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

        self._names = {key: name for name, key in keys.items()}
        with closing(self._control()) as control:
            nodes = control.ListNodes(ListNodesRequest()).nodes_info
            known = {node.public_key.decode(): node for node in nodes if node.status != "unregistered"}
            for key, node in known.items():
                if key not in self._names:
                    control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            for key, name in self._names.items():
                if key in known:
                    continue
                try:
                    control.RegisterNode(RegisterNodeRequest(public_key=key.encode()))
                except httpx.HTTPStatusError as error:
                    raise UsageError(
                        f"site {name} · its key was unregistered before, and a SuperLink takes no key a second time "
                        f"({error.response.status_code})",
                        next="Ask the site for a new key: it moves site.key away and starts `sfumato federate site`.",
                    ) from None

    def answers(self) -> bool:
        """Whether the SuperLink is there. Raises OutsideError if what is there has a certificate of someone else."""
        from flwr.proto.control_pb2 import ListNodesRequest

        try:
            with closing(self._control()) as control:
                control.ListNodes(ListNodesRequest())
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise OutsideError(
                    f"{self._address} = certificate of another authority · must be of the one in the run's folder",
                    next="Something else listens there; give another --port.",
                    code="certificate",
                ) from None
            return False
        except httpx.HTTPError:
            return False
        return True

    def submit(self) -> None:
        """Begins a run of Flower's, whose server is this process."""
        from flwr.common.serde import fab_to_proto, run_from_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
        from flwr.supercore.constant import TaskType
        from flwr.supercore.fab import Fab
        from flwr.supercore.task_identity import TaskIdentity

        self._drop()
        bundle = _empty_bundle()
        with closing(self._control()) as control:
            fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
            run = control.StartRun(StartRunRequest(fab=fab)).run_id
        with closing(self._runtime(_acquiring(self._secret))) as client:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            while not ((task := client.AcquireTask(request)).HasField("task") and task.task.run_id == run):
                time.sleep(LOOK)  # other runs than ours get no server, so nothing of them is ever executed
        grid = HttpGrid(self._address, False, self._authority, token=task.token)
        grid._client = self._runtime(RuntimeTokenHttpInterceptor(task.token))  # pyright: ignore[reportPrivateUsage]
        given = grid._client.PullTaskInput(PullTaskInputRequest())  # pyright: ignore[reportPrivateUsage]
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        self._grid, self._beat = grid, _Heartbeat(self._runtime(RuntimeTokenHttpInterceptor(task.token)))
        self.runs += 1

    def online(self) -> dict[str, tuple[int, float]]:
        """The sites that are there: {name: (node, when it was last activated, in seconds since 1970)}."""
        assert self._grid is not None
        return {
            self._names[key]: (node.node_id, datetime.fromisoformat(node.last_activated_at).timestamp())
            for node in self._grid.get_nodes()
            if (key := node.public_key.decode()) in self._names
        }

    def exchange(
        self,
        asked: Mapping[str, Ask],
        *,
        wait: float,
        absence: float = math.inf,
        revive: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Reply]:
        """Asks these sites and gives what came within ``wait`` seconds (see `ask_nodes`). ``revive`` is called when the
        SuperLink is gone; it brings it back, or raises.

        Raises: OutsideError: it stays away until the time is over.
        """
        replies: dict[str, Reply] = {}
        deadline = time.monotonic() + wait
        while True:
            try:
                if self._grid is None or self._beat is None or self._beat.lost:
                    self.submit()
                assert self._grid is not None
                return ask_nodes(
                    self._grid,
                    asked,
                    self.online,
                    wait,
                    absence=absence,
                    replies=replies,
                    traffic=self.traffic,
                    deadline=deadline,
                    meanwhile=meanwhile,
                )
            except (httpx.HTTPError, *_GONE) as error:
                self._drop()
                if time.monotonic() > deadline:
                    raise OutsideError(
                        f"SuperLink {self._address} = {type(error).__name__} · must answer",
                        next="Its log is in the run's folder. Start the same command with --resume.",
                        code="superlink",
                    ) from error
                time.sleep(LOOK)
                revive()

    def close(self) -> None:
        """Tells the SuperLink that the run is over."""
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        if self._grid is not None:
            with suppress(httpx.HTTPError, *_GONE):
                self._grid._runtime_client.PushTaskOutput(  # pyright: ignore[reportPrivateUsage]
                    PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
                )
        self._drop()

    def _drop(self) -> None:
        if self._beat is not None:
            self._beat.stop()
        if self._grid is not None:
            self._grid.close()
        self._grid = self._beat = None

    def _control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            self._address, False, self._authority, [_version("flwr-cli"), _Header(_ADMINISTRATOR, self._administrator)]
        )

    def _runtime(self, also: Any) -> RuntimeHttpClient:
        # without their retrying: it never ends, and answers a task that is gone with SIGINT to its own process
        interceptors = [_version("flwr-serverapp"), _Header(_ADMINISTRATOR, self._administrator), also]
        return RuntimeHttpClient.from_server_address(self._address, False, self._authority, interceptors)


def _empty_bundle() -> bytes:
    """The app bundle that Flower wants with a run. It holds no code: no process of ours would execute any."""
    about = f"""
[project]
name = "sfumato-federation"
version = "{__version__}"
description = "Names a run; the code is what each side has installed."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "sfumato"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "sfumato.federation.flower_app:server_app"
clientapp = "sfumato.federation.flower_app:client_app"
[tool.flwr.app.config]
"""
    files = {"pyproject.toml": about.encode(), "README.md": b"No code.\n", "LICENSE": b"Apache-2.0\n"}
    sums = "\n".join(f"{name},{hashlib.sha256(of).hexdigest()},{8 * len(of)}" for name, of in files.items())
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as bundle:
        for name, content in {**files, ".info/CONTENT": sums.encode()}.items():
            bundle.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return written.getvalue()


# -- deployed: a site's side ---------------------------------------------------------------------------------------------


def serve(answer: Answer, *, address: str, secret: bytes, stopped: Callable[[], bool], site: str = "") -> None:
    """Answers what a SuperNode (at ``address``, on this machine) has received, until ``stopped``.

    The app bundle that comes with a message is neither installed nor read. A SuperNode that is gone is waited for.
    """
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    app = client_app(lambda number: lambda ask: guarded(answer, ask, site=site))
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    one_at_a_time = threading.Lock()

    def client(also: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(address, True, None, [_version("flwr-clientapp"), also])

    def work_on(given: str) -> None:
        token = RuntimeTokenHttpInterceptor(given)
        try:
            with closing(client(token)) as runtime, closing(_Heartbeat(client(token))):
                message, context, _, _ = pull_task_input(runtime)
                with one_at_a_time:
                    reply = app(message, context)
                push_message(runtime, reply, context)
                push_task_output(runtime, context, SubStatus.COMPLETED, "")
        except (httpx.HTTPError, RuntimeError, *_GONE) as error:
            sys.stderr.write(f"site: {type(error).__name__}: {error}\n")  # the server asks again

    with closing(client(_acquiring(secret))) as tasks:
        while not stopped():
            try:
                task = tasks.AcquireTask(request)
            except httpx.HTTPError:
                time.sleep(5 * LOOK)  # while it starts, or starts again, nothing is there
                continue
            if task.HasField("task") and task.token:
                # in a thread: a message whose run is over never becomes complete, and is waited for in vain for hours
                threading.Thread(target=work_on, args=(task.token,), daemon=True).start()
            else:
                time.sleep(LOOK)


# -- what both sides need ------------------------------------------------------------------------------------------------


class _Heartbeat:
    """Says every ten seconds that a task is being worked on. ``lost`` once Flower has given it up."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._over, self.lost = client, threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        while not self._over.wait(_HEARTBEAT):
            try:
                self.lost = not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.TransportError:
                continue  # whether it is gone for good is found by who works on the task
            except (httpx.HTTPError, *_GONE):
                self.lost = True
            if self.lost:
                return

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    close = stop


class _Header:
    """Adds one header to every request."""

    def __init__(self, name: str, value: str) -> None:
        self._name, self._value = name, value

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        context.request.headers[self._name] = self._value
        return call_next(context)


def _version(component: str) -> RuntimeVersionHttpInterceptor:
    return RuntimeVersionHttpInterceptor(component_name=component)


def _acquiring(secret: bytes) -> SuperExecAuthHttpInterceptor:
    return SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)


# -- Flower's own processes ----------------------------------------------------------------------------------------------


def guard(app: Any, *, administrator: str) -> Any:
    """An ASGI application that lets everybody reach what SuperNodes need (each of them signs what it asks with its
    registered key), and the holder of ``administrator`` the rest.

    Needed because a SuperLink has one port and no accounts: whoever reaches it could otherwise register a key of their own,
    submit or stop a run, and read the list of nodes.
    """

    async def guarded_app(scope: Any, receive: Any, send: Any) -> None:
        allowed = scope["type"] == "lifespan" or scope.get("path", "").startswith("/v1/fleet/")
        if not allowed:
            given = dict(scope.get("headers", ())).get(_ADMINISTRATOR.encode(), b"")
            allowed = scope["type"] == "http" and hmac.compare_digest(given, administrator.encode())
        if allowed:
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    return guarded_app


def main(arguments: Sequence[str]) -> None:
    """``superlink FILE ARGUMENTS...`` and ``supernode ARGUMENTS...``: Flower's own commands, the one guarded by the word in
    FILE, the other with shorter silences."""
    which, *rest = arguments
    os.environ.update(QUIET_ENVIRONMENT)
    if which == "superlink":
        from flwr.superlink import extensions
        from flwr.superlink.cli.flower_superlink import flower_superlink as command
        from starlette.middleware import Middleware

        word, *rest = rest
        administrator = Path(word).read_text()
        extensions.get_middleware = lambda: (Middleware(guard, administrator=administrator),)  # pyright: ignore
    else:
        from flwr.supercore import heartbeat
        from flwr.supernode import fleet_http_connection
        from flwr.supernode.cli.flower_supernode import flower_supernode as command

        # a SuperLink lets a node that was killed in again only after two intervals of silence; Flower's is 30 seconds
        heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = _NODE_INTERVAL
    sys.argv = [f"flower-{which}", *rest]
    command()


if __name__ == "__main__":
    main(sys.argv[1:])
