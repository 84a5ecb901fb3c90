"""The one line: :class:`RaNNCModule` wraps a model, and training goes on as it was."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import _core, model_state
from ._stated import reductions_of
from ._wrapper import Wrapper, check_arguments, check_placement, refuse_jit
from .accumulation import Accumulation
from .comm import ensure_process_group, get_rank, get_world_size
from .config import Config
from .errors import DeploymentError, RaNNCError
from .meeting import meet
from .runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from os import PathLike

_LOSS_REDUCTIONS = ("mean", "sum")
# In the order in which they were made, which all processes share.
_live: weakref.WeakKeyDictionary[RaNNCModule, None] = weakref.WeakKeyDictionary()


class RaNNCModule(Wrapper):
    """A model that trains over all processes as the bare model would on one.

    The first call captures the model, plans how to split it, and moves each part to its processes;
    calls must therefore happen on all processes together. Each process passes its own local batch
    and gets its own rows back; a scalar loss is that of the global batch on every process.

    Args:
        model: any model that PyTorch can run. Its parameters must be equal on all processes or will
            be made so: those of rank 0 count.
        optimizer: the optimizer of its parameters; afterwards it keeps those of this process.
        gather_inputs: whether the global batch is all local batches together (``True``), or rank
            0's alone, whose outputs every process then gets (``False``).
        load_deployment: a file of :meth:`save_deployment` to use instead of planning.
        loss_reduction: how a loss that you compute *outside* the model reduces over rows.
            ``"mean"``: the gradients you pass to the outputs are weighted by this process's share
            of the rows, as in ``DistributedDataParallel``. ``"sum"``: they are taken as they are.
        output_reduction: how results that the model reduces over the batch do so where the analysis
            of the captured graph cannot tell, such as a balance of experts in the loss: ``"mean"``
            or ``"sum"`` over rows of what the model gives for each microbatch. For all such
            results, or by their keys, fields or positions in what the model returns.
        enable_zero: whether the replicas of a stage divide the optimizer's state among themselves,
            on every stage that has several; what they divide beyond that, see `sharding` in the
            settings. The parameters that this process holds are then parts of one dimension.
        check_unused_values: whether parameters and tensor arguments that the model's forward does
            not use are an error at the first call. By default they are left alone, as by the bare
            model: such parameters stay as they are on every process, and in all states.
        config: settings; by default those of ``rannc_conf.toml`` and the ``RANNC_*`` variables.

    Raises:
        ConfigurationError: for a setting that is not valid.
        RaNNCError: for an argument that is not valid.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        gather_inputs: bool = True,  # noqa: FBT001 - the original's signature
        load_deployment: str | PathLike[str] | None = None,
        *,
        loss_reduction: str = "mean",
        output_reduction: Mapping[str | int, str] | str | None = None,
        enable_zero: bool = False,
        check_unused_values: bool = False,
        config: Config | None = None,
    ) -> None:
        """Wraps ``model``; nothing is planned before the first call."""
        super().__init__()
        check_arguments(model, optimizer, [other.model for other in _live])
        if loss_reduction not in _LOSS_REDUCTIONS:
            raise RaNNCError(f'`loss_reduction` is {loss_reduction!r}, needed "mean" or "sum"')
        self.model = model
        self._runtime = Runtime(
            model,
            optimizer,
            gather_inputs=gather_inputs,
            load_deployment=None if load_deployment is None else str(load_deployment),
            loss_reduction=loss_reduction,
            output_reduction=reductions_of(output_reduction),
            enable_zero=enable_zero,
            check_unused_values=check_unused_values,
            config=config or Config.load(),
        )
        # What runs on several ranks is not the compiler's; capture needs its package anyway.
        self._call = torch.compiler.disable(
            self._runtime.call,
            reason="a RaNNCModule runs on several ranks; to export a model, take the bare one",
        )
        _live[self] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on this process's batch; collective, planning at the first call."""
        return self._call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped model, where this class has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_runtime"):
                raise
            return getattr(self.model, name)

    def _apply(self, fn: Any, recurse: bool = True) -> RaNNCModule:  # noqa: FBT001 - torch's signature
        """Moves and converts before the first call; afterwards parameters stay where they are.

        Raises:
            RaNNCError: for a conversion to another type after the first call.
        """
        if not self._runtime.deployed:
            self.model._apply(fn, recurse)  # what nn.Module does for its children
            return self
        check_placement(fn, self._runtime.parameters.values())
        return self

    @property
    def deployment(self) -> _core.Plan:
        """The plan in force; ``str()`` of it is a report for people.

        Raises:
            RaNNCError: before the first call.
        """
        self._needs_deployment("deployment")
        return self._runtime.plan

    def named_parameters(
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001 - torch's signature
        remove_duplicate: bool = True,  # noqa: FBT001 - torch's signature
        *,
        from_global: bool = True,
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names, as in the bare model, and all parameters.

        Those that other processes hold have shape, type and ``requires_grad``. What writes into
        them is left to the processes that hold them; what reads their values, or those of their
        gradients, is an error: :meth:`get_param`, :meth:`get_param_grad` and
        :meth:`calc_grad_norm` bring them.

        Args:
            prefix: put before each name.
            recurse: as in ``nn.Module``.
            remove_duplicate: as in ``nn.Module``.
            from_global: ``False`` for the parameters that this process holds.
        """
        local = {id(p) for p in self._runtime.local_parameters().values()}
        for name, parameter in self.model.named_parameters(prefix, recurse, remove_duplicate):
            if from_global or id(parameter) in local:
                yield name, parameter

    def parameters(
        self,
        recurse: bool = True,  # noqa: FBT001 - torch's signature
        *,
        from_global: bool = True,
    ) -> Iterator[torch.nn.Parameter]:
        """All parameters, or those that this process holds; see :meth:`named_parameters`."""
        for _, parameter in self.named_parameters(recurse=recurse, from_global=from_global):
            yield parameter

    def named_buffers(
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001 - torch's signature
        remove_duplicate: bool = True,  # noqa: FBT001 - torch's signature
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names, as in the bare model, and buffers."""
        yield from self.model.named_buffers(prefix, recurse, remove_duplicate)

    def get_param(self, name: str) -> torch.Tensor:
        """A copy of one full parameter on every process; collective.

        Raises:
            RaNNCError: when the model has no parameter of that name.
        """
        parameter = self._parameter(name)
        if not self._runtime.deployed:
            return parameter.detach().clone()
        meet(self._runtime.comm, f"model.get_param({name!r})")
        full = self._runtime.holders.everywhere(self._canonical(name), parameter, parameter)
        assert full is not None
        return full

    def get_param_grad(self, name: str) -> torch.Tensor | None:
        """A copy of one parameter's full gradient on every process, if it has one; collective.

        Raises:
            RaNNCError: when the model has no parameter of that name, or while gradients wait to be
                added up, see :meth:`no_sync`.
        """
        parameter = self._parameter(name)
        self._runtime.accumulation.refuse("get_param_grad()")
        if not self._runtime.deployed:
            return None if parameter.grad is None else parameter.grad.detach().clone()
        meet(self._runtime.comm, f"model.get_param_grad({name!r})")
        return self._runtime.holders.everywhere(self._canonical(name), parameter.grad, parameter)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Has backwards of calls in the body accumulate without adding up between processes.

        As :meth:`torch.nn.parallel.DistributedDataParallel.no_sync`: the first call and backward
        after it add up all that accumulated, and so does :meth:`allreduce_grads`. Until then
        ``.grad`` is this process's summand. All processes must enter it for the same calls.
        """
        with self._runtime.accumulation.delaying():
            yield

    def allreduce_grads(self) -> None:
        """Adds up what accumulated in :meth:`no_sync` or delayed; collective.

        Raises:
            RaNNCError: when nothing accumulated so.
        """
        self._runtime.accumulation.reduce_now()

    def calc_grad_norm(
        self, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """The norm of all gradients as one vector, the same on every process; collective.

        Args:
            norm_type: the order of the norm, positive or infinite.
            error_if_nonfinite: whether a norm that is no finite number is an error.

        Raises:
            RaNNCError: for another order, or while gradients wait to be added up, see
                :meth:`no_sync`.
            RuntimeError: as :func:`torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`.
        """
        self._needs_deployment("calc_grad_norm")
        return self._runtime.norm.total(norm_type, error_if_nonfinite=error_if_nonfinite)

    def clip_grad_norm(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,  # noqa: FBT001 - torch's signature
        *,
        parameters: Iterable[torch.nn.Parameter] | None = None,
    ) -> torch.Tensor:
        """Scales all gradients down to a norm of ``max_norm``, if theirs is larger; collective.

        What :func:`torch.nn.utils.clip_grad_norm_` does with the whole model on one device.

        Args:
            max_norm: the largest norm.
            norm_type: the order of the norm, positive or infinite.
            error_if_nonfinite: whether a norm that is no finite number is an error.
            parameters: some of the bare model's parameters, the same on every process; by default
                all.

        Returns:
            The norm before, the same on every process.

        Raises:
            RaNNCError: as :meth:`calc_grad_norm`, or for parameters that are not the model's.
            RuntimeError: as :func:`torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`.
        """
        self._needs_deployment("clip_grad_norm")
        return self._runtime.norm.clip(
            max_norm,
            norm_type,
            error_if_nonfinite=error_if_nonfinite,
            names=None if parameters is None else self._names_of(parameters),
        )

    clip_grad_norm_ = clip_grad_norm

    def state_dict(  # type: ignore[override]  # torch's are overloads
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """All parameters and persistent buffers by their names in the bare model; collective.

        Returns:
            Full tensors on the CPU on rank 0, an empty dictionary on the others; before the first
            call, what the bare model returns.
        """
        runtime = self._runtime
        if not runtime.deployed:
            return self.model.state_dict(*args, **kwargs)
        meet(runtime.comm, "model.state_dict()")
        with runtime.comm.guard("gathering the model's state"):
            return model_state.gather(
                self.model, runtime.holders, runtime.tensors(), runtime.sharding, args, kwargs
            )

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001 - torch's signature
        assign: bool = False,  # noqa: FBT001 - torch's signature
    ) -> Any:
        """Takes this process's part of a full state by the names of the bare model; collective.

        Every process passes the full state, or rank 0 does and others an empty dictionary, such as
        :meth:`state_dict` gives them. Before the first call it is the bare model's, and what rank 0
        has at the first call counts. ``assign`` works only then.

        Raises:
            RuntimeError: when a shape differs, or names do not match and ``strict`` is set, as in
                ``nn.Module``, and the same on all processes; nothing is changed then.
            RaNNCError: for ``assign`` after the first call.
        """
        if not self._runtime.deployed:
            if not state_dict and self._runtime.comm.rank != 0:
                strict = False  # rank 0's counts
            return self.model.load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:
            raise RaNNCError(
                "`assign=True` would replace parameters that are already placed; leave it out"
            )
        runtime = self._runtime
        return model_state.load(
            self.model,
            runtime.holders,
            runtime.tensors(),
            runtime.sharding,
            state_dict,
            strict=strict,
        )

    def save_deployment(self, path: str | PathLike[str]) -> None:
        """Writes the plan as JSON; rank 0 writes, the others wait.

        Raises:
            DeploymentError: when the file cannot be written.
        """
        self._needs_deployment("save_deployment")
        problem = None
        if self._runtime.comm.rank == 0:
            try:
                self._runtime.plan.save(str(path))
            except DeploymentError as error:
                problem = error
        problem = self._runtime.comm.broadcast_object(problem)
        if problem is not None:
            raise problem

    def set_loss_weight(self, weight: float | torch.Tensor) -> float:
        """Says what this process's loss is a mean over, before its backward; collective.

        A loss computed outside of the model that is a mean over something else than rows (targets
        that are not ignored, unmasked tokens, summed class weights) counts with this weight among
        the losses of all processes, in the next backward only, for all calls that it reaches.

        Args:
            weight: how many this process's loss averages over, at least 0: a number or a tensor
                of one element.

        Returns:
            This process's share of all weights. The sum over processes of share times loss is the
            loss of the whole batch.

        Raises:
            RaNNCError: when no process has a weight above 0, one has a negative one, or losses
                are sums by `loss_reduction`.
        """
        return self._runtime.loss_weight.set(float(weight))

    def enable_dropout(self, enabled: bool = True) -> None:  # noqa: FBT001 - the original's
        """Switches dropout on or off from the next call on, whatever mode the modules are in.

        All processes must do so alike. The next `train()` or `eval()` gives it back to the modules.
        See `pyrannc.dropout` for what counts as dropout.
        """
        self._runtime.dropout = bool(enabled)

    def train(self, mode: bool = True) -> RaNNCModule:  # noqa: FBT001 - torch's signature
        """As in ``nn.Module``; undoes :meth:`enable_dropout`."""
        self._runtime.dropout = None
        super().train(mode)
        return self

    def undeploy(self) -> None:
        """Leaves the other processes and frees what was built for training together; collective.

        Divided parameters, and the optimizer's state of them, are whole again where there was a
        part of them.
        """
        self._runtime.close()
        _live.pop(self, None)

    def _needs_deployment(self, what: str) -> None:
        if not self._runtime.deployed:
            refuse_jit()
            raise RaNNCError(
                f"`{what}` needs a plan, and planning waits for the first batch",
                hint="call the model once before",
            )

    def _parameter(self, name: str) -> torch.nn.Parameter:
        for known, parameter in self.model.named_parameters(remove_duplicate=False):
            if known == name:
                return parameter
        raise RaNNCError(
            f"the model has no parameter `{name}`", hint="named_parameters() lists them"
        )

    def _names_of(self, parameters: Iterable[torch.nn.Parameter]) -> list[str]:
        """The names that count, in the model's order, of some of its parameters."""
        known = {id(p): name for name, p in self._runtime.parameters.items()}
        wanted = {id(parameter) for parameter in parameters}
        if not wanted <= known.keys():
            raise RaNNCError(
                f"{len(wanted - known.keys())} of the {len(wanted)} given parameters are not the "
                "model's",
                hint="pass parameters of the model that was wrapped, or of its submodules",
            )
        return [name for identity, name in known.items() if identity in wanted]

    def _canonical(self, name: str) -> str:
        """The first name of a parameter that has several."""
        parameter = self._parameter(name)
        return next(known for known, p in self._runtime.parameters.items() if p is parameter)


def barrier() -> None:
    """Returns when every process has called it."""
    if get_world_size() == 1:
        return
    ensure_process_group(Config.load().timeout)
    with contextlib.ExitStack() as stack:
        for module in _live:
            stack.enter_context(module._runtime.comm.calls.event("pyrannc.barrier()", say=True))
        dist.barrier()


def clear() -> None:
    """Closes every live module's connections, and with the last of them what they started."""
    for module in list(_live):
        module.undeploy()
    _live.clear()


def delay_grad_allreduce(delay: bool) -> None:  # noqa: FBT001 - the original's signature
    """Has backwards of all models leave gradients as each process has them, or add them up again.

    As :meth:`RaNNCModule.no_sync`, for calls that follow; :meth:`RaNNCModule.allreduce_grads` adds
    up what accumulated. All processes must call it alike.
    """
    Accumulation.delayed_everywhere = bool(delay)


def show_deployment(path: str | PathLike[str], batch_size: int | None = None) -> None:
    """Prints a saved deployment: stages, ranks, and rows of each microbatch for a global batch.

    Raises:
        DeploymentError: when the file cannot be read.
    """
    plan = _core.Plan.load(str(path))
    print(plan.report() if batch_size is None else plan.report(batch_size))


__all__ = [
    "RaNNCModule",
    "barrier",
    "clear",
    "delay_grad_allreduce",
    "get_rank",
    "get_world_size",
    "show_deployment",
]
