"""Gradients that wait to be added up between ranks.

A backward inside of ``no_sync()`` leaves each rank its own summands: a gradient is then the sum of
``.grad`` over the ranks that hold the parameter, as within
:meth:`torch.nn.parallel.DistributedDataParallel.no_sync`. The first step outside adds up all that
accumulated, and so does ``allreduce_grads()``.

What was added up before the first such backward becomes a summand by staying on the first of its
ranks alone. Parameters that ranks divide take no part: their gradients are added up in every step,
for no rank has room for a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .errors import RaNNCError
from .executor import Step
from .meeting import meet
from .remote import local_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from . import _core
    from .comm import Communicator
    from .executor import Executor


@dataclass(frozen=True, slots=True)
class Reduction:
    """How that which steps of one kind leave is added up.

    Attributes:
        executor: runs the program.
        program: adds up the gradients of ``groups``.
        groups: ranks, and the names of parameters that exactly these hold, all of them whole.
    """

    executor: Executor
    program: _core.Program
    groups: list[tuple[list[int], list[str]]]

    @classmethod
    def of(cls, executor: Executor, placement: _core.Placement) -> Reduction:
        """That of the steps which ``executor`` runs."""
        groups = zip(placement.gradient_groups, placement.group_sharding, strict=True)
        whole = [group for group, sharding in groups if sharding == "none"]
        return cls(executor, placement.reduction(), whole)


class Accumulation:
    """The gradients of this rank that wait to be added up.

    Attributes:
        comm: the connections to the other ranks.
        parameters: the model's, by name.
        delayed_everywhere: whether all models of this process leave gradients as they are.
    """

    delayed_everywhere: ClassVar[bool] = False

    def __init__(self, comm: Communicator, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Nothing waits yet."""
        self.comm = comm
        self.parameters = parameters
        self._delayed = False
        self._waiting: Reduction | None = None

    @property
    def delays(self) -> bool:
        """Whether a step that is begun now leaves gradients as they are."""
        return self._delayed or Accumulation.delayed_everywhere

    @contextlib.contextmanager
    def delaying(self) -> Iterator[None]:
        """Has the steps begun in the body leave gradients as they are."""
        before, self._delayed = self._delayed, True
        try:
            yield
        finally:
            self._delayed = before

    @property
    def waits(self) -> bool:
        """Whether anything was left to be added up, the same on all ranks."""
        return self._waiting is not None

    def prepare(
        self, gradients: dict[str, torch.Tensor], reduction: Reduction, *, reduced: bool
    ) -> None:
        """Makes ``.grad`` and a step's gradients something that can be added on each rank.

        Args:
            gradients: the step's, by name; what must not be added here is taken out.
            reduction: how gradients of such a step are added up.
            reduced: whether these were.
        """
        if self._waiting is not None and self._waiting.groups != reduction.groups:
            self.reduce()  # what waits has no common program with what comes
        if reduced:
            for name in self._held_twice():
                gradients.pop(name, None)
            return
        if self._waiting is None:
            self._waiting = reduction
            for name in self._held_twice():
                self.parameters[name].grad = None

    def reduce(self) -> None:
        """Adds up what waits, if anything does; all ranks do this together."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or not waiting.groups:
            return
        present = self._present_anywhere([name for _, names in waiting.groups for name in names])
        groups = [
            (ranks, [name for name in names if name in present])
            for ranks, names in waiting.executor.groups
        ]
        step = Step(0, (), training=True)
        for name in present:
            gradient = local_gradient(self.parameters[name])
            if gradient is not None:
                step.gradients[name] = gradient
        executor = dataclasses.replace(waiting.executor, groups=groups)
        executor.run(waiting.program.forward(self.comm.rank), step)
        for name, gradient in step.gradients.items():
            self.parameters[name].grad = gradient

    def reduce_now(self) -> None:
        """Adds up what waits; all ranks do this together.

        Raises:
            RaNNCError: when nothing waits.
        """
        if self._waiting is None:
            raise RaNNCError(
                "`allreduce_grads()` found nothing to do: every backward has added up its "
                "gradients between the processes already",
                hint="call it after a backward inside of `no_sync()`, or after one that followed "
                "`delay_grad_allreduce(True)`",
            )
        meet(self.comm, "model.allreduce_grads()")
        self.reduce()

    def refuse(self, what: str) -> None:
        """Stops what needs the gradients of the global batch while some wait to be added up.

        Raises:
            RaNNCError: if so.
        """
        if self._waiting is None or not self._waiting.groups:
            return
        if all(parameter.grad is None for parameter in self.parameters.values()):
            return  # zero_grad() was called since
        raise RaNNCError(
            f"`{what}` needs the gradients of all processes, but backward was called with their "
            "all-reduce delayed, and what accumulated has not been added up yet",
            hint="call `allreduce_grads()` before, or the last backward outside of `no_sync()`",
        )

    def watch(self) -> None:
        """Refuses steps of optimizers while gradients wait, also those that a closure left.

        Optimizers that `RaNNCModule` was not given are looked at as well.
        """
        this = weakref.ref(self)

        def before_step(
            optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            accumulation = this()
            if accumulation is None or not accumulation._is_trained_by(optimizer):
                return None
            own, *given = args
            closure = kwargs.get("closure", given[0] if given else None)
            if closure is None:
                accumulation.refuse("optimizer.step()")
                return None

            def checked() -> Any:
                loss = closure()
                accumulation.refuse("optimizer.step()")
                return loss

            return (own,), {**kwargs, "closure": checked}

        handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, handle.remove)

    def _is_trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(parameter) for parameter in self.parameters.values()}
        groups = (group["params"] for group in optimizer.param_groups)
        return any(id(parameter) in own for group in groups for parameter in group)

    def _held_twice(self) -> list[str]:
        """The parameters whose whole gradients count on another rank than this, if any wait."""
        groups = [] if self._waiting is None else self._waiting.groups
        return [name for ranks, names in groups if self.comm.rank in ranks[1:] for name in names]

    def _present_anywhere(self, names: list[str]) -> set[str]:
        """Those of which some rank has a gradient."""
        present = torch.tensor(
            [int(local_gradient(self.parameters[name]) is not None) for name in names],
            device=self.comm.device,
        )
        with self.comm.guard("comparing which gradients accumulated"):
            self.comm.all_reduce(present)
        return {name for name, count in zip(names, present.tolist(), strict=True) if count}
