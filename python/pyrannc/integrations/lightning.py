"""Lightning with RaNNC in the place of ``DistributedDataParallel``.

Two lines of a script change: the strategy, and the network, which is wrapped with its optimizer::

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.network.parameters())
        self.network = RaNNCModule(self.network, optimizer)
        return optimizer

    Trainer(strategy=RaNNCStrategy(), devices=2)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DDPStrategy

from pyrannc.errors import RaNNCError
from pyrannc.module import RaNNCModule

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class RaNNCStrategy(DDPStrategy):
    """Processes, samplers and reductions of logged values as with DDP, but nothing is wrapped.

    Checkpoints hold the whole network by the names it had before it was wrapped, and the whole
    state of its optimizer, so that a run of any number of processes resumes from them.
    """

    strategy_name = "rannc"

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Has the module make its optimizers.

        Raises:
            RaNNCError: when it then has trained parameters that nobody adds up, or an optimizer
                that was not given to the network that it trains.
        """
        super().setup_optimizers(trainer)
        module = self._module()
        parts = self._wrapped()
        if not parts:
            raise RaNNCError(
                "no part of the LightningModule is a RaNNCModule",
                hint="wrap the network in configure_optimizers(), once its optimizer exists",
            )
        given = [part._runtime.optimizer for part in parts.values()]
        if not all(any(known is own for known in given) for own in self.optimizers):
            raise RaNNCError(
                "configure_optimizers() returned an optimizer that no RaNNCModule was given",
                hint="wrap the network with its optimizer: RaNNCModule(self.network, optimizer)",
            )
        inside = tuple(f"{name}." for name in parts)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not name.startswith(inside):
                raise RaNNCError(
                    f"`{name}` is trained but is not in a RaNNCModule, so no one would add up its "
                    "gradients over the processes",
                    hint="put it into the network that is wrapped, or freeze it",
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All of the module's state, the network's gathered; collective.

        Returns:
            What is saved, on rank 0; without the networks' state on the others.
        """
        module, parts = self._module(), self._wrapped()
        state: dict[str, torch.Tensor] = {}
        for name, part in parts.items():
            gathered = part.state_dict()
            state.update({f"{name}.{key}": value for key, value in gathered.items()})
        inside = tuple(f"{name}." for name in parts)
        outside = [*module.named_parameters(), *module.named_buffers()]
        state.update({k: v.detach() for k, v in outside if not k.startswith(inside)})
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """All of an optimizer's state; collective.

        Returns:
            What a plain optimizer of the bare network has, on rank 0; nothing on the others.
        """
        own: Any = getattr(optimizer, "optimizer", optimizer)  # Lightning has a class around it
        whole: dict[str, Any] = own.state_dict(from_global=True)
        return whole

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leaves gradients to accumulate in the body."""
        with contextlib.ExitStack() as stack:
            for part in self._wrapped().values():
                stack.enter_context(part.no_sync())
            yield

    def teardown(self) -> None:
        """Gives the networks' processes back."""
        for part in self._wrapped().values():
            part.undeploy()
        super().teardown()

    def _module(self) -> torch.nn.Module:
        module = self.lightning_module
        assert module is not None
        return module

    def _wrapped(self) -> dict[str, RaNNCModule]:
        if self.lightning_module is None:
            return {}
        named = self.lightning_module.named_modules()
        return {name: part for name, part in named if isinstance(part, RaNNCModule)}
