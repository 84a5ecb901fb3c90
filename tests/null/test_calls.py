"""Processes that wait for each other in different calls."""

from __future__ import annotations

import contextlib

import pytest
import torch.distributed as dist

from pyrannc.calls import Calls
from pyrannc.errors import MismatchError


def two() -> tuple[Calls, Calls]:
    store = dist.HashStore()
    return Calls(0, store, "calls"), Calls(1, store, "calls")


def waits(calls: Calls, kind: str, call: str) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(calls.meeting(call) if kind == "meeting" else calls.event(call))
    return stack


def test_equal_calls_are_no_problem() -> None:
    one, other = two()
    for kind, call in [("meeting", "a"), ("event", "b"), ("event", "c"), ("meeting", "d")]:
        with waits(one, kind, call), waits(other, kind, call):
            for calls in (one, other, one):
                calls.check()


def test_one_may_be_ahead() -> None:
    one, other = two()
    with one.meeting("a"), other.meeting("a"):
        one.check()
    with one.event("backward"):
        one.check()
    with one.meeting("b"):
        one.check()
        with other.event("backward"):
            other.check()
            one.check()
        with other.meeting("b"):
            other.check()
    other.end("the end")
    with pytest.raises(MismatchError, match=r"rank 0: c\n  rank 1: the end"), one.meeting("c"):
        one.check()


@pytest.mark.parametrize("first", [0, 1])
def test_a_backward_that_one_does_not_run_is_named(first: int) -> None:
    pair = two()
    told = r"rank 0: state\n  rank 1: backward\n"
    with pair[0].meeting("call"), pair[1].meeting("call"):
        pass
    with pair[0].meeting("state"), pair[1].event("backward"):
        with contextlib.suppress(MismatchError):  # it may be there before the other one waits
            pair[first].check()
        with pytest.raises(MismatchError, match=told):
            pair[1 - first].check()


def test_what_cannot_be_checked_is_told_at_once() -> None:
    one, other = two()
    told = pytest.raises(MismatchError, match="rank 1: barrier")
    with other.event("barrier", say=True), one.meeting("state"), told:
        one.check()
