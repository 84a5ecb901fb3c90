//! The cost of every possible stage: a run of blocks on a number of replicas.

use rannc_cost::{Cluster, StageSizes, Training};

use crate::interval::{Intervals, run_index};

/// How devices may be handed to stages.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The first rank of each unit of devices, and the number of ranks at the end.
    pub(crate) offsets: Vec<usize>,
    /// Whether every stage gets exactly one unit.
    pub(crate) one_unit_each: bool,
    /// The numbers of stages to look for, ascending.
    pub(crate) stage_counts: Vec<usize>,
    /// Whether no device is left idle.
    pub(crate) uses_all: bool,
    /// How often neighbouring ranks before each rank sit on different nodes.
    borders: Vec<usize>,
}

impl Layout {
    /// A layout on the first ranks of a cluster.
    pub(crate) fn new(
        cluster: &Cluster,
        num_devices: usize,
        offsets: Vec<usize>,
        one_unit_each: bool,
        stage_counts: Vec<usize>,
    ) -> Self {
        let num_ranks = offsets.last().copied().unwrap_or_default();
        let mut borders = vec![0];
        for pair in cluster.devices[..num_ranks].windows(2) {
            borders.push(borders[borders.len() - 1] + usize::from(pair[0].node != pair[1].node));
        }
        Self { offsets, one_unit_each, stage_counts, uses_all: num_ranks == num_devices, borders }
    }

    pub(crate) fn num_units(&self) -> usize {
        self.offsets.len() - 1
    }

    pub(crate) fn num_ranks(&self) -> usize {
        self.offsets[self.num_units()]
    }

    /// Whether ranks `start..end` sit on more than one node.
    pub(crate) fn spans_nodes(&self, start: usize, end: usize) -> bool {
        self.borders[end - 1] != self.borders[start]
    }

    /// Every number of replicas that a stage may have, ascending.
    pub(crate) fn replica_counts(&self) -> Vec<usize> {
        let mut counts: Vec<usize> = Vec::new();
        for (first, start) in self.offsets.iter().enumerate() {
            let ends = self.offsets[first + 1..].iter();
            counts.extend(
                ends.take(if self.one_unit_each { 1 } else { usize::MAX }).map(|end| end - start),
            );
        }
        counts.sort_unstable();
        counts.dedup();
        counts
    }
}

/// The cost of one possible stage; pairs are within a node and across nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageCost {
    pub(crate) time_ns: u64,
    pub(crate) receive_ns: [u64; 2],
    pub(crate) return_ns: [u64; 2],
    pub(crate) reduce_ns: [u64; 2],
    fixed_bytes: u64,
    microbatch_bytes: u64,
}

impl StageCost {
    /// Memory with some microbatches in flight.
    pub(crate) fn bytes(&self, in_flight: u64) -> u64 {
        self.microbatch_bytes.saturating_mul(in_flight).saturating_add(self.fixed_bytes)
    }
}

/// The costs of all stages that a layout allows.
pub(crate) struct Table {
    num_blocks: usize,
    /// The position of each number of replicas in the rows of `costs`.
    column: Vec<Option<usize>>,
    num_columns: usize,
    costs: Vec<StageCost>,
    /// For the blocks before each: device time at best, and time at best.
    remaining: Vec<(u64, u64)>,
}

/// What a table is made for.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) training: &'a Training,
    pub(crate) batch_rows: u64,
    pub(crate) microbatches: u64,
}

impl Setting<'_> {
    /// The most rows that one of `replicas` sees at a time.
    pub(crate) fn rows(&self, replicas: usize) -> u64 {
        self.batch_rows.div_ceil(self.microbatches.saturating_mul(replicas as u64).max(1))
    }

    /// The most replicas that a stage can keep busy in every microbatch.
    pub(crate) fn most_replicas(&self) -> usize {
        usize::try_from(self.batch_rows / self.microbatches).unwrap_or(usize::MAX)
    }
}

impl Table {
    /// Prices every stage.
    pub(crate) fn new(intervals: &Intervals, layout: &Layout, setting: Setting) -> Self {
        let num_blocks = intervals.num_blocks();
        let mut counts = layout.replica_counts();
        counts.retain(|&replicas| replicas <= setting.most_replicas());
        let mut column = vec![None; layout.num_ranks() + 1];
        for (index, &replicas) in counts.iter().enumerate() {
            column[replicas] = Some(index);
        }
        let mut costs = Vec::new();
        for start in 0..num_blocks {
            for end in start + 1..=num_blocks {
                let price = |&replicas: &usize| {
                    price(intervals, (start, end), replicas, layout.num_ranks(), setting)
                };
                costs.extend(counts.iter().map(price));
            }
        }
        let mut remaining = vec![(0_u64, 0_u64)];
        for block in 0..num_blocks {
            let time = |&replicas: &usize| {
                let rows = setting.rows(replicas);
                // Clones may be shared with other blocks of a stage, so they are left out.
                let clones = intervals.get(block, block + 1).clones_ns;
                intervals.time_ns(block, block + 1, rows).saturating_sub(clones)
            };
            let device_time = |replicas: &usize| time(replicas).saturating_mul(*replicas as u64);
            let (work, fastest) = remaining[block];
            remaining.push((
                work.saturating_add(counts.iter().map(device_time).min().unwrap_or(0)),
                fastest.saturating_add(counts.iter().map(time).min().unwrap_or(0)),
            ));
        }
        Self { num_blocks, column, num_columns: counts.len(), costs, remaining }
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The cost of blocks `blocks.0..blocks.1` on some replicas; none if there may not be so many.
    pub(crate) fn get(&self, blocks: (usize, usize), replicas: usize) -> Option<&StageCost> {
        let row = run_index(self.num_blocks, blocks.0, blocks.1);
        self.column[replicas].map(|column| &self.costs[row * self.num_columns + column])
    }

    /// A lower bound on slowest stage and sum of stages for the blocks before `block` on
    /// `num_devices` devices.
    pub(crate) fn remaining(&self, block: usize, num_devices: usize) -> (u64, u64) {
        let (work, fastest) = self.remaining[block];
        (work.div_ceil(num_devices.max(1) as u64), fastest)
    }
}

fn price(
    intervals: &Intervals,
    (start, end): (usize, usize),
    replicas: usize,
    num_ranks: usize,
    setting: Setting,
) -> StageCost {
    let rows = setting.rows(replicas);
    let interval = intervals.get(start, end);
    let links = [&setting.cluster.intra_node, &setting.cluster.inter_node];
    let across =
        setting.cluster.devices[..num_ranks].windows(2).any(|pair| pair[0].node != pair[1].node);
    let shared =
        links[usize::from(across)].all_reduce_ns(interval.shared_trained, num_ranks as u64);
    let transfer =
        |bytes: u64| links.map(|link| if bytes == 0 { 0 } else { link.transfer_ns(bytes) });
    let sizes = StageSizes {
        state: interval.state,
        trainable: interval.own_trained.saturating_add(interval.shared_trained),
        saved: interval.saved.at(rows),
        received: interval.received.at(rows),
        exchanged: interval.exchanged.at(rows),
        working: intervals.working_bytes(start, end, rows),
    };
    StageCost {
        time_ns: intervals.time_ns(start, end, rows),
        receive_ns: transfer(sizes.received),
        return_ns: transfer(interval.returned.at(rows)),
        reduce_ns: links.map(|link| {
            link.all_reduce_ns(interval.own_trained, replicas as u64).saturating_add(shared)
        }),
        fixed_bytes: sizes.memory(0, setting.training).total(),
        microbatch_bytes: sizes.per_microbatch(),
    }
}
