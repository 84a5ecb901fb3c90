//! Divides one graph for whatever devices and options, and keeps what several searches need.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fixedbitset::FixedBitSet;
use rannc_cost::{Cluster, DeviceCosts};
use rannc_graph::Graph;

use crate::block::{Balance, Line};
use crate::bound::LowerBound;
use crate::options::{Candidate, Options, Progress, StageCandidate, microbatch_candidates};
use crate::runs::Runs;
use crate::search::Search;
use crate::{Atoms, Blocks, PartitionError};

/// Divides one graph, again and again: what depends on the graph alone is found once, and what
/// depends on devices and batch is kept as long as they stay the same.
pub struct Partitioner<'g> {
    pub(crate) graph: &'g Graph,
    pub(crate) atoms: Atoms,
    lines: Mutex<BTreeMap<LineKey, Arc<Line>>>,
    cut: Mutex<BTreeMap<(LineKey, usize, u64), Arc<Cut>>>,
}

/// The rows at which times are compared, what is balanced, and the device, by a text.
pub(crate) type LineKey = (u64, Balance, String);

/// Blocks with what runs of them amount to.
pub(crate) struct Cut {
    pub(crate) blocks: Blocks,
    pub(crate) runs: Runs,
}

impl<'g> Partitioner<'g> {
    /// Finds the atoms of the graph.
    pub fn new(graph: &'g Graph) -> Self {
        let atoms = Atoms::new(graph);
        Self { graph, atoms, lines: Mutex::default(), cut: Mutex::default() }
    }

    /// The graph's atoms.
    pub fn atoms(&self) -> &Atoms {
        &self.atoms
    }

    /// Finds good ways to train the model, all different, the best estimate first: the best few of
    /// all, and the best with equally many replicas of each stage for each number of stages.
    ///
    /// All devices are used if rows and memory allow. Where they do not, devices are left idle, and
    /// the fastest way wins however many it uses: no stage gets more replicas than a microbatch has
    /// rows, and a batch that cannot be split has one microbatch and one replica of each stage.
    /// Replicas that were asked for apply to every stage; if stages were not, there are as many as the
    /// devices suffice for.
    ///
    /// Candidates are compared by estimated time, then number of stages, number of microbatches, order
    /// of the schedule in the options, places of the cuts and devices.
    ///
    /// # Errors
    ///
    /// Any [`PartitionError`] about options, or [`PartitionError::DoesNotFit`].
    pub fn search(
        &self,
        costs: &DeviceCosts<'_>,
        cluster: &Cluster,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Vec<Candidate>, PartitionError> {
        check(self.graph, &self.atoms, cluster, options)?;
        if self.atoms.is_empty() {
            return Ok(vec![trivial(self.graph, options)]);
        }
        let search = Search { progress, ..Search::new(self, costs, cluster, options) };
        let found = search.run()?;
        log::debug!("{} candidates, best estimate {} ns", found.len(), found[0].estimate_ns);
        Ok(found)
    }

    /// The stages of each of `likes` on the same devices in the same order, cut where the slowest is as fast
    /// as can be: at the blocks that a search works with, and of the best once more near these cuts; the
    /// best first. Those that do not fit, or have more stages than there are blocks, are left out. Takes
    /// far less time than a search.
    ///
    /// # Errors
    ///
    /// Any [`PartitionError`] about options.
    pub fn recut(
        &self,
        costs: &DeviceCosts<'_>,
        cluster: &Cluster,
        options: &Options,
        likes: &[Candidate],
    ) -> Result<Vec<Candidate>, PartitionError> {
        check(self.graph, &self.atoms, cluster, options)?;
        Ok(Search::new(self, costs, cluster, options).recut(likes))
    }

    /// How short a step can possibly be with these devices and options.
    pub fn lower_bound(
        &self,
        costs: &DeviceCosts<'_>,
        cluster: &Cluster,
        options: &Options,
    ) -> LowerBound {
        let search = Search::new(self, costs, cluster, options);
        search.ground().bound(&search.microbatch_counts())
    }

    pub(crate) fn line(&self, costs: &DeviceCosts<'_>, key: &LineKey) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(Line::of(self.graph, &self.atoms, costs.class(0), key.0, key.1));
        Arc::clone(lines.entry(key.clone()).or_insert_with(make))
    }

    pub(crate) fn cut(
        &self,
        costs: &DeviceCosts<'_>,
        key: &LineKey,
        num_blocks: usize,
        batch: u64,
    ) -> Arc<Cut> {
        let line = self.line(costs, key);
        let mut cuts = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (key.clone(), num_blocks, batch);
        let make = || Arc::new(self.runs_of(costs, Blocks::cut(&line, num_blocks), batch));
        Arc::clone(cuts.entry(key).or_insert_with(make))
    }

    pub(crate) fn runs_of(&self, costs: &DeviceCosts<'_>, blocks: Blocks, batch_rows: u64) -> Cut {
        let runs = Runs::new(self.graph, &self.atoms, &blocks, costs.class(0), batch_rows);
        Cut { blocks, runs }
    }
}

/// Finds the best ways to train the model; see [`Partitioner::search`].
///
/// # Errors
///
/// Any [`PartitionError`] about options, or [`PartitionError::DoesNotFit`].
pub fn search(
    graph: &Graph,
    costs: &DeviceCosts<'_>,
    cluster: &Cluster,
    options: &Options,
) -> Result<Vec<Candidate>, PartitionError> {
    Partitioner::new(graph).search(costs, cluster, options, &())
}

/// The only way to run a model without operators.
fn trivial(graph: &Graph, options: &Options) -> Candidate {
    let nodes = FixedBitSet::with_capacity(graph.nodes().len());
    let (replicas, microbatches) = if graph.batch().splittable {
        let replicas = options.num_replicas.unwrap_or(options.num_devices);
        (replicas, microbatch_candidates(options)[0])
    } else {
        (1, 1)
    };
    let ranks = (0..replicas as u32).collect();
    Candidate {
        stages: vec![StageCandidate { nodes, ranks, ..StageCandidate::default() }],
        microbatches,
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
