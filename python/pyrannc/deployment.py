"""A model's place on all ranks: captured in each form, planned once, its parameters spread.

Rank 0 plans with the first batch; then every rank takes its part. Later forms of the model are
captured when they first occur, and laid out by the same plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from . import _checkpoints, _core, guards, planning, remote, state, streams
from ._common import CommonValues
from ._export import row_dims_by_size
from ._first_call import is_unfinished, settle
from ._form import Form
from ._global_batch import capture_for_all
from ._places import reveal
from ._remarks import uncaptured, unsplit
from ._same_graph import first_difference
from ._snapshot import UnsettledError, unchanged
from ._stated import check_stated
from ._strides import order_of, ordered
from ._structure import flatten
from ._wrapper import not_looked_into
from .accumulation import Accumulation, Reduction
from .batch_norm import capturable_norms, place_part_norms
from .buffers import Announcement, Registered
from .capture import Captured, argument_names, batch_size, capture, input_signature
from .changing import Changing, numbers_in, refuse_other_numbers
from .comm import Communicator
from .companions import synchronized_stages
from .dropout import set_dropout
from .errors import MismatchError, PlanError, RaNNCError
from .executor import Executor
from .hooks import captured_hooks
from .loss_weight import LossWeight
from .meeting import agree, meet
from .norms import GradientNorm
from .optimizer import check_element_wise, check_parameter_wise, keep_part
from .optimizer_state import WholeOptimizer
from .scaling import LossScale
from .sharding import Sharding
from .stage import Stage
from .unused import refuse_unused
from .variants import Kind, Mode, Variant, Variants, holders_beyond, in_mode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._numbers import Number
    from ._strides import Order
    from .config import Config

logger = logging.getLogger(__name__)


class Deployment:
    """A model deployed over all ranks.

    Attributes:
        plan: what was decided.
        comm: the connections to the other ranks.
        holders: which ranks hold each parameter and buffer.
        divided: what the holders of divided parameters divide, by the parameter's name.
        accumulation: gradients that wait to be added up between ranks.
        norm: the norm of all gradients, once the model is deployed.
        loss_scale: what losses are scaled by, once the model is deployed.
    """

    plan: _core.Plan
    holders: state.Holders
    divided: dict[str, str]
    accumulation: Accumulation
    norm: GradientNorm
    loss_scale: LossScale

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        gather_inputs: bool,
        load_deployment: str | None,
        loss_reduction: str,
        output_reduction: dict[str, str] | str | None,
        enable_zero: bool,
        check_unused_values: bool,
        config: Config,
    ) -> None:
        """Connects to the other ranks; planning waits for the first batch."""
        self.model = model
        self.optimizer = optimizer
        self.gather = gather_inputs
        self.load_deployment = load_deployment
        self.loss_reduction = loss_reduction
        self.output_reduction = output_reduction
        self.config = config
        self.check_unused_values = check_unused_values
        self.least_sharding = "optimizer" if enable_zero else "none"
        if optimizer is not None and (enable_zero or config.sharding != "none"):
            check_element_wise(optimizer)
        self.comm = Communicator.connect(config.timeout)
        if config.show_config_items and self.comm.rank == 0:
            print(config.report())
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self._registered = Registered(model)
        self._variants = Variants()
        self._changing = Changing()
        self.dropout: bool | None = None
        self.whole_optimizer: WholeOptimizer | None = None
        if optimizer is not None:
            self.whole_optimizer = WholeOptimizer.of(optimizer, self.parameters)
        self._remote: dict[str, torch.nn.Parameter] = {}
        self._taken_on: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._whole: set[int] = set()
        self._settled = False
        self._warned: set[str] = set()
        self._guards: guards.Guards | None = None
        self.closed = False
        self.loss_weight = LossWeight(self.comm, loss_reduction)
        self.sharding = Sharding(self.comm)
        self.accumulation = Accumulation(self.comm, self.parameters)
        self.accumulation.watch()
        self.deployed = False
        self._orders: dict[str, Order] = {}  # of parameters and buffers
        self._anchor = torch.zeros((), requires_grad=True)

    def _deploy(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, rows: int
    ) -> None:
        """Plans on rank 0 and takes this rank's part; see the package's architecture page."""
        if is_unfinished(self.model):
            self._settle(args, kwargs)
        if self.whole_optimizer is None:
            meet(self.comm, "the first call of the model, without an optimizer")
        else:
            self.whole_optimizer.compare(self.comm)
        captured, graph, kind = self._capture_to_plan(args, kwargs, signature, rows)
        by_rows = [graph.values[value].transport == "split" for value in graph.outputs]
        check_stated(self.output_reduction, captured.output_names, by_rows)
        if self.check_unused_values:
            refuse_unused(captured, graph, self.parameters)
        with streams.undisturbed(self.comm.device), unchanged(self.model):
            self.plan = planning.make_plan(
                self.comm,
                captured,
                graph,
                self.optimizer,
                batch_rows=rows,
                config=self.config,
                least_sharding=self.least_sharding,
                load_deployment=self.load_deployment,
            )
        if self.comm.rank == 0:
            logger.info("%s", self.plan.report())
        placement = self.plan.place(graph)
        self.holders = state.Holders(self.comm, dict(placement.holders))
        if self.optimizer is not None and not self.holders.are_all_everywhere:
            check_parameter_wise(self.optimizer)
        self._create_groups(placement)
        self._take_part()
        self._divide(placement)
        self._keep(kind, self._build(captured, graph, placement), args, kwargs)
        self.norm = GradientNorm(self.comm, self.parameters, self.holders, self.accumulation)
        self.norm.watch()
        if self.comm.world_size > 1:
            self._guards = guards.Guards(self.model, self.sharding)
        self.loss_scale = LossScale(self.comm, self.accumulation, self.optimizer)
        self.loss_scale.watch()
        self._watch_optimizers()
        self.deployed = True

    def _capture_to_plan(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, rows: int
    ) -> tuple[Captured, _core.Graph, Kind]:
        """The model as it trains; as it is now if it cannot be called so when it trains."""
        try:
            with in_mode(self.model, training=True):
                return self._capture_kind(args, kwargs, signature, rows)
        except MismatchError:
            raise
        except Exception as failure:  # whatever the user's forward raises
            if self.model.training:
                raise
            logger.info("planned as the model evaluates, as it does not train so: %s", failure)
        return self._capture_kind(args, kwargs, signature, rows)

    def _capture_kind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, rows: int
    ) -> tuple[Captured, _core.Graph, Kind]:
        kind = Kind(signature, self._mode())
        captured, graph = self._capture(args, kwargs, rows)
        # The first capture may have found that the first call changes the model.
        return captured, graph, Kind(signature, self._mode()) if self._settled else kind

    def _take_part(self) -> None:
        """Takes rank 0's values of what this rank holds, and frees the rest."""
        for name, tensor in [*self.parameters.items(), *self.buffers.items()]:
            self._orders[name] = order_of(tensor.shape, tensor.stride())
            given = self.comm.broadcast(tensor.detach().to(self.comm.device).contiguous(), 0)
            tensor.data = ordered(given, self._orders[name])
            if isinstance(tensor, torch.nn.Parameter):
                self._leave_to_holders(name, tensor)
        if self.whole_optimizer is not None:
            self.whole_optimizer.deploy(self.holders, self.parameters)

    def _place_late(self, placement: _core.Placement) -> None:
        """Leaves what no form has used until now, and all ranks have, to those that use it."""
        late = {n: r for n, r in placement.holders.items() if n not in self.holders.ranks}
        self.holders.ranks.update(late)
        for name in late:
            if name in self.parameters:
                self._leave_to_holders(name, self.parameters[name])
        if self.whole_optimizer is not None:
            self.whole_optimizer.keep_local()

    def _leave_to_holders(self, name: str, parameter: torch.nn.Parameter) -> None:
        if not self.holders.is_local(name):
            remote.free_storage(parameter, name)
            parameter.grad = None
            self._remote[name] = parameter

    def _divide(self, placement: _core.Placement) -> None:
        """Makes parameters that replicas divide this rank's part of them."""
        self.divided = placement.divided
        if self.optimizer is not None and self.divided:
            check_element_wise(self.optimizer)  # also where a loaded deployment asks for it
            self.sharding.watch(self.optimizer)
        for name, level in self.divided.items():
            parameter = self.parameters[name]
            division = state.Division(tuple(self.holders.ranks[name]), parameter.shape)
            self.holders.divisions[name] = division
            if self.holders.is_local(name):
                if self.optimizer is not None:
                    keep_part(self.optimizer, parameter, division, self.comm.rank)
                self.sharding.divide(name, parameter, division, level)

    def _watch_optimizers(self) -> None:
        """Takes on optimizers of this model that the wrapper was not given, when they step."""
        this = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            deployment = this()
            if deployment is not None and not deployment.closed:
                deployment._take_on(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, handle.remove)

    def _take_on(self, optimizer: torch.optim.Optimizer) -> None:
        own = {*self.parameters.values()}
        trains = any(p in own for group in optimizer.param_groups for p in group["params"])
        if optimizer is self.optimizer or not trains or optimizer in self._taken_on:
            return
        self._taken_on.add(optimizer)
        if not self.holders.are_all_everywhere:
            check_parameter_wise(optimizer)
        if self.divided:
            check_element_wise(optimizer)
            self.sharding.watch(optimizer)
        WholeOptimizer.of(optimizer, self.parameters).adopt(self.holders, self.parameters)

    def _look_again(self) -> None:
        """Takes note of parameters and buffers that the model was given before its first call.

        Raises:
            RaNNCError: when it has something else in their places, for this call only.
        """
        found = dict(self.model.named_parameters())
        if not all(isinstance(parameter, torch.nn.Parameter) for parameter in found.values()):
            raise not_looked_into("torch.func.functional_call")
        self.parameters.clear()
        self.parameters.update(found)
        self.buffers = dict(self.model.named_buffers())
        self._registered = Registered(self.model)
        if self.optimizer is not None:
            WholeOptimizer.of(self.optimizer, self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of all ranks by the name that counts."""
        return {**self.parameters, **self.buffers}

    def local_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that this rank holds, by name; all of them before deployment."""
        if not self.deployed and not hasattr(self, "holders"):
            return dict(self.model.named_parameters())  # also those that were added since
        return {name: p for name, p in self.parameters.items() if self.holders.is_local(name)}

    def _variant(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
        rows: int,
        *,
        with_gradients: bool,
    ) -> Variant:
        numbers = self._numbers(args, kwargs)
        variant = self._variants.find(kind, rows, numbers, with_gradients=with_gradients)
        if variant is None and self._promote(args, kwargs):
            signature = input_signature(args, kwargs, self._changing.arguments)
            kind = Kind(signature, self._mode_together())
        if variant is None:
            with self._materialized():
                captured, graph = self._capture(args, kwargs, rows)
            placement = self.plan.place(graph, self.divided)
            self._check_holders(placement)
            self._place_late(placement)
            self._create_groups(placement)
            variant = self._build(captured, graph, placement)
            self._keep(kind, variant, args, kwargs)
        return variant

    def _mode(self) -> Mode:
        """What decides, apart from the arguments, which operators the model runs now."""
        if not self.deployed:
            self._look_again()
            self._form = Form(self.model)
        with torch._C.DisableTorchFunctionSubclass():
            form = self._form.digest(self._whole)
            return Mode.of(self.model, self.dropout, form)

    def _mode_together(self) -> Mode:
        """The mode with the forms that the model has on all ranks; collective."""
        mode = self._mode()
        return mode.together([form for (form,) in self.comm.all_gather_row([mode.form])])

    def _numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Number, float]:
        """The numbers, of those that were seen to change, that the model is given now."""
        return self._changing.values(self.model, flatten((args, kwargs))[2].constants())

    def _all_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Number, float]:
        """All numbers that the model is given or finds now."""
        constants = flatten((args, kwargs))[2].constants()
        names = argument_names(self.model, [".".join(map(str, path)) for path in constants])
        given = numbers_in(constants, names)
        return given | self._form.numbers(self._whole) | self._numbers(args, kwargs)

    def _promote(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether more numbers are seen to change, so that any value of them is alike; collective.

        That is found out before the model is captured again.
        """
        now = self._all_numbers(args, kwargs)
        news = self._changing.notice(self.comm, now, self._form.changed())
        if news:
            self._form.release(self._changing.numbers)
        return news

    def _keep(
        self, kind: Kind, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keeps a variant; what it tells about attributes counts from now on; collective.

        Those of parts that it leaves whole do not count.
        """
        self._whole |= variant.captured.whole_modules()
        self._form.settle(variant.captured.left, variant.captured.read)
        forms = self.comm.all_gather_row([self._form.digest(self._whole)])
        self._form.agreed()
        mode = kind.mode.together([form for (form,) in forms])
        self._variants.add(dataclasses.replace(kind, mode=mode), variant)
        self._changing.account(self.comm, variant.captured, self._all_numbers(args, kwargs))

    def _create_groups(self, placement: _core.Placement) -> None:
        """Groups for gradients, and for what the replicas of a stage tell each other."""
        self.comm.create_groups([ranks for ranks, _ in placement.gradient_groups])
        self.comm.create_groups([stage.ranks for stage in placement.stages])

    def _check_holders(self, placement: _core.Placement) -> None:
        """Refuses a variant in which a rank would need parameters that others hold."""
        trained = {n: r for n, r in placement.holders.items() if n in self.parameters}
        beyond = holders_beyond(trained, self.holders.ranks)
        if beyond:
            name, ranks = next(iter(beyond.items()))
            raise PlanError(
                f"called so, the model needs `{name}` on rank {ranks[0]}, but by the plan only "
                f"ranks {self.holders.ranks[name]} hold it",
                hint="wrap the model anew and make its first call in this form, or set "
                "`partition_num=1`",
            )

    def _capture(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
    ) -> tuple[Captured, _core.Graph]:
        def work() -> tuple[Captured, _core.Graph]:
            quiet = streams.undisturbed(self.comm.device)
            with quiet, guards.lifted(), _checkpoints.telling(), capturable_norms():
                gathered = self.gather and self.comm.world_size > 1
                captured = capture_for_all(
                    self.model, args, kwargs, rows, self._captured, gathered=gathered
                )
            place_part_norms(captured.module, self.model)
            if self.dropout is not None:
                set_dropout(captured.module, enabled=self.dropout)
            captured.move_to(self.comm.device)
            return captured, _core.Graph.from_json(captured.graph_json)

        def attempt() -> tuple[Captured, _core.Graph] | None:
            try:
                return work()
            except UnsettledError:
                if not settles:
                    raise
                return None

        settles = not self.deployed and not self._settled
        found = agree(self.comm, "capture the model", attempt)
        if settles and any(self.comm.all_gather_objects(found is None)):
            self._settle(args, kwargs)
            return self._capture(args, kwargs, rows)
        assert found is not None
        captured, graph = found
        tensors, paths, _ = flatten((args, kwargs))
        # Some that seemed to hold rows may not.
        common = self._common(tensors, paths, frozenset(captured.batch_inputs))
        self._compare(captured, graph, common)
        # Both ends of a transfer must know how a tensor lies in memory: as on rank 0.
        captured.orders[:] = self.comm.broadcast_object(captured.orders)
        self._warn(captured, graph)
        return captured, graph

    def _compare(self, captured: Captured, graph: _core.Graph, common: CommonValues) -> None:
        """Makes sure that all ranks have captured the same; collective.

        Raises:
            MismatchError: naming what differs.
        """
        used = captured.used_numbers
        numbers = {n.name: repr(value) for n, value in captured.numbers.items() if n in used}
        found = (graph.fingerprint(), captured.constants(), common.digest, numbers)
        seen = self.comm.all_gather_objects(found)
        if all(other == seen[0] for other in seen):
            return
        if all(other[:2] == seen[0][:2] for other in seen):
            refuse_other_numbers(self.comm, numbers)
            common.refuse(self.comm, lambda paths: argument_names(self.model, paths))
        told = self._form.differences(self.comm)
        if not told and any(other[0] != seen[0][0] for other in seen):
            told = first_difference(self.comm, graph)
        elif not told:
            names = {name for _, own, *_ in seen for name, _ in own.items() ^ seen[0][1].items()}
            differing = min(names).removeprefix("model.")
            told = f"the tensor `{differing}` holds other values on each"
        raise MismatchError(
            f"the ranks were given different models: {told}",
            hint="build the same model with the same arguments on every rank, and change its "
            "attributes and hooks on all ranks together; where the order counts in which its code "
            "goes through a set, which differs between processes, go through `sorted(...)`",
        )

    def _common(
        self, tensors: list[torch.Tensor], paths: list[str], holding: frozenset[int] | None
    ) -> CommonValues:
        """What of a call's arguments counts for the rows of all ranks.

        Args:
            tensors: the tensors among them.
            paths: their paths.
            holding: positions of those that hold rows; as sizes tell, where nothing else does.
        """
        if self.comm.world_size == 1 or not self.gather:
            return CommonValues({})
        if holding is None:
            holding = frozenset(row_dims_by_size(tensors, batch_size(tensors)))
        named = enumerate(zip(paths, tensors, strict=True))
        return CommonValues({path: t for i, (path, t) in named if i not in holding})

    def _settle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the model be as its first call leaves it; collective."""
        self._settled = True

        def run() -> None:
            copied = pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().clone(), (args, kwargs)
            )
            with guards.lifted():
                self.model(*copied[0], **copied[1])

        settle(self.comm, self.model, self.optimizer, run)
        self._mode()

    def _warn(self, captured: Captured, graph: _core.Graph) -> None:
        """Says once what of the model cannot be divided, and why."""
        if self.comm.rank != 0:
            return
        hooked = captured_hooks(self.model)
        if hooked is not None and "hooks" not in self._warned:
            self._warned.add("hooks")
            logger.warning("%s", hooked)
        if captured.obstacles and "opaque" not in self._warned:
            self._warned.add("opaque")
            logger.warning("%s", uncaptured(captured, self.model))
        if not graph.splittable and "batch" not in self._warned:
            self._warned.add("batch")
            reason = graph.unsplittable_reason or ""
            logger.warning("%s", unsplit(captured, reason, self.model))

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
        return capture(
            self.model,
            args,
            kwargs,
            output_reduction=self.output_reduction,
            numbers=self._numbers(args, kwargs),
            deciding=self._changing.deciding,
        )

    def _build(self, captured: Captured, graph: _core.Graph, placement: _core.Placement) -> Variant:
        stages = {
            index: Stage.build(captured, stage)
            for index, stage in enumerate(placement.stages)
            if self.comm.rank in stage.ranks
        }
        groups = placement.gradient_groups
        replicas = {i: placement.stages[i].ranks.index(self.comm.rank) for i in stages}
        own = streams.Streams(self.comm.device, replicas, captured.draws)
        executor = Executor(
            self.comm, stages, graph.values, captured.orders, groups, self.sharding, own
        )
        reduction = Reduction.of(executor, placement)
        talking = synchronized_stages(captured, placement)
        announcement = Announcement.of(self.comm, stages, captured.state)
        return Variant(captured, graph, placement, executor, reduction, talking, announcement)

    @contextlib.contextmanager
    def _materialized(self) -> Iterator[None]:
        """Gives parameters of other ranks memory for a capture, which reads their shapes.

        Capture runs the submodules that it cannot look into; for those it gets the values too.
        """
        needs_values = self._variants.runs_submodules()
        for name, parameter in self.parameters.items():
            if name not in self.holders.ranks:
                continue
            full = self.holders.everywhere(name, parameter, parameter) if needs_values else None
            if not self.holders.is_local(name):
                remote.restore_storage(parameter, full)
                parameter.data = ordered(parameter.data, self._orders[name])
        try:
            with self.sharding.whole(), self.sharding.shaped(values=needs_values):
                yield
        finally:
            for name, parameter in self._remote.items():
                remote.free_storage(parameter, name)

    def close(self) -> None:
        """Leaves the other ranks. Local parameters keep their values, and are whole again."""
        if self.deployed and self.holders.divisions and not self.comm.failed:
            self._give_back()
        self.closed = True
        self._variants.clear()
        reveal(self.model.modules())
        if self.whole_optimizer is not None and self.deployed:
            self.whole_optimizer.undeploy(self.holders)
        if self.deployed:
            self.norm.forget()
        if self._guards is not None and self.whole_here:
            self._guards.remove()
            self.loss_scale.forget()
        self.comm.close()

    def _give_back(self) -> None:
        """Makes divided parameters whole, unless another rank has failed or is elsewhere."""
        try:
            meet(self.comm, "model.undeploy() or pyrannc.clear()")
            with self.comm.guard("giving divided parameters back"):
                self.sharding.give_back(self.holders, self.parameters, self.whole_optimizer)
        except RaNNCError as problem:  # often while another error is on its way to the user
            warnings.warn(
                "the model is undeployed, but its parameters stay this process's parts, as the "
                f"others could not be had: {problem}",
                stacklevel=4,
            )

    @property
    def whole_here(self) -> bool:
        """Whether this rank holds all of the model."""
        return not self._remote and not any(name in self.sharding for name in self.parameters)
