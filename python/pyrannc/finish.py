"""The backward half of a step: where the user's autograd graph ends and the pipeline begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ._core import Slot
from ._reach import differ
from ._strides import ordered
from .errors import RaNNCError
from .guards import check_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from . import _core
    from .executor import Step
    from .runtime import Arrival, Runtime
    from .variants import Variant


Source: TypeAlias = "tuple[Finish, int]"
"""A call of a wrapped model, and the number of one of its outputs in its graph."""


@dataclass(slots=True)
class Finish:
    """The backward half of one step, run when autograd reaches it."""

    runtime: Runtime
    variant: Variant
    program: _core.Program
    step: Step
    arrival: Arrival
    sources: list[list[Source]]
    reduced: bool
    seeded_with: float
    done: bool = False
    shapes: dict[int, torch.Tensor] = field(default_factory=dict)

    def attach(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Makes ``outputs`` require gradients, with this step's backward behind them."""
        infos = self.variant.executor.values
        values = list(dict.fromkeys(self.variant.graph.outputs))
        tensors = dict(zip(self.variant.graph.outputs, outputs, strict=True))
        differentiable = [value for value in values if infos[value].requires_grad]
        if not differentiable:
            return outputs
        self.shapes = {value: tensors[value].to("meta") for value in differentiable}
        attached = _Boundary.apply(
            self,
            differentiable,
            [tensors[value] for value in differentiable],
            self.runtime._anchor,
            *inputs,
        )
        tensors.update(zip(differentiable, attached, strict=True))
        return [tensors[value] for value in self.variant.graph.outputs]

    def backward(
        self, values: list[int], given: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Runs the backward with the gradients of the outputs; returns those of the inputs.

        Args:
            values: the outputs.
            given: the gradient of each; `None` where nothing depends on it on this rank.
        """
        if torch.is_grad_enabled():
            raise RaNNCError(
                "a derivative of a gradient was asked for (`create_graph=True`), but what has run "
                "on several ranks can be differentiated only once",
                hint="compute such a penalty with a model that is not wrapped, or by finite "
                "differences",
            )
        if self.done:
            raise RaNNCError(
                "backward was called twice for one forward; "
                "its activations are gone after the first",
                hint="call the model again before the second backward, or add the losses and call "
                "backward once",
            )
        check_data(given, "the loss")
        self.done = True
        reached = self._reached(values, [seed is not None for seed in given])
        seeds = [
            self._nothing(value) if seed is None else seed
            for value, seed in zip(values, given, strict=True)
        ]
        self.runtime.loss_weight.begin()
        if self.variant.has_half:
            self.runtime.loss_scale.note(float(seeds[0]) if seeds[0].dim() == 0 else 1.0)
        scale = seeds[0] / self.seeded_with if self.program.fused else None
        if scale is None:
            for value, seed in zip(values, seeds, strict=True):
                self.step.slots[Slot.sink(value, gradient=True)] = self._weighted(value, seed)
            with self.runtime.comm.calls.event("loss.backward()"):
                self.variant.executor.run(self.program.backward(self.runtime.comm.rank), self.step)
        if self.runtime.wanted():
            for name in self.step.gradients.keys() - reached:
                del self.step.gradients[name]
            self.runtime.accumulation.prepare(
                self.step.gradients, self.variant.reduction, reduced=self.reduced
            )
            self.runtime.publish(self.step.gradients, scale, reached)
            if not self.arrival.delayed:
                self.runtime.accumulation.reduce()
        return [
            self._input_gradient(value, scale, sources)
            for value, sources in zip(self.variant.graph.inputs, self.sources, strict=True)
        ]

    def _reached(self, values: list[int], present: list[bool]) -> frozenset[str]:
        """The parameters that get a gradient when these outputs have one on any rank."""
        reached = self.variant.reached
        if differ(reached):
            flags = torch.tensor([int(here) for here in present], device=self.runtime.comm.device)
            with self.runtime.comm.guard("comparing which outputs have gradients"):
                self.runtime.comm.all_reduce(flags)
            present = [count > 0 for count in flags.tolist()]
        parts = [reached[value] for value, here in zip(values, present, strict=True) if here]
        return frozenset().union(*parts)

    def _nothing(self, value: int) -> torch.Tensor:
        """The gradient of an output on which nothing depends here."""
        return torch.zeros_like(self.shapes[value], device=self.runtime.comm.device)

    def _weighted(self, value: int, seed: torch.Tensor) -> torch.Tensor:
        """Weights by this rank's share of the rows when the user's loss is a mean over its rows."""
        share = self.share(value)
        if share == 0:  # a mean of nothing, whose gradient may be no number
            return torch.zeros_like(seed)
        dense = ordered(seed, self.variant.executor.orders[value])
        return dense if share == 1 else dense * share

    def share(self, value: int) -> float:
        """What a mean over this rank's rows counts for in the mean over all."""
        info = self.variant.executor.values[value]
        rows = self.arrival.rows[self.runtime.comm.rank]
        if info.transport != "split" or self.runtime.loss_reduction == "sum":
            return 1
        self.runtime.loss_weight.begin()
        if self.runtime.loss_weight.share is not None:
            return self.runtime.loss_weight.share
        return 1 if rows == 0 else rows / self.arrival.total

    def _input_gradient(
        self, value: int, scale: torch.Tensor | None, sources: list[Source]
    ) -> torch.Tensor | None:
        """That of the global loss, as on one device.

        But what other wrapped models gave, which will weight it as they weight all gradients of
        their outputs (see `_weighted`), is divided by that weight before.
        """
        info = self.variant.executor.values[value]
        if not info.requires_grad:
            return None
        gradient = self.variant.executor.collect(self.step, Slot.source(value, gradient=True))
        if gradient is None:
            rank = self.runtime.comm.rank
            return self.variant.executor.zeros(value, self.arrival.rows[rank])
        gradient = gradient if scale is None else gradient * scale
        shares = {finish.share(output) for finish, output in sources}
        if len(shares) > 1:
            raise RaNNCError(
                "an input was computed from outputs of several wrapped models, whose gradients "
                f"count with different weights, {sorted(shares)}, on this process",
                hint="give the models equally many rows, and call `set_loss_weight` on all of them "
                "or on none",
            )
        return gradient / (shares.pop() or 1) if shares else gradient


class _Boundary(torch.autograd.Function):
    """Where the user's autograd graph ends and the pipeline begins."""

    @staticmethod
    def forward(
        ctx: Any,
        finish: Finish,
        values: list[int],
        outputs: list[torch.Tensor],
        anchor: torch.Tensor,  # noqa: ARG004 - what makes the outputs differentiable
        *inputs: torch.Tensor,  # noqa: ARG004 - what backward answers for
    ) -> tuple[torch.Tensor, ...]:
        ctx.finish = finish
        ctx.set_materialize_grads(False)
        ctx.values = values
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *seeds: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.finish.backward(ctx.values, seeds)
        return (None, None, None, None, *gradients)


def sources_of(tensor: torch.Tensor) -> list[Source]:
    """The outputs of wrapped models that the tensor was computed from, not through another one."""
    found: list[Source] = []
    waiting = [(tensor.grad_fn, tensor.output_nr)]
    seen = set(waiting)
    while waiting:
        node, number = waiting.pop()
        if node is None:
            continue
        if type(node).__name__ == f"{_Boundary.__name__}Backward":
            boundary: Any = node
            found.append((boundary.finish, boundary.values[number]))
            continue
        following = set(node.next_functions) - seen
        seen |= following
        waiting += following
    return found
