"""Where each process is in the order of calls that need every process.

A process that waits for the others says in the store what it waits in, and looks whether another
one waits in something else that comes at the same place in the order: then neither would ever go
on. Two kinds of places exist: meetings, which all processes are counted through, and the events
between two meetings (a backward), which are counted from the last meeting.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

HINT = (
    "make each of these calls on all processes, in the same order; only what is done with the "
    "result belongs under `if get_rank() == 0`"
)
_PATIENCE_SECONDS = 30


@dataclass(slots=True)
class Calls:
    """This process's place in the order of calls of one model.

    Attributes:
        rank: this process.
        store: what all processes read and write; nothing is compared without.
        key: under which names there.
    """

    rank: int
    store: Store | None = None
    key: str = ""
    _meetings: int = 0  # gone through
    _events: int = 0  # since then
    _now: str = ""
    _in_meeting: bool = False
    _since: float = 0.0
    _said: set[str] = field(default_factory=set)
    _warned: bool = False

    @contextlib.contextmanager
    def meeting(self, call: str) -> Iterator[None]:
        """The body waits for all processes to make the same call."""
        with self._doing(call, in_meeting=True):
            yield
        self._meetings, self._events = self._meetings + 1, 0

    @contextlib.contextmanager
    def event(self, call: str, *, say: bool = False) -> Iterator[None]:
        """The body waits for some processes, all of which make this call.

        Args:
            call: as a person would write it.
            say: whether the others are told at once, as :meth:`check` is not called.
        """
        self._events += 1
        with self._doing(call, in_meeting=False):
            if say:
                self._say(f"{self._meetings}/{self._events}", f"rank {self.rank}: {call}")
            yield

    def end(self, how: str) -> None:
        """Says that this process makes no further call."""
        self._say("end", f"{self._meetings} rank {self.rank}: {how}", lasting=True)

    def check(self) -> None:
        """Compares this process's place with those of others that wait.

        Raises:
            MismatchError: when another one waits in something else, or will never come.
        """
        if not self._now or self.store is None:
            return
        own, other = f"rank {self.rank}: {self._now}", ""
        if self._in_meeting:
            self._say(f"{self._meetings + 1}", f"{self._events} {own}")
            other = self._read(f"{self._meetings}/{self._events + 1}")
            ended, _, text = self._read("end").partition(" ")
            if not other and ended and int(ended) <= self._meetings:
                other = text
            self._warn()
        else:
            self._say(f"{self._meetings}/{self._events}", own)
            events, _, text = self._read(f"{self._meetings + 1}").partition(" ")
            if events and int(events) < self._events:
                other = text
        if other:
            raise MismatchError(
                "the processes are in different calls, all of which need every process:"
                + "".join(f"\n  {line}" for line in sorted((own, other))),
                hint=HINT,
            )

    @contextlib.contextmanager
    def _doing(self, call: str, *, in_meeting: bool) -> Iterator[None]:
        before = self._now, self._in_meeting
        self._now, self._in_meeting, self._since = call, in_meeting, time.monotonic()
        try:
            yield
        finally:
            self._now, self._in_meeting = before
        for key in self._said:
            with contextlib.suppress(RuntimeError, AttributeError):
                self.store.delete_key(key)  # type: ignore[union-attr]
        self._said.clear()

    def _say(self, place: str, text: str, *, lasting: bool = False) -> None:
        key = f"{self.key}/{place}"
        if self.store is None or key in self._said:
            return
        with contextlib.suppress(RuntimeError):
            if self.store.compare_set(key, "", text).decode() == text and not lasting:
                self._said.add(key)

    def _read(self, place: str) -> str:
        key = f"{self.key}/{place}"
        with contextlib.suppress(RuntimeError):
            if self.store is not None and self.store.check([key]):
                return self.store.get(key).decode()
        return ""

    def _warn(self) -> None:
        if self._warned or time.monotonic() - self._since < _PATIENCE_SECONDS:
            return
        self._warned = True
        logger.warning(
            "rank %d has been waiting in %s for other processes for %d s; it must be called by all "
            "of them",
            self.rank,
            self._now,
            _PATIENCE_SECONDS,
        )
