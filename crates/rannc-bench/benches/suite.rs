//! Compares our plans with those of earlier planners, by one simulator.
//!
//! ```text
//! cargo bench -p rannc-bench --bench suite                     all cases
//! cargo bench -p rannc-bench --bench suite -- --quick          at most 16 devices
//! cargo bench -p rannc-bench --bench suite -- --case bert      those with `bert` in their name
//! ```

use std::io::Write as _;

use rannc_bench::baselines::{Baseline, Evaluate, Found, best};
use rannc_bench::cases::{self, Case};
use rannc_bench::resources::measure;
use rannc_bench::table::{Table, median, time};
use rannc_cost::{Cluster, ScheduleKind, Training};
use rannc_graph::Graph;
use rannc_partition::Candidate;
use rannc_partition::simple::Setting;
use rannc_plan::{Options, Plan, Planner};

/// The most microbatches that baselines try.
const MAX_MICROBATCHES: u64 = 512;
const GIB: f64 = 1_073_741_824.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo says `--bench` when it wants a measurement rather than a test.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted = arguments.iter().position(|argument| argument == "--case");
    let wanted = wanted.and_then(|at| arguments.get(at + 1));
    let mut cases = cases::all();
    cases.retain(|case| !quick || case.cluster.devices.len() <= 16);
    cases.retain(|case| wanted.is_none_or(|name| case.name.contains(name)));
    let mut columns =
        vec!["case", "cluster", "rows", "ours (simulated)", "planning", "bound", "gap"];
    columns.extend(Baseline::ALL.map(Baseline::name));
    let mut table = Table::new(&columns);
    show(table.text());
    let mut results = Vec::new();
    for case in cases {
        let result = Comparison::of(&case);
        show(&table.row(&result.cells(&case)));
        results.push((case, result));
    }
    show("\n");
    show(&summary(&results));
    let wrong = wrong_bounds(&results);
    show(&format!(
        "\nlower bounds above a plan that was found: {} {}\n",
        wrong.len(),
        wrong.join("; ")
    ));
    for (case, result) in &results {
        show(&result.losses(case));
    }
    assert!(wrong.is_empty(), "a lower bound is above a plan that was found: {wrong:?}");
}

fn show(text: &str) {
    let mut out = std::io::stdout();
    // A closed pipe is nobody's error.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The planner's own simulator.
struct Simulated<'a, 'g> {
    planner: &'a Planner<'g>,
    cluster: &'a Cluster,
    options: &'a Options,
}

impl Evaluate for Simulated<'_, '_> {
    fn step_ns(&self, candidate: &Candidate) -> Option<u64> {
        let found = self.planner.evaluate(self.cluster, self.options, candidate);
        let found = found.expect("baselines give valid candidates");
        found.fits.then_some(found.step_ns)
    }
}

/// Our plan of a case and those of the baselines.
struct Comparison {
    graph: Graph,
    ours: Result<Plan, String>,
    planning_ns: u64,
    theirs: Vec<Option<Found>>,
}

impl Comparison {
    fn of(case: &Case) -> Self {
        let graph = case.graph();
        let options = case.options();
        let (ours, usage) =
            measure(|| Planner::new(&graph, None).plan(&case.cluster, &options, &()));
        let theirs = {
            let planner = Planner::new(&graph, None);
            let simulated =
                Simulated { planner: &planner, cluster: &case.cluster, options: &options };
            let theirs = theirs(case, &options);
            best(&Baseline::ALL, &graph, &Setting::new(&case.cluster, &theirs), &simulated)
        };
        let ours = ours.map_err(|error| error.to_string());
        Self { graph, ours, planning_ns: usage.nanoseconds, theirs }
    }

    fn step_ns(&self) -> Option<u64> {
        let plan = self.ours.as_ref().ok()?;
        plan.estimates.as_ref().map(|estimates| estimates.step_ns)
    }

    fn bound_ns(&self) -> Option<u64> {
        let estimates = self.ours.as_ref().ok()?.estimates.as_ref()?;
        estimates.lower_bound.as_ref().map(|bound| bound.step_ns)
    }

    /// Step time of each baseline over ours, where both have a plan.
    fn ratio(&self, baseline: usize) -> Option<f64> {
        let theirs = self.theirs[baseline].as_ref()?.step_ns;
        Some(theirs as f64 / self.step_ns()? as f64)
    }

    fn cells(&self, case: &Case) -> Vec<String> {
        let step_ns = self.step_ns();
        let gap = step_ns.zip(self.bound_ns()).map(|(step, bound)| step as f64 / bound as f64);
        let text = |value: Option<String>| value.unwrap_or_else(|| "none".into());
        let mut cells = vec![
            case.name.to_owned(),
            case.cluster.name.clone(),
            case.batch_rows.to_string(),
            text(step_ns.map(time)),
            time(self.planning_ns),
            text(self.bound_ns().map(time)),
            text(gap.map(|gap| format!("{:.1} %", (gap - 1.0) * 100.0))),
        ];
        cells.extend(
            (0..Baseline::ALL.len())
                .map(|index| text(self.ratio(index).map(|ratio| format!("{ratio:.3}")))),
        );
        cells
    }

    /// The plans of the baselines that beat ours, beside ours.
    fn losses(&self, case: &Case) -> String {
        let ours_ns = self.step_ns().unwrap_or(u64::MAX);
        let mut lines = Vec::new();
        for (baseline, theirs) in Baseline::ALL.iter().zip(&self.theirs) {
            let Some(theirs) = theirs.as_ref().filter(|theirs| theirs.step_ns < ours_ns) else {
                continue;
            };
            lines.push(format!(
                "\n{}: {} takes {} (estimated {}, {} plans considered)",
                case.name,
                baseline.name(),
                time(theirs.step_ns),
                time(theirs.candidate.estimate_ns),
                theirs.considered,
            ));
            lines.extend(self.describe(&theirs.candidate));
        }
        if lines.is_empty() {
            return String::new();
        }
        match &self.ours {
            Ok(plan) => {
                lines.push(format!("ours takes {}", time(ours_ns)));
                lines.extend(describe_plan(plan));
            }
            Err(error) => lines.push(format!("ours: {error}")),
        }
        lines.join("\n") + "\n"
    }

    fn describe(&self, candidate: &Candidate) -> Vec<String> {
        let key = |node: usize| self.graph.nodes()[node].key.clone();
        let stages = candidate.stages.iter().map(|stage| {
            let keys: Vec<String> = stage.nodes.ones().map(key).collect();
            let again = stage.recompute.iter().map(Vec::len);
            line(&stage.ranks, &keys, again.sum(), &format!("{:?}", stage.sharding))
        });
        let head = format!("    {} microbatches, {}", candidate.microbatches, candidate.schedule);
        [head].into_iter().chain(stages).collect()
    }
}

fn describe_plan(plan: &Plan) -> Vec<String> {
    let stages = plan.stages.iter().map(|stage| {
        let again = stage.recompute.iter().map(Vec::len);
        let how = format!("{:?}, shares {:?}", stage.sharding, stage.shares);
        line(&stage.ranks, &stage.nodes, again.sum(), &how)
    });
    let head = format!("    {} microbatches, {}", plan.microbatches, plan.schedule);
    [head].into_iter().chain(stages).collect()
}

fn line(ranks: &[u32], keys: &[String], again: usize, how: &str) -> String {
    let none = String::new();
    let (first, last) = (keys.first().unwrap_or(&none), keys.last().unwrap_or(&none));
    let (low, high) = (ranks.first().unwrap_or(&0), ranks.last().unwrap_or(&0));
    let count = keys.len();
    format!(
        "    {} ranks {low}..={high}: {count} operators {first} to {last}, {again} recomputed, {how}",
        ranks.len()
    )
}

/// The options of the baselines.
fn theirs(case: &Case, options: &Options) -> rannc_partition::Options {
    let limit = options.memory_limit_gib.map_or(f64::INFINITY, |gib| gib * GIB);
    let factor = (options.optimizer_state_factor * 1e6).round();
    rannc_partition::Options {
        max_microbatches: MAX_MICROBATCHES,
        training: Training { optimizer_state_factor_ppm: factor as u64 },
        memory_margin_ppm: (options.memory_margin * 1e6).round() as u64,
        recompute: true,
        schedules: ScheduleKind::ALL.to_vec(),
        ..rannc_partition::Options::new(
            case.batch_rows,
            case.cluster.devices.len(),
            (limit * (1.0 - options.memory_margin)) as u64,
        )
    }
}

/// The cases whose lower bound is above some plan, which would make it wrong.
fn wrong_bounds(results: &[(Case, Comparison)]) -> Vec<&str> {
    let is_wrong = |result: &Comparison| {
        let theirs = result.theirs.iter().flatten().map(|found| found.step_ns);
        let best = theirs.chain(result.step_ns()).min();
        result.bound_ns().zip(best).is_some_and(|(bound, best)| bound > best)
    };
    results.iter().filter(|(_, result)| is_wrong(result)).map(|(case, _)| case.name).collect()
}

fn summary(results: &[(Case, Comparison)]) -> String {
    let mut table = Table::new(&["baseline", "cases", "no plan", "median", "worst", "in"]);
    for (index, baseline) in Baseline::ALL.iter().enumerate() {
        let ratios: Vec<(f64, &str)> = results
            .iter()
            .filter_map(|(case, result)| Some((result.ratio(index)?, case.name)))
            .collect();
        let values: Vec<f64> = ratios.iter().map(|&(ratio, _)| ratio).collect();
        let worst = ratios.iter().copied().min_by(|left, right| left.0.total_cmp(&right.0));
        let (worst, name) = worst.unwrap_or((f64::NAN, ""));
        let none = results.iter().filter(|(_, result)| result.theirs[index].is_none()).count();
        table.row(&[
            baseline.name().into(),
            values.len().to_string(),
            none.to_string(),
            format!("{:.3}", median(&values).unwrap_or(f64::NAN)),
            format!("{worst:.3}"),
            name.into(),
        ]);
    }
    table.text().to_owned()
}
