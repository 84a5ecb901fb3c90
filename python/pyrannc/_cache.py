"""Small JSON files that keep what was measured.

Losing one only costs time: a file that cannot be read or written is named in a log message and
otherwise ignored. Files appear whole or not at all, whoever else writes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def file_name(kind: str, key: Any) -> str:
    """The name of the file for what `key`, a JSON value, describes."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:16]}.json"


def load(path: Path | None, key: Any) -> dict[str, Any]:
    """What was stored under `key`; empty when nothing was, or when it cannot be used."""
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == json.loads(json.dumps(key)) and isinstance(stored["value"], dict):
            return stored["value"]
        problem = "it holds something else"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    logger.warning("ignoring the cache file %s: %s", path, problem)
    return {}


def store(path: Path | None, key: Any, value: dict[str, Any]) -> None:
    """Keeps `value` under `key`."""
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("cannot write the cache file %s: %s", path, error)
