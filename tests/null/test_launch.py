from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyrannc.comm import Launch

ENVIRONMENTS = {
    "torchrun": {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
    },
    "open_mpi": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
    },
    "mpich": {
        "PMI_RANK": "3",
        "PMI_SIZE": "8",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
    },
    "slurm": {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "2(x4)",
        "SLURM_STEP_NODELIST": "a,b,c,d",
        "MASTER_PORT": "1234",
    },
}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_launchers_are_understood(launcher: str) -> None:
    assert Launch.from_environment(ENVIRONMENTS[launcher]) == Launch(3, 8, 1, 2, "a", 1234)


def test_without_a_launcher_there_is_one_process() -> None:
    assert Launch.from_environment({}).world_size == 1


def test_a_slurm_job_agrees_on_a_port() -> None:
    job = {**ENVIRONMENTS["slurm"], "SLURM_JOB_ID": "4711"}
    del job["MASTER_PORT"]
    for rank in ("0", "7"):
        assert Launch.from_environment({**job, "SLURM_PROCID": rank}).master_port == 24711


def test_importing_starts_nothing() -> None:
    code = "import pyrannc, torch.distributed as dist, threading; "
    code += "print(dist.is_initialized(), threading.active_count())"
    environment = {**ENVIRONMENTS["torchrun"]}
    command = [sys.executable, "-c", code]

    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    assert result.stdout.split() == ["False", "1"]
