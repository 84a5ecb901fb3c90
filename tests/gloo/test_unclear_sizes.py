"""Sequences of unlike lengths, and operators whose results' sizes depend on what tensors hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.gloo.comparing import Compared, compare

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

LENGTHS = (5, 3, 2, 5, 1, 4, 3, 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.recurrent(packed)
        return pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder, self.last = nn.Linear(4, 4), Encoder(), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.encoder(torch.relu(self.first(x)), mask))


class Counted(nn.Module):
    """Keeps a histogram of its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self.seen += torch.bincount(target, minlength=4)
        scores = self.last(torch.relu(self.first(x)))
        return nn.functional.cross_entropy(scores, target, weight=1 / (1 + self.seen))


class Transcribed(nn.Module):
    """CTC with padded targets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        scores = self.last(torch.relu(self.first(x))).log_softmax(-1).transpose(0, 1)
        frames = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return nn.functional.ctc_loss(scores, target, frames, lengths)


def transcribed() -> tuple[Tensor, ...]:
    lengths = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
    return torch.randn(8, 9, 4), torch.randint(1, 6, (8, 3)), lengths


CASES = {
    "packed": Compared(
        Packed,
        lambda: (torch.randn(8, 5, 4), torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)),
    ),
    "counted": Compared(Counted, lambda: (torch.randn(8, 4), torch.randint(4, (8,)))),
    "transcribed": Compared(Transcribed, transcribed),
}


@pytest.mark.parametrize("name", CASES)
def test_on_all_rows(pools: Pools, name: str) -> None:
    pools.run(2, compare, __name__, name, 0)


def test_in_parts(pools: Pools) -> None:
    pools.run(2, compare, __name__, "packed", 2)
