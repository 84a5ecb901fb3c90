//! What people plan with today, each as strong as it can be.
//!
//! A baseline lists the plans that its rule allows; the promising ones are simulated by an
//! [`Evaluate`], and the fastest that fits counts. Where a rule says nothing of the schedule, of what
//! to compute again or of the order of ranks, all of them are tried. The rules:
//!
//! | baseline | stages | replicas |
//! |---|---|---|
//! | equal layers | equally many layers or operators | the same for all |
//! | balanced time | least time of the slowest, between operators (torchgpipe) | the same for all |
//! | `PipeDream` | its dynamic programme | its dynamic programme |
//! | original | the fewest that fit | powers of two |
//! | grid | least time of the slowest, between layers or operators | the same for all |

mod original;
mod pipedream;

use rannc_cost::AnalyticCosts;
use rannc_graph::Graph;
use rannc_partition::simple::{Assessor, Cut, Proposal, Sequence, Setting, regular};
use rannc_partition::{Atoms, Candidate};

/// Proposals that are simulated at most, the most promising first, if few ranks make that quick.
const MAX_SIMULATED: usize = 32;
/// Ranks that are simulated at most over all proposals, but for the first few of them.
const MAX_SIMULATED_RANKS: usize = 4_096;
const MIN_SIMULATED: usize = 4;
/// Proposals that may turn out not to fit for each that does.
const MAX_REFUSED: usize = 64;

/// Simulates a candidate.
pub trait Evaluate {
    /// The time of a step, or none if the candidate does not fit.
    fn step_ns(&self, candidate: &Candidate) -> Option<u64>;
}

/// The best plan that a baseline has.
#[derive(Clone, Debug)]
pub struct Found {
    /// Time of a step as simulated.
    pub step_ns: u64,
    /// The plan.
    pub candidate: Candidate,
    /// How many plans the rule allows that seemed to fit.
    pub considered: usize,
}

/// An earlier way to plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Baseline {
    /// Equally many layers in each stage.
    EqualLayers,
    /// Stages balanced by measured time, as torchgpipe does.
    BalancedTime,
    /// `PipeDream`'s dynamic programme.
    PipeDream,
    /// The original `RaNNC`'s rule.
    Original,
    /// All uniform pipelines with data parallelism.
    Grid,
}

impl Baseline {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::EqualLayers, Self::BalancedTime, Self::PipeDream, Self::Original, Self::Grid];

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EqualLayers => "equal layers",
            Self::BalancedTime => "balanced time",
            Self::PipeDream => "PipeDream",
            Self::Original => "original",
            Self::Grid => "grid",
        }
    }

    fn proposals(self, assessor: &Assessor) -> Vec<Proposal> {
        match self {
            Self::EqualLayers => regular(assessor, Cut::EqualCounts, u64::MAX),
            Self::BalancedTime => regular(assessor, Cut::OperatorTime, u64::MAX),
            Self::PipeDream => pipedream::proposals(assessor),
            Self::Original => original::proposals(assessor),
            Self::Grid => [Cut::LayerTime, Cut::OperatorTime]
                .into_iter()
                .flat_map(|cut| regular(assessor, cut, u64::MAX))
                .collect(),
        }
    }
}

/// The best plan of each of some baselines; none where its rule allows nothing that fits.
pub fn best(
    baselines: &[Baseline],
    graph: &Graph,
    setting: &Setting,
    evaluate: &dyn Evaluate,
) -> Vec<Option<Found>> {
    let costs = AnalyticCosts::new(graph, &setting.cluster.devices[0]);
    let atoms = Atoms::new(graph);
    let line = Sequence::new(graph, &atoms, &costs);
    let assessor = Assessor::new(&line, setting);
    baselines.iter().map(|baseline| best_of(*baseline, &assessor, evaluate)).collect()
}

fn best_of(baseline: Baseline, assessor: &Assessor, evaluate: &dyn Evaluate) -> Option<Found> {
    let promising = assessor.ranked(baseline.proposals(assessor));
    let considered = promising.len();
    let affordable = MAX_SIMULATED_RANKS / assessor.setting.options.num_devices;
    let mut wanted = affordable.clamp(MIN_SIMULATED, MAX_SIMULATED);
    let mut best: Option<Found> = None;
    for (estimate_ns, proposal) in promising.into_iter().take(wanted + MAX_REFUSED) {
        let candidate = assessor.candidate(&proposal, estimate_ns);
        let Some(step_ns) = evaluate.step_ns(&candidate) else { continue };
        if best.as_ref().is_none_or(|found| step_ns < found.step_ns) {
            best = Some(Found { step_ns, candidate, considered });
        }
        wanted -= 1;
        if wanted == 0 {
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests;
