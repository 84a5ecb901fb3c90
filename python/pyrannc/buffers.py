"""Buffers that a forward writes to, such as counters and running statistics.

One device computes a batch at once; here several microbatches on several replicas do. The rule:
each of them starts from the buffers as they were before the step and changes a copy. When all
forwards are done, a buffer becomes the mean of its copies weighted by their rows, on all replicas
of its stage alike; running statistics of batch norms become those that the whole batch gives. So
what does not depend on the rows, a count of batches say, is exactly what one device would have, a
mean over rows is, too, and recomputing or looking back at a microbatch finds what it had seen.
At last the processes that do not hold the stage are told, so that the model's buffers are up to
date on all of them, whatever a script or another form of the model does with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .comm import Communicator
    from .stage import Stage


@dataclass(slots=True)
class _Mean:
    """A mean of equally shaped tensors, in the making.

    Attributes:
        weight: the sum of all weights.
        parts: how many tensors went in.
        value: the tensor, if it is one; else the sum of all, each times its weight.
    """

    weight: int
    parts: int
    value: torch.Tensor

    def add(self, value: torch.Tensor, weight: int) -> None:
        self.value = self.total() + value.double() * weight
        self.weight += weight
        self.parts += 1

    def total(self) -> torch.Tensor:
        return self.value.double() * self.weight if self.parts == 1 else self.value


@dataclass(slots=True)
class BufferUpdates:
    """What the microbatches of one step make of the buffers that they write to."""

    _means: dict[tuple[int, str], _Mean] = field(default_factory=dict)

    def begin(self, stage: Stage) -> dict[str, torch.Tensor]:
        """Copies for a microbatch that the stage is about to compute."""
        return {name: buffer.detach().clone() for name, buffer in stage.written.items()}

    def end(self, index: int, stage: Stage, copies: Mapping[str, torch.Tensor], rows: int) -> None:
        """Takes in what the stage, by its number, made of the copies for so many rows."""
        for name in _averaged(stage):
            value, key = _plain(copies[name].detach()), (index, name)
            if key in self._means:
                self._means[key].add(value, rows)
            else:
                self._means[key] = _Mean(rows, 1, value)

    def finish(
        self,
        comm: Communicator,
        stages: Mapping[int, Stage],
        ranks: Sequence[Sequence[int]],
    ) -> None:
        """Gives the buffers their new values; the replicas of a stage do this together.

        Args:
            comm: the connections to them.
            stages: this process's stages by number.
            ranks: the replicas of each stage.
        """
        for index in sorted(stages):
            if stages[index].written:
                self._finish_stage(comm, index, stages[index], [*ranks[index]])
        self._means.clear()

    @torch.no_grad()
    def _finish_stage(self, comm: Communicator, index: int, stage: Stage, ranks: list[int]) -> None:
        names = _averaged(stage)
        means = [self._means.get((index, name)) for name in names]
        if len(ranks) == 1 and all(mean is not None and mean.parts == 1 for mean in means):
            for name, mean in zip(names, means, strict=True):
                assert mean is not None
                _store(stage.written[name], mean.value)
            totals = _seen(stage, comm.device)
        else:
            weight = torch.tensor(float(next((m.weight for m in means if m), 0)))
            sums = [
                torch.zeros_like(_plain(stage.written[name])).double()
                if mean is None
                else mean.total()
                for name, mean in zip(names, means, strict=True)
            ]
            parts = [weight.double().to(comm.device), *sums, *_seen(stage, comm.device)]
            parts = _summed(comm, parts, ranks)
            totals = parts[1 + len(names) :]
            for name, total in zip(names, parts[1 : 1 + len(names)], strict=True):
                _store(stage.written[name], total / parts[0])
        kept = [norm for norm in stage.norms if norm.buffers_kept]
        for norm, seen in zip(kept, totals, strict=True):
            mean_name, variance_name = norm.buffers_kept
            norm.update(seen, stage.written[mean_name], stage.written[variance_name])


@dataclass(frozen=True, slots=True)
class Announcement:
    """What processes that do not hold a stage hear of its buffers after a step.

    Attributes:
        buffers: those that a step changes and not all processes compute, alike everywhere.
        own: the names of those that this process announces.
    """

    buffers: Mapping[str, torch.Tensor]
    own: frozenset[str]

    @classmethod
    def of(
        cls, comm: Communicator, stages: Mapping[int, Stage], state: Mapping[str, torch.Tensor]
    ) -> Announcement:
        """Who announces what: the first of the ranks that know; all ranks do this together.

        Args:
            comm: the connections to the others.
            stages: this process's stages by number.
            state: the buffers of the whole model by name.
        """
        here = {name for stage in stages.values() for name in stage.written}
        told: list[set[str]] = comm.all_gather_objects(here)
        known: set[str] = set().union(*told)
        changing = sorted(name for name in known if not all(name in names for names in told))
        first = {n: next(r for r, names in enumerate(told) if n in names) for n in changing}
        own = frozenset(name for name, rank in first.items() if rank == comm.rank)
        return cls({name: state[name] for name in changing}, own)

    @torch.no_grad()
    def make(self, comm: Communicator) -> None:
        """Tells and hears the new values; all ranks do this together."""
        if not self.buffers:
            return
        # The sum of one process's bytes and the others' zeros is exact, for whatever type.
        told = [
            _bytes(buffer) if name in self.own else torch.zeros_like(_bytes(buffer))
            for name, buffer in self.buffers.items()
        ]
        heard = comm.all_reduce(torch.cat(told)).split([len(one) for one in told])
        for (name, buffer), value in zip(self.buffers.items(), heard, strict=True):
            if name not in self.own:
                buffer.copy_(value.clone().view(buffer.dtype).view(buffer.shape))


class Registered:
    """A model's buffers where modules have them; a captured model goes on with the first ones."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Remembers which tensors they are."""
        self._places = [
            (f"{path}.{name}" if path else name, module._buffers, name, buffer)
            for path, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def take_over(self) -> None:
        """Copies what was assigned to a buffer's name into the buffer, which gets its name back.

        Raises:
            RaNNCError: when that cannot be copied.
        """
        for path, registry, name, buffer in self._places:
            assigned = registry.get(name)
            if assigned is buffer:
                continue
            if assigned is None or assigned.shape != buffer.shape:
                found = "nothing" if assigned is None else f"shape {list(assigned.shape)}"
                raise RaNNCError(
                    f"the buffer `{path}` has {found} now, but had shape {list(buffer.shape)} when "
                    "the model was wrapped",
                    hint="buffers keep their shapes; wrap the model after changing them",
                )
            with torch.no_grad():
                buffer.copy_(assigned)
            registry[name] = buffer


def _summed(
    comm: Communicator, parts: Sequence[torch.Tensor], ranks: list[int]
) -> list[torch.Tensor]:
    """The sums over ranks, in one message."""
    flat = comm.all_reduce(torch.cat([part.reshape(-1) for part in parts]), ranks)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _averaged(stage: Stage) -> list[str]:
    """The buffers whose copies are averaged: all but the batch norms'."""
    norms = {name for norm in stage.norms for name in norm.buffers_kept}
    return [name for name in stage.written if name not in norms]


def _seen(stage: Stage, device: torch.device) -> list[torch.Tensor]:
    return [
        norm.take_seen(stage.written[norm.buffers_kept[0]].numel(), device)
        for norm in stage.norms
        if norm.buffers_kept
    ]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _store(buffer: torch.Tensor, value: torch.Tensor) -> None:
    target = _plain(buffer)
    whole = not target.is_floating_point() and value.is_floating_point()
    target.copy_(value.round() if whole else value)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
