"""What a process says when an exception ends it: in full on one rank, in one line on the others."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch._C._distributed_c10d import Store

    from .presence import Presence

_WAIT_SECONDS = 2.0
_POLL_SECONDS = 0.02
STOPPED = "stopped because another rank failed: "


class LastWords:
    """Takes the place of ``sys.excepthook``, and calls the one that was there."""

    def __init__(self, presence: Presence, store: Store, rank: int) -> None:
        """Speaks for this process from now on."""
        self._presence, self._store, self._rank = presence, store, rank
        before = sys.excepthook
        self._before: Callable[..., Any] = (
            before._before if isinstance(before, LastWords) else before
        )
        sys.excepthook = self

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Tells the other processes, and prints what they do not."""
        text = "".join(traceback.format_exception_only(kind, error)).strip()
        first_line = text.partition("\n")[0]
        if not hasattr(sys, "ps1"):  # else the user sits before it, and goes on
            self._presence.leave(f"ended with {first_line}", failed=True)
        line = self._short(error, text) if _is_default(self._before) else ""
        if line:
            print(line, file=sys.stderr, flush=True)
        else:
            self._before(kind, error, trace)
        # Only now, so that nobody is short before this process has printed what they refer to.
        if self._presence.reachable:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"last_words/{self._rank}", "" if line else text)
        _record(error)

    def _short(self, error: BaseException, text: str) -> str:
        """One line, where another rank prints the error in full; empty where none does."""
        message = str(error)
        if message.startswith(f"rank {self._rank} {STOPPED}"):
            return message.partition("\n")[0]
        if self._rank > 0 and self._of_rank_zero() == text:
            return f"rank {self._rank} stopped with the same {type(error).__name__} as rank 0"
        return ""

    def _of_rank_zero(self) -> str:
        deadline = time.monotonic() + _WAIT_SECONDS
        with contextlib.suppress(RuntimeError):
            while self._presence.reachable and time.monotonic() < deadline:
                if self._store.check(["last_words/0"]):
                    return self._store.get("last_words/0").decode()
                time.sleep(_POLL_SECONDS)
        return ""


def _is_default(hook: Callable[..., Any]) -> bool:
    """Whether nobody asked for errors to be shown in another way than Python and torch do."""
    if hook is sys.__excepthook__:
        return True
    if getattr(hook, "__module__", None) != "torch.distributed.distributed_c10d":
        return False
    # That of torch only puts the rank before each line of what the one before it prints.
    before = inspect.getclosurevars(hook).nonlocals.get("old_hook")
    return before is not None and _is_default(before)


def _record(error: BaseException) -> None:
    """Leaves the error where torchrun looks for it, unless somebody has."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not path or Path(path).exists():
        return
    with contextlib.suppress(OSError):
        try:
            raise error  # the handler writes down what is being handled
        except type(error):
            get_error_handler().record_exception(error)
