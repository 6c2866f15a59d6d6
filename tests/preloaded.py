"""Processes in a tenth of their time: forked from one that has imported what they import.

A worker that runs a model imports torch, transformers and OpenVINO for 6 s of processor time, a driver for 3 s, and a session of
tests starts hundreds of them. Here Ray starts `preloaded_worker` instead of its own `setup_worker.py`. It hands its arguments, its
environment and its streams to the process below, which forks the worker; if one of the two is killed, so is the other. A test
starts drivers with `Preloaded.start`, of another such process.

Not the same as for users: a worker's parent is such a process and not the raylet (`raylets` says which worker is whose), and all have
one hash seed; what is read from the environment at an import is what a node's first worker of the job had. Jobs that tests start
with `subprocess`, with a Ray of their own, are as users have them.

Workers are forked from one such process for each job and node, since Ray reads RAY_JOB_ID and RAY_RAYLET_PID once, when it is imported.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lib.engine import import_openvino

SOCKET = "PRELOADED_WORKERS"
"""The environment variable that names the socket."""

MODULES = (
    "lib.predictor",
    "lib.blocks",
    "lib.planning",
    "transformers.models.auto.tokenization_auto",
    "pyarrow.dataset",
    "requests",
    "jsonschema",
    "google.protobuf.json_format",
)
"""What workers and drivers import, as far as it does not import Ray."""

WORKER_MODULES = ("lib.pipeline", "lib.actors", "ray._private.async_compat", "ray._private.runtime_env.setup_hook")
"""What a worker imports beside those, Ray among it."""

IDLE_SECONDS = 20.0
"""How long a server for a job's workers waits for the next one when it has none."""


class Forked:
    """A forked process, as much like `subprocess.Popen` as tests need. Its end is known from its connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines = connection.makefile("r")
        self.pid = int(self.lines.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code, or minus the signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self.lines.readline())
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its exit code if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


@dataclass
class Preloaded:
    """The process that forks."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def raylets(self) -> dict[int, int]:
        """The process id of the raylet that each worker belongs to, by the worker's; dead workers too."""
        read = {path.name: path.read_text() for path in self.folder.glob("[0-9]*")}
        return {int(worker): int(raylet) for worker, raylet in read.items() if raylet}  # one may be about to be written

    def start(
        self, module: str, arguments: Sequence[str], environment: dict[str, str], folder: Path, log: Path
    ) -> Forked:
        """Run `python -m module` with these arguments; what it prints goes to `log`."""
        request = {
            "module": module,
            "arguments": [module, *arguments],
            "environment": environment,
            "folder": str(folder),
            "nice": os.nice(0),
            "parent": os.getpid(),
        }
        raw = json.dumps(request).encode()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.folder / "socket"))
        with log.open("wb") as sink, Path(os.devnull).open("rb") as nothing:
            streams = array.array("i", [nothing.fileno(), sink.fileno(), sink.fileno()])
            connection.sendmsg([len(raw).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(raw)
            return Forked(connection)


@contextlib.contextmanager
def preloaded(folder: Path, *modules: str) -> Iterator[Preloaded]:
    """A process that forks, and has imported some more modules. `folder` is an empty one."""
    command = [sys.executable, "-m", "tests.preloaded", str(folder), *modules]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Preloaded(process, folder)
    finally:
        process.communicate()  # its input ends, and so does it


@contextlib.contextmanager
def preloaded_workers(folder: Path) -> Iterator[Preloaded]:
    """Every Ray node that is started inside has forked workers."""
    from ray._private import ray_constants  # here, for the process that forks must not import it

    shim = str(Path(__file__).with_name("preloaded_worker.py"))
    with (
        preloaded(folder) as process,
        # Ray joins the name to a folder of its own, which an absolute path replaces.
        mock.patch.object(ray_constants, "SETUP_WORKER_FILENAME", shim),
        mock.patch.dict(os.environ, {SOCKET: str(folder / "socket")}),
    ):
        yield process


@dataclass
class Server:
    """Forks on request until its standard input ends.

    The first one forks drivers, and for each job's workers on a node another server, which imports Ray and forks those: Ray reads
    RAY_JOB_ID and RAY_RAYLET_PID once, when it is imported. That one ends when it has had no process for a while.
    """

    folder: Path
    listener: socket.socket
    is_first: bool = True
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    others: dict[str, int] = field(default_factory=dict)
    """the writing end of the other servers' standard input, by their addresses"""

    def serve(self) -> dict[str, Any]:
        """Return in every forked process, with what it was asked for."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            events = self.selector.select(None if self.is_first else IDLE_SECONDS)
            if not events and not any(key.data for key in self.selector.get_map().values()):
                self.end()
            for key, _ in events:
                if key.fileobj is sys.stdin:
                    self.end()
                elif key.fileobj is self.listener:
                    if (request := self.take(self.listener.accept()[0])) is not None:
                        return request
                elif self.selector.get_map().get(key.fd) == key:
                    self.part(*key.data)

    def take(self, asker: socket.socket) -> dict[str, Any] | None:
        """Start a process, or say who does; None in the parent."""
        size, ancillary, *_ = asker.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        if not ancillary:  # it died before it asked
            asker.close()
            return None
        streams = array.array("i", ancillary[0][2])
        with asker.makefile("rb") as source:
            raw = source.read(int.from_bytes(size, "big"))
        if len(raw) < int.from_bytes(size, "big"):  # or while it did
            for stream in streams:
                os.close(stream)
            asker.close()
            return None
        request: dict[str, Any] = json.loads(raw)
        if self.is_first and "module" not in request:
            for stream in streams:
                os.close(stream)
            return self.send_on(asker, request["environment"])
        return self.fork(asker, streams, request)

    def send_on(self, asker: socket.socket, environment: dict[str, str]) -> dict[str, Any] | None:
        """Tell the address of the server for a job's workers on a node; in that server, or what it forks, as `serve`."""
        address = self.folder / f"of-{environment.get('RAY_JOB_ID')}-{environment.get('RAY_RAYLET_PID')}"
        if not address.exists():
            if (old := self.others.pop(str(address), None)) is not None:
                os.close(old)
            listener = listen(address)
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                asker.close()
                self.let_go()
                os.close(writing)
                os.dup2(reading, 0)
                os.close(reading)
                os.environ.clear()
                os.environ.update(environment)
                import_with_ray(WORKER_MODULES)
                return Server(self.folder, listener, is_first=False).serve()
            os.close(reading)
            listener.close()
            self.others[str(address)] = writing
            life = os.pidfd_open(pid)
            self.selector.register(life, selectors.EVENT_READ, (pid, life, None))
        with contextlib.suppress(OSError):
            asker.sendall(f"{address}\n".encode())
        asker.close()
        return None

    def fork(self, asker: socket.socket, streams: "array.array[int]", request: dict[str, Any]) -> dict[str, Any] | None:
        """Start a process; None in the parent."""
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            self.let_go()
            asker.close()
        for stream in streams:
            os.close(stream)
        if pid == 0:
            return request
        if "module" not in request:
            (self.folder / str(pid)).write_text(str(request["parent"]))
        life = os.pidfd_open(pid)
        for one in (asker, life):
            self.selector.register(one, selectors.EVENT_READ, (pid, life, asker))
        with contextlib.suppress(OSError):
            asker.sendall(f"{pid}\n".encode())
        return None

    def let_go(self) -> None:
        """Close what a forked process inherits: by its owners, which would otherwise close what has its number by then."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif isinstance(key.fileobj, int):
                os.close(key.fileobj)
        self.selector.close()
        for writing in self.others.values():
            os.close(writing)

    def part(self, pid: int, life: int, asker: socket.socket | None) -> None:
        """The process is dead, or whoever asked for it: so is the other one now."""
        self.selector.unregister(life)
        if asker is not None:
            self.selector.unregister(asker)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(life)
        if asker is not None:
            with contextlib.suppress(OSError):
                asker.sendall(f"{code}\n".encode())
            asker.close()

    def end(self) -> None:
        """Leave nothing behind."""
        Path(self.listener.getsockname()).unlink(missing_ok=True)
        for pid in {key.data[0] for key in self.selector.get_map().values() if key.data and key.data[2]}:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def listen(address: Path) -> socket.socket:
    """A socket that waits for askers."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    return listener


def import_with_ray(names: Sequence[str]) -> None:
    """Import what imports Ray, without drawing an id.

    Ray's generator is seeded by its first use, which imports of actors' classes are: all forked processes would draw the same ids.
    Two drivers at once did, and one died of it.
    """
    import ray.actor

    real = ray.actor.ActorClassID  # type: ignore[attr-defined]
    drawn = SimpleNamespace(from_random=lambda: real(os.urandom(real.size())))
    with mock.patch.object(ray.actor, "ActorClassID", drawn):
        for name in names:
            importlib.import_module(name)
    gc.freeze()


def become(request: dict[str, Any]) -> None:
    """Run a module or Ray's worker here, as if Python had just been started with these arguments in that environment."""
    import numpy as np

    os.setpgid(0, 0)  # as Ray does: it ends workers by their group
    os.nice(request["nice"] - os.nice(0))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    module = request.get("module")
    first = request["folder"] if module else str(Path(sys.argv[0]).parent)
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = dict.fromkeys([first, *named, *sys.path[1:]])
    np.random.seed()  # the one of old, which forked processes would share
    gc.unfreeze()
    code: Any = 1
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        if sys.exception():
            traceback.print_exc()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(int(code or 0))  # taking down all that was imported takes longer than the rest


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    import_openvino()
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()
    if sys.argv[2:]:
        import_with_ray(sys.argv[2:])
    first = Path(sys.argv[1])
    listener = listen(first / "socket")
    print("ready", flush=True)
    become(Server(first, listener).serve())
