"""Where in the model's code an operator is called."""

from __future__ import annotations

import dis
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ._flat_model import FlatModel

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch import fx

RAN_AT = "ran_at"
"""Where in the `meta` of an exported node :func:`place_now` is."""

_CALL = -1  # stands for the module that is called
_BEGIN = FlatModel.forward.__code__
_CALLS = (torch.nn.Module._call_impl.__code__,)
_TORCH, _OWN = (f"{Path(str(file)).parent}/" for file in (torch.__file__, __file__))


def place_now() -> tuple[tuple[int, bool], ...]:
    """The calls and loops of the model's code that are running, from the outermost.

    Each with its number in the one around it, and whether it is a loop.
    """
    found: list[tuple[int, bool]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _BEGIN:
        if frame.f_code in _CALLS:
            found.append((_CALL, False))
        elif (loops := _loops(frame.f_code)) is not None:
            around = [(begin, True) for begin, end in loops if begin <= frame.f_lasti <= end]
            found += [(frame.f_lasti, False), *reversed(around)]
        frame = frame.f_back
    return tuple(reversed(found))


@functools.cache
def _loops(code: CodeType) -> list[tuple[int, int]] | None:
    """The loops of a function, outer ones first; `None` if it is not the model's."""
    file = code.co_filename
    if file.startswith(_OWN) or (
        file.startswith(_TORCH)
        and (not file.startswith(f"{_TORCH}nn/") or file == _CALLS[0].co_filename)
    ):
        return None
    ends: dict[int, int] = {}
    for step in dis.get_instructions(code):
        if "JUMP" in step.opname and isinstance(step.argval, int) and step.argval < step.offset:
            ends[step.argval] = max(step.offset, ends.get(step.argval, 0))
    return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def called_at(node: fx.Node) -> tuple[tuple[int | str, bool], ...]:
    """Where an exported node was called, with the names of the modules on the way."""
    place: tuple[tuple[int, bool], ...] = node.meta.get(RAN_AT, ())
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = [str(entry[0]).split("@")[0] for entry in stack]
    found: list[tuple[int | str, bool]] = []
    for number, is_loop in place[::-1]:
        name = modules.pop() if number == _CALL and modules else ""
        found.append((name if number == _CALL else number, is_loop))
    return tuple(found[::-1])
