//! A simulated step as text: what each rank does over time.

use std::fmt::Write as _;

use rannc_schedule::{Action, Event, Timeline};

/// Columns of a picture.
pub(crate) const WIDTH: usize = 96;
/// More ranks than this are not all shown.
const MAX_RANKS: usize = 32;

/// What the characters of a picture mean.
pub(crate) const LEGEND: &str = "0-9 forward of a microbatch (its last digit), a-j its backward, + gradients or outputs added up, . idle";

/// One line for each rank, each column an equal part of the step; where several things happen in
/// one column, the one that takes longest is shown. Of many ranks only the first and the last.
pub(crate) fn picture(timeline: &Timeline) -> String {
    let ranks = timeline.ranks.len();
    let mut spans: Vec<Vec<(char, &Event)>> = vec![Vec::new(); ranks];
    for event in &timeline.events {
        if let Some(mark) = mark(&event.action) {
            spans[event.rank.index()].push((mark, event));
        }
    }
    let digits = ranks.saturating_sub(1).to_string().len();
    let half = MAX_RANKS / 2;
    let mut text = String::new();
    for (rank, spans) in spans.iter().enumerate() {
        if ranks <= MAX_RANKS || rank < half || rank >= ranks - half {
            let line = line(spans, timeline.makespan_ns);
            writeln!(text, "rank {rank:digits$} |{}", line.trim_end_matches('.'))
                .expect("a string can be written to");
        } else if rank == half {
            writeln!(text, "... {} more ranks", ranks - 2 * half)
                .expect("a string can be written to");
        }
    }
    text
}

fn mark(action: &Action) -> Option<char> {
    let digit = |microbatch: u32| (microbatch % 10) as u8;
    match action {
        Action::Forward { microbatch, .. } => Some((b'0' + digit(*microbatch)).into()),
        Action::Backward { microbatch, .. } => Some((b'a' + digit(*microbatch)).into()),
        Action::ReduceGradients { .. } | Action::ReduceOutput { .. } => Some('+'),
        Action::Send { .. } | Action::Recv { .. } | Action::Copy { .. } => None,
    }
}

fn line(spans: &[(char, &Event)], makespan_ns: u64) -> String {
    // In units of 1 / WIDTH ns no border between columns is rounded.
    let column_length = u128::from(makespan_ns.max(1));
    let mut longest = vec![('.', 0); WIDTH];
    for (mark, event) in spans {
        let start = u128::from(event.start_ns) * WIDTH as u128;
        let end = u128::from(event.end_ns) * WIDTH as u128;
        let first = (start / column_length) as usize;
        for (column, shown) in longest.iter_mut().enumerate().skip(first) {
            let left = column as u128 * column_length;
            if left >= end {
                break;
            }
            let inside = end.min(left + column_length) - start.max(left);
            if inside > shown.1 {
                *shown = (*mark, inside);
            }
        }
    }
    longest.into_iter().map(|(mark, _)| mark).collect()
}

#[cfg(test)]
mod tests {
    use rannc_schedule::{Action, Event, RankId, RankTimeline, StageId, Timeline};

    use super::picture;

    #[test]
    fn columns_are_equal_parts_of_the_step() {
        let stage = StageId(0);
        let event =
            |rank, action, start_ns, end_ns| Event { rank: RankId(rank), action, start_ns, end_ns };
        let timeline = Timeline {
            makespan_ns: 40,
            ranks: vec![RankTimeline::default(); 40],
            events: vec![
                event(0, Action::Forward { stage, microbatch: 12, rows: 1 }, 0, 10),
                event(0, Action::Backward { stage, microbatch: 12, rows: 1 }, 20, 39),
                event(0, Action::ReduceGradients { group: 0 }, 39, 40),
                event(39, Action::Forward { stage, microbatch: 3, rows: 1 }, 10, 40),
            ],
        };
        let text = picture(&timeline);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 33);
        insta::assert_snapshot!([lines[0], lines[1], lines[16], lines[32]].join("\n"), @"
        rank  0 |222222222222222222222222........................cccccccccccccccccccccccccccccccccccccccccccccc++
        rank  1 |
        ... 8 more ranks
        rank 39 |........................333333333333333333333333333333333333333333333333333333333333333333333333
        ");
    }
}
