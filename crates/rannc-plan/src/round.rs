//! Which candidates are simulated, and the fastest of them.
//!
//! Candidates of the search come first, then plans by simple rules, then what is like the fastest, last the
//! winner with its cuts moved. Each lot may take so many simulated forwards, counted before it starts, so
//! that threads and the speed of the machine change nothing.

use rannc_partition::simple::{Assessor, Cut, regular};
use rannc_partition::{Candidate, Progress};
use rayon::prelude::*;

use crate::climb::Neighbours;
use crate::evaluate::Evaluator;
use crate::shift::Shifter;
use crate::{Placement, PlanError};

/// Candidates of the search are simulated until these take so many forwards together.
const MOST_SIMULATED: u64 = 1 << 16;
/// The same for plans by each simple rule, and for what is like the fastest.
const MOST_SIMPLE: u64 = 1 << 14;
const MOST_CLIMBED: u64 = 1 << 15;
/// And for the winner with its cuts moved.
const MOST_SHIFTED: u64 = 1 << 13;
const MOST_MOVES: usize = 12;
/// It goes on while the step gets faster by more than this part.
const LEAST_GAIN: u64 = 1_000;
/// Of each rule so many are simulated, fewer if they have more ranks than this together.
const MOST_OF_RULE: usize = 32;
const FEWEST_OF_RULE: usize = 4;
const MOST_RANKS_OF_RULE: usize = 4_096;
/// Proposals that turn out not to fit for each rule.
const MOST_REFUSED: usize = 64;
/// Candidates that are simulated at once.
const AT_ONCE: usize = 8;
/// Those that folding makes slower than the best by less than this part are compared as they are.
const CLOSE: u64 = 64;
const MOST_CLOSE: usize = 4;

/// The candidates simulated so far.
pub(crate) struct Round<'a> {
    evaluator: &'a Evaluator<'a>,
    progress: &'a dyn Progress,
    /// With their simulated times.
    simulated: Vec<(u64, Candidate)>,
    /// Forwards simulated so far.
    work: u64,
}

/// What the round was for.
pub(crate) struct Winner {
    pub(crate) step_ns: u64,
    pub(crate) candidate: Candidate,
    pub(crate) placement: Placement,
}

impl<'a> Round<'a> {
    pub(crate) fn new(evaluator: &'a Evaluator<'a>, progress: &'a dyn Progress) -> Self {
        Self { evaluator, progress, simulated: Vec::new(), work: 0 }
    }

    /// Simulates what the search found, the first in any case.
    pub(crate) fn simulate_found(&mut self, found: Vec<Candidate>) -> Result<(), PlanError> {
        let mut allowed = MOST_SIMULATED;
        self.simulate(found, &mut allowed)
    }

    /// Simulates plans by simple rules, of each the most promising that fit.
    pub(crate) fn simulate_simple(&mut self, assessor: &Assessor<'_>) -> Result<(), PlanError> {
        let affordable = MOST_RANKS_OF_RULE / assessor.setting.options.num_devices.max(1);
        for cut in Cut::ALL {
            let mut wanted = affordable.clamp(FEWEST_OF_RULE, MOST_OF_RULE);
            let mut allowed = MOST_SIMPLE;
            let proposals =
                assessor.ranked(regular(assessor, cut, assessor.most_ns(self.best_ns())));
            let mut proposals = proposals.into_iter().take(wanted + MOST_REFUSED);
            while wanted > 0 && allowed > 0 {
                let limit = assessor.most_ns(self.best_ns());
                let next = proposals.by_ref().take(wanted.min(AT_ONCE));
                let candidates: Vec<Candidate> = next
                    .filter(|(estimate_ns, _)| *estimate_ns <= limit)
                    .map(|(estimate_ns, proposal)| assessor.candidate(&proposal, estimate_ns))
                    .collect();
                if candidates.is_empty() {
                    break;
                }
                let fitting = self.fitting(self.promising(candidates), &mut allowed)?;
                wanted -= fitting.len();
                self.simulate(fitting, &mut allowed)?;
            }
        }
        Ok(())
    }

    /// Simulates what is like the fastest, as long as that leads to something faster.
    pub(crate) fn climb(&mut self, neighbours: &Neighbours<'_>) -> Result<(), PlanError> {
        let mut allowed = MOST_CLIMBED;
        loop {
            let least = self.best_ns();
            let Some(best) = self.best() else { return Ok(()) };
            let next = neighbours.of(&self.simulated[best].1);
            let possible = next.into_iter().filter(|next| self.evaluator.is_possible(next));
            self.simulate(possible.collect(), &mut allowed)?;
            if self.best_ns() >= least {
                return Ok(());
            }
        }
    }

    /// The fastest, with the time of its step; none if nothing was simulated.
    ///
    /// Of several that are nearly as fast it is the one that is so without folding.
    pub(crate) fn winner(&self) -> Result<Option<Winner>, PlanError> {
        let Some(best) = self.best() else { return Ok(None) };
        self.fastest_unfolded(0, self.simulated[best].0)
    }

    /// The winner with atoms moved out of its busiest stages, or what is like it, as long as the step gets
    /// faster by a part that matters and the simulations together stay within their number.
    pub(crate) fn shifted(
        &mut self,
        mut winner: Winner,
        shifter: &Shifter<'_>,
        neighbours: &Neighbours<'_>,
    ) -> Result<Winner, PlanError> {
        let mut allowed = MOST_SHIFTED;
        loop {
            let first = self.simulated.len();
            let stages = self.evaluator.by_work(&winner.candidate, &winner.placement);
            let moved = |stage| shifter.without_ends(&winner.candidate, stage);
            let mut next: Vec<Candidate> =
                stages.into_iter().flat_map(moved).take(MOST_MOVES).collect();
            next.extend(neighbours.of(&winner.candidate));
            let fitting = self.fitting(self.promising(next), &mut allowed)?;
            self.simulate(fitting, &mut allowed)?;
            let before = winner.step_ns;
            if let Some(faster) = self.fastest_unfolded(first, before)?
                && faster.step_ns < before
            {
                winner = faster;
            }
            if before - winner.step_ns <= before / LEAST_GAIN {
                return Ok(winner);
            }
        }
    }

    /// Of those simulated from `first` on that are about as fast as `limit_ns`, the fastest without folding.
    fn fastest_unfolded(&self, first: usize, limit_ns: u64) -> Result<Option<Winner>, PlanError> {
        let limit = limit_ns.saturating_add(limit_ns / CLOSE);
        let mut close: Vec<usize> =
            (first..self.simulated.len()).filter(|&at| self.simulated[at].0 <= limit).collect();
        close.sort_by_key(|&at| (self.simulated[at].0, at));
        close.truncate(MOST_CLOSE);
        let (evaluator, simulated) = (self.evaluator, &self.simulated);
        let exact = |&at: &usize| {
            let (folded_ns, candidate) = &simulated[at];
            let placement = evaluator.place(candidate);
            let step_ns = evaluator.unfolded_ns(candidate, &placement, *folded_ns)?;
            Ok((step_ns, at, placement))
        };
        let exact: Result<Vec<(u64, usize, Placement)>, PlanError> =
            close.par_iter().map(exact).collect();
        let fastest = exact?.into_iter().min_by_key(|&(step_ns, at, _)| (step_ns, at));
        Ok(fastest.map(|(step_ns, at, placement)| Winner {
            step_ns,
            candidate: self.simulated[at].1.clone(),
            placement,
        }))
    }

    fn best(&self) -> Option<usize> {
        (0..self.simulated.len()).min_by_key(|&at| (self.simulated[at].0, at))
    }

    fn best_ns(&self) -> u64 {
        self.best().map_or(u64::MAX, |at| self.simulated[at].0)
    }

    /// Those that may be among the close to the fastest.
    fn promising(&self, candidates: Vec<Candidate>) -> Vec<Candidate> {
        let best_ns = self.best_ns();
        let limit = best_ns.saturating_add(best_ns / CLOSE);
        let may = |candidate: &Candidate| self.evaluator.least_ns(candidate) <= limit;
        candidates.into_par_iter().filter(may).collect()
    }

    /// Those that fit: added up, or else played where that may be less.
    fn fitting(
        &mut self,
        candidates: Vec<Candidate>,
        allowed: &mut u64,
    ) -> Result<Vec<Candidate>, PlanError> {
        let fits = |candidate: Candidate| {
            let sure = self.evaluator.is_possible(&candidate);
            let fits = sure || self.evaluator.fits(&candidate)?;
            Ok((candidate, sure, fits))
        };
        let looked: Result<Vec<(Candidate, bool, bool)>, PlanError> =
            candidates.into_par_iter().map(fits).collect();
        let mut fitting = Vec::new();
        for (candidate, sure, fits) in looked? {
            if !sure {
                *allowed = allowed.saturating_sub(Evaluator::work(&candidate));
            }
            fitting.extend(fits.then_some(candidate));
        }
        Ok(fitting)
    }

    /// Simulates candidates that were not yet, and for which enough is left.
    fn simulate(&mut self, candidates: Vec<Candidate>, allowed: &mut u64) -> Result<(), PlanError> {
        let mut fresh: Vec<Candidate> = Vec::new();
        for candidate in candidates {
            let same = |known: &Candidate| {
                (&known.stages, known.microbatches, known.schedule)
                    == (&candidate.stages, candidate.microbatches, candidate.schedule)
            };
            let known = self.simulated.iter().map(|(_, known)| known).chain(&fresh).any(same);
            let work = Evaluator::work(&candidate);
            let first = self.simulated.is_empty() && fresh.is_empty();
            if !known && (first || work <= *allowed) {
                *allowed = allowed.saturating_sub(work);
                fresh.push(candidate);
            }
        }
        for chunk in fresh.chunks(AT_ONCE) {
            let chunk = self.promising(chunk.to_vec());
            self.work += chunk.iter().map(Evaluator::work).sum::<u64>();
            self.progress.update("simulating candidates", self.work, self.work + *allowed);
            let step = |candidate: &Candidate| {
                self.evaluator.step_ns(candidate, &self.evaluator.place(candidate))
            };
            let steps: Result<Vec<u64>, PlanError> = chunk.par_iter().map(step).collect();
            for (step_ns, candidate) in steps?.into_iter().zip(&chunk) {
                log::debug!(
                    "{} stages of {:?} replicas, {} microbatches, {}: estimated {} ns, simulated {step_ns} ns",
                    candidate.stages.len(),
                    candidate.stages.iter().map(|stage| stage.ranks.len()).collect::<Vec<_>>(),
                    candidate.microbatches,
                    candidate.schedule,
                    candidate.estimate_ns,
                );
                self.simulated.push((step_ns, candidate.clone()));
            }
        }
        Ok(())
    }
}
