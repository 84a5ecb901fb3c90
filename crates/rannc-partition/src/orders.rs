//! The orders in which devices that are not all alike are handed out.

use std::collections::BTreeSet;

use rannc_cost::Classes;

/// The most devices of which all orders are tried, if these are not too many.
const MOST_REORDERED: usize = 6;
const MAX_ORDERS: usize = 100;

/// The orders in which devices are handed out: their own, and where they are not all alike as many
/// others as are worth it.
pub(crate) fn orders(classes: &Classes) -> Vec<Vec<u32>> {
    let own: Vec<u32> = (0..classes.of_rank.len() as u32).collect();
    if classes.devices.len() < 2 {
        return vec![own];
    }
    let class = |rank: u32| classes.of_rank[rank as usize];
    let mut found: BTreeSet<Vec<usize>> = BTreeSet::new();
    let own_classes: Vec<usize> = own.iter().map(|&rank| class(rank)).collect();
    if own.len() <= MOST_REORDERED {
        arrangements(&mut own_classes.clone(), 0, &mut found);
    }
    let mut sequences: Vec<Vec<usize>> = vec![own_classes.clone()];
    if !found.is_empty() && found.len() <= MAX_ORDERS {
        sequences.extend(found);
    } else {
        let mut sorted = own_classes;
        for key in [0, 1] {
            sorted.sort_by_key(|&class| {
                let device = &classes.devices[class];
                let by = [device.memory_bytes, device.flops_per_second];
                (by[key], class)
            });
            sequences.push(sorted.clone());
            sequences.push(sorted.iter().rev().copied().collect());
        }
    }
    let mut orders: Vec<Vec<u32>> = Vec::new();
    for sequence in sequences {
        let mut left = own.clone();
        let order: Vec<u32> = sequence
            .iter()
            .filter_map(|&wanted| {
                let at = left.iter().position(|&rank| class(rank) == wanted)?;
                Some(left.remove(at))
            })
            .collect();
        if !orders.contains(&order) {
            orders.push(order);
        }
    }
    orders
}

/// All distinct orders of the classes, until there are too many.
fn arrangements(classes: &mut Vec<usize>, from: usize, found: &mut BTreeSet<Vec<usize>>) {
    if found.len() > MAX_ORDERS {
        return;
    }
    if from == classes.len() {
        found.insert(classes.clone());
        return;
    }
    for at in from..classes.len() {
        if classes[from..at].contains(&classes[at]) {
            continue;
        }
        classes.swap(from, at);
        arrangements(classes, from + 1, found);
        classes.swap(from, at);
    }
}
