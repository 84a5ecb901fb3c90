"""Every example runs as its docstring says, in a folder of its own."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(330)]

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
SECONDS = 300
COMMAND = re.compile(r"^ {4}((?:torchrun|python) .*)|`((?:torchrun|python) [^`]*)`", re.MULTILINE)


def commands(example: Path) -> list[str]:
    """How the docstring says to start it: on a line by itself, or between backticks."""
    told = ast.get_docstring(ast.parse(example.read_text())) or ""
    return [" ".join((line or quoted).split()) for line, quoted in COMMAND.findall(told)]


def imported(example: Path) -> set[str]:
    """The names of modules that it imports."""
    nodes = list(ast.walk(ast.parse(example.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_says_how_it_is_started(example: Path) -> None:
    """Else it would not be run below; but for modules that only other examples use."""
    helps = any(example.stem in imported(other) for other in EXAMPLES)
    assert helps or commands(example), "needed `torchrun ...` in the docstring"
    assert all(str(example.relative_to(ROOT)) in command for command in commands(example))


def alone(command: str) -> str:
    """The same on one process, without a launcher."""
    return re.sub(r"^torchrun .*?(?=\S+\.py)", "python ", command)


def left_in(folder: Path) -> list[str]:
    """What processes still run there, where the system tells."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended, or is another user's
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        way
        for path in EXAMPLES
        for told in commands(path)
        for way in dict.fromkeys((told, alone(told)))
    ],
)
def test_an_example_runs_as_it_says(command: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {name: text for name, text in os.environ.items() if name[:6] != "RANNC_"} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "python"),
        "PET_STANDALONE": "1",  # torchrun takes a free port
        "HOME": str(tmp_path / "home"),  # what was measured is kept there
    }
    child = subprocess.Popen(
        shlex.split(command),
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, errors = child.communicate(timeout=SECONDS)
    finally:
        child.terminate()  # torchrun ends its processes
        child.wait(30)
    assert child.returncode == 0, errors[-4000:]
    assert output.strip()
    assert "Traceback" not in errors, errors[-4000:]
    assert left_in(tmp_path) == []
