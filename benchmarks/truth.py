"""Compares what the planner predicts with what happens on this machine's CPU.

    python benchmarks/truth.py                    all runs; under 6 minutes on 2 quiet cores
    python benchmarks/truth.py --only gpt --steps 5

Each run starts fresh processes, one thread each, that train a model under a forced plan. Printed
are, as a table in Markdown, the predicted and the measured time of a step (forward, backward and
reductions, without the optimizer's own step; the median over steps after warm-up, each as long as
on its slowest process) and the peak of the memory in tensors on the fullest process: parameters,
gradients, optimizer state, activations, everything that is alive at once, in a whole training step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 90
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One model under one forced plan."""

    model: str
    world_size: int
    stages: int
    replicas: int
    microbatches: int
    schedule: str
    rows: int  # of the global batch

    def __str__(self) -> str:
        plan = f"{self.stages} x {self.replicas}, {self.microbatches} of {self.schedule}"
        return f"{self.model}: {plan}"


RUNS = [
    Run("gpt", 1, 1, 1, 1, "fill_drain", 8),
    Run("gpt", 1, 1, 1, 4, "1f1b", 16),
    Run("gpt", 2, 2, 1, 4, "1f1b", 16),
    Run("gpt", 2, 2, 1, 4, "fill_drain", 16),
    Run("gpt", 2, 1, 2, 2, "1f1b", 16),
    Run("gpt", 4, 2, 2, 4, "1f1b", 32),
    Run("gpt", 4, 4, 1, 8, "1f1b", 32),
    Run("mlp", 1, 1, 1, 1, "fill_drain", 256),
    Run("mlp", 2, 2, 1, 4, "1f1b", 512),
    Run("mlp", 2, 1, 2, 1, "fill_drain", 512),
    Run("mlp", 4, 4, 1, 4, "fill_drain", 512),
    Run("conv", 1, 1, 1, 2, "1f1b", 32),
    Run("conv", 2, 2, 1, 4, "1f1b", 32),
    Run("conv", 4, 1, 4, 1, "fill_drain", 64),
    Run("bert", 1, 1, 1, 2, "fill_drain", 8),
    Run("bert", 2, 2, 1, 4, "1f1b", 16),
    Run("bert", 2, 1, 2, 1, "fill_drain", 16),
]


# ---- In each process of a run


def make_gpt(rows: int) -> tuple[Any, tuple[Any, ...]]:
    """The example's GPT, which returns its loss."""
    import torch
    from gpt import GPT, GPTConfig

    tokens = torch.randint(2048, (rows, 129))
    return GPT(GPTConfig(2048, 128, 256, 4, 6)), (tokens[:, :-1], tokens[:, 1:])


def make_mlp(rows: int) -> tuple[Any, tuple[Any, ...]]:
    """Wide linears, which return a loss: more parameters than activations."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU())]
            self.layers = nn.Sequential(*layers, nn.Linear(1024, 128))

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.layers(x), target)

    return Classifier(), (torch.randn(rows, 1024), torch.randint(128, (rows,)))


def make_conv(rows: int) -> tuple[Any, tuple[Any, ...]]:
    """A convolutional net with group norms and residuals: more activations than parameters."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)
            self.norm = nn.GroupNorm(8, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.norm(self.conv(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [32, 64, 128]
            parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
            for width, following in zip(widths, [*widths[1:], 256], strict=True):
                parts += [Block(width), Block(width), nn.Conv2d(width, following, 2, stride=2)]
            self.body = nn.Sequential(*parts)
            self.head = nn.Linear(256, 100)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.head(self.body(x).mean((2, 3))), target)

    return Net(), (torch.randn(rows, 3, 32, 32), torch.randint(100, (rows,)))


def make_bert(rows: int) -> tuple[Any, tuple[Any, ...]]:
    """BERT of the package transformers with its masked-word loss, dropouts included."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertForMaskedLM

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=4096,
                hidden_size=256,
                num_hidden_layers=6,
                num_attention_heads=4,
                intermediate_size=1024,
                max_position_embeddings=128,
            )
            self.bert = BertForMaskedLM(config)

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=tokens, labels=labels).loss

    tokens = torch.randint(4096, (rows, 128))
    return Loss(), (tokens, tokens.masked_fill(torch.rand(rows, 128) > 0.15, -100))


MODELS = {"gpt": make_gpt, "mlp": make_mlp, "conv": make_conv, "bert": make_bert}


def live_storages() -> dict[int, Any]:
    """All tensor memory of this process that holds data, by address."""
    import torch
    from torch._subclasses import FakeTensor

    found = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or isinstance(thing, FakeTensor):
            continue
        if thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage
    return found


def peak_bytes(step: Callable[[], object]) -> tuple[int, int]:
    """The most bytes in tensors at any time of a step, and those alive before it.

    Every operator's results are noted when it returns and forgotten when their memory is freed;
    what an operator allocates and frees inside is not seen.
    """
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    gc.collect()
    state = {"now": 0, "peak": 0}
    known: dict[int, Any] = {}

    def forget(key: int, size: int) -> None:
        known.pop(key, None)
        state["now"] -= size

    def note(storage: torch.UntypedStorage) -> None:
        if storage._cdata in known or not storage.nbytes():
            return
        key, size = storage._cdata, storage.nbytes()
        known[key] = weakref.finalize(storage, forget, key, size)
        state["now"] += size
        state["peak"] = max(state["peak"], state["now"])

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    note(tensor.untyped_storage())
            return result

    for storage in live_storages().values():
        note(storage)
    before = state["now"]
    with Watch():
        step()
    for finalizer in list(known.values()):
        finalizer.detach()
    return state["peak"], before


def work(run: Run, rank: int, seconds: float, cache: str) -> dict[str, Any]:
    """Trains for a while; what was predicted and what happened on this process."""
    sys.path.insert(0, str(ROOT / "examples"))
    import torch

    import pyrannc

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = MODELS[run.model](run.rows)
    share = run.rows // run.world_size
    batch = tuple(tensor[rank * share : (rank + 1) * share].clone() for tensor in batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    config = pyrannc.Config(
        partition_num=run.stages,
        replica_num=run.replicas,
        pipeline_num=run.microbatches,
        schedule=run.schedule,
        profile_cache_dir=cache,
        timeout_s=MOST_SECONDS,
    )
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config)

    def step() -> float:
        optimizer.zero_grad()
        pyrannc.barrier()
        start = time.perf_counter()
        wrapped(*batch).backward()
        took = time.perf_counter() - start
        optimizer.step()
        return took

    for _ in range(3):
        step()
    peak, before = peak_bytes(step)
    step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        times.append(step())
        # All processes must do equally many steps.
        counted = torch.tensor([sum(times)])
        if run.world_size > 1:
            torch.distributed.broadcast(counted, 0)
        if counted.item() >= seconds and len(times) >= 5:
            break
    plan = wrapped.deployment
    return {
        "times": times,
        "peak": peak,
        "before": before,
        "predicted_ns": plan.predicted_step_ns,
        "predicted_bytes": plan.predicted_bytes[rank],
        "plan": json.loads(plan.to_json())["estimates"],
        "stage_ranks": plan.stage_ranks,
    }


# ---- In the process that starts the others


def start(run: Run, seconds: float, cache: Path, folder: Path) -> list[dict[str, Any]]:
    """Runs one case in processes of its own; each one's result.

    Raises:
        RuntimeError: when one fails or takes too long.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(run.world_size):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run.world_size),
            "LOCAL_WORLD_SIZE": str(run.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        job = {"run": asdict(run), "rank": rank, "seconds": seconds, "cache": str(cache)}
        job["result"] = str(folder / f"{rank}.json")
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        log = (folder / f"{rank}.log").open("wb")
        processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    deadline = time.monotonic() + MOST_SECONDS
    try:
        for rank, process in enumerate(processes):
            try:
                code = process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"rank {rank} took more than {MOST_SECONDS} s") from None
            if code:
                text = (folder / f"{rank}.log").read_text(errors="replace")
                raise RuntimeError(f"rank {rank} failed: {text[-2000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(run.world_size)]


def ranks_of(numbers: list[float]) -> list[float]:
    """Each number's position in the order, the middle one for equals."""
    order = sorted(numbers)
    return [order.index(n) + (order.count(n) - 1) / 2 for n in numbers]


def report(results: list[tuple[Run, list[dict[str, Any]]]]) -> None:
    """Prints the table and what it amounts to."""
    print(
        "| model | stages x replicas | microbatches | predicted ms | measured ms | error ", end=""
    )
    print("| predicted MiB | measured MiB | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    predicted, measured, time_errors, memory_errors = [], [], [], []
    for run, found in results:
        slowest = [max(times) for times in zip(*(one["times"] for one in found), strict=True)]
        took = statistics.median(slowest) * 1e3
        expected = found[0]["predicted_ns"] / 1e6
        errors = [one["predicted_bytes"] / one["peak"] - 1 for one in found]
        fullest = max(found, key=lambda one: one["peak"])
        predicted.append(expected)
        measured.append(took)
        time_errors.append(expected / took - 1)
        memory_errors += errors
        print(
            f"| {run.model} | {run.stages} x {run.replicas} | {run.microbatches} of {run.schedule}"
            f" | {expected:.1f} | {took:.1f} | {time_errors[-1]:+.1%}"
            f" | {fullest['predicted_bytes'] / MIB:.1f} | {fullest['peak'] / MIB:.1f}"
            f" | {max(errors, key=abs):+.1%} |"
        )
    print()
    print(f"{len(results)} runs. Median absolute error of the time: ", end="")
    print(f"{statistics.median(map(abs, time_errors)):.1%}. Rank correlation (Spearman): ", end="")
    correlation = statistics.correlation(ranks_of(predicted), ranks_of(measured))
    print(f"{correlation:.3f}. Error of the memory, over all processes: median ", end="")
    worst = max(memory_errors, key=abs)
    print(f"{statistics.median(map(abs, memory_errors)):.1%}, worst {worst:+.1%}.")


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only runs whose names contain this text")
    parser.add_argument("--seconds", type=float, default=2.5, help="of steps in each run")
    parser.add_argument("--json", help="a file for all that was found")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job = json.loads(arguments.worker)
        result = work(Run(**job["run"]), job["rank"], job["seconds"], job["cache"])
        Path(job["result"]).write_text(json.dumps(result))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for run in RUNS:
            if arguments.only not in str(run):
                continue
            try:
                found = start(run, arguments.seconds, cache, Path(folder))
            except RuntimeError as problem:
                print(f"{run} failed: {problem}", file=sys.stderr)
                continue
            results.append((run, found))
            print(f"{run} is done", file=sys.stderr)
    if arguments.json:
        described = [{"run": asdict(run), "found": found} for run, found in results]
        Path(arguments.json).write_text(json.dumps(described, indent=1))
    if len(results) > 1:
        report(results)


if __name__ == "__main__":
    main()
