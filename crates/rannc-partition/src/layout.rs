//! How devices may be handed to stages.
//!
//! Devices are handed out in *units*; a stage gets consecutive units. A unit is one device, or
//! several where there are many. With several *copies* of the pipeline, a unit has one device of
//! each copy:
//!
//! ```text
//! 8 devices, 4 units:  one copy    0 1 | 2 3 | 4 5 | 6 7     replicas of a stage side by side
//!                      two copies  0 4 | 1 5 | 2 6 | 3 7     neighbouring stages side by side
//! ```
//!
//! The first keeps the reduction of gradients within nodes, the second the transfers between stages.

use std::collections::BTreeMap;

use rannc_cost::{Classes, Cluster};

/// The devices of some consecutive units, by class; sets with equal numbers are one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceSet {
    /// How many devices there are of each class that is among them.
    pub(crate) classes: Vec<(usize, usize)>,
}

impl DeviceSet {
    pub(crate) fn replicas(&self) -> usize {
        self.classes.iter().map(|&(_, count)| count).sum()
    }
}

/// One way to hand out devices.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The ranks of each unit.
    pub(crate) units: Vec<Vec<u32>>,
    /// Whether every stage gets exactly one unit.
    pub(crate) one_unit_each: bool,
    /// The fewest and the most stages to look for.
    pub(crate) stage_counts: (usize, usize),
    /// Whether the units at the end may stay idle.
    pub(crate) may_idle: bool,
    /// Whether its units are all devices there are.
    pub(crate) has_all: bool,
    sets: Vec<DeviceSet>,
    /// The set of each run of units, run after run by first unit and length; where all units are alike it
    /// only depends on the length, and this is empty.
    set_of: Vec<usize>,
    /// The most units in a run.
    longest: usize,
    /// For each unit, up to which the ranks of all units are on the same node.
    together_until: Vec<usize>,
    /// The same within every copy.
    near_until: Vec<usize>,
}

/// How to make units of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shape {
    /// So many units of neighbouring ranks.
    Neighbours(usize),
    /// So many units of so many neighbouring ranks each.
    Groups(usize, usize),
    /// So many units, each with one rank of so many copies.
    Copies(usize, usize),
}

impl Layout {
    /// A layout of the ranks in `order`.
    pub(crate) fn new(
        cluster: &Cluster,
        classes: &Classes,
        order: &[u32],
        shape: Shape,
        one_unit_each: bool,
        stage_counts: (usize, usize),
        may_idle: bool,
    ) -> Self {
        let units: Vec<Vec<u32>> = match shape {
            Shape::Neighbours(count) => (0..count)
                .map(|unit| {
                    order[unit * order.len() / count..(unit + 1) * order.len() / count].to_vec()
                })
                .collect(),
            Shape::Groups(count, size) => {
                order.chunks(size).take(count).map(<[u32]>::to_vec).collect()
            }
            Shape::Copies(count, copies) => (0..count)
                .map(|unit| (0..copies).map(|copy| order[copy * count + unit]).collect())
                .collect(),
        };
        let is_paired = matches!(shape, Shape::Copies(..));
        let has_all = units.iter().map(Vec::len).sum::<usize>() == order.len();
        let all = Self::of_units(cluster, classes, units, is_paired, one_unit_each);
        Self { stage_counts, may_idle, has_all, ..all }
    }

    /// A layout of given units, one for each stage unless changed. `is_paired` says that the units have
    /// equally many ranks, and rows flow between those at the same place.
    pub(crate) fn of_units(
        cluster: &Cluster,
        classes: &Classes,
        units: Vec<Vec<u32>>,
        is_paired: bool,
        one_unit_each: bool,
    ) -> Self {
        let node = |rank: u32| cluster.devices[rank as usize].node;
        let lone = |unit: &Vec<u32>| {
            let first = node(unit[0]);
            unit.iter().all(|&rank| node(rank) == first).then_some(first)
        };
        let together: Vec<Option<u32>> = units.iter().map(lone).collect();
        let together_until = same_until(&together);
        let near_until = if is_paired {
            let mut least = vec![units.len(); units.len()];
            for copy in 0..units.first().map_or(0, Vec::len) {
                let nodes: Vec<Option<u32>> =
                    units.iter().map(|unit| Some(node(unit[copy]))).collect();
                for (least, until) in least.iter_mut().zip(same_until(&nodes)) {
                    *least = until.min(*least);
                }
            }
            least
        } else {
            together_until.clone()
        };
        let longest = if one_unit_each { 1 } else { units.len() };
        let (sets, set_of) = device_sets(classes, &units, longest);
        Self {
            one_unit_each,
            stage_counts: (units.len(), units.len()),
            may_idle: false,
            has_all: false,
            units,
            sets,
            set_of,
            longest,
            together_until,
            near_until,
        }
    }

    pub(crate) fn num_units(&self) -> usize {
        self.units.len()
    }

    /// The number of the set of the devices in units `start..end`.
    pub(crate) fn set_id(&self, start: usize, end: usize) -> usize {
        let position = end - start - 1;
        if self.set_of.is_empty() { position } else { self.set_of[start * self.longest + position] }
    }

    pub(crate) fn set(&self, id: usize) -> &DeviceSet {
        &self.sets[id]
    }

    /// The ranks of units `start..end`, ascending.
    pub(crate) fn ranks(&self, start: usize, end: usize) -> Vec<u32> {
        let mut ranks: Vec<u32> = self.units[start..end].iter().flatten().copied().collect();
        ranks.sort_unstable();
        ranks
    }

    /// Whether the ranks of units `start..end` sit on more than one node.
    pub(crate) fn spans_nodes(&self, start: usize, end: usize) -> bool {
        self.together_until[start] < end
    }

    /// Whether what a stage on units `start..end` receives, and what it gets back, crosses nodes.
    pub(crate) fn far(&self, start: usize, end: usize) -> (bool, bool) {
        let num_units = self.num_units();
        let whole = self.near_until[0] < num_units;
        let receives = if start == 0 { whole } else { self.near_until[start - 1] < end };
        let returns = if end == num_units { whole } else { self.near_until[start] < end + 1 };
        (receives, returns)
    }
}

/// For each place, the end of the run of equal neighbours from there; none equals nothing.
fn same_until(nodes: &[Option<u32>]) -> Vec<usize> {
    let mut until: Vec<usize> = (0..nodes.len()).collect();
    for index in (0..nodes.len()).rev() {
        if nodes[index].is_some() {
            let joins = nodes.get(index + 1) == Some(&nodes[index]);
            until[index] = if joins { until[index + 1] } else { index + 1 };
        }
    }
    until
}

type Sets = (Vec<DeviceSet>, Vec<usize>);

/// The sets of runs of at most `longest` units.
fn device_sets(classes: &Classes, units: &[Vec<u32>], longest: usize) -> Sets {
    let counts = |unit: &Vec<u32>| {
        let mut counts = vec![0; classes.devices.len()];
        for &rank in unit {
            counts[classes.of_rank[rank as usize]] += 1;
        }
        counts
    };
    let per_unit: Vec<Vec<usize>> = units.iter().map(counts).collect();
    let set = |counts: &[usize]| DeviceSet {
        classes: counts.iter().copied().enumerate().filter(|&(_, count)| count > 0).collect(),
    };
    let add = |sum: &mut Vec<usize>, more: &[usize]| {
        for (sum, more) in sum.iter_mut().zip(more) {
            *sum += more;
        }
    };
    let none = vec![0; classes.devices.len()];
    if per_unit.windows(2).all(|pair| pair[0] == pair[1]) {
        let mut sum = none;
        let sets = per_unit.iter().map(|counts| {
            add(&mut sum, counts);
            set(&sum)
        });
        return (sets.collect(), Vec::new());
    }
    let (mut sets, mut numbers) = (Vec::new(), BTreeMap::new());
    let mut set_of = vec![0; units.len() * longest];
    for start in 0..units.len() {
        let mut sum = none.clone();
        for end in start + 1..=units.len().min(start + longest) {
            add(&mut sum, &per_unit[end - 1]);
            let id = *numbers.entry(sum.clone()).or_insert_with(|| {
                sets.push(set(&sum));
                sets.len() - 1
            });
            set_of[start * longest + end - start - 1] = id;
        }
    }
    (sets, set_of)
}

#[cfg(test)]
mod tests {
    use rannc_cost::Cluster;

    use super::{Layout, Shape};

    fn layout(cluster: &str, shape: Shape) -> Layout {
        let cluster = Cluster::parse(cluster).unwrap();
        let order: Vec<u32> = (0..cluster.devices.len() as u32).collect();
        let classes = cluster.classes(order.len());
        Layout::new(&cluster, &classes, &order, shape, false, (1, 4), false)
    }

    #[test]
    fn replicas_or_stages_are_kept_within_nodes() {
        let side_by_side = layout("cpu:2x4", Shape::Neighbours(4));
        assert_eq!(side_by_side.ranks(1, 3), [2, 3, 4, 5]);
        assert!(!side_by_side.spans_nodes(0, 2) && side_by_side.spans_nodes(1, 3));
        assert_eq!(side_by_side.far(1, 2), (false, true));
        let copies = layout("cpu:2x4", Shape::Copies(4, 2));
        assert_eq!(copies.ranks(1, 3), [1, 2, 5, 6]);
        assert!(copies.spans_nodes(1, 2));
        assert_eq!(copies.far(1, 2), (false, false));
    }

    #[test]
    fn runs_of_units_with_equal_devices_are_one_set() {
        let cluster =
            Cluster::from_toml("devices = [{kind = \"cpu\", count = 2}, {kind = \"a100-40gb\"}]");
        let cluster = cluster.unwrap();
        let classes = cluster.classes(3);
        let layout =
            Layout::new(&cluster, &classes, &[0, 1, 2], Shape::Neighbours(3), false, (1, 3), false);
        assert_eq!(layout.set_id(0, 1), layout.set_id(1, 2));
        assert_ne!(layout.set_id(1, 2), layout.set_id(2, 3));
        assert_eq!(layout.set(layout.set_id(0, 3)).classes, [(0, 2), (1, 1)]);
    }
}
