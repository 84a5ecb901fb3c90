"""Loss scaling with :class:`torch.amp.GradScaler`, over all ranks.

A scaler looks for overflow in the gradients of its own process, and every rank has others. Here
the method of it that looks is replaced by one that asks the other ranks, too, where the optimizer
trains a model of ours: so all ranks skip the same steps and keep the same scale, also those that
have nothing to train.

Steps that run backward before the caller has the loss need the scale beforehand, or gradients in
float16 vanish: :class:`LossScale` foretells it from the last step and the scaler.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING

import torch
from torch.amp.grad_scaler import GradScaler

from . import meeting

if TYPE_CHECKING:
    from .accumulation import Accumulation
    from .comm import Communicator

_watched: weakref.WeakValueDictionary[int, LossScale] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_torch_unscale = GradScaler._unscale_grads_  # no public place to ask the other ranks exists


class LossScale:
    """What one model's losses are scaled by before they are differentiated.

    Attributes:
        comm: the connections to the other ranks.
        accumulation: gradients that are not ready.
    """

    def __init__(
        self,
        comm: Communicator,
        accumulation: Accumulation,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Nothing is known yet."""
        self.comm = comm
        self.accumulation = accumulation
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._parameters = {id(p) for p in accumulation.parameters.values()}
        self._number = next(_numbers)  # the same on all ranks
        self._scaler: weakref.ref[GradScaler] | None = None
        self._last = 0.0
        self._scale_then = 1.0

    def watch(self) -> None:
        """Has scalers ask the other ranks about this model's gradients."""
        _watched[self._number] = self
        GradScaler._unscale_grads_ = _unscale_grads  # type: ignore[method-assign]

    def forget(self) -> None:
        """Ends :meth:`watch`."""
        _watched.pop(self._number, None)

    @property
    def expected(self) -> float:
        """The gradient that the next loss will be differentiated with; 0 while unknown."""
        return self._last * self._scale / self._scale_then

    def to_bits(self) -> int:
        """The expected gradient as a whole number that travels unchanged."""
        return meeting.to_bits(self.expected)

    @staticmethod
    def from_bits(bits: int) -> float:
        """What :meth:`to_bits` was made from."""
        return meeting.from_bits(bits)

    def note(self, seed: float) -> None:
        """Remembers with what gradient a loss was differentiated."""
        self._last = seed if math.isfinite(seed) else 0.0
        self._scale_then = self._scale

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer trains this model, on this rank or on others."""
        if self._optimizer is not None and self._optimizer() is optimizer:
            return True
        groups = optimizer.param_groups
        return any(id(p) in self._parameters for group in groups for p in group["params"])

    def agree(
        self, scaler: GradScaler, found: dict[torch.device, torch.Tensor]
    ) -> dict[torch.device, torch.Tensor]:
        """By device, whether gradients overflow on some rank; all ranks do this together."""
        self._scaler = weakref.ref(scaler)
        self._scale_then = self._scale
        here = any(float(flag) for flag in found.values())
        told = meeting.meet(self.comm, "scaler.unscale_(optimizer) or scaler.step()", [int(here)])
        overflow = torch.tensor(float(any(there for (there,) in told)))
        return {device: overflow.to(device) for device in found or (self.comm.device,)}

    @property
    def _scale(self) -> float:
        scaler = None if self._scaler is None else self._scaler()
        return 1.0 if scaler is None else scaler.get_scale()


def _unscale_grads(
    self: GradScaler,
    optimizer: torch.optim.Optimizer,
    inv_scale: torch.Tensor,
    found_inf: torch.Tensor,
    allow_fp16: bool,  # noqa: FBT001 - torch's signature
) -> dict[torch.device, torch.Tensor]:
    """Stands for the method of :class:`torch.amp.GradScaler`."""
    owners = [owner for _, owner in sorted(_watched.items()) if owner.trained_by(optimizer)]
    for owner in owners:
        owner.accumulation.refuse("scaler.unscale_()")
    found = _torch_unscale(self, optimizer, inv_scale, found_inf, allow_fp16)
    for owner in owners:
        found = owner.agree(self, found)
    return found
