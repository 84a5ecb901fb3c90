//! Atoms to *blocks*, the units that the stage search moves between stages.
//!
//! Atoms are laid out in a topological order, and the order is cut into contiguous pieces: each is
//! convex and no two depend on each other in a circle. Of two orders (the program's, and the one
//! that finishes each branch before it starts the next) the one that keeps fewer bytes alive wins.
//! Cuts fall near equal shares of the time, at the place where the fewest bytes cross:
//!
//! ```text
//! bytes   9 2 9 9 9 2 9 9 9 2 9 9 9      2 = between two layers
//! ideal         |       |       |
//! cut           <-|     |<-     |<-      within a quarter of a block
//! ```

use std::collections::BinaryHeap;
use std::ops::Range;

use rannc_cost::CostModel;
use rannc_graph::{Graph, ValueId};

use crate::Atoms;
use crate::order;

/// Contiguous runs of a topological order of atoms.
#[derive(Clone, Debug)]
pub struct Blocks {
    order: Vec<usize>,
    starts: Vec<usize>,
}

impl Blocks {
    /// Cuts the atoms into `min(max_blocks, atoms)` blocks of similar time at `rows` rows.
    ///
    /// # Complexity
    ///
    /// Linear in the number of edges but for logarithms.
    pub fn new(
        graph: &Graph,
        atoms: &Atoms,
        costs: &dyn CostModel,
        rows: u64,
        max_blocks: usize,
    ) -> Self {
        let times: Vec<u64> = (0..atoms.len())
            .map(|atom| {
                let members = atoms.members(atom).iter();
                let time =
                    |&id| costs.forward_ns(id, rows).saturating_add(costs.backward_ns(id, rows));
                // Never zero, so that free operators still have a place.
                members.map(time).fold(1, u64::saturating_add)
            })
            .collect();
        let line = best_line(graph, atoms, &times, rows);
        let num_blocks = max_blocks.clamp(1, atoms.len().max(1)).min(atoms.len());
        let starts = line.cut(num_blocks);
        Self { order: line.order, starts }
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are no atoms.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The atoms of consecutive blocks.
    pub fn atoms(&self, blocks: Range<usize>) -> &[usize] {
        let position = |block: usize| self.starts.get(block).copied().unwrap_or(self.order.len());
        &self.order[position(blocks.start)..position(blocks.end)]
    }
}

/// Atoms in a topological order with the time of each, and the bytes that cross each place.
struct Line {
    order: Vec<usize>,
    /// Time of all atoms before each place; one longer than `order`.
    elapsed: Vec<u64>,
    /// Bytes that a cut before each atom would move; a cut before the first is none.
    crossing: Vec<u64>,
}

fn best_line(graph: &Graph, atoms: &Atoms, times: &[u64], rows: u64) -> Line {
    let program = Line::new((0..atoms.len()).collect(), graph, atoms, times, rows);
    let producers = graph.outputs().iter().filter_map(|&output| graph.producer(output));
    let roots: Vec<usize> = producers.filter_map(|made| atoms.of(made)).collect();
    let order = order::branch_by_branch(atoms.edges(), &roots);
    let branches = Line::new(order, graph, atoms, times, rows);
    if branches.bytes_alive() < program.bytes_alive() { branches } else { program }
}

impl Line {
    fn new(order: Vec<usize>, graph: &Graph, atoms: &Atoms, times: &[u64], rows: u64) -> Self {
        let mut position = vec![0; order.len()];
        let mut elapsed = vec![0_u64];
        for (index, &atom) in order.iter().enumerate() {
            position[atom] = index;
            elapsed.push(elapsed[index].saturating_add(times[atom]));
        }
        let mut last_use: Vec<Option<usize>> = vec![None; graph.values().len()];
        for id in graph.node_ids() {
            let Some(atom) = atoms.of(id) else { continue };
            for value in &graph.node(id).inputs {
                let last = &mut last_use[value.index()];
                *last = (*last).max(Some(position[atom]));
            }
        }
        let mut changes = vec![0_i128; order.len() + 1];
        for (index, last) in last_use.iter().enumerate() {
            let made = graph.producer(ValueId::new(index)).and_then(|made| atoms.of(made));
            let (Some(made), Some(last)) = (made, *last) else { continue };
            if position[made] < last {
                let value = &graph.values()[index];
                let bytes = i128::from(value.bytes(rows)) * (1 + i128::from(value.requires_grad));
                changes[position[made] + 1] += bytes;
                changes[last + 1] -= bytes;
            }
        }
        let crossing = changes[..order.len()].iter().scan(0_i128, |bytes, change| {
            *bytes += change;
            Some(u64::try_from(*bytes).unwrap_or(u64::MAX))
        });
        let crossing = crossing.collect();
        Self { order, elapsed, crossing }
    }

    /// Crossing bytes summed over time.
    fn bytes_alive(&self) -> u128 {
        let times = self.elapsed.windows(2).map(|pair| u128::from(pair[1] - pair[0]));
        self.crossing
            .iter()
            .zip(times)
            .fold(0, |sum, (&bytes, time)| sum.saturating_add(u128::from(bytes) * time))
    }

    /// The first atom of each of `num_blocks` pieces, at most as many as there are atoms.
    fn cut(&self, num_blocks: usize) -> Vec<usize> {
        if num_blocks == 0 {
            return Vec::new();
        }
        let total = self.elapsed[self.order.len()];
        let (share, slack) = (total / num_blocks as u64, total / num_blocks as u64 / 4);
        let mut starts = vec![0];
        for block in 1..num_blocks as u64 {
            let ideal = share.saturating_mul(block);
            let window = self.places(ideal.saturating_sub(slack), ideal.saturating_add(slack));
            let nearest = self.nearest(ideal);
            let candidates = window.chain([nearest]);
            let place = candidates
                .min_by_key(|&place| {
                    (self.crossing[place], self.elapsed[place].abs_diff(ideal), place)
                })
                .expect("the nearest place is always a candidate");
            if Some(&place) > starts.last() {
                starts.push(place);
            }
        }
        self.split_longest(&mut starts, num_blocks);
        starts
    }

    /// The places between two times, ends included, without the outermost.
    fn places(&self, from: u64, to: u64) -> Range<usize> {
        let first = self.elapsed.partition_point(|&time| time < from).max(1);
        let end = self.elapsed.partition_point(|&time| time <= to).min(self.order.len());
        first..end.max(first)
    }

    fn nearest(&self, time: u64) -> usize {
        let after = self.elapsed.partition_point(|&elapsed| elapsed < time);
        let last = self.order.len() - 1;
        let (before, after) =
            (after.saturating_sub(1).clamp(1.min(last), last), after.clamp(1.min(last), last));
        let distance = |place: usize| self.elapsed[place].abs_diff(time);
        if distance(after) < distance(before) { after } else { before }
    }

    /// Splits the blocks that take longest, where there is more than one atom, until there are
    /// `num_blocks`.
    fn split_longest(&self, starts: &mut Vec<usize>, num_blocks: usize) {
        let end_of = |starts: &[usize], index: usize| {
            starts.get(index + 1).copied().unwrap_or(self.order.len())
        };
        let mut heap: BinaryHeap<(u64, usize, usize)> = (0..starts.len())
            .filter_map(|index| self.splittable(starts[index], end_of(starts, index)))
            .collect();
        while starts.len() < num_blocks {
            let Some((_, start, end)) = heap.pop() else { break };
            let (from, to) = (self.elapsed[start], self.elapsed[end]);
            let (middle, slack) = (from.midpoint(to), (to - from) / 8);
            let window = self.places(middle.saturating_sub(slack), middle.saturating_add(slack));
            let place = window
                .chain([self.nearest(middle)])
                .map(|place| place.clamp(start + 1, end - 1))
                .min_by_key(|&place| {
                    (self.crossing[place], self.elapsed[place].abs_diff(middle), place)
                })
                .expect("the nearest place is always a candidate");
            starts.push(place);
            heap.extend(self.splittable(start, place));
            heap.extend(self.splittable(place, end));
        }
        starts.sort_unstable();
    }

    fn splittable(&self, start: usize, end: usize) -> Option<(u64, usize, usize)> {
        (end - start > 1).then(|| (self.elapsed[end] - self.elapsed[start], start, end))
    }
}

#[cfg(test)]
mod tests;
