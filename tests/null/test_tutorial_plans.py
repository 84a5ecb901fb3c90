"""The plans of the tutorial's two published cases, made on the meta device, without any device."""

from __future__ import annotations

import json

import torch

from examples.tutorial import Net
from pyrannc import _core
from pyrannc.capture import capture

GIB = 2**30


def plan_for(hidden: int, layers: int, devices: int) -> dict[str, object]:
    with torch.device("meta"):
        model = Net(hidden, layers)
        batch = torch.empty(64, hidden)
    graph = _core.Graph.from_json(capture(model, (batch,)).graph_json)
    plan = _core.plan(graph, f"a100-40gb:1x{devices}", batch_size=64 * devices)
    return json.loads(plan.to_json())


def test_the_small_one_is_data_parallel_only() -> None:
    plan = plan_for(512, 10, 2)
    assert [stage["ranks"] for stage in plan["stages"]] == [[0, 1]]
    assert plan["microbatches"] == 1


def test_the_large_one_needs_stages_and_fits() -> None:
    plan = plan_for(5000, 100, 8)
    assert len(plan["stages"]) >= 2
    assert sorted(rank for stage in plan["stages"] for rank in stage["ranks"]) == list(range(8))
    state = 0
    for rank in plan["estimates"]["ranks"]:
        memory = rank["memory"]
        assert sum(memory.values()) <= rank["limit_bytes"] < 40 * GIB
        assert memory["optimizer"] == 2 * memory["gradients"]  # Adam, and nothing sharded
        state += memory["parameters"]
    stages = [stage["ranks"] for stage in plan["stages"]]
    replicated = sum(
        len(ranks) * plan["estimates"]["ranks"][ranks[0]]["memory"]["parameters"]
        for ranks in stages
    )
    assert state == replicated
    once = sum(plan["estimates"]["ranks"][ranks[0]]["memory"]["parameters"] for ranks in stages)
    assert once == 2_500_500_000 * 4
