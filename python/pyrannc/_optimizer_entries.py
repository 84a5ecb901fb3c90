"""What an optimizer's state consists of, as it is compared, sent and divided."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Kind(enum.IntEnum):
    """Whose parameters an optimizer's state is of."""

    EMPTY = 0  # nobody's
    OWN = 1  # this process's
    WHOLE = 2  # all processes', or somebody else's
    EITHER = 3  # this process has all


@dataclass(frozen=True, slots=True)
class Group:
    """The parameters of one group as the user gave them, and their names if there are any."""

    parameters: list[torch.Tensor]
    names: list[str] | None


@dataclass(frozen=True, slots=True)
class Announced:
    """A tensor that travels by itself."""

    shape: torch.Size
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def group_of(param_group: Mapping[str, Any]) -> Group:
    given = param_group["params"]
    items: list[Any] = [given] if isinstance(given, torch.Tensor) else list(given)
    if any(isinstance(item, tuple) for item in items):
        named: list[tuple[str, torch.Tensor]] = items
        return Group([parameter for _, parameter in named], [name for name, _ in named])
    names = param_group.get("param_names")
    return Group(items, None if names is None else list(names))


def announce(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of one parameter's state, with tensors that have dimensions only described."""
    return {
        key: Announced(value.shape, value.dtype)
        if isinstance(value, torch.Tensor) and value.dim() > 0
        else value.detach().cpu()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in entries.items()
    }


def suits(value: torch.Tensor, shape: torch.Size) -> bool:
    """Whether an optimizer may keep ``value`` for a parameter of ``shape``.

    It is a number, or as large, or has one entry for all along some dimensions.
    """
    if value.dim() == 0:
        return True
    return value.dim() == len(shape) and all(
        size in (1, needed) for size, needed in zip(value.shape, shape, strict=True)
    )


def keeps_alike(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known to keep for a parameter only what :func:`suits`."""
    ours = type(optimizer).__module__.startswith("torch.optim")
    return ours and not isinstance(optimizer, torch.optim.LBFGS)


def options_of(group: Mapping[str, Any]) -> str:
    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def only(items: Iterable[Any], kept: Sequence[bool]) -> list[Any]:
    return [item for item, keep in zip(items, kept, strict=True) if keep]
