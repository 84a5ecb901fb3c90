"""Parameters that the replicas of a stage divide among themselves (ZeRO, Rajbhandari et al. 2020).

Each replica trains a part of every such parameter: some of its entries in row-major order. Outside
of the model's passes the parameter *is* this part, with one dimension; inside, the same object is
whole again. So the user's optimizer goes on with the parameters it was given, and its state, like
``.grad``, is as large as the part. Gradients are added up by scattering the sums: each replica gets
those of its part. What an optimizer does to an entry must then depend on nothing but that entry's
own values, see :func:`pyrannc.optimizer.check_element_wise`.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ._buckets import buckets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .comm import Communicator
    from .state import Division

LEVELS = ("none", "optimizer", "gradients", "parameters")
"""What is divided, each level with those before it."""


@dataclass(slots=True)
class _Divided:
    """A parameter of which this rank trains a part.

    Attributes:
        parameter: the user's.
        division: who has which part.
        part: this rank's entries, shared with ``whole``.
        whole: all entries, those of others as they were when they were last gathered.
        gradient: the part's gradient, while the parameter is whole.
    """

    parameter: torch.nn.Parameter
    division: Division
    part: torch.Tensor
    whole: torch.Tensor
    gradient: torch.Tensor | None = None

    def become_whole(self) -> None:
        self.gradient, self.parameter.grad = self.parameter.grad, None
        self.parameter.data = self.whole

    def become_part(self) -> None:
        self.parameter.grad = None
        self.parameter.data = self.part
        self.parameter.grad, self.gradient = self.gradient, None


class Sharding:
    """What this rank divides with others.

    Attributes:
        comm: the connections to them.
    """

    def __init__(self, comm: Communicator) -> None:
        """Nothing is divided yet."""
        self.comm = comm
        self._divided: dict[str, _Divided] = {}
        self._versions: dict[str, int] = {}
        self._stepped = False

    def __contains__(self, name: object) -> bool:
        """Whether this rank trains but a part of the parameter ``name``."""
        return name in self._divided

    def divide(self, name: str, parameter: torch.nn.Parameter, division: Division) -> None:
        """Makes a parameter, whole so far, the part of it that this rank trains."""
        whole = parameter.detach().contiguous()
        part = division.part(whole, self.comm.rank)
        gradient, parameter.grad = parameter.grad, None
        parameter.data = part
        if gradient is not None:
            parameter.grad = division.part(gradient, self.comm.rank).clone()
        self._divided[name] = _Divided(parameter, division, part, whole)
        self._versions[name] = parameter._version

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note of the optimizer's steps, which change the parts."""

        def stepped(*_: object) -> None:
            self._stepped = True

        optimizer.register_step_post_hook(stepped)

    @property
    def changed(self) -> bool:
        """Whether this rank's parts were written to since :meth:`gather`."""
        return self._stepped or any(
            entry.parameter._version != self._versions[name]
            for name, entry in self._divided.items()
        )

    def gather(self) -> None:
        """Brings the wholes up to date; all ranks do this together."""
        for entries in self._together(self._divided):
            ranks = [*entries[0].division.ranks]
            parts = torch.cat([_padded(e.part, e.division.part_numel) for e in entries])
            gathered = self.comm.all_gather_into(parts, ranks).view(len(ranks), -1)
            sizes = [entry.division.part_numel for entry in entries]
            for entry, columns in zip(entries, gathered.split(sizes, dim=1), strict=True):
                entry.whole.view(-1).copy_(columns.reshape(-1)[: entry.whole.numel()])
        self._stepped = False
        self._versions = {name: e.parameter._version for name, e in self._divided.items()}

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Makes every divided parameter whole in the body."""
        try:
            for entry in self._divided.values():
                entry.become_whole()
            yield
        finally:
            for entry in self._divided.values():
                entry.become_part()

    def scatter(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds up gradients of whole parameters between the ranks that divide them.

        All of these ranks do this together, with the same names.

        Returns:
            By name, this rank's part of the sum.
        """
        sums: dict[str, torch.Tensor] = {}
        names = {id(self._divided[name]): name for name in gradients}
        for entries in self._together(gradients):
            ranks = [*entries[0].division.ranks]
            sizes = [entry.division.part_numel for entry in entries]
            rows = [
                _padded(gradients[names[id(e)]].reshape(-1), size * len(ranks)).view(-1, size)
                for e, size in zip(entries, sizes, strict=True)
            ]
            summed = self.comm.reduce_scatter(torch.cat(rows, dim=1), ranks)
            for entry, part in zip(entries, summed.split(sizes), strict=True):
                sums[names[id(entry)]] = part[: entry.part.numel()]
        return sums

    def _together(self, names: Iterable[str]) -> Iterator[list[_Divided]]:
        """Runs of parameters that the same ranks divide, in the same order on all of them."""

        def ranks(entry: _Divided) -> tuple[int, ...]:
            return entry.division.ranks

        wanted = set(names)
        entries = [entry for name, entry in self._divided.items() if name in wanted]
        for _, alike in itertools.groupby(sorted(entries, key=ranks), ranks):
            yield from buckets(alike, lambda entry: entry.whole)


def _padded(flat: torch.Tensor, numel: int) -> torch.Tensor:
    return F.pad(flat, (0, numel - flat.numel()))
