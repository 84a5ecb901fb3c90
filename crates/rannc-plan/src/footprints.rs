//! What each rank's memory goes to at the worst moment of a step, played operator by operator.

use std::cell::RefCell;
use std::collections::BTreeMap;

use rannc_cost::{Footprint, StageMemory, StageWork};
use rannc_graph::Graph;
use rannc_schedule::{GradientGroup, Memory, RankTimeline, StageId};

use crate::Placement;

/// The executor adds up gradients in buffers of about so many bytes.
const BUCKET_BYTES: u64 = 32 << 20;

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

    /// The memory of a rank at its worst moment; `lasting` is what it needs all the time, and the
    /// gradients of all of its parameters.
    pub(crate) fn peak(&self, timeline: &RankTimeline, lasting: &StageMemory) -> StageMemory {
        let peak = timeline.peak;
        let step = StageMemory {
            gradients: peak.gradients,
            activations: peak.activations,
            working: peak.working,
            buffers: peak.buffers,
            ..*lasting
        };
        let at_rest = StageMemory { activations: 0, working: 0, buffers: 0, ..*lasting };
        if at_rest.total() > step.total() { at_rest } else { step }
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
