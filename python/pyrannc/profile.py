"""How long each operator takes here, forward and backward.

Every distinct operator signature is run once on random data, at a few numbers of rows. Sums of
parts come out too low or too high, so a stretch of the graph is then run as a whole and its times
divided by the sums: the calibration. Times are those of a process that has its cores to itself; how
much others slow it down is said by the cluster. Measured times are kept on disk, by device and
settings. The result is the JSON form of `rannc_cost::Profile`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensor

from pyrannc import _cache, cluster
from pyrannc._progress import progress
from pyrannc._stopwatch import ENOUGH_TO_CALIBRATE, Stopwatch, Times

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pyrannc._core import Graph
    from pyrannc.capture import Captured
    from pyrannc.config import Config

logger = logging.getLogger(__name__)

_FORMAT = "rannc.profile/1"
_TIME_LIMIT_S = 60.0
_CALIBRATION_NODES = 2000
_PPM = 1_000_000


def profile(
    captured: Captured,
    graph: Graph,
    rows: Sequence[int],
    device: torch.device,
    *,
    config: Config,
    time_limit_s: float = _TIME_LIMIT_S,
) -> str | None:
    """The times of all operators of a graph as JSON; none when its parameters hold no data.

    Args:
        captured: the model.
        graph: its graph; calibrations are kept under its fingerprint.
        rows: the numbers of rows to measure at.
        device: where to run.
        config: where measured times are kept.
        time_limit_s: after about so long, operators not yet measured are estimated.
    """
    if any(_has_no_data(parameter) for parameter in captured.module.parameters()):
        return None
    description = json.loads(captured.graph_json)
    static_rows = captured.static_rows
    wanted = sorted(set(rows)) if static_rows is None else [static_rows]
    settings = _settings(device)
    key = {"device": cluster.device_kind(device), "settings": settings}
    folder = config.profile_cache_path()
    path = None if folder is None else folder / _cache.file_name("profile", key)
    profiler = _Profiler(captured, description, device, time_limit_s)
    profiler.known = _Known.from_json(_cache.load(path, key))
    with torch.enable_grad(), _own_randomness(device):
        calibration = profiler.run(wanted, graph.fingerprint())
    _keep(path, key, profiler.known)
    entries = {
        signature: profiler.known.samples(signature, wanted) or [profiler.estimates[signature]]
        for signature in sorted({node["signature"] for node in description["nodes"]})
    }
    return json.dumps(
        {
            "format": _FORMAT,
            "device": key["device"],
            "settings": settings,
            "calibration": calibration,
            "entries": entries,
        }
    )


Sample = dict[str, int]


@dataclass
class _Known:
    """Measured times by signature and rows, and calibrations by graph; in this form on disk."""

    times: dict[str, dict[int, Times]] = field(default_factory=dict)
    calibrations: dict[str, dict[str, int]] = field(default_factory=dict)
    fresh: bool = False

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> _Known:
        """Reads what `to_json` wrote; nothing from anything else."""
        try:
            times = {
                str(signature): {
                    int(rows): Times(int(one), int(other)) for rows, one, other in samples
                }
                for signature, samples in stored.get("times", {}).items()
            }
            calibrations = {
                str(graph): {name: int(found[name]) for name in ("forward_ppm", "backward_ppm")}
                for graph, found in stored.get("calibrations", {}).items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("ignoring cached times that are malformed: %s", error)
            return cls()
        return cls(times, calibrations)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        times = {
            signature: [[rows, *found.as_pair()] for rows, found in sorted(samples.items())]
            for signature, samples in sorted(self.times.items())
        }
        return {"times": times, "calibrations": dict(sorted(self.calibrations.items()))}

    def add(self, signature: str, rows: int, times: Times) -> None:
        """Notes a measurement."""
        self.times.setdefault(signature, {})[rows] = times
        self.fresh = True

    def samples(self, signature: str, rows: Sequence[int]) -> list[Sample]:
        """The samples at these numbers of rows, as far as there are any."""
        measured = self.times.get(signature, {})
        return [_sample(at, measured[at]) for at in rows if at in measured]


@dataclass
class _Profiler:
    """Measures what is not known yet of one graph."""

    captured: Captured
    description: dict[str, Any]
    device: torch.device
    time_limit_s: float
    known: _Known = field(default_factory=_Known)
    estimates: dict[str, Sample] = field(default_factory=dict)

    def run(self, wanted: list[int], fingerprint: str) -> dict[str, int]:
        """Measures all signatures at the wanted rows, and returns the calibration."""
        stopwatch = Stopwatch(self.captured, self.description, self.device)
        deadline = time.monotonic() + self.time_limit_s
        distinct = self._distinct_nodes()
        with progress("measuring", "operators", len(distinct)) as bar:
            for node in distinct:
                self._measure(stopwatch, node, wanted, deadline)
                bar.update()
        name = f"{fingerprint} at {wanted[-1]} rows"
        if name not in self.known.calibrations:
            self.known.calibrations[name] = self._calibrate(stopwatch, wanted)
            self.known.fresh = True
        return self.known.calibrations[name]

    def _measure(
        self, stopwatch: Stopwatch, node: dict[str, Any], wanted: list[int], deadline: float
    ) -> None:
        """Measures one operator at the wanted rows, or estimates it."""
        for rows in wanted:
            if rows in self.known.times.get(node["signature"], {}):
                continue
            times = None
            if time.monotonic() < deadline:
                times = stopwatch.measure([node], rows)
            if times is None:
                break
            self.known.add(node["signature"], rows, times)
        if not self.known.samples(node["signature"], wanted):
            self.estimates[node["signature"]] = self._estimate(node, wanted[-1])

    def _distinct_nodes(self) -> list[dict[str, Any]]:
        first: dict[str, dict[str, Any]] = {}
        for node in self.description["nodes"]:
            first.setdefault(node["signature"], node)
        return list(first.values())

    def _estimate(self, node: dict[str, Any], rows: int) -> Sample:
        """A rough time for an operator that could not be measured: too large, or too late."""
        flops = node["flops"]
        count = flops if isinstance(flops, int) else flops[0] * rows + flops[1]
        per_second = 10**10 if self.device.type == "cpu" else 10**13
        forward = 5_000 + max(count, 0) * 10**9 // per_second
        logger.info("estimating the time of %s, which could not be measured", node["key"])
        return _sample(rows, Times(forward, 2 * forward))

    def _calibrate(self, stopwatch: Stopwatch, wanted: list[int]) -> dict[str, int]:
        """The measured time of the middle of the graph (all of it, if it is small) over the sum."""
        nodes = self.description["nodes"]
        skipped = max(len(nodes) - _CALIBRATION_NODES, 0) // 2
        stretch = nodes[skipped : skipped + _CALIBRATION_NODES]
        for rows in reversed(wanted):
            parts = [self.known.times.get(node["signature"], {}).get(rows) for node in stretch]
            times = [part for part in parts if part is not None]
            if not stretch or len(times) < len(stretch):
                continue
            whole = stopwatch.measure(stretch, rows, ENOUGH_TO_CALIBRATE)
            if whole is not None:
                forward = sum(part.forward_ns for part in times)
                backward = sum(part.backward_ns for part in times)
                return {
                    "forward_ppm": _ratio_ppm(whole.forward_ns, forward),
                    "backward_ppm": _ratio_ppm(whole.backward_ns, backward),
                }
        return {"forward_ppm": _PPM, "backward_ppm": _PPM}


def _ratio_ppm(whole_ns: int, parts_ns: int) -> int:
    """A ratio in millionths, within a factor of ten: beyond that something else was measured."""
    if whole_ns == 0 or parts_ns == 0:
        return _PPM
    return min(max(whole_ns * _PPM // parts_ns, _PPM // 10), _PPM * 10)


def _sample(rows: int, times: Times) -> Sample:
    return {"rows": rows, "forward_ns": times.forward_ns, "backward_ns": times.backward_ns}


def _has_no_data(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _settings(device: torch.device) -> dict[str, str]:
    """What else times depend on."""
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else "off",
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }


def _own_randomness(device: torch.device) -> Any:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _keep(path: Path | None, key: dict[str, Any], known: _Known) -> None:
    if known.fresh:
        _cache.store(path, key, known.to_json())
