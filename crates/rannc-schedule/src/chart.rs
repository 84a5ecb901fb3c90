//! Pictures of timelines: a trace for Chrome or Perfetto, and lines of text.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::{Action, Event, RankTimeline, Slot, Timeline};

/// A timeline in Chrome's trace event format, for `chrome://tracing` or Perfetto.
///
/// Each rank is a process with work and reductions on one line, sends and receives on two others. Times
/// are in microseconds. Work is named `F 0 3` (forward of stage 0, microbatch 3) or `B 0 3`, a transfer
/// `send F 0 3` or `receive F 0 3` after the slot at its own end, and an arrow leads from each send to its
/// receive.
pub fn chrome_trace(timeline: &Timeline) -> String {
    let mut events = Vec::new();
    let metadata = |rank: usize, line: usize, name: &str, args: Value| json!({ "ph": "M", "name": name, "pid": rank, "tid": line, "args": args });
    for rank in 0..timeline.ranks.len() {
        events.push(metadata(rank, 0, "process_name", json!({ "name": format!("rank {rank}") })));
        events.push(metadata(rank, 0, "process_sort_index", json!({ "sort_index": rank })));
        for (line, name) in ["work", "send", "receive"].into_iter().enumerate() {
            events.push(metadata(rank, line, "thread_name", json!({ "name": name })));
        }
    }
    events.extend(timeline.events.iter().map(trace_event));
    events.extend(arrows(timeline));
    json!({ "displayTimeUnit": "ms", "traceEvents": events }).to_string()
}

fn microseconds(time_ns: u64) -> f64 {
    time_ns as f64 / 1000.0
}

fn line(action: &Action) -> usize {
    match action {
        Action::Send { .. } => 1,
        Action::Recv { .. } => 2,
        _ => 0,
    }
}

fn trace_event(event: &Event) -> Value {
    let (category, name) = match event.action {
        Action::Forward { stage, microbatch, .. } => ("forward", format!("F {stage} {microbatch}")),
        Action::Backward { stage, microbatch, .. } => {
            ("backward", format!("B {stage} {microbatch}"))
        }
        Action::Send { slot, .. } => ("send", format!("send {}", slot_name(&slot))),
        Action::Recv { slot, .. } => ("receive", format!("receive {}", slot_name(&slot))),
        Action::Copy { to, .. } => ("copy", format!("copy {}", slot_name(&to))),
        Action::ReduceGradients { group } => ("reduce", format!("reduce gradients {group}")),
        Action::ReduceOutput { value } => ("reduce", format!("reduce output {value}")),
    };
    json!({
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": event.rank,
        "tid": line(&event.action),
        "ts": microseconds(event.start_ns),
        "dur": microseconds(event.end_ns - event.start_ns),
        "args": { "action": event.action.to_string() },
    })
}

fn slot_name(slot: &Slot) -> String {
    format!("{} {} {}", slot.pass, slot.place, slot.microbatch)
}

/// The arrows from sends to receives. The nth event between two ranks in one direction is the nth at
/// both of them.
fn arrows(timeline: &Timeline) -> Vec<Value> {
    let ends = |wanted: fn(&Event) -> Option<(u32, u32)>| {
        let mut ends: Vec<_> =
            timeline.events.iter().filter_map(|event| Some((wanted(event)?, event))).collect();
        ends.sort_by_key(|&(pair, _)| pair);
        ends
    };
    let sends = ends(|event| match event.action {
        Action::Send { peer, .. } => Some((event.rank.0, peer.0)),
        _ => None,
    });
    let receives = ends(|event| match event.action {
        Action::Recv { peer, .. } => Some((peer.0, event.rank.0)),
        _ => None,
    });
    let mut arrows = Vec::new();
    for (id, (&(_, send), &(_, receive))) in sends.iter().zip(&receives).enumerate() {
        for (kind, event) in [("s", send), ("f", receive)] {
            arrows.push(json!({
                "ph": kind, "bp": "e", "id": id, "name": "transfer", "cat": "transfer",
                "pid": event.rank, "tid": line(&event.action), "ts": microseconds(event.start_ns),
            }));
        }
    }
    arrows
}

/// What most of a column of a [`timeline_text`] goes to.
#[derive(Clone, Copy, Default)]
struct Column {
    forward: u64,
    backward: u64,
    reduce: u64,
    /// The longer of sending and receiving.
    send: u64,
    receive: u64,
}

impl Column {
    fn add(&mut self, action: &Action, time_ns: u64) {
        *(match action {
            Action::Forward { .. } => &mut self.forward,
            Action::Backward { .. } => &mut self.backward,
            Action::Send { .. } | Action::Copy { .. } => &mut self.send,
            Action::Recv { .. } => &mut self.receive,
            Action::ReduceGradients { .. } | Action::ReduceOutput { .. } => &mut self.reduce,
        }) += time_ns;
    }

    fn character(&self, width: u64) -> char {
        let busy = self.forward + self.backward + self.reduce;
        let idle = width.saturating_sub(busy);
        let moving = self.send.max(self.receive);
        let most = self.forward.max(self.backward).max(self.reduce);
        if idle > most {
            return if 2 * moving.min(idle) >= idle { '-' } else { '.' };
        }
        match most {
            time if time == self.forward => 'F',
            time if time == self.backward => 'B',
            _ => 'R',
        }
    }
}

/// A timeline as one line of at most `columns` characters for each rank, or for ranks in a row that do
/// the same, with the part of the time in which they run stages.
///
/// ```text
/// simulated step of 0.120 ms, 0.012 ms a column: F forward, B backward, R reduce, - transfer, . idle
/// ranks 0-1 |FF-...BBRR|  40 % busy
/// rank  2   |..FFBB.RR.|  40 % busy
/// ```
pub fn timeline_text(timeline: &Timeline, columns: usize) -> String {
    let count = timeline.makespan_ns.clamp(1, columns.max(1) as u64);
    let start = |column: u64| {
        let exact = u128::from(timeline.makespan_ns) * u128::from(column) / u128::from(count);
        u64::try_from(exact).expect("a part of the step is shorter than the step")
    };
    let mut table = vec![vec![Column::default(); count as usize]; timeline.ranks.len()];
    for event in timeline.events.iter().filter(|event| event.end_ns > event.start_ns) {
        let row = &mut table[event.rank.index()];
        let at = u128::from(event.start_ns) * u128::from(count) / u128::from(timeline.makespan_ns);
        let first = u64::try_from(at).expect("an event is within the step");
        for column in first..count {
            let (from, to) = (start(column).max(event.start_ns), start(column + 1));
            row[column as usize].add(&event.action, to.min(event.end_ns).saturating_sub(from));
            if to >= event.end_ns {
                break;
            }
        }
    }
    let width = |column: usize| start(column as u64 + 1) - start(column as u64);
    let lines: Vec<String> = table
        .iter()
        .zip(&timeline.ranks)
        .map(|(row, rank)| {
            let cells = row.iter().enumerate().map(|(index, cell)| cell.character(width(index)));
            let busy = percent(rank, timeline.makespan_ns);
            format!("|{}| {busy:>3} % busy", cells.collect::<String>())
        })
        .collect();
    let mut text = format!(
        "simulated step of {:.3} ms, {:.3} ms a column: \
         F forward, B backward, R reduce, - transfer, . idle\n",
        timeline.makespan_ns as f64 / 1e6,
        timeline.makespan_ns as f64 / 1e6 / count as f64,
    );
    push_grouped(&mut text, &lines);
    text
}

/// Writes each line after its rank; equal lines in a row are one.
fn push_grouped(text: &mut String, lines: &[String]) {
    let mut groups = Vec::new();
    let mut first = 0;
    for group in lines.chunk_by(|left, right| left == right) {
        let last = first + group.len() - 1;
        let name =
            if first == last { format!("rank {first}") } else { format!("ranks {first}-{last}") };
        groups.push((name, &group[0]));
        first = last + 1;
    }
    let width = groups.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, line) in groups {
        writeln!(text, "{name:width$} {line}").expect("a string can be written to");
    }
}

/// The part of the step in which a rank runs stages.
fn percent(rank: &RankTimeline, makespan_ns: u64) -> u64 {
    let exact = 100 * u128::from(rank.busy_ns) / u128::from(makespan_ns.max(1));
    u64::try_from(exact).expect("a rank is busy for the whole step at most")
}
