"""One deployed model on one rank: capture, plan, place, then run steps.

The order of events is the same on every rank, and every phase that can fail ends with the ranks
telling each other, so that a failure anywhere stops all of them with the same message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from . import _checkpoints, _core, _slices, elsewhere, guards, hooks, planning, state, streams
from ._core import Slot
from ._form import Form
from ._stated import check_stated
from ._structure import flatten
from ._wrapper import not_looked_into
from .accumulation import Accumulation, Reduction
from .batch_norm import capturable_norms, place_part_norms
from .buffers import Registered
from .capture import Captured, batch_size, capture, input_signature
from .comm import Communicator
from .companions import companions, synchronized_stages
from .dropout import set_dropout
from .errors import ExecutionError, MismatchError, PlanError, RaNNCError
from .executor import Executor, Step
from .finish import Finish, sources_of
from .loss_weight import LossWeight
from .meeting import digest, meet
from .norms import GradientNorm
from .optimizer import check_element_wise, check_parameter_wise, keep_part
from .optimizer_state import WholeOptimizer
from .scaling import LossScale
from .sharding import Sharding
from .stage import Stage
from .unused import refuse_unused
from .variants import Kind, Mode, Variant, Variants, holders_beyond

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .config import Config

logger = logging.getLogger(__name__)
T = TypeVar("T")


def agree(comm: Communicator, task: str, action: Callable[[], T]) -> T:
    """Runs ``action`` on every rank, and raises on every rank if it failed on any.

    Raises:
        RaNNCError: this rank's own error where it failed here, else one that names the failing
            ranks.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:  # raised again below, after the others know
        error = caught
    problems = comm.all_gather_objects(
        None if error is None else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    failed = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if failed:
        raise ExecutionError(
            f"could not {task} on {len(failed)} of {comm.world_size} ranks: " + "; ".join(failed)
        )
    return result  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one call brought, on all ranks.

    Attributes:
        rows: rows of each rank's local batch that count.
        training: whether gradients are wanted.
        delayed: whether they are to stay as each rank has them.
        seed: what the step's random numbers come from.
        loss_scale: the gradient that the loss is expected to get; 0 while unknown.
    """

    rows: tuple[int, ...]
    training: bool
    delayed: bool
    seed: int
    loss_scale: float

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.rows)


class Runtime:
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
        self.dropout: bool | None = None
        self.whole_optimizer: WholeOptimizer | None = None
        if optimizer is not None:
            self.whole_optimizer = WholeOptimizer.of(optimizer, self.parameters)
        self._elsewhere: list[torch.nn.Parameter] = []
        self._whole: set[int] = set()
        self._guards: guards.Guards | None = None
        self.closed = False
        self.loss_weight = LossWeight(self.comm, loss_reduction)
        self.sharding = Sharding(self.comm)
        self.accumulation = Accumulation(self.comm, self.parameters)
        if optimizer is not None:
            self.accumulation.watch(optimizer)
        self.deployed = False
        self._anchor = torch.zeros((), requires_grad=True)

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
        _refuse_transforms()
        signature, arrival = self._arrive(args, kwargs)
        with torch.inference_mode(mode=False):  # what lasts must be usable in training
            if not self.deployed:
                self._deploy(args, kwargs, signature, arrival)
            variant = self._variant(args, kwargs, signature, arrival)
        given = variant.captured.flatten_inputs(args, kwargs)
        inputs = [tensor.to(self.comm.device) for tensor in given]
        step = Step(
            arrival.total,
            self._denominators(variant, inputs, arrival),
            arrival.training,
            arrival.seed,
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
        for value, tensor in zip(variant.graph.inputs, inputs, strict=True):
            step.slots[Slot.source(value)] = tensor.detach()
        if program.fused:
            self._seed(variant, step, scale)
        variant.executor.run(program.forward(self.comm.rank), step)
        with self.comm.guard("bringing buffers together"):
            ranks = [stage.ranks for stage in variant.placement.stages]
            step.buffers.finish(self.comm, variant.executor.stages, ranks)
        outputs = self._outputs(variant, step)
        if arrival.training:
            sources = [sources_of(tensor) for tensor in given]
            finish = Finish(self, variant, program, step, arrival, sources, reduce, scale)
            outputs = finish.attach(inputs, outputs)
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
        signature, rows, mode = "", 0, Mode(b"", b"")
        try:
            mode = self._mode()
            hooks.check_parameter_hooks(self.local_parameters())
            signature = input_signature(args, kwargs)
            rows = batch_size(flatten((args, kwargs))[0])
            self._registered.take_over()
        except Exception as error:  # raised below, after the others know
            problem = error
        training = torch.is_grad_enabled()
        delayed = training and self.accumulation.delays
        gradients = int(training) + int(delayed)
        scale = self.loss_scale.to_bits() if self.deployed else 0
        flags = [int(self.sharding.changed), int(problem is not None)]
        header = [digest(signature), mode.digest, gradients, rows, streams.seed_now(), scale]
        headers = meet(self.comm, "model(...)", [*header, *flags])
        if any(failed for *_, failed in headers):
            agree(self.comm, "read the model's inputs", lambda: _raise(problem))
        if any(other[:3] != headers[0][:3] for other in headers):
            self._explain_mismatch(signature, mode, training=training, delayed=delayed)
        if any(other[6] for other in headers):
            with self.comm.guard("gathering sharded parameters"):
                self.sharding.gather()
        all_rows = [other[3] for other in headers]
        if not self.gather:
            all_rows = [all_rows[0], *([0] * (self.comm.world_size - 1))]
        if sum(all_rows) == 0:
            raise RaNNCError("the batch has no rows on any rank; a step needs at least one")
        seed, scale = headers[0][4:6]
        loss_scale = LossScale.from_bits(scale)
        return signature, Arrival(tuple(all_rows), training, delayed, seed, loss_scale)

    def _explain_mismatch(
        self, signature: str, mode: Mode, *, training: bool, delayed: bool
    ) -> None:
        grad = "with gradients" if training else "without gradients"
        if delayed:
            grad += ", their all-reduce delayed"
        told = self.comm.all_gather_objects(f"{signature} ({mode.describe(self.model)}, {grad})")
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(told))
        called = (signature, grad, dataclasses.replace(mode, form=0).digest)
        if len(set(self.comm.all_gather_objects(called))) == 1:
            raise MismatchError(
                "the ranks were given different models, or attributes or hooks of their models "
                f"were changed differently:{lines}",
                hint="build the same model with the same arguments on every rank, and change it "
                "on all ranks together",
            )
        raise MismatchError(
            "the ranks were called with different inputs; all must agree in everything but the "
            f"number of rows in the batch:{lines}",
            hint="pad or truncate so that every rank's tensors differ only in their first "
            "dimension, and switch train()/eval(), requires_grad, no_grad() and no_sync() on all "
            "ranks together",
        )

    def _deploy(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, arrival: Arrival
    ) -> None:
        """Plans on rank 0 and takes this rank's part; see the package's architecture page."""
        if self.whole_optimizer is None:
            meet(self.comm, "the first call of the model, without an optimizer")
        else:
            self.whole_optimizer.compare(self.comm)
        captured, graph, kind = self._capture_to_plan(args, kwargs, signature, arrival)
        by_rows = [graph.values[value].transport == "split" for value in graph.outputs]
        check_stated(self.output_reduction, captured.output_names, by_rows)
        if self.check_unused_values:
            refuse_unused(captured, graph, self.parameters)
        with streams.undisturbed(self.comm.device):
            self.plan = planning.make_plan(
                self.comm,
                captured,
                graph,
                self.optimizer,
                batch_rows=arrival.total,
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
        self._keep(kind, self._build(captured, graph, placement))
        self.norm = GradientNorm(self.comm, self.parameters, self.holders, self.accumulation)
        self.norm.watch()
        if self.comm.world_size > 1:
            self._guards = guards.Guards(self.model, self.sharding)
        self.loss_scale = LossScale(self.comm, self.accumulation, self.optimizer)
        self.loss_scale.watch()
        self.deployed = True

    def _capture_to_plan(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, arrival: Arrival
    ) -> tuple[Captured, _core.Graph, Kind]:
        """The model as it trains; as it is now if it cannot be called so when it trains."""
        try:
            with _mode(self.model, training=True):
                kind = Kind(signature, self._mode())
                return *self._capture(args, kwargs, arrival), kind
        except MismatchError:
            raise
        except Exception as failure:  # whatever the user's forward raises
            if self.model.training:
                raise
            logger.info("planned as the model evaluates, as it does not train so: %s", failure)
        kind = Kind(signature, self._mode())
        return *self._capture(args, kwargs, arrival), kind

    def _take_part(self) -> None:
        """Takes rank 0's values of what this rank holds, and frees the rest."""
        for name, tensor in [*self.parameters.items(), *self.buffers.items()]:
            tensor.data = self.comm.broadcast(tensor.detach().to(self.comm.device).contiguous(), 0)
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
            elsewhere.take_away(parameter)
            parameter.grad = None
            self._elsewhere.append(parameter)

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
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str, arrival: Arrival
    ) -> Variant:
        kind = Kind(signature, self._mode())
        variant = self._variants.find(kind, arrival.total, with_gradients=arrival.training)
        if variant is None:
            with self._materialized():
                captured, graph = self._capture(args, kwargs, arrival)
            placement = self.plan.place(graph, self.divided)
            self._check_holders(placement)
            self._place_late(placement)
            self._create_groups(placement)
            variant = self._build(captured, graph, placement)
            self._keep(kind, variant)
        return variant

    def _mode(self) -> Mode:
        """What decides, apart from the arguments, which operators the model runs now."""
        if not self.deployed:
            self._look_again()
            self._form = Form(self.model)
        with torch._C.DisableTorchFunctionSubclass():
            form = self._form.digest(self._whole)
            return Mode.of(self.model, self.dropout, form)

    def _keep(self, kind: Kind, variant: Variant) -> None:
        """Keeps a variant; attributes of parts that it leaves whole do not count from now on."""
        whole = variant.captured.whole_modules()
        if not whole <= self._whole:
            self._whole |= whole
            form = self._form.digest(self._whole)
            kind = dataclasses.replace(kind, mode=dataclasses.replace(kind.mode, form=form))
        self._variants.add(kind, variant)

    def _create_groups(self, placement: _core.Placement) -> None:
        """Groups for gradients, and for what the replicas of a stage tell each other."""
        self.comm.create_groups([ranks for ranks, _ in placement.gradient_groups])
        self.comm.create_groups([stage.ranks for stage in placement.stages])

    def _check_holders(self, placement: _core.Placement) -> None:
        """Refuses a variant in which a rank would need parameters that are elsewhere."""
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
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrival: Arrival
    ) -> tuple[Captured, _core.Graph]:
        def work() -> tuple[Captured, _core.Graph]:
            quiet = streams.undisturbed(self.comm.device)
            with quiet, guards.lifted(), _checkpoints.telling(), capturable_norms():
                stated = self.output_reduction
                captured = capture(self.model, args, kwargs, output_reduction=stated)
                if captured.static_rows not in (None, arrival.total):
                    whole = _repeat_rows((args, kwargs), captured.static_rows, arrival.total)
                    captured = capture(self.model, *whole, output_reduction=stated)
            place_part_norms(captured.module, self.model)
            if self.dropout is not None:
                set_dropout(captured.module, enabled=self.dropout)
            captured.move_to(self.comm.device)
            return captured, _core.Graph.from_json(captured.graph_json)

        captured, graph = agree(self.comm, "capture the model", work)
        prints = self.comm.all_gather_objects(graph.fingerprint())
        if len(set(prints)) > 1:
            told = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(prints))
            raise MismatchError(
                "the ranks were given different models; "
                f"the fingerprints of their graphs are {told}",
                hint="build the same model with the same arguments on every rank",
            )
        if not graph.splittable and self.comm.rank == 0:
            logger.warning(
                "the batch cannot be split, so every step runs as one microbatch on one replica: "
                "%s. If that belongs to a loss which the model returns, state with the argument "
                '`output_reduction` of RaNNCModule that it is the "mean" or the "sum" over rows '
                "of what microbatches give; or have the model return what the loss needs, compute "
                "it outside, and state how it reduces with `loss_reduction`",
                graph.unsplittable_reason,
            )
        return captured, graph

    def _build(self, captured: Captured, graph: _core.Graph, placement: _core.Placement) -> Variant:
        stages = {
            index: Stage.build(captured, stage)
            for index, stage in enumerate(placement.stages)
            if self.comm.rank in stage.ranks
        }
        groups = placement.gradient_groups
        replicas = {i: placement.stages[i].ranks.index(self.comm.rank) for i in stages}
        own = streams.Streams(self.comm.device, replicas, captured.draws)
        executor = Executor(self.comm, stages, graph.values, groups, self.sharding, own)
        reduction = Reduction.of(executor, placement)
        talking = synchronized_stages(captured, placement)
        return Variant(captured, graph, placement, executor, reduction, talking)

    def _denominators(
        self, variant: Variant, inputs: Sequence[torch.Tensor], arrival: Arrival
    ) -> list[torch.Tensor]:
        counts = variant.captured.denominators
        if not counts:
            return []
        if arrival.rows[self.comm.rank] > 0:
            local = torch.stack([count(inputs).to(torch.float64).reshape(()) for count in counts])
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
                tensor = _slices.zeros(variant.executor.values[value], 0, self.comm.device)
            found[value] = tensor.clone() if value in inputs else tensor
        return [found[value] for value in variant.graph.outputs]

    @contextlib.contextmanager
    def _materialized(self) -> Iterator[None]:
        """Gives parameters that live elsewhere memory for a capture, which reads their shapes.

        Capture runs the submodules that it cannot look into; for those it gets the values too.
        """
        needs_values = self._variants.runs_submodules()
        for name, parameter in self.parameters.items():
            if name not in self.holders.ranks:
                continue
            full = self.holders.everywhere(name, parameter, parameter) if needs_values else None
            if not self.holders.is_local(name):
                elsewhere.bring_back(parameter, full)
        try:
            with self.sharding.whole(), self.sharding.shaped(values=needs_values):
                yield
        finally:
            for parameter in self._elsewhere:
                elsewhere.take_away(parameter)

    def wanted(self) -> bool:
        """Whether the backward that is running is to leave gradients of parameters."""
        edge = torch.autograd.graph.get_gradient_edge(self._anchor)
        return torch._C._will_engine_execute_node(edge.node)

    def publish(self, gradients: dict[str, torch.Tensor], scale: torch.Tensor | None) -> None:
        """Moves a step's gradients to ``.grad``, as a backward of the bare model would."""
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

    def close(self) -> None:
        """Leaves the other ranks. Local parameters keep their values, and are whole again."""
        if self.deployed and self.holders.divisions and not self.comm.failed:
            self._give_back()
        self.closed = True
        self._variants.clear()
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
        return not self._elsewhere and not any(name in self.sharding for name in self.parameters)


def _refuse_transforms() -> None:
    """Says what cannot see through the pipeline, before it does something else silently."""
    transform = None
    if torch._C._get_tracing_state() is not None:
        transform = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        transform = "torch.export"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        transform = "torch.func"
    if transform is not None:
        raise not_looked_into(transform)


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _repeat_rows(arguments: Any, rows: int | None, total: int) -> Any:
    """The same arguments with as many rows as the global batch has, of whatever content.

    For a capture that is valid for one number of rows only.
    """

    def repeat(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[0] != rows:
            return tensor
        repeated = tensor.detach()[torch.arange(total, device=tensor.device) % rows]
        return repeated.requires_grad_(tensor.requires_grad)

    return pytree.tree_map(repeat, arguments)


@contextlib.contextmanager
def _mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every module into one mode and gives each its own back."""
    modes = {module: module.training for module in model.modules()}
    if modes[model] == training:
        yield
        return
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
