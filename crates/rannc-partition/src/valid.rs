//! Checks stages, whoever made them, and places the operators of another capture into stages.

use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rannc_cost::is_trained;
use rannc_graph::{Graph, NodeId};

use crate::{Atoms, PartitionError};

/// Checks that stages run every operator and that values only flow to the same or a later stage.
///
/// Stages need not be contiguous in any order. Operators that depend on no input may be in any
/// number of stages but must be wherever they are read; all others must be in exactly one, and those
/// that share memory which is written to in the same one.
///
/// # Errors
///
/// The first rule that does not hold, with the operators' keys.
///
/// # Complexity
///
/// Linear in the number of edges, times the stages for cloned operators.
pub fn stages_are_valid(graph: &Graph, stages: &[FixedBitSet]) -> Result<(), PartitionError> {
    let atoms = Atoms::new(graph);
    let num_nodes = graph.nodes().len();
    let mut stage_of: Vec<Option<usize>> = vec![None; num_nodes];
    for (stage, nodes) in stages.iter().enumerate() {
        for index in nodes.ones() {
            if index >= num_nodes {
                let problem = format!("stage {stage} has operator {index} of {num_nodes}");
                return Err(PartitionError::Options { problem });
            }
            if atoms.of(NodeId::new(index)).is_none() {
                continue;
            }
            if let Some(first) = stage_of[index].replace(stage) {
                let node = graph.nodes()[index].key.clone();
                return Err(PartitionError::Twice { node, first, second: stage });
            }
        }
    }
    let mut first_of: Vec<Option<(NodeId, usize)>> = vec![None; atoms.len()];
    for id in graph.node_ids() {
        let Some(atom) = atoms.of(id) else { continue };
        let Some(stage) = stage_of[id.index()] else {
            return Err(PartitionError::Missing { node: graph.node(id).key.clone() });
        };
        let (first, first_stage) = *first_of[atom].get_or_insert((id, stage));
        if first_stage != stage {
            return Err(PartitionError::SharedMemory {
                first: graph.node(first).key.clone(),
                first_stage,
                second: graph.node(id).key.clone(),
                second_stage: stage,
            });
        }
        check_reads(graph, id, stage, &stage_of)?;
    }
    stages
        .iter()
        .enumerate()
        .try_for_each(|(stage, nodes)| check_clones(graph, &atoms, stage, nodes))?;
    check_outputs(graph, stages)
}

fn check_reads(
    graph: &Graph,
    id: NodeId,
    stage: usize,
    stage_of: &[Option<usize>],
) -> Result<(), PartitionError> {
    for &value in &graph.node(id).inputs {
        let from = graph.producer(value).and_then(|made| stage_of[made.index()]);
        if let Some(from) = from.filter(|&from| from > stage) {
            let (node, value) = (graph.node(id).key.clone(), graph.value(value).name.clone());
            return Err(PartitionError::Backwards { node, stage, value, from });
        }
    }
    Ok(())
}

fn check_clones(
    graph: &Graph,
    atoms: &Atoms,
    stage: usize,
    nodes: &FixedBitSet,
) -> Result<(), PartitionError> {
    for id in nodes.ones().map(NodeId::new) {
        if let Some(needed) =
            atoms.cloned_with(graph, id).find(|other| !nodes.contains(other.index()))
        {
            let (node, needed) = (graph.node(id).key.clone(), graph.node(needed).key.clone());
            return Err(PartitionError::MissingClone { node, stage, needed });
        }
    }
    Ok(())
}

fn check_outputs(graph: &Graph, stages: &[FixedBitSet]) -> Result<(), PartitionError> {
    let mut producers = graph.outputs().iter().filter_map(|&output| graph.producer(output));
    match producers.find(|made| !stages.iter().any(|nodes| nodes.contains(made.index()))) {
        Some(made) => Err(PartitionError::Missing { node: graph.node(made).key.clone() }),
        None => Ok(()),
    }
}

/// Places every operator of a graph, perhaps captured in another mode than the one that was planned.
///
/// `wanted` gives the stage of each operator key of the planned capture. A known operator goes to
/// its stage. An unknown one goes where its parameters are used: by known operators, or else by
/// those of its module. If that is several stages, the earliest that its operands allow. No operator
/// goes before one that it reads from; operators that share written memory stay together (in the
/// latest stage any of them wants), and batch-independent ones are cloned into their readers.
///
/// The result always satisfies [`stages_are_valid`] and has `num_stages` entries (at least one),
/// some of them perhaps empty.
///
/// # Complexity
///
/// Linear in the number of edges but for logarithms.
pub fn assign(
    graph: &Graph,
    wanted: &BTreeMap<&str, usize>,
    num_stages: usize,
) -> Vec<FixedBitSet> {
    let (atoms, batch_nodes) = (Atoms::new(graph), graph.batch_nodes());
    let last = num_stages.max(1) - 1;
    let wish = |id: NodeId| wanted.get(graph.node(id).key.as_str()).map(|&stage| stage.min(last));
    let mut homes: Vec<Vec<usize>> = vec![Vec::new(); graph.values().len()];
    for id in graph.node_ids() {
        for value in graph.node(id).inputs.iter().filter(|&&value| graph.value(value).is_state()) {
            homes[value.index()].extend(wish(id));
        }
    }
    let mut sources: Vec<Vec<usize>> = vec![Vec::new(); atoms.len()];
    for (atom, readers) in atoms.edges().iter().enumerate() {
        for &reader in readers {
            sources[reader].push(atom);
        }
    }
    let mut stage_of: Vec<usize> = Vec::with_capacity(atoms.len());
    let mut stages: Vec<Vec<usize>> = vec![Vec::new(); last + 1];
    for (atom, sources) in sources.iter().enumerate() {
        let earliest = sources.iter().map(|&source| stage_of[source]).max().unwrap_or(0);
        let members = atoms.members(atom);
        let known = members.iter().any(|&id| wish(id).is_some());
        let wishes = members.iter().filter_map(|&id| match wish(id) {
            // What runs but once for all rows is in no plan, and follows what it is pinned to.
            None if known && !batch_nodes.contains(id.index()) => None,
            None => adopted(graph, id, &homes, wanted, earliest),
            found => found,
        });
        let stage = wishes.max().unwrap_or(0).clamp(earliest, last);
        stage_of.push(stage);
        stages[stage].push(atom);
    }
    stages.into_iter().map(|atoms_here| atoms.stage(graph, atoms_here)).collect()
}

/// The stage for an operator that the plan does not know, by the parameters it reads.
fn adopted(
    graph: &Graph,
    id: NodeId,
    homes: &[Vec<usize>],
    wanted: &BTreeMap<&str, usize>,
    earliest: usize,
) -> Option<usize> {
    let node = graph.node(id);
    let state = || node.inputs.iter().filter(|&&value| graph.value(value).is_state());
    let trained: Vec<usize> = state()
        .filter(|&&value| is_trained(graph, value))
        .flat_map(|value| homes[value.index()].clone())
        .collect();
    let any = || state().flat_map(|value| homes[value.index()].iter().copied()).collect::<Vec<_>>();
    let mut stages = if trained.is_empty() { any() } else { trained };
    if stages.is_empty() && state().next().is_some() {
        let prefix = format!("{}/", node.module);
        let siblings =
            wanted.range(prefix.as_str()..).take_while(|(key, _)| key.starts_with(&prefix));
        stages = siblings.map(|(_, &stage)| stage).collect();
    }
    let allowed = stages.iter().copied().filter(|&stage| stage >= earliest).min();
    allowed.or(stages.into_iter().max())
}

#[cfg(test)]
mod tests;
