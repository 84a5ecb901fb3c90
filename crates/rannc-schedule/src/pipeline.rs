//! The pipeline as the schedule sees it: stages on ranks, the values that flow between them, and the
//! batch of one step. Nothing here knows operators or tensors.

use std::fmt;

use rannc_graph::{Affine, ids};
use serde::{Deserialize, Serialize};

use crate::{Pass, ScheduleError, Sharding};

ids! {
    /// A part of the model, in topological order.
    StageId,
    /// A process.
    RankId
}

/// Where a tensor is used or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The model inputs that the user handed to each rank. Every rank has one.
    Source,
    /// A stage, on each rank that holds a replica.
    Stage(StageId),
    /// The model outputs that the user gets on each rank. Every rank has one.
    Sink,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source => f.write_str("in"),
            Self::Stage(stage) => write!(f, "{stage}"),
            Self::Sink => f.write_str("out"),
        }
    }
}

/// How a value is divided among replicas and microbatches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// By rows.
    Split,
    /// Each part has a summand; the value of the batch is their sum.
    Sum,
    /// Not at all: it exists as a whole only.
    Whole,
}

/// One value that crosses a border, with its producer and all its consumers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The value's id in the graph.
    pub value: u32,
    /// How it is divided.
    pub transport: Transport,
    /// Who makes it: the source or a stage.
    pub from: Place,
    /// Who uses it: stages or the sink, each named once.
    pub to: Vec<Place>,
    /// Whether a gradient flows back from the sink and from every consumer that runs backward.
    pub gradient: bool,
    /// Its size as a function of the rows it has.
    pub bytes: Affine,
}

/// A part of the model and the ranks that hold a copy of it.
///
/// The replicas divide the rows of each microbatch by cumulative rounding: of `n` rows, those before
/// replica `i` are `n` times the shares before `i` over the sum of all shares, rounded down. So each
/// replica has its exact part, rounded up or down. A replica whose share is 0 never has rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Its replicas, ascending.
    pub ranks: Vec<RankId>,
    /// In which proportion the rows of a microbatch are divided among the replicas, a number for
    /// each and not all 0; equally if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<u64>,
    /// Whether there is anything to differentiate in it.
    pub backward: bool,
    /// What its replicas divide of its parameters, see [`Stage::is_joint`].
    #[serde(default, skip_serializing_if = "Sharding::is_none")]
    pub sharding: Sharding,
}

/// Parameters that exactly these ranks hold, and whose gradients they must add up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GradientGroup {
    /// How actions name it.
    pub id: u32,
    /// The ranks, ascending.
    pub ranks: Vec<RankId>,
    /// The stages that use the parameters.
    pub stages: Vec<StageId>,
    /// Size of all its gradients.
    pub bytes: u64,
    /// What the ranks divide of the parameters. If anything, each rank keeps but a part of the sums, and they
    /// are added up in every step: no rank has room for the summands of several.
    #[serde(default, skip_serializing_if = "Sharding::is_none")]
    pub sharding: Sharding,
}

/// A model cut into stages and placed on ranks.
///
/// A rank may host several stages or none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// The number of ranks.
    pub world_size: u32,
    /// The stages in topological order.
    pub stages: Vec<Stage>,
    /// The values that cross borders, each once.
    pub flows: Vec<Flow>,
    /// Who adds up which gradients.
    pub gradient_groups: Vec<GradientGroup>,
}

/// Whether other pipelines run beside this one and add up gradients and outputs with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    /// It is all there is.
    None,
    /// Others like it do.
    Others,
}

/// The batch of one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The rows that each rank brings.
    pub rows: Vec<u64>,
    /// Whether every rank brings its own rows and gets their outputs. If not, only rank 0 brings
    /// rows (the others have 0 here) and every rank gets the outputs of all of them.
    pub gather: bool,
    /// Into how many microbatches the batch is cut.
    pub microbatches: u64,
}

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Forward only.
    Inference,
    /// Forward and backward, and gradients are added up between ranks.
    Training,
    /// Forward and backward; each rank keeps its own summands of the gradients that are not divided.
    Accumulation,
    /// Neither: only what steps of [`Mode::Accumulation`] have left is added up.
    Reduction,
}

impl Mode {
    /// Whether stages run.
    pub const fn computes(self) -> bool {
        !matches!(self, Self::Reduction)
    }

    /// Whether stages run backward.
    pub const fn differentiates(self) -> bool {
        matches!(self, Self::Training | Self::Accumulation)
    }
}

/// More rows than this in a batch are surely a mistake.
const MAX_ROWS: u64 = 1 << 40;
/// More microbatches than this in a step are surely a mistake.
const MAX_MICROBATCHES: u64 = 1 << 12;
/// The parts that ranks and microbatches cut the batch into; each takes some hundred bytes.
const MAX_PARTS: u32 = 1 << 24;

impl Pipeline {
    /// Whether all parts agree with each other.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        for (index, stage) in self.stages.iter().enumerate() {
            let problem = self.stage_problem(stage);
            refuse(problem, || format!("stage {index}"))?;
        }
        let mut values: Vec<u32> = self.flows.iter().map(|flow| flow.value).collect();
        values.sort_unstable();
        for flow in &self.flows {
            let first = values.partition_point(|&value| value < flow.value);
            let problem = match values.get(first + 1) {
                Some(&next) if next == flow.value => Some("it has more than one flow".to_owned()),
                _ => self.flow_problem(flow),
            };
            refuse(problem, || format!("value {}", flow.value))?;
        }
        for (index, group) in self.gradient_groups.iter().enumerate() {
            let problem = self.group_problem(index, group);
            refuse(problem, || format!("gradient group {}", group.id))?;
        }
        Ok(())
    }

    fn stage_problem(&self, stage: &Stage) -> Option<String> {
        if stage.ranks.is_empty() {
            return Some("it has no replica".into());
        }
        if !stage.ranks.is_sorted_by(|left, right| left < right) {
            return Some("its ranks are not ascending".into());
        }
        let last = stage.ranks.last()?;
        if last.0 >= self.world_size {
            return Some(format!("it is on rank {last}, but there are {} ranks", self.world_size));
        }
        stage.shares_problem()
    }

    fn flow_problem(&self, flow: &Flow) -> Option<String> {
        if flow.from == Place::Sink {
            return Some("it comes from the sink".into());
        }
        if flow.to.is_empty() {
            return Some("nobody uses it".into());
        }
        for (index, &place) in flow.to.iter().enumerate() {
            if place == Place::Source {
                return Some("it flows into the source".into());
            }
            if place <= flow.from {
                return Some(format!("it flows from stage {} back to stage {place}", flow.from));
            }
            if flow.to[..index].contains(&place) {
                return Some(format!("it names its consumer `{place}` twice"));
            }
        }
        for place in flow.to.iter().chain([&flow.from]) {
            if let Place::Stage(stage) = place
                && stage.index() >= self.stages.len()
            {
                return Some(format!("it names stage {stage} of {}", self.stages.len()));
            }
        }
        if flow.from == Place::Source && flow.transport == Transport::Sum {
            return Some("a model input cannot be a sum over microbatches".into());
        }
        (flow.gradient && !self.differentiates(flow.from))
            .then(|| format!("its gradient goes to stage {}, which has no backward", flow.from))
    }

    fn group_problem(&self, index: usize, group: &GradientGroup) -> Option<String> {
        if self.gradient_groups[..index].iter().any(|other| other.id == group.id) {
            return Some("its id is used twice".into());
        }
        let mut ranks = Vec::new();
        for stage in &group.stages {
            let Some(stage) = self.stages.get(stage.index()) else {
                return Some(format!("it names stage {stage} of {}", self.stages.len()));
            };
            ranks.extend_from_slice(&stage.ranks);
        }
        ranks.sort_unstable();
        ranks.dedup();
        (ranks != group.ranks).then(|| "its ranks are not those of its stages, ascending".into())
    }

    /// Whether gradients come from, or go to, this place.
    pub(crate) fn differentiates(&self, place: Place) -> bool {
        match place {
            Place::Source | Place::Sink => true,
            Place::Stage(stage) => self.stages[stage.index()].backward,
        }
    }

    /// Whether backward sends a gradient of `flow` from its consumer `to`.
    pub(crate) fn returns_gradient(&self, flow: &Flow, to: Place) -> bool {
        flow.gradient && self.differentiates(to)
    }

    /// Whether this group has gradients to add up between ranks.
    pub(crate) fn reduces(&self, group: &GradientGroup, mode: Mode, beside: Beside) -> bool {
        let due = match mode {
            Mode::Inference => false,
            Mode::Training => true,
            Mode::Accumulation => !group.sharding.is_none(),
            Mode::Reduction => group.sharding.is_none(),
        };
        let due = due && group.sharding < Sharding::Gradients; // each backward does it
        due && (group.ranks.len() > 1 || beside == Beside::Others)
            && group.stages.iter().any(|stage| self.stages[stage.index()].backward)
    }

    /// The sums among the outputs that ranks must add up between them.
    pub(crate) fn reduced_outputs(
        &self,
        mode: Mode,
        beside: Beside,
    ) -> impl Iterator<Item = &Flow> {
        let several = mode.computes() && (self.world_size > 1 || beside == Beside::Others);
        self.flows.iter().filter(move |flow| {
            several && flow.transport == Transport::Sum && flow.to.contains(&Place::Sink)
        })
    }
}

impl Stage {
    /// Whether all replicas run a pass of each microbatch together, those without rows, too: they gather
    /// parameters that are divided, and add up gradients that are, while it runs.
    pub fn is_joint(&self, pass: Pass) -> bool {
        let least = match pass {
            Pass::Forward => Sharding::Parameters,
            Pass::Backward => Sharding::Gradients,
        };
        self.sharding >= least
    }

    /// Whether every replica has the same share.
    pub fn shares_equally(&self) -> bool {
        self.shares.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// How many rows of a microbatch each replica has.
    pub fn divide(&self, rows: u64) -> Vec<u64> {
        let bounds = self.bounds(rows);
        bounds.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Where the rows of each replica start, and the end of the last.
    pub(crate) fn bounds(&self, rows: u64) -> Vec<u64> {
        let share = |index: usize| self.shares.get(index).map_or(1, |&share| u128::from(share));
        let mut before: Vec<u128> = vec![0];
        before.extend((0..self.ranks.len()).scan(0, |sum, index| {
            *sum += share(index);
            Some(*sum)
        }));
        let all = before[self.ranks.len()].max(1);
        let bound = |before: u128| u64::try_from(u128::from(rows) * before / all);
        before
            .into_iter()
            .map(|part| bound(part).expect("a part of the rows is at most all"))
            .collect()
    }

    /// What is wrong with the shares.
    fn shares_problem(&self) -> Option<String> {
        if self.shares.is_empty() {
            return None;
        }
        if self.shares.len() != self.ranks.len() {
            let (shares, ranks) = (self.shares.len(), self.ranks.len());
            return Some(format!("it has {shares} shares for {ranks} ranks, needed one for each"));
        }
        if self.shares.iter().all(|&share| share == 0) {
            return Some("all of its shares are 0, needed at least one that is not".into());
        }
        let sum = self.shares.iter().try_fold(0u64, |sum, &share| sum.checked_add(share));
        sum.is_none().then(|| format!("its shares add up to more than {}", u64::MAX))
    }
}

impl Batch {
    /// Whether the batch fits the pipeline and has anything in it.
    pub fn validate(&self, pipeline: &Pipeline) -> Result<(), ScheduleError> {
        if self.rows.len() != pipeline.world_size as usize {
            return Err(ScheduleError::RankCount {
                found: self.rows.len(),
                needed: pipeline.world_size,
            });
        }
        if !(1..=MAX_MICROBATCHES).contains(&self.microbatches) {
            return Err(ScheduleError::Microbatches {
                found: self.microbatches,
                limit: MAX_MICROBATCHES,
            });
        }
        let parts = self.microbatches.saturating_mul(self.rows.len() as u64);
        if parts >= MAX_PARTS.into() {
            return Err(ScheduleError::TooLarge { slots: parts, limit: MAX_PARTS });
        }
        let total = self.rows.iter().fold(0u64, |sum, &rows| sum.saturating_add(rows));
        if !(1..=MAX_ROWS).contains(&total) {
            return Err(ScheduleError::RowCount { found: total, limit: MAX_ROWS });
        }
        let foreign = self.rows.iter().skip(1).position(|&rows| rows > 0);
        match foreign {
            Some(index) if !self.gather => Err(ScheduleError::ForeignRows {
                rank: RankId::new(index + 1),
                rows: self.rows[index + 1],
            }),
            _ => Ok(()),
        }
    }
}

fn refuse(problem: Option<String>, place: impl FnOnce() -> String) -> Result<(), ScheduleError> {
    match problem {
        Some(problem) => Err(ScheduleError::BadPipeline { place: place(), problem }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rannc_graph::Affine;

    use super::{
        Batch, Flow, GradientGroup, Pipeline, Place, RankId, Sharding, Stage, StageId, Transport,
    };

    fn pipeline() -> Pipeline {
        let stage = |rank| Stage {
            ranks: vec![RankId(rank)],
            shares: Vec::new(),
            backward: true,
            sharding: Sharding::None,
        };
        let flow = |value, from, to| Flow {
            value,
            transport: Transport::Split,
            from,
            to: vec![to],
            gradient: false,
            bytes: Affine::per_row(4),
        };
        let (first, second) = (Place::Stage(StageId(0)), Place::Stage(StageId(1)));
        let groups = GradientGroup {
            id: 0,
            ranks: vec![RankId(0), RankId(1)],
            stages: vec![StageId(0), StageId(1)],
            bytes: 4,
            sharding: Sharding::None,
        };
        Pipeline {
            world_size: 2,
            stages: vec![stage(0), stage(1)],
            flows: vec![
                flow(0, Place::Source, first),
                flow(1, first, second),
                flow(2, second, Place::Sink),
            ],
            gradient_groups: vec![groups],
        }
    }

    fn problem(change: impl Fn(&mut Pipeline)) -> String {
        let mut pipeline = pipeline();
        pipeline.validate().unwrap();
        change(&mut pipeline);
        let message = pipeline.validate().unwrap_err().to_string();
        message.replace("the pipeline is not valid: ", "")
    }

    #[test]
    fn contradictions_are_refused() {
        let found = [
            problem(|pipeline| pipeline.stages[0].ranks.clear()),
            problem(|pipeline| pipeline.stages[1].ranks = vec![RankId(1), RankId(0)]),
            problem(|pipeline| pipeline.stages[1].ranks = vec![RankId(2)]),
            problem(|pipeline| pipeline.stages[0].shares = vec![1, 2]),
            problem(|pipeline| pipeline.stages[0].shares = vec![0]),
            problem(|pipeline| {
                pipeline.stages[0].ranks = vec![RankId(0), RankId(1)];
                pipeline.stages[0].shares = vec![u64::MAX, 1];
            }),
            problem(|pipeline| pipeline.flows[1].value = 0),
            problem(|pipeline| pipeline.flows[1].to.clear()),
            problem(|pipeline| pipeline.flows[1].to = vec![Place::Stage(StageId(0))]),
            problem(|pipeline| pipeline.flows[0].transport = Transport::Sum),
            problem(|pipeline| {
                pipeline.flows[1].gradient = true;
                pipeline.stages[0].backward = false;
            }),
            problem(|pipeline| pipeline.gradient_groups[0].ranks.truncate(1)),
        ];
        insta::assert_snapshot!(found.join("\n"), @r"
        stage 0: it has no replica
        stage 1: its ranks are not ascending
        stage 1: it is on rank 2, but there are 2 ranks
        stage 0: it has 2 shares for 1 ranks, needed one for each
        stage 0: all of its shares are 0, needed at least one that is not
        stage 0: its shares add up to more than 18446744073709551615
        value 0: it has more than one flow
        value 1: nobody uses it
        value 1: it flows from stage 0 back to stage 0
        value 0: a model input cannot be a sum over microbatches
        value 1: its gradient goes to stage 0, which has no backward
        gradient group 0: its ranks are not those of its stages, ascending
        ");
    }

    #[test]
    fn shares_divide_rows() {
        let divide = |shares: &[u64], rows| {
            let ranks = vec![RankId(0), RankId(1), RankId(2)];
            Stage { ranks, shares: shares.to_vec(), backward: true, sharding: Sharding::None }
                .divide(rows)
        };
        assert_eq!(divide(&[], 7), [2, 2, 3]);
        assert_eq!(divide(&[5, 5, 5], 7), [2, 2, 3]);
        assert_eq!(divide(&[4, 2, 1], 14), [8, 4, 2]);
        assert_eq!(divide(&[4, 2, 1], 3), [1, 1, 1]);
        assert_eq!(divide(&[1, 0, 0], 3), [3, 0, 0]);
        assert_eq!(divide(&[1, u64::MAX - 2, 1], 1 << 40), [0, (1 << 40) - 1, 1]);
    }

    #[test]
    fn batches_must_fit() {
        let refused = |rows: &[u64], gather, microbatches| {
            let batch = Batch { rows: rows.to_vec(), gather, microbatches };
            batch.validate(&pipeline()).unwrap_err().to_string()
        };
        let found = [
            refused(&[1], true, 1),
            refused(&[1, 1], true, 0),
            refused(&[0, 0], true, 1),
            refused(&[1, 1], false, 1),
            refused(&[u64::MAX, u64::MAX], true, 1),
        ];
        insta::assert_snapshot!(found.join("\n"), @r"
        the batch has rows for 1 ranks, but the pipeline has 2
        the batch is cut into 0 microbatches, needed 1 to 4096
        the batch has 0 rows, needed 1 to 1099511627776
        rank 1 brings 1 rows, but only rank 0's count when inputs are not gathered
        the batch has 18446744073709551615 rows, needed 1 to 1099511627776
        ");
    }
}
