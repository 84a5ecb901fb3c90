"""The executor: one loop over one rank's actions.

It knows no schedule. What runs, in which order, and what goes where was decided (and checked) when
the program was compiled; see ``rannc-schedule``. A tensor in assembly lies in a *slot*: a place (a
stage, or the model's inputs or outputs), a microbatch, a value and a pass.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import get_gradient_edge

from . import _slices
from ._autocast import no_autocast
from ._buckets import buckets
from ._strides import inverse, is_dense, ordered
from .batch_norm import Companions
from .buffers import BufferUpdates
from .errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.autograd.graph import GradientEdge

    from ._core import Action, Slot, ValueInfo
    from ._strides import Order
    from .comm import Communicator, Received
    from .sharding import Sharding
    from .stage import Stage, StageModule
    from .streams import Streams


@dataclass(slots=True)
class _Arriving:
    """A piece of a slot that is on its way."""

    received: Received
    rows: tuple[int, int] | None
    total: int


@dataclass(slots=True)
class _InFlight:
    """What one unit of a stage keeps of one microbatch between its forward and its backward."""

    leaves: dict[int, torch.Tensor]
    roots: dict[int, GradientEdge]  # not the tensors: what autograd does not need may go


@dataclass(slots=True)
class Step:
    """Everything that belongs to one call of the model, dropped when its backward is done.

    Attributes:
        total_rows: rows of the global batch.
        denominators: what the rewritten mean losses divide by, summed over all ranks.
        training: whether a backward may follow.
        seed: what its random numbers come from.
        numbers: among what the model is given, by their names in the graph.
        buffers: what becomes of the buffers.
        companions: who runs the same microbatch of a stage, where the stage has to know.
        slots: tensors in assembly.
        gradients: this step's gradients of the local parameters, by name.
    """

    total_rows: int
    denominators: Sequence[torch.Tensor]
    training: bool
    seed: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    buffers: BufferUpdates = field(default_factory=BufferUpdates)
    companions: Mapping[tuple[int, int], list[int]] = field(default_factory=dict)
    slots: dict[Slot, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    _owned: set[Slot] = field(default_factory=set)
    _arriving: dict[Slot, list[_Arriving]] = field(default_factory=dict)
    _in_flight: dict[tuple[int, int], list[_InFlight]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Executor:
    """Runs the actions of one rank.

    Attributes:
        comm: this rank's connections.
        stages: the stages this rank holds a replica of, by number.
        values: what is known of each tensor of the graph, by id.
        orders: how each lies in memory.
        groups: for each gradient group its ranks and the names of its parameters.
        sharding: which parameters are divided between ranks.
        streams: the random numbers of the stages.
    """

    comm: Communicator
    stages: dict[int, Stage]
    values: Sequence[ValueInfo]
    orders: Sequence[Order]
    groups: Sequence[tuple[list[int], list[str]]]
    sharding: Sharding
    streams: Streams

    def run(self, actions: Sequence[Action], step: Step) -> None:
        """Runs ``actions`` in order.

        Raises:
            ExecutionError: naming this rank and the action; the other ranks stop as well.
        """
        with self.sharding.whole():
            for action in actions:
                with self.comm.guard(action, stage=action.stage):
                    self._run(action, step)
        with self.comm.guard("waiting for the arrival of what was sent"):
            self.comm.finish_sends()

    def collect(self, step: Step, slot: Slot) -> torch.Tensor | None:
        """The tensor of one of the model's own slots once it is complete; `None` without any piece.

        Raises:
            ExecutionError: as in :meth:`run`.
        """
        with self.comm.guard(f"receiving {slot}"):
            return self._take(step, slot)

    def _run(self, action: Action, step: Step) -> None:
        match action.kind:
            case "forward":
                self._forward(action, step)
            case "backward":
                self._backward(action, step)
            case "send":
                self._send(action, step)
            case "recv":
                self._receive(action, step)
            case "copy":
                self._copy(action, step)
            case "reduce_gradients":
                self._reduce_gradients(action.group, step)
            case "reduce_output":
                self._reduce_output(action, step)
            case kind:
                raise ExecutionError(f"this version does not know the action `{kind}`")

    def _forward(self, action: Action, step: Step) -> None:
        stage = self.stages[action.stage]
        if action.rows == 0:  # other replicas gather parameters of which this rank has parts
            for unit in stage.units:
                with self.sharding.gathered(unit.parameters):
                    pass
            return
        values = {
            value: self._take_or_zeros(step, action.value_slot(value), action.rows)
            for value in stage.inputs
        }
        in_flight = []
        written = step.buffers.begin(stage)
        self._meet(action, step)
        with self._as_begun(action, step, check=True):
            for unit, needed in zip(stage.units, stage.needed, strict=True):
                with self.sharding.gathered(unit.parameters):
                    state = self._run_unit(unit, values, written, action, step)
                in_flight.append(state)
                for value in [value for value in values if value not in needed]:
                    del values[value]
        step.buffers.end(action.stage, stage, written, action.rows)
        if step.training:
            step._in_flight[action.stage, action.microbatch] = in_flight
        for value in stage.outputs:
            step.slots[action.value_slot(value)] = values[value]

    @contextlib.contextmanager
    def _as_begun(self, action: Action, step: Step, *, check: bool = False) -> Iterator[None]:
        """Has the body draw a microbatch's random numbers, and find attributes as they were.

        With `check` it has to leave in attributes what capture has told.
        """
        with (
            self.streams.of(step.seed, action.stage, action.microbatch),
            self.stages[action.stage].rewinding.of(step.seed, check=check),
        ):
            yield

    def _run_unit(
        self,
        unit: StageModule,
        values: dict[int, torch.Tensor],
        written: dict[str, torch.Tensor],
        action: Action,
        step: Step,
    ) -> _InFlight:
        inputs: dict[int, torch.Tensor] = {}
        leaves: dict[int, torch.Tensor] = {}
        for value in unit.inputs:
            tensor = values[value]
            if step.training and self.values[value].requires_grad:
                tensor = tensor.detach().requires_grad_()
                leaves[value] = tensor
            inputs[value] = tensor
        row_share = action.rows / max(step.total_rows, 1)
        with torch.set_grad_enabled(step.training):
            copies = {name: written[name] for name in unit.written}
            outputs = unit(inputs, action.rows, row_share, step.denominators, copies, step.numbers)
        values.update({value: tensor.detach() for value, tensor in outputs.items()})
        if not step.training:
            return _InFlight({}, {})
        roots = {
            value: get_gradient_edge(tensor)
            for value, tensor in outputs.items()
            if tensor.requires_grad
        }
        return _InFlight(leaves, roots)

    def _meet(self, action: Action, step: Step) -> None:
        """Tells the stage's batch norms with whom they normalise."""
        ranks = step.companions.get((action.stage, action.microbatch))
        for norm in self.stages[action.stage].norms:
            together = norm.synchronized and ranks is not None
            norm.companions = Companions(self.comm, ranks or []) if together else None

    def _backward(self, action: Action, step: Step) -> None:
        stage = self.stages[action.stage]
        if action.rows == 0:
            for unit in reversed(stage.units):
                with self.sharding.gathered(unit.parameters):
                    self._add_scattered(self.sharding.scattered(unit.parameters), {}, step)
            return
        self._meet(action, step)  # what is recomputed
        in_flight = step._in_flight.pop((action.stage, action.microbatch))
        gradients: dict[int, torch.Tensor] = {}
        for value in {value for state in in_flight for value in state.roots}:
            seed = self._take(step, action.gradient_slot(value)) if value in stage.outputs else None
            if seed is not None:
                gradients[value] = seed
        received = {value: leaf for state in in_flight for value, leaf in state.leaves.items()}
        with self._as_begun(action, step):  # what is recomputed
            for unit in reversed(stage.units):
                with self.sharding.gathered(unit.parameters):
                    self._differentiate(unit, in_flight.pop(), gradients, step)
        for value in stage.inputs:
            if value in received:
                gradient = gradients.get(value)
                leaf = received[value]
                step.slots[action.gradient_slot(value)] = (
                    torch.zeros_like(leaf) if gradient is None else gradient
                ).detach()

    def _differentiate(
        self,
        unit: StageModule,
        state: _InFlight,
        gradients: dict[int, torch.Tensor],
        step: Step,
    ) -> None:
        """Turns the gradients of a unit's outputs into those of its inputs and parameters."""
        known = [value for value in state.roots if value in gradients]
        seeds = [gradients.pop(value) for value in known]
        roots = [state.roots[value] for value in known]
        state.roots.clear()
        trained = {name: p for name, p in unit.parameters.items() if p.requires_grad}
        scattered = self.sharding.scattered(trained)
        kept = {name: p for name, p in trained.items() if name not in scattered}
        own: dict[str, torch.Tensor] = {}
        leaves = [*state.leaves.values()]
        with (
            _collecting(kept, step.gradients, seeds, leaves),
            _collecting(scattered, own, seeds, leaves),
        ):
            targets = [*leaves, *trained.values()]
            if roots and targets:
                with no_autocast():  # operators follow the types of their forwards
                    torch.autograd.backward(roots, seeds, inputs=targets)
        self._add_scattered(scattered, own, step)
        for value, leaf in state.leaves.items():
            if leaf.grad is not None:
                before = gradients.get(value)
                gradients[value] = leaf.grad if before is None else before + leaf.grad

    def _add_scattered(
        self,
        parameters: dict[str, torch.nn.Parameter],
        gradients: dict[str, torch.Tensor],
        step: Step,
    ) -> None:
        """Adds up a unit's gradients between replicas, and keeps this rank's part of the sums."""
        for name, parameter in parameters.items():
            if name not in gradients:
                gradients[name] = torch.zeros_like(parameter)
        for name, part in self.sharding.scatter(gradients).items():
            if name in step.gradients:
                step.gradients[name].add_(part)
            else:
                step.gradients[name] = part

    def _send(self, action: Action, step: Step) -> None:
        order = self.orders[action.slot.value]
        self.comm.send(self._piece(step, action).permute(order).contiguous(), action.peer)

    def _receive(self, action: Action, step: Step) -> None:
        value = self.values[action.slot.value]
        rows = (
            action.total if action.slot_rows is None else action.slot_rows[1] - action.slot_rows[0]
        )
        order = self.orders[action.slot.value]
        buffer = _slices.empty(value, rows, order, self.comm.device).permute(order)
        arriving = _Arriving(self.comm.receive(buffer, action.peer), action.slot_rows, action.total)
        step._arriving.setdefault(action.slot, []).append(arriving)

    def _copy(self, action: Action, step: Step) -> None:
        self._deposit(step, action.to_slot, self._piece(step, action), action.to_rows, action.total)

    def _piece(self, step: Step, action: Action) -> torch.Tensor:
        tensor = self._assembled(step, action.slot)
        if tensor is None:
            raise ExecutionError(f"slot `{action.slot}` is empty: the program is wrong")
        if action.release:
            self._drop(step, action.slot)
        if action.slot_rows is None:
            return tensor
        value = action.slot.value
        piece = _slices.cut_rows(tensor, self.values[value], *action.slot_rows)
        return piece if piece is tensor else ordered(piece, self.orders[value])

    def _deposit(
        self,
        step: Step,
        slot: Slot,
        piece: torch.Tensor,
        rows: tuple[int, int] | None,
        total: int,
    ) -> None:
        held = step.slots.get(slot)
        if held is None and (rows is None or rows == (0, total)):
            step.slots[slot] = piece
            return
        if slot not in step._owned:
            # What became the slot whole may still be its sender's: never add to it in place.
            value = self.values[slot.value]
            order = self.orders[slot.value]
            held = (
                _slices.zeros(value, total, order, piece.device) if held is None else held.clone()
            )
            step.slots[slot] = held
            step._owned.add(slot)
        assert held is not None
        if rows is None:
            held.add_(piece)
        else:
            _slices.add_rows(held, self.values[slot.value], *rows, piece)

    def _assembled(self, step: Step, slot: Slot) -> torch.Tensor | None:
        for piece in step._arriving.pop(slot, ()):
            received = piece.received.wait().permute(inverse(self.orders[slot.value]))
            self._deposit(step, slot, received, piece.rows, piece.total)
        return step.slots.get(slot)

    def _take(self, step: Step, slot: Slot) -> torch.Tensor | None:
        tensor = self._assembled(step, slot)
        self._drop(step, slot)
        return tensor

    def _drop(self, step: Step, slot: Slot) -> None:
        step.slots.pop(slot, None)
        step._owned.discard(slot)

    def _take_or_zeros(self, step: Step, slot: Slot, rows: int) -> torch.Tensor:
        tensor = self._take(step, slot)
        if tensor is None:  # a sum that nobody contributed to
            tensor = self.zeros(slot.value, rows)
        return tensor

    def zeros(self, value: int, rows: int) -> torch.Tensor:
        """``rows`` rows of zeros for a value."""
        return _slices.zeros(self.values[value], rows, self.orders[value], self.comm.device)

    def _reduce_gradients(self, group: int, step: Step) -> None:
        ranks, names = self.groups[group]
        parameters = {
            name: p for stage in self.stages.values() for name, p in stage.parameters.items()
        }
        for name in names:
            if name not in step.gradients:
                step.gradients[name] = torch.zeros_like(parameters[name])
        divided = {name: step.gradients[name] for name in names if name in self.sharding}
        step.gradients.update(self.sharding.scatter(divided))
        copies = [step.gradients[name] for name in names if name not in divided]
        for bucket in buckets(copies, lambda gradient: gradient):
            self._reduce_bucket(bucket, ranks)

    def _reduce_bucket(self, bucket: list[torch.Tensor], ranks: list[int]) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            self.comm.all_reduce(bucket[0], ranks)
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        self.comm.all_reduce(flat, ranks)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduce_output(self, action: Action, step: Step) -> None:
        slot = action.slot
        partial = self._assembled(step, slot)
        if partial is None:
            partial = self.zeros(slot.value, 0)
        order = self.orders[slot.value]
        total = self.comm.all_reduce(partial.permute(order).contiguous().clone())
        step.slots[slot] = total.permute(inverse(order))


@contextlib.contextmanager
def _collecting(
    parameters: dict[str, torch.nn.Parameter],
    total: dict[str, torch.Tensor],
    seeds: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
) -> Iterator[None]:
    """Has a backward in the body add each parameter's gradient to its sum as soon as it is there.

    The sums are lent to autograd as ``.grad``: so never are there two gradients of all parameters.
    Afterwards they share no memory with each other, ``seeds``, or the gradients of ``leaves``.
    """
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = total.get(name)
        yield
        others = [*seeds, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        seen = {tensor.untyped_storage().data_ptr() for tensor in others}
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name not in total:
                total[name] = gradient = _own(gradient, seen)
            seen.add(gradient.untyped_storage().data_ptr())
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]


def _own(gradient: torch.Tensor, seen: set[int]) -> torch.Tensor:
    """The gradient as a dense tensor that shares no memory with anything in ``seen``."""
    storage = gradient.untyped_storage()
    own = is_dense(gradient)
    if own and storage.nbytes() == gradient.nbytes and storage.data_ptr() not in seen:
        return gradient
    return gradient.clone()
