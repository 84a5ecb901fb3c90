"""What happens in one call of a deployed model: the ranks meet, their actions run, results leave.

The order of events is the same on every rank, and every phase that can fail ends with the ranks
telling each other, so that a failure anywhere stops all of them with the same message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from . import _core, hooks, streams
from ._common import CommonValues
from ._core import Slot
from ._strides import in_order
from ._structure import flatten
from ._wrapper import not_looked_into
from .capture import argument_names, batch_size, input_signature
from .changing import refuse_other_numbers
from .companions import companions
from .deployment import Deployment
from .errors import MismatchError, RaNNCError
from .executor import Step
from .finish import Finish, sources_of
from .guards import check_data
from .meeting import agree, digest, meet
from .remote import mark_gradient
from .scaling import LossScale
from .variants import Kind, Mode, Variant

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one call brought, on all ranks.

    Attributes:
        rows: rows of each rank's local batch that count.
        training: whether gradients are wanted.
        delayed: whether they are to stay as each rank has them.
        seed: what the step's random numbers come from.
        loss_scale: the gradient that the loss is expected to get; 0 while unknown.
        mode: the mode of the model, with the forms that it has on all ranks.
    """

    rows: tuple[int, ...]
    training: bool
    delayed: bool
    seed: int
    loss_scale: float
    mode: Mode

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.rows)


class Runtime(Deployment):
    """A deployed model that is called."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the model on this rank's local batch; collective.

        Returns:
            What the bare model would return for this rank's rows, with losses of the global batch.
        """
        if self.closed:
            raise RaNNCError(
                "the model was undeployed: its connections to the other ranks are closed",
                hint="call undeploy() or clear() after the last step, or wrap a model anew",
            )
        _refuse_transforms(args, kwargs)
        self.comm.begin_step()
        signature, arrival = self._arrive(args, kwargs)
        with torch.inference_mode(mode=False):  # what lasts must be usable in training
            mode = arrival.mode
            if not self.deployed:
                self._deploy(args, kwargs, signature, arrival.total)
                mode = self._mode_together()
            variant = self._variant(
                args, kwargs, Kind(signature, mode), arrival.total, with_gradients=arrival.training
            )
        given = variant.captured.flatten_inputs(args, kwargs)
        inputs = [tensor.to(self.comm.device) for tensor in given]
        numbers = variant.captured.named_numbers(self._numbers(args, kwargs))
        step = Step(
            arrival.total,
            self._denominators(variant, inputs, arrival, numbers),
            arrival.training,
            arrival.seed,
            numbers,
        )
        if variant.executor.streams.needed:
            streams.advance()
        reduce = not (arrival.delayed or self.accumulation.waits)
        scale = arrival.loss_scale if variant.has_half else 1.0
        program = variant.program(
            arrival.rows,
            gather=self.gather,
            training=arrival.training,
            reduce=reduce,
            seeded=scale > 0,
        )
        step.companions = self._companions(variant, program)
        counting = self._counting(variant, inputs)
        for value, tensor in zip(variant.graph.inputs, counting, strict=True):
            step.slots[Slot.source(value)] = in_order(tensor, variant.captured.orders[value])
        if program.fused:
            self._seed(variant, step, scale)
        variant.executor.run(program.forward(self.comm.rank), step)
        with self.comm.guard("bringing buffers together"):
            ranks = [stage.ranks for stage in variant.placement.stages]
            step.buffers.finish(self.comm, variant.executor.stages, ranks)
            variant.announcement.make(self.comm)
        outputs = self._outputs(variant, step)
        if arrival.training:
            sources = [sources_of(tensor) for tensor in given]
            finish = Finish(self, variant, program, step, arrival, sources, reduce, scale)
            outputs = finish.attach(inputs, outputs)
        variant.captured.left.apply(self.model, numbers)
        if self.gather or self.comm.rank == 0:
            variant.captured.change_arguments(args, kwargs, outputs)
        return variant.captured.unflatten_outputs(outputs)

    def _companions(
        self, variant: Variant, program: _core.Program
    ) -> dict[tuple[int, int], list[int]]:
        """Who normalises together; all ranks know of all, and are here together."""
        if not variant.talking:
            return {}
        found = variant.companions.get(id(program))
        if found is None:
            together = companions(program, self.comm.world_size, variant.talking)
            self.comm.create_groups(sorted(together.values()))
            found = (program, together)
            variant.companions.put(id(program), found)
        return found[1]

    def _arrive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Arrival]:
        """Tells the other ranks what this one was called with, and hears what they were."""
        problem: Exception | None = None
        signature, rows, mode, common = "", 0, Mode(b"", b""), CommonValues({})
        numbers: dict[str, str] = {}
        try:
            mode = self._mode()
            hooks.check_parameter_hooks(self.local_parameters())
            signature = input_signature(args, kwargs, self._changing.arguments)
            numbers = self._changing.compared(self._numbers(args, kwargs))
            tensors, paths, _ = flatten((args, kwargs))
            check_data(tensors, "an argument")
            rows = batch_size(tensors)
            common = self._common(tensors, paths, self._variants.row_inputs(signature, mode))
            self._registered.take_over()
            self.sharding.adopt()
        except Exception as error:  # raised below, after the others know
            problem = error
        training = torch.is_grad_enabled()
        delayed = training and self.accumulation.delays
        gradients = int(training) + int(delayed)
        scale = self.loss_scale.to_bits() if self.deployed else 0
        flags = [int(self.sharding.changed), common.digest, int(problem is not None)]
        told = digest(signature + str(numbers))
        header = [told, mode.digest, gradients, rows, streams.seed_now(), scale]
        headers = meet(self.comm, "model(...)", [*header, mode.form, *flags])
        if any(failed for *_, failed in headers):
            agree(self.comm, "read the model's inputs", lambda: _raise(problem))
        if any(other[:3] != headers[0][:3] for other in headers):
            refuse_other_numbers(self.comm, numbers)
            self._explain_mismatch(signature, mode, training=training, delayed=delayed)
        if any(other[8] != headers[0][8] for other in headers):
            common.refuse(self.comm, lambda paths: argument_names(self.model, paths))
        if any(other[7] for other in headers):
            with self.comm.guard("gathering sharded parameters"):
                self.sharding.gather()
        all_rows = [other[3] for other in headers]
        if not self.gather:
            all_rows = [all_rows[0], *([0] * (self.comm.world_size - 1))]
        if sum(all_rows) == 0:
            raise RaNNCError("the batch has no rows on any rank; a step needs at least one")
        seed, scale = headers[0][4:6]
        loss_scale = LossScale.from_bits(scale)
        mode = mode.together([other[6] for other in headers])
        return signature, Arrival(tuple(all_rows), training, delayed, seed, loss_scale, mode)

    def _explain_mismatch(
        self, signature: str, mode: Mode, *, training: bool, delayed: bool
    ) -> None:
        grad = "with gradients" if training else "without gradients"
        if delayed:
            grad += ", their all-reduce delayed"
        told = self.comm.all_gather_objects(f"{signature} ({mode.describe(self.model)}, {grad})")
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(told))
        raise MismatchError(
            "the ranks were called with different inputs; all must agree in everything but the "
            f"number of rows in the batch:{lines}",
            hint="pad or truncate so that every rank's tensors differ only in their first "
            "dimension, and switch train()/eval(), requires_grad, no_grad() and no_sync() on all "
            "ranks together",
        )

    def _counting(self, variant: Variant, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the stages compute with: all of rank 0's where only that counts.

        Rows of other ranks are never asked for.
        """
        detached = [tensor.detach() for tensor in inputs]
        if self.gather:
            return detached
        with self.comm.guard("sending rank 0's inputs without rows"):
            return [
                tensor
                if index in variant.captured.batch_inputs
                else self.comm.broadcast(tensor.clone(memory_format=torch.contiguous_format), 0)
                for index, tensor in enumerate(detached)
            ]

    def _denominators(
        self,
        variant: Variant,
        inputs: Sequence[torch.Tensor],
        arrival: Arrival,
        numbers: Mapping[str, float],
    ) -> list[torch.Tensor]:
        counts = variant.captured.denominators
        if not counts:
            return []
        if arrival.rows[self.comm.rank] > 0:
            local = torch.stack(
                [count(inputs, numbers).to(torch.float64).reshape(()) for count in counts]
            )
        else:
            local = torch.zeros(len(counts), dtype=torch.float64, device=self.comm.device)
        with self.comm.guard("adding up the denominators of the loss"):
            return list(self.comm.all_reduce(local).unbind())

    def _seed(self, variant: Variant, step: Step, scale: float) -> None:
        for value in set(variant.graph.outputs):
            info = variant.executor.values[value]
            if info.requires_grad:
                seed = torch.full(info.shape(0), scale, dtype=getattr(torch, info.dtype))
                step.slots[Slot.sink(value, gradient=True)] = seed.to(self.comm.device)

    def _outputs(self, variant: Variant, step: Step) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        inputs = set(variant.graph.inputs)
        for value in set(variant.graph.outputs):
            tensor = variant.executor.collect(step, Slot.sink(value))
            if tensor is None:
                tensor = variant.executor.zeros(value, 0)
            found[value] = tensor.clone() if value in inputs else tensor
        return [found[value] for value in variant.graph.outputs]

    def wanted(self) -> bool:
        """Whether the backward that is running is to leave gradients of parameters."""
        edge = torch.autograd.graph.get_gradient_edge(self._anchor)
        return torch._C._will_engine_execute_node(edge.node)

    def publish(
        self,
        gradients: dict[str, torch.Tensor],
        scale: torch.Tensor | None,
        reached: Collection[str],
    ) -> None:
        """Moves a step's gradients to ``.grad``, as a backward of the bare model would.

        Args:
            gradients: those that this rank has, by name.
            scale: what to multiply them with, if anything.
            reached: the parameters that get a gradient on some rank.
        """
        for name in self._remote.keys() & reached:
            mark_gradient(self._remote[name])
        for name in list(gradients):
            parameter, gradient = self.parameters[name], gradients.pop(name)
            if scale is not None:
                gradient.mul_(scale)
            if gradient.numel() == 0 and name in self.sharding:
                continue  # other replicas train all of it
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)


def _refuse_transforms(*arguments: Any) -> None:
    """Says what cannot see through the pipeline, before it does something else silently."""
    transform = None
    if torch._C._get_tracing_state() is not None:
        transform = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        transform = "torch.export"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        transform = "torch.func"
    elif any(isinstance(leaf, torch.fx.Proxy) for leaf in pytree.tree_leaves(arguments)):
        transform = "torch.fx"
    if transform is not None:
        raise not_looked_into(transform)


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem
