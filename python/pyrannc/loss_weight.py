"""What a loss that is computed outside of the model counts among the losses of all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from . import meeting
from .errors import RaNNCError

if TYPE_CHECKING:
    from .comm import Communicator


class LossWeight:
    """The weight of a process's loss in one backward, whichever calls of a model it reaches.

    Attributes:
        share: this process's share of the weights of all, while such a backward runs.
    """

    def __init__(self, comm: Communicator, loss_reduction: str) -> None:
        """No weight is known."""
        self.share: float | None = None
        self._comm = comm
        self._loss_reduction = loss_reduction
        self._next: float | None = None
        self._backward = -1

    def set(self, weight: float) -> float:
        """Has the next backward weigh this process's loss so; collective.

        Returns:
            This process's share of all weights.

        Raises:
            RaNNCError: when no process has a weight above 0, one has a negative one, or losses are
                sums.
        """
        sums = self._loss_reduction == "sum"
        own = [meeting.to_bits(weight), int(not weight >= 0 or sums)]
        told = meeting.meet(self._comm, "model.set_loss_weight(...)", own)
        total = math.fsum(meeting.from_bits(bits) for bits, _ in told)
        if total == 0 or any(refused for _, refused in told):
            found = 'with `loss_reduction="sum"`' if sums else f"{weight}"
            raise RaNNCError(
                f"the weight of a loss is {found} here and {total} in all, needed numbers of at "
                'least 0, of which one is more, and `loss_reduction="mean"`',
                hint="give the number of what this process's loss is a mean over",
            )
        self._next = weight / total
        return self._next

    def begin(self) -> None:
        """Takes note of the backward that is running; the next weight is for this one alone."""
        running = torch._C._current_graph_task_id()
        if running != self._backward:
            self._backward = running
            self.share, self._next = self._next, None
