"""Times training steps beside those of PyTorch's own parallel modules, in the same processes.

    torchrun --nproc-per-node 2 benchmarks/peers.py
    torchrun --nproc-per-node 2 benchmarks/peers.py --only pipeline --rounds 10

Each pair trains the same model on the same batches: `DistributedDataParallel` beside the plan that
RaNNC chooses, `torch.distributed.pipelining` beside a plan with as many stages and microbatches.
Their steps (forward, backward, the optimizer's) take turns, so that both meet the same machine.
Printed is a table in Markdown: the median of each, and the ratio of the medians; above 1 RaNNC is
faster. One thread a process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

import pyrannc

if TYPE_CHECKING:
    from collections.abc import Callable

MICROBATCHES = 4
WARM_UP = 3


class WithLoss(nn.Module):
    """A model with its loss: the mean cross entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        return cross_entropy(self.model(x), target)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over all positions."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class Encoder(nn.Module):
    """Transformer layers between an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2048, 256)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
            for _ in range(6)
        )
        self.head = nn.Linear(256, 2048)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_encoder(rows: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The model, one process's batch, and the layer that the second of two stages begins with."""
    shape = (rows, 128)
    return Encoder(), torch.randint(2048, shape), torch.randint(2048, shape), "layers.3"


def make_mlp(rows: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """Wide linears: many parameters for few activations."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(1024, 128))
    return model, torch.randn(rows, 1024), torch.randint(128, (rows,)), "8"


MODELS = {"encoder": (make_encoder, 8), "mlp": (make_mlp, 256)}


@dataclass(frozen=True)
class Contestant:
    """Something that trains a model.

    Attributes:
        name: what it is called in the table.
        step: runs one training step.
    """

    name: str
    step: Callable[[], None]


def rannc(model: nn.Module, x: Tensor, target: Tensor, **forced: Any) -> Contestant:
    """The model under a plan of RaNNC."""
    own = WithLoss(copy.deepcopy(model))
    optimizer = torch.optim.Adam(own.parameters())
    wrapped = pyrannc.RaNNCModule(own, optimizer, config=pyrannc.Config(**forced))

    def step() -> None:
        optimizer.zero_grad()
        wrapped(x, target).backward()
        optimizer.step()

    return Contestant("RaNNC", step)


def data_parallel(model: nn.Module, x: Tensor, target: Tensor) -> Contestant:
    """A copy of the model on every process."""
    own = nn.parallel.DistributedDataParallel(WithLoss(copy.deepcopy(model)))
    optimizer = torch.optim.Adam(own.parameters())

    def step() -> None:
        optimizer.zero_grad()
        own(x, target).backward()
        optimizer.step()

    return Contestant("DistributedDataParallel", step)


def pipeline(model: nn.Module, x: Tensor, target: Tensor, cut: str) -> Contestant:
    """Two stages with as many rows as all processes bring together."""
    rank, device = dist.get_rank(), torch.device("cpu")
    x, target = gathered(x), gathered(target)
    split = {cut: pipelining.SplitPoint.BEGINNING}
    part = x[: len(x) // MICROBATCHES]
    stage = pipelining.pipeline(copy.deepcopy(model), (part,), split_spec=split).build_stage(
        rank, device
    )
    schedule = pipelining.Schedule1F1B(stage, MICROBATCHES, loss_fn=cross_entropy)
    optimizer = torch.optim.Adam(stage.submod.parameters())

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)
        optimizer.step()

    return Contestant("torch.distributed.pipelining", step)


def gathered(local: Tensor) -> Tensor:
    """The rows of all processes."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def pair(kind: str, name: str) -> tuple[Contestant, Contestant]:
    """RaNNC and its peer for one model."""
    make, rows = MODELS[name]
    torch.manual_seed(0)
    model, x, target, cut = make(rows)
    if kind == "data parallel":
        return rannc(model, x, target), data_parallel(model, x, target)
    forced = {
        "partition_num": 2,
        "replica_num": 1,
        "pipeline_num": MICROBATCHES,
        "schedule": "1f1b",
    }
    return rannc(model, x, target, **forced), pipeline(model, x, target, cut)


def timed(contestants: tuple[Contestant, ...], rounds: int) -> list[float]:
    """Median milliseconds of a step of each, as long as on the slowest process."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(WARM_UP + rounds):
        for contestant, own in zip(contestants, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            contestant.step()
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn >= WARM_UP:
                own.append(took.item() * 1e3)
    return [statistics.median(own) for own in times]


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only pairs whose names contain this text")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        raise SystemExit("start 2 processes: the pipelines have two stages")
    rows = ["| pair | peer | RaNNC ms | peer ms | peer over RaNNC |", "|---|---|---:|---:|---:|"]
    for kind in ("data parallel", "pipeline of 2 stages"):
        for name in MODELS:
            if arguments.only not in f"{kind}, {name}":
                continue
            ours, peer = pair(kind, name)
            mine, theirs = timed((ours, peer), arguments.rounds)
            rows.append(
                f"| {kind}, {name} | {peer.name} | {mine:.1f} | {theirs:.1f} "
                f"| {theirs / mine:.2f} |"
            )
            pyrannc.clear()
    if dist.get_rank() == 0:
        print("\n".join(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
