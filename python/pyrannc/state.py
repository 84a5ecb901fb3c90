"""Full values of what lies on several ranks, by the names that the user's model gives them.

Everything here is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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


@dataclass(frozen=True, slots=True)
class Division:
    """How ranks divide the entries of a tensor among themselves, in row-major order.

    Attributes:
        ranks: who keeps the parts, in this order.
        shape: of the whole tensor.
    """

    ranks: tuple[int, ...]
    shape: torch.Size

    @property
    def part_numel(self) -> int:
        """Entries of each part but the last ones, which may have fewer or none."""
        return -(-self.shape.numel() // len(self.ranks))

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first entry that ``rank`` keeps, and the entry after its last."""
        start = self.ranks.index(rank) * self.part_numel
        numel = self.shape.numel()
        return min(start, numel), min(start + self.part_numel, numel)

    def part(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The entries of a whole tensor that ``rank`` keeps, in one dimension; a view if it can."""
        start, stop = self.bounds(rank)
        return whole.reshape(-1)[start:stop]


class Holders:
    """Which ranks hold each parameter and buffer, whole or in parts.

    Of a tensor that is *divided* each of its ranks keeps some entries: the parameter itself, its
    gradient and what the optimizer keeps for it then have one dimension with only these.

    Attributes:
        comm: the connections to them.
        ranks: the holding ranks by name; a name that is absent is held by every rank.
        divisions: of the divided ones, how.
    """

    def __init__(self, comm: Communicator, ranks: Mapping[str, list[int]]) -> None:
        """Remembers who holds what."""
        self.comm = comm
        self.ranks = dict(ranks)
        self.divisions: dict[str, Division] = {}

    def pieces(self, name: str, numel: int) -> list[Piece]:
        """Who keeps which of a tensor's ``numel`` entries; each entry is in exactly one piece."""
        division = self.divisions.get(name)
        if division is None:
            ranks = self.ranks.get(name, range(self.comm.world_size))
            return [Piece(tuple(ranks), 0, numel)]
        bounds = [(rank, *division.bounds(rank)) for rank in division.ranks]
        return [Piece((rank,), start, stop) for rank, start, stop in bounds if start < stop]

    @property
    def are_all_everywhere(self) -> bool:
        """Whether every rank holds everything whole."""
        everyone = list(range(self.comm.world_size))
        return not self.divisions and all(ranks == everyone for ranks in self.ranks.values())

    def is_local(self, name: str) -> bool:
        """Whether this rank holds ``name``, or a part of it."""
        return name not in self.ranks or self.comm.rank in self.ranks[name]

    def shape(self, name: str, tensor: torch.Tensor) -> torch.Size:
        """The shape of the whole of which this rank has ``tensor``."""
        return self.divisions[name].shape if name in self.divisions else tensor.shape

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a whole parameter, of its gradient or its optimizer's state."""
        division = self.divisions.get(name)
        return whole if division is None else division.part(whole, self.comm.rank)

    def everywhere(
        self, name: str, tensor: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor | None:
        """The whole of the holders' ``tensor`` on every rank; ``None`` when they have none.

        Args:
            name: the parameter's or buffer's name.
            tensor: what this rank has for it: the tensor, or its part of a divided one.
            like: a tensor of the same shape and type, on any rank; of a divided one the type.
        """
        shape = self.shape(name, like)
        pieces = self.pieces(name, shape.numel())
        present = self.comm.all_gather_row([int(tensor is not None)])
        if not present[pieces[0].ranks[0]][0]:
            return None
        whole = torch.empty(shape, dtype=like.dtype, device=self.comm.device)
        for piece in pieces:
            entries = whole.view(-1)[piece.start : piece.stop]
            if self.comm.rank == piece.ranks[0]:
                entries.copy_(_entries(tensor, entries))
            self.comm.broadcast(entries, piece.ranks[0])
        return whole

    def on_rank_zero(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The whole as a CPU tensor on rank 0, ``None`` elsewhere.

        Args:
            name: the parameter's or buffer's name.
            tensor: what this rank has for it; where it has nothing, one of the same type, and
                of the same shape unless it is divided.
        """
        shape = self.shape(name, tensor)
        whole = torch.empty(shape, dtype=tensor.dtype, device=self.comm.device)
        for piece in self.pieces(name, shape.numel()):
            entries = whole.view(-1)[piece.start : piece.stop]
            if self.comm.rank == piece.ranks[0]:
                entries.copy_(_entries(tensor, entries))
            self.comm.send_to_zero(entries, piece.ranks[0])
        return whole.cpu() if self.comm.rank == 0 else None


def _entries(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if tensor is None:  # a holder of another part has one: this part of it is zero
        return torch.zeros_like(like)
    return tensor.detach().reshape(-1)
