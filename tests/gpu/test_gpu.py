"""The promise on CUDA devices: the same code as on CPUs, one process for each device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.gloo.conftest import pools
from tests.gloo.test_equivalence import ROWS, check
from tests.gloo.training import Setup
from tests.models import case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

__all__ = ["pools"]

pytestmark = [pytest.mark.gpu]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", ["fork_join", "shared_embedding", "gpt", "masked_loss"])
def test_every_device_takes_its_part(pools: Pools, name: str, world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices, found {torch.cuda.device_count()}")
    check(pools, case(name), Setup(ROWS[world], min(world, 2), 2), tmp_path)
