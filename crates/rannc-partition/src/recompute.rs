//! Groups of operators that run as one call, so that their inner values can be computed again.
//!
//! A group's operators may lie between others in program order. Here a stage's operators are put
//! into an order in which each group is together; there is one exactly if no path leaves a group and
//! enters it again, through other groups neither. Running a group a second time must change nothing:
//! it may write to memory that it makes itself, or to buffers and inputs of the model, of which it is
//! given copies, and only if nobody else uses that memory.

use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rannc_graph::{Graph, NodeId};

use crate::order::{self, Edges};
use crate::storage::{WrittenStorage, written_storages};

/// A stage's operators in the order in which they run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arrangement {
    /// All operators; each group is together.
    pub order: Vec<NodeId>,
    /// The groups, each ascending, with operators that depend on no input as far as they make memory
    /// that only the group writes to.
    pub groups: Vec<Vec<NodeId>>,
}

impl Arrangement {
    /// The operators in program order, without groups.
    pub fn plain(nodes: &FixedBitSet) -> Self {
        Self { order: nodes.ones().map(NodeId::new).collect(), groups: Vec::new() }
    }
}

/// A group that cannot run twice, or not in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadGroup {
    /// Its position among the stage's groups.
    pub group: usize,
    /// What is wrong with it, to follow "the group".
    pub problem: String,
}

/// Puts groups of operators together; knows the graph's written memory.
#[derive(Clone, Debug)]
pub struct Arranger<'a> {
    graph: &'a Graph,
    batch_nodes: FixedBitSet,
    storages: Vec<WrittenStorage>,
}

impl<'a> Arranger<'a> {
    /// Looks at what the graph's operators write to.
    ///
    /// # Complexity
    ///
    /// Linear, nearly, in the number of edges.
    pub fn new(graph: &'a Graph) -> Self {
        let (batch_nodes, storages) = (graph.batch_nodes(), written_storages(graph));
        Self { graph, batch_nodes, storages }
    }

    /// An order of a stage's operators in which each group is together.
    ///
    /// Operators in `groups` that depend on no input are not kept there: they run once.
    ///
    /// # Errors
    ///
    /// The first group that breaks a rule.
    ///
    /// # Complexity
    ///
    /// Linear in the edges of the stage and in the graph's written storages, but for the logarithm of
    /// a heap.
    pub fn arrange(
        &self,
        nodes: &FixedBitSet,
        groups: &[Vec<NodeId>],
    ) -> Result<Arrangement, BadGroup> {
        let mut group_of: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (group, members) in groups.iter().enumerate() {
            let batch = members.iter().filter(|id| self.batch_nodes.contains(id.index()));
            group_of.extend(batch.map(|&id| (id, group)));
        }
        self.take_own_memory(nodes, &mut group_of)?;
        let mut members = vec![Vec::new(); groups.len()];
        for (&id, &group) in &group_of {
            members[group].push(id);
        }
        Ok(Arrangement { order: self.order(nodes, &group_of, &members)?, groups: members })
    }

    /// As [`arrange`](Self::arrange), without the groups that break a rule.
    pub fn arrange_possible(&self, nodes: &FixedBitSet, groups: &[Vec<NodeId>]) -> Arrangement {
        let mut kept: Vec<Vec<NodeId>> = groups.to_vec();
        loop {
            match self.arrange(nodes, &kept) {
                Ok(mut arrangement) => {
                    arrangement.groups.retain(|group| !group.is_empty());
                    return arrangement;
                }
                Err(bad) => kept[bad.group].clear(),
            }
        }
    }

    /// Checks what groups write to, and adds what makes the memory that they alone write to.
    fn take_own_memory(
        &self,
        nodes: &FixedBitSet,
        group_of: &mut BTreeMap<NodeId, usize>,
    ) -> Result<(), BadGroup> {
        for storage in &self.storages {
            let before = storage.touching.partition_point(|&id| id <= storage.last_write);
            let guarded =
                if storage.external { &storage.touching[..] } else { &storage.touching[..before] };
            let Some((&first, &group)) = guarded.iter().find_map(|id| group_of.get_key_value(id))
            else {
                continue;
            };
            let key = &self.graph.node(first).key;
            let writer = &self.graph.node(storage.last_write).key;
            let other = guarded.iter().find(|id| {
                self.batch_nodes.contains(id.index()) && group_of.get(id) != Some(&group)
            });
            if let Some(other) = other {
                let other = &self.graph.node(*other).key;
                let problem = format!(
                    "has `{key}` but not `{other}`, though both use memory that `{writer}` writes to"
                );
                return Err(BadGroup { group, problem });
            }
            let makers = guarded.iter().filter(|id| nodes.contains(id.index()));
            group_of.extend(makers.map(|&id| (id, group)));
        }
        Ok(())
    }

    fn order(
        &self,
        nodes: &FixedBitSet,
        group_of: &BTreeMap<NodeId, usize>,
        members: &[Vec<NodeId>],
    ) -> Result<Vec<NodeId>, BadGroup> {
        if members.iter().all(Vec::is_empty) {
            return Ok(Arrangement::plain(nodes).order);
        }
        // Units are numbered by their first operators, to stay close to the program's order.
        let mut units: Vec<Vec<NodeId>> = Vec::new();
        let mut unit_of: BTreeMap<NodeId, usize> = BTreeMap::new();
        for id in nodes.ones().map(NodeId::new) {
            if unit_of.contains_key(&id) {
                continue;
            }
            let unit = group_of.get(&id).map_or_else(|| vec![id], |&group| members[group].clone());
            unit_of.extend(unit.iter().map(|&member| (member, units.len())));
            units.push(unit);
        }
        let edges = self.edges(&unit_of, units.len());
        let order = order::lowest_first(&edges);
        if order.len() == units.len() {
            return Ok(order.into_iter().flat_map(|unit| units[unit].iter().copied()).collect());
        }
        let component = order::components(&edges);
        let (unit, other) =
            units_in_a_circle(&component, |unit| group_of.contains_key(&units[unit][0]))
                .expect("operators alone are in topological order, so a circle has a group");
        let between = &self.graph.node(units[other][0]).key;
        Err(BadGroup {
            group: group_of[&units[unit][0]],
            problem: format!(
                "is not convex: a path leaves it, to `{between}`, and enters it again"
            ),
        })
    }

    /// Which units must follow which: readers follow makers, and what touches written memory stays in
    /// program order up to the last write.
    fn edges(&self, unit_of: &BTreeMap<NodeId, usize>, num_units: usize) -> Edges {
        let mut edges: Edges = vec![Vec::new(); num_units];
        let mut add = |from: NodeId, to: NodeId| {
            if let (Some(&from), Some(&to)) = (unit_of.get(&from), unit_of.get(&to))
                && from != to
            {
                edges[from].push(to);
            }
        };
        for &id in unit_of.keys() {
            let read = self.graph.node(id).inputs.iter();
            read.filter_map(|&value| self.graph.producer(value)).for_each(|made| add(made, id));
        }
        for storage in &self.storages {
            let before = storage.touching.partition_point(|&id| id <= storage.last_write);
            let (guarded, after) = storage.touching.split_at(before);
            let here: Vec<NodeId> =
                guarded.iter().copied().filter(|id| unit_of.contains_key(id)).collect();
            for pair in here.windows(2) {
                add(pair[0], pair[1]);
            }
            if let Some(&last) = here.last() {
                for &reader in after {
                    add(last, reader);
                }
            }
        }
        for successors in &mut edges {
            successors.sort_unstable();
            successors.dedup();
        }
        edges
    }
}

/// The first unit that is a group and in a circle, and the first other one in the same circle.
fn units_in_a_circle(
    component: &[usize],
    is_group: impl Fn(usize) -> bool,
) -> Option<(usize, usize)> {
    (0..component.len()).filter(|&unit| is_group(unit)).find_map(|unit| {
        let same = |&other: &usize| other != unit && component[other] == component[unit];
        (0..component.len()).find(same).map(|other| (unit, other))
    })
}

#[cfg(test)]
mod tests {
    use fixedbitset::FixedBitSet;
    use proptest::prelude::*;
    use rannc_graph::{Graph, NodeId, testing};

    use super::{Arrangement, Arranger, BadGroup};
    use crate::atomic::tests::graph;

    fn arranged(graph: &Graph, groups: &[&[u32]]) -> Result<Arrangement, BadGroup> {
        let mut all = FixedBitSet::with_capacity(graph.nodes().len());
        all.insert_range(..);
        let groups: Vec<Vec<NodeId>> =
            groups.iter().map(|group| group.iter().map(|&id| NodeId(id)).collect()).collect();
        Arranger::new(graph).arrange(&all, &groups)
    }

    fn order(graph: &Graph, groups: &[&[u32]]) -> Vec<u32> {
        arranged(graph, groups).unwrap().order.iter().map(|id| id.0).collect()
    }

    fn problem(graph: &Graph, groups: &[&[u32]]) -> String {
        let bad = arranged(graph, groups).unwrap_err();
        format!("group {} {}", bad.group, bad.problem)
    }

    /// Two branches of two operators each, in turns, and one that joins them.
    fn branches() -> Graph {
        graph(
            &[
                ("a1", "x", "p", "", ""),
                ("b1", "x", "q", "", ""),
                ("a2", "p", "r", "", ""),
                ("b2", "q", "s", "", ""),
                ("join", "r s", "t", "", ""),
            ],
            "t",
        )
    }

    #[test]
    fn groups_are_put_together() {
        assert_eq!(order(&branches(), &[]), [0, 1, 2, 3, 4]);
        assert_eq!(order(&branches(), &[&[0, 2], &[1, 3]]), [0, 2, 1, 3, 4]);
        assert_eq!(order(&branches(), &[&[2, 3]]), [0, 1, 2, 3, 4]);
        assert_eq!(order(&branches(), &[&[2, 3, 4, 1]]), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn groups_that_values_leave_and_enter_are_refused() {
        insta::assert_snapshot!(
            problem(&branches(), &[&[0, 4]]),
            @"group 0 is not convex: a path leaves it, to `a2`, and enters it again"
        );
        // Each is convex, but neither can be first.
        let crossed = graph(
            &[
                ("a1", "x", "p", "", ""),
                ("b1", "p", "q", "", ""),
                ("b2", "x", "r", "", ""),
                ("a2", "r", "s", "", ""),
            ],
            "q s",
        );
        insta::assert_snapshot!(
            problem(&crossed, &[&[0, 3], &[1, 2]]),
            @"group 0 is not convex: a path leaves it, to `b1`, and enters it again"
        );
    }

    #[test]
    fn groups_write_to_nothing_but_their_own() {
        let norm = graph(
            &[
                ("conv", "x", "a", "", ""),
                ("norm", "a b", "c", "b", ""),
                ("relu_", "c", "d", "c", "c"),
                ("view", "d", "e", "", "d"),
            ],
            "e",
        );
        insta::assert_snapshot!(
            problem(&norm, &[&[0], &[1]]),
            @"group 1 has `norm` but not `relu_`, though both use memory that `relu_` writes to"
        );
        insta::assert_snapshot!(
            problem(&norm, &[&[2, 3]]),
            @"group 0 has `relu_` but not `norm`, though both use memory that `relu_` writes to"
        );
        assert_eq!(order(&norm, &[&[0], &[3]]), [0, 1, 2, 3]);
        assert_eq!(order(&norm, &[&[0], &[1, 2]]), [0, 1, 2, 3]);
        let shared = graph(
            &[
                ("norm", "x b", "p", "b", ""),
                ("linear", "p", "q", "", ""),
                ("again", "q b", "r", "b", ""),
            ],
            "r",
        );
        insta::assert_snapshot!(
            problem(&shared, &[&[0, 1]]),
            @"group 0 has `norm` but not `again`, though both use memory that `again` writes to"
        );
        assert_eq!(order(&shared, &[&[0, 1, 2]]), [0, 1, 2]);
    }

    #[test]
    fn readers_follow_the_last_writer_though_no_value_flows() {
        let views = graph(
            &[
                ("conv", "x", "a", "", ""),
                ("view", "a", "v", "", "a"),
                ("relu_", "a", "r", "a", "a"),
                ("late", "v", "w", "", ""),
                ("early", "x", "y", "", ""),
                ("both", "w y", "z", "", ""),
            ],
            "z r",
        );
        // `late` reads only `v`, which is made before `relu_` writes.
        assert_eq!(order(&views, &[&[3, 4, 5]]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(order(&views, &[&[0, 1, 2], &[4, 5]]), [0, 1, 2, 3, 4, 5]);
        insta::assert_snapshot!(
            problem(&views, &[&[0, 1, 2, 4, 5]]),
            @"group 0 is not convex: a path leaves it, to `late`, and enters it again"
        );
    }

    #[test]
    fn memory_that_a_group_fills_is_made_in_it() {
        let filled = graph(
            &[
                ("empty", "", "e", "", ""),
                ("copy_", "e x", "f", "e", "e"),
                ("relu", "f", "r", "", ""),
                ("mask", "", "m", "", ""),
                ("mul", "r m", "o", "", ""),
            ],
            "o",
        );
        let found = arranged(&filled, &[&[1, 2, 3, 4]]).unwrap();
        assert_eq!(found.groups, [[0, 1, 2, 4].map(NodeId)]);
        assert_eq!(found.order, [3, 0, 1, 2, 4].map(NodeId));
    }

    #[test]
    fn bad_groups_can_be_left_out() {
        let graph = branches();
        let mut all = FixedBitSet::with_capacity(5);
        all.insert_range(..);
        let groups = [vec![NodeId(0), NodeId(4)], vec![NodeId(1), NodeId(3)]];
        let found = Arranger::new(&graph).arrange_possible(&all, &groups);
        assert_eq!(found.groups, [[NodeId(1), NodeId(3)]]);
    }

    proptest! {
        #[test]
        fn orders_are_topological_and_groups_together(
            graph in testing::graphs(24), cuts in prop::collection::vec(0..6usize, 24),
        ) {
            let mut groups = vec![Vec::new(); 5];
            for id in graph.node_ids() {
                if let Some(group) = groups.get_mut(cuts[id.index()]) {
                    group.push(id);
                }
            }
            let mut all = FixedBitSet::with_capacity(graph.nodes().len());
            all.insert_range(..);
            let found = Arranger::new(&graph).arrange_possible(&all, &groups);
            let mut position = vec![usize::MAX; graph.nodes().len()];
            for (index, id) in found.order.iter().enumerate() {
                position[id.index()] = index;
            }
            prop_assert!(position.iter().all(|&at| at < usize::MAX));
            for id in graph.node_ids() {
                for made in graph.node(id).inputs.iter().filter_map(|&value| graph.producer(value)) {
                    prop_assert!(position[made.index()] < position[id.index()]);
                }
            }
            for group in &found.groups {
                let at = |id: &NodeId| position[id.index()];
                let together = group.windows(2).all(|pair| at(&pair[0]) + 1 == at(&pair[1]));
                prop_assert!(together);
            }
        }
    }
}
