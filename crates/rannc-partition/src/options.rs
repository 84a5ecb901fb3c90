//! What to search for, and what is found.

use std::collections::BTreeSet;

use fixedbitset::FixedBitSet;
use rannc_cost::{ScheduleKind, Sharding, Training};
use rannc_graph::NodeId;

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
    /// The number of blocks that the model is cut into before the search. More are used if there
    /// are to be more stages, or if nothing fits.
    pub max_blocks: usize,
    /// What a stage may take on a device: the least of this and of the device's memory without the
    /// margin.
    pub memory_limit_bytes: u64,
    /// The part of each device's memory to leave free, in millionths.
    pub memory_margin_ppm: u64,
    /// Whether blocks may be computed again in backward.
    pub recompute: bool,
    /// The most that the replicas of a stage may divide among themselves.
    pub sharding: Sharding,
    /// The least that they divide, wherever a stage has several.
    pub least_sharding: Sharding,
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
            memory_margin_ppm: 0,
            recompute: false,
            sharding: Sharding::None,
            least_sharding: Sharding::None,
            training: Training::default(),
            schedules: vec![ScheduleKind::FillDrain],
        }
    }
}

impl Options {
    /// Numbers of stages, and of replicas of each, of the pipelines in which all stages have equally many:
    /// those that use every device; and for each number of replicas that divides the batch, as many stages
    /// as there are devices for. So of 1,023 devices 1,008 make 63 stages of 16.
    pub(crate) fn regular_shapes(&self) -> Vec<(usize, usize)> {
        let Self { num_devices, num_stages, num_replicas, .. } = *self;
        let of_stages = (1..=num_devices)
            .filter(|&stages| num_devices.is_multiple_of(stages) || num_stages == Some(stages))
            .map(|stages| (stages, num_devices / stages));
        let divides = |replicas: usize| self.batch_rows.is_multiple_of(replicas as u64);
        let of_replicas = (1..=num_devices)
            .filter(|&replicas| divides(replicas) || num_replicas == Some(replicas))
            .map(|replicas| (num_devices / replicas, replicas));
        let all: BTreeSet<(usize, usize)> = of_stages.chain(of_replicas).collect();
        let wanted = |&(stages, replicas): &(usize, usize)| {
            num_stages.is_none_or(|wanted| wanted == stages)
                && num_replicas.is_none_or(|wanted| wanted == replicas)
        };
        all.into_iter().filter(wanted).collect()
    }
}

/// Who wants to know how far a search is. Called often: what is shown is up to the receiver.
pub trait Progress {
    /// Some phase has done so many of its steps.
    fn update(&self, phase: &str, done: u64, total: u64);
}

/// Nobody.
impl Progress for () {
    fn update(&self, _: &str, _: u64, _: u64) {}
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
