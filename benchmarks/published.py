"""Predicted times and memory against what the original printed in its published logs.

    python benchmarks/published.py

The logs are those of the original's tutorial (8 A100 40 GB) and of its examples BERT 4.9 B (8 V100
32 GB) and ResNet-152 x8 (32 V100 32 GB). Stage and microbatch counts are forced to the log's;
costs are estimated from the data of the devices' presets. Times of a stage are per microbatch; the
log's all-reduce time is the whole gradient's. All of the original's numbers are its own profiler's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

V100_HALF_FLOPS = 125_000_000_000_000
"""Peak of a V100 SXM2 with half-precision operands (NVIDIA's data sheet)."""


@dataclass(frozen=True)
class Stage:
    """A stage in a log; times in microseconds."""

    replicas: int
    forward_us: int
    backward_us: int
    all_reduce_us: int
    memory_bytes: int


@dataclass(frozen=True)
class Log:
    """A published log.

    Attributes:
        model: the function in `benchmarks/models.py`.
        cluster: a preset, or a cluster's JSON.
        batch: rows of the global batch.
        microbatches: with more than one the original computes every stage again in backward.
        optimizer_state_factor: bytes of optimizer state per byte of parameters.
        half: whether parameters and activations are half-precision, as with Apex's O2.
        stages: what it printed.
    """

    model: str
    cluster: str
    batch: int
    microbatches: int
    optimizer_state_factor: float
    half: bool
    stages: tuple[Stage, ...]


def _half_precision_v100s(count: int) -> str:
    device = {"kind": "v100-32gb", "count": count, "flops_per_second": V100_HALF_FLOPS}
    return json.dumps({"name": "half-precision V100", "devices": [device]})


LOGS = {
    "tutorial, small": Log(
        "tutorial_small", "a100-40gb:1x2", 128, 1, 2.0, False,
        (Stage(2, 4_722, 24_237, 978, 54_759_424),),
    ),
    "tutorial, large": Log(
        "tutorial_large", "a100-40gb:1x8", 512, 1, 2.0, False,
        (
            Stage(4, 27_516, 126_756, 437_809, 23_707_792_544),
            Stage(4, 31_228, 153_762, 493_699, 26_732_209_376),
        ),
    ),
    # Apex's O2 keeps a float32 copy of parameters and gradients, and Adam's two states.
    "BERT 4.9 B": Log(
        "bert_4_9b_half", _half_precision_v100s(8), 64, 8, 8.0, True,
        (
            Stage(2, 35_409, 110_886, 233_871, 27_080_000_000),
            Stage(2, 34_849, 110_344, 222_027, 25_740_000_000),
            Stage(2, 36_715, 115_215, 234_537, 27_190_000_000),
            Stage(2, 36_657, 112_948, 235_245, 27_410_000_000),
        ),
    ),
    "ResNet-152 x8": Log(
        "resnet152x8", "v100-32gb:4x8", 128, 4, 1.0, False,
        (
            Stage(16, 164_066, 455_616, 489_086, 23_800_000_000),
            Stage(8, 143_170, 460_086, 372_131, 17_320_000_000),
            Stage(8, 113_227, 410_329, 528_238, 23_980_000_000),
        ),
    ),
}  # fmt: skip


def main() -> None:
    """Prints a table for each log."""
    for name, log in LOGS.items():
        predicted = stages_of(log)
        print(f"\n{name}: {heading(log)}\n")
        print("| stage | | published | predicted | ratio |\n|---|---|---:|---:|---:|")
        for index, (published, ours) in enumerate(zip(log.stages, predicted, strict=True)):
            for line in lines(index, published, ours):
                print(line)
        for line in totals(log, predicted):
            print(line)


def heading(log: Log) -> str:
    """What was run."""
    replicas = "/".join(str(stage.replicas) for stage in log.stages)
    return f"batch {log.batch}, {log.microbatches} microbatches, replicas {replicas}"


def stages_of(log: Log) -> list[dict[str, Any]]:
    """Our stages: times per microbatch, memory of one of their ranks, replicas."""
    import torch

    from benchmarks import models
    from pyrannc import DoesNotFitError, _core
    from pyrannc.capture import capture

    with torch.device("meta"):
        model, args, kwargs = getattr(models, log.model)()
    graph = _core.Graph.from_json(capture(model.train(), args, kwargs).graph_json)
    replicas = {stage.replicas for stage in log.stages}
    forced = {
        "batch_size": log.batch,
        "partition_num": len(log.stages),
        "replica_num": replicas.pop() if len(replicas) == 1 else 0,
        "pipeline_num": log.microbatches,
        "optimizer_state_factor": log.optimizer_state_factor,
    }
    try:
        plan = _core.plan(graph, log.cluster, **forced)
    except DoesNotFitError as error:
        print(f"\n({error.message}: planned without that limit)")
        plan = _core.plan(graph, log.cluster, mem_limit_gb=1000.0, **forced)
    data = json.loads(plan.to_json())
    found = []
    for stage, times in zip(data["stages"], data["estimates"]["stages"], strict=True):
        memory = data["estimates"]["ranks"][stage["ranks"][0]]["memory"]
        found.append({**times, "memory": sum(memory.values()), "replicas": len(stage["ranks"])})
    return found


def lines(index: int, published: Stage, ours: dict[str, Any]) -> list[str]:
    """The comparison of one stage."""
    other = ours["replicas"] != published.replicas
    place = f"{index}" + (f" ({ours['replicas']} replicas predicted)" if other else "")
    return [
        line(place, "forward", published.forward_us / 1e3, ours["forward_ns"] / 1e6, "ms"),
        line(place, "backward", published.backward_us / 1e3, ours["backward_ns"] / 1e6, "ms"),
        line(place, "all-reduce", published.all_reduce_us / 1e3, ours["all_reduce_ns"] / 1e6, "ms"),
        line(place, "memory", published.memory_bytes / 1e9, ours["memory"] / 1e9, "GB"),
    ]


def line(place: str, what: str, published: float, ours: float, unit: str) -> str:
    """One line of a table."""
    ratio = f"{ours / published:.2f}"
    return f"| {place} | {what} | {published:,.2f} {unit} | {ours:,.2f} {unit} | {ratio} |"


def totals(log: Log, predicted: list[dict[str, Any]]) -> list[str]:
    """Times of all stages per row, which do not depend on where stages were cut."""
    rows = log.batch / log.microbatches
    forward = sum(stage.forward_us * stage.replicas for stage in log.stages) / rows / 1e3
    backward = sum(stage.backward_us * stage.replicas for stage in log.stages) / rows / 1e3
    ours = [
        sum(s[key] / s["rows"] for s in predicted) / 1e6 for key in ("forward_ns", "backward_ns")
    ]
    return [
        line("all", "forward per row", forward, ours[0], "ms"),
        line("all", "backward per row", backward, ours[1], "ms"),
    ]


if __name__ == "__main__":
    main()
