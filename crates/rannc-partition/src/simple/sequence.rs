//! The operators of a model in one line, and what any part of it costs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use rannc_cost::{CostModel, is_trained};
use rannc_graph::{Affine, Graph, NodeId, ValueId};

use crate::Atoms;
use crate::storage::written_storages;

/// Atoms in program order, the layers that they form, and prefix sums of their times.
pub struct Sequence<'a> {
    /// The model.
    pub graph: &'a Graph,
    /// Its atoms.
    pub atoms: &'a Atoms,
    /// The first position of each layer of the model.
    pub layers: Vec<usize>,
    costs: &'a dyn CostModel,
    /// By position: what it reads.
    reads: Vec<Vec<Read>>,
    /// By position: what it makes, with the position of the last reader.
    made: Vec<Vec<(ValueId, usize)>>,
    /// By position: what its largest operator needs to run.
    working: Vec<[Affine; 2]>,
    /// By number of rows: time of forward and of backward before each position.
    elapsed: RefCell<BTreeMap<u64, Rc<Vec<Times>>>>,
}

/// Nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Of the forward.
    pub forward: u64,
    /// Of the backward.
    pub backward: u64,
}

/// A value that a position reads.
#[derive(Clone, Copy, Debug)]
struct Read {
    value: ValueId,
    /// The position that read it before.
    before: Option<usize>,
    /// The position that makes it.
    made: Option<usize>,
}

/// The memory that a part of the line takes, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// Parameters, buffers and constants.
    pub state: u64,
    /// Parameters that are trained.
    pub trained: u64,
    /// What autograd keeps.
    pub saved: Affine,
    /// Values from before it.
    pub received: Affine,
    /// Values that something behind it reads.
    pub sent: Affine,
    /// The operators that need most to run: of the part that grows with rows, and of the other.
    working: [Affine; 2],
}

impl Sizes {
    /// What the largest operator needs to run.
    pub fn working(&self, rows: u64) -> u64 {
        self.working[0].at(rows).max(self.working[1].at(rows))
    }
}

impl<'a> Sequence<'a> {
    /// Looks at every operator once.
    pub fn new(graph: &'a Graph, atoms: &'a Atoms, costs: &'a dyn CostModel) -> Self {
        let mut before: Vec<Option<usize>> = vec![None; graph.values().len()];
        let mut reads = Vec::new();
        let mut made = Vec::new();
        for position in 0..atoms.len() {
            let mut here: Vec<ValueId> = Vec::new();
            for &id in atoms.members(position) {
                here.extend(&graph.node(id).inputs);
            }
            here.sort_unstable();
            here.dedup();
            let read = |value: ValueId| Read {
                value,
                before: before[value.index()].replace(position),
                made: graph.producer(value).and_then(|node| atoms.of(node)),
            };
            reads.push(here.into_iter().map(read).collect());
        }
        for position in 0..atoms.len() {
            let nodes = atoms.members(position).iter();
            let values = nodes.flat_map(|&id| graph.node(id).outputs.iter());
            made.push(
                values.map(|&value| (value, before[value.index()].unwrap_or(position))).collect(),
            );
        }
        let working = (0..atoms.len()).map(|position| {
            let mut largest = [Affine::default(); 2];
            for &id in atoms.members(position) {
                raise(&mut largest, working(graph, id));
            }
            largest
        });
        let working = working.collect();
        let layers = layer_starts(graph, atoms);
        Self { graph, atoms, layers, costs, reads, made, working, elapsed: RefCell::default() }
    }

    /// How many positions there are.
    pub fn len(&self) -> usize {
        self.atoms.len()
    }

    /// Whether any part may be computed again: no operator writes to what outlives the step.
    pub fn is_repeatable(&self) -> bool {
        written_storages(self.graph).iter().all(|storage| !storage.external)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.atoms.is_empty()
    }

    /// The times of all operators before each position, at `rows` rows.
    pub fn elapsed(&self, rows: u64) -> Rc<Vec<Times>> {
        let mut known = self.elapsed.borrow_mut();
        let sums = known.entry(rows).or_insert_with(|| {
            let mut sums = vec![Times::default()];
            for position in 0..self.len() {
                let mut sum = sums[position];
                for &id in self.atoms.members(position) {
                    sum.forward = sum.forward.saturating_add(self.costs.forward_ns(id, rows));
                    sum.backward = sum.backward.saturating_add(self.costs.backward_ns(id, rows));
                }
                sums.push(sum);
            }
            Rc::new(sums)
        });
        Rc::clone(sums)
    }

    /// The times of a part of the line.
    pub fn times(&self, part: &Range<usize>, rows: u64) -> Times {
        let elapsed = self.elapsed(rows);
        let (start, end) = (elapsed[part.start], elapsed[part.end]);
        Times { forward: end.forward - start.forward, backward: end.backward - start.backward }
    }

    /// How long the longest path of operators takes at `rows` rows, forward and back.
    pub fn longest_path_ns(&self, rows: u64) -> u64 {
        let elapsed = self.elapsed(rows);
        let mut until = vec![0_u64; self.len()];
        for position in 0..self.len() {
            let made = self.reads[position].iter().filter_map(|read| read.made);
            let before = made.filter(|&made| made < position).map(|made| until[made]).max();
            let (start, end) = (elapsed[position], elapsed[position + 1]);
            let forward = end.forward - start.forward;
            let here = forward.saturating_add(end.backward - start.backward);
            until[position] = before.unwrap_or(0).saturating_add(here);
        }
        until.into_iter().max().unwrap_or(0)
    }

    /// The sizes of the parts that start at `bounds[0]` and end at each of the later bounds.
    ///
    /// # Complexity
    ///
    /// Linear in what is read and made between the first and the last bound.
    pub fn sizes(&self, bounds: &[usize]) -> Vec<Sizes> {
        let start = bounds[0];
        let is_new = |earlier: Option<usize>| earlier.is_none_or(|earlier| earlier < start);
        let mut sizes = Sizes::default();
        let mut open: BTreeMap<usize, Affine> = BTreeMap::new();
        let mut found = Vec::new();
        for pair in bounds.windows(2) {
            for position in pair[0]..pair[1] {
                for read in self.reads[position].iter().filter(|read| is_new(read.before)) {
                    let value = self.graph.value(read.value);
                    if value.is_state() {
                        sizes.state += value.bytes(0);
                        sizes.trained +=
                            if is_trained(self.graph, read.value) { value.bytes(0) } else { 0 };
                    } else if is_new(read.made) {
                        sizes.received += value.affine_bytes();
                    }
                }
                for &id in self.atoms.members(position) {
                    sizes.saved += self.graph.node(id).saved_bytes;
                }
                let [growing, fixed] = self.working[position];
                raise(&mut sizes.working, growing);
                raise(&mut sizes.working, fixed);
                for &(value, last) in &self.made[position] {
                    *open.entry(last).or_default() += self.graph.value(value).affine_bytes();
                }
            }
            open = open.split_off(&pair[1]);
            sizes.sent = open.values().fold(Affine::default(), |sum, &bytes| sum + bytes);
            found.push(sizes);
        }
        found
    }

    /// At most `count` units of similar time, cut where few bytes cross, as positions of their ends
    /// from 0 to the end of the line.
    pub fn units(&self, count: usize, rows: u64) -> Vec<usize> {
        let mut bounds: Vec<usize> = self.layers.clone();
        bounds.push(self.len());
        if (count / 4..=count).contains(&self.layers.len()) {
            return bounds;
        }
        let crossing = self.crossing(rows);
        let elapsed = self.elapsed(rows);
        let (end, count) = (self.len(), count.min(self.len()));
        let total = elapsed[end].forward.saturating_add(elapsed[end].backward);
        let mut bounds = vec![0];
        for unit in 1..count {
            // The place at some quarters of a unit's share of the time.
            let at = |quarters: usize| {
                let wanted = u128::from(total) * quarters as u128 / (4 * count as u128);
                let before = |times: &Times| {
                    u128::from(times.forward.saturating_add(times.backward)) < wanted
                };
                elapsed.partition_point(before).clamp(1, end - 1)
            };
            let places = at(4 * unit - 1)..=at(4 * unit + 1);
            let middle = at(4 * unit);
            let cheapest = places.min_by_key(|&place| (crossing[place], place.abs_diff(middle)));
            let place = cheapest.unwrap_or(middle);
            if place > bounds[bounds.len() - 1] {
                bounds.push(place);
            }
        }
        bounds.push(self.len());
        bounds
    }

    /// The bytes that cross each position.
    fn crossing(&self, rows: u64) -> Vec<u64> {
        let mut changes = vec![0_i128; self.len() + 2];
        for (position, values) in self.made.iter().enumerate() {
            for &(value, last) in values {
                let bytes = i128::from(self.graph.value(value).bytes(rows));
                changes[position + 1] += bytes;
                changes[last + 1] -= bytes;
            }
        }
        let mut sum = 0;
        let sums = changes.iter().map(|change| {
            sum += change;
            u64::try_from(sum).unwrap_or(u64::MAX)
        });
        sums.collect()
    }
}

/// Keeps the larger in each respect.
fn raise(largest: &mut [Affine; 2], other: Affine) {
    if other.per_row > largest[0].per_row {
        largest[0] = other;
    }
    if other.fixed > largest[1].fixed {
        largest[1] = other;
    }
}

/// Operands and results of an operator with their gradients, as [`rannc_cost::working_bytes`].
fn working(graph: &Graph, id: NodeId) -> Affine {
    let node = graph.node(id);
    let mut sum = Affine::default();
    for &value in node.inputs.iter().chain(&node.outputs) {
        let bytes = graph.value(value).affine_bytes();
        let is_state = graph.value(value).is_state();
        let times = if is_state { i64::from(is_trained(graph, value)) } else { 2 };
        sum += Affine {
            per_row: bytes.per_row.saturating_mul(times),
            fixed: bytes.fixed.saturating_mul(times),
        };
    }
    sum
}

/// Where the module up to the first number in its path changes: `layers.3` of `layers.3.attn`.
fn layer_starts(graph: &Graph, atoms: &Atoms) -> Vec<usize> {
    let layer = |position: usize| {
        let module = &graph.node(atoms.members(position)[0]).module;
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let parts = module.split('.').collect::<Vec<_>>();
        let end = parts.iter().position(|part| is_number(part)).map_or(1, |index| index + 1);
        parts[..end.min(parts.len())].join(".")
    };
    let mut starts = vec![0];
    starts.extend((1..atoms.len()).filter(|&position| layer(position) != layer(position - 1)));
    starts
}
