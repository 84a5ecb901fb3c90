//! How much memory a stage takes on each of its devices.
//!
//! [`StageSizes`] is what the stage's operators and borders amount to at a number of rows;
//! [`StageMemory`] is the bill for it: parameters, gradients, optimizer state, what autograd keeps
//! for each microbatch between its forward and its backward, the largest operator's workspace, and
//! buffers for transfers.

use fixedbitset::FixedBitSet;
use rannc_graph::{Graph, NodeId, Users, ValueId, ValueKind};
use serde::{Deserialize, Serialize};

use crate::Sharding;
use crate::profile::scale;

/// Gradients are added up between ranks in buffers of about so many bytes.
pub const BUCKET_BYTES: u64 = 32 << 20;

/// What training adds to the model's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Training {
    /// Bytes of optimizer state for each byte of trainable parameter, in millionths.
    pub optimizer_state_factor_ppm: u64,
}

impl Default for Training {
    /// Adam: two numbers for each parameter.
    fn default() -> Self {
        Self { optimizer_state_factor_ppm: 2_000_000 }
    }
}

/// Byte counts of a stage that runs some number of rows at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageSizes {
    /// Parameters, buffers and constants.
    pub state: u64,
    /// Parameters that are trained.
    pub trainable: u64,
    /// Those of them that other stages hold, too: they are never sharded.
    pub tied: u64,
    /// The most parameters that are whole at a time, or have whole gradients, when those are sharded.
    pub gathered: u64,
    /// What autograd keeps for the backward of one microbatch.
    pub saved: u64,
    /// Inputs of one microbatch, the model's own included.
    pub received: u64,
    /// Values of one microbatch that go to or come from other stages, or leave the model.
    pub exchanged: u64,
    /// Operands, results and their gradients of the largest operator.
    pub working: u64,
}

/// A stage's memory on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageMemory {
    /// Parameters, buffers and constants.
    pub parameters: u64,
    /// Gradients of the trained parameters.
    pub gradients: u64,
    /// The optimizer's state.
    pub optimizer: u64,
    /// Inputs and saved values of all microbatches in flight.
    pub activations: u64,
    /// Workspace of the largest operator.
    pub working: u64,
    /// Values and gradients on their way to or from other stages.
    pub buffers: u64,
}

impl StageMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        let parts = [
            self.parameters,
            self.gradients,
            self.optimizer,
            self.activations,
            self.working,
            self.buffers,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// What a device takes that holds two stages: it works on one at a time.
    #[must_use]
    pub fn beside(&self, other: &Self) -> Self {
        Self {
            parameters: self.parameters.saturating_add(other.parameters),
            gradients: self.gradients.saturating_add(other.gradients),
            optimizer: self.optimizer.saturating_add(other.optimizer),
            activations: self.activations.saturating_add(other.activations),
            working: self.working.max(other.working),
            buffers: self.buffers.saturating_add(other.buffers),
        }
    }

    /// The same without so many bytes of parameters and buffers, and of trained parameters with their
    /// gradients and optimizer state.
    #[must_use]
    pub fn without(&self, state: u64, trained: u64, training: &Training) -> Self {
        let optimizer = scale(trained, training.optimizer_state_factor_ppm, 1_000_000);
        Self {
            parameters: self.parameters.saturating_sub(state),
            gradients: self.gradients.saturating_sub(trained),
            optimizer: self.optimizer.saturating_sub(optimizer),
            ..*self
        }
    }
}

impl StageSizes {
    /// The sizes of a stage: `nodes` with the non-batch operators they need, at `rows` rows.
    ///
    /// # Complexity
    ///
    /// Linear in the size of the graph.
    pub fn of(graph: &Graph, users: &Users, nodes: &FixedBitSet, rows: u64) -> Self {
        let batch_nodes = graph.batch_nodes();
        let cut = graph.cut(nodes, users);
        let bytes = |id: ValueId| graph.value(id).bytes(rows);
        let sum =
            |ids: &mut dyn Iterator<Item = ValueId>| ids.map(bytes).fold(0, u64::saturating_add);
        let received = sum(&mut cut.inputs.iter().copied());
        let from_stages =
            sum(&mut cut.inputs.iter().copied().filter(|&id| graph.producer(id).is_some()));
        let leaves = |id: &ValueId| {
            let made = graph.producer(*id).expect("a stage's outputs are made by its nodes");
            batch_nodes.contains(made.index()) || graph.outputs().contains(id)
        };
        let sent = sum(&mut cut.outputs.iter().copied().filter(leaves));
        let ids = || nodes.ones().map(NodeId::new);
        Self {
            state: sum(&mut cut.state.iter().copied()),
            trainable: sum(&mut cut.state.iter().copied().filter(|&id| is_trained(graph, id))),
            tied: 0,
            gathered: ids().map(|id| trained_bytes(graph, id)).max().unwrap_or(0),
            saved: ids().fold(0, |sum, id| sum.saturating_add(graph.node(id).saved_bytes.at(rows))),
            received,
            exchanged: from_stages.saturating_add(sent),
            working: ids().map(|id| working_bytes(graph, id, rows)).max().unwrap_or(0),
        }
    }

    /// What one more microbatch in flight adds.
    pub fn per_microbatch(&self) -> u64 {
        self.saved.saturating_add(self.received)
    }

    /// The memory that each of `replicas` takes with `in_flight` microbatches between forward and
    /// backward.
    pub fn memory(
        &self,
        in_flight: u64,
        training: &Training,
        sharding: Sharding,
        replicas: u64,
    ) -> StageMemory {
        let own = self.trainable.saturating_sub(self.tied);
        let part = own.div_ceil(replicas.max(1));
        let held = |level: Sharding| if sharding >= level { part } else { own };
        let copies = match sharding {
            Sharding::None | Sharding::Optimizer => 0,
            Sharding::Gradients => 2,  // gradients, and a copy that is sent
            Sharding::Parameters => 3, // parameters, too
        };
        let gathered = self.gathered.saturating_mul(copies);
        let optimized = held(Sharding::Optimizer).saturating_add(self.tied);
        let gradients = held(Sharding::Gradients).saturating_add(self.tied);
        let activations = self.per_microbatch().saturating_mul(in_flight);
        let working = self.working.saturating_add(gathered);
        // Gradients are added up when everything else of the passes is gone.
        let is_reduced = replicas > 1 || self.tied > 0;
        let reduced = if is_reduced { gradients.min(BUCKET_BYTES) } else { 0 };
        let reduced = reduced.saturating_sub(activations.saturating_add(working));
        StageMemory {
            parameters: self.state.saturating_sub(own - held(Sharding::Parameters)),
            gradients,
            optimizer: scale(optimized, training.optimizer_state_factor_ppm, 1_000_000),
            activations,
            working,
            buffers: self.exchanged.saturating_mul(2).max(reduced),
        }
    }
}

/// Whether the value is a parameter that the optimizer changes.
pub fn is_trained(graph: &Graph, id: ValueId) -> bool {
    let value = graph.value(id);
    value.kind == ValueKind::Parameter && value.requires_grad
}

fn trained_bytes(graph: &Graph, node: NodeId) -> u64 {
    let trained = graph.node(node).inputs.iter().filter(|&&id| is_trained(graph, id));
    trained.map(|&id| graph.value(id).bytes(1)).fold(0, u64::saturating_add)
}

/// Workspace of one operator: its activations in and out and their gradients, and the gradients of
/// the parameters it reads before they are added up.
pub fn working_bytes(graph: &Graph, node: NodeId, rows: u64) -> u64 {
    let node = graph.node(node);
    node.inputs.iter().chain(&node.outputs).fold(0, |sum: u64, &id| {
        let value = graph.value(id);
        let times = if value.is_state() { u64::from(is_trained(graph, id)) } else { 2 };
        sum.saturating_add(value.bytes(rows).saturating_mul(times))
    })
}

#[cfg(test)]
mod tests {
    use fixedbitset::FixedBitSet;
    use rannc_graph::testing;

    use super::{StageSizes, Training};
    use crate::Sharding;

    #[test]
    fn a_stage_pays_for_state_activations_and_borders() {
        let graph = testing::chain(4, 8);
        let mut middle = FixedBitSet::with_capacity(4);
        middle.insert_range(1..3);
        let sizes = StageSizes::of(&graph, &graph.users(), &middle, 2);
        let (weight, activation) = (8 * 8 * 4, 2 * 8 * 4);
        assert_eq!(sizes.state, 2 * weight);
        assert_eq!(sizes.received, activation);
        assert_eq!(sizes.exchanged, 2 * activation);
        assert_eq!(sizes.working, 4 * activation + weight);
        let memory = sizes.memory(3, &Training::default(), Sharding::None, 1);
        assert_eq!(memory.optimizer, 4 * weight);
        assert_eq!(memory.activations, 3 * 3 * activation);
        assert_eq!(
            memory.total(),
            8 * weight + 9 * activation + 4 * activation + weight + 4 * activation
        );
    }

    #[test]
    fn replicas_hold_parts_of_what_is_sharded() {
        let graph = testing::chain(1, 8);
        let mut all = FixedBitSet::with_capacity(1);
        all.insert(0);
        let sizes = StageSizes::of(&graph, &graph.users(), &all, 2);
        let weight = 8 * 8 * 4;
        let parts = Sharding::ALL.map(|level| {
            let memory = sizes.memory(1, &Training::default(), level, 4);
            (memory.parameters, memory.gradients, memory.optimizer)
        });
        let part = weight / 4;
        assert_eq!(parts[0], (weight, weight, 2 * weight));
        assert_eq!(parts[1], (weight, weight, 2 * part));
        assert_eq!(parts[2], (weight, part, 2 * part));
        assert_eq!(parts[3], (part, part, 2 * part));
    }
}
