"""The trainers people use: the examples on two processes, beside plain runs on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrannc

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(150)]

ROOT = Path(__file__).parents[2]
# Two orders of additions in float32, over a dozen steps of Adam.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}
SECONDS = 120  # the first function imports the trainer


def start(example: str, processes: int, output: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "python"),
        "OMP_NUM_THREADS": "1",
        "RANNC_PARTITION_NUM": "2",
        "RANNC_PIPELINE_NUM": "2",
        "RANNC_MEASURE": "false",
        "RANNC_TIMEOUT_S": "60",
    }
    launcher = [sys.executable]
    options = ["--rows", str(8 // processes), "--output", str(output)]
    if processes == 1:
        options.append("--plain")
    else:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "examples" / example), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_both(example: str, folder: Path) -> tuple[Any, Any]:
    """What the example prints on two processes and on one."""
    found = []
    for processes in (2, 1):
        child = start(example, processes, folder / str(processes))
        try:
            output, errors = child.communicate(timeout=100)
        finally:
            child.kill()
        assert child.returncode == 0, errors[-4000:]
        found.append(json.loads(output.splitlines()[-1]))
    return found[0], found[1]


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    ours, theirs = run_both("trainer_hf.py", tmp_path)
    assert len(ours) == len(theirs)
    for entry, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(entry, expected, **TOLERANCE)
    for folder in ("", "checkpoint-6", "checkpoint-12"):
        saved, expected = (
            load_file(tmp_path / name / folder / "model.safetensors") for name in ("2", "1")
        )
        torch.testing.assert_close(saved, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "option",
    [
        {"save_strategy": "epoch"},
        {"save_strategy": "no", "torch_compile": True},
    ],
    ids=str,
)
def test_options_of_the_trainer_that_cannot_work(option: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyrannc.integrations.transformers import RaNNCTrainer

    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", **option
    )
    with pytest.raises(pyrannc.RaNNCError, match="cannot be used with a model that RaNNC"):
        RaNNCTrainer(torch.nn.Linear(2, 2), arguments)


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    ours, theirs = run_both("trainer_lightning.py", tmp_path)
    assert len(ours["losses"]) == 12
    for name in ("losses", "validation", "saved"):
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)
