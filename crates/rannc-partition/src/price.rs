//! What a run of blocks costs as a stage on some devices.
//!
//! A stage that does not fit as it is may keep less: its replicas share state (sharding), and some
//! of its blocks are computed again in backward (recompute), those first that free the most bytes
//! for their time. Of all ways that fit, the fastest is taken.

use std::sync::{Arc, OnceLock};

use rannc_cost::{Classes, Cluster, Sharding, StageSizes, Training};

use crate::facts::{FactCache, RowFacts};
use crate::layout::DeviceSet;
use crate::runs::{Run, Runs};
use crate::units::UNITS;

/// What stages are priced for.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) classes: &'a Classes,
    /// What a stage may take on a device of each class.
    pub(crate) limits: &'a [u64],
    pub(crate) training: &'a Training,
    pub(crate) batch_rows: u64,
    pub(crate) microbatches: u64,
    /// Whether the batch may be divided at all.
    pub(crate) splittable: bool,
    pub(crate) recompute: bool,
    pub(crate) sharding: Sharding,
    pub(crate) num_devices: usize,
}

impl Setting<'_> {
    /// The most rows of a microbatch.
    pub(crate) fn microbatch_rows(&self) -> u64 {
        self.batch_rows.div_ceil(self.microbatches)
    }

    /// The most rows that one of `replicas` sees at a time, if all see equally many.
    pub(crate) fn rows(&self, replicas: usize) -> u64 {
        self.batch_rows.div_ceil(self.microbatches.saturating_mul(replicas as u64).max(1))
    }

    /// The most replicas that a stage can keep busy in every microbatch.
    pub(crate) fn most_replicas(&self) -> usize {
        if !self.splittable {
            return 1;
        }
        usize::try_from(self.batch_rows / self.microbatches).unwrap_or(usize::MAX)
    }
}

/// The replicas of a stage on devices of one class, and the rows that each of them has.
#[derive(Clone)]
pub(crate) struct Share {
    pub(crate) class: usize,
    pub(crate) count: usize,
    pub(crate) facts: Arc<RowFacts>,
}

/// A stage priced; pairs are within a node and across nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StageCost {
    pub(crate) forward_ns: u64,
    /// What is computed again included.
    pub(crate) backward_ns: u64,
    pub(crate) receive_ns: [u64; 2],
    pub(crate) return_ns: [u64; 2],
    pub(crate) send_ns: [u64; 2],
    pub(crate) reduce_ns: [u64; 2],
    /// The most that a replica takes.
    pub(crate) bytes: u64,
    pub(crate) sharding: Sharding,
    pub(crate) repeats: bool,
}

impl StageCost {
    fn total(&self, microbatches: u64) -> u64 {
        self.forward_ns
            .saturating_add(self.backward_ns)
            .saturating_mul(microbatches)
            .saturating_add(self.reduce_ns[1])
    }
}

/// How a stage is run in the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StageDetails {
    /// The rows of each replica on devices of a class.
    pub(crate) shares: Vec<(usize, u64)>,
    pub(crate) sharding: Sharding,
    /// Blocks to compute again, ascending.
    pub(crate) repeated: Vec<usize>,
}

/// Prices stages for one number of microbatches.
pub(crate) struct Pricer<'a> {
    pub(crate) runs: &'a Runs,
    facts: &'a FactCache<'a>,
    pub(crate) setting: Setting<'a>,
    /// Where all devices are alike: the facts by number of replicas.
    alike: Vec<OnceLock<Arc<RowFacts>>>,
    /// Whether there are several nodes.
    across: bool,
    most_memory: u64,
}

/// What a stage costs however many microbatches are in flight, and what its memory depends on then.
pub(crate) struct Plain {
    cost: StageCost,
    sizes: StageSizes,
    class: usize,
    replicas: usize,
}

/// What was tried to make a stage fit.
struct Attempt {
    cost: StageCost,
    repeated: Vec<usize>,
}

impl<'a> Pricer<'a> {
    pub(crate) fn new(runs: &'a Runs, facts: &'a FactCache<'a>, setting: Setting<'a>) -> Self {
        let alike = if setting.classes.devices.len() == 1 { setting.num_devices + 1 } else { 0 };
        let devices = &setting.cluster.devices[..setting.num_devices];
        let across = devices.iter().any(|device| device.node != devices[0].node);
        let most_memory = setting.limits.iter().copied().max().unwrap_or_default();
        let alike = (0..alike).map(|_| OnceLock::new()).collect();
        Self { runs, facts, setting, alike, across, most_memory }
    }

    /// For the blocks before each: device time and time of one microbatch at best. Where devices are
    /// not alike nothing is promised.
    pub(crate) fn remaining(&self) -> Vec<(u64, u64)> {
        let num_blocks = self.runs.num_blocks();
        if self.setting.classes.devices.len() > 1 {
            return vec![(0, 0); num_blocks + 1];
        }
        let most = self.setting.most_replicas().min(self.setting.num_devices).max(1);
        let mut rows: Vec<(u64, usize)> = Vec::new();
        for replicas in 1..=most {
            let seen = self.setting.rows(replicas);
            // Of the numbers of replicas with equal rows the fewest take the least device time.
            if rows.last().is_none_or(|&(last, _)| last != seen) {
                rows.push((seen, replicas));
            }
        }
        let facts: Vec<(Arc<RowFacts>, usize)> =
            rows.into_iter().map(|(rows, replicas)| (self.facts.get(0, rows), replicas)).collect();
        let mut remaining = vec![(0_u64, 0_u64)];
        for block in 0..num_blocks {
            let time = |facts: &RowFacts| {
                facts
                    .forward_ns(block, block + 1)
                    .saturating_add(facts.backward_ns(block, block + 1))
            };
            let device_time = |(facts, replicas): &(Arc<RowFacts>, usize)| {
                time(facts).saturating_mul(*replicas as u64)
            };
            let (work, fastest) = remaining[block];
            let less_work = facts.iter().map(device_time).min().unwrap_or(0);
            let less_time = facts.iter().map(|(facts, _)| time(facts)).min().unwrap_or(0);
            remaining.push((work.saturating_add(less_work), fastest.saturating_add(less_time)));
        }
        remaining
    }

    /// The cost of blocks `run.0..run.1` on the devices; none if they do not fit there.
    pub(crate) fn price(
        &self,
        run: (usize, usize),
        set: &DeviceSet,
        in_flight: u64,
    ) -> Option<StageCost> {
        self.attempt(run, set, in_flight).map(|(_, attempt)| attempt.cost)
    }

    /// Whether the parameters alone, with all that belongs to them, are too much for any device.
    pub(crate) fn is_hopeless(&self, run: (usize, usize)) -> bool {
        let run = self.runs.get(run.0, run.1);
        let trained = run.own_trained.saturating_add(run.shared_trained);
        let sizes = StageSizes {
            state: run.state,
            trainable: trained,
            tied: run.shared_trained,
            ..StageSizes::default()
        };
        let least = self.memory(&sizes, 0, self.setting.sharding, self.setting.num_devices);
        least > self.most_memory
    }

    /// What the blocks cost where all devices are alike and nothing is given up to fit, but for the memory;
    /// none if they are not alike, or have no rows.
    pub(crate) fn plain(&self, run: (usize, usize), set: &DeviceSet) -> Option<Plain> {
        let [(class, replicas)] = set.classes[..] else { return None };
        if replicas > self.setting.most_replicas() {
            return None;
        }
        let facts = self
            .alike
            .get(replicas)?
            .get_or_init(|| self.facts.get(class, self.setting.rows(replicas)));
        let sizes = StageSizes { gathered: 0, ..self.sizes(run, facts) };
        let clones = self.runs.get(run.0, run.1).clones_ns;
        let mut cost = StageCost {
            forward_ns: facts.forward_ns(run.0, run.1).saturating_add(clones.0),
            backward_ns: facts.backward_ns(run.0, run.1).saturating_add(clones.1),
            ..StageCost::default()
        };
        let run = self.runs.get(run.0, run.1);
        self.add_traffic(&mut cost, run, facts.rows, Sharding::None, replicas);
        Some(Plain { cost, sizes, class, replicas })
    }

    /// The cost with some microbatches in flight; none if that does not fit.
    pub(crate) fn within(&self, plain: &Plain, in_flight: u64) -> Option<StageCost> {
        let bytes = self.memory(&plain.sizes, in_flight, Sharding::None, plain.replicas);
        (bytes <= self.setting.limits[plain.class]).then_some(StageCost { bytes, ..plain.cost })
    }

    /// How the stage is run.
    pub(crate) fn details(
        &self,
        run: (usize, usize),
        set: &DeviceSet,
        in_flight: u64,
    ) -> Option<StageDetails> {
        let (shares, mut attempt) = self.attempt(run, set, in_flight)?;
        attempt.repeated.sort_unstable();
        let rows = |share: &Share| (share.class, share.facts.rows);
        Some(StageDetails {
            shares: shares.iter().map(rows).collect(),
            sharding: attempt.cost.sharding,
            repeated: attempt.repeated,
        })
    }

    fn attempt(
        &self,
        run: (usize, usize),
        set: &DeviceSet,
        in_flight: u64,
    ) -> Option<(Vec<Share>, Attempt)> {
        if set.replicas() > self.setting.most_replicas() {
            return None;
        }
        if set.classes.len() == 1 {
            let shares = self.even_shares(set);
            return self.fit(run, &shares, in_flight).ok().map(|attempt| (shares, attempt));
        }
        // A class whose devices are full gets fewer rows, the others more.
        let mut most_rows: Vec<u64> = vec![u64::MAX; self.setting.classes.devices.len()];
        for _ in 0..16 {
            let shares = self.uneven_shares(run, set, &most_rows)?;
            match self.fit(run, &shares, in_flight) {
                Ok(attempt) => return Some((shares, attempt)),
                Err(class) => {
                    let rows = shares.iter().find(|share| share.class == class)?.facts.rows;
                    most_rows[class] = rows.checked_sub(rows.div_ceil(8))?;
                }
            }
        }
        None
    }

    fn even_shares(&self, set: &DeviceSet) -> Vec<Share> {
        let replicas = set.replicas();
        let rows = self.setting.rows(replicas);
        let share = |&(class, count): &(usize, usize)| Share {
            class,
            count,
            facts: match self.alike.get(replicas) {
                Some(known) => Arc::clone(known.get_or_init(|| self.facts.get(class, rows))),
                None => self.facts.get(class, rows),
            },
        };
        set.classes.iter().map(share).collect()
    }

    /// Rows in proportion to speed, but at most as many as a class may have.
    fn uneven_shares(
        &self,
        run: (usize, usize),
        set: &DeviceSet,
        most_rows: &[u64],
    ) -> Option<Vec<Share>> {
        let total = self.setting.microbatch_rows();
        let even = self.setting.rows(set.replicas());
        let speed = |class: usize| {
            let facts = self.facts.get(class, even);
            let time = facts.forward_ns(run.0, run.1) + facts.backward_ns(run.0, run.1);
            u128::from(even) * 1_000_000_000_000 / u128::from(time.max(1))
        };
        let mut rows: Vec<Option<u64>> = vec![None; set.classes.len()];
        let mut left = total;
        loop {
            let open = || set.classes.iter().enumerate().filter(|&(at, _)| rows[at].is_none());
            let speeds: u128 =
                open().map(|(_, &(class, count))| speed(class) * count as u128).sum();
            if speeds == 0 {
                break;
            }
            let wanted = |class: usize| {
                let rows = (u128::from(left) * speed(class)).div_ceil(speeds);
                u64::try_from(rows).unwrap_or(u64::MAX)
            };
            let full = open().find(|&(_, &(class, _))| wanted(class) > most_rows[class]);
            if let Some((at, &(class, count))) = full {
                rows[at] = Some(most_rows[class]);
                left = left.saturating_sub(most_rows[class].saturating_mul(count as u64));
                continue;
            }
            let given: Vec<(usize, u64)> =
                open().map(|(at, &(class, _))| (at, wanted(class))).collect();
            for (at, wanted) in given {
                rows[at] = Some(wanted);
            }
            left = 0;
            break;
        }
        let rows: Option<Vec<u64>> =
            rows.into_iter().map(|rows| rows.filter(|&rows| rows > 0)).collect();
        let share = |(&(class, count), rows): (&(usize, usize), u64)| Share {
            class,
            count,
            facts: self.facts.get(class, rows),
        };
        (left == 0).then_some(())?;
        Some(set.classes.iter().zip(rows?).map(share).collect())
    }

    /// The fastest way that fits; else the class whose devices are too small.
    fn fit(&self, run: (usize, usize), shares: &[Share], in_flight: u64) -> Result<Attempt, usize> {
        let replicas: usize = shares.iter().map(|share| share.count).sum();
        let count = if replicas < 2 { 0 } else { self.setting.sharding as usize };
        let mut best: Option<Attempt> = None;
        let mut full = 0;
        for &level in &Sharding::ALL[..=count] {
            let plain = self.over_limit(run, shares, in_flight, level, replicas);
            let found = match plain {
                None => self.attempt_with(run, shares, in_flight, level, replicas, Vec::new()),
                Some(class) if self.setting.recompute => {
                    full = class;
                    match self.repeat(run, shares, in_flight, level, replicas) {
                        Ok(blocks) => {
                            self.attempt_with(run, shares, in_flight, level, replicas, blocks)
                        }
                        Err(class) => {
                            full = class;
                            continue;
                        }
                    }
                }
                Some(class) => {
                    full = class;
                    continue;
                }
            };
            if level == Sharding::None && plain.is_none() {
                return Ok(found);
            }
            let total = |attempt: &Attempt| attempt.cost.total(self.setting.microbatches);
            if best.as_ref().is_none_or(|best| total(&found) < total(best)) {
                best = Some(found);
            }
        }
        best.ok_or(full)
    }

    /// The class of a share that takes more than it may; none if all fit.
    fn over_limit(
        &self,
        run: (usize, usize),
        shares: &[Share],
        in_flight: u64,
        level: Sharding,
        replicas: usize,
    ) -> Option<usize> {
        let over = shares.iter().find(|share| {
            let sizes = self.sizes(run, &share.facts);
            self.memory(&sizes, in_flight, level, replicas) > self.setting.limits[share.class]
        });
        over.map(|share| share.class)
    }

    /// The fewest blocks, most rewarding first, that must be computed again for all to fit.
    fn repeat(
        &self,
        run: (usize, usize),
        shares: &[Share],
        in_flight: u64,
        level: Sharding,
        replicas: usize,
    ) -> Result<Vec<usize>, usize> {
        let inside = shares[0].facts.repeat_order(self.runs, run);
        // By share, what is kept with the first so many of them computed again.
        let mut kept = Kept::new(self, run, shares);
        let mut kept_with = Vec::with_capacity((inside.len() + 1) * shares.len());
        kept_with.extend_from_slice(&kept.saved);
        for &block in &inside {
            kept.repeat(block);
            kept_with.extend_from_slice(&kept.saved);
        }
        let sizes: Vec<StageSizes> =
            shares.iter().map(|share| self.sizes(run, &share.facts)).collect();
        let over_limit = |count: usize| {
            let kept = &kept_with[count * shares.len()..];
            let over = shares.iter().zip(&sizes).zip(kept).find(|((share, sizes), kept)| {
                let (saved, working) = saved_and_working(**kept, sizes.working);
                let sizes = StageSizes { saved, working, ..**sizes };
                self.memory(&sizes, in_flight, level, replicas) > self.setting.limits[share.class]
            });
            over.map(|((share, _), _)| share.class)
        };
        // More blocks need less memory, but for the workspace of the largest: look at the end first.
        if let Some(class) = over_limit(inside.len()) {
            return Err(class);
        }
        let (mut too_few, mut enough) = (0, inside.len());
        while too_few + 1 < enough {
            let middle = too_few.midpoint(enough);
            if over_limit(middle).is_none() { enough = middle } else { too_few = middle }
        }
        Ok(inside[..enough].to_vec())
    }

    fn attempt_with(
        &self,
        run: (usize, usize),
        shares: &[Share],
        in_flight: u64,
        level: Sharding,
        replicas: usize,
        repeated: Vec<usize>,
    ) -> Attempt {
        let facts = self.runs.get(run.0, run.1);
        let mut kept = (!repeated.is_empty()).then(|| Kept::new(self, run, shares));
        if let Some(kept) = &mut kept {
            for &block in &repeated {
                kept.repeat(block);
            }
        }
        let mut cost =
            StageCost { sharding: level, repeats: !repeated.is_empty(), ..StageCost::default() };
        for (index, share) in shares.iter().enumerate() {
            let again = repeated.iter().map(|&block| share.facts.forward_ns(block, block + 1));
            let again = again.fold(0, u64::saturating_add);
            let forward = share.facts.forward_ns(run.0, run.1).saturating_add(facts.clones_ns.0);
            let backward = share.facts.backward_ns(run.0, run.1).saturating_add(facts.clones_ns.1);
            cost.forward_ns = cost.forward_ns.max(forward);
            cost.backward_ns = cost.backward_ns.max(backward.saturating_add(again));
            let mut sizes = self.sizes(run, &share.facts);
            if let Some(kept) = &kept {
                (sizes.saved, sizes.working) = saved_and_working(kept.saved[index], sizes.working);
            }
            cost.bytes = cost.bytes.max(self.memory(&sizes, in_flight, level, replicas));
        }
        let rows = shares.iter().map(|share| share.facts.rows).max().unwrap_or(0);
        self.add_traffic(&mut cost, facts, rows, level, replicas);
        Attempt { cost, repeated }
    }

    fn add_traffic(
        &self,
        cost: &mut StageCost,
        run: &Run,
        rows: u64,
        level: Sharding,
        replicas: usize,
    ) {
        let Setting { cluster, microbatches, num_devices, .. } = self.setting;
        let links = [&cluster.intra_node, &cluster.inter_node];
        let shared =
            links[usize::from(self.across)].all_reduce_ns(run.shared_trained, num_devices as u64);
        let transfer =
            |bytes: u64| links.map(|link| if bytes == 0 { 0 } else { link.transfer_ns(bytes) });
        cost.receive_ns = transfer(run.received.at(rows));
        cost.return_ns = transfer(run.returned.at(rows));
        let sent = run.exchanged.at(rows).saturating_sub(run.arriving.at(rows));
        cost.send_ns = transfer(sent);
        cost.reduce_ns = links.map(|link| {
            let whole = link.all_reduce_ns(run.own_trained, replicas as u64);
            level.traffic_ns(whole, microbatches).saturating_add(shared)
        });
    }

    fn sizes(&self, run: (usize, usize), row_facts: &RowFacts) -> StageSizes {
        let facts = self.runs.get(run.0, run.1);
        let rows = row_facts.rows;
        let gathered = if self.setting.sharding >= Sharding::Gradients {
            // A unit is cut where it has its part; no operator has more than the largest block.
            let blocks = self.runs.blocks[run.0..run.1].iter();
            let largest = blocks.map(|block| block.own_trained).max().unwrap_or_default();
            facts.own_trained.min(facts.own_trained.div_ceil(UNITS).saturating_add(largest))
        } else {
            0
        };
        StageSizes {
            state: facts.state,
            trainable: facts.own_trained.saturating_add(facts.shared_trained),
            tied: facts.shared_trained,
            gathered,
            saved: facts.saved.at(rows),
            received: facts.received.at(rows),
            exchanged: facts.exchanged.at(rows),
            working: row_facts.working_bytes(run.0, run.1).max(facts.clones_working),
        }
    }

    fn memory(&self, sizes: &StageSizes, in_flight: u64, level: Sharding, replicas: usize) -> u64 {
        sizes.memory(in_flight, self.setting.training, level, replicas as u64).total()
    }
}

/// What a stage keeps for each microbatch when some of its blocks are computed again: their
/// inputs, and the inputs of kept blocks behind them, which those may not have saved themselves.
struct Kept<'a> {
    start: usize,
    shares: &'a [Share],
    /// By share: bytes saved for each microbatch, and the most that a block saves for the moment.
    saved: Vec<(u64, u64)>,
    is_repeated: Vec<bool>,
}

impl<'a> Kept<'a> {
    fn new(pricer: &Pricer<'_>, run: (usize, usize), shares: &'a [Share]) -> Self {
        let facts = pricer.runs.get(run.0, run.1);
        let saved = shares.iter().map(|share| (facts.saved.at(share.facts.rows), 0)).collect();
        Self { start: run.0, shares, saved, is_repeated: vec![false; run.1 - run.0] }
    }

    fn repeat(&mut self, block: usize) {
        let at = block - self.start;
        let after_repeated = at > 0 && self.is_repeated[at - 1];
        let before_kept = self.is_repeated.get(at + 1) == Some(&false);
        for (share, (saved, moment)) in self.shares.iter().zip(&mut self.saved) {
            let facts = &share.facts;
            *saved = saved.saturating_sub(facts.saved[block]);
            if !after_repeated {
                *saved = saved.saturating_add(facts.inputs[block]);
            }
            if before_kept {
                *saved = saved.saturating_add(facts.inputs[block + 1]);
            }
            *moment = facts.saved[block].max(*moment);
        }
        self.is_repeated[at] = true;
    }
}

/// What is saved for each microbatch, and a workspace that has room for the block at hand.
fn saved_and_working((saved, moment): (u64, u64), working: u64) -> (u64, u64) {
    (saved, working.saturating_add(moment))
}
