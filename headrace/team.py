"""Ranks in several processes of one machine: rank 0 leads, the others follow.

Rank 0 is the process of the caller. It starts the others (`headrace.follow`), and whatever they need to
decide as it does goes down one pipe to each, in the order in which rank 0 does it: commands, then the values that are
agreed on while they run. Nothing goes back but a number behind each command, by which rank 0 sees that nobody has gone
another way. Layers meet in all-reduces: gloo on the CPU, NCCL on GPUs.

A rank that ends, whatever the reason, ends all of them: those who wait for it are told by the broken connection, a
thread on each side looks after the processes, and every wait has a limit.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.errors import EngineDeadError, HeadraceError, InvariantError, RequestError
from headrace.ranks import Led, Ranks

log = logging.getLogger("headrace")

c10d: Any = dist  # some of its names are exported at run time only

T = TypeVar("T")
P = ParamSpec("P")
E = TypeVar("E", bound=Led)

ANSWER_S = 300.0
"""Seconds that a rank waits for another one at most."""
LOAD_S = 3600.0
"""Seconds that the weights may take: from a network disk they take long."""
GRACE_S = 3.0
"""Seconds that others have to say what went wrong, and to end by themselves."""
WATCH_S = 0.25
"""Seconds between two looks at the other processes."""
BOOT = """\
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import headrace  # this one, whatever is installed
del sys.path[0]
runpy.run_module("headrace.follow", run_name="__main__")
"""
"""`python -m headrace.follow`, of the package that is running here."""
BEHIND = 2
"""Commands whose numbers rank 0 does not wait for while there is work: a short delay of another rank costs nothing."""


class _Linked(Ranks):
    """What all ranks of a team share: their collectives."""

    def __init__(self, rank: int, size: int, device: str) -> None:
        super().__init__(rank, size)
        self.device = device
        self._groups: list[Any] = []
        """Where host values meet; on GPUs also the group of the layers."""
        self._crc = 0

    def _meet(self, folder: str) -> None:
        """Connect with the others through a folder that only this user can read. Waits for all of them."""
        limit = datetime.timedelta(seconds=ANSWER_S)
        store = c10d.FileStore(str(Path(folder) / "meeting"), self.size)
        store.set_timeout(limit)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # All ranks are on this machine: nothing listens on other interfaces, and no host name has to be known.
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = limit
        self._groups.append(gloo(c10d.PrefixStore("host", store), self.rank, self.size, options))
        if self.device == "cuda":
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = limit
            self._groups.append(nccl(c10d.PrefixStore("device", store), self.rank, self.size, options))
            # NCCL takes its buffers at the first call: they have to be there when free memory is looked at.
            self.all_reduce_(torch.zeros(1, device="cuda"))

    def all_reduce_(self, x: Tensor) -> None:
        # One rank adds up and the others copy its sum, in gloo's rings as in NCCL's rings and trees: same bits for all.
        self._reduce(self._groups[-1 if x.is_cuda else 0], x, dist.ReduceOp.SUM)

    def least(self, value: int) -> int:
        held = torch.tensor([value], dtype=torch.int64)
        self._reduce(self._groups[0], held, dist.ReduceOp.MIN)
        return int(held)

    def _reduce(self, group: Any, x: Tensor, how: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = how
        options.asyncOp = False  # NCCL: on the stream of the step, so that a recording holds it
        try:
            work = group.allreduce([x], options)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise LostError(f"rank {self.rank} has not met the others in an all-reduce: {error}") from error

    def witness(self, x: Tensor) -> None:
        self._crc = zlib.crc32(x.cpu().contiguous().view(torch.uint8).numpy().tobytes(), self._crc)

    def _number(self, engine: Led, result: Any) -> int:
        refused = type(result).__name__ if isinstance(result, Exception) else ""
        return zlib.crc32(f"{engine.digest(result)} {self._crc} {refused}".encode())


class LostError(EngineDeadError):
    """Another rank did not do its part; it may have said why."""


def is_refusal(error: BaseException, command: str) -> bool:
    """Whether a command was refused, which leaves the engine unharmed and happens on all ranks alike.

    What Python itself says of bad arguments is one too, but in a step, which has none, it is a failure.
    """
    if isinstance(error, HeadraceError):
        return not isinstance(error, (EngineDeadError, InvariantError))
    return command != "step" and isinstance(
        error, (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
    )


@dataclass
class _Crew:
    """The processes of the other ranks."""

    folder: str
    threads: int
    """torch's threads in this process before it shared the machine."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    links: list[Connection] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the processes are to end."""
    lost: bool = False
    """One of them has ended before."""

    def watch(self) -> None:
        """Look after the processes; where one has ended, nobody must wait for it in a collective of the GPU."""
        while not self.over.wait(WATCH_S):
            if any(process.poll() is not None for process in self.processes) and not self.over.is_set():
                self.lost = True
                for group in self.groups[1:]:
                    group.abort()
                return

    def end(self, kindly: bool = True) -> None:
        """End the processes: on their own, else by a signal. A second call does nothing."""
        if self.over.is_set():
            return
        self.over.set()
        for link in self.links:
            with contextlib.suppress(OSError, ValueError):
                if kindly:
                    link.send(("end", None))
                link.close()
        until = time.monotonic() + (GRACE_S if kindly else 0.0)
        for stop in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self.processes:
                if stop is not None and process.poll() is None:
                    stop(process)
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0.01))
            until = time.monotonic() + GRACE_S
        for group in self.groups:
            with contextlib.suppress(RuntimeError):
                group.abort()
        self.groups.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        torch.set_num_threads(self.threads)


class Lead(_Linked):
    """Rank 0, in the caller's process.

    Args:
        size: ranks, this one included.
        device: "cpu" or "cuda".
    """

    def __init__(self, size: int, device: str) -> None:
        super().__init__(0, size, device)
        self._crew = crew = _Crew(tempfile.mkdtemp(prefix="headrace-"), torch.get_num_threads())
        self._groups = crew.groups
        # Also at the end of the interpreter.
        self._finalizer = weakref.finalize(self, crew.end)
        self._cause: BaseException | None = None
        self._inside = False
        self._due: deque[int] = deque()
        """This rank's numbers that the others have not been compared with."""
        if device == "cpu":
            torch.set_num_threads(max(1, crew.threads // size))
        level = logging.INFO if log.isEnabledFor(logging.INFO) else logging.ERROR
        for rank in range(1, size):
            ours, theirs = Pipe()
            with socket.socket(fileno=os.dup(ours.fileno())) as end:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(ANSWER_S), 0))
            words = [
                Path(__file__).parent.parent,
                device,
                crew.folder,
                rank,
                size,
                theirs.fileno(),
                os.getpid(),
                torch.get_num_threads(),
                level,
            ]
            crew.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", BOOT, *map(str, words)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            )
            crew.links.append(ours)
            theirs.close()
        threading.Thread(target=crew.watch, name="headrace-ranks", daemon=True).start()

    # An engine comes and goes

    def begin(self, settings: Any) -> None:
        """Let the others load their share of a model."""
        self._tell("begin", settings)

    def meet(self, nbytes: int, seconds: float) -> None:
        log.info("rank 0 of %d: %.2f GiB of weights in %.1f s", self.size, nbytes / 2**30, seconds)
        for rank in range(1, self.size):
            n, s = self._hear(rank, "loaded", LOAD_S)
            log.info("rank %d of %d: %.2f GiB of weights in %.1f s", rank, self.size, n / 2**30, s)
        first = not self._groups
        self._tell("meet", self._crew.folder if first else None)
        if first:
            self._meet(self._crew.folder)

    def over(self) -> None:
        """The engine is not used any more; the others wait for the next one, if they have not ended."""
        if self._crew.over.is_set():
            return
        self._settle(0)
        self._crc = 0
        self._tell("over", None)

    # While an engine runs

    def agree(self, value: T) -> T:
        self._tell("value", value)
        return value

    def run(self, engine: E, method: Callable[Concatenate[E, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._inside:  # a part of a command that all ranks run
            return method(engine, *args, **kwargs)
        if self._crew.over.is_set():
            raise self._death()
        call = _packed("call", (method.__name__, args, kwargs))
        self._inside = True
        try:
            self._send(call)
            try:
                result = method(engine, *args, **kwargs)
            except Exception as error:
                if is_refusal(error, method.__name__):  # as by all of them
                    self._due.append(self._number(engine, error))
                raise
            if self._crew.lost:  # on a GPU the step has ended with anything
                raise EOFError("a rank has ended")
            self._due.append(self._number(engine, result))
            self._settle(BEHIND if engine.has_work else 0)
            return result
        except BaseException as error:
            if is_refusal(error, method.__name__):
                raise
            told = self.failed(error)
            if told is error:
                raise
            raise told from told.__cause__
        finally:
            self._inside = False

    def _settle(self, behind: int) -> None:
        """Compare the numbers of all ranks, but for the newest `behind`."""
        while len(self._due) > behind:
            mine = self._due.popleft()
            for rank in range(1, self.size):
                if self._hear(rank, "done", ANSWER_S) != mine:
                    raise InvariantError(
                        f"rank {rank} has gone another way than rank 0: the tokens or the books of the ranks differ"
                    )

    def _tell(self, kind: str, value: Any) -> None:
        self._send(_packed(kind, value))

    def _send(self, packed: bytes) -> None:
        if self._crew.over.is_set():
            raise self._death()
        for rank, link in enumerate(self._crew.links, 1):
            try:
                link.send_bytes(packed)
            except BlockingIOError:
                raise LostError(f"rank {rank} has not taken a message for {ANSWER_S:.0f} s") from None

    def _hear(self, rank: int, kind: str, limit_s: float) -> Any:
        """The next message of a rank. Raises what the rank failed with."""
        link = self._crew.links[rank - 1]
        if not link.poll(limit_s):
            raise LostError(f"rank {rank} has not answered for {limit_s:.0f} s")
        found, value = link.recv()
        if found == "error":
            raise _ToldError(rank, value)
        if found != kind:
            raise InvariantError(f"rank {rank} says {found!r} where rank 0 expects {kind!r}")
        return value

    # The end

    def failed(self, error: BaseException) -> BaseException:
        if self._cause is not None:
            return error
        told = self._story(error)
        self._cause = told or error
        self._crew.end(kindly=False)
        if told is None or (isinstance(told, HeadraceError) and not self._inside):
            return self._cause  # at the start: what is wrong with the options, or with the files
        return self._death()

    def shutdown(self) -> None:
        self._finalizer.detach()
        self._crew.end()

    def _death(self) -> EngineDeadError:
        if self._cause is None:
            return EngineDeadError("the engine was shut down: make a new LLM")
        error = EngineDeadError(
            f"a rank of the engine failed ({type(self._cause).__name__}: {self._cause}), and all of them have ended: "
            "make a new LLM"
        )
        error.__cause__ = self._cause
        return error

    def _story(self, error: BaseException) -> BaseException | None:
        """What happened to another rank, if that is why rank 0 has met an error."""
        if isinstance(error, _ToldError):
            return error.error
        outside = isinstance(error, (LostError, OSError, EOFError)) or self._crew.lost
        until = time.monotonic() + (GRACE_S if outside else 0.0)
        lost: BaseException | None = None
        open_ranks = set(range(1, self.size))
        while open_ranks:
            for rank in list(open_ranks):
                link, process = self._crew.links[rank - 1], self._crew.processes[rank - 1]
                try:
                    while link.poll(0.02):
                        kind, value = link.recv()
                        if kind == "error":
                            return value if isinstance(value, BaseException) else EngineDeadError(str(value))
                except (EOFError, OSError):
                    open_ranks.discard(rank)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_S)
                    lost = lost or EngineDeadError(f"rank {rank} {_ending(process.returncode)}")
            if lost is not None or time.monotonic() > until:
                break
        return lost if outside else None


class _ToldError(Exception):
    """A rank has said what it failed with."""

    def __init__(self, rank: int, error: BaseException) -> None:
        super().__init__(f"rank {rank}: {error}")
        self.error = error


def _packed(kind: str, value: Any) -> bytes:
    try:
        return pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise RequestError(
            f"an argument cannot be sent to the other ranks ({error}): pass plain data, such as lists of numbers"
        ) from error


def _ending(status: int | None) -> str:
    if status is None:
        return "has closed its connection"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


class Member(_Linked):
    """Another rank, in a process of its own, as it sees rank 0 through its end of the pipe."""

    def __init__(self, rank: int, size: int, device: str, link: Connection) -> None:
        super().__init__(rank, size, device)
        self._link = link

    def next_settings(self) -> Any:
        """What the next engine is made from; None: there is none."""
        kind, value = self._link.recv()
        return self._expect(kind, "begin", value) if kind != "end" else None

    def meet(self, nbytes: int, seconds: float) -> None:
        self._link.send(("loaded", (nbytes, seconds)))
        kind, folder = self._link.recv()
        if self._expect(kind, "meet", folder) is not None:
            self._meet(folder)

    def next_call(self) -> tuple[str, Any, Any] | None:
        """The next command: name, arguments, keyword arguments; None: the engine is not used any more."""
        kind, value = self._link.recv()
        if kind == "end":
            raise EOFError
        if kind == "over":
            self._crc = 0
            return None
        call: tuple[str, Any, Any] = self._expect(kind, "call", value)
        return call

    def done(self, engine: Led, result: Any) -> None:
        """The command was run: what it returned, or the error with which it was refused."""
        self._link.send(("done", self._number(engine, result)))

    def agree(self, value: T) -> T:
        kind, agreed = self._link.recv()
        return self._expect(kind, "value", agreed)

    def failed(self, error: BaseException) -> BaseException:
        with contextlib.suppress(OSError):
            try:
                self._link.send(("error", error))
            except (pickle.PicklingError, TypeError, AttributeError):
                self._link.send(("error", EngineDeadError(f"{type(error).__name__}: {error}")))
        return error

    def _expect(self, kind: str, expected: str, value: Any) -> Any:
        if kind != expected:
            raise InvariantError(
                f"rank {self.rank} waits for a {expected!r} where rank 0 has sent a {kind!r}: it has gone another way"
            )
        return value


def watch_parent(parent: int, folder: str) -> None:
    """End this process when its parent has ended, wherever it waits, and remove what the parent has left behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="headrace-parent", daemon=True).start()
