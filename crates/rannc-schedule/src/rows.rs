//! Which rows of the batch are where: how microbatches are cut out of the ranks' own rows, and which rows
//! of a microbatch each replica of a stage gets.
//!
//! Every rank's rows are cut into one part per microbatch, nearly equal over ranks and microbatches. A
//! microbatch is its parts in rank order; its rows are numbered from 0 (*virtual* rows). A stage that all
//! ranks hold with equal shares leaves each part where it is; any other stage cuts the virtual rows into
//! runs, as its shares say ([`Stage`]):
//!
//! ```text
//!                     microbatch 0   microbatch 1
//! rank 0: a b c d e   a b c          d e
//! rank 1: f g         f              g
//! virtual rows        a b c f        d e g
//! on both ranks       a b c | f      d e | g        (no row moves)
//! on two of three     a b | c f      d | e g
//! on both, shares 3:1 a b c | f      d e | g
//! ```

use crate::{Batch, Pass, Pipeline, Place, RankId, RowRange, Stage, StageId};

/// The rows of one microbatch that one rank has at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holding {
    /// The rank.
    pub(crate) rank: RankId,
    /// Which virtual rows of the microbatch; never empty.
    pub(crate) rows: RowRange,
    /// Where they start in the rank's slot.
    pub(crate) start: u64,
    /// The rows of the whole slot.
    pub(crate) total: u64,
}

impl Holding {
    /// Virtual rows as rows of the slot.
    pub(crate) fn local(&self, rows: RowRange) -> RowRange {
        rows.rebase(self.rows.start, self.start)
    }

    /// Rows of the slot as virtual rows, if this microbatch has them all.
    pub(crate) fn virtual_rows(&self, local: RowRange) -> Option<RowRange> {
        let all = self.local(self.rows);
        let inside = local.start >= all.start && local.end <= all.end && !local.is_empty();
        inside.then(|| local.rebase(self.start, self.rows.start))
    }
}

/// All holdings of one batch.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    microbatches: u32,
    /// Per rank, the rows it brings.
    local: Vec<u64>,
    /// Per rank, the rows it gets back.
    outputs: Vec<u64>,
    /// Per microbatch, the source's holdings in rank order.
    source: Vec<Vec<Holding>>,
    /// The sink's, where they differ from the source's.
    sink: Option<Vec<Vec<Holding>>>,
    /// Per stage and microbatch, the holdings of the replicas in rank order.
    stages: Vec<Vec<Vec<Holding>>>,
}

impl Layout {
    /// Divides a valid batch over a valid pipeline.
    pub(crate) fn new(pipeline: &Pipeline, batch: &Batch) -> Self {
        let source = cut_microbatches(&batch.rows, batch.microbatches);
        let sink = (!batch.gather).then(|| {
            source.iter().map(|parts| repeat_on_all_ranks(parts, pipeline.world_size)).collect()
        });
        let everywhere = |stage: &Stage| stage.ranks.len() == pipeline.world_size as usize;
        let stages = pipeline.stages.iter().map(|stage| {
            let keep = batch.gather && everywhere(stage) && stage.shares_equally();
            source.iter().map(|parts| divide(parts, stage, keep)).collect()
        });
        let stages = stages.collect();
        let all: u64 = batch.rows.iter().sum();
        let outputs = if batch.gather { batch.rows.clone() } else { vec![all; batch.rows.len()] };
        let microbatches = u32::try_from(batch.microbatches).expect("validation limits them");
        Self { microbatches, local: batch.rows.clone(), outputs, source, sink, stages }
    }

    /// How many microbatches there are, empty ones included.
    pub(crate) const fn microbatches(&self) -> u32 {
        self.microbatches
    }

    /// How many ranks there are.
    pub(crate) fn world_size(&self) -> u32 {
        u32::try_from(self.local.len()).expect("validation compares it with the pipeline's")
    }

    /// The rows that a rank brings.
    pub(crate) fn local_rows(&self, rank: RankId) -> u64 {
        self.local[rank.index()]
    }

    /// The rows that a rank gets back.
    pub(crate) fn output_rows(&self, rank: RankId) -> u64 {
        self.outputs[rank.index()]
    }

    /// Whether all ranks get the rows of all ranks.
    pub(crate) const fn replicates_outputs(&self) -> bool {
        self.sink.is_some()
    }

    /// The microbatches that have rows.
    pub(crate) fn filled(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.microbatches).filter(|&microbatch| !self.source[microbatch as usize].is_empty())
    }

    /// Who has which rows of a microbatch at a place, in rank order.
    pub(crate) fn holdings(&self, place: Place, microbatch: u32) -> &[Holding] {
        let index = microbatch as usize;
        match place {
            Place::Source => &self.source[index],
            Place::Stage(stage) => &self.stages[stage.index()][index],
            Place::Sink => self.sink.as_ref().map_or(&self.source[index], |sink| &sink[index]),
        }
    }

    /// What one rank has of a microbatch at a place.
    pub(crate) fn holding(&self, place: Place, microbatch: u32, rank: RankId) -> Option<&Holding> {
        let holdings = self.holdings(place, microbatch);
        let index = holdings.binary_search_by_key(&rank, |holding| holding.rank).ok()?;
        holdings.get(index)
    }

    /// Who runs a pass of a microbatch through a stage, and on how many rows: the replicas that have rows,
    /// or all of them where they run it together.
    pub(crate) fn workers(
        &self,
        pipeline: &Pipeline,
        stage: StageId,
        microbatch: u32,
        pass: Pass,
    ) -> Vec<(RankId, u64)> {
        let of = &pipeline.stages[stage.index()];
        let rows = |&rank: &RankId| (rank, self.stage_rows(stage, microbatch, rank));
        let all = of.ranks.iter().map(rows);
        all.filter(|&(_, rows)| rows > 0 || of.is_joint(pass)).collect()
    }

    /// How many rows a replica computes; 0 where it has no part in the microbatch.
    pub(crate) fn stage_rows(&self, stage: StageId, microbatch: u32, rank: RankId) -> u64 {
        self.holding(Place::Stage(stage), microbatch, rank).map_or(0, |holding| holding.rows.len())
    }
}

/// Cuts each rank's rows into parts that differ by one row at most; what is left over is dealt out to one
/// microbatch after the other, rank by rank, so that these, too, differ by one row at most.
pub(crate) fn cut_microbatches(rows: &[u64], microbatches: u64) -> Vec<Vec<Holding>> {
    let mut parts = vec![Vec::new(); microbatches as usize];
    let mut filled = vec![0; microbatches as usize];
    let mut next = 0;
    for (index, &count) in rows.iter().enumerate() {
        let (each, more) = (count / microbatches, count % microbatches);
        let mut start = 0;
        for microbatch in 0..microbatches {
            let is_dealt = (microbatch + microbatches - next) % microbatches < more;
            let end = start + each + u64::from(is_dealt);
            let offset: &mut u64 = &mut filled[microbatch as usize];
            if end > start {
                let rows = RowRange::new(*offset, *offset + end - start);
                let rank = RankId::new(index);
                parts[microbatch as usize].push(Holding { rank, rows, start, total: count });
                (*offset, start) = (rows.end, end);
            }
        }
        next = (next + more) % microbatches;
    }
    parts
}

/// The holdings of a sink that gives all of rank 0's rows to everyone.
fn repeat_on_all_ranks(parts: &[Holding], world_size: u32) -> Vec<Holding> {
    let copies = parts
        .first()
        .into_iter()
        .flat_map(|&part| (0..world_size).map(move |rank| Holding { rank: RankId(rank), ..part }));
    copies.collect()
}

/// Divides a microbatch over the replicas of a stage.
fn divide(parts: &[Holding], stage: &Stage, keep: bool) -> Vec<Holding> {
    if keep {
        let stay = |part: &Holding| Holding { start: 0, total: part.rows.len(), ..*part };
        return parts.iter().map(stay).collect();
    }
    let all = parts.last().map_or(0, |part| part.rows.end);
    let bounds = stage.bounds(all);
    let runs = stage.ranks.iter().zip(bounds.windows(2)).map(|(&rank, ends)| {
        let rows = RowRange::new(ends[0], ends[1]);
        Holding { rank, rows, start: 0, total: rows.len() }
    });
    runs.filter(|holding| !holding.rows.is_empty()).collect()
}

/// Calls `visit` with each pair of holdings that share rows, and the virtual rows they share.
///
/// The holdings of `from` must not overlap each other. Linear in the pairs plus `to.len() log from.len()`.
pub(crate) fn overlaps(
    from: &[Holding],
    to: &[Holding],
    mut visit: impl FnMut(&Holding, &Holding, RowRange),
) {
    for target in to {
        let first = from.partition_point(|source| source.rows.end <= target.rows.start);
        for source in &from[first..] {
            let shared = source.rows.intersect(target.rows);
            if shared.is_empty() {
                break;
            }
            visit(source, target, shared);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Holding, cut_microbatches, divide, overlaps};
    use crate::{RankId, Sharding, Stage};

    fn stage(ranks: &[u32], shares: &[u64]) -> Stage {
        let ranks = ranks.iter().map(|&rank| RankId(rank)).collect();
        Stage { ranks, shares: shares.to_vec(), backward: true, sharding: Sharding::None }
    }

    fn text(holdings: &[Holding]) -> String {
        let one = |holding: &Holding| {
            format!("{}@{}+{}/{}", holding.rows, holding.rank, holding.start, holding.total)
        };
        holdings.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn microbatches_are_equal_although_ranks_are_not() {
        let parts = cut_microbatches(&[5, 0, 3, 1], 3);
        assert_eq!(text(&parts[0]), "0:2@0+0/5 2:3@2+0/3");
        assert_eq!(text(&parts[1]), "0:2@0+2/5 2:3@2+1/3");
        assert_eq!(text(&parts[2]), "0:1@0+4/5 1:2@2+2/3 2:3@3+0/1");
        for rows in [[2, 2, 1, 1, 1, 1, 1, 1], [7, 0, 3, 9, 1, 0, 0, 12]] {
            for microbatches in 1..12 {
                let parts = cut_microbatches(&rows, microbatches);
                let sizes = parts.iter().map(|parts| parts.last().map_or(0, |part| part.rows.end));
                let (least, most) = (sizes.clone().min(), sizes.max());
                assert!(most.unwrap() - least.unwrap() <= 1, "{rows:?} in {microbatches}");
            }
        }
    }

    #[test]
    fn replicas_share_the_rows_evenly_or_keep_their_own() {
        let parts = &cut_microbatches(&[5, 2], 1)[0];
        let both = stage(&[0, 1], &[]);
        assert_eq!(text(&divide(parts, &both, true)), "0:5@0+0/5 5:7@1+0/2");
        assert_eq!(text(&divide(parts, &both, false)), "0:3@0+0/3 3:7@1+0/4");
        assert_eq!(text(&divide(parts, &stage(&[0, 1], &[3, 1]), false)), "0:5@0+0/5 5:7@1+0/2");
    }

    #[test]
    fn more_replicas_than_rows_leaves_some_idle() {
        let parts = &cut_microbatches(&[2], 1)[0];
        assert_eq!(text(&divide(parts, &stage(&[0, 1, 2], &[]), false)), "0:1@1+0/1 1:2@2+0/1");
    }

    #[test]
    fn overlaps_are_the_shared_rows() {
        let parts = &cut_microbatches(&[6], 1)[0];
        let two = divide(parts, &stage(&[0, 1], &[]), false);
        let three = divide(parts, &stage(&[2, 3, 4], &[]), false);
        let mut found = Vec::new();
        overlaps(&two, &three, |from, to, rows| {
            found.push(format!("{rows} {}>{}", from.rank, to.rank));
        });
        assert_eq!(found, ["0:2 0>2", "2:3 0>3", "3:4 1>3", "4:6 1>4"]);
    }
}
