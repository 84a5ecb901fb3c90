//! Whether a program does the step: everything that must happen happens exactly once, at the right rows, in
//! an order that cannot hang.
//!
//! The checker knows the rows ([`rows`](crate::rows)) and the dependency relation
//! ([`depend`](crate::depend)), but neither the routes nor the generators, so it does not repeat their mistakes.
//! It looks, in this order, at
//!
//! 1. each action by itself: is it possible on its rank;
//! 2. each piece that moves: do both ends mean the same rows of the same value (`pieces`);
//! 3. the whole: does every slot get each of its rows once from each consumer or producer, is every summand
//!    used once, does every gradient go back where its value came from, is all work done, are all reductions
//!    there, is every slot released;
//! 4. the order, by playing the lists.
//!
//! # Complexity
//!
//! `n log n` in the number of actions.

mod pieces;

use crate::depend::{Access, Ledger, Resources};
use crate::pipeline::Beside;
use crate::render;
use crate::rows::Layout;
use crate::run::{At, Fault, Matching, Observer, Progress, Run, positions};
use crate::script::{Move, Op, Script};
use crate::{Action, Batch, Mode, Pass, Pipeline, Program, RankId, ScheduleError, StageId};
use pieces::Pieces;

/// Refuses a program that would hang or that would not do exactly the step of this batch.
pub fn check(
    program: &Program,
    pipeline: &Pipeline,
    batch: &Batch,
    mode: Mode,
) -> Result<(), ScheduleError> {
    pipeline.validate()?;
    batch.validate(pipeline)?;
    let layout = Layout::new(pipeline, batch);
    let resources = Resources::new(pipeline, layout.microbatches())?;
    check_valid(program, pipeline, &layout, &resources, mode)
}

/// The same, with everything but the program known to be right.
pub(crate) fn check_valid(
    program: &Program,
    pipeline: &Pipeline,
    layout: &Layout,
    resources: &Resources<'_>,
    mode: Mode,
) -> Result<(), ScheduleError> {
    refuse_other_ranks(program, pipeline)?;
    let mut checker = Checker::new(pipeline, layout, resources, mode);
    let located = |pass: usize| move |fault: Fault| render::rejected(program, pass, &fault);
    let mut matchings = Vec::new();
    for (pass, (_, lists)) in program.passes().iter().enumerate() {
        checker.actions(lists, pass).map_err(located(pass))?;
        let matching = Matching::new(lists).map_err(located(pass))?;
        checker.pieces.collect(lists, pass, &matching).map_err(located(pass))?;
        matchings.push(matching);
    }
    for (pass, (_, lists)) in program.passes().iter().enumerate() {
        checker.releases(lists).map_err(located(pass))?;
    }
    checker.work().and_then(|()| checker.reductions()).map_err(|problem| {
        ScheduleError::Incomplete { problem, grid: render::excerpt(program, None) }
    })?;
    checker.pieces.complete(program)?;
    let mut script = Script::default();
    for (pass, (_, lists)) in program.passes().iter().enumerate() {
        script.add(pass, lists, &matchings[pass], resources).map_err(located(pass))?;
        checker.play(&script, pass).map_err(located(pass))?;
    }
    Ok(())
}

/// Whether there is a list for each rank.
pub(crate) fn refuse_other_ranks(
    program: &Program,
    pipeline: &Pipeline,
) -> Result<(), ScheduleError> {
    for (pass, lists) in program.passes() {
        if lists.len() != pipeline.world_size as usize {
            let problem =
                format!("{pass} has lists for {} of {} ranks", lists.len(), pipeline.world_size);
            return Err(ScheduleError::Incomplete { problem, grid: String::new() });
        }
    }
    Ok(())
}

/// What has been seen so far.
struct Checker<'a> {
    pipeline: &'a Pipeline,
    layout: &'a Layout,
    resources: &'a Resources<'a>,
    mode: Mode,
    ledger: Ledger,
    /// Per activations, whether their forward and backward are there.
    worked: Vec<[bool; 2]>,
    /// Per slot, whether it is released.
    released: Vec<bool>,
    /// The reductions, each with its rank.
    reductions: Vec<(Reduction, RankId)>,
    pieces: Pieces<'a>,
}

/// The kind and the id of a reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reduction {
    Gradients(u32),
    Output(u32),
}

impl<'a> Checker<'a> {
    fn new(
        pipeline: &'a Pipeline,
        layout: &'a Layout,
        resources: &'a Resources<'a>,
        mode: Mode,
    ) -> Self {
        Self {
            pipeline,
            layout,
            resources,
            mode,
            ledger: Ledger::new(resources),
            worked: vec![[false; 2]; resources.count()],
            released: vec![false; resources.count()],
            reductions: Vec::new(),
            pieces: Pieces::new(pipeline, layout, resources, mode),
        }
    }

    /// Looks at each action by itself.
    fn actions(&mut self, lists: &[Vec<Action>], pass: usize) -> Result<(), Fault> {
        for (at, action) in positions(lists) {
            self.action(RankId(at.rank), action, pass).map_err(|problem| at.fault(problem))?;
        }
        Ok(())
    }

    fn action(&mut self, rank: RankId, action: &Action, pass: usize) -> Result<(), String> {
        let (ledger, released) = (&mut self.ledger, &mut self.released);
        let moves = matches!(action, Action::Send { .. } | Action::Copy { .. });
        let mut twice = false;
        self.resources.touch(rank, action, |resource, access| {
            ledger.expect(resource, access);
            if moves && access == Access::Take {
                twice |= std::mem::replace(&mut released[resource as usize], true);
            }
        })?;
        if twice {
            return Err("it releases a slot that another action releases".into());
        }
        match *action {
            Action::Forward { stage, microbatch, rows } => {
                self.worker(rank, stage, microbatch, rows, Pass::Forward)
            }
            Action::Backward { stage, microbatch, rows } => {
                if !self.mode.differentiates() || !self.pipeline.stages[stage.index()].backward {
                    return Err("there is nothing to differentiate".into());
                }
                self.worker(rank, stage, microbatch, rows, Pass::Backward)
            }
            Action::ReduceGradients { group } => {
                self.reductions.push((Reduction::Gradients(group), rank));
                Ok(())
            }
            Action::ReduceOutput { value } => {
                self.reductions.push((Reduction::Output(value), rank));
                if pass == 0 { Ok(()) } else { Err("the caller has the outputs already".into()) }
            }
            _ => Ok(()),
        }
    }

    fn worker(
        &mut self,
        rank: RankId,
        stage: StageId,
        microbatch: u32,
        rows: u64,
        pass: Pass,
    ) -> Result<(), String> {
        let needed = self.layout.stage_rows(stage, microbatch, rank);
        if !self.mode.computes() {
            return Err("there is nothing to compute".into());
        }
        let joint = self.pipeline.stages[stage.index()].is_joint(pass);
        if rows != needed || (rows == 0 && !joint) {
            return Err(format!("the replica has {needed} rows of the microbatch"));
        }
        let activations = self.resources.activations(rank, stage, microbatch);
        let activations = activations.expect("the action's resources were looked up before");
        if std::mem::replace(&mut self.worked[activations as usize][pass as usize], true) {
            return Err("it is done twice".into());
        }
        Ok(())
    }

    /// Whether each slot that something is taken from is released.
    fn releases(&self, lists: &[Vec<Action>]) -> Result<(), Fault> {
        for (at, action) in positions(lists) {
            let (Action::Send { slot, .. } | Action::Copy { from: slot, .. }) = action else {
                continue;
            };
            let resource = self.resources.slot(RankId(at.rank), slot);
            if resource.is_some_and(|resource| !self.released[resource as usize]) {
                return Err(at.fault("its slot is never released"));
            }
        }
        Ok(())
    }

    /// Whether all work is done.
    fn work(&self) -> Result<(), String> {
        for (index, stage) in self.pipeline.stages.iter().enumerate() {
            let id = StageId::new(index);
            let backward = stage.backward && self.mode.differentiates();
            for microbatch in self.layout.filled().filter(|_| self.mode.computes()) {
                for pass in [Pass::Forward, Pass::Backward] {
                    if pass == Pass::Backward && !backward {
                        continue;
                    }
                    let workers = self.layout.workers(self.pipeline, id, microbatch, pass);
                    let idle = workers.into_iter().find(|&(rank, _)| {
                        let activations = self.resources.activations(rank, id, microbatch);
                        let activations = activations.expect("replicas have activations");
                        !self.worked[activations as usize][pass as usize]
                    });
                    if let Some((rank, _)) = idle {
                        return Err(format!("rank {rank} never runs `{id}{pass}{microbatch}`"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether exactly the needed reductions are there.
    fn reductions(&mut self) -> Result<(), String> {
        let mut needed = Vec::new();
        let groups = self.pipeline.gradient_groups.iter();
        for group in groups.filter(|group| self.pipeline.reduces(group, self.mode, Beside::None)) {
            let id = Reduction::Gradients(group.id);
            needed.extend(group.ranks.iter().map(|&rank| (id, rank)));
        }
        for flow in self.pipeline.reduced_outputs(self.mode, Beside::None) {
            let ranks = (0..self.pipeline.world_size).map(RankId);
            needed.extend(ranks.map(|rank| (Reduction::Output(flow.value), rank)));
        }
        needed.sort_unstable();
        self.reductions.sort_unstable();
        if needed == self.reductions {
            return Ok(());
        }
        let differs = needed.iter().zip(&self.reductions).position(|(left, right)| left != right);
        let index = differs.unwrap_or(needed.len().min(self.reductions.len()));
        let name = |&(reduction, rank): &(Reduction, RankId)| match reduction {
            Reduction::Gradients(group) => format!("gradients of group {group} on rank {rank}"),
            Reduction::Output(value) => format!("output value {value} on rank {rank}"),
        };
        let found = self.reductions.get(index).map_or("nothing".to_owned(), name);
        let needed = needed.get(index).map_or("nothing".to_owned(), name);
        Err(format!("it reduces {found} where it should reduce {needed}"))
    }

    /// Plays the lists of one pass to the end.
    fn play(&mut self, script: &Script, pass: usize) -> Result<(), Fault> {
        let mut run = Run::new(self.resources, self.pipeline, script, pass);
        let mut woken: Vec<u32> = (0..self.pipeline.world_size).rev().collect();
        while let Some(rank) = woken.pop() {
            while run.advance(rank, &mut self.ledger, &mut Silent, &mut woken) == Progress::Ran {}
        }
        run.stuck().map_or(Ok(()), |at| {
            Err(at.fault(
                "it waits for ever: what it needs comes later, or after something that waits \
                 for this rank",
            ))
        })
    }
}

/// An observer that needs nothing.
struct Silent;

impl Observer for Silent {
    fn ran(&mut self, _: At, _: Op) {}
    fn delivered(&mut self, _: u32, _: &Move) {}
    fn reduced(&mut self, _: Op, _: &[At]) {}
    fn worked(&mut self, _: &[(At, u32)]) {}
}
