"""The devices that the processes have, and the links between them, as the planner reads them.

Memory and places are asked of the system every time. Speeds are measured, once for each kind of
device and each kind of link, and so is how much processes on the same cores slow each other down;
all are kept on disk. With `measure = false` they are constants, so that plans do not depend on a
stopwatch. The result is the JSON form of `rannc_cost::Cluster`.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrannc import _cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyrannc.comm import Communicator
    from pyrannc.config import Config

_CPU_SPEED = {"flops_per_second": 100 * 10**9, "memory_bytes_per_second": 20 * 10**9}
_ACCELERATOR_SPEED = {"flops_per_second": 15 * 10**12, "memory_bytes_per_second": 900 * 10**9}
_CPU_LINK = {"latency_ns": 50_000, "bytes_per_second": 2 * 10**9}
_ACCELERATOR_LINK = {"latency_ns": 8_000, "bytes_per_second": 100 * 10**9}
_NETWORK_LINK = {"latency_ns": 100_000, "bytes_per_second": 10**9}

_SMALL_BYTES = 8
_LARGE_BYTES = 4 * 2**20
_ROUND_TRIPS = 16
_REDUCED_BYTES = 8 * 2**20
_REDUCED_PARTS = 8
_REPEATS = 9
_PPM = 1_000_000

Link = dict[str, int]


@dataclass(frozen=True)
class Place:
    """Where a process computes."""

    host: str
    kind: str
    device_index: int
    total_memory_bytes: int
    cores: tuple[int, ...] = ()
    threads: int = 1


def describe(comm: Communicator, config: Config) -> str:
    """The cluster as JSON, equal on every rank; collective.

    Args:
        comm: the connections to the other ranks.
        config: whether and where measured speeds are kept.
    """
    places = [Place(**entry) for entry in comm.all_gather_objects(asdict(_own_place(comm.device)))]
    speeds = _speeds(comm, config, places) if config.measure else _constants(comm.device, places)
    hosts = list(dict.fromkeys(place.host for place in places))
    devices = [
        {
            "kind": place.kind,
            "memory_bytes": place.total_memory_bytes // _sharers(place, places),
            "node": hosts.index(place.host),
            **speeds["devices"][place.kind],
        }
        for place in places
    ]
    kinds = ", ".join(dict.fromkeys(place.kind for place in places))
    description = {
        "name": f"{len(places)} x {kinds} on {len(hosts)} node{'s' * (len(hosts) > 1)}",
        "devices": devices,
        "intra_node": speeds["intra_node"],
        "inter_node": speeds["inter_node"],
    }
    shared = [
        {"devices": ranks, "capacity_ppm": speeds["capacities"][host]}
        for host, ranks in _crowds(places).items()
        if speeds["capacities"][host] < len(ranks) * _PPM
    ]
    return json.dumps(description | ({"shared": shared} if shared else {}))


def device_kind(device: torch.device) -> str:
    """The name of a device's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.startswith("model name"))
        return found.partition(":")[2].strip() or "cpu"
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def memory_bytes(device: torch.device) -> int:
    """All memory of a device: for a CPU that of the host, or what this container may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return host
    return min(host, limit)


def synchronize(device: torch.device) -> None:
    """Returns when everything that the device was told to do is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _own_place(device: torch.device) -> Place:
    kind, total = device_kind(device), memory_bytes(device)
    cores = tuple(sorted(os.sched_getaffinity(0))) if device.type == "cpu" else ()
    index, threads = device.index or 0, torch.get_num_threads()
    return Place(socket.gethostname(), kind, index, total, cores, threads)


def _crowds(places: list[Place]) -> dict[str, list[int]]:
    """By host, the ranks on its CPUs, where there are several."""
    crowds: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        if place.cores:
            crowds.setdefault(place.host, []).append(rank)
    return {host: ranks for host, ranks in crowds.items() if len(ranks) > 1}


def _room_ppm(ranks: list[int], places: list[Place]) -> int:
    """How many of these processes have cores for all of their threads, in millionths."""
    cores = {core for rank in ranks for core in places[rank].cores}
    threads = max(places[rank].threads for rank in ranks)
    return min(max(len(cores) * _PPM // threads, 1), len(ranks) * _PPM)


def _sharers(place: Place, places: list[Place]) -> int:
    """How many processes share a device; those on CPUs share the memory of their host."""
    return sum(
        (other.host, other.kind, other.device_index) == (place.host, place.kind, place.device_index)
        for other in places
    )


def _constants(device: torch.device, places: list[Place]) -> dict[str, Any]:
    speed = _CPU_SPEED if device.type == "cpu" else _ACCELERATOR_SPEED
    crowds = _crowds(places)
    return {
        "capacities": {host: _room_ppm(ranks, places) for host, ranks in crowds.items()},
        "devices": {place.kind: speed for place in places},
        "intra_node": _CPU_LINK if device.type == "cpu" else _ACCELERATOR_LINK,
        "inter_node": _NETWORK_LINK,
    }


def _speeds(comm: Communicator, config: Config, places: list[Place]) -> dict[str, Any]:
    """Measured speeds: from rank 0's cache, else measured by all ranks together."""
    key = {
        "places": [[place.host, place.kind, place.cores] for place in places],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    folder = config.profile_cache_path()
    path = None if folder is None else folder / _cache.file_name("cluster", key)
    known = comm.broadcast_object(_cache.load(path, key) if comm.rank == 0 else None)
    if known:
        return dict(known)
    capacities = _capacities(comm, places)
    links = _link_speeds(comm, places)
    if comm.device.type == "cpu" and len(places) > 1:
        one_host = len({place.host for place in places}) == 1
        link = links["intra_node" if one_host else "inter_node"]
        crowds = _crowds(places)
        slowest = [len(ranks) * _PPM / capacities[host] for host, ranks in crowds.items()]
        link["reduce_bytes_per_second"] = _reduce_speed(comm, link, max([1.0, *slowest]))
    measured = {
        "devices": _device_speeds(comm, places),
        "capacities": capacities,
        **links,
    }
    if comm.rank == 0:
        _cache.store(path, key, measured)
    return measured


def _device_speeds(comm: Communicator, places: list[Place]) -> dict[str, dict[str, int]]:
    """Speeds by kind of device, measured by the first process that has one."""
    kinds = [place.kind for place in places]
    measures = kinds.index(kinds[comm.rank]) == comm.rank
    gathered = comm.all_gather_objects(_device_speed(comm.device) if measures else None)
    return {kind: speed for kind, speed in zip(kinds, gathered, strict=True) if speed is not None}


def _device_speed(device: torch.device) -> dict[str, int]:
    size = 768 if device.type == "cpu" else 4096
    matrix = torch.randn(size, size, device=device)
    block = torch.zeros((64 if device.type == "cpu" else 512) * 2**18, device=device)
    target = torch.zeros_like(block)
    with torch.no_grad():
        multiply_ns = _fastest_ns(lambda: matrix @ matrix, device)
        copy_ns = _fastest_ns(lambda: target.copy_(block), device)
    return {
        "flops_per_second": max(2 * size**3 * 10**9 // multiply_ns, 1),
        "memory_bytes_per_second": max(2 * block.nbytes * 10**9 // copy_ns, 1),
    }


def _capacities(comm: Communicator, places: list[Place]) -> dict[str, int]:
    """By host, how many of its processes compute at full speed at a time, in millionths.

    On cores of their own processes still share caches and memory: work takes longer when all do it
    than when the first of each host does it alone.
    """
    crowds = _crowds(places)
    if not crowds:
        return {}
    firsts = {ranks[0] for ranks in crowds.values()}
    own_ns = _work_ns(comm.device) if comm.rank in firsts else 0
    alone = comm.all_gather_row([own_ns])
    together = comm.all_gather_row([_work_ns(comm.device)])
    found = {}
    for host, ranks in crowds.items():
        mean_ns = sum(together[rank][0] for rank in ranks) / len(ranks)
        speed = min(alone[ranks[0]][0] / max(mean_ns, 1), 1.0)
        # What only counts the time on a core does not see others that take turns with it.
        room = _room_ppm(ranks, places) if _counts_own_time() else len(ranks) * _PPM
        found[host] = max(int(room * speed), 1)
    return found


def _counts_own_time() -> bool:
    return torch.get_num_threads() == 1


def _work_ns(device: torch.device) -> int:
    """The median time of a linear layer and its backward; of one thread the time it ran."""
    now = time.thread_time_ns if _counts_own_time() else time.perf_counter_ns
    weight = torch.randn(1024, 1024, device=device, requires_grad=True)
    rows = torch.randn(256, 1024, device=device, requires_grad=True)
    times = []
    for _ in range(_REPEATS):
        start = now()
        torch.nn.functional.gelu(rows @ weight).sum().backward()
        times.append(now() - start)
    return int(sorted(times[1:])[len(times) // 2])


def _reduce_speed(comm: Communicator, link: Link, crowding: float) -> int:
    """Bytes per second while all ranks add up tensors, as gradients are; collective."""
    count = comm.world_size
    parts = [torch.zeros(_REDUCED_BYTES // 4 // _REDUCED_PARTS) for _ in range(_REDUCED_PARTS)]
    times = []
    for _ in range(_REPEATS):
        comm.barrier()
        start = time.perf_counter_ns()
        flat = comm.all_reduce(torch.cat(parts))
        for part, reduced in zip(parts, flat.split(parts[0].numel()), strict=True):
            part.copy_(reduced)
        times.append(time.perf_counter_ns() - start)
    messages = 2 * (count - 1)
    took = sorted(times[1:])[len(times) // 4] / crowding - link["latency_ns"] * messages
    speed = int(_REDUCED_BYTES * messages * 10**9 / count / max(took, 1))
    return int(comm.broadcast_object(max(speed, 1)))


def _fastest_ns(work: Callable[[], object], device: torch.device, repeats: int = 4) -> int:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter_ns()
        work()
        synchronize(device)
        times.append(time.perf_counter_ns() - start)
    return max(min(times[1:]), 1)


def _link_speeds(comm: Communicator, places: list[Place]) -> dict[str, Link]:
    """Both kinds of links, each measured between one pair of ranks that has it."""
    constants = _constants(comm.device, places)
    ranks = range(len(places))
    pairs = [(a, b) for a in ranks for b in ranks[a + 1 :]]
    same = next(((a, b) for a, b in pairs if places[a].host == places[b].host), None)
    other = next(((a, b) for a, b in pairs if places[a].host != places[b].host), None)
    return {
        "intra_node": constants["intra_node"] if same is None else _link(comm, *same),
        "inter_node": constants["inter_node"] if other is None else _link(comm, *other),
    }


def _link(comm: Communicator, first: int, second: int) -> Link:
    """Latency and bandwidth between two ranks; collective over all ranks."""
    measured: Link | None = None
    if comm.rank in (first, second):
        peer = second if comm.rank == first else first
        small_ns = _one_way_ns(comm, peer, _SMALL_BYTES, starts=comm.rank == first)
        large_ns = _one_way_ns(comm, peer, _LARGE_BYTES, starts=comm.rank == first)
        moving_ns = max(large_ns - small_ns, 1)
        measured = {
            "latency_ns": small_ns,
            "bytes_per_second": max(_LARGE_BYTES * 10**9 // moving_ns, 1),
        }
    found: Link = comm.all_gather_objects(measured)[first]
    return found


def _one_way_ns(comm: Communicator, peer: int, num_bytes: int, *, starts: bool) -> int:
    """Half of the time for a message to go to a peer and back.

    The lower quartile: what is measured is kept, so a busy moment must not spoil it.
    """
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=comm.device)
    answer = torch.zeros_like(message)
    times = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter_ns()
        if starts:
            comm.send(message, peer)
        comm.receive(answer, peer).wait()
        if not starts:
            comm.send(message, peer)
        synchronize(comm.device)
        times.append(time.perf_counter_ns() - start)
        comm.finish_sends()
    return max(sorted(times[1:])[len(times) // 4] // 2, 1)
