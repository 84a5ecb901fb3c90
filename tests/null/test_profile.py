"""Measured times: complete, kept, harmless to the model, and absent where they cannot be had."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pyrannc._core import Graph
from pyrannc.capture import Captured, capture
from pyrannc.config import Config
from pyrannc.profile import profile
from tests.models import QUICK_CASES, Case, case

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(profile_cache_dir=str(tmp_path / "cache"))


def graph_of(captured: Captured) -> Graph:
    return Graph.from_json(captured.graph_json)


def measure(captured: Captured, config: Config, rows: tuple[int, ...] = (2, 8)) -> dict[str, Any]:
    text = profile(captured, graph_of(captured), rows, CPU, config=config)
    assert text is not None
    measured: dict[str, Any] = json.loads(text)
    return measured


@pytest.mark.parametrize("model", QUICK_CASES, ids=str)
def test_every_operator_has_times(model: Case, config: Config) -> None:
    module = model.make_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    args, kwargs = model.make_batch(8)
    captured = capture(module, args, kwargs)
    measured = measure(captured, config)
    graph = json.loads(captured.graph_json)
    assert set(measured["entries"]) == {node["signature"] for node in graph["nodes"]}
    for samples in measured["entries"].values():
        assert all(sample["forward_ns"] > 0 for sample in samples)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in module.parameters())


def test_larger_batches_take_longer_and_backward_counts(config: Config) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    captured = capture(model, (torch.randn(8, 256),), {})
    measured = measure(captured, config, (8, 512))
    graph = json.loads(captured.graph_json)
    small, large = measured["entries"][graph["nodes"][1]["signature"]]
    assert (small["rows"], large["rows"]) == (8, 512)
    assert large["forward_ns"] > 2 * small["forward_ns"]
    assert large["backward_ns"] > large["forward_ns"] // 2
    assert 300_000 < measured["calibration"]["forward_ppm"] < 3_000_000


def test_the_second_time_comes_from_the_cache(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case("fork_join")
    args, kwargs = model.make_batch(8)
    captured = capture(model.make_model(), args, kwargs)
    first = measure(captured, config)
    monkeypatch.setattr("pyrannc._stopwatch.build_stage", None)
    assert measure(captured, config) == first


def test_damaged_cache_is_measured_again(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case("one_op")
    args, kwargs = model.make_batch(8)
    captured = capture(model.make_model(), args, kwargs)
    measure(captured, config)
    (path,) = (tmp_path / "cache").iterdir()
    stored = json.loads(path.read_text())
    stored["value"]["times"] = {"x": 3}
    path.write_text(json.dumps(stored))
    assert measure(captured, config)["entries"]
    assert "ignoring cached times that are malformed" in caplog.text


def test_randomness_is_left_alone(config: Config) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    captured = capture(model, (torch.randn(8, 4),), {})
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    measure(captured, config)
    assert torch.equal(torch.rand(3), expected)


def test_out_of_time_means_estimates(config: Config) -> None:
    model = case("fork_join")
    args, kwargs = model.make_batch(8)
    captured = capture(model.make_model(), args, kwargs)
    text = profile(captured, graph_of(captured), (2, 8), CPU, config=config, time_limit_s=0)
    measured = json.loads(text or "")
    assert all(len(samples) == 1 for samples in measured["entries"].values())
    assert measured["calibration"] == {"forward_ppm": 1_000_000, "backward_ppm": 1_000_000}


def test_no_memory_at_a_size_leaves_the_others(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyrannc._stopwatch import Stopwatch

    whole = Stopwatch.random

    def limited(self: Stopwatch, value: int, rows: int) -> torch.Tensor:
        if rows > 4:
            raise torch.OutOfMemoryError
        return whole(self, value, rows)

    monkeypatch.setattr(Stopwatch, "random", limited)
    model = case("fork_join")
    args, kwargs = model.make_batch(8)
    measured = measure(capture(model.make_model(), args, kwargs), config)
    rows = [[sample["rows"] for sample in samples] for samples in measured["entries"].values()]
    assert rows == [[2]] * len(rows)


def test_models_without_data_are_not_measured(config: Config) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
        captured = capture(model, (torch.randn(8, 4),), {})
    assert profile(captured, graph_of(captured), (2, 8), CPU, config=config) is None
