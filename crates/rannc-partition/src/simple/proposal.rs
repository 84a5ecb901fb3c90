//! A plan as simple rules describe it, a quick estimate of what it costs, and its form as a candidate.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use rannc_cost::{Cluster, ScheduleKind};
use rannc_graph::{Affine, NodeId};

use super::{Sequence, Setting, Sizes, Times};
use crate::{Candidate, StageCandidate};

/// What a stage computes again in backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    /// Nothing.
    Nothing,
    /// Each layer from its inputs.
    Layers,
    /// The whole stage from its inputs.
    Stages,
}

impl Recompute {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nothing, Self::Layers, Self::Stages];
}

/// Stages as parts of the line, on ranks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proposal {
    /// The first position of each stage.
    pub starts: Rc<Vec<usize>>,
    /// The ranks of each stage, ascending.
    pub ranks: Rc<Vec<Vec<u32>>>,
    /// Into how many parts the batch is cut.
    pub microbatches: u64,
    /// In which order they run.
    pub schedule: ScheduleKind,
    /// The same for all stages.
    pub recompute: Recompute,
}

/// Prices proposals without a simulation.
pub struct Assessor<'a> {
    /// The operators.
    pub line: &'a Sequence<'a>,
    /// What is asked for.
    pub setting: &'a Setting<'a>,
    sizes: RefCell<BTreeMap<Vec<usize>, Rc<Vec<Sizes>>>>,
    /// By layer: what it keeps for later ones, summed over the layers before.
    kept_by_layers: Vec<Affine>,
    /// By layer: what autograd keeps in it.
    saved_by_layer: Vec<Affine>,
    /// Of the whole model.
    whole: Sizes,
    /// Forward and backward of the whole batch, one operator after another, and along the longest path.
    line_and_path_ns: [u64; 2],
}

impl<'a> Assessor<'a> {
    /// Looks at every layer once.
    pub fn new(line: &'a Sequence<'a>, setting: &'a Setting<'a>) -> Self {
        let mut kept_by_layers = vec![Affine::default()];
        let mut saved_by_layer = Vec::new();
        let ends = line.layers.iter().skip(1).copied().chain([line.len()]);
        for (&start, end) in line.layers.iter().zip(ends) {
            let sizes = line.sizes(&[start, end])[0];
            kept_by_layers.push(kept_by_layers[kept_by_layers.len() - 1] + sizes.sent);
            saved_by_layer.push(sizes.saved);
        }
        let whole = line.sizes(&[0, line.len()])[0];
        let rows = setting.options.batch_rows;
        let times = line.times(&(0..line.len()), rows);
        let line_ns = times.forward.saturating_add(times.backward);
        let line_and_path_ns = [line_ns, line.longest_path_ns(rows).max(1)];
        let sizes = RefCell::default();
        Self { line, setting, sizes, kept_by_layers, saved_by_layer, whole, line_and_path_ns }
    }

    /// Whether so many stages have room for all parameters with what belongs to them.
    pub(super) fn may_fit(&self, stages: usize) -> bool {
        let trained = u128::from(self.whole.trained);
        let factor = u128::from(self.setting.options.training.optimizer_state_factor_ppm);
        let bytes = u128::from(self.whole.state) + trained + trained * factor / 1_000_000;
        bytes <= u128::from(self.setting.memory_limit_bytes) * stages as u128
    }

    /// A time that no step of so many stages with so many replicas each is estimated below.
    pub(super) fn least_ns(&self, stages: usize, replicas: usize, microbatches: u64) -> u64 {
        let rows = self.rows(microbatches, replicas);
        let times = self.times(&(0..self.line.len()), rows, Recompute::Nothing);
        let all = times.forward.saturating_add(times.backward);
        (all / stages as u64).saturating_mul(microbatches - 1).saturating_add(all)
    }

    /// An estimate that nothing as fast as `step_ns` is estimated above: transfers may run beside work, and
    /// branches, which estimates take one after another, side by side.
    pub fn most_ns(&self, step_ns: u64) -> u64 {
        let [line_ns, path_ns] = self.line_and_path_ns.map(u128::from);
        let most = u128::from(step_ns).saturating_mul(line_ns.max(path_ns)) / path_ns;
        u64::try_from(most / 2).unwrap_or(u64::MAX).saturating_mul(3)
    }

    /// The most rows that one of `replicas` sees at a time.
    pub fn rows(&self, microbatches: u64, replicas: usize) -> u64 {
        self.setting.options.batch_rows.div_ceil(microbatches).div_ceil(replicas as u64)
    }

    /// The memory of a stage with some microbatches in flight.
    pub fn bytes(
        &self,
        part: &Range<usize>,
        sizes: &Sizes,
        rows: u64,
        in_flight: u64,
        recompute: Recompute,
    ) -> u64 {
        let received = sizes.received.at(rows);
        let layers = self.layers_within(part);
        let (kept, again) = match recompute {
            Recompute::Nothing => (received.saturating_add(sizes.saved.at(rows)), 0),
            Recompute::Stages => (received, sizes.saved.at(rows)),
            Recompute::Layers => {
                let inner = |index: usize| self.kept_by_layers[index].at(rows);
                let within = inner(layers.end).saturating_sub(inner(layers.start));
                let kept = received.saturating_add(within);
                let saved = self.saved_by_layer[layers].iter();
                (kept, saved.map(|saved| saved.at(rows)).max().unwrap_or(0))
            }
        };
        let factor = u128::from(self.setting.options.training.optimizer_state_factor_ppm);
        let optimizer = u128::from(sizes.trained) * factor / 1_000_000;
        let exchanged = sizes.received.at(rows).saturating_add(sizes.sent.at(rows));
        let parts = [
            sizes.state,
            sizes.trained,
            u64::try_from(optimizer).unwrap_or(u64::MAX),
            kept.saturating_mul(in_flight),
            again,
            sizes.working(rows),
            exchanged.saturating_mul(2),
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// The layers that a part of the line touches.
    fn layers_within(&self, part: &Range<usize>) -> Range<usize> {
        let layers = &self.line.layers;
        let first = layers.partition_point(|&start| start <= part.start).saturating_sub(1);
        first..layers.partition_point(|&start| start < part.end)
    }

    /// Forward and backward of a stage.
    pub fn times(&self, part: &Range<usize>, rows: u64, recompute: Recompute) -> Times {
        let mut times = self.line.times(part, rows);
        if recompute != Recompute::Nothing {
            times.backward = times.backward.saturating_add(times.forward);
        }
        times
    }

    /// The proposals that fit by their estimated step time, each once, the shortest first.
    pub fn ranked(&self, proposals: Vec<Proposal>) -> Vec<(u64, Proposal)> {
        let assess = |proposal| Some((self.assess(&proposal)?, proposal));
        let mut fitting: Vec<(u64, Proposal)> = proposals.into_iter().filter_map(assess).collect();
        fitting.sort_unstable();
        fitting.dedup();
        fitting
    }

    /// The estimated step time, or none if it does not fit in memory or there are too few rows.
    pub fn assess(&self, proposal: &Proposal) -> Option<u64> {
        let cluster = self.setting.cluster;
        let parts = self.parts(&proposal.starts);
        let sizes = self.sizes_of(&proposal.starts);
        let microbatch = self.setting.options.batch_rows / proposal.microbatches;
        let (mut slowest, mut sum, mut reduction) = (0_u64, 0_u64, 0_u64);
        for (index, (part, sizes)) in parts.iter().zip(sizes.iter()).enumerate() {
            let ranks = &proposal.ranks[index];
            if ranks.len() as u64 > microbatch {
                return None;
            }
            let rows = self.rows(proposal.microbatches, ranks.len());
            let in_flight = in_flight(proposal, parts.len() - index);
            let bytes = self.bytes(part, sizes, rows, in_flight, proposal.recompute);
            if bytes > self.setting.memory_limit_bytes {
                return None;
            }
            let times = self.times(part, rows, proposal.recompute);
            let mut time = times.forward.saturating_add(times.backward);
            if index > 0 {
                let before = proposal.ranks[index - 1][0];
                let transfer = cluster.transfer_ns(sizes.received.at(rows), before, ranks[0]);
                time = time.saturating_add(transfer.saturating_mul(2));
            }
            slowest = slowest.max(time);
            sum = sum.saturating_add(time);
            reduction = reduction.max(cluster.all_reduce_ns(sizes.trained, ranks));
        }
        let later = slowest.saturating_mul(proposal.microbatches - 1);
        Some(later.saturating_add(sum).saturating_add(reduction))
    }

    fn parts(&self, starts: &[usize]) -> Vec<Range<usize>> {
        let ends = starts.iter().skip(1).copied().chain([self.line.len()]);
        starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
    }

    fn sizes_of(&self, starts: &[usize]) -> Rc<Vec<Sizes>> {
        if let Some(known) = self.sizes.borrow().get(starts) {
            return Rc::clone(known);
        }
        let parts = self.parts(starts);
        let sizes = parts.iter().map(|part| self.line.sizes(&[part.start, part.end])[0]);
        let sizes = Rc::new(sizes.collect::<Vec<_>>());
        self.sizes.borrow_mut().insert(starts.to_vec(), Rc::clone(&sizes));
        sizes
    }

    /// The proposal in the form that the planner's simulator takes.
    pub fn candidate(&self, proposal: &Proposal, estimate_ns: u64) -> Candidate {
        let stages = self.parts(&proposal.starts).into_iter().zip(proposal.ranks.iter());
        let stages = stages.map(|(part, ranks)| StageCandidate {
            nodes: self.line.atoms.stage(self.line.graph, part.clone()),
            ranks: ranks.clone(),
            recompute: self.groups(&part, proposal.recompute),
            ..StageCandidate::default()
        });
        Candidate {
            stages: stages.collect(),
            microbatches: proposal.microbatches,
            schedule: proposal.schedule,
            estimate_ns,
        }
    }

    fn groups(&self, part: &Range<usize>, recompute: Recompute) -> Vec<Vec<NodeId>> {
        let nodes = |part: Range<usize>| -> Vec<NodeId> {
            let mut nodes: Vec<NodeId> =
                part.flat_map(|position| self.line.atoms.members(position).to_vec()).collect();
            nodes.sort_unstable();
            nodes
        };
        match recompute {
            Recompute::Nothing => Vec::new(),
            Recompute::Stages => vec![nodes(part.clone())],
            Recompute::Layers => {
                let layers = &self.line.layers;
                let inside = layers.iter().copied().filter(|start| part.contains(start));
                let mut bounds: Vec<usize> = [part.start].into_iter().chain(inside).collect();
                bounds.dedup();
                bounds.push(part.end);
                bounds.windows(2).map(|pair| nodes(pair[0]..pair[1])).collect()
            }
        }
    }
}

/// Microbatches between forward and backward in the stage with this number from the end, from 1.
fn in_flight(proposal: &Proposal, from_end: usize) -> u64 {
    if proposal.schedule == ScheduleKind::FillDrain {
        proposal.microbatches
    } else {
        proposal.microbatches.min(from_end as u64)
    }
}

/// How replicas of equally many stages lie in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The replicas of a stage are neighbours.
    ReplicasTogether,
    /// The stages of a pipeline are neighbours.
    StagesTogether,
}

impl Order {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::ReplicasTogether, Self::StagesTogether];

    /// The ranks of `stages` stages with `replicas` replicas each.
    pub fn ranks(self, stages: usize, replicas: usize) -> Vec<Vec<u32>> {
        let rank = |stage: usize, replica: usize| match self {
            Self::ReplicasTogether => (stage * replicas + replica) as u32,
            Self::StagesTogether => (replica * stages + stage) as u32,
        };
        let of = |stage| (0..replicas).map(|replica| rank(stage, replica)).collect();
        (0..stages).map(of).collect()
    }
}

/// Nodes and devices in each; everything in one node if the nodes are unequal.
pub fn nodes(cluster: &Cluster) -> (usize, usize) {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for device in &cluster.devices {
        *counts.entry(device.node).or_default() += 1;
    }
    let first = counts.values().next().copied().unwrap_or(1);
    let equal = counts.values().all(|&count| count == first);
    let in_order = cluster.devices.windows(2).all(|pair| pair[0].node <= pair[1].node);
    if equal && in_order { (counts.len(), first) } else { (1, cluster.devices.len()) }
}
