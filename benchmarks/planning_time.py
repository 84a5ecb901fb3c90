"""How long planning takes, from a model to its deployment, without any device.

    python benchmarks/planning_time.py                    # all cases, as a markdown table
    python benchmarks/planning_time.py --case bert_4_9b   # one of them

Each case runs in a process of its own: the model is made and captured on the meta device, operators
are priced by the data of the cluster's devices, and the planner searches. The time counted is the
wall clock of capturing and planning, first-time imports of torch's exporter included; importing
torch and making the model are listed apart. Targets are for two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A model to plan for a cluster.

    Attributes:
        model: the function in `benchmarks/models.py`.
        cluster: a preset.
        batch: rows of the global batch.
        target_s: the time that capturing and planning may take.
        original: how long the original took, as its documentation says.
        sharding: the most that replicas may divide.
    """

    model: str
    cluster: str
    batch: int
    target_s: int
    original: str = ""
    sharding: str = "none"


CASES = {
    "tutorial": Case("tutorial_large", "a100-40gb:1x8", 512, 3, "about 5 min"),
    "bert_4_9b": Case("bert_4_9b", "v100-32gb:4x8", 1024, 10, "4 h"),
    "resnet152x8": Case("resnet152x8", "v100-32gb:4x8", 1024, 10, "3 h"),
    "bert_100b_256": Case("bert_100b", "a100-40gb:32x8", 1024, 20),
    "bert_100b_1024": Case("bert_100b", "a100-40gb:128x8", 4096, 20),
    "gpt_1t": Case("gpt_1t", "h100-80gb:384x8", 3072, 60, sharding="optimizer"),
}


@dataclass
class Outcome:
    """What one case took."""

    parameters: int
    operators: int
    import_s: float
    make_s: float
    capture_s: float
    plan_s: float
    capture_cpu_s: float
    plan_cpu_s: float
    plan: str
    peak_gb: float


def main() -> None:
    """Runs the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), help="run this one only")
    parser.add_argument("--json", action="store_true", help="run `--case` here; print JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(asdict(run(CASES[arguments.case]))))
        return
    names = [arguments.case] if arguments.case else list(CASES)
    print(
        "| case | parameters | operators | cluster | batch | import torch | make model | capture "
        "| plan | capture + plan | target | original | peak memory | deployment |\n"
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---|"
    )
    for name in names:
        print(row(name, apart(name)), flush=True)


def apart(name: str) -> Outcome | str:
    """The outcome of a case in a process of its own, or why there is none."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", name, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return f"failed with exit code {done.returncode}"
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def row(name: str, outcome: Outcome | str) -> str:
    """A line of the table."""
    case = CASES[name]
    if isinstance(outcome, str):
        return f"| {name} | {outcome} |" + " |" * 12
    total = outcome.capture_s + outcome.plan_s
    cells = [
        name,
        f"{outcome.parameters / 1e9:.2f} B",
        f"{outcome.operators:,}",
        f"`{case.cluster}`",
        f"{case.batch:,}",
        f"{outcome.import_s:.1f} s",
        f"{outcome.make_s:.1f} s",
        f"{outcome.capture_s:.2f} s (processor {outcome.capture_cpu_s:.2f} s)",
        f"{outcome.plan_s:.2f} s (processor {outcome.plan_cpu_s:.2f} s)",
        f"**{total:.2f} s**",
        f"{case.target_s} s",
        case.original,
        f"{outcome.peak_gb:.2f} GB",
        outcome.plan,
    ]
    return "| " + " | ".join(cells) + " |"


def run(case: Case) -> Outcome:
    """Runs a case in this process."""
    sys.path.insert(0, str(ROOT))
    start = time.perf_counter()
    import torch

    from benchmarks import models
    from pyrannc import _core
    from pyrannc.capture import capture

    imported = time.perf_counter()
    with torch.device("meta"):
        model, args, kwargs = getattr(models, case.model)()
    model.train()
    made = time.perf_counter()
    processor = time.process_time()
    graph = _core.Graph.from_json(capture(model, args, kwargs).graph_json)
    processor = time.process_time() - processor
    captured = time.perf_counter()
    planning = time.process_time()
    plan = planned(graph, case)
    planning = time.process_time() - planning
    done = time.perf_counter()
    return Outcome(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        operators=len(json.loads(graph.to_json())["nodes"]),
        import_s=imported - start,
        make_s=made - imported,
        capture_s=captured - made,
        capture_cpu_s=processor,
        plan_cpu_s=planning,
        plan_s=done - captured,
        plan=plan,
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    )


def planned(graph: Any, case: Case) -> str:
    """The deployment in short, or why there is none."""
    from pyrannc import DoesNotFitError, _core

    try:
        plan = _core.plan(graph, case.cluster, batch_size=case.batch, sharding=case.sharding)
    except DoesNotFitError as error:
        return f"none: {error.message}"
    stages = [len(stage["ranks"]) for stage in json.loads(plan.to_json())["stages"]]
    replicas = f"{stages[0]}" if len(set(stages)) == 1 else f"{min(stages)} to {max(stages)}"
    step = plan.predicted_step_ns / 1e9
    return (
        f"{len(stages)} stages x {replicas} replicas, {plan.microbatches} microbatches, "
        f"{plan.schedule}; step {step:.2f} s simulated"
    )


if __name__ == "__main__":
    main()
