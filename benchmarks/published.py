"""Predicted times and memory against what the original printed in its published logs.

    python benchmarks/published.py

The logs are those of the original's tutorial (8 A100 40 GB) and of its examples BERT 4.9 B (8 V100
32 GB) and ResNet-152 x8 (32 V100 32 GB). The same deployments are simulated here: stages with as
many parameters, the same replicas and microbatches, and everything computed again in backward where
the original did. Costs are estimated from the data of the devices' presets. Times of a stage are
per microbatch.

Of the published numbers, forward and backward were measured on a device; all-reduce is a formula
(parameter bytes at 10 GiB/s), and of the memory the optimizer's part is one, too. What is left of
the memory in float32 is three times the parameters and the activations, in half precision twice: a
second copy of the parameters that a step does not need. It is listed apart.

The BERT log does not tell the length of its sequences. With 512 tokens its forward would run at 141
TFLOP/s, more than the device's peak of 125; so these are taken to be the 128 of BERT's first phase.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
        cluster: a preset.
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
        "bert_4_9b_half", "v100-32gb:1x8", 64, 8, 8.0, True,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rannc", default=shutil.which("rannc"), help="the command `rannc`")
    rannc = parser.parse_args().rannc
    if rannc is None:
        parser.error("there is no command `rannc`; build it, or say where it is with --rannc")
    for name, log in LOGS.items():
        with tempfile.TemporaryDirectory() as folder:
            predicted = Deployment(log, Path(folder)).simulated(rannc)
        replicas = "/".join(str(stage.replicas) for stage in log.stages)
        print(f"\n{name}: batch {log.batch}, microbatches: {log.microbatches}, replicas {replicas}")
        print("\n| stage | | published | predicted | ratio |\n|---|---|---:|---:|---:|")
        for index, (published, ours) in enumerate(zip(log.stages, predicted, strict=True)):
            for text in lines(index, published, ours):
                print(text)
            if not log.half:
                print(line_with_copy(index, published, ours))


@dataclass(frozen=True)
class Predicted:
    """What a stage takes; times in nanoseconds for one microbatch."""

    forward_ns: float
    backward_ns: float
    all_reduce_ns: float
    memory_bytes: int

    @classmethod
    def of_rank(cls, rank: int, ranks: list[dict[str, Any]], events: Any) -> Predicted:
        """Taken from the simulation's answer and timeline."""

        def total(category: str, start: str, end: str = "") -> float:
            return 1e3 * sum(
                event["dur"]
                for event in events["traceEvents"]
                if event["pid"] == rank
                and event.get("cat") == category
                and event["name"].startswith(start)
                and event["name"].endswith(end)
            )

        return cls(
            forward_ns=total("forward", "F", " 0"),
            backward_ns=total("backward", "B", " 0"),
            all_reduce_ns=total("reduce", "reduce gradients"),
            memory_bytes=ranks[rank]["memory_bytes"],
        )


class Deployment:
    """The deployment of a log: its stages, cut where its parameters say.

    The log's all-reduce times are a formula, the stage's parameter bytes at 10 GiB/s, so they tell
    how many parameters each stage has. Stages are stretches of the graph with so many.
    """

    def __init__(self, log: Log, folder: Path) -> None:
        import torch

        from benchmarks import models
        from pyrannc import _core
        from pyrannc.capture import capture

        with torch.device("meta"):
            model, args, kwargs = getattr(models, log.model)()
        text = capture(model.train(), args, kwargs).graph_json
        self._log = log
        self._folder = folder
        self._graph = json.loads(text)
        (folder / "graph.json").write_text(text)
        # Any deployment of the model, for its form.
        graph = _core.Graph.from_json(text)
        example = _core.plan(graph, "h100-80gb:64x8", batch_size=512, mem_limit_gb=1e6)
        self._form = json.loads(example.to_json())

    def simulated(self, rannc: str) -> list[Predicted]:
        """What the stages take, as `rannc simulate` tells."""
        log, folder = self._log, self._folder
        deployment, trace = folder / "deployment.json", folder / "trace.json"
        deployment.write_text(json.dumps(self._deployment()))
        done = subprocess.run(
            [
                rannc, "simulate", str(deployment), str(folder / "graph.json"), "--json",
                "--cluster", log.cluster, "--trace", str(trace),
                "--optimizer-state-factor", str(log.optimizer_state_factor),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )  # fmt: skip
        ranks = json.loads(done.stdout)["ranks"]
        events = json.loads(trace.read_text())
        return [Predicted.of_rank(stage["ranks"][0], ranks, events) for stage in self._stages()]

    def _deployment(self) -> dict[str, Any]:
        form = {key: value for key, value in self._form.items() if key != "estimates"}
        log = self._log
        return form | {
            "world_size": sum(stage.replicas for stage in log.stages),
            "batch_size": log.batch,
            "microbatches": log.microbatches,
            "schedule": "fill_drain",
            "stages": self._stages(),
        }

    def _stages(self) -> list[dict[str, Any]]:
        """Stretches of the graph that read as many bytes of parameters as the log's stages."""
        log = self._log
        listed = {key for stage in self._form["stages"] for key in stage["nodes"]}
        nodes = [node for node in self._graph["nodes"] if node["key"] in listed]
        total = sum(stage.all_reduce_us for stage in log.stages)
        own = sum(self._new_bytes(nodes))
        cuts: list[list[str]] = [[] for _ in log.stages]
        stage, read, until = 0, 0, log.stages[0].all_reduce_us
        for node, size in zip(nodes, self._new_bytes(nodes), strict=True):
            if (read + size / 2) * total > until * own and stage + 1 < len(cuts):
                stage += 1
                until += log.stages[stage].all_reduce_us
            read += size
            cuts[stage].append(node["key"])
        first, found = 0, []
        for keys, published in zip(cuts, log.stages, strict=True):
            ranks = list(range(first, first + published.replicas))
            first += published.replicas
            recompute = {"recompute": [keys]} if log.microbatches > 1 else {}
            found.append({"ranks": ranks, "nodes": keys} | recompute)
        return found

    def _new_bytes(self, nodes: list[dict[str, Any]]) -> list[int]:
        """Bytes of the parameters that each operator is the first to read."""
        values, seen, sizes = self._graph["values"], set(), []
        for node in nodes:
            new = {v for v in node["inputs"] if values[v]["kind"] == "parameter"} - seen
            seen |= new
            sizes.append(sum(math.prod(values[value]["shape"]) for value in new))
        return sizes


def lines(index: int, published: Stage, ours: Predicted) -> list[str]:
    """The comparison of one stage."""
    return [
        line(index, "forward", published.forward_us / 1e3, ours.forward_ns / 1e6, "ms"),
        line(index, "backward", published.backward_us / 1e3, ours.backward_ns / 1e6, "ms"),
        line(index, "all-reduce", published.all_reduce_us / 1e3, ours.all_reduce_ns / 1e6, "ms"),
        line(index, "memory", published.memory_bytes / 1e9, ours.memory_bytes / 1e9, "GB"),
    ]


def line_with_copy(index: int, published: Stage, ours: Predicted) -> str:
    """The memory that the original counts: with the parameters once more."""
    parameters = published.all_reduce_us * 10 * 2**30 // 10**6
    memory = ours.memory_bytes + parameters
    what = "memory, parameters counted twice"
    return line(index, what, published.memory_bytes / 1e9, memory / 1e9, "GB")


def line(index: int, what: str, published: float, ours: float, unit: str) -> str:
    """One line of a table."""
    ratio = f"{ours / published:.2f}"
    if unit == "GB" and published < 1:
        published, ours, unit = published * 1e3, ours * 1e3, "MB"
    return f"| {index} | {what} | {published:,.2f} {unit} | {ours:,.2f} {unit} | {ratio} |"


if __name__ == "__main__":
    main()
