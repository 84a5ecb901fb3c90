"""The description of one process's cluster, and the cache that keeps measured speeds."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch

from pyrannc import _cache, cluster
from pyrannc.comm import Communicator
from pyrannc.config import Config

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def comm() -> Communicator:
    return Communicator(0, 1, torch.device("cpu"), timedelta(seconds=10))


def test_constants_when_nothing_is_measured(comm: Communicator) -> None:
    first = cluster.describe(comm, Config(measure=False))
    assert first == cluster.describe(comm, Config(measure=False))
    described = json.loads(first)
    (device,) = described["devices"]
    assert device["kind"] == cluster.device_kind(torch.device("cpu"))
    assert device["memory_bytes"] == cluster.memory_bytes(torch.device("cpu"))
    assert (device["node"], device["flops_per_second"]) == (0, 100 * 10**9)
    assert described["intra_node"] == {"latency_ns": 50_000, "bytes_per_second": 2 * 10**9}


def test_measured_speeds_are_kept(comm: Communicator, tmp_path: Path) -> None:
    config = Config(profile_cache_dir=str(tmp_path / "new" / "cache"))
    first = cluster.describe(comm, config)
    assert first == cluster.describe(comm, config)
    (device,) = json.loads(first)["devices"]
    assert device["flops_per_second"] > 10**8
    assert device["memory_bytes_per_second"] > 10**8
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".json"]


def test_processes_share_memory_and_nodes_are_numbered() -> None:
    places = [
        cluster.Place("a", "cpu", 0, 100),
        cluster.Place("b", "gpu", 0, 100),
        cluster.Place("a", "cpu", 0, 100),
        cluster.Place("b", "gpu", 1, 100),
    ]
    assert [cluster._sharers(place, places) for place in places] == [2, 1, 2, 1]


def test_cores_are_shared_by_the_processes_of_a_host() -> None:
    places = [
        cluster.Place("a", "cpu", 0, 100, (0, 1)),
        cluster.Place("b", "cpu", 0, 100, (0, 1)),
        cluster.Place("a", "cpu", 0, 100, (0, 1)),
        cluster.Place("a", "cpu", 0, 100, (1, 2)),
        cluster.Place("a", "gpu", 0, 100),
    ]
    assert cluster._crowds(places) == {"a": [0, 2, 3]}
    assert cluster._room_ppm([0, 2, 3], places) == 3_000_000
    assert cluster._room_ppm([0, 2], places) == 2_000_000
    assert cluster._room_ppm([0, 0, 2, 2], places) == 2_000_000
    constants = cluster._constants(torch.device("cpu"), places[:3])
    assert constants["capacities"] == {"a": 2_000_000}


def test_cache_survives_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / _cache.file_name("test", ["key", 1])
    assert _cache.load(path, ["key", 1]) == {}
    _cache.store(path, ["key", 1], {"x": 2})
    assert _cache.load(path, ["key", 1]) == {"x": 2}
    with caplog.at_level(logging.WARNING):
        assert _cache.load(path, ["other"]) == {}
        path.write_text('{"key": [')
        assert _cache.load(path, ["key", 1]) == {}
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"ignoring the cache file {path}"
    ] * 2


def test_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        _cache.store(tmp_path / "file" / "x.json", 1, {})
    assert "cannot write the cache file" in caplog.text
    _cache.store(None, 1, {})
    assert _cache.load(None, 1) == {}
