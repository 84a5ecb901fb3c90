"""Parts of a model that cannot be captured become one operator each."""

from __future__ import annotations

from typing import Any

import torch


class Opaque(torch.nn.Module):
    """Calls a submodule as it is."""

    def without_data(self, *args: Any) -> Any:
        """What the submodule gives, in types and sizes only."""
        raise NotImplementedError
