"""The error classes: one tree, messages with hints, whole after pickling."""

import pickle

import pytest

from pyrannc import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
]


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_is_a_value_error_with_a_hint(error_class: type[errors.RaNNCError]) -> None:
    error = error_class("found 3 ranks, needed 4", "start 4 processes")
    assert isinstance(error, ValueError)
    assert str(error) == "found 3 ranks, needed 4\nhint: start 4 processes"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_class_says_when_it_occurs() -> None:
    assert all((error_class.__doc__ or "").startswith("Occurs when") for error_class in CLASSES)


def test_execution_error_names_the_place() -> None:
    error = errors.ExecutionError("no answer for 60 s", None, 1, 0, "0RECV_B2 v7[0:4]<3")
    assert isinstance(error, RuntimeError)
    assert str(error) == "rank 1, stage 0, action 0RECV_B2 v7[0:4]<3: no answer for 60 s"
    assert pickle.loads(pickle.dumps(error)).rank == 1
