from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gloo.pool import Pools

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()
