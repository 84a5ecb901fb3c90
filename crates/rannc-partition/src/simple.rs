//! Plans by rules that people use, to be simulated beside what the search finds.
//!
//! Operators stay in program order and are cut at any of them; every stage computes again nothing,
//! each of its layers, or all of itself. [`regular`] gives every stage equally many devices and cuts by
//! count or by time. A quick estimate ([`Assessor`]) says which of the proposals are worth a simulation.
//!
//! The search is freer but works on blocks and on estimates of its own; with the best of these
//! among the candidates a plan is never worse than what such rules give, whatever an estimate misses.

mod proposal;
mod regular;
mod sequence;

use rannc_cost::Cluster;

pub use proposal::{Assessor, Order, Proposal, Recompute, nodes};
pub use regular::{Cut, regular};
pub use sequence::{Sequence, Sizes, Times};

use crate::{Options, microbatch_candidates};

/// What to plan for.
#[derive(Clone, Debug)]
pub struct Setting<'a> {
    /// The devices, taken to be like the first.
    pub cluster: &'a Cluster,
    /// The batch, and what is allowed.
    pub options: &'a Options,
    /// What any device may hold.
    pub memory_limit_bytes: u64,
    microbatches: Vec<u64>,
}

impl<'a> Setting<'a> {
    /// With the memory of the smallest device.
    pub fn new(cluster: &'a Cluster, options: &'a Options) -> Self {
        let least = u128::from(cluster.least_memory_bytes(options.num_devices));
        let left = 1_000_000 - options.memory_margin_ppm.min(1_000_000);
        let usable = (least * u128::from(left) / 1_000_000) as u64;
        let memory_limit_bytes = usable.min(options.memory_limit_bytes);
        let microbatches = microbatch_candidates(options);
        Self { cluster, options, memory_limit_bytes, microbatches }
    }

    /// Numbers of microbatches that leave a row for each of `replicas`, ascending.
    pub fn microbatches(&self, replicas: usize) -> Vec<u64> {
        let most = self.options.batch_rows / replicas as u64;
        self.microbatches.iter().copied().filter(|&count| count <= most).collect()
    }

    /// The rows at which operators are timed to make blocks of similar time.
    pub fn microbatch_to_balance(&self) -> u64 {
        self.options.batch_rows.div_ceil(self.options.num_devices as u64)
    }

    fn recompute(&self) -> &'static [Recompute] {
        if self.options.recompute { &Recompute::ALL } else { &[Recompute::Nothing] }
    }
}
