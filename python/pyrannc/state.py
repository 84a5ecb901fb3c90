"""Full values of what lies on several ranks, by the names that the user's model gives them.

Everything here is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .comm import Communicator


@dataclass(frozen=True, slots=True)
class Piece:
    """Some entries of a tensor, and where they are kept.

    Attributes:
        ranks: who keeps equal copies; the first one's count.
        start: the first entry, of all in row-major order.
        stop: the entry after the last.
    """

    ranks: tuple[int, ...]
    start: int
    stop: int


class Holders:
    """Which ranks hold each parameter and buffer.

    Attributes:
        comm: the connections to them.
        ranks: the holding ranks by name; a name that is absent is held by every rank.
    """

    def __init__(self, comm: Communicator, ranks: Mapping[str, list[int]]) -> None:
        """Remembers who holds what."""
        self.comm = comm
        self.ranks = dict(ranks)

    def pieces(self, name: str, numel: int) -> list[Piece]:
        """Who keeps which of a tensor's ``numel`` entries; each entry is in exactly one piece."""
        ranks = self.ranks.get(name, range(self.comm.world_size))
        return [Piece(tuple(ranks), 0, numel)]

    def is_local(self, name: str) -> bool:
        """Whether this rank holds ``name``."""
        return name not in self.ranks or self.comm.rank in self.ranks[name]

    def source(self, name: str) -> int:
        """The rank whose value counts."""
        return self.ranks[name][0] if name in self.ranks else 0

    def everywhere(
        self, name: str, tensor: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor | None:
        """The holder's ``tensor`` on every rank, or ``None`` when the holder has none.

        Args:
            name: the parameter's or buffer's name.
            tensor: what this rank has for it.
            like: a tensor of the same shape and type, on any rank.
        """
        source = self.source(name)
        present = self.comm.all_gather_row([int(tensor is not None)])[source][0]
        if not present:
            return None
        if self.comm.rank == source:
            assert tensor is not None
            full = tensor.detach().to(self.comm.device).contiguous().clone()
        else:
            full = torch.empty(like.shape, dtype=like.dtype, device=self.comm.device)
        return self.comm.broadcast(full, source)

    def on_rank_zero(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The holder's value as a CPU tensor on rank 0, ``None`` elsewhere."""
        source = self.source(name)
        if self.comm.rank == source:
            full = tensor.detach().contiguous()
        else:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.comm.device)
        self.comm.send_to_zero(full, source)
        return full.cpu().clone() if self.comm.rank == 0 else None


def free(parameter: torch.Tensor) -> None:
    """Gives back a tensor's memory; its shape and type stay readable."""
    parameter.data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(
        parameter.shape
    )


def copy_local(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Copies full tensors over the local ones of the same names.

    Raises:
        RaNNCError: when a shape differs, before anything is written.
    """
    for name, tensor in target.items():
        if name in source and source[name].shape != tensor.shape:
            raise RaNNCError(
                f"`{name}` has shape {list(source[name].shape)} in the given state, "
                f"but {list(tensor.shape)} in the model"
            )
    with torch.no_grad():
        for name, tensor in target.items():
            if name in source:
                tensor.copy_(source[name])
