"""The norm of all gradients, over stages, replicas and parts of parameters.

Every entry counts once, on the first rank that keeps it. The norm is that of the ranks' own norms,
in the same order everywhere, so all ranks get the same bits and clip alike.

:func:`torch.nn.utils.clip_grad_norm_` sees this rank's parameters only. Where other ranks have
more, the function in it that adds up norms is replaced by one that recognises this model's
gradients and asks the other ranks, too, inside of the wrapper that a script may have imported.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grad

from . import meeting
from .errors import RaNNCError
from .remote import RemoteParameter, local_gradient

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .accumulation import Accumulation
    from .comm import Communicator
    from .state import Holders

logger = logging.getLogger(__name__)

_watched: weakref.WeakSet[GradientNorm] = weakref.WeakSet()
_torch_wrapper: Any = getattr(clip_grad, "_get_total_norm", None)
_torch_total_norm: Any = inspect.unwrap(_torch_wrapper) if _torch_wrapper else None


class GradientNorm:
    """The norm of one model's gradients.

    Attributes:
        comm: the connections to the other ranks.
        parameters: the model's, by name, the same names on every rank.
        holders: who keeps what.
        accumulation: gradients that are not ready.
    """

    def __init__(
        self,
        comm: Communicator,
        parameters: Mapping[str, torch.nn.Parameter],
        holders: Holders,
        accumulation: Accumulation,
    ) -> None:
        """Nothing is computed yet."""
        self.comm = comm
        self.parameters = parameters
        self.holders = holders
        self.accumulation = accumulation

    def total(
        self,
        norm_type: float = 2.0,
        *,
        error_if_nonfinite: bool = False,
        names: Iterable[str] | None = None,
        incomplete: bool = False,
    ) -> torch.Tensor:
        """The norm of the gradients as one vector, the same on every rank; collective.

        Args:
            norm_type: the order of the norm, positive or infinite.
            error_if_nonfinite: whether a norm that is no finite number is an error.
            names: of which parameters; by default of all.
            incomplete: whether this rank was asked about some of its gradients only.

        Raises:
            RaNNCError: for another order, while gradients wait to be added up, or when a rank was
                asked about some of its gradients only.
            RuntimeError: as :func:`torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`.
        """
        order = _order(norm_type)
        self.accumulation.refuse("the norm of the gradients")
        chosen = self._names(names)
        own = _norm([self._counted(name) for name in chosen], order)
        call = f"clip_grad_norm or calc_grad_norm, of order {order:g}, of {len(chosen)} parameters"
        told = meeting.meet(self.comm, call, [meeting.to_bits(own), int(incomplete)])
        _refuse_incomplete([flag for _, flag in told])
        norms = torch.tensor([meeting.from_bits(bits) for bits, _ in told], dtype=torch.float64)
        norm: torch.Tensor = torch.linalg.vector_norm(norms, order)
        norm = norm.to(self.comm.device, self._dtype())
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order {order} of the gradients is {norm.item()}, so they "
                "cannot be clipped; to scale them by it anyway, set `error_if_nonfinite=False`"
            )
        return norm

    def clip(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        *,
        error_if_nonfinite: bool = False,
        names: Iterable[str] | None = None,
    ) -> torch.Tensor:
        """Scales the gradients down to a norm of ``max_norm``; returns what it was; collective.

        Raises:
            RaNNCError: as :meth:`total`.
            RuntimeError: as :meth:`total`.
        """
        chosen = self._names(names)
        norm = self.total(norm_type, error_if_nonfinite=error_if_nonfinite, names=chosen)
        parameters = [self.parameters[name] for name in chosen if self.holders.is_local(name)]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def watch(self) -> None:
        """Has PyTorch's own functions ask the other ranks about this model's gradients."""
        if self.comm.world_size == 1:
            return
        if not _stand_in():
            logger.warning(
                "torch.nn.utils of this version of PyTorch, %s, sees this process's gradients "
                "only: clip with `model.clip_grad_norm(...)`",
                torch.__version__,
            )
        _watched.add(self)

    def forget(self) -> None:
        """Ends :meth:`watch`."""
        _watched.discard(self)

    def gradients(self, *, remote: bool) -> set[int]:
        """The identities of this rank's gradients, or of those that others have."""
        return {
            id(p.grad)
            for p in self.parameters.values()
            if p.grad is not None and isinstance(p, RemoteParameter) == remote
        }

    def has_any(self, identities: set[int]) -> bool:
        """Whether gradients of this model are among tensors."""
        return bool(identities & self._all_gradients())

    def has_only(self, identities: set[int]) -> bool:
        """Whether tensors are all gradients of this model."""
        return identities <= self._all_gradients()

    def has_all(self, identities: set[int]) -> bool:
        """Whether all gradients of this rank are there, and all of the others or none of them."""
        here = self.gradients(remote=False)
        return here <= identities and identities - here in (set(), self.gradients(remote=True))

    def _all_gradients(self) -> set[int]:
        return self.gradients(remote=False) | self.gradients(remote=True)

    def _names(self, names: Iterable[str] | None) -> list[str]:
        return list(self.parameters if names is None else names)

    def _counted(self, name: str) -> torch.Tensor | None:
        """What this rank counts of a gradient."""
        parameter = self.parameters[name]
        gradient = local_gradient(parameter)
        if gradient is None or gradient.numel() == 0:
            return None
        numel = self.holders.shape(name, parameter).numel()
        pieces = self.holders.pieces(name, numel)
        first = any(piece.ranks[0] == self.comm.rank for piece in pieces)
        return gradient if first else None

    @property
    def is_local(self) -> bool:
        """Whether every rank has all gradients whole, so that none needs to ask another."""
        return self.holders.are_all_everywhere

    def _dtype(self) -> torch.dtype:
        wide = torch.float32
        for parameter in self.parameters.values():
            wide = torch.promote_types(wide, parameter.dtype)
        return wide.to_real()


def _order(norm_type: float) -> float:
    order = float(norm_type)
    if math.isnan(order) or order <= 0:
        raise RaNNCError(
            f"`norm_type` is {norm_type}, needed a positive number or infinity",
            hint="the usual one is 2",
        )
    return order


def _norm(gradients: Sequence[torch.Tensor | None], order: float) -> float:
    norms = [
        torch.linalg.vector_norm(gradient, order, dtype=_at_least_single(gradient.dtype))
        for gradient in gradients
        if gradient is not None
    ]
    if not norms:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([n.double() for n in norms]), order))


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _refuse_incomplete(flags: Sequence[int]) -> None:
    ranks = [rank for rank, flag in enumerate(flags) if flag]
    if ranks:
        raise RaNNCError(
            "PyTorch was asked for the norm of some of the model's gradients only, on rank "
            f"{ranks[0]}; which gradients of other processes belong to these cannot be told",
            hint="pass all of `model.parameters()`, or call "
            "`model.clip_grad_norm(max_norm, parameters=...)` on all processes",
        )


def _stand_in() -> bool:
    """Has PyTorch's wrapper, whoever imported it by whichever name, call :func:`_total_norm`."""
    for cell in getattr(_torch_wrapper, "__closure__", None) or ():
        if cell.cell_contents in (_torch_total_norm, _total_norm):
            cell.cell_contents = _total_norm
            return True
    return False


def _total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,  # noqa: FBT001 - torch's signature
    foreach: bool | None = None,  # noqa: FBT001 - torch's signature
) -> torch.Tensor:
    """Stands for :func:`torch.nn.utils.get_total_norm`."""
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    owner = _owner(given)
    if owner is None:
        norm: Any = _torch_total_norm(given, norm_type, error_if_nonfinite, foreach)
        return norm  # type: ignore[no-any-return]
    incomplete = not owner.has_all({id(tensor) for tensor in given})
    return owner.total(norm_type, error_if_nonfinite=error_if_nonfinite, incomplete=incomplete)


def _owner(given: Sequence[torch.Tensor]) -> GradientNorm | None:
    """The model whose gradients these are, if other ranks have more of them."""
    identities = {id(tensor) for tensor in given}
    if not identities:
        return _owner_without_gradients()
    known = [norm for norm in _watched if norm.has_any(identities)]
    for norm in known:
        norm.accumulation.refuse("the norm of the gradients")
    owners = [norm for norm in known if not norm.is_local]
    if not owners:
        return None
    if len(owners) > 1 or not owners[0].has_only(identities):
        raise RaNNCError(
            "PyTorch was asked for the norm of the gradients of several models together",
            hint="call `clip_grad_norm()` of each model",
        )
    return owners[0]


def _owner_without_gradients() -> GradientNorm | None:
    """A rank that has nothing to train is asked about nothing, but the others wait for it."""
    owners = [norm for norm in _watched if not (norm.is_local or norm.gradients(remote=False))]
    if len(owners) > 1:
        raise RaNNCError(
            "PyTorch was asked for the norm of no gradients, and several models have none here",
            hint="call `clip_grad_norm()` of each model",
        )
    return owners[0] if owners else None
