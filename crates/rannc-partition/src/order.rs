//! Topological orders: merging cycles away, and choosing an order whose cuts are cheap.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Successors of each vertex, ascending and without repeats.
pub(crate) type Edges = Vec<Vec<usize>>;

/// The strongly connected component of each vertex; components are numbered from 0 in no
/// particular order.
///
/// Tarjan's algorithm with its own stack, as graphs may be tens of thousands of vertices deep.
///
/// # Complexity
///
/// Linear in vertices and edges.
pub(crate) fn components(edges: &Edges) -> Vec<usize> {
    const UNSEEN: usize = usize::MAX;
    let mut component = vec![UNSEEN; edges.len()];
    let mut number = vec![UNSEEN; edges.len()];
    let mut lowest = vec![UNSEEN; edges.len()];
    let (mut next_number, mut next_component) = (0, 0);
    let mut open = Vec::new();
    for root in 0..edges.len() {
        if number[root] != UNSEEN {
            continue;
        }
        let mut path = vec![(root, 0)];
        while let Some((vertex, next_edge)) = path.last_mut() {
            let vertex = *vertex;
            if number[vertex] == UNSEEN {
                number[vertex] = next_number;
                lowest[vertex] = next_number;
                next_number += 1;
                open.push(vertex);
            }
            if let Some(&successor) = edges[vertex].get(*next_edge) {
                *next_edge += 1;
                if number[successor] == UNSEEN {
                    path.push((successor, 0));
                } else if component[successor] == UNSEEN {
                    lowest[vertex] = lowest[vertex].min(number[successor]);
                }
                continue;
            }
            path.pop();
            if let Some(&(parent, _)) = path.last() {
                lowest[parent] = lowest[parent].min(lowest[vertex]);
            }
            if lowest[vertex] == number[vertex] {
                while let Some(member) = open.pop() {
                    component[member] = next_component;
                    if member == vertex {
                        break;
                    }
                }
                next_component += 1;
            }
        }
    }
    component
}

/// The topological order that takes the lowest free vertex first.
pub(crate) fn lowest_first(edges: &Edges) -> Vec<usize> {
    let mut waiting = vec![0_usize; edges.len()];
    for &successor in edges.iter().flatten() {
        waiting[successor] += 1;
    }
    let mut free: BinaryHeap<_> =
        (0..edges.len()).filter(|&vertex| waiting[vertex] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(edges.len());
    while let Some(Reverse(vertex)) = free.pop() {
        order.push(vertex);
        for &successor in &edges[vertex] {
            waiting[successor] -= 1;
            if waiting[successor] == 0 {
                free.push(Reverse(successor));
            }
        }
    }
    order
}

/// The topological order that finishes one branch before it starts another, each vertex right
/// before the first that needs it. `roots` are finished first, in their order.
pub(crate) fn branch_by_branch(edges: &Edges, roots: &[usize]) -> Vec<usize> {
    let mut predecessors: Edges = vec![Vec::new(); edges.len()];
    for (vertex, successors) in edges.iter().enumerate() {
        for &successor in successors {
            predecessors[successor].push(vertex);
        }
    }
    let mut seen = vec![false; edges.len()];
    let mut order = Vec::with_capacity(edges.len());
    for root in roots.iter().copied().chain(0..edges.len()) {
        let mut path = if seen[root] { Vec::new() } else { vec![(root, 0)] };
        seen[root] = true;
        while let Some((vertex, next)) = path.last_mut() {
            if let Some(&predecessor) = predecessors[*vertex].get(*next) {
                *next += 1;
                if !seen[predecessor] {
                    seen[predecessor] = true;
                    path.push((predecessor, 0));
                }
            } else {
                order.push(*vertex);
                path.pop();
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::{branch_by_branch, components, lowest_first};

    #[test]
    fn cycles_become_one_component() {
        let edges = vec![vec![1], vec![2], vec![1, 3], vec![]];
        let component = components(&edges);
        assert_eq!(component[1], component[2]);
        assert_ne!(component[0], component[1]);
        assert_ne!(component[3], component[1]);
    }

    #[test]
    fn long_chains_do_not_overflow_the_stack() {
        let edges: Vec<_> = (1..=200_000).map(|next| vec![next]).chain([vec![]]).collect();
        assert_eq!(components(&edges).len(), 200_001);
        assert_eq!(branch_by_branch(&edges, &[200_000]), lowest_first(&edges));
    }

    #[test]
    fn branches_are_not_interleaved() {
        // 0 -> 2 -> 4 and 1 -> 3 -> 4
        let edges = vec![vec![2], vec![3], vec![4], vec![4], vec![]];
        assert_eq!(lowest_first(&edges), [0, 1, 2, 3, 4]);
        assert_eq!(branch_by_branch(&edges, &[4]), [0, 2, 1, 3, 4]);
    }
}
