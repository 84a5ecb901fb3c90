"""The documents say what the code does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pyrannc._dropped_items import DROPPED_ITEMS
from pyrannc.config import ITEMS, Config

ROOT = Path(__file__).parents[2]


def spelled(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def table() -> str:
    lines = ["| item | default | needed | meaning |", "|---|---|---|---|"]
    for item in fields(Config):
        if item.name in ITEMS:
            needed, meaning = item.metadata["allowed"].needed, item.metadata["meaning"]
            lines.append(f"| `{item.name}` | `{spelled(item.default)}` | {needed} | {meaning} |")
    return "\n".join(lines)


def test_every_item_is_documented_as_it_is() -> None:
    assert table() in (ROOT / "docs" / "configuration.md").read_text()


def test_every_dropped_item_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert [name for name in DROPPED_ITEMS if f"`{name}`" not in text] == []


def test_the_readme_shows_the_program_that_is_tested() -> None:
    program = (ROOT / "examples" / "first.py").read_text().partition('"""\n\n')[2]
    assert f"```python\n{program}```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: Path) -> None:
    targets = [part.partition(")")[0] for part in document.read_text().split("](")[1:]]
    assert [t for t in targets if "://" not in t and not exists(document, t)] == []


def exists(document: Path, target: str) -> bool:
    """Whether there is such a file, and such a heading in it if it names one."""
    path, _, heading = target.partition("#")
    file = document.parent / path if path else document
    if not heading or not file.exists():
        return file.exists()
    titles = [line.lstrip("# ") for line in file.read_text().splitlines() if line[:1] == "#"]
    return heading in [title.lower().replace(" ", "-") for title in titles]
