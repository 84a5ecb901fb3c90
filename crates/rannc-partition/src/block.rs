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

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Arc;

use rannc_cost::CostModel;
use rannc_graph::{Graph, NodeId, ValueId};

use crate::Atoms;
use crate::order;

/// Contiguous runs of a topological order of atoms.
#[derive(Clone, Debug)]
pub struct Blocks {
    line: Arc<Line>,
    starts: Vec<usize>,
}

/// What atoms are balanced by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Balance {
    /// Their time alone.
    Time,
    /// Their share of the time and their share of the parameters, where memory is scarce.
    TimeAndState,
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
        Self::cut(&Arc::new(Line::of(graph, atoms, costs, rows, Balance::Time)), max_blocks)
    }

    /// Into how many blocks a line may be cut where more are no trouble: one for each layer, if these
    /// are not many times as many as `wanted`.
    pub(crate) fn natural(line: &Line, wanted: usize) -> usize {
        let layers = line.layers.len();
        if (wanted..=wanted.saturating_mul(MOST_LAYERS)).contains(&layers) {
            layers
        } else {
            wanted
        }
    }

    /// Cuts a line into so many blocks, or as many as there are atoms.
    pub(crate) fn cut(line: &Arc<Line>, max_blocks: usize) -> Self {
        let num_atoms = line.order.len();
        let num_blocks = max_blocks.clamp(1, num_atoms.max(1)).min(num_atoms);
        Self { line: Arc::clone(line), starts: line.cut(num_blocks) }
    }

    /// Blocks that end where these do at the stages' `cuts` (numbers of blocks), with smaller ones
    /// around each cut and larger ones between.
    pub(crate) fn zoom(&self, cuts: &[usize], pieces: usize) -> Self {
        let position =
            |block: usize| self.starts.get(block).copied().unwrap_or(self.line.order.len());
        let mut starts = vec![0];
        for &cut in cuts {
            for block in [cut - 1, cut] {
                starts.extend(self.line.pieces(position(block)..position(block + 1), pieces));
            }
            starts.push(position(cut + 1));
        }
        starts.sort_unstable();
        starts.dedup();
        starts.retain(|&start| start < self.line.order.len());
        Self { line: Arc::clone(&self.line), starts }
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are no atoms.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The operators of a block, cloned ones left out.
    pub(crate) fn members<'a>(
        &'a self,
        atoms: &'a Atoms,
        block: usize,
    ) -> impl Iterator<Item = &'a NodeId> + 'a {
        self.atoms(block..block + 1).iter().flat_map(|&atom| atoms.members(atom))
    }

    /// The atoms of consecutive blocks.
    pub fn atoms(&self, blocks: Range<usize>) -> &[usize] {
        let position =
            |block: usize| self.starts.get(block).copied().unwrap_or(self.line.order.len());
        &self.line.order[position(blocks.start)..position(blocks.end)]
    }
}

/// Atoms in a topological order with the time of each, and the bytes that cross each place.
#[derive(Debug)]
pub(crate) struct Line {
    order: Vec<usize>,
    /// Weight of all atoms before each place; one longer than `order`.
    elapsed: Vec<u64>,
    /// Bytes that a cut before each atom would move; a cut before the first is none.
    crossing: Vec<u64>,
    /// The first atom of each layer: where the module around it, up to its first number, changes.
    layers: Vec<usize>,
}

/// There may be so many times as many blocks as were wanted, if these are the layers.
const MOST_LAYERS: usize = 4;
/// Weights add up to about this where they are shares.
const SHARES: u128 = 1 << 40;

impl Line {
    /// The atoms of a graph in the better of two orders.
    pub(crate) fn of(
        graph: &Graph,
        atoms: &Atoms,
        costs: &dyn CostModel,
        rows: u64,
        balance: Balance,
    ) -> Self {
        let mut times = KindTimes::new(costs, rows);
        let time = |atom: usize| {
            // Never zero, so that free operators still have a place.
            atoms.members(atom).iter().map(|&id| times.of(id)).fold(1, u64::saturating_add)
        };
        let times: Vec<u64> = (0..atoms.len()).map(time).collect();
        let program = Self::new((0..atoms.len()).collect(), graph, atoms, &times, rows);
        let producers = graph.outputs().iter().filter_map(|&output| graph.producer(output));
        let roots: Vec<usize> = producers.filter_map(|made| atoms.of(made)).collect();
        let order = order::branch_by_branch(atoms.edges(), &roots);
        let branches = Self::new(order, graph, atoms, &times, rows);
        let better =
            if branches.bytes_alive() < program.bytes_alive() { branches } else { program };
        match balance {
            Balance::Time => better,
            Balance::TimeAndState => better.weighed(&shares(&times, &own_state(graph, atoms))),
        }
    }

    /// With other weights of the atoms.
    fn weighed(self, weights: &[u64]) -> Self {
        let mut elapsed = vec![0_u64];
        for (index, &atom) in self.order.iter().enumerate() {
            elapsed.push(elapsed[index].saturating_add(weights[atom]));
        }
        Self { elapsed, ..self }
    }

    /// The places that cut a range of atoms into so many pieces of similar weight, the first
    /// included.
    fn pieces(&self, range: Range<usize>, count: usize) -> Vec<usize> {
        let (from, to) = (self.elapsed[range.start], self.elapsed[range.end]);
        let mut starts = vec![range.start];
        let (share, slack) = ((to - from) / count as u64, (to - from) / count as u64 / 3);
        for piece in 1..count as u64 {
            let ideal = from + share * piece;
            let window = self.places(ideal.saturating_sub(slack), ideal.saturating_add(slack));
            let place = window
                .chain([self.nearest(ideal)])
                .filter(|place| range.contains(place))
                .min_by_key(|&place| {
                    (self.crossing[place], self.elapsed[place].abs_diff(ideal), place)
                });
            starts.extend(place);
        }
        starts.sort_unstable();
        starts.dedup();
        starts
    }

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
        let layers = layers(&order, graph, atoms);
        Self { order, elapsed, crossing, layers }
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
        if self.layers.len() > 2 && self.layers.len() <= num_blocks {
            return self.split_layers(num_blocks);
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
                    let inside = self.layers.binary_search(&place).is_err();
                    let distance = self.elapsed[place].abs_diff(ideal);
                    (inside, self.crossing[place], distance, place)
                })
                .expect("the nearest place is always a candidate");
            if Some(&place) > starts.last() {
                starts.push(place);
            }
        }
        self.split_longest(&mut starts, num_blocks);
        starts
    }

    /// Layers, the heaviest cut into equal pieces until there are `num_blocks`.
    fn split_layers(&self, num_blocks: usize) -> Vec<usize> {
        let ends = self.layers.iter().skip(1).copied().chain([self.order.len()]);
        let layers: Vec<Range<usize>> =
            self.layers.iter().zip(ends).map(|(&start, end)| start..end).collect();
        let weight = |layer: &Range<usize>| self.elapsed[layer.end] - self.elapsed[layer.start];
        // The weight of a piece, then the layer: its pieces are cut anew with one more.
        let mut heap: BinaryHeap<(u64, Reverse<usize>)> =
            layers.iter().enumerate().map(|(at, layer)| (weight(layer), Reverse(at))).collect();
        let mut counts = vec![1; layers.len()];
        let mut total = layers.len();
        while let Some((_, Reverse(at))) = heap.pop() {
            if total == num_blocks {
                break;
            }
            if counts[at] < layers[at].len() {
                counts[at] += 1;
                total += 1;
                heap.push((weight(&layers[at]) / counts[at] as u64, Reverse(at)));
            }
        }
        let mut starts: Vec<usize> = layers
            .into_iter()
            .zip(counts)
            .flat_map(|(layer, count)| self.pieces(layer, count))
            .collect();
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

/// Where layers start. Runs of operators outside of any numbered module are layers, too.
fn layers(order: &[usize], graph: &Graph, atoms: &Atoms) -> Vec<usize> {
    let layer = |atom: usize| {
        let module = &graph.node(atoms.members(atom)[0]).module;
        let mut end = 0;
        for part in module.split_inclusive('.') {
            end += part.len();
            if part.trim_end_matches('.').bytes().all(|byte| byte.is_ascii_digit()) {
                return Some(&module[..end]);
            }
        }
        None
    };
    let mut starts = Vec::new();
    for (at, &atom) in order.iter().enumerate() {
        if at == 0
            || layer(atom).map(|name| name.trim_end_matches('.'))
                != layer(order[at - 1]).map(|name| name.trim_end_matches('.'))
        {
            starts.push(at);
        }
    }
    starts
}

/// Time of each kind of operator at some number of rows, asked for once.
struct KindTimes<'a> {
    costs: &'a dyn CostModel,
    rows: u64,
    known: Vec<Option<u64>>,
}

impl<'a> KindTimes<'a> {
    fn new(costs: &'a dyn CostModel, rows: u64) -> Self {
        Self { costs, rows, known: vec![None; costs.num_kinds()] }
    }

    fn of(&mut self, id: NodeId) -> u64 {
        let (costs, rows) = (self.costs, self.rows);
        let kind = costs.kind(id);
        *self.known[kind].get_or_insert_with(|| {
            costs.forward_of(kind, rows).saturating_add(costs.backward_of(kind, rows))
        })
    }
}

/// Of each atom its share of all time and of all state.
fn shares(times: &[u64], state: &[u64]) -> Vec<u64> {
    let total = |parts: &[u64]| parts.iter().map(|&part| u128::from(part)).sum::<u128>().max(1);
    let (all_time, all_state) = (total(times), total(state));
    let share = |part: u64, all: u128| (u128::from(part) * SHARES / all) as u64;
    let both = times.iter().zip(state);
    both.map(|(&time, &state)| 1 + share(time, all_time) + share(state, all_state)).collect()
}

/// Bytes of the parameters and buffers that each atom is the first to read.
fn own_state(graph: &Graph, atoms: &Atoms) -> Vec<u64> {
    let mut state = vec![0_u64; atoms.len()];
    let mut seen = vec![false; graph.values().len()];
    for id in graph.node_ids() {
        let Some(atom) = atoms.of(id) else { continue };
        for &value in &graph.node(id).inputs {
            if graph.value(value).is_state() && !std::mem::replace(&mut seen[value.index()], true) {
                state[atom] = state[atom].saturating_add(graph.value(value).bytes(1));
            }
        }
    }
    state
}

#[cfg(test)]
mod tests;
