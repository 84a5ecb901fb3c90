"""`python -m pyrannc capture FILE.py:FUNCTION`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyrannc
from pyrannc import _core
from pyrannc.__main__ import main

SOURCE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.ReLU()), (torch.zeros(6, 4),), {}

def one_tensor():
    return nn.Linear(4, 3), torch.zeros(6, 4)

def keywords():
    return nn.Linear(4, 3), {"input": torch.zeros(6, 4)}

def keywords_behind_none():
    return nn.Linear(4, 3), None, {"input": torch.zeros(6, 4)}

def in_evaluation():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval(), (torch.zeros(6, 4),)

def huge():
    return nn.Linear(10**7, 10**6), (torch.empty(2, 10**7),)

def no_model():
    return torch.zeros(6, 4), ()

def only_model():
    return nn.Linear(4, 3)

def odd():
    return nn.Linear(4, 3), 7

def wrong_shape():
    return nn.Linear(4, 3), (torch.zeros(6, 5),)

def fails():
    raise RuntimeError("nothing there")

_hidden = 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "models_to_capture.py"
    path.write_text(SOURCE)
    return path


def run(source: Path | str, function: str, output: Path, *more: str) -> int:
    return main(["capture", f"{source}:{function}", "-o", str(output), *more])


@pytest.mark.parametrize("function", ["net", "one_tensor", "keywords", "keywords_behind_none"])
def test_writes_a_graph(source: Path, tmp_path: Path, function: str) -> None:
    output = tmp_path / "graph.json"
    assert run(source, function, output) == 0
    text = output.read_text()
    _core.Graph.from_json(text)
    assert json.loads(text)["batch"] == {"rows": 6, "splittable": True}
    assert [path.name for path in tmp_path.glob("graph*")] == ["graph.json"]


def test_captures_for_training(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "graph.json"
    assert run(source, "in_evaluation", output) == 0
    assert "aten.dropout.default" in [
        node["op"] for node in json.loads(output.read_text())["nodes"]
    ]


def test_makes_models_without_data(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "graph.json"
    assert run(source, "huge", output, "--meta") == 0
    weight = next(v for v in json.loads(output.read_text())["values"] if v["name"] == "weight")
    assert weight["shape"] == [10**6, 10**7]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "has no function `missing`\n\nhint: it has `fails`, `huge`, `in_evaluation`"),
        ("_hidden", "has no function `_hidden`"),
        ("no_model", "returns `Tensor` where the model should be\n\nhint: let it return `(model,"),
        ("only_model", "returns a model, but nothing to call it with\n\nhint: let it return"),
        ("odd", "returns `(Linear, int)`\n\nhint: let it return `(model, args, kwargs)`"),
        ("fails", "failed: RuntimeError: nothing there"),
        ("wrong_shape", "`Linear` cannot be captured"),
    ],
)
def test_says_what_was_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], function: str, message: str
) -> None:
    output = tmp_path / "graph.json"
    assert run(source, function, output) == 2
    assert not output.exists()
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("models.py", "`models.py` names no function\n\nhint: write it as `FILE.py:FUNCTION`"),
        ("nowhere.py:net", "there is no file `nowhere.py`\n\nhint: looked in"),
    ],
)
def test_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, message: str
) -> None:
    assert main(["capture", where, "-o", str(tmp_path / "graph.json")]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_says_why_a_file_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken_models.py"
    path.write_text("import nothing_of_that_name\n")
    assert run(path, "net", tmp_path / "graph.json") == 2
    printed = capsys.readouterr().err
    assert (
        "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'" in printed
    )


def test_says_where_it_cannot_write(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "net", tmp_path / "no folder" / "graph.json") == 2
    printed = capsys.readouterr().err
    assert "no folder/graph.json`: No such file or directory\ncaused by: " in printed
    assert "\n\nhint: give `-o` a path in a folder that can be written\n" in printed


def test_runs_as_a_command(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "graph.json"
    command = [sys.executable, "-m", "pyrannc", "capture", f"{source}:net", "-o", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(Path(pyrannc.__file__).parents[1])}
    run_command = functools.partial(
        subprocess.run, capture_output=True, text=True, check=False, env=environment
    )
    done = run_command(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert output.exists()
    done = run_command([*command, "--nonsense"])
    assert done.returncode == 2
    assert "unrecognized arguments: --nonsense" in done.stderr
