//! Rust errors as the Python classes of `pyrannc.errors`.

#![expect(clippy::needless_pass_by_value, reason = "the signature that `map_err` wants")]

use pyo3::{PyErr, import_exception};
use rannc_cost::CostError;
use rannc_graph::GraphError as RustGraphError;
use rannc_partition::PartitionError;
use rannc_plan::PlanError as RustPlanError;

import_exception!(pyrannc.errors, ConfigurationError);
import_exception!(pyrannc.errors, DeploymentError);
import_exception!(pyrannc.errors, DoesNotFitError);
import_exception!(pyrannc.errors, GraphError);
import_exception!(pyrannc.errors, PlanError);
import_exception!(pyrannc.errors, ScheduleError);

pub(crate) fn raise_graph(error: RustGraphError) -> PyErr {
    GraphError::new_err((error.to_string(), error.help()))
}

pub(crate) fn raise_cost(error: CostError) -> PyErr {
    PlanError::new_err((error.to_string(), error.help()))
}

pub(crate) fn raise_deployment(error: RustPlanError) -> PyErr {
    DeploymentError::new_err((error.to_string(), error.help()))
}

pub(crate) fn raise_plan(error: RustPlanError) -> PyErr {
    let arguments = (error.to_string(), error.help());
    match error {
        RustPlanError::Partition(PartitionError::DoesNotFit { .. }) => {
            DoesNotFitError::new_err(arguments)
        }
        RustPlanError::Schedule(_) => ScheduleError::new_err(arguments),
        _ => PlanError::new_err(arguments),
    }
}
