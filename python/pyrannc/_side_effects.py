"""What a forward leaves on its modules, made harmless for capture.

A forward may assign to attributes: a new value for a buffer, a tensor kept for inspection, a
counter. A new value for a buffer belongs to the graph. Everything else is put back as it was, as
the exporter's tensors must not stay on the user's model.
"""

from __future__ import annotations

import torch

_PLAIN = (bool, int, float, str)


class Snapshot:
    """The attributes of all submodules at one time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (name, module, dict(module.__dict__), dict(module._buffers))
            for name, module in model.named_modules()
        ]

    def keep_buffers(self) -> None:
        """Writes what was assigned to buffers into them."""
        for _, module, _, buffers in self._modules:
            for name, buffer in buffers.items():
                current = module._buffers.get(name)
                if buffer is not None and current is not None and current is not buffer:
                    with torch.no_grad():
                        buffer.copy_(current)
                    module._buffers[name] = buffer

    def restore(self) -> list[str]:
        """Puts all attributes back; gives the names of counters and the like that had changed."""
        changed = []
        for path, module, attributes, buffers in self._modules:
            for name, value in list(module.__dict__.items()):
                before = attributes.get(name)
                if value is before:
                    continue
                if isinstance(value, _PLAIN) and value != before:
                    changed.append(f"{path}.{name}" if path else name)
                if name in attributes:
                    module.__dict__[name] = before
                else:
                    del module.__dict__[name]
            module._buffers.clear()
            module._buffers.update(buffers)
        return changed
