"""The command `python -m pyrannc`.

    python -m pyrannc capture FILE.py:FUNCTION [--meta] -o GRAPH

writes the graph of the `(model, args, kwargs)` that the function returns, as `rannc plan` reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrannc.capture import capture
from pyrannc.errors import CaptureError, RaNNCError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger("pyrannc")

_FORM = "let it return `(model, args, kwargs)`: a module, a tuple and a dict"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code: 0 fine, 2 failed.

    Args:
        arguments: those of the command line; none for this process's.
    """
    given = _parser().parse_args(arguments)
    if given.debug:
        logging.basicConfig(level=logging.DEBUG)
    try:
        _capture(given.source, Path(given.output), meta=given.meta)
    except RaNNCError as error:
        logger.debug("the whole story:", exc_info=True)
        _complain(error)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyrannc")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "capture", help="write the graph of a model", description="Writes the graph of a model."
    )
    command.add_argument(
        "source",
        metavar="FILE.py:FUNCTION",
        help="a function without parameters that returns `(model, args, kwargs)`",
    )
    command.add_argument(
        "--meta", action="store_true", help="make the model without data, on the meta device"
    )
    command.add_argument(
        "-o", "--output", required=True, metavar="GRAPH", help="where to write the graph"
    )
    command.add_argument("--debug", action="store_true", help="log what happens, with tracebacks")
    return parser


def _capture(source: str, output: Path, *, meta: bool) -> None:
    function = _function(source)
    device = torch.device("meta") if meta else contextlib.nullcontext()
    try:
        with device:
            result = function()
    except RaNNCError:
        raise
    except Exception as failure:
        message = f"`{source}` failed: {type(failure).__name__}: {failure}"
        hint = None if not meta else "not all models can be made without data; leave out `--meta`"
        raise CaptureError(message, hint) from failure
    model, args, kwargs = _call(source, result)
    model.train()
    try:
        graph = capture(model, args, kwargs).graph_json
    except RaNNCError:
        raise
    except Exception as failure:
        message = (
            f"`{type(model).__name__}` cannot be captured: {type(failure).__name__}: {failure}"
        )
        hint = "call the model with the same arguments without capturing it first; does that work?"
        raise CaptureError(message, hint) from failure
    _write(output, graph)


def _function(source: str) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` names."""
    file, colon, name = source.rpartition(":")
    if not colon or not file or not name:
        message = f"`{source}` names no function"
        raise CaptureError(message, "write it as `FILE.py:FUNCTION`")
    path = Path(file)
    if not path.is_file():
        message = f"there is no file `{file}`"
        raise CaptureError(message, f"looked in `{Path.cwd()}`; write the path from there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        message = f"`{file}` is not Python source"
        raise CaptureError(message, "write it as `FILE.py:FUNCTION`")
    module = importlib.util.module_from_spec(spec)
    # As `python FILE.py` would have it: neighbours can be imported, and classes found by name.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as failure:
        message = f"`{file}` cannot be imported: {type(failure).__name__}: {failure}"
        raise CaptureError(message, f"`python {file}` shows where it fails") from failure
    function = getattr(module, name, None)
    if not callable(function):
        own = sorted(
            other
            for other, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == path.stem
        )
        message = f"`{file}` has no function `{name}`"
        found = ", ".join(f"`{other}`" for other in own if not other.startswith("_"))
        raise CaptureError(message, f"it has {found}" if found else "it has no functions")
    return function  # type: ignore[no-any-return]


def _call(source: str, result: Any) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model, and the positional and keyword arguments of one call."""
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    if not parts or not isinstance(parts[0], torch.nn.Module):
        found = type(parts[0]).__name__ if parts else "an empty tuple"
        message = f"`{source}` returns `{found}` where the model should be"
        raise CaptureError(message, _FORM)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for place, part in enumerate(parts[1:]):
        if isinstance(part, Mapping) and part is parts[-1]:
            kwargs = {str(name): value for name, value in part.items()}
        elif isinstance(part, torch.Tensor) and place == 0:
            args = (part,)
        elif isinstance(part, (tuple, list)) and place == 0:
            args = tuple(part)
        elif part is not None:
            kinds = ", ".join(type(one).__name__ for one in parts)
            message = f"`{source}` returns `({kinds})`"
            raise CaptureError(message, _FORM)
    if not args and not kwargs:
        message = f"`{source}` returns a model, but nothing to call it with"
        raise CaptureError(message, _FORM)
    return parts[0], args, kwargs


def _write(output: Path, graph: str) -> None:
    """Writes the whole file or none."""
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        partial.write_text(graph, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        message = f"cannot write `{output}`: {error.strerror or error}"
        raise CaptureError(message, "give `-o` a path in a folder that can be written") from error


def _complain(error: RaNNCError) -> None:
    sys.stderr.write(f"error: {error.message}\n")
    cause = error.__cause__
    while cause is not None:
        sys.stderr.write(f"caused by: {type(cause).__name__}: {cause}\n")
        cause = cause.__cause__
    if error.hint is not None:
        sys.stderr.write(f"\nhint: {error.hint}\n")


if __name__ == "__main__":
    sys.exit(main())
