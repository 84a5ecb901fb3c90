//! How results and failures are printed.

use std::io::Write as _;
use std::process::ExitCode;

use rannc_cost::CostError;
use rannc_graph::GraphError;
use rannc_plan::PlanError;

/// Prints a result; a closed pipe is nobody's error.
pub(crate) fn result(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints the error, its causes and a hint. The exit code is 1 when the answer is no, 2 when the
/// question could not be answered.
pub(crate) fn failure(error: &anyhow::Error) -> ExitCode {
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}caused by: {cause}\n");
        }
    }
    if let Some(hint) = error.chain().find_map(hint) {
        text = format!("{text}\nhint: {hint}\n");
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
    let answered = matches!(
        error.downcast_ref::<PlanError>(),
        Some(
            PlanError::Partition(_)
                | PlanError::OtherModel { .. }
                | PlanError::OtherWorld { .. }
                | PlanError::Invalid { .. }
        )
    );
    ExitCode::from(if answered { 1 } else { 2 })
}

fn hint(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    None.or_else(|| error.downcast_ref::<PlanError>().and_then(PlanError::help))
        .or_else(|| error.downcast_ref::<GraphError>().and_then(GraphError::help))
        .or_else(|| error.downcast_ref::<CostError>().and_then(CostError::help))
}
