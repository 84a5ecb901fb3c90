"""Batch norm of a batch that is computed in parts.

Each part is normalised with its own statistics, as in every pipeline, and `nn.SyncBatchNorm` with
those of all replicas' rows of a microbatch. The running statistics are those of the whole batch in
both: what the parts saw is added up and enters them once a step (as `DeferredBatchNorm` of
torchgpipe does, Kim et al. 2020), so they do not depend on how the batch was divided.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from ._flat import Scope, Scoped, attribute, operator_of, positional, state_name
from .errors import RaNNCError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .comm import Communicator

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Companions:
    """The replicas that run the same microbatch, this one included."""

    comm: Communicator
    ranks: list[int]


class PartNorm(torch.nn.Module):
    """A batch norm in training mode that sees parts of the batch one after another.

    Attributes:
        synchronized: whether it normalises over the rows of all replicas.
        buffers_kept: names of the running mean and variance; empty if it keeps none.
        momentum: how much of them a step replaces.
        companions: with whom it normalises; set before each call.
        seen: count of entries per channel, their sum and sum of squares in this step, in one
            dimension; `None` before the first part.
        again: whether it sees a part for a second time.
    """

    def __init__(
        self,
        scope: Scope | None,
        buffers_kept: tuple[str, ...],
        momentum: float,
        *,
        synchronized: bool,
    ) -> None:
        super().__init__()
        self.synchronized = synchronized
        self.buffers_kept = buffers_kept
        self.momentum = momentum
        self.companions: Companions | None = None
        self.seen: torch.Tensor | None = None
        self.again = False
        self._plain = Scoped(aten.batch_norm.default, scope or Scope())

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,  # noqa: FBT001 - the operator's arguments
        momentum: float,
        eps: float,
        cudnn: bool,  # noqa: FBT001
    ) -> Any:
        """The operator `aten.batch_norm`, in training."""
        count, shape = x.numel() // x.shape[1], (x.shape[1],)
        if self.companions is not None and len(self.companions.ranks) > 1:
            weight = x.new_ones(shape) if weight is None else weight
            bias = x.new_zeros(shape) if bias is None else bias
            result, mean, variance = _Synchronized.apply(x, weight, bias, eps, self.companions)
        elif running_mean is None:
            return self._plain(x, weight, bias, None, None, training, momentum, eps, cudnn)
        else:
            mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_mean)
            result = self._plain(x, weight, bias, mean, variance, training, 1.0, eps, cudnn)
            # The operator gives the unbiased variance, which one entry does not have.
            variance = variance * ((count - 1) / count) if count > 1 else torch.zeros_like(mean)
        if running_mean is not None and running_var is not None:
            self._note(count, mean, variance)
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(variance.to(running_var.dtype), momentum)
        return result

    @torch.no_grad()
    def _note(self, count: int, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if self.again:
            return
        mean, variance = mean.double(), variance.double()
        entries = torch.cat(
            [mean.new_full((1,), count), count * mean, count * (variance + mean.square())]
        )
        self.seen = entries if self.seen is None else self.seen + entries

    def take_seen(self, channels: int, device: torch.device) -> torch.Tensor:
        """What the parts saw, which is forgotten; zeros without any part."""
        seen, self.seen = self.seen, None
        if seen is None:
            return torch.zeros(1 + 2 * channels, dtype=torch.float64, device=device)
        return seen

    @torch.no_grad()
    def update(self, seen: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Has the running statistics take in those of a whole batch, as one device would."""
        channels = mean.numel()
        count, total, squares = seen.split([1, channels, channels])
        if count.item() == 0:
            return
        batch_mean = total / count
        biased = (squares / count - batch_mean.square()).clamp(min=0)
        unbiased = biased * (count / (count - 1).clamp(min=1))
        mean.mul_(1 - self.momentum).add_(batch_mean.to(mean.dtype), alpha=self.momentum)
        variance.mul_(1 - self.momentum).add_(unbiased.to(variance.dtype), alpha=self.momentum)


class _Synchronized(torch.autograd.Function):
    """Normalises over the rows of several processes (Zhang et al. 2018, section 3.2).

    The forward tells the others count, mean and variance of the own rows, the backward the sums of
    the gradient and of the gradient times the normalised input. Gives the result, and mean and
    biased variance of the own rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        companions: Companions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(wide, dims, correction=0)
        own = torch.cat([mean.new_full((1,), count).double(), mean.double(), variance.double()])
        told = companions.comm.all_gather_into(own, companions.ranks)
        told = told.view(len(companions.ranks), -1)
        counts, means, variances = told.split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        all_mean = (counts * means).sum(0) / total
        spread = (counts * (variances + (means - all_mean).square())).sum(0) / total
        scale = (spread + eps).rsqrt().to(wide.dtype)
        normalised = (wide - _along(all_mean.to(wide.dtype), x)) * _along(scale, x)
        ctx.companions, ctx.total, ctx.dims = companions, total, dims
        ctx.save_for_backward(normalised, weight, scale)
        ctx.mark_non_differentiable(mean, variance)
        result = normalised * _along(weight, x) + _along(bias, x)
        return result.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *seeds: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalised, weight, scale = ctx.saved_tensors
        seed = seeds[0].to(normalised.dtype)
        own = torch.stack([seed.sum(ctx.dims), (seed * normalised).sum(ctx.dims)])
        sums = own.to(torch.float64, copy=True)
        sums = ctx.companions.comm.all_reduce(sums, ctx.companions.ranks) / ctx.total
        first, second = (_along(part, seed) for part in sums.to(seed.dtype))
        gradient = (seed - first - normalised * second) * _along(weight * scale, seed)
        return gradient.to(seeds[0].dtype), own[1].to(weight), own[0].to(weight), None, None


def _along(channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return channels.view(1, -1, *(1 for _ in x.shape[2:]))


def place_part_norms(module: fx.GraphModule, model: torch.nn.Module) -> None:
    """Makes every batch norm of a flat graph that is in training mode one of parts."""
    modules = dict(model.named_modules())
    for index, node in enumerate(list(module.graph.nodes)):
        what = operator_of(node)
        if what is None or what.packet != "aten.batch_norm" or not positional(node)[5]:
            continue
        args = positional(node)
        owner = modules.get(what.module)
        running = [arg for arg in args[3:5] if isinstance(arg, fx.Node) and arg.op == "get_attr"]
        norm = PartNorm(
            what.scope,
            tuple(state_name(arg) for arg in running) if len(running) == 2 else (),
            args[6],
            synchronized=isinstance(owner, torch.nn.SyncBatchNorm),
        )
        name = f"_part_norm_{index}"
        module.add_submodule(name, norm)
        node.op, node.target = "call_module", name
    module.recompile()


def norms_of(module: torch.nn.Module) -> list[PartNorm]:
    """The batch norms of a part of a model, in the order in which they run."""
    if not isinstance(module, fx.GraphModule):
        return [norm for child in module.children() for norm in norms_of(child)]
    called = [node for node in module.graph.nodes if node.op == "call_module"]
    found: list[PartNorm] = []
    for node in called:
        child = attribute(module, node)
        found += [child] if isinstance(child, PartNorm) else norms_of(child)
    return found


def companions_of(norms: Iterable[PartNorm]) -> list[Companions | None]:
    """With whom batch norms normalise now."""
    return [norm.companions for norm in norms]


@contextlib.contextmanager
def recomputing(
    norms: Sequence[PartNorm], companions: Sequence[Companions | None]
) -> Iterator[None]:
    """Has batch norms see a part again in the body, which does not count twice.

    Args:
        norms: the batch norms.
        companions: with whom each had normalised that part; others may have followed since.
    """
    before = companions_of(norms)
    for norm, theirs in zip(norms, companions, strict=True):
        norm.again, norm.companions = True, theirs
    try:
        yield
    finally:
        for norm, theirs in zip(norms, before, strict=True):
            norm.again, norm.companions = False, theirs


def check_groups(model: torch.nn.Module) -> None:
    """Looks over which processes batch norms are to be synchronised.

    Raises:
        RaNNCError: when it is some processes only.
    """
    for name, norm in model.named_modules():
        group = norm.process_group if isinstance(norm, torch.nn.SyncBatchNorm) else None
        if group is None:
            continue
        member = isinstance(group, dist.ProcessGroup)  # else what `new_group` gives to the others
        ranks = dist.get_process_group_ranks(group) if member else []
        if len(ranks) < dist.get_world_size():
            found = f"ranks {ranks}" if member else "ranks without this one"
            raise RaNNCError(
                f"the synchronised batch norm `{name}` has a `process_group` of {found}, but it "
                "can only normalise over all rows of a microbatch: the plan decides which ranks "
                "have them",
                hint="leave `process_group` out, also of `SyncBatchNorm.convert_sync_batchnorm`; "
                "to normalise over fewer rows use `nn.BatchNorm`, which does so per replica",
            )


@contextlib.contextmanager
def capturable_norms() -> Iterator[None]:
    """Has `nn.SyncBatchNorm` be captured as a batch norm; it refuses CPUs and is opaque else."""
    forward = torch.nn.SyncBatchNorm.forward
    torch.nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]
