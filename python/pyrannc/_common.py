"""Values that a call must be given equally on all processes.

What belongs to no row of the batch counts for the rows of all processes. So its content is hashed
at every call, and the processes compare their digests as they meet.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .comm import Communicator

_MOST_SHOWN = 8


@dataclass(frozen=True, slots=True)
class CommonValues:
    """What a call was given that must be equal on all processes.

    Attributes:
        values: tensors and plain numbers, by their paths in the arguments.
    """

    values: Mapping[str, torch.Tensor | complex]

    @property
    def digest(self) -> int:
        """A number that differs where a value does; 0 without any."""
        if not self.values:
            return 0
        total = hashlib.sha256()
        for value in self.values.values():
            total.update(_content(value))
        return int.from_bytes(total.digest()[:7], "big")

    def refuse(self, comm: Communicator, named: Callable[[Sequence[str]], list[str]]) -> None:
        """Says on all processes which value differs; collective.

        Args:
            comm: the connections to the other processes.
            named: names of arguments for paths.

        Raises:
            MismatchError: always.
        """
        own = [(hashlib.sha256(_content(v)).digest(), _shown(v)) for v in self.values.values()]
        told = comm.all_gather_objects(own)
        differing = [i for i in range(len(own)) if len({row[i][0] for row in told}) > 1]
        names = named(list(self.values))
        lines = [
            f"\n  rank {rank}: `{names[i]}` is {row[i][1]}"
            for i in differing[:_MOST_SHOWN]
            for rank, row in enumerate(told)
        ]
        which = ", ".join(f"`{names[i]}`" for i in differing[:_MOST_SHOWN])
        raise MismatchError(
            f"the processes were called with different values of {which}, which counts for the "
            f"rows of all processes, as no dimension of it is the batch:{''.join(lines)}",
            hint="pass the same on all processes; give what belongs to the rows of one process "
            "the batch as its first dimension, padded to one length for each row",
        )


def _content(value: torch.Tensor | complex) -> bytes | memoryview:
    """All that a value holds."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value!r};".encode()
    tensor = value.detach()
    if tensor.is_meta:
        return b""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        written = io.BytesIO()
        torch.save(tensor.cpu(), written)
        return written.getvalue()
    dense = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    content: memoryview = dense.view(torch.uint8).numpy().data
    return content


def _shown(value: torch.Tensor | complex) -> str:
    """A value in words: its content where that is little."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() <= _MOST_SHOWN and value.layout is torch.strided and not value.is_meta:
        return f"{value.tolist()}"
    kind = f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    if value.layout is not torch.strided or value.is_meta:
        return f"of type {kind}"
    first = value.detach().reshape(-1)[:_MOST_SHOWN].tolist()
    return f"of type {kind} and begins with {first}"
