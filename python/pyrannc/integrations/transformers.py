"""Hugging Face's ``Trainer`` with RaNNC in the place of ``DistributedDataParallel``.

    trainer = RaNNCTrainer(model=model, args=arguments, train_dataset=dataset)

The trainer's own launching, data loading, schedules, clipping and logging go on as they are. What
differs: the model is wrapped once its optimizer exists, its loss is that of the global batch, and
its state is gathered from all ranks before rank 0 saves it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from pyrannc.errors import RaNNCError
from pyrannc.module import RaNNCModule

if TYPE_CHECKING:
    import torch


class RaNNCTrainer(Trainer):
    """A ``Trainer`` whose model is distributed by RaNNC.

    Checkpoints hold the whole model, as ``from_pretrained`` reads it, but not the optimizer: set
    ``save_only_model=True``. Gradient accumulation averages over steps, not over targets.

    Args:
        *args: as for ``Trainer``.
        config: settings of RaNNC; by default those of file and environment.
        **kwargs: as for ``Trainer``.

    Raises:
        RaNNCError: for options that would save or load what this process does not have, or scale
            losses by what it does not see.
    """

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config
        # The model's own mean is that of the global batch, so there is no number to divide by.
        self.model_accepts_loss_kwargs = False
        self._check_arguments()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - its signature
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``Trainer.train``, from the beginning.

        Raises:
            RaNNCError: when told to resume.
        """
        if resume_from_checkpoint:
            raise RaNNCError(
                "`resume_from_checkpoint` needs optimizer state that checkpoints of a distributed "
                "model do not have",
                hint="load the model with from_pretrained(checkpoint) and train it anew",
            )
        return super().train(None, trial, ignore_keys_for_eval)

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
        training: bool = True,  # noqa: FBT001 - the base's
        dataloader: Any = None,  # noqa: ARG002
    ) -> torch.nn.Module:
        if isinstance(self.model_wrapped, RaNNCModule):
            return self.model_wrapped
        if not training:
            return model
        return RaNNCModule(model, self.optimizer, config=self._config)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast, which accelerate gives to models that it wraps itself."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(self.accelerator.autocast())
        return stack

    def _check_arguments(self) -> None:
        saves = str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"
        refused = {
            "save_only_model=False": saves and not self.args.save_only_model,
            "load_best_model_at_end=True": self.args.load_best_model_at_end,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
            "fsdp or deepspeed": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "torch_compile": self.args.torch_compile,
        }
        for option, found in refused.items():
            if found:
                raise RaNNCError(
                    f"`{option}` cannot be used with a model that RaNNC distributes",
                    hint="set save_only_model=True, have the model compute its loss, and leave the "
                    "other options out",
                )
