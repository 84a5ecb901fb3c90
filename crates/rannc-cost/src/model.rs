//! How long operators take: measured, or estimated from their size.

use rannc_graph::{Graph, NodeId};

use crate::profile::{Curve, scale};
use crate::{CostError, Device, Profile};

/// The time of each operator as a function of the rows that it sees.
pub trait CostModel: Sync {
    /// Time of the forward pass.
    fn forward_ns(&self, node: NodeId, rows: u64) -> u64;

    /// Time of the backward pass; zero for operators that nothing differentiates.
    fn backward_ns(&self, node: NodeId, rows: u64) -> u64;
}

/// Times from a [`Profile`].
#[derive(Clone, Debug)]
pub struct ProfiledCosts {
    /// Forward and backward curve, and whether the batch changes them, for each node.
    nodes: Vec<(Curve, Curve, bool)>,
}

impl ProfiledCosts {
    /// Looks up every operator of the graph.
    ///
    /// # Errors
    ///
    /// [`CostError::UnknownSignature`] for the first operator that was not measured.
    pub fn new(graph: &Graph, profile: &Profile) -> Result<Self, CostError> {
        let batch_nodes = graph.batch_nodes();
        let nodes = graph.nodes().iter().enumerate().map(|(index, node)| {
            let samples = profile.entries.get(&node.signature).filter(|found| !found.is_empty());
            let samples = samples.ok_or_else(|| CostError::UnknownSignature {
                device: profile.device.clone(),
                signature: node.signature.clone(),
                node: node.key.clone(),
            })?;
            let forward = samples.iter().map(|sample| (sample.rows, sample.forward_ns));
            let backward = samples.iter().map(|sample| (sample.rows, sample.backward_ns));
            Ok((
                Curve::new(forward, profile.calibration.forward_ppm),
                Curve::new(backward, profile.calibration.backward_ppm),
                batch_nodes.contains(index),
            ))
        });
        nodes.collect::<Result<_, CostError>>().map(|nodes| Self { nodes })
    }
}

impl CostModel for ProfiledCosts {
    fn forward_ns(&self, node: NodeId, rows: u64) -> u64 {
        let (forward, _, batch) = &self.nodes[node.index()];
        if *batch { forward.at(rows) } else { forward.constant() }
    }

    fn backward_ns(&self, node: NodeId, rows: u64) -> u64 {
        let (_, backward, batch) = &self.nodes[node.index()];
        if *batch { backward.at(rows) } else { backward.constant() }
    }
}

/// Times from operation and byte counts: an operator takes as long as the slower of arithmetic (at
/// seven tenths of the device's peak) and memory traffic, plus a few microseconds to start.
/// The backward pass does twice the forward's work.
#[derive(Clone, Debug)]
pub struct AnalyticCosts<'a> {
    graph: &'a Graph,
    device: Device,
    differentiated: Vec<bool>,
}

const START_NS: u64 = 4_000;
const ATTAINED_PERCENT: u64 = 70;
const NS_PER_SECOND: u64 = 1_000_000_000;

impl<'a> AnalyticCosts<'a> {
    /// Costs of the graph on a device.
    pub fn new(graph: &'a Graph, device: &Device) -> Self {
        let differentiated = graph.nodes().iter().map(|node| {
            node.outputs.iter().any(|&output| graph.value(output).requires_grad)
                && node.inputs.iter().any(|&input| graph.value(input).requires_grad)
        });
        Self { graph, device: device.clone(), differentiated: differentiated.collect() }
    }
}

impl CostModel for AnalyticCosts<'_> {
    fn forward_ns(&self, node: NodeId, rows: u64) -> u64 {
        let node = self.graph.node(node);
        let touched = node.inputs.iter().chain(&node.outputs);
        let bytes =
            touched.map(|&value| self.graph.value(value).bytes(rows)).fold(0, u64::saturating_add);
        let attained = scale(self.device.flops_per_second, ATTAINED_PERCENT, 100);
        let arithmetic = scale(node.flops.at(rows), NS_PER_SECOND, attained);
        let traffic = scale(bytes, NS_PER_SECOND, self.device.memory_bytes_per_second);
        arithmetic.max(traffic).saturating_add(START_NS)
    }

    fn backward_ns(&self, node: NodeId, rows: u64) -> u64 {
        if self.differentiated[node.index()] {
            self.forward_ns(node, rows).saturating_mul(2)
        } else {
            0
        }
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
