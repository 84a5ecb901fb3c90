"""What processes know of each other while they are connected, for when one of them goes.

Each process tells in the store who it is and in which step, and how it ends if it can. When a
connection breaks or times out, the others read there, and in the table of processes of their host,
which of them it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from torch._C._distributed_c10d import Store

_BEAT_SECONDS = 0.5
_SILENT_BEATS = 6
_POLL_SECONDS = 0.01
_TELL_SECONDS = 0.1  # steps can be much shorter than it is worth telling
_LOST = ("connection", "broken pipe", "socket", "gloo", "nccl", "timed out", "timeout")
"""In the words of what is raised when a process goes, or does not answer."""

_GONE = "ended without a word"
_FATES = {"Z": _GONE, "X": _GONE, "T": "was stopped (SIGSTOP)"}


@dataclass(slots=True)
class Record:
    """What a process tells of itself.

    Attributes:
        host: the machine.
        space: a text that is equal for processes which see each other's numbers.
        pid: its number there.
        step: how many calls of a model it has begun.
        beat: how often it has told this.
        end: how it has ended, if it could tell.
    """

    host: str
    space: str
    pid: int
    step: int = 0
    beat: int = 0
    end: str = ""

    @property
    def place(self) -> str:
        """Where it was last known to be."""
        return f"in or after step {self.step}" if self.step else "before its first step"


class Presence:
    """This process among others.

    Attributes:
        reachable: whether whoever holds the store is still there.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
        """Tells the others of this process, and waits for them; collective.

        Raises:
            ExecutionError: when some do not come within the time limit.
        """
        self._store, self._rank = store, rank
        self.reachable = True
        self._own = Record(socket.gethostname(), _space(), os.getpid())
        self._telling = threading.Lock()
        self._told_at = 0.0
        self._left = threading.Event()
        self._tell()
        self._others: dict[int, Record] = {}
        others = [other for other in range(world_size) if other != rank]
        try:
            store.wait([_key(other) for other in others], timeout)
        except RuntimeError:
            missing = [other for other in others if not store.check([_key(other)])]
            raise ExecutionError(
                f"rank {', '.join(map(str, missing))} did not come to the first call that needs "
                f"every process within {timeout.total_seconds():g} s",
                hint="see the output of that process for an error of its own; every process must "
                "call the model",
            ) from None
        self._others = {other: self._read(other) for other in others}
        # Beats are for those whose end the table of processes cannot tell. A store that a process
        # of the program holds goes with it, perhaps while another one still beats.
        self._beats = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and any(
            one.space != self._own.space for one in self._others.values()
        )
        self._thread = threading.Thread(target=self._beat, name="pyrannc-presence", daemon=True)
        if self._beats:
            self._thread.start()

    def begin_step(self) -> None:
        """Takes note that a model is called."""
        self._own.step += 1
        if time.monotonic() > self._told_at + _TELL_SECONDS:
            self._tell()

    def leave(self, how: str, *, failed: bool = False) -> None:
        """Tells the others how this process ends, once.

        Args:
            how: in words that follow its name.
            failed: whether the others need not wait for what they still expect of it.
        """
        if self._left.is_set():
            return
        self._left.set()
        self._own.end = how
        self._tell()
        if failed and self.reachable:
            with self._using_store():
                self._store.compare_set("failed", "", _told(self._rank, self._own, how))
        if self._beats:
            self._thread.join(_BEAT_SECONDS)  # it must not run when the interpreter ends

    @property
    def own_end(self) -> str:
        """The end of the script, with what the others should know of this process then."""
        return (
            f"the end of the script, or sys.exit (host {self._own.host}, process "
            f"{self._own.pid}, {self._own.place})"
        )

    @property
    def failure(self) -> str:
        """What is told of the first process that an exception ended; empty while there is none."""
        with self._using_store():
            if self._store.check(["failed"]):
                return self._store.get("failed").decode()
        return ""

    def explained(self, error: Exception) -> Exception:
        """The error itself, or one that names the process which is gone, if that is the reason."""
        if isinstance(error, ExecutionError) or not is_loss(error):
            return error
        told = self._gone()
        if not told:
            return error
        return ExecutionError(
            "; ".join(told),
            hint="see the output of that process for an error of its own, and the system's log "
            "for one that was killed (out of memory?)",
        )

    def _gone(self) -> list[str]:
        """What became of those who are gone."""
        before = {rank: one.beat for rank, one in self._others.items()}
        deadline = time.monotonic() + _BEAT_SECONDS * _SILENT_BEATS
        while time.monotonic() < deadline:
            told = [text for rank in self._others if (text := self._fate(rank))]
            if told:
                return told
            time.sleep(_POLL_SECONDS)
        return [
            _told(rank, one, "is silent")
            for rank, one in self._others.items()
            if self._beats and one.beat == before[rank]
        ]

    def _fate(self, rank: int) -> str:
        """How a process ended or was stopped; empty if it was not."""
        if self.reachable:
            with self._using_store():
                self._others[rank] = self._read(rank)
        one = self._others[rank]
        one.step = max(one.step, self._own.step - 1)  # all meet in every step
        fate = one.end
        if not fate and one.space == self._own.space:
            fate = _FATES.get(_state(one.pid), "")
        return _told(rank, one, fate) if fate else ""

    @contextlib.contextmanager
    def _using_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self.reachable = False

    def _tell(self) -> None:
        if not self.reachable:
            return
        with self._telling, self._using_store():
            self._own.beat += 1
            self._told_at = time.monotonic()
            self._store.set(_key(self._rank), json.dumps(asdict(self._own)))

    def _read(self, rank: int) -> Record:
        return Record(**json.loads(self._store.get(_key(rank))))

    def _beat(self) -> None:
        while not self._left.wait(_BEAT_SECONDS):
            self._tell()


def is_loss(error: BaseException) -> bool:
    """Whether an error may come from another process that is gone, or does not answer."""
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(word in text for word in _LOST)


def _told(rank: int, one: Record, how: str) -> str:
    return f"rank {rank} (host {one.host}, process {one.pid}) {how}, {one.place}"


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _space() -> str:
    """A text that is equal for processes which see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody's but its own


def _state(pid: int) -> str:
    """The state of a process as the kernel tells it; `X` where there is none any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"
