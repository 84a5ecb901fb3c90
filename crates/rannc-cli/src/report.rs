//! How results and failures are printed.

use std::io::Write as _;
use std::process::ExitCode;

use rannc_cost::CostError;
use rannc_graph::GraphError;
use rannc_partition::PartitionError;
use rannc_plan::PlanError;
use serde_json::json;
use thiserror::Error;

use crate::input::BadFile;

/// A problem that only the command has, with what to do about it.
#[derive(Debug, Error)]
#[error("{problem}")]
pub(crate) struct Hint {
    problem: String,
    hint: String,
}

impl Hint {
    /// The problem and what to do about it.
    pub(crate) fn of(problem: &str, hint: &str) -> Self {
        Self { problem: problem.into(), hint: hint.into() }
    }
}

/// Prints a result; a closed pipe is nobody's error.
pub(crate) fn result(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints the error, its causes and a hint. The exit code is 1 when the answer is no, 2 when the
/// question could not be answered.
pub(crate) fn failure(error: &anyhow::Error, in_json: bool) -> ExitCode {
    let problem = error.to_string();
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Messages that end in their cause have said it already.
        if !causes.iter().chain([&problem]).any(|said| said.contains(&cause)) {
            causes.push(cause);
        }
    }
    let own = error.downcast_ref::<Hint>().map(|error| error.hint.clone());
    let hint = own
        .or_else(|| error.chain().find_map(hint))
        .or_else(|| error.downcast_ref::<BadFile>().and_then(BadFile::hint));
    let text = if in_json {
        format!("{}\n", json!({ "error": problem, "causes": causes, "hint": hint }))
    } else {
        let causes =
            causes.iter().fold(String::new(), |text, cause| format!("{text}caused by: {cause}\n"));
        let hint = hint.map_or_else(String::new, |hint| format!("\nhint: {hint}\n"));
        format!("error: {problem}\n{causes}{hint}")
    };
    let _ = std::io::stderr().write_all(text.as_bytes());
    ExitCode::from(if answers(error) { 1 } else { 2 })
}

/// Whether the error is the answer to what was asked.
fn answers(error: &anyhow::Error) -> bool {
    let Some(answer) = error.downcast_ref::<PlanError>() else { return false };
    error.downcast_ref::<BadFile>().is_none()
        && match answer {
            PlanError::Partition(error) => !matches!(error, PartitionError::Options { .. }),
            PlanError::OtherModel { .. }
            | PlanError::OtherWorld { .. }
            | PlanError::Invalid { .. }
            | PlanError::NeedsLoss { .. } => true,
            PlanError::Io { .. }
            | PlanError::Parse { .. }
            | PlanError::Format { .. }
            | PlanError::Cost(_)
            | PlanError::Schedule(_) => false,
        }
}

fn hint(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    None.or_else(|| error.downcast_ref::<PlanError>().and_then(PlanError::help))
        .or_else(|| error.downcast_ref::<GraphError>().and_then(GraphError::help))
        .or_else(|| error.downcast_ref::<CostError>().and_then(CostError::help))
}
