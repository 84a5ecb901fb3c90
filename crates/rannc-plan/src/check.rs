//! Whether a plan, whoever wrote it, is one for a graph and can be carried out.

use std::collections::{BTreeMap, BTreeSet};

use fixedbitset::FixedBitSet;
use rannc_cost::Cluster;
use rannc_graph::Graph;
use rannc_partition::Arranger;

use crate::place::recomputed;
use crate::{Plan, PlanError, PlanStage};

/// More stages than this in a plan are surely a mistake.
const MAX_STAGES: u64 = 1 << 14;
/// More microbatches than this in a step are surely a mistake; no schedule takes more.
const MAX_MICROBATCHES: u64 = 1 << 12;
/// More rows than this in a batch are surely a mistake, so are larger shares of them.
const MAX_ROWS: u64 = 1 << 40;

impl Plan {
    /// Checks that the plan is one for this graph and this many processes, and can be carried out.
    ///
    /// # Errors
    ///
    /// [`PlanError::OtherModel`], [`PlanError::OtherWorld`] or [`PlanError::Invalid`].
    pub fn check(&self, graph: &Graph, world_size: u32) -> Result<(), PlanError> {
        self.check_model(graph)?;
        if self.world_size != world_size {
            return Err(PlanError::OtherWorld { planned: self.world_size, running: world_size });
        }
        self.check_form()?;
        let batch_nodes = graph.batch_nodes();
        let known: BTreeSet<&str> =
            self.stages.iter().flat_map(|stage| stage.nodes.iter().map(String::as_str)).collect();
        if let Some(missing) = batch_nodes
            .ones()
            .map(|index| &graph.nodes()[index].key)
            .find(|key| !known.contains(key.as_str()))
        {
            return invalid(format!("no stage runs the operator `{missing}`"));
        }
        let wanted = self.wanted();
        let parts = rannc_partition::assign(graph, &wanted, self.stages.len());
        for (position, node) in graph.nodes().iter().enumerate() {
            let key = node.key.as_str();
            let Some(&stage) = wanted.get(key).filter(|_| batch_nodes.contains(position)) else {
                continue;
            };
            if !parts[stage].contains(position) {
                return invalid(format!(
                    "stage {stage} cannot run `{key}`: it needs a value that a later stage makes, \
                     or shares memory with an operator of another stage"
                ));
            }
        }
        self.check_recompute(graph, &parts)?;
        if !graph.batch().splittable
            && (self.microbatches > 1 || self.stages.iter().any(|stage| stage.ranks.len() > 1))
        {
            return invalid(format!(
                "the model's batch cannot be split ({}), so it needs 1 microbatch and 1 rank per stage",
                graph.batch().reason.as_deref().unwrap_or("capture gave no reason")
            ));
        }
        Ok(())
    }

    /// Checks that the plan belongs to this model.
    pub(crate) fn check_model(&self, graph: &Graph) -> Result<(), PlanError> {
        if self.model_identity == graph.identity() {
            return Ok(());
        }
        Err(PlanError::OtherModel {
            plan_model: self.model.clone(),
            plan_identity: self.model_identity.clone(),
            model: graph.name().into(),
            identity: graph.identity(),
        })
    }

    fn check_recompute(&self, graph: &Graph, parts: &[FixedBitSet]) -> Result<(), PlanError> {
        if self.stages.iter().all(|stage| stage.recompute.is_empty()) {
            return Ok(());
        }
        let arranger = Arranger::new(graph);
        for (index, (part, stage)) in parts.iter().zip(&self.stages).enumerate() {
            let groups = recomputed(graph, part, &stage.recompute);
            if let Err(bad) = arranger.arrange(part, &groups) {
                return invalid(format!(
                    "group {} of stage {index}'s `recompute` {}",
                    bad.group, bad.problem
                ));
            }
        }
        Ok(())
    }

    /// Checks what can be told without a graph.
    pub(crate) fn check_form(&self) -> Result<(), PlanError> {
        let limits = [
            ("stages", self.stages.len() as u64, MAX_STAGES),
            ("processes", self.world_size.into(), Cluster::MAX_DEVICES.into()),
            ("rows", self.batch_size, MAX_ROWS),
            ("microbatches", self.microbatches, MAX_MICROBATCHES),
        ];
        for (what, found, limit) in limits {
            if !(1..=limit).contains(&found) {
                return invalid(format!("it has {found} {what}, needed 1 to {limit}"));
            }
        }
        let mut owner: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, stage) in self.stages.iter().enumerate() {
            if let Some(problem) = self.ranks_problem(stage) {
                return invalid(format!("stage {index} {problem}"));
            }
            for key in &stage.nodes {
                if let Some(other) = owner.insert(key, index) {
                    return invalid(format!(
                        "the operator `{key}` is listed in stages {other} and {index}"
                    ));
                }
            }
        }
        for (index, stage) in self.stages.iter().enumerate() {
            check_groups(index, &stage.recompute, &owner)?;
        }
        Ok(())
    }

    fn ranks_problem(&self, stage: &PlanStage) -> Option<String> {
        let PlanStage { ranks, shares, .. } = stage;
        if ranks.is_empty() {
            return Some("has no ranks, needed at least one".into());
        }
        let mut pairs = ranks.iter().zip(ranks.iter().skip(1));
        if let Some((rank, next)) = pairs.find(|(rank, next)| rank >= next) {
            return Some(format!("has rank {rank} before rank {next}, needed ascending"));
        }
        if let Some(rank) = ranks.iter().find(|&&rank| rank >= self.world_size) {
            return Some(format!("has rank {rank}, needed 0 to {}", self.world_size - 1));
        }
        if !shares.is_empty() && shares.len() != ranks.len() {
            let (shares, ranks) = (shares.len(), ranks.len());
            return Some(format!("has {shares} shares for {ranks} ranks, needed one for each"));
        }
        let share = shares.iter().find(|share| !(1..=MAX_ROWS).contains(*share))?;
        Some(format!("has a share of {share}, needed 1 to {MAX_ROWS}"))
    }
}

/// Checks that the groups of a stage to compute again are parts of it, each for itself.
fn check_groups(
    stage: usize,
    groups: &[Vec<String>],
    owner: &BTreeMap<&str, usize>,
) -> Result<(), PlanError> {
    let mut group_of: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, group) in groups.iter().enumerate() {
        let name = format!("group {index} of stage {stage}'s `recompute`");
        if group.is_empty() {
            return invalid(format!("{name} is empty; leave it out"));
        }
        for key in group {
            match owner.get(key.as_str()) {
                Some(&other) if other == stage => {}
                Some(other) => {
                    return invalid(format!("{name} has `{key}`, which is of stage {other}"));
                }
                None => {
                    return invalid(format!("{name} has `{key}`, which no stage lists"));
                }
            }
            if let Some(first) = group_of.insert(key, index) {
                return invalid(format!("{name} has `{key}`, which is in group {first} already"));
            }
        }
    }
    Ok(())
}

fn invalid<T>(problem: String) -> Result<T, PlanError> {
    Err(PlanError::Invalid { problem })
}
