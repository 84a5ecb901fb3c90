"""A process that goes is named by the others, and an error of all is printed in full once."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.gloo.pool import _free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(200)]

SCRIPT = """
import os, signal, sys, torch, pyrannc
from torch import nn

torch.set_num_threads(1)
rank, how, leaving, timeout = int(os.environ["RANK"]), sys.argv[1], *map(int, sys.argv[2:])
if how == "hook":
    sys.excepthook = lambda kind, error, trace: print("the user's hook:", error)
if how == "far":
    pyrannc.presence._space = lambda: str(os.getpid())

class Net(nn.Sequential):
    def forward(self, x):
        if how == "capture" and rank == leaving:
            os._exit(3)
        return super().forward(x)

if how == "absent" and rank == leaving:
    os._exit(3)
config = pyrannc.Config(measure=False, profile_cache_dir="off", timeout_s=timeout)
model = pyrannc.RaNNCModule(Net(nn.Linear(4, 4), nn.Linear(4, 4)), config=config)
if how == "early" and rank == leaving:
    os._exit(3)
for step in range(4):
    if step == 2:
        if how in ("same", "hook"):
            raise ValueError("of all of them")
        if how == "differ":
            raise ValueError(f"of rank {rank}")
    if step == 2 and rank == leaving:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "far":
            os._exit(0)
        if how == "exit":
            sys.exit()
        if how == "raise":
            raise ValueError("of its own")
    if how == "shapes":
        model(torch.ones(4, 3 + rank))
    output = model(torch.ones(4, 4)).sum()
    if step == 1 and rank == leaving:
        if how == "between":
            os._exit(3)
        if how == "exit between":
            sys.exit(1)
    output.backward()
"""


def outputs(
    tmp_path: Path, how: str, leaving: int = 1, world: int = 2, timeout: int = 25, **given: str
) -> list[str]:
    """What each process prints until all but a stopped one have ended."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    given |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), how, str(leaving), str(timeout)],
            env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    last = [process for rank, process in enumerate(running) if rank != leaving]
    try:
        printed = {process.pid: process.communicate(timeout=150)[0] for process in last}
        running[leaving].kill()
        printed[running[leaving].pid] = running[leaving].communicate(timeout=10)[0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for text in printed.values():
        assert "terminate called" not in text
    return [printed[process.pid] for process in running]


SILENT = "ended without a word, in or after step"
ENDED = "came to the end of its script, or called sys.exit, in or after step"


@pytest.mark.parametrize(
    ("how", "leaving", "told"),
    [
        ("kill", 1, SILENT),
        pytest.param("kill", 0, SILENT, marks=pytest.mark.slow),
        pytest.param("between", 1, SILENT, marks=pytest.mark.slow),
        pytest.param(
            "early", 1, "ended without a word, before its first step", marks=pytest.mark.slow
        ),
        pytest.param("capture", 1, "ended without a word", marks=pytest.mark.slow),
        pytest.param("exit", 1, "the end of the script, or sys.exit (", marks=pytest.mark.slow),
        pytest.param("exit between", 1, ENDED, marks=pytest.mark.slow),
        pytest.param("raise", 1, "ended with ValueError: of its own", marks=pytest.mark.slow),
        pytest.param("raise", 0, "ended with ValueError: of its own", marks=pytest.mark.slow),
    ],
)
def test_who_is_gone_is_named(tmp_path: Path, how: str, leaving: int, told: str) -> None:
    staying = outputs(tmp_path, how, leaving)[1 - leaving]
    assert f"rank {leaving}" in staying
    assert "host " in staying
    assert told in staying
    assert "closed by peer" not in staying


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("stop", "was stopped (SIGSTOP), in or after step"),
        ("absent", "could not reach all 2 processes within 8 s"),
    ],
)
def test_a_process_that_does_not_answer_is_named_in_time(
    tmp_path: Path, how: str, told: str
) -> None:
    staying = outputs(tmp_path, how, timeout=8)[0]
    assert told in staying


@pytest.mark.slow
def test_one_of_three(tmp_path: Path) -> None:
    first, _, last = outputs(tmp_path, "kill", world=3)
    assert "rank 1 (host" in first + last
    assert SILENT in first + last
    for rank, text in ((0, first), (2, last)):
        assert "Traceback" in text or text.startswith(f"rank {rank} stopped ")


def test_an_error_of_all_is_printed_once(tmp_path: Path) -> None:
    first, second = outputs(tmp_path, "same")
    assert first.count("Traceback") == 1
    assert "ValueError: of all of them" in first
    assert second.strip() == "rank 1 stopped with the same ValueError as rank 0"


@pytest.mark.slow
def test_errors_that_differ_are_printed_in_full(tmp_path: Path) -> None:
    for rank, text in enumerate(outputs(tmp_path, "differ")):
        assert "Traceback" in text
        assert f"ValueError: of rank {rank}" in text


@pytest.mark.slow
def test_a_hook_of_the_user_stays(tmp_path: Path) -> None:
    for text in outputs(tmp_path, "hook"):
        assert "the user's hook: of all of them" in text


@pytest.mark.slow
def test_torchrun_is_told_of_a_process_on_another_host(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "far", "1", "25"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    summary = done.stderr.partition("Root Cause")[2]
    assert "is silent, in or after step" in summary
    assert "ExecutionError: rank 1 (host" in summary
