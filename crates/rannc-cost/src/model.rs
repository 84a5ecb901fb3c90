//! How long operators take: measured, or estimated from their size.
//!
//! Operators that cost the same are of one *kind*, so that whatever prices a model (a hundred
//! equal layers) prices each kind once.

use std::collections::BTreeMap;

use rannc_graph::{Affine, Graph, Node, NodeId};

use crate::profile::{Curve, scale};
use crate::{CostError, Device, Profile};

/// The time of each operator as a function of the rows that it sees.
pub trait CostModel: Send + Sync {
    /// How many kinds of operators there are.
    fn num_kinds(&self) -> usize;

    /// The kind of an operator, below [`num_kinds`](Self::num_kinds).
    fn kind(&self, node: NodeId) -> usize;

    /// Forward time of an operator of this kind.
    fn forward_of(&self, kind: usize, rows: u64) -> u64;

    /// Backward time of an operator of this kind; zero when nothing differentiates it.
    fn backward_of(&self, kind: usize, rows: u64) -> u64;

    /// The least time that one row of `most_rows` or fewer can take of this kind's forward and
    /// backward, in thousandths of a nanosecond: for lower bounds.
    fn least_per_row(&self, kind: usize, most_rows: u64) -> u64;

    /// Time of the forward pass.
    fn forward_ns(&self, node: NodeId, rows: u64) -> u64 {
        self.forward_of(self.kind(node), rows)
    }

    /// Time of the backward pass; zero for operators that nothing differentiates.
    fn backward_ns(&self, node: NodeId, rows: u64) -> u64 {
        self.backward_of(self.kind(node), rows)
    }
}

/// Numbers things in the order in which they are first met.
struct Kinds<K> {
    numbers: BTreeMap<K, usize>,
    of_node: Vec<usize>,
}

impl<K: Ord> Kinds<K> {
    fn new() -> Self {
        Self { numbers: BTreeMap::new(), of_node: Vec::new() }
    }

    /// Gives the next node its kind; whether it is a new one.
    fn add(&mut self, key: K) -> bool {
        let next = self.numbers.len();
        let kind = *self.numbers.entry(key).or_insert(next);
        self.of_node.push(kind);
        kind == next
    }
}

/// Times from a [`Profile`].
#[derive(Clone, Debug)]
pub struct ProfiledCosts {
    kind_of: Vec<usize>,
    /// Forward and backward curve of each kind.
    kinds: Vec<(Curve, Curve)>,
}

impl ProfiledCosts {
    /// Looks up every operator of the graph.
    ///
    /// # Errors
    ///
    /// [`CostError::UnknownSignature`] for the first operator that was not measured.
    pub fn new(graph: &Graph, profile: &Profile) -> Result<Self, CostError> {
        let batch_nodes = graph.batch_nodes();
        let mut found = Kinds::new();
        let mut kinds = Vec::new();
        for (index, node) in graph.nodes().iter().enumerate() {
            let batch = batch_nodes.contains(index);
            if !found.add((node.signature.as_str(), batch)) {
                continue;
            }
            let samples = profile.entries.get(&node.signature).filter(|found| !found.is_empty());
            let samples = samples.ok_or_else(|| CostError::UnknownSignature {
                device: profile.device.clone(),
                signature: node.signature.clone(),
                node: node.key.clone(),
            })?;
            // What no batch changes was measured once.
            let used = if batch { &samples[..] } else { &samples[..1] };
            let rows = |sample: &crate::Sample| if batch { sample.rows } else { 0 };
            let forward = used.iter().map(|sample| (rows(sample), sample.forward_ns));
            let backward = used.iter().map(|sample| (rows(sample), sample.backward_ns));
            kinds.push((
                Curve::new(forward, profile.calibration.forward_ppm),
                Curve::new(backward, profile.calibration.backward_ppm),
            ));
        }
        Ok(Self { kind_of: found.of_node, kinds })
    }
}

impl CostModel for ProfiledCosts {
    fn num_kinds(&self) -> usize {
        self.kinds.len()
    }

    fn kind(&self, node: NodeId) -> usize {
        self.kind_of[node.index()]
    }

    fn forward_of(&self, kind: usize, rows: u64) -> u64 {
        self.kinds[kind].0.at(rows)
    }

    fn backward_of(&self, kind: usize, rows: u64) -> u64 {
        self.kinds[kind].1.at(rows)
    }

    fn least_per_row(&self, kind: usize, most_rows: u64) -> u64 {
        let (forward, backward) = &self.kinds[kind];
        forward.least_per_row(most_rows).saturating_add(backward.least_per_row(most_rows))
    }
}

/// Times from operation and byte counts: an operator takes as long as the slower of arithmetic (at
/// seven tenths of the device's peak) and memory traffic, plus a few microseconds to start.
/// The backward pass does twice the forward's work.
///
/// Arithmetic on operands of 16 bits has a peak of its own, of which half is attained: whole models
/// run at 44 to 52 % of an A100's (Narayanan et al., SC 2021, table 1).
#[derive(Clone, Debug)]
pub struct AnalyticCosts<'a> {
    kind_of: Vec<usize>,
    kinds: Vec<Work<'a>>,
    device: Device,
}

/// What an operator of some kind has to do.
#[derive(Clone, Debug)]
struct Work<'a> {
    graph: &'a Graph,
    node: &'a Node,
    differentiated: bool,
    /// Whether all of its floating-point operands have 16 bits.
    half: bool,
}

const START_NS: u64 = 4_000;
const ATTAINED_PERCENT: u64 = 70;
const HALF_ATTAINED_PERCENT: u64 = 50;
const NS_PER_SECOND: u64 = 1_000_000_000;

impl Work<'_> {
    fn bytes(&self, rows: u64) -> u64 {
        let touched = self.node.inputs.iter().chain(&self.node.outputs);
        touched.map(|&value| self.graph.value(value).bytes(rows)).fold(0, u64::saturating_add)
    }
}

impl<'a> AnalyticCosts<'a> {
    /// Costs of the graph on a device.
    pub fn new(graph: &'a Graph, device: &Device) -> Self {
        let mut found = Kinds::new();
        let mut kinds = Vec::new();
        for node in graph.nodes() {
            let differentiated =
                node.outputs.iter().any(|&output| graph.value(output).requires_grad)
                    && node.inputs.iter().any(|&input| graph.value(input).requires_grad);
            let size = |affine: Affine| (affine.per_row, affine.fixed);
            let mut shapes: Vec<(u64, Vec<(i64, i64)>)> = node
                .inputs
                .iter()
                .chain(&node.outputs)
                .map(|&id| graph.value(id))
                .map(|value| {
                    (value.element_bytes(), value.shape.iter().copied().map(size).collect())
                })
                .collect();
            shapes.sort_unstable();
            let half = has_half_operands(graph, node);
            if found.add((size(node.flops), differentiated, half, shapes)) {
                kinds.push(Work { graph, node, differentiated, half });
            }
        }
        Self { kind_of: found.of_node, kinds, device: device.clone() }
    }
}

fn has_half_operands(graph: &Graph, node: &Node) -> bool {
    let dtypes = node.inputs.iter().map(|&id| graph.value(id).dtype.as_str());
    let mut floating = dtypes.filter(|dtype| dtype.contains("float")).peekable();
    floating.peek().is_some() && floating.all(|dtype| matches!(dtype, "float16" | "bfloat16"))
}

impl CostModel for AnalyticCosts<'_> {
    fn num_kinds(&self) -> usize {
        self.kinds.len()
    }

    fn kind(&self, node: NodeId) -> usize {
        self.kind_of[node.index()]
    }

    fn forward_of(&self, kind: usize, rows: u64) -> u64 {
        let work = &self.kinds[kind];
        let attained = if work.half {
            scale(self.device.half_flops_per_second, HALF_ATTAINED_PERCENT, 100)
        } else {
            scale(self.device.flops_per_second, ATTAINED_PERCENT, 100)
        };
        let arithmetic = scale(work.node.flops.at(rows), NS_PER_SECOND, attained);
        let traffic = scale(work.bytes(rows), NS_PER_SECOND, self.device.memory_bytes_per_second);
        arithmetic.max(traffic).saturating_add(START_NS)
    }

    fn backward_of(&self, kind: usize, rows: u64) -> u64 {
        if self.kinds[kind].differentiated {
            self.forward_of(kind, rows).saturating_mul(2)
        } else {
            0
        }
    }

    fn least_per_row(&self, kind: usize, most_rows: u64) -> u64 {
        // Operations and bytes have a fixed part that is not negative, so the largest batch is the
        // cheapest for each row; counts that say otherwise give no bound.
        let work = &self.kinds[kind];
        let touched = work.node.inputs.iter().chain(&work.node.outputs);
        let sizes = touched.flat_map(|&value| &work.graph.value(value).shape);
        let dynamic = |value: &rannc_graph::ValueId| {
            work.graph.value(*value).shape.iter().filter(|size| !size.is_fixed()).count()
        };
        let touched = || work.node.inputs.iter().chain(&work.node.outputs);
        if work.node.flops.fixed < 0
            || sizes.clone().any(|size| size.fixed < 0)
            || touched().map(dynamic).any(|count| count > 1)
        {
            return 0;
        }
        let time = self.forward_of(kind, most_rows) + self.backward_of(kind, most_rows);
        scale(time, 1000, most_rows)
    }
}

#[cfg(test)]
mod tests {
    use rannc_graph::{NodeId, testing};

    use super::{AnalyticCosts, CostModel, ProfiledCosts};
    use crate::{Cluster, Profile, Sample};

    #[test]
    fn missing_samples_name_the_operator() {
        let graph = testing::chain(2, 4);
        let profile = Profile { device: "cpu".into(), ..Profile::default() };
        let error = ProfiledCosts::new(&graph, &profile).unwrap_err();
        insta::assert_snapshot!(
            error,
            @"the profile of `cpu` has no samples for `op(4,32)`, the operator of `layer0/op#0`"
        );
    }

    #[test]
    fn profiles_are_calibrated() {
        let graph = testing::chain(1, 4);
        let mut profile = Profile::default();
        let samples = vec![Sample { rows: 4, forward_ns: 100, backward_ns: 300 }];
        profile.entries.insert("op(4,32)".into(), samples);
        profile.calibration.backward_ppm = 1_100_000;
        let costs = ProfiledCosts::new(&graph, &profile).unwrap();
        assert_eq!(costs.forward_ns(NodeId(0), 8), 200);
        assert_eq!(costs.backward_ns(NodeId(0), 8), 660);
    }

    #[test]
    fn arithmetic_dominates_large_operators() {
        let graph = testing::chain(1, 4096);
        let device = &Cluster::parse("a100-40gb").unwrap().devices[0];
        let costs = AnalyticCosts::new(&graph, device);
        let flops = 2 * 4096 * 4096 * 1024_u64;
        let expected = flops * 10 / (19_500 * 7) + super::START_NS;
        assert!(costs.forward_ns(NodeId(0), 1024).abs_diff(expected) < expected / 100);
        assert_eq!(costs.backward_ns(NodeId(0), 64), 2 * costs.forward_ns(NodeId(0), 64));
    }
}
