"""Processes and the messages between them, on ``torch.distributed``.

A :class:`Communicator` is one process's view of all processes: its rank, the groups it shares, and
what happens when one of them fails. With a single process nothing is started at all.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import subprocess
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from .calls import Calls
from .errors import ExecutionError, RaNNCError
from .last_words import STOPPED, LastWords
from .presence import Presence, is_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._C._distributed_c10d import Store

_connections = itertools.count()
_presences: dict[Store, Presence] = {}
_CHECK_SECONDS = 0.5
_NO_TAG = 0x5EED  # of no message


class _StoppedError(RuntimeError):
    """Ends a wait for what will not come; its message is another rank's failure."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says in the environment: who this process is and how to find the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls, environ: dict[str, str] | None = None) -> Launch:
        """Reads the variables of torchrun, Open MPI, MPICH or Slurm; without any: one process."""
        env = dict(os.environ) if environ is None else environ
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            (
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ),
            ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
        ):
            if names[0] in env and names[1] in env:
                rank, world_size, local_rank, local_world_size = (
                    _leading_number(env.get(name), default)
                    for name, default in zip(names, (0, 1, 0, 1), strict=True)
                )
                address = env.get("MASTER_ADDR") or _first_host(env)
                port = int(env.get("MASTER_PORT") or 20000 + _job_number(env) % 20000)
                return cls(rank, world_size, local_rank, local_world_size, address, port)
        return cls(0, 1, 0, 1, "127.0.0.1", 0)


def _leading_number(text: str | None, default: int) -> int:
    digits = ""
    for character in text or "":
        if not character.isdigit():
            break
        digits += character
    return int(digits) if digits else default


def _first_host(env: dict[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        return "127.0.0.1"
    if "[" not in nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0 or not found.stdout.split():
        raise RaNNCError(
            f"cannot tell the first host of `{nodes}`: `scontrol show hostnames` failed; "
            "set MASTER_ADDR to the host of rank 0"
        )
    return found.stdout.split()[0]


def _job_number(env: dict[str, str]) -> int:
    for name in ("SLURM_JOB_ID", "OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "PBS_JOBID"):
        digits = "".join(character for character in env.get(name, "") if character.isdigit())
        if digits:
            return int(digits)
    return 9500


def default_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.accelerator.is_available():
        index = Launch.from_environment().local_rank % torch.accelerator.device_count()
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, index)
    return torch.device("cpu")


def ensure_process_group(timeout: timedelta) -> None:
    """Joins the default process group if there are several processes and nobody has yet."""
    launch = Launch.from_environment()
    if dist.is_initialized() or launch.world_size == 1:
        return
    device = default_device()
    backend = dist.get_default_backend_for_device(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backend = f"cpu:gloo,{device.type}:{backend}"
    store_url = f"tcp://{launch.master_address}:{launch.master_port}"
    using_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ
    try:
        dist.init_process_group(
            backend,
            init_method="env://" if using_torchrun else store_url,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise ExecutionError(
            f"rank {launch.rank} could not reach all {launch.world_size} processes within "
            f"{timeout.total_seconds():g} s: {str(error).partition(chr(10))[0]}",
            hint="see the output of the other processes for an error of their own; each of them "
            "must wrap the model",
        ) from None


def get_rank() -> int:
    """This process's number among all processes, from 0."""
    return dist.get_rank() if dist.is_initialized() else Launch.from_environment().rank


def get_world_size() -> int:
    """The number of processes."""
    if dist.is_initialized():
        return dist.get_world_size()
    return Launch.from_environment().world_size


class _Waiter:
    """Waits for messages in threads, so that the caller can notice another rank's failure.

    Gloo offers nothing but a blocking ``wait()`` that no other thread can end. One thread waits for
    what the caller needs now, another for what was sent, in order, and keeps it alive until it has
    arrived.
    """

    def __init__(self, check: Callable[[], None], interrupt: Callable[[], None]) -> None:
        self._check = check
        self._interrupt = interrupt
        self._needed: queue.SimpleQueue[tuple[Any, Future[None]]] = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[tuple[Any, Future[None]]] = queue.SimpleQueue()
        self._last_sent: Future[None] | None = None
        self._failed_send: BaseException | None = None
        self._threads: list[threading.Thread] = []
        for name, waiting in (("needed", self._needed), ("sent", self._sent)):
            thread = threading.Thread(
                target=_wait_for_each, args=(waiting,), name=f"pyrannc-{name}"
            )
            thread.daemon = True
            thread.start()
            self._threads.append(thread)
        # A thread that still holds a message when the interpreter ends would abort the process.
        atexit.register(self._end)

    def wait(self, work: Any) -> None:
        """Returns when ``work`` is done; raises what went wrong with it, or on another rank."""
        done: Future[None] = Future()
        self._needed.put((work, done))
        self._until(done)

    def keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Keeps a tensor alive until the send of it is done."""
        done: Future[None] = Future()
        done.add_done_callback(lambda done, _kept=tensor: self._note(done))  # type: ignore[misc]
        self._sent.put((work, done))
        self._last_sent = done

    def wait_for_sends(self) -> None:
        """Returns when all that was sent has arrived; raises as :meth:`wait` does."""
        if self._last_sent is not None:
            self._until(self._last_sent)
            self._last_sent = None
        if self._failed_send is not None:
            raise self._failed_send

    def stop(self) -> None:
        """Ends the threads, but does not wait for long if they wait for what will not come."""
        atexit.unregister(self._end)
        for waiting in (self._needed, self._sent):
            waiting.put((None, Future()))
        for thread in self._threads:
            thread.join(_CHECK_SECONDS)

    def _end(self) -> None:
        self.stop()
        if any(thread.is_alive() for thread in self._threads):
            self._interrupt()
            for thread in self._threads:
                thread.join(_CHECK_SECONDS)

    def _until(self, done: Future[None]) -> None:
        while True:
            try:
                return done.result(_CHECK_SECONDS)
            except FutureTimeoutError:
                if done.done():
                    raise
                self._check()

    def _note(self, done: Future[None]) -> None:
        self._failed_send = self._failed_send or done.exception()


def _wait_for_each(waiting: queue.SimpleQueue[tuple[Any, Future[None]]]) -> None:
    while True:
        work, done = waiting.get()
        if work is None:
            return
        try:
            work.wait()
        except BaseException as error:  # raised where the caller waits
            done.set_exception(error)
        else:
            done.set_result(None)
        del work, done


@dataclass(frozen=True, slots=True)
class Received:
    """A receive that was posted: the tensor is valid after :meth:`wait`."""

    tensor: torch.Tensor
    work: Any
    comm: Communicator

    def wait(self) -> torch.Tensor:
        """The tensor, once it is there."""
        self.comm.wait(self.work)
        return self.tensor


@dataclass(slots=True)
class Communicator:
    """One process's connections to the others.

    Attributes:
        rank: this process.
        world_size: how many there are.
        device: where this process computes.
        timeout: how long to wait for another process.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta
    _world: dist.ProcessGroup | None = None
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    _waiter: _Waiter | None = None
    calls: Calls = field(init=False)
    _failure_key: str = ""
    _failed: bool = False
    _presence: Presence | None = None

    def __post_init__(self) -> None:
        """Starts at the first call."""
        self.calls = Calls(self.rank)

    @classmethod
    def connect(cls, timeout: timedelta, device: torch.device | None = None) -> Communicator:
        """Joins the other processes. Collective: every process must call it."""
        ensure_process_group(timeout)
        device = device or default_device()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, device, timeout)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        presence = _present(rank, world_size, timeout)
        # A group of our own: tearing it down on failure wakes the others and leaves the
        # user's alone.
        world = _new_group(list(range(world_size)), timeout)
        comm = cls(rank, world_size, device, timeout, world)
        comm._presence = presence
        number = next(_connections)
        comm._failure_key = f"pyrannc/failure/{number}"
        comm.calls = Calls(rank, _default_store(), f"pyrannc/calls/{number}")
        atexit.register(comm._end)
        comm._waiter = _Waiter(comm.check_others, comm._interrupt)
        return comm

    def begin_step(self) -> None:
        """Takes note that the model is called."""
        if self._presence is not None:
            self._presence.begin_step()

    def create_groups(self, groups: list[list[int]]) -> None:
        """Makes the groups for later reductions. Collective, with the same list on every rank."""
        for ranks in groups:
            key = tuple(ranks)
            if len(ranks) == self.world_size or len(ranks) == 1 or key in self._groups:
                continue
            self._groups[key] = _new_group(ranks, self.timeout)

    def all_reduce(self, tensor: torch.Tensor, ranks: list[int] | None = None) -> torch.Tensor:
        """Sums ``tensor`` in place over ``ranks`` (default: all)."""
        if self.world_size > 1 and (ranks is None or len(ranks) > 1):
            self.wait(dist.all_reduce(tensor, group=self._group(ranks), async_op=True))
        return tensor

    def all_gather_into(self, part: torch.Tensor, ranks: list[int]) -> torch.Tensor:
        """The equally long parts of all ``ranks``, in their order, in one dimension."""
        whole = part.new_empty(len(ranks) * part.numel())
        group = self._group(ranks)
        self.wait(dist.all_gather_into_tensor(whole, part, group=group, async_op=True))
        return whole

    def reduce_scatter(self, parts: torch.Tensor, ranks: list[int]) -> torch.Tensor:
        """Sums ``parts`` over ``ranks``; each gets the row of its position among them."""
        own = torch.empty_like(parts[0])
        group = self._group(ranks)
        self.wait(dist.reduce_scatter_tensor(own, parts.view(-1), group=group, async_op=True))
        return own

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrites ``tensor`` with that of rank ``source`` on every rank."""
        if self.world_size > 1:
            self.wait(dist.broadcast(tensor, source, group=self._world, async_op=True))
        return tensor

    def all_gather_row(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's ``numbers`` (the same count on each), by rank."""
        if self.world_size == 1:
            return [numbers]
        row = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(row) for _ in range(self.world_size)]
        self.wait(dist.all_gather(rows, row, group=self._world, async_op=True))
        return [gathered.tolist() for gathered in rows]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._explaining():
            dist.all_gather_object(values, value, group=self._world)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable ``value``."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._explaining():
            dist.broadcast_object_list(box, src=0, group=self._world)
        return box[0]

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        """Starts sending a contiguous tensor and keeps it alive until it has arrived."""
        assert self._waiter is not None
        wire = _wire(tensor)
        self._waiter.keep(dist.isend(wire, peer, group=self._world), wire)

    def receive(self, tensor: torch.Tensor, peer: int) -> Received:
        """Posts a receive into a contiguous tensor."""
        return Received(tensor, dist.irecv(_wire(tensor), peer, group=self._world), self)

    def wait(self, work: Any) -> None:
        """Returns when ``work`` is done.

        Raises:
            ExecutionError: when another rank announced its failure first, or is gone.
            MismatchError: when another rank is in another call.
            RuntimeError: when the connection broke or timed out for another reason.
        """
        assert self._waiter is not None
        with self._explaining():
            if self.device.type == "cpu":
                self._waiter.wait(work)
            else:
                work.wait()  # only orders the device's streams

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Has a connection that breaks in the body be told by who is gone."""
        try:
            yield
        except _StoppedError:
            raise
        except Exception as error:
            if self._presence is None or isinstance(error, RaNNCError) or not is_loss(error):
                raise
            self.check_others()
            explained = self._presence.explained(error)
            if explained is error:
                raise
            raise explained from None

    def check_others(self) -> None:
        """Raises the failure that another rank announced, if there is one."""
        if announced := self._announced():
            raise _StoppedError(announced)
        if self._reachable:
            self.calls.check()

    def finish_sends(self) -> None:
        """Returns when everything sent has arrived."""
        if self._waiter is not None:
            with self._explaining():
                self._waiter.wait_for_sends()

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_gather_row([self.rank])

    def send_to_zero(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Rank 0's copy of ``tensor`` as ``source`` holds it; a point-to-point transfer."""
        if source != 0:
            if self.rank == source:
                self.send(tensor.contiguous(), 0)
                self.finish_sends()
            elif self.rank == 0:
                self.receive(tensor, source).wait()
        return tensor

    @contextlib.contextmanager
    def guard(self, task: object, stage: int = -1) -> Iterator[None]:
        """Turns a failure of the body into one of all ranks, named after ``task``.

        Raises:
            ExecutionError: the first failure of any rank.
        """
        try:
            with self._explaining():
                yield
        except ExecutionError as error:
            raise self.fail(error) from error.__cause__
        except Exception as error:
            own = ExecutionError(
                f"{type(error).__name__}: {error}",
                rank=self.rank,
                stage=None if stage < 0 else stage,
                action=str(task),
            )
            raise self.fail(own) from error

    def fail(self, error: Exception) -> Exception:
        """Gives up because of ``error``, and returns what to raise: the first failure of any rank.

        The others find it in the store when they wait for anything. The connections are left as
        they are: closing one with messages under way would block until its timeout.
        """
        if self.world_size == 1:
            return error
        first = str(error)
        store = _default_store()
        if store is not None and self._reachable and not self._failed:
            first = _put_once(store, self._failure_key, first)
        self._failed = True
        if first == str(error):
            return error
        return ExecutionError(f"rank {self.rank} {STOPPED}{first}")

    @property
    def failed(self) -> bool:
        """Whether this rank gave up, so that it cannot reach the others any more."""
        return self._failed

    def close(self) -> None:
        """Closes the connections that were opened here; the default process group stays."""
        self.calls.end("model.undeploy() or pyrannc.clear()")
        atexit.unregister(self._end)
        if self._waiter is not None:
            self._waiter.stop()
            self._waiter = None
        for group in [*self._groups.values(), self._world]:
            if group is not None and dist.is_initialized() and not self._failed:
                dist.destroy_process_group(group)
        self._groups.clear()
        if not self._failed:
            self._world = None

    @property
    def _reachable(self) -> bool:
        """Whether the others can still be told something."""
        return self._presence is None or self._presence.reachable

    def _announced(self) -> str:
        store = _default_store()
        if store is None or self._presence is None or not self._reachable:
            return ""
        try:
            if store.check([self._failure_key]):
                return store.get(self._failure_key).decode()
        except RuntimeError:  # whoever held the store is gone
            self._presence.reachable = False
            return ""
        ended = self._presence.failure
        return _put_once(store, self._failure_key, ended) if ended else ""

    def _interrupt(self) -> None:
        """Breaks the connections, which ends every wait for something on them."""
        for group in [*self._groups.values(), self._world]:
            if group is None or not dist.is_initialized() or self.device.type != "cpu":
                continue
            ranks = dist.get_process_group_ranks(group)
            if self.rank in ranks:
                peer = next(rank for rank in ranks if rank != self.rank)
                # Gloo does so when a message, here one that nobody sends, is late.
                with contextlib.suppress(RuntimeError):
                    late = dist.irecv(torch.empty(1), peer, group=group, tag=_NO_TAG)
                    cast("dist.Work", late).wait(timedelta(milliseconds=1))

    def _end(self) -> None:
        if self._presence is not None and self._reachable:
            self.calls.end(self._presence.own_end)

    def _group(self, ranks: list[int] | None) -> dist.ProcessGroup | None:
        if ranks is None or len(ranks) == self.world_size:
            return self._world
        return self._groups[tuple(ranks)]


def _present(rank: int, world_size: int, timeout: timedelta) -> Presence | None:
    """This process among those of the default process group; collective."""
    store = _default_store()
    if store is None:
        return None
    if store not in _presences:
        _presences.clear()
        own = PrefixStore("pyrannc/presence", store.clone())
        presence = _presences[store] = Presence(own, rank, world_size, timeout)
        atexit.register(presence.leave, "came to the end of its script, or called sys.exit")
        LastWords(presence, own, rank)
    return _presences[store]


def _new_group(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    # A rank outside of the group gets a token instead, over which it sends nothing.
    return cast("dist.ProcessGroup", dist.new_group(ranks, timeout=timeout))


def _wire(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that every backend can carry."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _default_store() -> Store | None:
    try:
        return dist.distributed_c10d._get_default_store()  # no public accessor exists
    except (ValueError, RuntimeError):
        return None


def _put_once(store: Store, key: str, text: str) -> str:
    """Puts ``text`` under ``key`` unless something is there, and returns what is there then."""
    try:
        held: bytes = store.compare_set(key, "", text)
        return held.decode()
    except RuntimeError:
        return text
