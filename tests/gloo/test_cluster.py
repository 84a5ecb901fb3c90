"""Several processes describe the same cluster."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch

from pyrannc import cluster
from pyrannc.comm import Communicator
from pyrannc.config import Config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = pytest.mark.gloo


def describe_twice(folder: str) -> list[str]:
    comm = Communicator.connect(timedelta(seconds=30), torch.device("cpu"))
    config = Config(profile_cache_dir=folder)
    described = [cluster.describe(comm, config) for _ in range(2)]
    comm.close()
    return described


def test_all_ranks_agree_and_the_second_time_is_cached(pools: Pools, tmp_path: Path) -> None:
    first, second = pools.run(2, describe_twice, str(tmp_path))
    assert first == second
    assert first[0] == first[1]
    described = json.loads(first[0])
    assert [device["node"] for device in described["devices"]] == [0, 0]
    memory = cluster.memory_bytes(torch.device("cpu"))
    assert described["devices"][1]["memory_bytes"] == memory // 2
    assert 1_000 < described["intra_node"]["latency_ns"] < 10**9
    assert described["intra_node"]["bytes_per_second"] > 10**6
    assert described["intra_node"]["reduce_bytes_per_second"] > 10**6
    for shared in described.get("shared", []):
        assert shared["devices"] == [0, 1]
        assert 100_000 < shared["capacity_ppm"] < 2_000_000
    assert described["inter_node"] == {"latency_ns": 100_000, "bytes_per_second": 10**9}
