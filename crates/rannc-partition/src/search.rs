//! The search for the best division: numbers of stages and microbatches, and schedules.

use std::collections::BTreeSet;

use fixedbitset::FixedBitSet;
use rannc_cost::{Cluster, CostModel, ScheduleKind, Sharding, Training};
use rannc_graph::{Graph, NodeId};

use crate::error::Bytes;
use crate::interval::Intervals;
use crate::stage::{Division, Goal, Problem};
use crate::table::{Layout, Setting, Table};
use crate::{Atoms, Blocks, PartitionError};

/// The most candidates that a search returns.
const NUM_CANDIDATES: usize = 8;
/// Candidates may take longer than the best by this part of it: a half.
const WORST_OVER_BEST: u64 = 2;
/// The most units that devices are handed out in; with more devices, a unit is several.
const MAX_UNITS: usize = 64;
/// The most blocks, unless more stages were asked for; also tried when nothing fits with fewer.
const MAX_BLOCKS: usize = 128;

/// What to plan for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Rows of the global batch.
    pub batch_rows: u64,
    /// Devices to use: the first of the cluster.
    pub num_devices: usize,
    /// The fewest microbatches to consider.
    pub min_microbatches: u64,
    /// The most microbatches to consider.
    pub max_microbatches: u64,
    /// Exactly this many microbatches.
    pub microbatches: Option<u64>,
    /// Exactly this many stages.
    pub num_stages: Option<usize>,
    /// Exactly this many replicas of every stage.
    pub num_replicas: Option<usize>,
    /// The number of blocks that the model is cut into before the search, at most 128. More are
    /// used if there are to be more stages, or if nothing fits.
    pub max_blocks: usize,
    /// What a stage may take on each device.
    pub memory_limit_bytes: u64,
    /// What training adds to the model's memory.
    pub training: Training,
    /// The schedules to consider; of equals the first wins.
    pub schedules: Vec<ScheduleKind>,
}

impl Options {
    /// The usual options: up to 32 microbatches, 32 blocks, Adam, fill-drain.
    pub fn new(batch_rows: u64, num_devices: usize, memory_limit_bytes: u64) -> Self {
        Self {
            batch_rows,
            num_devices,
            min_microbatches: 1,
            max_microbatches: 32,
            microbatches: None,
            num_stages: None,
            num_replicas: None,
            max_blocks: 32,
            memory_limit_bytes,
            training: Training::default(),
            schedules: vec![ScheduleKind::FillDrain],
        }
    }
}

/// A stage of a candidate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageCandidate {
    /// Its operators, with those that are cloned into it.
    pub nodes: FixedBitSet,
    /// The devices of its replicas, ascending.
    pub ranks: Vec<u32>,
    /// In which proportion the replicas divide the rows of a microbatch; equally if empty.
    pub shares: Vec<u64>,
    /// What each replica keeps only a part of.
    pub sharding: Sharding,
    /// Convex groups of operators whose inner values are computed again in backward.
    pub recompute: Vec<Vec<NodeId>>,
}

/// A way to train the model. Stages are in the order in which values flow; ranks in none of them
/// are idle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// At least one.
    pub stages: Vec<StageCandidate>,
    /// Into how many parts the batch is cut.
    pub microbatches: u64,
    /// In which order they run.
    pub schedule: ScheduleKind,
    /// The estimated time of a step.
    pub estimate_ns: u64,
}

/// The numbers of microbatches that a search considers: powers of two and divisors of the batch
/// within the range of the options, ascending, none above the rows of the batch.
pub fn microbatch_candidates(options: &Options) -> Vec<u64> {
    if let Some(microbatches) = options.microbatches {
        return vec![microbatches];
    }
    let most = options.max_microbatches.min(options.batch_rows).max(1);
    let fewest = options.min_microbatches.clamp(1, most);
    let mut found: BTreeSet<u64> = std::iter::successors(Some(1_u64), |power| power.checked_mul(2))
        .take_while(|&power| power <= most)
        .filter(|&power| power >= fewest)
        .collect();
    // Divisors beyond this would be microbatches too small to be worth the search.
    let divisors = fewest..=most.min(1 << 16);
    found.extend(divisors.filter(|&divisor| options.batch_rows.is_multiple_of(divisor)));
    if found.is_empty() {
        found.insert(fewest);
    }
    found.into_iter().collect()
}

/// Finds the best ways to train the model: at most 8, best first, all different, none estimated to
/// take more than half as long again as the best.
///
/// All devices are used if rows and memory allow. Where they do not, devices are left idle, and the
/// fastest way wins however many it uses: no stage gets more replicas than a microbatch has
/// rows, and a batch that cannot be split has one microbatch and one replica of each stage. With
/// more than 64 devices they are handed out in equal groups. Replicas that were asked for apply to
/// every stage; if stages were not, there are as many as the devices suffice for.
///
/// Candidates are compared by estimated time, then number of stages, number of microbatches, order
/// of the schedule in the options, places of the cuts and replicas. Each is the best of its number of
/// stages, number of microbatches and schedule.
///
/// # Errors
///
/// Any [`PartitionError`] about options, or [`PartitionError::DoesNotFit`].
pub fn search(
    graph: &Graph,
    costs: &dyn CostModel,
    cluster: &Cluster,
    options: &Options,
) -> Result<Vec<Candidate>, PartitionError> {
    let atoms = Atoms::new(graph);
    check(graph, &atoms, cluster, options)?;
    if atoms.is_empty() {
        return Ok(vec![trivial(graph, options)]);
    }
    let search = Search { graph, atoms: &atoms, costs, cluster, options };
    let wanted = options.max_blocks.clamp(1, MAX_BLOCKS);
    let mut num_blocks = wanted.max(options.num_stages.unwrap_or(1));
    loop {
        let result = search.with_blocks(num_blocks);
        let more = (num_blocks * 2).min(MAX_BLOCKS).min(atoms.len());
        match result {
            Err(PartitionError::DoesNotFit { .. }) if more > num_blocks => num_blocks = more,
            _ => return result,
        }
    }
}

/// The only way to run a model without operators.
fn trivial(graph: &Graph, options: &Options) -> Candidate {
    let nodes = FixedBitSet::with_capacity(graph.nodes().len());
    let replicas = options.num_replicas.unwrap_or(options.num_devices);
    let ranks = (0..replicas as u32).collect();
    Candidate {
        stages: vec![StageCandidate { nodes, ranks, ..StageCandidate::default() }],
        microbatches: microbatch_candidates(options)[0],
        schedule: options.schedules[0],
        estimate_ns: 0,
    }
}

/// Checks what was asked for against what there is.
fn check(
    graph: &Graph,
    atoms: &Atoms,
    cluster: &Cluster,
    options: &Options,
) -> Result<(), PartitionError> {
    let Options { batch_rows, num_devices, .. } = *options;
    let problem = if batch_rows == 0 {
        "the batch has no rows".to_owned()
    } else if num_devices == 0 {
        "there are no devices".to_owned()
    } else if options.schedules.is_empty() {
        "there are no schedules to choose from".to_owned()
    } else if [options.num_stages, options.num_replicas].contains(&Some(0))
        || options.microbatches == Some(0)
    {
        "stages, replicas and microbatches must be at least 1".to_owned()
    } else if options.min_microbatches > options.max_microbatches {
        let (min, max) = (options.min_microbatches, options.max_microbatches);
        format!("at least {min} and at most {max} microbatches were asked for")
    } else if cluster.devices.len() < num_devices {
        let found = cluster.devices.len();
        format!("{num_devices} devices were asked for, but the cluster has {found}")
    } else {
        String::new()
    };
    if !problem.is_empty() {
        return Err(PartitionError::Options { problem });
    }
    let num_stages = options.num_stages.unwrap_or(1);
    let num_replicas = options.num_replicas.unwrap_or(1);
    let microbatches = options.microbatches.unwrap_or(1);
    let batch = graph.batch();
    if num_stages > atoms.len().max(1) {
        return Err(PartitionError::TooFewOperators { num_stages, num_atoms: atoms.len().max(1) });
    }
    if num_stages.saturating_mul(num_replicas) > num_devices {
        return Err(PartitionError::TooFewDevices { num_stages, num_replicas, num_devices });
    }
    if !batch.splittable && !atoms.is_empty() && (microbatches > 1 || num_replicas > 1) {
        let reason = batch.reason.clone().unwrap_or_else(|| "an operator mixes its rows".into());
        return Err(PartitionError::NotSplittable { microbatches, num_replicas, reason });
    }
    let fewest = microbatch_candidates(options)[0];
    if batch.splittable && fewest.saturating_mul(num_replicas as u64) > batch_rows {
        let microbatches = fewest;
        return Err(PartitionError::TooFewRows { microbatches, num_replicas, batch_rows });
    }
    Ok(())
}

struct Search<'a> {
    graph: &'a Graph,
    atoms: &'a Atoms,
    costs: &'a dyn CostModel,
    cluster: &'a Cluster,
    options: &'a Options,
}

/// A division with what candidates are compared by, in this order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    step_ns: u64,
    num_stages: usize,
    microbatches: u64,
    /// The position of the schedule in the options.
    schedule: usize,
    division: Division,
}

/// A number of microbatches with a way to hand out devices.
struct Case {
    setting_microbatches: u64,
    layout: Layout,
    table: Table,
}

impl Search<'_> {
    fn with_blocks(&self, max_blocks: usize) -> Result<Vec<Candidate>, PartitionError> {
        let blocks = self.blocks(max_blocks);
        let cases = self.cases(&blocks);
        let problems = self.problems(&cases);
        let busy: Vec<&Problem> = problems
            .iter()
            .filter(|problem| self.graph.batch().splittable && problem.layout.uses_all)
            .collect();
        let all: Vec<&Problem> = problems.iter().collect();
        for allowed in [busy, all] {
            if let Some(bounds) = Self::bounds(&allowed) {
                return Ok(self.candidates(self.solve(&allowed, &bounds), &blocks));
            }
        }
        Err(self.does_not_fit(&problems, &blocks))
    }

    fn blocks(&self, max_blocks: usize) -> Blocks {
        let rows = self.options.batch_rows.div_ceil(self.options.num_devices as u64);
        let rows = if self.graph.batch().splittable { rows } else { self.options.batch_rows };
        Blocks::new(self.graph, self.atoms, self.costs, rows, max_blocks)
    }

    /// The best divisions of all problems, best first.
    fn solve(&self, problems: &[&Problem], bounds: &[u64]) -> Vec<Found> {
        let mut found = Vec::new();
        for (problem, &bound) in problems.iter().zip(bounds) {
            let schedules = &self.options.schedules;
            let schedule = schedules.iter().position(|&kind| kind == problem.schedule);
            let schedule = schedule.expect("problems are made from the schedules of the options");
            let divisions = problem.solve(Goal::Time { bound }).into_iter();
            found.extend(divisions.map(|division| Found {
                step_ns: division.value,
                num_stages: division.starts.len(),
                microbatches: problem.microbatches,
                schedule,
                division,
            }));
        }
        found.sort();
        found
    }

    /// The best few as candidates; a division that is there with another schedule is left out.
    fn candidates(&self, found: Vec<Found>, blocks: &Blocks) -> Vec<Candidate> {
        let mut kept: Vec<Found> = Vec::new();
        for next in found {
            let same = |other: &Found| {
                (other.microbatches, &other.division) == (next.microbatches, &next.division)
            };
            if kept.len() < NUM_CANDIDATES && !kept.iter().any(same) {
                kept.push(next);
            }
        }
        let candidate = |found: Found| Candidate {
            stages: self.stages(&found.division, blocks),
            microbatches: found.microbatches,
            schedule: self.options.schedules[found.schedule],
            estimate_ns: found.step_ns,
        };
        kept.into_iter().map(candidate).collect()
    }

    fn stages(&self, division: &Division, blocks: &Blocks) -> Vec<StageCandidate> {
        let ends = division.starts.iter().skip(1).copied().chain([blocks.len()]);
        let ranges = division.starts.iter().zip(ends).zip(&division.replicas);
        let mut next = 0;
        ranges
            .map(|((&start, end), &replicas)| {
                let atoms = blocks.atoms(start..end).iter().copied();
                let ranks = next..next + replicas as u32;
                next = ranks.end;
                StageCandidate {
                    nodes: self.atoms.stage(self.graph, atoms),
                    ranks: ranks.collect(),
                    ..StageCandidate::default()
                }
            })
            .collect()
    }

    fn setting(&self, microbatches: u64) -> Setting<'_> {
        let Options { batch_rows, ref training, .. } = *self.options;
        Setting { cluster: self.cluster, training, batch_rows, microbatches }
    }

    /// Every number of microbatches with every layout, priced.
    fn cases(&self, blocks: &Blocks) -> Vec<Case> {
        let splittable = self.graph.batch().splittable;
        let counts = if splittable { microbatch_candidates(self.options) } else { vec![1] };
        let laid_out: Vec<(u64, Layout)> = counts
            .into_iter()
            .flat_map(|microbatches| {
                let layouts = self.layouts(self.setting(microbatches), blocks.len());
                layouts.into_iter().map(move |layout| (microbatches, layout))
            })
            .collect();
        let mut all_rows: BTreeSet<u64> = BTreeSet::new();
        for (microbatches, layout) in &laid_out {
            let setting = self.setting(*microbatches);
            all_rows.extend(layout.replica_counts().into_iter().map(|count| setting.rows(count)));
        }
        let batch_rows = self.options.batch_rows;
        let intervals =
            Intervals::new(self.graph, self.atoms, blocks, self.costs, batch_rows, all_rows);
        let case = |(microbatches, layout)| {
            let table = Table::new(&intervals, &layout, self.setting(microbatches));
            Case { setting_microbatches: microbatches, layout, table }
        };
        laid_out.into_iter().map(case).collect()
    }

    /// The ways to hand out devices with some number of microbatches.
    ///
    /// Numbers of stages that can use all devices share one layout. The others get as many replicas
    /// for each stage as there are rows, or as was asked for.
    fn layouts(&self, setting: Setting, num_blocks: usize) -> Vec<Layout> {
        let num_devices = self.options.num_devices;
        let splittable = self.graph.batch().splittable;
        let most = if splittable { setting.most_replicas() } else { 1 };
        let fixed = self.options.num_replicas;
        let unit = num_devices.div_ceil(MAX_UNITS);
        let num_units = num_devices.div_ceil(unit);
        let counts = match (self.options.num_stages, fixed) {
            (Some(count), _) => count..=count,
            (None, Some(replicas)) => {
                let count = (num_devices / replicas).min(num_blocks);
                count..=count
            }
            (None, None) => 1..=num_devices.min(num_blocks),
        };
        let mut layouts = Vec::new();
        let mut sharing = Vec::new();
        for count in counts {
            if fixed.is_none() && count <= num_units && count * (most / unit) >= num_units {
                sharing.push(count);
                continue;
            }
            let replicas = fixed.unwrap_or(most.min(num_devices / count));
            if replicas <= most {
                let offsets = (0..=count).map(|stage| stage * replicas).collect();
                layouts.push(Layout::new(self.cluster, num_devices, offsets, true, vec![count]));
            }
        }
        if !sharing.is_empty() {
            let offsets = (0..=num_units).map(|index| (index * unit).min(num_devices)).collect();
            layouts.push(Layout::new(self.cluster, num_devices, offsets, false, sharing));
        }
        layouts
    }

    fn problems<'a>(&self, cases: &'a [Case]) -> Vec<Problem<'a>> {
        let schedules = &self.options.schedules;
        let both = cases.iter().flat_map(|case| schedules.iter().map(move |&kind| (case, kind)));
        both.map(|(case, schedule)| Problem {
            table: &case.table,
            layout: &case.layout,
            microbatches: case.setting_microbatches,
            schedule,
            limit_bytes: self.options.memory_limit_bytes,
        })
        .collect()
    }

    /// A step time for each problem that its candidates to return do not exceed; none if nothing
    /// fits.
    fn bounds(problems: &[&Problem]) -> Option<Vec<u64>> {
        let quick: Vec<Vec<Division>> =
            problems.iter().map(|problem| problem.solve(Goal::QuickTime)).collect();
        let with_counts = quick.iter().zip(problems).flat_map(|(divisions, problem)| {
            divisions.iter().map(|division| (division, problem.microbatches))
        });
        let mut distinct: Vec<_> = with_counts.collect();
        distinct.sort_unstable();
        // With two schedules the same division may appear twice.
        distinct.dedup();
        let steps_ns = || distinct.iter().map(|(division, _)| division.value);
        let best = steps_ns().next()?;
        let worst = steps_ns().take(NUM_CANDIDATES).next_back()?;
        let common = worst.min(best.saturating_add(best / WORST_OVER_BEST));
        let worst_of = |divisions: &Vec<Division>| divisions.iter().map(|found| found.value).max();
        Some(quick.iter().map(|found| worst_of(found).unwrap_or(0).min(common)).collect())
    }

    fn does_not_fit(&self, problems: &[Problem], blocks: &Blocks) -> PartitionError {
        let attempts = problems.iter().enumerate().flat_map(|(index, problem)| {
            let divisions = problem.solve(Goal::Memory).into_iter();
            divisions.map(move |division| (division.value, index, division))
        });
        let limit_bytes = self.options.memory_limit_bytes;
        let Some((needed_bytes, index, division)) = attempts.min() else {
            let problem = "no number of stages, replicas and microbatches is possible".to_owned();
            return PartitionError::Options { problem };
        };
        let problem = &problems[index];
        let bytes = problem.stage_bytes(&division);
        let largest = bytes.iter().position(|&bytes| bytes == needed_bytes).unwrap_or_default();
        let stage = self.describe(problem, &division, largest, blocks);
        let advice = self.advice(needed_bytes);
        PartitionError::DoesNotFit { needed_bytes, limit_bytes, stage, advice }
    }

    fn describe(
        &self,
        problem: &Problem,
        division: &Division,
        stage: usize,
        blocks: &Blocks,
    ) -> String {
        let end = division.starts.get(stage + 1).copied().unwrap_or(blocks.len());
        let atoms = blocks.atoms(division.starts[stage]..end);
        let nodes = atoms.iter().flat_map(|&atom| self.atoms.members(atom));
        let keys = || nodes.clone().map(|&id| self.graph.node(id).key.as_str());
        let (first, last) =
            (keys().next().unwrap_or_default(), keys().next_back().unwrap_or_default());
        let operators =
            if first == last { format!("`{first}`") } else { format!("`{first}` to `{last}`") };
        format!(
            "stage {} of {} ({operators}; replicas: {}, microbatches: {}, schedule: {})",
            stage + 1,
            division.starts.len(),
            division.replicas[stage],
            problem.microbatches,
            problem.schedule,
        )
    }

    fn advice(&self, needed_bytes: u64) -> String {
        let mut advice = format!(
            "use more devices than {}, devices with more memory ({} for each with this many), \
             or a smaller batch than {} rows",
            self.options.num_devices,
            Bytes(needed_bytes),
            self.options.batch_rows,
        );
        let Options { num_stages, num_replicas, microbatches, .. } = self.options;
        if num_stages.is_some() || num_replicas.is_some() || microbatches.is_some() {
            advice += "; or let the planner choose stages, replicas and microbatches";
        }
        advice
    }
}

#[cfg(test)]
mod tests;
