//! An executor whose tensors are lists of symbols, to see what a program really computes.
//!
//! A row of a tensor is a sum of symbols, kept as a sorted list. The interpreter knows the row order from the
//! documented formula only, and none of the crate's internals.

use std::collections::BTreeMap;

use rannc_schedule::{
    Action, Flow, Pass, Place, Program, RankId, RowRange, Slot, Stage, StageId, Transport,
};

use crate::pipelines::Case;

/// A row of the whole batch: its rank and its number there.
type RowId = (u32, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Symbol {
    /// A row of a value.
    Row(u32, RowId),
    /// What a stage's replica made of a microbatch: a summand, or a whole value.
    Part(u32, Place, u32, u32),
    /// A rank's own model input.
    Input(u32, u32),
    /// The gradient of a row, from a consumer.
    RowGradient(u32, RowId, Place),
    /// The gradient of an unsplit value, from a consumer's rank and microbatch.
    Gradient(u32, Place, u32, u32),
}

/// The rows of a tensor; an unsplit value has one.
type Tensor = Vec<Vec<Symbol>>;

/// A posted receive.
#[derive(Clone, Copy)]
struct Waiting {
    rank: u32,
    slot: Slot,
    rows: Option<RowRange>,
    total: u64,
    /// The sender and the receiver, and which of the pieces between them it is.
    pair: (u32, u32),
    number: usize,
}

/// Plays a program and panics, with the reason, where it does something wrong.
pub(crate) struct Interpreter<'a> {
    case: &'a Case,
    program: &'a Program,
    /// Per microbatch, its rows in order.
    microbatches: Vec<Vec<RowId>>,
    slots: BTreeMap<(u32, Slot), Tensor>,
    /// Per pair of ranks, what was sent.
    sent: BTreeMap<(u32, u32), Vec<Tensor>>,
    /// Per pair of ranks, how many receives were posted.
    posted: BTreeMap<(u32, u32), usize>,
    /// Receives that nothing has waited for yet.
    waiting: Vec<Waiting>,
    steps: Vec<usize>,
    /// Parts that were used, with the place that used them.
    used: Vec<(Symbol, Place)>,
    backwards: Vec<(u32, StageId)>,
}

impl<'a> Interpreter<'a> {
    pub(crate) fn new(case: &'a Case, program: &'a Program) -> Self {
        Self {
            case,
            program,
            microbatches: cut(&case.batch.rows, case.batch.microbatches),
            slots: BTreeMap::new(),
            sent: BTreeMap::new(),
            posted: BTreeMap::new(),
            waiting: Vec::new(),
            steps: Vec::new(),
            used: Vec::new(),
            backwards: Vec::new(),
        }
    }

    pub(crate) fn run(mut self) {
        self.fill_inputs();
        let training = self.case.mode.differentiates();
        let at_once = self.program.backward.iter().all(Vec::is_empty);
        if training && at_once {
            self.seed();
        }
        self.play(&self.program.forward);
        self.check_outputs();
        if training && !at_once {
            self.seed();
        }
        self.play(&self.program.backward);
        if training {
            self.check_input_gradients();
        }
        self.check_used();
        self.check_released();
    }

    fn ranks(&self) -> std::ops::Range<u32> {
        0..self.case.pipeline.world_size
    }

    /// The rows that a rank's source holds.
    fn own_rows(&self, rank: u32) -> Vec<RowId> {
        (0..self.case.batch.rows[rank as usize]).map(|row| (rank, row)).collect()
    }

    /// The rows that a rank's sink holds.
    fn output_rows(&self, rank: u32) -> Vec<RowId> {
        self.own_rows(if self.case.batch.gather { rank } else { 0 })
    }

    /// The rows of a microbatch that a replica works on.
    fn replica_rows(&self, stage: StageId, microbatch: u32, rank: u32) -> Vec<RowId> {
        let rows = &self.microbatches[microbatch as usize];
        let Stage { ranks, shares, .. } = &self.case.pipeline.stages[stage.0 as usize];
        let shares = if shares.is_empty() { vec![1; ranks.len()] } else { shares.clone() };
        let equal = shares.iter().all(|&share| share == shares[0]);
        if self.case.batch.gather && ranks.len() == self.ranks().len() && equal {
            return rows.iter().copied().filter(|row| row.0 == rank).collect();
        }
        let index = ranks.iter().position(|&other| other.0 == rank).unwrap();
        let sum = |shares: &[u64]| shares.iter().sum::<u64>() as usize;
        let cut = |index: usize| rows.len() * sum(&shares[..index]) / sum(&shares);
        rows[cut(index)..cut(index + 1)].to_vec()
    }

    fn fill_inputs(&mut self) {
        for flow in self.case.pipeline.flows.iter().filter(|flow| flow.from == Place::Source) {
            for rank in self.ranks() {
                let slot = Slot::new(Place::Source, 0, flow.value, Pass::Forward);
                let tensor = match flow.transport {
                    Transport::Split => rows_of(flow.value, &self.own_rows(rank)),
                    _ => vec![vec![Symbol::Input(flow.value, rank)]],
                };
                self.slots.insert((rank, slot), tensor);
            }
        }
    }

    /// The gradients of the outputs.
    fn seed(&mut self) {
        for flow in &self.case.pipeline.flows {
            if !flow.gradient || !flow.to.contains(&Place::Sink) {
                continue;
            }
            for rank in self.ranks() {
                let slot = Slot::new(Place::Sink, 0, flow.value, Pass::Backward);
                let rows = self.output_rows(rank);
                let split = |&row: &RowId| vec![Symbol::RowGradient(flow.value, row, Place::Sink)];
                let tensor = match flow.transport {
                    Transport::Split => rows.iter().map(split).collect(),
                    _ => vec![vec![Symbol::Gradient(flow.value, Place::Sink, rank, 0)]],
                };
                self.slots.insert((rank, slot), tensor);
            }
        }
    }

    /// Every rank in turn, as far as it gets.
    fn play(&mut self, lists: &'a [Vec<Action>]) {
        self.steps = vec![0; lists.len()];
        loop {
            let before = self.steps.clone();
            for rank in self.ranks() {
                while self.step(rank, lists) {}
            }
            if self.steps == before {
                break;
            }
        }
        for rank in self.ranks() {
            let left = &lists[rank as usize][self.steps[rank as usize]..];
            assert!(left.is_empty(), "rank {rank} hangs at {}", left[0]);
        }
        let slots: Vec<(u32, Slot)> =
            self.waiting.iter().map(|wait| (wait.rank, wait.slot)).collect();
        for (rank, slot) in slots {
            assert!(self.arrive(rank, &slot), "rank {rank} never gets a piece of {slot}");
        }
    }

    fn step(&mut self, rank: u32, lists: &'a [Vec<Action>]) -> bool {
        let step = self.steps[rank as usize];
        let Some(&action) = lists[rank as usize].get(step) else { return false };
        let done = match action {
            Action::Forward { stage, microbatch, rows } => {
                self.forward(rank, stage, microbatch, rows)
            }
            Action::Backward { stage, microbatch, rows } => {
                self.backward(rank, stage, microbatch, rows)
            }
            Action::Send { slot, rows, peer, release } => {
                let piece = self.take(rank, slot, rows, release);
                self.sent.entry((rank, peer.0)).or_default().push(piece);
                true
            }
            Action::Recv { slot, rows, total, peer } => {
                let number = self.posted.entry((peer.0, rank)).or_default();
                let (pair, number) = ((peer.0, rank), std::mem::replace(number, *number + 1));
                self.waiting.push(Waiting { rank, slot, rows, total, pair, number });
                true
            }
            Action::Copy { from, from_rows, to, to_rows, total, release } => {
                let piece = self.take(rank, from, from_rows, release);
                self.deposit(rank, to, to_rows, total, piece);
                true
            }
            Action::ReduceGradients { .. } | Action::ReduceOutput { .. } => {
                return self.reduce(rank, &action, lists);
            }
        };
        self.steps[rank as usize] += usize::from(done);
        done
    }

    /// Deposits what was received for a slot; false if something is still on its way.
    fn arrive(&mut self, rank: u32, slot: &Slot) -> bool {
        let mut index = 0;
        while index < self.waiting.len() {
            let wait = self.waiting[index];
            if (wait.rank, wait.slot) != (rank, *slot) {
                index += 1;
                continue;
            }
            let Some(piece) = self.sent.get(&wait.pair).and_then(|sent| sent.get(wait.number))
            else {
                return false;
            };
            let piece = piece.clone();
            self.deposit(rank, wait.slot, wait.rows, wait.total, piece);
            self.waiting.remove(index);
        }
        true
    }

    fn take(&mut self, rank: u32, slot: Slot, rows: Option<RowRange>, release: bool) -> Tensor {
        let tensor = self.slots.get(&(rank, slot));
        let tensor = tensor.unwrap_or_else(|| panic!("rank {rank} has no {slot}")).clone();
        if release {
            self.slots.remove(&(rank, slot));
        }
        match rows {
            Some(rows) => tensor[rows.start as usize..rows.end as usize].to_vec(),
            None => tensor,
        }
    }

    fn deposit(
        &mut self,
        rank: u32,
        slot: Slot,
        rows: Option<RowRange>,
        total: u64,
        piece: Tensor,
    ) {
        let size = if rows.is_some() { total as usize } else { 1 };
        let rows = rows.unwrap_or(RowRange::new(0, 1));
        assert_eq!(rows.len(), piece.len() as u64, "a piece of {slot} has the wrong size");
        let tensor = self.slots.entry((rank, slot)).or_insert_with(|| vec![Vec::new(); size]);
        assert_eq!(tensor.len(), size, "{slot} has two sizes");
        for (row, symbols) in tensor[rows.start as usize..rows.end as usize].iter_mut().zip(piece) {
            row.extend(symbols);
            row.sort_unstable();
        }
    }

    fn forward(&mut self, rank: u32, stage: StageId, microbatch: u32, rows: u64) -> bool {
        let place = Place::Stage(stage);
        let mine = self.replica_rows(stage, microbatch, rank);
        assert_eq!(mine.len() as u64, rows, "{stage}F{microbatch} on rank {rank}");
        if rows == 0 {
            return true; // it only helps the other replicas
        }
        let slot = |flow: &Flow| Slot::new(place, microbatch, flow.value, Pass::Forward);
        let flows = &self.case.pipeline.flows;
        for flow in flows.iter().filter(|flow| flow.to.contains(&place)) {
            if !self.arrive(rank, &slot(flow)) {
                return false;
            }
        }
        for flow in flows.iter().filter(|flow| flow.to.contains(&place)) {
            let found = self.slots.remove(&(rank, slot(flow)));
            match flow.transport {
                Transport::Split => assert_eq!(found, Some(rows_of(flow.value, &mine))),
                Transport::Sum => {
                    for symbol in found.into_iter().flatten().flatten() {
                        assert!(matches!(symbol, Symbol::Part(_, _, m, _) if m == microbatch));
                        self.used.push((symbol, place));
                    }
                }
                Transport::Whole => check_whole(flow, &found.unwrap(), rank, microbatch),
            }
        }
        for flow in flows.iter().filter(|flow| flow.from == place) {
            let tensor = match flow.transport {
                Transport::Split => rows_of(flow.value, &mine),
                _ => vec![vec![Symbol::Part(flow.value, place, microbatch, rank)]],
            };
            let before = self.slots.insert((rank, slot(flow)), tensor);
            assert_eq!(before, None, "{place}F{microbatch} runs twice");
        }
        true
    }

    /// The consumers that send a gradient of a value.
    fn returning(&self, flow: &Flow) -> Vec<Place> {
        let differentiates = |place: &&Place| match place {
            Place::Stage(stage) => self.case.pipeline.stages[stage.0 as usize].backward,
            _ => true,
        };
        flow.to.iter().filter(|_| flow.gradient).filter(differentiates).copied().collect()
    }

    fn backward(&mut self, rank: u32, stage: StageId, microbatch: u32, rows: u64) -> bool {
        let place = Place::Stage(stage);
        let mine = self.replica_rows(stage, microbatch, rank);
        assert_eq!(mine.len() as u64, rows, "{stage}B{microbatch} on rank {rank}");
        if rows == 0 {
            return true;
        }
        let slot = |flow: &Flow| Slot::new(place, microbatch, flow.value, Pass::Backward);
        let flows = &self.case.pipeline.flows;
        for flow in flows.iter().filter(|flow| flow.from == place) {
            if !self.arrive(rank, &slot(flow)) {
                return false;
            }
        }
        for flow in flows.iter().filter(|flow| flow.from == place) {
            let found = self.slots.remove(&(rank, slot(flow)));
            self.check_gradient(flow, found, &mine, (rank, microbatch));
        }
        for flow in flows.iter().filter(|flow| flow.to.contains(&place) && flow.gradient) {
            let split = |&row: &RowId| vec![Symbol::RowGradient(flow.value, row, place)];
            let tensor = match flow.transport {
                Transport::Split => mine.iter().map(split).collect(),
                _ => vec![vec![Symbol::Gradient(flow.value, place, rank, microbatch)]],
            };
            self.slots.insert((rank, slot(flow)), tensor);
        }
        self.backwards.push((rank, stage));
        true
    }

    /// Each row's gradient arrives once from each consumer; an unsplit one from those that used it.
    fn check_gradient(
        &mut self,
        flow: &Flow,
        found: Option<Tensor>,
        rows: &[RowId],
        (rank, microbatch): (u32, u32),
    ) {
        let consumers = self.returning(flow);
        if flow.transport == Transport::Split {
            let row = |&row: &RowId| -> Vec<Symbol> {
                consumers.iter().map(|&place| Symbol::RowGradient(flow.value, row, place)).collect()
            };
            let mut needed: Tensor = rows.iter().map(row).collect();
            for row in &mut needed {
                row.sort_unstable();
            }
            let found = found.unwrap_or_else(|| vec![Vec::new(); rows.len()]);
            assert_eq!(found, needed, "the gradient of value {} on rank {rank}", flow.value);
            return;
        }
        for symbol in found.into_iter().flatten().flatten() {
            let Symbol::Gradient(value, place, from, part) = symbol else {
                panic!("{symbol:?} is not the gradient of an unsplit value")
            };
            assert!(value == flow.value && consumers.contains(&place));
            assert!(place != Place::Sink || from == rank, "the gradient of another rank's output");
            assert!(place == Place::Sink || part == microbatch);
            self.used.push((Symbol::Gradient(value, place, rank, microbatch), flow.from));
        }
    }

    fn reduce(&mut self, rank: u32, action: &Action, lists: &'a [Vec<Action>]) -> bool {
        let members: Vec<u32> = match action {
            Action::ReduceGradients { group } => {
                let groups = &self.case.pipeline.gradient_groups;
                let group = groups.iter().find(|other| other.id == *group).unwrap();
                let left = lists[rank as usize][self.steps[rank as usize]..].iter().any(|action| {
                    matches!(action, Action::Backward { stage, .. } if group.stages.contains(stage))
                });
                assert!(!left, "group {} is reduced too early on rank {rank}", group.id);
                group.ranks.iter().map(|rank| rank.0).collect()
            }
            _ => self.ranks().collect(),
        };
        let next = |rank: u32| lists[rank as usize].get(self.steps[rank as usize]);
        if !members.iter().all(|&member| next(member) == Some(action)) {
            return false;
        }
        if let Action::ReduceOutput { value } = action {
            let slot = Slot::new(Place::Sink, 0, *value, Pass::Forward);
            let mut sum: Vec<Symbol> = Vec::new();
            for &member in &members {
                sum.extend(self.slots.remove(&(member, slot)).into_iter().flatten().flatten());
            }
            sum.sort_unstable();
            for &member in &members {
                self.slots.insert((member, slot), vec![sum.clone()]);
            }
        }
        for &member in &members {
            self.steps[member as usize] += 1;
        }
        true
    }

    /// The parts that all replicas make of a value.
    fn parts(&self, flow: &Flow) -> Vec<Symbol> {
        let Place::Stage(stage) = flow.from else { return Vec::new() };
        let mut parts = Vec::new();
        for microbatch in 0..u32::try_from(self.microbatches.len()).unwrap() {
            for &RankId(rank) in &self.case.pipeline.stages[stage.0 as usize].ranks {
                if !self.replica_rows(stage, microbatch, rank).is_empty() {
                    parts.push(Symbol::Part(flow.value, flow.from, microbatch, rank));
                }
            }
        }
        parts.sort_unstable();
        parts
    }

    fn check_outputs(&mut self) {
        for flow in self.case.pipeline.flows.iter().filter(|flow| flow.to.contains(&Place::Sink)) {
            for rank in self.ranks() {
                let slot = Slot::new(Place::Sink, 0, flow.value, Pass::Forward);
                let found = self.slots.remove(&(rank, slot)).unwrap_or_default();
                match flow.transport {
                    Transport::Split => {
                        assert_eq!(found, rows_of(flow.value, &self.output_rows(rank)));
                    }
                    Transport::Sum => assert_eq!(found, [self.parts(flow)]),
                    Transport::Whole if flow.from == Place::Source => {
                        let from = if self.case.batch.gather { rank } else { 0 };
                        assert_eq!(found, [[Symbol::Input(flow.value, from)]]);
                    }
                    Transport::Whole => {
                        assert_eq!(found, [[self.parts(flow)[0]]]);
                    }
                }
            }
        }
    }

    fn check_input_gradients(&mut self) {
        let flows = &self.case.pipeline.flows;
        for flow in flows.iter().filter(|flow| flow.from == Place::Source && flow.gradient) {
            let consumers = self.returning(flow);
            for rank in self.ranks() {
                let slot = Slot::new(Place::Source, 0, flow.value, Pass::Backward);
                let found = self.slots.remove(&(rank, slot)).unwrap_or_default();
                if flow.transport == Transport::Split {
                    let mut rows = self.own_rows(rank);
                    rows.retain(|_| !consumers.is_empty());
                    self.check_gradient(flow, Some(found), &rows, (rank, 0));
                } else {
                    self.check_own_input_gradient(flow, &found, rank);
                }
            }
        }
    }

    /// A whole input's gradient comes from each use on the same rank, once.
    fn check_own_input_gradient(&self, flow: &Flow, found: &Tensor, rank: u32) {
        let mut needed = Vec::new();
        for place in self.returning(flow) {
            let Place::Stage(stage) = place else {
                let counts = self.case.batch.gather || rank == 0;
                needed.extend(counts.then_some(Symbol::Gradient(flow.value, place, rank, 0)));
                continue;
            };
            let holds = self.case.pipeline.stages[stage.0 as usize].ranks.contains(&RankId(rank));
            for microbatch in 0..u32::try_from(self.microbatches.len()).unwrap() {
                if holds && !self.replica_rows(stage, microbatch, rank).is_empty() {
                    needed.push(Symbol::Gradient(flow.value, place, rank, microbatch));
                }
            }
        }
        needed.sort_unstable();
        assert_eq!(found.concat(), needed);
    }

    /// Every summand went to each consumer once, and got one gradient from each that sends one.
    fn check_used(&mut self) {
        let mut needed = Vec::new();
        let mut gradients = Vec::new();
        for flow in self.case.pipeline.flows.iter().filter(|flow| flow.transport == Transport::Sum)
        {
            for part in self.parts(flow) {
                let Symbol::Part(_, _, microbatch, rank) = part else { continue };
                let stages = flow.to.iter().filter(|&&place| place != Place::Sink);
                needed.extend(stages.map(|&place| (part, place)));
                for place in self.returning(flow) {
                    let gradient = Symbol::Gradient(flow.value, place, rank, microbatch);
                    gradients.push((gradient, flow.from));
                }
            }
        }
        let training = self.case.mode.differentiates();
        needed.extend(gradients.into_iter().filter(|_| training));
        needed.sort_unstable();
        let sums: Vec<u32> = needed.iter().map(|&(symbol, _)| value_of(symbol)).collect();
        self.used.retain(|&(symbol, _)| sums.contains(&value_of(symbol)));
        self.used.sort_unstable();
        assert_eq!(self.used, needed);
    }

    /// What is left was never moved, or is a copy that nobody needed.
    fn check_released(&self) {
        let actions = [&self.program.forward, &self.program.backward];
        for (rank, slot) in self.slots.keys() {
            let moved = actions.iter().flat_map(|lists| &lists[*rank as usize]).any(|action| {
                matches!(action, Action::Send { slot: from, .. } | Action::Copy { from, .. } if from == slot)
            });
            assert!(!moved, "rank {rank} keeps {slot}");
        }
    }
}

fn check_whole(flow: &Flow, tensor: &Tensor, rank: u32, microbatch: u32) {
    let [row] = tensor.as_slice() else { panic!("a whole value has one part") };
    match row.as_slice() {
        [Symbol::Input(value, from)] => assert_eq!((*value, *from), (flow.value, rank)),
        [Symbol::Part(value, from, part, _)] => {
            assert_eq!((*value, *from, *part), (flow.value, flow.from, microbatch));
        }
        other => panic!("a whole value arrived as {other:?}"),
    }
}

fn value_of(symbol: Symbol) -> u32 {
    match symbol {
        Symbol::Row(value, _)
        | Symbol::Part(value, ..)
        | Symbol::Input(value, _)
        | Symbol::RowGradient(value, ..)
        | Symbol::Gradient(value, ..) => value,
    }
}

fn rows_of(value: u32, rows: &[RowId]) -> Tensor {
    rows.iter().map(|&row| vec![Symbol::Row(value, row)]).collect()
}

/// The documented cut: equal parts of each rank's rows, and what is left over dealt out in turn.
fn cut(rows: &[u64], microbatches: u64) -> Vec<Vec<RowId>> {
    let mut parts = vec![Vec::new(); usize::try_from(microbatches).unwrap()];
    let mut turns = (0..microbatches).cycle();
    for (&count, rank) in rows.iter().zip(0..) {
        let mut sizes = vec![count / microbatches; parts.len()];
        for microbatch in turns.by_ref().take(usize::try_from(count % microbatches).unwrap()) {
            sizes[usize::try_from(microbatch).unwrap()] += 1;
        }
        let mut next = 0..;
        for (part, size) in parts.iter_mut().zip(sizes) {
            let size = usize::try_from(size).unwrap();
            part.extend(next.by_ref().take(size).map(|row| (rank, row)));
        }
    }
    parts
}
