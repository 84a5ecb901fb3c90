//! What to say when nothing fits: by how much, and which changes would help.
//!
//! Every change that is named was tried: with it, some division fits.

use rannc_cost::{Cluster, Sharding};

use crate::error::Remedy;
use crate::facts::FactCache;
use crate::options::Options;
use crate::partitioner::Cut;
use crate::search::Search;
use crate::stage::{Division, Problem};
use crate::{Blocks, PartitionError};

/// Devices are looked for up to so many times as many.
const MOST_TIMES_DEVICES: usize = 64;
/// Only so many stages are priced to find advice; what takes longer is not said.
const MOST_PRICED: u64 = 8_000_000;
/// Numbers of microbatches to look at: the fewest, the most, and some between.
const COUNTS: usize = 3;
/// Bisection of memory ends at this part of it.
const PRECISION: u64 = 512;

/// A division that fits if a device has some memory.
struct Fitting {
    needed_bytes: u64,
    stage: String,
}

impl Search<'_, '_> {
    /// The error that says why these blocks fit nowhere, and what would help.
    pub(crate) fn does_not_fit(&self, cut: &Cut) -> PartitionError {
        let limit_bytes = self.limits.iter().copied().max().unwrap_or_default();
        // At most half of the time, so that there is some advice however large the model is.
        self.priced.set(MOST_PRICED / 2);
        let Some(fitting) = self.least_memory(cut, limit_bytes) else {
            let problem = "no number of stages, replicas and microbatches is possible".to_owned();
            return PartitionError::Options { problem };
        };
        self.priced.set(0);
        let remedies = self.remedies(cut, &fitting);
        let Fitting { needed_bytes, stage } = fitting;
        PartitionError::DoesNotFit { needed_bytes, limit_bytes, stage, remedies }
    }

    fn remedies(&self, cut: &Cut, fitting: &Fitting) -> Vec<Remedy> {
        let mut remedies = Vec::new();
        let limit = fitting.needed_bytes;
        let mut search = self.changed(self.cluster, self.options);
        search.limits.fill(limit);
        let memory = search.finds(); // first, as it is the likeliest to be found in time
        let tried = |change: &dyn Fn(&mut Options)| {
            let mut options = self.options.clone();
            change(&mut options);
            let search = self.changed(self.cluster, &options);
            search.fits(cut) && search.finds()
        };
        if !self.options.recompute && tried(&|options| options.recompute = true) {
            remedies.push(Remedy::Recompute);
        }
        let level = Sharding::ALL
            .into_iter()
            .filter(|&level| level > self.options.sharding)
            .find(|&level| tried(&|options| options.sharding = level));
        remedies.extend(level.map(Remedy::Sharding));
        remedies.extend(self.enough_devices(cut).map(Remedy::Devices));
        if memory {
            remedies.push(Remedy::Memory(limit));
        }
        let mut fewer_rows = self.options.batch_rows / 2;
        while fewer_rows > 0 && !tried(&|options| options.batch_rows = fewer_rows) {
            fewer_rows /= 2;
        }
        if fewer_rows > 0 {
            remedies.push(Remedy::Batch(fewer_rows));
        }
        let Options { num_stages, num_replicas, microbatches, .. } = *self.options;
        let forced = num_stages.is_some() || num_replicas.is_some() || microbatches.is_some();
        let free = |options: &mut Options| {
            (options.num_stages, options.num_replicas, options.microbatches) = (None, None, None);
        };
        if forced && tried(&free) {
            remedies.push(Remedy::Unforced);
        }
        remedies
    }

    /// The fewest devices, more like the last one, with which something fits.
    fn enough_devices(&self, cut: &Cut) -> Option<usize> {
        let num_devices = self.options.num_devices;
        let fits = |count: usize| {
            let cluster = grown(self.cluster, num_devices, count);
            let options = Options { num_devices: count, ..self.options.clone() };
            self.changed(&cluster, &options).fits(cut)
        };
        let (mut too_few, mut enough) = (num_devices, num_devices * 2);
        while !fits(enough) {
            too_few = enough;
            enough *= 2;
            if enough > num_devices * MOST_TIMES_DEVICES {
                return None;
            }
        }
        while too_few + 1 < enough {
            let middle = too_few.midpoint(enough);
            if fits(middle) { enough = middle } else { too_few = middle }
        }
        let cluster = grown(self.cluster, num_devices, enough);
        let options = Options { num_devices: enough, ..self.options.clone() };
        self.changed(&cluster, &options).finds().then_some(enough)
    }

    /// The least memory of each device with which something fits.
    fn least_memory(&self, cut: &Cut, limit: u64) -> Option<Fitting> {
        let with = |bytes: u64| {
            let mut search = self.changed(self.cluster, self.options);
            search.limits.fill(bytes);
            search.fitting(cut)
        };
        // Whatever fits at all tells how far up to look.
        let mut found = with(u64::MAX);
        let mut too_little = limit;
        let mut enough = found.as_ref()?.needed_bytes;
        while enough - too_little > enough / PRECISION {
            let middle = too_little.midpoint(enough);
            match with(middle) {
                None => too_little = middle,
                fitting => (found, enough) = (fitting, middle),
            }
        }
        let fitting = found?;
        // With just what is needed, what is chosen on the way may be another.
        let needed_bytes =
            if with(fitting.needed_bytes).is_some() { fitting.needed_bytes } else { enough };
        Some(Fitting { needed_bytes, ..fitting })
    }

    fn changed<'b>(&'b self, cluster: &'b Cluster, options: &'b Options) -> Search<'b, 'b>
    where
        Self: 'b,
    {
        let priced = std::rc::Rc::clone(&self.priced);
        let mut search = Search::new(self.partitioner, self.costs, cluster, options);
        search.priced = priced;
        search
    }

    /// Whether the search itself finds something, if there is time for it.
    fn finds(&self) -> bool {
        self.priced.get() <= MOST_PRICED && !self.find().is_empty()
    }

    fn fits(&self, cut: &Cut) -> bool {
        self.fitting(cut).is_some()
    }

    /// Some division that fits, with its fullest stage.
    fn fitting(&self, cut: &Cut) -> Option<Fitting> {
        let facts = FactCache::new(&cut.runs, self.costs);
        let cases = self.cases(&cut.runs, &facts, true);
        let last = cases.len() - 1;
        let mut counts: Vec<usize> = (0..COUNTS).map(|step| last * step / (COUNTS - 1)).collect();
        counts.dedup();
        for &index in counts.iter().rev() {
            let case = &cases[index];
            for layout in case.layouts.iter() {
                for &kind in self.options.schedules.iter().rev() {
                    if self.priced.get() > MOST_PRICED {
                        return None;
                    }
                    let problem = Problem::new(&case.pricer, layout, kind, &case.remaining);
                    let division = problem.any_fitting();
                    self.priced.set(self.priced.get() + problem.priced.get());
                    if let Some(division) = division {
                        return Some(self.fullest(&problem, &division, &cut.blocks));
                    }
                }
            }
        }
        None
    }

    fn fullest(&self, problem: &Problem<'_>, division: &Division, blocks: &Blocks) -> Fitting {
        let stages = problem.stages(division);
        let bytes = |(blocks, units, in_flight): &((usize, usize), (usize, usize), u64)| {
            problem.price(*blocks, *units, *in_flight).map_or(0, |cost| cost.bytes)
        };
        let needed = stages.iter().map(bytes).enumerate().max_by_key(|&(_, bytes)| bytes);
        let (index, needed_bytes) = needed.unwrap_or_default();
        let (range, units, _) = stages[index];
        let (graph, atoms) = (self.partitioner.graph, self.partitioner.atoms());
        let members = || (range.0..range.1).flat_map(|block| blocks.members(atoms, block));
        let (first, last) = (members().next(), members().last());
        let key = |id: Option<&rannc_graph::NodeId>| {
            id.map_or_else(String::new, |&id| graph.node(id).key.clone())
        };
        let operators = if first == last {
            format!("`{}`", key(first))
        } else {
            format!("`{}` to `{}`", key(first), key(last))
        };
        let stage = format!(
            "stage {} of {} ({operators}; replicas: {}, microbatches: {}, schedule: {})",
            index + 1,
            stages.len(),
            problem.layout.ranks(units.0, units.1).len(),
            problem.microbatches(),
            problem.schedule,
        );
        Fitting { needed_bytes, stage }
    }
}

/// The cluster with `count` devices: more nodes like the last one.
fn grown(cluster: &Cluster, num_devices: usize, count: usize) -> Cluster {
    let mut devices = cluster.devices[..num_devices].to_vec();
    let last = devices[num_devices - 1].clone();
    let per_node = devices.iter().filter(|device| device.node == last.node).count();
    let highest = devices.iter().map(|device| device.node).max().unwrap_or(0);
    for index in 0..count.saturating_sub(num_devices) {
        let node = highest + 1 + (index / per_node) as u32;
        devices.push(rannc_cost::Device { node, ..last.clone() });
    }
    Cluster { devices, ..cluster.clone() }
}
