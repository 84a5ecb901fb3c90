//! The report that people read.

use std::fmt::Write as _;

use crate::{Plan, RankEstimate};

impl Plan {
    /// What was decided: stages, replicas, microbatches, and the predicted time and memory.
    pub fn report(&self) -> String {
        let mut text = String::new();
        self.write_report(&mut text).expect("writing to a string cannot fail");
        text
    }

    /// The report, and how a global batch of `rows` rows would be cut.
    pub fn report_for(&self, rows: u64) -> String {
        let mut text = self.report();
        self.write_shares(&mut text, rows).expect("writing to a string cannot fail");
        text
    }

    fn write_report(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "deployment of {}: {} on {}, {}, schedule {}, global batch {}",
            self.model,
            count(self.stages.len() as u64, "stage"),
            count(self.world_size.into(), "process"),
            count(self.microbatches, "microbatch"),
            self.schedule,
            self.batch_size,
        )?;
        for (index, stage) in self.stages.iter().enumerate() {
            write!(
                text,
                "  stage {index}: {} on {} {}, {}",
                count(stage.ranks.len() as u64, "replica"),
                if stage.ranks.len() == 1 { "rank" } else { "ranks" },
                ranges(&stage.ranks),
                count(stage.nodes.len() as u64, "operator"),
            )?;
            if !stage.shares.is_empty() {
                let shares: Vec<String> = stage.shares.iter().map(u64::to_string).collect();
                write!(text, ", rows shared {}", shares.join(":"))?;
            }
            if !stage.sharding.is_none() {
                write!(text, ", sharded: {}", stage.sharding)?;
            }
            let again = stage.recompute.iter().map(Vec::len).sum::<usize>() as u64;
            if again > 0 {
                write!(text, ", {} recomputed", count(again, "operator"))?;
            }
            if let Some(cost) = self.estimates.as_ref().and_then(|all| all.stages.get(index)) {
                write!(
                    text,
                    "; predicted per microbatch of {}: forward {}, backward {}; all-reduce {}",
                    count(cost.rows, "row"),
                    duration(cost.forward_ns),
                    duration(cost.backward_ns),
                    duration(cost.all_reduce_ns),
                )?;
            }
            writeln!(text)?;
        }
        let Some(estimates) = &self.estimates else {
            return writeln!(text, "  written by hand: no predictions");
        };
        for rank in &estimates.ranks {
            write_rank(text, rank)?;
        }
        let step_ns = estimates.step_ns.max(1);
        writeln!(
            text,
            "  predicted step: {}, {:.0} rows a second (simulated, costs {})",
            duration(estimates.step_ns),
            self.batch_size as f64 * 1e9 / step_ns as f64,
            estimates.costs_of
        )?;
        let Some(bound) = &estimates.lower_bound else { return Ok(()) };
        write!(
            text,
            "  no plan is faster than {}: work over devices {}, longest path {}",
            duration(bound.step_ns),
            duration(bound.work_ns),
            duration(bound.critical_path_ns),
        )?;
        if bound.memory_ns > 0 {
            write!(text, ", with as many replicas as fit {}", duration(bound.memory_ns))?;
        }
        let gap = (step_ns as f64 / bound.step_ns.max(1) as f64 - 1.0) * 100.0;
        writeln!(text, "; this one takes {gap:.0} % longer")
    }

    fn write_shares(&self, text: &mut String, rows: u64) -> std::fmt::Result {
        let microbatch = rows.div_ceil(self.microbatches);
        for (index, stage) in self.stages.iter().enumerate() {
            let all: u128 = stage.shares.iter().map(|&share| u128::from(share)).sum();
            let replica = match stage.shares.iter().max() {
                Some(&most) => {
                    (u128::from(microbatch) * u128::from(most)).div_ceil(all.max(1)) as u64
                }
                None => microbatch.div_ceil(stage.ranks.len() as u64),
            };
            writeln!(
                text,
                "  with {}: microbatches of up to {microbatch}, stage {index} up to {replica} a replica",
                count(rows, "row"),
            )?;
        }
        Ok(())
    }
}

fn write_rank(text: &mut String, rank: &RankEstimate) -> std::fmt::Result {
    let memory = &rank.memory;
    writeln!(
        text,
        "  rank {}: predicted memory {} of {} (parameters {}, gradients {}, optimizer {}, \
         activations {}, working {}, messages {})",
        rank.rank,
        size(memory.total()),
        size(rank.limit_bytes),
        size(memory.parameters),
        size(memory.gradients),
        size(memory.optimizer),
        size(memory.activations),
        size(memory.working),
        size(memory.buffers),
    )
}

fn count(number: u64, noun: &str) -> String {
    match (number, noun) {
        (1, _) => format!("1 {noun}"),
        (_, noun) if noun.ends_with('s') || noun.ends_with("ch") => format!("{number} {noun}es"),
        _ => format!("{number} {noun}s"),
    }
}

/// `0-3, 6` for 0, 1, 2, 3 and 6.
fn ranges(ranks: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(rank) => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let text: Vec<String> = runs
        .into_iter()
        .map(
            |(first, last)| {
                if first == last { first.to_string() } else { format!("{first}-{last}") }
            },
        )
        .collect();
    text.join(", ")
}

/// A duration with three digits or so.
pub fn duration(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// A size in binary units.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::{count, ranges, size};

    #[test]
    fn numbers_read_well() {
        assert_eq!(ranges(&[0, 1, 2, 3, 6]), "0-3, 6");
        assert_eq!(count(1, "process"), "1 process");
        assert_eq!(count(4, "process"), "4 processes");
        assert_eq!(count(4, "microbatch"), "4 microbatches");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(3 << 30), "3.0 GiB");
    }
}
