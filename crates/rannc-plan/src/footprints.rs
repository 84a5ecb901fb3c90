//! What each rank's memory goes to at the worst moment of a step, played operator by operator.

use std::cell::RefCell;
use std::collections::BTreeMap;

use rannc_cost::{BUCKET_BYTES, Footprint, StageMemory, StageWork, is_trained};
use rannc_graph::Graph;
use rannc_schedule::{GradientGroup, Memory, RankTimeline, StageId};

use crate::Placement;

/// The stages' footprints, each taken once for each number of rows.
pub(crate) struct Footprints<'a> {
    graph: &'a Graph,
    placement: &'a Placement,
    known: RefCell<BTreeMap<(StageId, u64), Footprint>>,
}

impl<'a> Footprints<'a> {
    pub(crate) fn new(graph: &'a Graph, placement: &'a Placement) -> Self {
        Self { graph, placement, known: RefCell::default() }
    }

    fn of(&self, stage: StageId, rows: u64) -> Footprint {
        let mut known = self.known.borrow_mut();
        *known.entry((stage, rows)).or_insert_with(|| {
            let placed = &self.placement.stages[stage.index()];
            let work = StageWork {
                nodes: &placed.nodes,
                inputs: &placed.inputs,
                outputs: &placed.outputs,
                recompute: &placed.recompute,
            };
            Footprint::of(self.graph, &work, rows)
        })
    }

    /// The memory of a rank at its worst moment: in the step's passes or in the optimizer's step after
    /// them. `lasting` is what it needs all the time, and the gradients of all of its parameters;
    /// `rows` are those of the batch that it brings.
    pub(crate) fn peak(
        &self,
        rank: u32,
        timeline: &RankTimeline,
        lasting: &StageMemory,
        rows: u64,
    ) -> StageMemory {
        let batch = self.graph.inputs().iter().map(|&id| self.graph.value(id).bytes(rows));
        let batch = batch.fold(0, u64::saturating_add);
        let peak = timeline.peak;
        let passes = StageMemory {
            gradients: peak.gradients,
            activations: peak.activations,
            working: peak.working,
            buffers: peak.buffers.saturating_add(batch),
            ..*lasting
        };
        // An optimizer makes about as many temporary tensors as it keeps, for one parameter at a time.
        let largest = u128::from(self.largest_trained(rank));
        let temporary =
            largest * u128::from(lasting.optimizer) / u128::from(lasting.gradients.max(1));
        let working = u64::try_from(temporary).unwrap_or(u64::MAX);
        let optimizing = StageMemory { activations: 0, working, buffers: batch, ..*lasting };
        if optimizing.total() > passes.total() { optimizing } else { passes }
    }

    fn largest_trained(&self, rank: u32) -> u64 {
        let held = self.placement.stages.iter().filter(|stage| stage.ranks.contains(&rank));
        let trained = held.flat_map(|stage| &stage.state).filter(|&&id| is_trained(self.graph, id));
        trained.map(|&id| self.graph.value(id).bytes(0)).max().unwrap_or(0)
    }
}

impl Memory for Footprints<'_> {
    fn saved_bytes(&self, stage: StageId, rows: u64) -> u64 {
        self.of(stage, rows).saved
    }

    fn forward_bytes(&self, stage: StageId, rows: u64) -> u64 {
        self.of(stage, rows).forward
    }

    fn backward_bytes(&self, stage: StageId, rows: u64, first: bool) -> u64 {
        let footprint = self.of(stage, rows);
        if first { footprint.first_backward } else { footprint.later_backward }
    }

    fn gradient_bytes(&self, stage: StageId) -> u64 {
        self.of(stage, 1).gradients
    }

    fn reduction_bytes(&self, group: &GradientGroup) -> u64 {
        group.bytes.min(BUCKET_BYTES)
    }
}
