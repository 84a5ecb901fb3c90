"""Trains a case for two steps, with RaNNC on every rank or with plain PyTorch on one, and keeps
what must be equal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

import pyrannc
from tests.models import Case, case, slice_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 7


@dataclass(frozen=True)
class Setup:
    """How to train.

    Attributes:
        rows: for each step, the rows of each rank's local batch.
        num_stages: forced stages.
        microbatches: forced microbatches.
        stage_ranks: a deployment written by hand, in place of a planned one.
        shares: for each of these stages, how its replicas divide the rows; equally if empty.
        recompute: how many operators of the deployment written by hand form a group whose values
            are computed again in backward; those of a stage that are left form another.
        sharding: what the replicas of each of these stages divide.
        optimizer: one of `OPTIMIZERS`.
        seed: of random numbers in the model, on every rank.
        schedule: forced schedule.
        gather_inputs: as for `RaNNCModule`.
        input_gradients: whether floating-point inputs require gradients.
    """

    rows: tuple[tuple[int, ...], ...]
    num_stages: int = 0
    microbatches: int = 0
    stage_ranks: tuple[tuple[int, ...], ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()
    recompute: int = 0
    sharding: str = "none"
    optimizer: str = "adam"
    seed: int | None = None
    schedule: str = "auto"
    gather_inputs: bool = True
    input_gradients: bool = False

    @property
    def world_size(self) -> int:
        return len(self.rows[0])

    def config(self, num_stages: int | None = None) -> pyrannc.Config:
        return pyrannc.Config(
            partition_num=self.num_stages if num_stages is None else num_stages,
            pipeline_num=self.microbatches,
            schedule=self.schedule,
            measure=False,
            profile_cache_dir="off",
            timeout_s=40,
        )

    def __str__(self) -> str:
        layout = "-".join(str(len(ranks)) for ranks in self.stage_ranks) or f"s{self.num_stages}"
        recompute = f"-r{self.recompute}" if self.recompute else ""
        sharding = "" if self.sharding == "none" else f"-{self.sharding}-{self.optimizer}"
        return f"w{self.world_size}-{layout}-m{self.microbatches}{recompute}{sharding}"


@dataclass
class Record:
    """What training gave: by step outputs, input gradients and all gradients; then all state."""

    outputs: list[list[torch.Tensor]] = field(default_factory=list)
    input_gradients: list[list[torch.Tensor | None]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    stage_ranks: list[list[int]] = field(default_factory=list)
    fused: bool = False


def global_batch(chosen: Case, rows: int, step: int, setup: Setup) -> Any:
    arguments = chosen.make_batch(rows, seed=SEED + step)
    if setup.input_gradients:
        for tensor in pytree.tree_leaves(arguments):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
    return arguments


def _tensors(value: Any) -> list[torch.Tensor]:
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    leaves = pytree.tree_leaves(value)
    nested = [
        _tensors(leaf) if hasattr(leaf, "__dataclass_fields__") else [leaf] for leaf in leaves
    ]
    return [t for leaves in nested for t in leaves if isinstance(t, torch.Tensor)]


def train_plainly(name: str, setup: Setup) -> Record:
    """On one process, with the global batch of each step."""
    chosen = case(name)
    model = chosen.make_model()
    optimizer = make_optimizer(chosen, model, setup)
    record = Record()
    for step, rows in enumerate(setup.rows):
        total = sum(rows) if setup.gather_inputs else rows[0]
        args, kwargs = global_batch(chosen, total, step, setup)
        outputs = model(*args, **kwargs)
        _finish_step(chosen, record, outputs, (args, kwargs), optimizer)
        record.gradients.append(
            {
                key: p.grad.clone() if p.grad is not None else None
                for key, p in model.named_parameters()
            }
        )
        if optimizer is not None:
            optimizer.step()
    record.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return record


def train_with_rannc(name: str, setup: Setup, folder: str) -> Record:
    """On this process, one of several, with its rows of each step."""
    chosen = case(name)
    wrapped, optimizer = wrap(chosen, setup, folder)
    record = Record()
    if setup.seed is not None:
        torch.manual_seed(setup.seed)
    for step, rows in enumerate(setup.rows):
        args, kwargs = local_batch(chosen, setup, step, rows)
        outputs = wrapped(*args, **kwargs)
        _finish_step(chosen, record, outputs, (args, kwargs), optimizer)
        names = [key for key, _ in wrapped.named_parameters(from_global=True)]
        record.gradients.append({key: wrapped.get_param_grad(key) for key in names})
        if optimizer is not None:
            optimizer.step()
    record.state = dict(wrapped.state_dict())
    record.stage_ranks = wrapped.deployment.stage_ranks
    for key, _ in wrapped.named_parameters(from_global=True):
        full = wrapped.get_param(key)
        assert not record.state or torch.equal(full, record.state[key])
    wrapped.undeploy()
    return record


def wrap(
    chosen: Case,
    setup: Setup,
    folder: str,
    prepare: Callable[[torch.nn.Module], None] = lambda _: None,
) -> tuple[pyrannc.RaNNCModule, torch.optim.Optimizer | None]:
    """The case's model, changed by `prepare`, placed as the setup says, and its optimizer."""
    deployment = _hand_written(chosen, setup, folder, prepare) if setup.stage_ranks else None
    model = chosen.make_model()
    prepare(model)
    optimizer = make_optimizer(chosen, model, setup)
    wrapped = pyrannc.RaNNCModule(
        model,
        optimizer,
        gather_inputs=setup.gather_inputs,
        load_deployment=deployment,
        config=setup.config(),
    )
    return wrapped, optimizer


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, eps: torch.optim.Adam(parameters, lr=0.01, eps=eps),
    "adamw": lambda parameters, eps: torch.optim.AdamW(
        parameters, lr=0.01, eps=eps, weight_decay=0.1, amsgrad=True, foreach=True
    ),
    "fused": lambda parameters, eps: torch.optim.AdamW(parameters, lr=0.01, eps=eps, fused=True),
    "sgd": lambda parameters, _: torch.optim.SGD(
        parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "maximize": lambda parameters, _: torch.optim.SGD(parameters, lr=0.01, maximize=True),
    "rmsprop": lambda parameters, _: torch.optim.RMSprop(
        parameters, lr=0.01, momentum=0.5, centered=True, eps=1e-3
    ),
    "adagrad": lambda parameters, _: torch.optim.Adagrad(parameters, lr=0.01),
    "groups": lambda parameters, eps: torch.optim.Adam(
        [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.02}], lr=0.01, eps=eps
    ),
}


def make_optimizer(
    chosen: Case, model: torch.nn.Module, setup: Setup
) -> torch.optim.Optimizer | None:
    """In float32 with an epsilon far above the rounding of gradients that are zero in truth.

    That rounding is up to 1e-6 (before a normalisation, on some processors); a step carries it on
    as 0.01 * 1e-6 / epsilon.
    """
    parameters = list(model.parameters())
    eps = 1e-8 if chosen.float64_ok else 1e-2
    return OPTIMIZERS[setup.optimizer](parameters, eps) if parameters else None


def local_batch(chosen: Case, setup: Setup, step: int, rows: Sequence[int]) -> Any:
    rank = pyrannc.get_rank()
    if not setup.gather_inputs:
        return global_batch(chosen, rows[rank], step if rank == 0 else 100 + rank, setup)
    start = sum(rows[:rank])
    local = slice_rows(global_batch(chosen, sum(rows), step, setup), start, start + rows[rank])
    if setup.input_gradients:
        for tensor in _tensors(local):
            if tensor.is_floating_point():
                tensor.retain_grad()
    return local


def _finish_step(
    chosen: Case,
    record: Record,
    outputs: Any,
    inputs: Any,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    if optimizer is not None:
        optimizer.zero_grad()
    loss = chosen.make_loss(outputs)
    if loss.requires_grad:
        loss.backward()
    record.outputs.append([tensor.detach().clone() for tensor in _tensors(outputs)])
    record.input_gradients.append([tensor.grad for tensor in _tensors(inputs)])


def _hand_written(
    chosen: Case, setup: Setup, folder: str, prepare: Callable[[torch.nn.Module], None]
) -> str:
    """The file of a deployment with the stages of a planned one and the replicas of `setup`."""
    path = Path(folder) / "deployment.json"
    model = chosen.make_model()
    prepare(model)
    planned = pyrannc.RaNNCModule(model, config=setup.config(len(setup.stage_ranks)))
    args, kwargs = local_batch(chosen, setup, 0, setup.rows[0])
    with torch.no_grad():
        planned(*args, **kwargs)
    planned.save_deployment(path)
    planned.undeploy()
    if pyrannc.get_rank() == 0:
        plan = json.loads(path.read_text())
        plan.pop("estimates", None)
        for stage, ranks in zip(plan["stages"], setup.stage_ranks, strict=True):
            stage["ranks"] = list(ranks)
            if setup.recompute:
                nodes, size = stage["nodes"], setup.recompute
                groups = [nodes[start : start + size] for start in range(0, len(nodes), size)]
                stage["recompute"] = groups
            if len(stage["ranks"]) > 1:
                stage["sharding"] = setup.sharding
        for stage, shares in zip(plan["stages"], setup.shares, strict=False):
            stage["shares"] = list(shares)
        path.write_text(json.dumps(plan))
    pyrannc.barrier()
    return str(path)
