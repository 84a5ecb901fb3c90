"""The bars that show how far something is."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from pyrannc import _progress

if TYPE_CHECKING:
    import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float) -> str:
    """What is written when the second of two units comes that long after the first."""
    now = [100.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_progress.tqdm, "monitor_interval", 0)
    with _progress.progress("measuring", "operators", 2) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        bar.update()
        now[0] += seconds
        bar.update()
    return stream.getvalue()


def test_shows_what_takes_longer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, Terminal(), 1.5)
    assert "measuring: 100%" in written
    assert "2/2" in written
    # It is wiped out at the end.
    assert written.endswith("\r")
    assert "\n" not in written


def test_says_nothing_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 0.5).strip() == ""


def test_says_nothing_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), 1.5) == ""


def test_says_nothing_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shown(monkeypatch, Terminal(), 1.5) == ""
