"""Losses that a ``Trainer`` computes outside of the model, from what it returns for a batch.

Each process has the outputs of its own rows. Its summand of the loss of all rows is the sum over
these, divided by what all processes count; the summands' gradients add up to those of the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from pyrannc.errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.trainer_pt_utils import LabelSmoother


@dataclass(slots=True)
class Smoothed:
    """Stands for the trainer's smoother of labels.

    Attributes:
        plain: the trainer's.
        gather: brings the values of all processes together.
    """

    plain: LabelSmoother
    gather: Callable[[torch.Tensor], torch.Tensor]

    def __call__(
        self,
        model_output: Any,
        labels: torch.Tensor,
        shift_labels: bool = False,  # noqa: FBT001 - the trainer's
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of the rows of all processes; collective."""
        if num_items_in_batch is None:
            counted = labels[..., 1:] if shift_labels else labels
            here = counted.ne(self.plain.ignore_index).sum()
            num_items_in_batch = self.gather(here.reshape(1)).sum()
        loss = self.plain(
            model_output, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
        )
        return of_all(loss, self.gather)


@dataclass(slots=True)
class Computed:
    """Stands for a ``compute_loss_func``.

    Attributes:
        plain: the user's.
        gather: brings the values of all processes together.
    """

    plain: Callable[..., torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor]
    _checked: bool = field(default=False, init=False)

    def __call__(
        self, outputs: Any, labels: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of the rows of all processes; collective.

        Raises:
            RaNNCError: when it is no sum over the rows divided by a given number.
        """
        if num_items_in_batch is None:
            raise RaNNCError(
                "`compute_loss_func` is not told what it is a mean over, as the trainer finds no "
                "`labels` in the batch to count",
                hint="name the targets `labels`, or have the model compute its loss",
            )
        loss = self.plain(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not self._checked:
            self._check(loss, outputs, labels, num_items_in_batch)
            self._checked = True
        return of_all(loss, self.gather)

    def _check(
        self, loss: torch.Tensor, outputs: Any, labels: Any, number: torch.Tensor | int
    ) -> None:
        """Tries whether losses of rows add up, and halve when the number doubles."""
        rows, whole = labels.shape[0], loss.detach()
        with torch.no_grad():
            half = self.plain(outputs, labels, num_items_in_batch=2 * number)
            parts = [
                self.plain(*_rows((outputs, labels), rows, part), num_items_in_batch=number)
                for part in (slice(None, rows // 2), slice(rows // 2, None))
                if rows > 1
            ] or [whole]
        # Different orders of additions in bfloat16 are worth less than this, a mean half of it.
        found = (2 * float(half), math.fsum(float(part) for part in parts))
        if not all(
            math.isclose(float(whole), other, rel_tol=0.05, abs_tol=1e-6) for other in found
        ):
            raise RaNNCError(
                f"`compute_loss_func` gives {float(whole):g} for this process's {rows} rows, but "
                f"{found[1]:g} for its parts together, and {float(half):g} with "
                "`num_items_in_batch` doubled; needed a sum over rows divided by "
                "`num_items_in_batch`, so that the losses of all processes add up",
                hint="divide the sum of what all targets cost by `num_items_in_batch`, or have the "
                "model compute its loss",
            )


def of_all(share: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum of all processes' shares, with the gradient of this process's; collective."""
    total = gather(share.detach().reshape(1)).sum()
    return share + (total - share.detach())


def _rows(value: Any, rows: int, part: slice) -> Any:
    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows
        return leaf[part] if whole else leaf

    return pytree.tree_map(cut, value)
