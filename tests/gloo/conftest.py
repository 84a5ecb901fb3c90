from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gloo.pool import Pools

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Of the ways in which several processes run a test the first is quick, unless all are."""
    begun: set[str] = set()
    for item in items:
        if "pools" not in item.fixturenames or item.get_closest_marker("quick"):
            continue
        test = item.nodeid.partition("[")[0]
        if test in begun:
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("slow"):
            begun.add(test)
