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
from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .comm import Communicator
    from .optimizer_state import WholeOptimizer
    from .state import Division, Holders

LEVELS = ("none", "optimizer", "gradients", "parameters")
"""What is divided, each level with those before it."""
_WORDS = 1 << 19  # of which a fingerprint has one number


@dataclass(slots=True)
class _Divided:
    """A parameter of which this rank trains a part.

    Attributes:
        parameter: the user's.
        division: who has which part.
        level: what is divided.
        part: this rank's entries, shared with ``whole`` unless parameters are divided.
        whole: all entries, those of others as they were when they were last gathered; without
            memory between the uses if parameters are divided.
        gradient: the part's gradient, while the parameter is whole.
        version: of the parameter, when the part was last gathered.
        fingerprint: of the part then, if this rank keeps all entries.
    """

    parameter: torch.nn.Parameter
    division: Division
    level: str
    part: torch.Tensor
    whole: torch.Tensor
    gradient: torch.Tensor | None = None
    version: int = 0
    fingerprint: torch.Tensor | None = None

    @property
    def lasts(self) -> bool:
        """Whether this rank keeps all entries."""
        return self.level != "parameters"

    @property
    def changed(self) -> bool:
        """Whether the part was written to since :meth:`take_note`."""
        if self.parameter._version != self.version:
            return True
        # What is written through `parameter.data` leaves the version as it is.
        return self.fingerprint is None or not torch.equal(
            _fingerprint(self.part), self.fingerprint
        )

    def take_note(self) -> None:
        """Remembers what the part is now."""
        self.version = self.parameter._version
        self.fingerprint = _fingerprint(self.part)

    def adopt(self) -> None:
        """Takes over the tensor that the user set as `parameter.data`, if it did."""
        given = self.parameter.data
        if given.data_ptr() == self.part.data_ptr() and given.shape == self.part.shape:
            return
        if given.shape != self.part.shape or given.dtype != self.part.dtype:
            raise RaNNCError(
                f"`data` of a divided parameter was set to a tensor of shape {[*given.shape]} and "
                f"type {given.dtype}, needed this process's part of it, of shape "
                f"{[*self.part.shape]} and type {self.part.dtype}",
                hint="load whole values with `model.load_state_dict(...)`",
            )
        self.part.copy_(given)
        self.parameter.data = self.part

    def take_memory(self) -> None:
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())

    def free_memory(self) -> None:
        self.whole.untyped_storage().resize_(0)

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
        self._stepped = False

    def __contains__(self, name: object) -> bool:
        """Whether this rank trains but a part of the parameter ``name``."""
        return name in self._divided

    def divide(
        self, name: str, parameter: torch.nn.Parameter, division: Division, level: str
    ) -> None:
        """Makes a parameter, whole so far, the part of it that this rank trains."""
        whole = parameter.detach().contiguous()
        part = division.part(whole, self.comm.rank)
        if level == "parameters":
            # The user may have other tensors in the memory of this one, so it is left alone.
            whole, part = torch.empty_like(whole), part.clone()
            whole.untyped_storage().resize_(0)
        gradient, parameter.grad = parameter.grad, None
        parameter.data = part
        if gradient is not None:
            parameter.grad = division.part(gradient, self.comm.rank).clone()
        entry = _Divided(parameter, division, level, part, whole)
        self._divided[name] = entry
        if entry.lasts:
            entry.take_note()

    def give_back(
        self,
        holders: Holders,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: WholeOptimizer | None,
    ) -> None:
        """Makes all that is divided whole again where there is a part; all ranks do this together.

        Args:
            holders: who has which part.
            parameters: the model's, by name, the same names on every rank.
            optimizer: which has parts of its state, too.
        """
        divided = {name: parameters[name] for name in parameters if name in holders.divisions}
        if optimizer is not None:
            optimizer.make_whole(holders, divided)
        for name, parameter in divided.items():
            whole = holders.everywhere(name, parameter, parameter)
            gradient = holders.everywhere(name, parameter.grad, parameter)
            if whole is not None and self._divided.pop(name, None) is not None:
                parameter.grad = None
                parameter.data = whole
                parameter.grad = gradient
        holders.divisions.clear()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note of the optimizer's steps, which change the parts."""

        def stepped(*_: object) -> None:
            self._stepped = True

        optimizer.register_step_post_hook(stepped)

    def adopt(self) -> None:
        """Takes over tensors that the user set as `data` of divided parameters.

        Raises:
            RaNNCError: where one is not like the part that this rank trains.
        """
        for entry in self._divided.values():
            entry.adopt()

    @property
    def changed(self) -> bool:
        """Whether this rank's parts were written to since :meth:`gather`."""
        return self._stepped or any(e.changed for e in self._divided.values() if e.lasts)

    def gather(self) -> None:
        """Brings the wholes up to date; all ranks do this together."""
        lasting = {name: entry for name, entry in self._divided.items() if entry.lasts}
        self._gather(lasting)
        self._stepped = False
        for entry in lasting.values():
            entry.take_note()

    def _gather(self, names: Iterable[str]) -> None:
        for entries in self._together(names):
            ranks = [*entries[0].division.ranks]
            parts = torch.cat([_padded(e.part, e.division.part_numel) for e in entries])
            gathered = self.comm.all_gather_into(parts, ranks).view(len(ranks), -1)
            sizes = [entry.division.part_numel for entry in entries]
            for entry, columns in zip(entries, gathered.split(sizes, dim=1), strict=True):
                entry.whole.view(-1).copy_(columns.reshape(-1)[: entry.whole.numel()])

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Makes every divided parameter whole in the body of which this rank keeps all entries."""
        with _whole([entry for entry in self._divided.values() if entry.lasts]):
            yield

    @contextlib.contextmanager
    def outlined(self) -> Iterator[None]:
        """Gives every divided parameter the shape of the whole in the body; values may be absent.

        No memory is needed for that.
        """
        with _whole([*self._divided.values()]):
            yield

    @contextlib.contextmanager
    def shaped(self, *, values: bool) -> Iterator[None]:
        """Gives the other divided parameters the shape of the whole, and its values if asked to.

        With values, all ranks do this together.
        """
        names = [name for name, entry in self._divided.items() if not entry.lasts]
        with self._in_memory(names):
            if values:
                self._gather(names)
            yield

    @contextlib.contextmanager
    def gathered(self, names: Iterable[str]) -> Iterator[None]:
        """Makes divided parameters among ``names`` whole for the body; their ranks do it together.

        Those of which this rank keeps all entries anyway stay as they are.
        """
        here = [self._divided.get(name) for name in names]
        passing = [name for name, e in zip(names, here, strict=True) if e and not e.lasts]
        with self._in_memory(passing):
            self._gather(passing)
            yield

    @contextlib.contextmanager
    def _in_memory(self, names: Iterable[str]) -> Iterator[None]:
        entries = [self._divided[name] for name in names]
        try:
            for entry in entries:
                entry.take_memory()
            with _whole(entries):
                yield
        finally:
            for entry in entries:
                entry.free_memory()

    def scattered(
        self, parameters: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, torch.nn.Parameter]:
        """Those whose gradients are added up in every backward, as they are divided, too."""
        levels = {n: self._divided[n].level for n in parameters if n in self._divided}
        return {
            name: parameters[name]
            for name, level in levels.items()
            if level in ("gradients", "parameters") and parameters[name].requires_grad
        }

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


@contextlib.contextmanager
def _whole(entries: list[_Divided]) -> Iterator[None]:
    try:
        for entry in entries:
            entry.become_whole()
        yield
    finally:
        for entry in entries:
            entry.become_part()


def _padded(flat: torch.Tensor, numel: int) -> torch.Tensor:
    return F.pad(flat, (0, numel - flat.numel()))


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that tell whether a contiguous tensor's bits are still the same."""
    narrow = {1: torch.int8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    pieces = tensor.detach().view(-1).view(narrow).split(_WORDS)
    weights = torch.arange(1, 2 * _WORDS, 2, dtype=torch.int32, device=tensor.device)
    return torch.stack([(piece * weights[: len(piece)]).sum() for piece in pieces])
