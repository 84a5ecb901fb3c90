"""What can go wrong, one class for each thing a user can react to.

Every error is a `RaNNCError`, hence a `ValueError`. Its message says what was found and what was
needed; its `hint`, where there is one, says what to change. The Rust core raises the same classes.
"""

from __future__ import annotations


class RaNNCError(ValueError):
    """Occurs whenever RaNNC cannot do what it was asked; the base of all errors below."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Keep the message, and what the reader can do about it."""
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The message, then the hint on a line of its own."""
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class CaptureError(RaNNCError):
    """Occurs when a model cannot become a graph, or is called in another form than captured."""


class ConfigurationError(RaNNCError):
    """Occurs when a configuration item, its file or an environment variable is not valid."""


class GraphError(RaNNCError):
    """Occurs when a graph file is malformed or contradicts itself."""


class PlanError(RaNNCError):
    """Occurs when no plan can be made as asked, or a plan does not belong to the model."""


class DoesNotFitError(PlanError):
    """Occurs when every plan would need more memory than the devices have."""


class DeploymentError(PlanError):
    """Occurs when a saved deployment cannot be read, written or used for this model and world."""


class ScheduleError(RaNNCError):
    """Occurs when a schedule breaks one of its own rules; it is never run."""


class MismatchError(RaNNCError):
    """Occurs when ranks disagree about what must be equal everywhere: model, batch, settings."""


class ExecutionError(RaNNCError, RuntimeError):
    """Occurs when a rank fails, or stops hearing from another, while it runs its actions."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        rank: int | None = None,
        stage: int | None = None,
        action: str | None = None,
    ) -> None:
        """Keep also the rank that failed, and its stage and action where they are known."""
        super().__init__(message, hint)
        self.args = (message, hint, rank, stage, action)
        self.rank = rank
        self.stage = stage
        self.action = action

    def __str__(self) -> str:
        """The place, the message, then the hint."""
        named = [("rank", self.rank), ("stage", self.stage), ("action", self.action)]
        place = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        return f"{place}: {super().__str__()}" if place else super().__str__()
