"""RaNNC trains an unmodified PyTorch model on all your devices after one line.

    model = pyrannc.RaNNCModule(model, optimizer)

Importing starts nothing: processes are joined when the first model is wrapped, and planning waits
for its first batch.
"""

from .config import Config
from .errors import (
    CaptureError,
    ConfigurationError,
    DeploymentError,
    DoesNotFitError,
    ExecutionError,
    GraphError,
    MismatchError,
    PlanError,
    RaNNCError,
    ScheduleError,
)
from .module import (
    RaNNCModule,
    barrier,
    clear,
    delay_grad_allreduce,
    get_rank,
    get_world_size,
    show_deployment,
)

__all__ = [
    "CaptureError",
    "Config",
    "ConfigurationError",
    "DeploymentError",
    "DoesNotFitError",
    "ExecutionError",
    "GraphError",
    "MismatchError",
    "PlanError",
    "RaNNCError",
    "RaNNCModule",
    "ScheduleError",
    "barrier",
    "clear",
    "delay_grad_allreduce",
    "get_rank",
    "get_world_size",
    "show_deployment",
]
