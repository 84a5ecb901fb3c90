//! The rule of the original `RaNNC` (Tanaka et al., IPDPS 2021, section III.D, and its version 0.7.5).
//!
//! The fewest stages that fit: pipelines over one node are tried before pipelines over several, and
//! few stages before many, and the first number of stages that fits ends the search. Replicas of a
//! stage are a power of two, microbatches a power of two up to 32, stages compute again exactly if
//! there are several microbatches. A dynamic programme minimises the slowest forward plus the slowest
//! backward over 32 blocks; summing gradients is no part of it.

use std::rc::Rc;

use rannc_partition::simple::{Assessor, Proposal, Recompute, Sizes, Times, nodes};

/// Its `max_partition_num` and its `max_pipeline`.
const MAX_BLOCKS: usize = 32;
const MAX_MICROBATCHES: u64 = 32;

/// What fits with the fewest stages: one division for each number of microbatches.
pub(super) fn proposals(assessor: &Assessor) -> Vec<Proposal> {
    let (num_nodes, per_node) = nodes(assessor.setting.cluster);
    let bounds = assessor.line.units(MAX_BLOCKS, assessor.setting.microbatch_to_balance());
    let blocks = Blocks::new(assessor, bounds);
    let mut fewest = 1;
    for used_nodes in (1..=num_nodes).filter(|&used| num_nodes.is_multiple_of(used)) {
        let (devices, copies) = (per_node * used_nodes, num_nodes / used_nodes);
        let most = devices.min(blocks.count());
        for stages in fewest..=most {
            let found = blocks.with_stages(stages, devices, copies);
            if !found.is_empty() {
                return found;
            }
        }
        fewest = fewest.max(most + 1);
    }
    Vec::new()
}

struct Blocks<'a> {
    assessor: &'a Assessor<'a>,
    bounds: Vec<usize>,
    /// By first block, then by length.
    sizes: Vec<Vec<Sizes>>,
}

/// What the programme keeps of the stages so far.
#[derive(Clone, Copy)]
struct State {
    value: u64,
    slowest: Times,
    /// First block and devices before the last stage.
    before: (usize, usize),
}

impl<'a> Blocks<'a> {
    fn new(assessor: &'a Assessor<'a>, bounds: Vec<usize>) -> Self {
        let count = bounds.len() - 1;
        let sizes = (0..count).map(|first| assessor.line.sizes(&bounds[first..])).collect();
        Self { assessor, bounds, sizes }
    }

    fn count(&self) -> usize {
        self.bounds.len() - 1
    }

    /// One division for each number of microbatches, under both schedules.
    fn with_stages(&self, stages: usize, devices: usize, copies: usize) -> Vec<Proposal> {
        let batch_rows = self.assessor.setting.options.batch_rows;
        let counts = (0..).map(|power| 1_u64 << power);
        let most = MAX_MICROBATCHES.min(batch_rows / copies as u64);
        let mut found = Vec::new();
        for microbatches in counts.take_while(|&count| count <= most) {
            let recompute = if microbatches > 1 { Recompute::Stages } else { Recompute::Nothing };
            let Some(division) = self.divide(stages, devices, copies, microbatches, recompute)
            else {
                continue;
            };
            let mut next = 0;
            let mut ranks: Vec<Vec<u32>> = Vec::new();
            for &(_, replicas) in &division {
                let of = |copy: usize| {
                    (next..next + replicas).map(move |device| (copy * devices + device) as u32)
                };
                ranks.push((0..copies).flat_map(of).collect());
                next += replicas;
            }
            let starts: Vec<usize> =
                division.iter().map(|&(block, _)| self.bounds[block]).collect();
            let (starts, ranks) = (Rc::new(starts), Rc::new(ranks));
            let schedules = self.assessor.setting.options.schedules.iter();
            found.extend(schedules.map(|&schedule| Proposal {
                starts: Rc::clone(&starts),
                ranks: Rc::clone(&ranks),
                microbatches,
                schedule,
                recompute,
            }));
        }
        found
    }

    /// First block and replicas of each stage of the best division.
    fn divide(
        &self,
        stages: usize,
        devices: usize,
        copies: usize,
        microbatches: u64,
        recompute: Recompute,
    ) -> Option<Vec<(usize, usize)>> {
        let count = self.count();
        let copy_rows = self.assessor.rows(microbatches, copies);
        let table = self.table(devices, copies, microbatches, recompute);
        let start = State { value: 0, slowest: Times::default(), before: (0, 0) };
        let mut layers = vec![vec![vec![None; devices + 1]; count + 1]];
        layers[0][0][0] = Some(start);
        for stage in 1..=stages {
            let mut layer: Vec<Vec<Option<State>>> = vec![vec![None; devices + 1]; count + 1];
            for (end, row) in layer.iter_mut().enumerate().skip(stage) {
                for (used, state) in row.iter_mut().enumerate().skip(stage) {
                    let powers = (0..).map(|power| 1_usize << power);
                    let allowed =
                        powers.take_while(|&r| r <= used && r as u64 <= copy_rows).enumerate();
                    for (power, replicas) in allowed {
                        for first in stage - 1..end {
                            let Some(before) = layers[stage - 1][first][used - replicas] else {
                                continue;
                            };
                            let Some(cost) = table[first][end - first - 1][power] else {
                                continue;
                            };
                            let next = before.with(cost, (first, used - replicas));
                            if state.is_none_or(|known| next.value < known.value) {
                                *state = Some(next);
                            }
                        }
                    }
                }
            }
            layers.push(layer);
        }
        let (mut end, mut used) = (count, devices);
        let mut division = Vec::new();
        for stage in (1..=stages).rev() {
            let before = layers[stage][end][used]?.before;
            division.push((before.0, used - before.1));
            (end, used) = before;
        }
        division.reverse();
        Some(division)
    }

    /// Times of each run of blocks by the power of two of its replicas, where it fits.
    fn table(
        &self,
        devices: usize,
        copies: usize,
        microbatches: u64,
        recompute: Recompute,
    ) -> Vec<Vec<Vec<Option<Times>>>> {
        let setting = self.assessor.setting;
        let link = if devices * copies > nodes(setting.cluster).1 {
            &setting.cluster.inter_node
        } else {
            &setting.cluster.intra_node
        };
        let cost = |first: usize, end: usize, replicas: usize| {
            let rows = self.assessor.rows(microbatches, replicas * copies);
            let part = self.bounds[first]..self.bounds[end];
            let sizes = &self.sizes[first][end - first - 1];
            let bytes = self.assessor.bytes(&part, sizes, rows, microbatches, recompute);
            if bytes > setting.memory_limit_bytes {
                return None;
            }
            let exchanged = sizes.received.at(rows) + sizes.sent.at(rows);
            let moving = if self.count() == end - first { 0 } else { link.transfer_ns(exchanged) };
            let times = self.assessor.times(&part, rows, recompute);
            Some(Times { forward: times.forward + moving, backward: times.backward + moving })
        };
        let powers = devices.ilog2() as usize + 1;
        let row = |first: usize| {
            let ends = first + 1..=self.count();
            ends.map(|end| (0..powers).map(|power| cost(first, end, 1 << power)).collect())
                .collect()
        };
        (0..self.count()).map(row).collect()
    }
}

impl State {
    fn with(self, stage: Times, before: (usize, usize)) -> Self {
        let slowest = Times {
            forward: self.slowest.forward.max(stage.forward),
            backward: self.slowest.backward.max(stage.backward),
        };
        Self { value: slowest.forward + slowest.backward, slowest, before }
    }
}
