//! The oracle for the stage search: tries every division, and prices stages from the graph itself.

use rannc_cost::{CostModel, StageSizes};
use rannc_graph::{Graph, NodeId};

use crate::Atoms;
use crate::stage::{Division, Problem};

/// The least step of any division into some number of stages, for each number that the layout
/// allows and that fits.
pub(crate) fn best(problem: &Problem) -> Vec<u64> {
    let (num_blocks, num_units) = (problem.num_blocks(), problem.layout.num_units());
    let (fewest, most) = problem.layout.stage_counts;
    let mut found = Vec::new();
    for num_stages in fewest..=most.min(num_blocks) {
        let ends =
            if problem.layout.may_idle { num_stages..=num_units } else { num_units..=num_units };
        let divisions = ends.flat_map(|end| {
            let starts = ascending(num_blocks, num_stages);
            let units = ascending(end, num_stages);
            starts.into_iter().flat_map(move |starts| {
                let units = units.clone().into_iter();
                units.map(move |units| division(starts.clone(), &units, end))
            })
        });
        let one_each = |division: &Division| {
            !problem.layout.one_unit_each
                || division.units.iter().all(|&(start, end)| end - start == 1)
        };
        found.extend(divisions.filter(one_each).filter_map(|found| problem.evaluate(&found)).min());
    }
    found
}

fn division(starts: Vec<usize>, units: &[usize], end: usize) -> Division {
    let ends = units.iter().skip(1).copied().chain([end]);
    let units = units.iter().copied().zip(ends).collect();
    Division { step_ns: 0, starts, units }
}

/// All ways to pick `count` numbers below `end`, ascending and starting with 0.
fn ascending(end: usize, count: usize) -> Vec<Vec<usize>> {
    let mut found = vec![vec![0]];
    for _ in 1..count {
        found = found
            .into_iter()
            .flat_map(|chosen| {
                let next = chosen[chosen.len() - 1] + 1;
                (next..end).map(move |number| [chosen.clone(), vec![number]].concat())
            })
            .collect();
    }
    found.retain(|chosen| chosen.len() <= end);
    found
}

/// Forward and backward time and byte counts of a stage, straight from the graph.
pub(crate) fn price(
    graph: &Graph,
    atoms: &Atoms,
    costs: &dyn CostModel,
    members: &[usize],
    rows: u64,
) -> (u64, StageSizes) {
    let nodes = atoms.stage(graph, members.iter().copied());
    let time = |id: NodeId| {
        let rows = if atoms.of(id).is_some() { rows } else { 1 };
        costs.forward_ns(id, rows) + costs.backward_ns(id, rows)
    };
    let time_ns = nodes.ones().map(|index| time(NodeId::new(index))).sum();
    (time_ns, StageSizes::of(graph, &graph.users(), &nodes, rows))
}
