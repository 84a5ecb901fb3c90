//! Pictures of programs: a grid of text, and all lists as text.

use std::fmt::Write as _;

use crate::run::{At, Fault};
use crate::simulate::{Memory, Timing, simulate};
use crate::{Action, GradientGroup, Pipeline, Program, RankId, ScheduleError, StageId};

/// How many ranks before and after the wrong one an error shows.
const RANKS_AROUND: usize = 4;
/// How many pieces of work before and after the wrong step an error shows.
const WORK_AROUND: usize = 8;

/// The work of each rank over time, if every piece of work takes one tick and data moves at once.
///
/// ```text
/// rank 0 | 0F0 0F1 .   .   0B0 0B1
/// rank 1 | .   1F0 1F1 1B0 1B1 .
/// ```
pub fn grid(program: &Program, pipeline: &Pipeline) -> Result<String, ScheduleError> {
    let timeline = simulate(program, pipeline, &Ticks, &Ticks)?;
    let ticks = usize::try_from(timeline.makespan_ns).expect("a tick for each action at most");
    let mut cells = vec![vec![String::from("."); ticks]; program.forward.len()];
    for event in timeline.events.iter().filter(|event| event.action.is_compute()) {
        cells[event.rank.index()][event.start_ns as usize] = event.action.label();
    }
    Ok(table(&cells, 0))
}

struct Ticks;

impl Timing for Ticks {
    fn forward_ns(&self, _: StageId, _: RankId, _: u64) -> u64 {
        1
    }
    fn backward_ns(&self, _: StageId, _: RankId, _: u64) -> u64 {
        1
    }
    fn transfer_ns(&self, _: u64, _: RankId, _: RankId) -> u64 {
        0
    }
    fn reduce_gradients_ns(&self, _: &GradientGroup) -> u64 {
        0
    }
    fn reduce_output_ns(&self, _: u64, _: &[RankId]) -> u64 {
        0
    }
}

impl Memory for Ticks {
    fn saved_bytes(&self, _: StageId, _: u64) -> u64 {
        0
    }
}

/// Lines of cells in columns, the first line for `first_rank`.
fn table(rows: &[Vec<String>], first_rank: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let digits = (first_rank + rows.len()).saturating_sub(1).to_string().len();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:width$}"));
        let line = format!("rank {:digits$} |{}", first_rank + index, cells.collect::<String>());
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// All lists, one action a line.
pub fn listing(program: &Program) -> String {
    let mut text = String::new();
    for (pass, lists) in program.passes() {
        for (rank, list) in lists.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
            writeln!(text, "rank {rank} {pass}").expect("a string can be written to");
            for action in list {
                writeln!(text, "  {action}").expect("a string can be written to");
            }
        }
    }
    text
}

/// The error for a fault in one of the two passes of a program.
pub(crate) fn rejected(program: &Program, pass: usize, fault: &Fault) -> ScheduleError {
    let (name, lists) = program.passes()[pass];
    let action = fault.at.action(lists);
    ScheduleError::Rejected {
        rank: RankId(fault.at.rank),
        step: fault.at.step as usize,
        pass: name,
        problem: format!("`{action}`: {}", fault.problem),
        grid: excerpt(program, Some((pass, fault.at))),
    }
}

/// The work of the ranks around a place, in the order of their lists, with the place marked.
pub(crate) fn excerpt(program: &Program, place: Option<(usize, At)>) -> String {
    let (pass, at) = place.unwrap_or((0, At { rank: 0, step: 0 }));
    let (_, lists) = program.passes()[pass];
    let first = (at.rank as usize).saturating_sub(RANKS_AROUND);
    let shown = lists.iter().enumerate().skip(first).take(2 * RANKS_AROUND + 1);
    let row = |(rank, list): (usize, &Vec<Action>)| {
        let marked = place.filter(|&(_, at)| at.rank as usize == rank);
        let marked = marked.map(|(_, at)| at.step as usize);
        let cells = list.iter().enumerate().filter_map(|(step, action)| {
            if marked == Some(step) {
                Some(format!(">>{}<<", action.label()))
            } else {
                action.is_compute().then(|| action.label())
            }
        });
        let before = list.iter().take(at.step as usize).filter(|action| action.is_compute());
        let skipped = before.count().saturating_sub(WORK_AROUND);
        cells.skip(skipped).take(2 * WORK_AROUND + 1).collect()
    };
    let rows: Vec<Vec<String>> = shown.map(row).collect();
    table(&rows, first)
}
