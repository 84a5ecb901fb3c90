//! Disjoint sets; the smallest member stands for its set.

#[derive(Clone, Debug)]
pub(crate) struct DisjointSets {
    parents: Vec<usize>,
}

impl DisjointSets {
    pub(crate) fn new(len: usize) -> Self {
        Self { parents: (0..len).collect() }
    }

    /// The member that stands for the set of `element`.
    pub(crate) fn find(&mut self, mut element: usize) -> usize {
        while self.parents[element] != element {
            let grandparent = self.parents[self.parents[element]];
            self.parents[element] = grandparent;
            element = grandparent;
        }
        element
    }

    /// Puts the sets of both elements together; whether they were apart.
    pub(crate) fn join(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.find(a), self.find(b));
        self.parents[a.max(b)] = a.min(b);
        a != b
    }

    /// Puts the sets of all elements together; whether any were apart.
    pub(crate) fn join_all(&mut self, elements: impl IntoIterator<Item = usize>) -> bool {
        let mut elements = elements.into_iter();
        let Some(first) = elements.next() else { return false };
        let mut changed = false;
        for element in elements {
            changed |= self.join(first, element);
        }
        changed
    }
}
