//! Simulating a training step of a deployment.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use rannc_cost::{Cluster, StageMemory};
use rannc_plan::{Options, Plan, Planner, size};
use rannc_schedule::{RankTimeline, Timeline, chrome_trace, timeline_text};
use serde_json::{Value, json};

use crate::args::SimulateArgs;
use crate::{input, report};

/// Columns of the timeline.
const COLUMNS: usize = 96;

/// Simulates and prints; writes the trace where one is wanted.
pub(crate) fn run(args: &SimulateArgs) -> Result<()> {
    let plan = input::plan(&args.deployment)?;
    let graph = input::graph(&args.graph)?;
    let cluster = input::cluster(&args.cluster)?;
    let profile = input::profile(args.cluster.profile.as_deref())?;
    let planner = Planner::new(&graph, profile.as_ref());
    let options = Options {
        batch_size: plan.batch_size,
        optimizer_state_factor: args.optimizer_state_factor,
        ..Options::default()
    };
    let (_, timeline) = planner.timeline(&cluster, &options, &plan)?;
    let memory = planner.evaluate(&cluster, &options, &plan.candidate(&graph)?)?.memory;
    if let Some(path) = &args.trace {
        std::fs::write(path, chrome_trace(&timeline))
            .with_context(|| format!("cannot write the trace `{}`", path.display()))?;
    }
    let costs_of = profile.as_ref().map_or_else(
        || format!("estimated from the data of {}", cluster.devices[0].kind),
        |profile| format!("measured on {}", profile.device),
    );
    let step = Step { plan, cluster, timeline, memory, costs_of };
    report::result(&if args.json { format!("{}\n", step.in_json()) } else { step.in_words() });
    Ok(())
}

/// A simulated step.
struct Step {
    plan: Plan,
    cluster: Cluster,
    timeline: Timeline,
    /// By rank.
    memory: Vec<StageMemory>,
    costs_of: String,
}

impl Step {
    fn samples_per_second(&self) -> f64 {
        self.plan.batch_size as f64 * 1e9 / self.timeline.makespan_ns.max(1) as f64
    }

    /// The part of the step in which a rank runs stages.
    fn utilisation(&self, rank: &RankTimeline) -> f64 {
        rank.busy_ns as f64 / self.timeline.makespan_ns.max(1) as f64
    }

    fn in_words(&self) -> String {
        let Self { plan, timeline, .. } = self;
        let mut text = format!(
            "{}: {:.1} rows a second, simulated with costs {}\n\
             global batch {}, microbatches: {}, schedule {}, processes: {}\n{}",
            plan.model,
            self.samples_per_second(),
            self.costs_of,
            plan.batch_size,
            plan.microbatches,
            plan.schedule,
            plan.world_size,
            timeline_text(timeline, COLUMNS),
        );
        let lines: Vec<String> =
            (0..timeline.ranks.len()).map(|rank| self.rank_line(rank)).collect();
        let mut first = 0;
        for equal in lines.chunk_by(|left, right| left == right) {
            let ranks = match equal.len() {
                1 => format!("rank {first}"),
                count => format!("ranks {first}-{}", first + count - 1),
            };
            writeln!(text, "{ranks}: {}", equal[0]).expect("a string can be written to");
            first += equal.len();
        }
        text
    }

    fn rank_line(&self, rank: usize) -> String {
        let times = &self.timeline.ranks[rank];
        format!(
            "memory {} of {} (activations of the step {})",
            size(self.memory[rank].total()),
            size(self.cluster.devices[rank].memory_bytes),
            size(times.peak_activation_bytes),
        )
    }

    fn in_json(&self) -> Value {
        let ranks = self.timeline.ranks.iter().zip(&self.memory).zip(&self.cluster.devices);
        let ranks = ranks.enumerate().map(|(rank, ((times, memory), device))| {
            json!({
                "rank": rank,
                "device": device.kind,
                "busy_ns": times.busy_ns,
                "bubble_ns": times.bubble_ns,
                "utilisation": self.utilisation(times),
                "peak_activation_bytes": times.peak_activation_bytes,
                "memory": memory,
                "memory_bytes": memory.total(),
                "device_memory_bytes": device.memory_bytes,
            })
        });
        json!({
            "model": self.plan.model,
            "costs_of": self.costs_of,
            "batch_size": self.plan.batch_size,
            "microbatches": self.plan.microbatches,
            "schedule": self.plan.schedule,
            "step_ns": self.timeline.makespan_ns,
            "samples_per_second": self.samples_per_second(),
            "ranks": ranks.collect::<Vec<_>>(),
        })
    }
}
