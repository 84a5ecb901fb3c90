"""Hugging Face's ``Trainer`` with RaNNC in the place of ``DistributedDataParallel``.

    trainer = RaNNCTrainer(model=model, args=arguments, train_dataset=dataset)

The trainer's own launching, data loading, schedules, clipping and logging go on as they are. What
differs: the model is wrapped once its optimizer exists, its loss is that of the global batch, and
checkpoints are gathered from all ranks before rank 0 writes them.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pyrannc.errors import RaNNCError
from pyrannc.module import RaNNCModule

from ._outside_losses import Computed, Smoothed


class RaNNCTrainer(Trainer):
    """A ``Trainer`` whose model is distributed by RaNNC.

    It trains as a plain ``Trainer`` of one process whose batches are those of all processes
    together. Checkpoints are a plain trainer's: they hold the whole model and the whole state of
    its optimizer, and resume with any number of processes.

    Args:
        *args: as for ``Trainer``.
        config: settings of RaNNC; by default those of file and environment.
        **kwargs: as for ``Trainer``.

    Raises:
        RaNNCError: for options that distribute or compile the model otherwise.
    """

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config
        # What this multiplies losses by makes up for an average over processes that is not taken.
        self.args = copy.copy(self.args)
        self.args.average_tokens_across_devices = False
        self._check_arguments()
        self._loss_outside = bool(self.label_smoother or self.compute_loss_func)
        if self.label_smoother is not None:
            own: Any = Smoothed(self.label_smoother, self.accelerator.gather)
            self.label_smoother = own
        if self.compute_loss_func is not None:
            self.compute_loss_func = Computed(self.compute_loss_func, self.accelerator.gather)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001 - the base's
        """Writes the whole model; collective, though only rank 0 writes."""
        if not isinstance(self.model_wrapped, RaNNCModule):
            super().save_model(output_dir, _internal_call)
            return
        state = self.model_wrapped.state_dict()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _wrap_model(
        self,
        model: torch.nn.Module,
        training: bool = True,  # noqa: ARG002, FBT001 - the base's
        dataloader: Any = None,  # noqa: ARG002
    ) -> torch.nn.Module:
        if not isinstance(self.model_wrapped, RaNNCModule):
            self.create_optimizer()  # evaluation before training has none yet
            self.model_wrapped = RaNNCModule(
                model,
                self.optimizer,
                loss_reduction="sum" if self._loss_outside else "mean",
                config=self._config,
            )
        return self.model_wrapped

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> torch.Tensor | int | None:
        """How many targets all processes have in an accumulated batch; collective."""
        number = super()._get_num_items_in_batch(batch_samples, device)
        if number is None:
            return None
        numbers: torch.Tensor = self.accelerator.gather(torch.as_tensor(number, device=device))
        return numbers.sum()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes the optimizer's whole state; collective, though only rank 0 writes."""
        assert self.lr_scheduler is not None
        whole = self._own_optimizer().state_dict(from_global=True)
        if self.args.should_save:
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes this process's part of the optimizer's state, if the checkpoint has one."""
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
            return
        whole, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        assert self.lr_scheduler is not None
        self._own_optimizer().load_state_dict(whole, from_global=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model or self.model_wrapped)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _own_optimizer(self) -> Any:
        """The one that was wrapped, which accelerate wraps once more."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast, which accelerate gives to models that it wraps itself."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _check_arguments(self) -> None:
        refused = {
            # Without an accelerator what was asked for is left aside, not enabled.
            "fsdp": bool(self.args.fsdp) or self.is_fsdp_enabled,
            "deepspeed": bool(self.args.deepspeed) or self.is_deepspeed_enabled,
            "torch_compile": self.args.torch_compile,
        }
        for option, found in refused.items():
            if found:
                raise RaNNCError(
                    f"`{option}` cannot be used with a model that RaNNC distributes",
                    hint="leave it out",
                )
