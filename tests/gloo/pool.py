"""Groups of processes that stay up between tests.

Importing torch takes seconds, so the processes of a pool are started once and then run one function
after another. A pool that hung, or failed where it should not have, is thrown away; the next test
gets a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import socket
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_START_SECONDS = 60


@dataclass(slots=True)
class Failure:
    """What a function raised on one rank: the class's name, the message, and the traceback."""

    kind: str
    message: str
    trace: str


class Pool:
    """Processes 0 to ``world_size - 1``, joined by gloo."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self.outcomes_of(_nothing, (), _START_SECONDS)

    def outcomes_of(
        self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float
    ) -> list[Any | Failure]:
        """Runs ``function(*args)`` on every rank; what each returned, or its :class:`Failure`."""
        for connection in self._connections:
            connection.send((function, args))
        outcomes = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(seconds):
                self.close()
                raise TimeoutError(f"rank {rank} did not finish within {seconds} s")
            outcomes.append(connection.recv())
        return outcomes

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)


class Pools:
    """One pool for each world size, started when first needed."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 50
    ) -> list[Any | Failure]:
        """By rank, what ``function(*args)`` returned or how it failed."""
        return self.started(world_size).outcomes_of(function, args, seconds)

    def started(self, world_size: int) -> Pool:
        """The pool with so many processes, all of them up."""
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = Pool(world_size)
        return pool

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 50
    ) -> list[Any]:
        """By rank, what ``function(*args)`` returned; fails the test if it failed anywhere."""
        outcomes = self.outcomes(world_size, function, *args, seconds=seconds)
        failures = [
            f"rank {rank}: {outcome.trace}"
            for rank, outcome in enumerate(outcomes)
            if isinstance(outcome, Failure)
        ]
        if failures:
            self._pools[world_size].close()
        assert not failures, "\n".join(failures)
        return outcomes

    def drop(self, world_size: int) -> None:
        """Ends a pool whose processes are no longer in step."""
        self._pools.pop(world_size).close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _nothing() -> None:
    """Shows that all processes are up."""


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, queue.Empty):
        while True:
            function, args = connection.recv()
            try:
                outcome = function(*args)
            except BaseException as error:  # reported to the test
                trace = traceback.format_exc()
                outcome = Failure(type(error).__name__, str(error), trace)
            connection.send(outcome)
