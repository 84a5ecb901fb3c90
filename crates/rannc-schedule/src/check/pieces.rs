//! What moves: whether both ends of each piece mean the same rows, and whether the pieces make up
//! everything.

use crate::depend::{Resource, Resources};
use crate::render;
use crate::route::End;
use crate::rows::Layout;
use crate::run::{At, Fault, Matching, positions};
use crate::{
    Action, Flow, Mode, Pass, Pipeline, Place, Program, RankId, RowRange, ScheduleError, Slot,
    Transport,
};

/// Rows of a slot that one place fills: those that arrive, and those that should.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    slot: Resource,
    from: Place,
    rows: RowRange,
    /// The pass and the position of the receiving action; for what should arrive, the slot.
    whence: Whence,
}

#[derive(Clone, Copy, Debug)]
enum Whence {
    Action(usize, At),
    Needed(RankId, Slot),
}

/// A sum or a whole value that goes from one slot to another; slots are named by their value, also
/// where the gradient moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Link {
    flow: usize,
    consumer_place: Place,
    producer: Resource,
    consumer: Resource,
    same_rank: bool,
}

/// All pieces of a program.
pub(super) struct Pieces<'a> {
    pipeline: &'a Pipeline,
    layout: &'a Layout,
    resources: &'a Resources<'a>,
    mode: Mode,
    arrivals: Vec<Arrival>,
    /// Values, then gradients.
    links: [Vec<Link>; 2],
}

impl<'a> Pieces<'a> {
    pub(super) fn new(
        pipeline: &'a Pipeline,
        layout: &'a Layout,
        resources: &'a Resources<'a>,
        mode: Mode,
    ) -> Self {
        let links = [Vec::new(), Vec::new()];
        Self { pipeline, layout, resources, mode, arrivals: Vec::new(), links }
    }

    /// Looks at each piece of a pass by itself.
    pub(super) fn collect(
        &mut self,
        lists: &[Vec<Action>],
        pass: usize,
        matching: &Matching,
    ) -> Result<(), Fault> {
        for &(send, receive) in &matching.pairs {
            let (
                &Action::Send { slot: source, rows: source_rows, .. },
                &Action::Recv { slot: target, rows: target_rows, total, .. },
            ) = (send.action(lists), receive.action(lists))
            else {
                unreachable!("a pair is a send and a receive");
            };
            let from = End { rank: RankId(send.rank), slot: source, rows: source_rows };
            let to = End { rank: RankId(receive.rank), slot: target, rows: target_rows };
            self.piece(from, to, total, (pass, receive))
                .map_err(|problem| receive.fault(problem))?;
        }
        for (at, action) in positions(lists) {
            if let &Action::Copy { from, from_rows, to, to_rows, total, .. } = action {
                let rank = RankId(at.rank);
                let from = End { rank, slot: from, rows: from_rows };
                let to = End { rank, slot: to, rows: to_rows };
                self.piece(from, to, total, (pass, at)).map_err(|problem| at.fault(problem))?;
            }
        }
        Ok(())
    }

    fn piece(
        &mut self,
        from: End,
        to: End,
        total: u64,
        (pass, at): (usize, At),
    ) -> Result<(), String> {
        if (from.slot.value, from.slot.pass) != (to.slot.value, to.slot.pass) {
            return Err(format!("its other end is `{}` of rank {}", from.slot, from.rank));
        }
        let (producer, consumer) = match to.slot.pass {
            Pass::Forward => (from, to),
            Pass::Backward => (to, from),
        };
        let index = self.resources.flow(to.slot.value).ok_or("there is no such value")?;
        let flow = &self.pipeline.flows[index];
        if producer.slot.place != flow.from || !flow.to.contains(&consumer.slot.place) {
            return Err(format!("no value flows from `{}` to `{}`", from.slot, to.slot));
        }
        self.timely(flow, from, to, pass)?;
        let microbatch = common_microbatch(&producer.slot, &consumer.slot)
            .ok_or_else(|| format!("its other end is `{}`, another microbatch", from.slot))?;
        if flow.transport == Transport::Split {
            let rows = self.split(producer, consumer, microbatch, (to, total))?;
            let slot = self.resource(&to);
            let whence = Whence::Action(pass, at);
            self.arrivals.push(Arrival { slot, from: from.slot.place, rows, whence });
        } else {
            self.unsplit(flow, producer, consumer, microbatch, total)?;
            let value = |end: End| {
                let slot = Slot { pass: Pass::Forward, ..end.slot };
                self.resource(&End { slot, ..end })
            };
            let link = Link {
                flow: index,
                consumer_place: consumer.slot.place,
                producer: value(producer),
                consumer: value(consumer),
                same_rank: producer.rank == consumer.rank,
            };
            self.links[to.slot.pass as usize].push(link);
        }
        Ok(())
    }

    fn resource(&self, end: &End) -> Resource {
        self.resources.slot(end.rank, &end.slot).expect("the slots of all actions were looked up")
    }

    /// Whether outputs arrive in the first pass and gradients exist by then.
    fn timely(&self, flow: &Flow, from: End, to: End, pass: usize) -> Result<(), String> {
        if to.slot.pass == Pass::Forward {
            let late = to.slot.place == Place::Sink && pass == 1;
            return if late { Err("the caller has the outputs already".into()) } else { Ok(()) };
        }
        let place = from.slot.place;
        if !self.mode.differentiates() || !self.pipeline.returns_gradient(flow, place) {
            return Err(format!("no gradient of value {} comes from `{place}`", flow.value));
        }
        if place == Place::Sink && pass == 0 && flow.transport != Transport::Sum {
            return Err("the caller has not supplied this gradient yet".into());
        }
        Ok(())
    }

    /// Whether both ends are the same rows; returns them as rows of the target.
    fn split(
        &self,
        producer: End,
        consumer: End,
        microbatch: Option<u32>,
        (target, total): (End, u64),
    ) -> Result<RowRange, String> {
        let (Some(made), Some(used), Some(rows)) = (producer.rows, consumer.rows, target.rows)
        else {
            return Err("it does not say which rows it moves".into());
        };
        let returns = target.slot.pass == Pass::Backward && self.layout.replicates_outputs();
        if returns && consumer.slot.place == Place::Sink && consumer.rank != RankId(0) {
            return Err("only rank 0's gradient of an output counts".into());
        }
        let (from, to) = match microbatch {
            Some(microbatch) => self.same_rows((producer, made), (consumer, used), microbatch)?,
            None => self.same_input((producer, made), (consumer, used))?,
        };
        let needed = if target.slot.pass == Pass::Forward { to } else { from };
        if total != needed {
            return Err(format!("the slot has {needed} rows, not {total}"));
        }
        Ok(rows)
    }

    /// The full sizes of both slots, if the pieces are the same rows of a microbatch.
    fn same_rows(
        &self,
        (producer, made): (End, RowRange),
        (consumer, used): (End, RowRange),
        microbatch: u32,
    ) -> Result<(u64, u64), String> {
        let holding = |end: End| self.layout.holding(end.slot.place, microbatch, end.rank).copied();
        let (Some(from), Some(to)) = (holding(producer), holding(consumer)) else {
            return Err("one of the ranks has no rows of this microbatch".into());
        };
        let rows = from.virtual_rows(made);
        if rows.is_none() || rows != to.virtual_rows(used) {
            return Err(format!("rows {made} of the maker are not rows {used} of the user"));
        }
        Ok((from.total, to.total))
    }

    /// The same for an input that is an output.
    fn same_input(
        &self,
        (producer, made): (End, RowRange),
        (consumer, used): (End, RowRange),
    ) -> Result<(u64, u64), String> {
        self.direct(producer, consumer)?;
        let all = self.layout.local_rows(producer.rank);
        if made != used || made.is_empty() || made.end > all {
            return Err(format!("rows {made} of the input are not rows {used} of the output"));
        }
        Ok((all, all))
    }

    /// Whether an input may become an output between these ranks.
    fn direct(&self, producer: End, consumer: End) -> Result<(), String> {
        let from = if self.layout.replicates_outputs() { RankId(0) } else { consumer.rank };
        if producer.rank == from {
            return Ok(());
        }
        Err(format!("this output of rank {} is the input of rank {from}", consumer.rank))
    }

    /// Whether a sum or whole value may go from one rank to another.
    fn unsplit(
        &self,
        flow: &Flow,
        producer: End,
        consumer: End,
        microbatch: Option<u32>,
        total: u64,
    ) -> Result<(), String> {
        if producer.rows.is_some() || consumer.rows.is_some() {
            return Err("it moves rows of a value that has none".into());
        }
        let rows = |end: End| match (end.slot.place, microbatch) {
            (Place::Stage(stage), Some(microbatch)) => {
                self.layout.stage_rows(stage, microbatch, end.rank)
            }
            _ => self.layout.local_rows(end.rank),
        };
        let idle = |end: End| matches!(end.slot.place, Place::Stage(_)) && rows(end) == 0;
        if idle(producer) || idle(consumer) {
            return Err("one of the ranks has no rows of this microbatch".into());
        }
        if total != rows(producer) {
            return Err(format!("it was made from {} rows, not {total}", rows(producer)));
        }
        let own = match (producer.slot.place, consumer.slot.place) {
            (Place::Source, Place::Sink) => return self.direct(producer, consumer),
            (Place::Source, _) => true,
            (_, Place::Sink) if flow.transport == Transport::Whole => {
                if microbatch != self.layout.filled().next() {
                    return Err("a whole output is that of the first microbatch".into());
                }
                false
            }
            (_, Place::Sink) => true,
            _ => false,
        };
        if own && producer.rank != consumer.rank {
            return Err("this value never leaves its rank".into());
        }
        Ok(())
    }

    /// Whether all pieces are there, each once.
    pub(super) fn complete(&mut self, program: &Program) -> Result<(), ScheduleError> {
        let mut needed = Vec::new();
        let mut uses = Vec::new();
        let flows = self.pipeline.flows.iter().filter(|_| self.mode.computes());
        for (index, flow) in flows.enumerate() {
            for &to in &flow.to {
                if flow.transport == Transport::Split {
                    self.needed_rows(flow, to, &mut needed);
                } else {
                    self.needed_uses(index, to, &mut uses);
                }
            }
        }
        self.rows_complete(needed, program)?;
        self.links_complete(uses).map_err(|problem| ScheduleError::Incomplete {
            problem,
            grid: render::excerpt(program, None),
        })
    }

    /// The rows that each consumer needs of a flow, and those whose gradient its producer needs.
    fn needed_rows(&self, flow: &Flow, to: Place, needed: &mut Vec<Arrival>) {
        let gradient = self.mode.differentiates() && self.pipeline.returns_gradient(flow, to);
        let mut need = |rank, place, microbatch, pass, from, rows: RowRange| {
            let slot = Slot::new(place, microbatch, flow.value, pass);
            let end = End { rank, slot, rows: None };
            let whence = Whence::Needed(rank, slot);
            if !rows.is_empty() {
                needed.push(Arrival { slot: self.resource(&end), from, rows, whence });
            }
        };
        if (flow.from, to) == (Place::Source, Place::Sink) {
            for rank in (0..self.pipeline.world_size).map(RankId) {
                let outputs = RowRange::new(0, self.layout.output_rows(rank));
                need(rank, to, 0, Pass::Forward, flow.from, outputs);
                if gradient {
                    let inputs = RowRange::new(0, self.layout.local_rows(rank));
                    need(rank, flow.from, 0, Pass::Backward, to, inputs);
                }
            }
            return;
        }
        for microbatch in self.layout.filled() {
            for holding in self.layout.holdings(to, microbatch) {
                let rows = holding.local(holding.rows);
                need(holding.rank, to, microbatch, Pass::Forward, flow.from, rows);
            }
            let makers = self.layout.holdings(flow.from, microbatch);
            for holding in makers.iter().filter(|_| gradient) {
                let rows = holding.local(holding.rows);
                need(holding.rank, flow.from, microbatch, Pass::Backward, to, rows);
            }
        }
    }

    /// Compares what arrives with what should.
    fn rows_complete(
        &mut self,
        mut needed: Vec<Arrival>,
        program: &Program,
    ) -> Result<(), ScheduleError> {
        let key = |arrival: &Arrival| (arrival.slot, arrival.from, arrival.rows.start);
        needed.sort_unstable_by_key(key);
        self.arrivals.sort_unstable_by_key(key);
        let mut arrivals = self.arrivals.iter().peekable();
        for need in &needed {
            let mut next = need.rows.start;
            while next < need.rows.end {
                let fits = |arrival: &&&Arrival| key(arrival) == (need.slot, need.from, next);
                let Some(arrival) = arrivals.peek().filter(fits) else {
                    return Err(missing(need, next, program));
                };
                next = arrival.rows.end;
                arrivals.next();
            }
            if next > need.rows.end {
                return Err(missing(need, need.rows.end, program));
            }
        }
        match arrivals.next().map(|arrival| arrival.whence) {
            Some(Whence::Action(pass, at)) => {
                let fault = at.fault("these rows arrive twice, or nobody needs them");
                Err(render::rejected(program, pass, &fault))
            }
            _ => Ok(()),
        }
    }

    /// The slots whose sum must go to a consumer, or that need a whole value.
    fn needed_uses(&self, index: usize, to: Place, uses: &mut Vec<(usize, Place, Resource)>) {
        let flow = &self.pipeline.flows[index];
        let place = if flow.transport == Transport::Sum { flow.from } else { to };
        let mut push = |rank, microbatch| {
            let slot = Slot::new(place, microbatch, flow.value, Pass::Forward);
            uses.push((index, to, self.resource(&End { rank, slot, rows: None })));
        };
        if place == Place::Sink {
            for rank in 0..self.pipeline.world_size {
                push(RankId(rank), 0);
            }
            return;
        }
        for microbatch in self.layout.filled() {
            for holding in self.layout.holdings(place, microbatch) {
                push(holding.rank, microbatch);
            }
        }
    }

    fn links_complete(&mut self, mut uses: Vec<(usize, Place, Resource)>) -> Result<(), String> {
        let flows = &self.pipeline.flows;
        let used = |link: &Link| {
            let sum = flows[link.flow].transport == Transport::Sum;
            (link.flow, link.consumer_place, if sum { link.producer } else { link.consumer })
        };
        let [values, gradients] = &mut self.links;
        let mut found: Vec<_> = values.iter().map(used).collect();
        found.sort_unstable();
        uses.sort_unstable();
        if found != uses {
            let differs = found.iter().zip(&uses).position(|(left, right)| left != right);
            let index = differs.unwrap_or(found.len().min(uses.len()));
            let first = found.get(index).into_iter().chain(uses.get(index)).min();
            let value = first.map_or(0, |&(flow, ..)| flows[flow].value);
            return Err(format!("not every part of value {value} is used exactly once"));
        }
        values.retain(|link| {
            let flow = &flows[link.flow];
            let one_counts = link.consumer_place == Place::Sink;
            self.mode.differentiates()
                && self.pipeline.returns_gradient(flow, link.consumer_place)
                && (!one_counts || link.same_rank)
        });
        values.sort_unstable();
        gradients.sort_unstable();
        if values == gradients {
            return Ok(());
        }
        let differs = values.iter().zip(gradients.iter()).position(|(left, right)| left != right);
        let index = differs.unwrap_or(values.len().min(gradients.len()));
        let first = values.get(index).into_iter().chain(gradients.get(index)).min();
        let value = first.map_or(0, |link| flows[link.flow].value);
        Err(format!("the gradient of value {value} does not go back the way the value came"))
    }
}

/// The microbatch of a piece, `Some(None)` if it goes from input to output, `None` if the ends differ.
#[expect(clippy::option_option, reason = "the outer one is the verdict, the inner one the answer")]
fn common_microbatch(producer: &Slot, consumer: &Slot) -> Option<Option<u32>> {
    match (producer.place, consumer.place) {
        (Place::Stage(_), Place::Stage(_)) => {
            (producer.microbatch == consumer.microbatch).then_some(Some(producer.microbatch))
        }
        (Place::Stage(_), _) => Some(Some(producer.microbatch)),
        (_, Place::Stage(_)) => Some(Some(consumer.microbatch)),
        _ => Some(None),
    }
}

fn missing(need: &Arrival, row: u64, program: &Program) -> ScheduleError {
    let problem = match need.whence {
        Whence::Needed(rank, slot) => format!(
            "row {row} of `{slot}` on rank {rank} does not arrive from `{}`, or arrives twice",
            need.from
        ),
        Whence::Action(..) => format!("row {row} does not arrive"),
    };
    ScheduleError::Incomplete { problem, grid: render::excerpt(program, None) }
}
