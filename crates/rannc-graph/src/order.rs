//! The order of a captured graph, whatever order the model's code happened to run in.
//!
//! A forward that loops over a set of names runs its operators in another order in each process. What
//! they compute is the same, so the graph has to be: its order is a function of the operators, of what
//! they read, and of the places in the program that call them, never of when they ran. It follows the
//! program: on from the operator placed last within the innermost loop or call, from the start of the
//! loop when nothing is left further on, and out of it when nothing is left in it. For a forward
//! without sets that is the order in which it ran.

use std::collections::BTreeSet;
use std::ops::Bound;

use sha2::{Digest, Sha256};

/// A call or a loop of the program: where it is in the one around it, and whether it is a loop.
pub type Scope = (u32, bool);

/// An operator, as far as its place in the order depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Where the program calls it: the calls and loops around it from the outermost, then the place
    /// in the innermost.
    pub place: Vec<Scope>,
    /// All that is known of it but for `reads`: its name, plain arguments and the model's inputs,
    /// parameters and results among what it reads and makes.
    pub label: String,
    /// Earlier operators whose results it reads, argument by argument.
    pub reads: Vec<usize>,
    /// Other earlier operators that it must follow: they touch memory that is written to.
    pub after: Vec<usize>,
}

/// The positions of `steps` in the canonical order: equal for all topological orders that the same
/// operators can be given in.
///
/// What no result of the model depends on, and what is labelled alike, keeps the order it has.
/// Numbers in `reads` and `after` that are not those of earlier steps are left out.
///
/// # Complexity
///
/// Linear in the number of edges but for logarithms and the depth of places.
pub fn canonical_order(steps: &[Step]) -> Vec<usize> {
    let mut free = Free::new(steps);
    let mut order = Vec::with_capacity(steps.len());
    let mut last = None;
    while let Some(step) = free.next(last) {
        free.place(step, order.len());
        order.push(step);
        last = Some(step);
    }
    order
}

/// How an operator compares with others: the place, the positions of what it reads, the label, and
/// what its results are used for.
type Rank<'a> = (&'a [Scope], Vec<usize>, &'a str, [u8; 32], usize);

/// Operators of which all that they need has been placed.
struct Free<'a> {
    steps: &'a [Step],
    uses: Vec<[u8; 32]>,
    followers: Vec<Vec<usize>>,
    waiting: Vec<usize>,
    position: Vec<usize>,
    ranks: BTreeSet<Rank<'a>>,
}

impl<'a> Free<'a> {
    fn new(steps: &'a [Step]) -> Self {
        let mut followers = vec![Vec::new(); steps.len()];
        let mut waiting = vec![0; steps.len()];
        for (index, step) in steps.iter().enumerate() {
            for &earlier in step.reads.iter().chain(&step.after).filter(|&&other| other < index) {
                followers[earlier].push(index);
                waiting[index] += 1;
            }
        }
        let position = vec![usize::MAX; steps.len()];
        let uses = uses(steps);
        let mut free = Self { steps, uses, followers, waiting, position, ranks: BTreeSet::new() };
        for index in (0..steps.len()).filter(|&index| free.waiting[index] == 0).collect::<Vec<_>>()
        {
            free.add(index);
        }
        free
    }

    fn add(&mut self, index: usize) {
        let step = &self.steps[index];
        let read = step.reads.iter().filter(|&&other| other < index);
        let read = read.map(|&other| self.position[other]).collect();
        self.ranks.insert((&step.place, read, &step.label, self.uses[index], index));
    }

    /// Takes the operator that the program would come to next.
    fn next(&mut self, last: Option<usize>) -> Option<usize> {
        let place = last.map_or(&[] as &[Scope], |last| &self.steps[last].place);
        if let Some(step) = last.and_then(|last| self.continued(place, last)) {
            return Some(step);
        }
        (0..place.len().max(1)).rev().find_map(|depth| {
            let scope = &place[..depth];
            let repeats = scope.last().is_none_or(|(_, is_loop)| *is_loop);
            let further = self.take(scope, Bound::Excluded(last_at(place)));
            further
                .or_else(|| repeats.then(|| self.take(scope, Bound::Included(first_at(scope))))?)
        })
    }

    /// Takes an operator at the same place that reads what the last one made.
    fn continued(&mut self, place: &'a [Scope], last: usize) -> Option<usize> {
        let here = self.ranks.range(first_at(place)..=last_at(place));
        let found = here.into_iter().find(|rank| self.steps[rank.4].reads.contains(&last))?.clone();
        self.ranks.remove(&found);
        Some(found.4)
    }

    /// Takes the first operator from `start` on, if it is within the scope.
    fn take(&mut self, scope: &[Scope], start: Bound<Rank<'a>>) -> Option<usize> {
        let mut from_start = self.ranks.range((start, Bound::Unbounded));
        let found = from_start.next().filter(|rank| rank.0.starts_with(scope))?.clone();
        self.ranks.remove(&found);
        Some(found.4)
    }

    /// Takes note of an operator's position, which may free others.
    fn place(&mut self, step: usize, position: usize) {
        self.position[step] = position;
        for follower in std::mem::take(&mut self.followers[step]) {
            self.waiting[follower] -= 1;
            if self.waiting[follower] == 0 {
                self.add(follower);
            }
        }
    }
}

/// Below the ranks of all operators at a place.
fn first_at(place: &[Scope]) -> Rank<'_> {
    (place, Vec::new(), "", [0; 32], 0)
}

/// Above the ranks of all operators at a place.
fn last_at(place: &[Scope]) -> Rank<'_> {
    (place, vec![usize::MAX], "", [u8::MAX; 32], usize::MAX)
}

/// For each operator a hash of all ways from its results to those of the model. Each way ends at one
/// operator, as arguments are ordered, so operators with equal hashes are ones that no result needs.
fn uses(steps: &[Step]) -> Vec<[u8; 32]> {
    let mut uses = vec![[0; 32]; steps.len()];
    let mut readers: Vec<Vec<([u8; 32], usize)>> = vec![Vec::new(); steps.len()];
    for (index, step) in steps.iter().enumerate().rev() {
        readers[index].sort_unstable();
        let mut hash = Sha256::new();
        hash.update(step.label.as_bytes());
        for (reader, argument) in &readers[index] {
            hash.update(reader);
            hash.update(argument.to_le_bytes());
        }
        uses[index] = hash.finalize().into();
        for (argument, &read) in step.reads.iter().enumerate().filter(|(_, read)| **read < index) {
            readers[read].push((uses[index], argument));
        }
    }
    uses
}

#[cfg(test)]
mod tests;
