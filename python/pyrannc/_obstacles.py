"""What stops the exporter, and where in the user's code that is."""

from __future__ import annotations

import contextlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

_NOT_THE_USERS = tuple(str(Path(str(of)).parent) for of in (torch.__file__, __file__))
_BY_CONTENT = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
_MOST = 5
"""How many obstacles one message names."""

DECIDES = "Python decides by what a tensor holds"
SIZES = "the size of a tensor depends on what another one holds"
DRAWS = "draws from Python's `random` or from NumPy"
BACKWARD = "a custom `autograd.Function`, whose backward the exporter would lose"
_REMEDIES = {
    DECIDES: "use `torch.where` or masks in place of `if`, `item()` and `tolist()`",
    SIZES: "use masks in place of `nonzero()` and `x[mask]`",
    DRAWS: "draw with `torch.rand` and the like",
    BACKWARD: "make it of PyTorch's operators",
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Something that stopped the exporter.

    Attributes:
        kind: class of the part that stays whole.
        path: the submodule that it is; `None` for an `autograd.Function`.
        place: file and line; empty if nobody knows.
        reason: why.
    """

    kind: str
    path: str | None
    place: str
    reason: str


def is_by_content(failure: BaseException | None) -> bool:
    """Whether the exporter failed as the code wants to know what a tensor holds."""
    return any(isinstance(cause, _BY_CONTENT) for cause in _causes(failure))


def reason_of(failure: BaseException) -> str:
    """Why the exporter failed, in one line."""
    if is_by_content(failure):
        return DECIDES
    first = _causes(failure)[-1]
    return next(iter(str(first).splitlines()), "") or type(first).__name__


def place_of(failure: BaseException) -> str:
    """File and line of the user's code in which the exporter failed."""
    for cause in reversed(_causes(failure)):
        frames = [
            (frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)
        ]
        found = _innermost(frames)
        if found:
            return found
    return ""


@contextlib.contextmanager
def unknown_numbers() -> Iterator[list[str]]:
    """Notes where in the user's code numbers become known only as it runs, while the body does."""
    places: list[str] = []
    originals = {
        name: getattr(ShapeEnv, name)
        for name in ("create_unbacked_symint", "create_unbacked_symfloat")
    }

    def noting(original: Any) -> Any:
        def create(*args: Any, **kwargs: Any) -> Any:
            frame, frames = sys._getframe(1), []
            while frame is not None:
                frames.append((frame.f_code.co_filename, frame.f_lineno))
                frame = frame.f_back  # type: ignore[assignment]
            places.append(_innermost(frames[::-1]))
            return original(*args, **kwargs)

        return create

    for name, original in originals.items():
        setattr(ShapeEnv, name, noting(original))
    try:
        yield places
    finally:
        for name, original in originals.items():
            setattr(ShapeEnv, name, original)


def described(obstacles: Iterable[Obstacle]) -> str:
    """What they are, and what to change."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for one in obstacles:
        groups.setdefault((one.kind, one.place, one.reason), []).append(one.path or "")
    lines = []
    for (kind, place, reason), paths in list(groups.items())[:_MOST]:
        name = f"`{paths[0]}` ({kind})" if paths[0] else f"`{kind}`"
        others = f" and {len(paths) - 1} more of its kind" if len(paths) > 1 else ""
        lines.append(f"{name}{others}: {reason}" + (f", in {place}" if place else ""))
    if len(groups) > _MOST:
        lines.append(f"{len(groups) - _MOST} more")
    reasons = {reason for _, _, reason in groups}
    remedies = [remedy for reason, remedy in _REMEDIES.items() if reason in reasons]
    remedies += ["change that line"] if reasons - set(_REMEDIES) else []
    return "\n  ".join(["", *lines]) + f"\nhint: {'; '.join(remedies)}"


def _causes(failure: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while failure is not None and failure not in found:
        found.append(failure)
        failure = failure.__cause__ or failure.__context__
    return found


def _innermost(frames: Sequence[tuple[str, int | None]]) -> str:
    """The last frame that is the user's."""
    for file, line in reversed(frames):
        if not file.startswith((*_NOT_THE_USERS, "<")) and Path(file).exists():
            return f"{file}:{line}"
    return ""
