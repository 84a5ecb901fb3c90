//! Ranks that compute with the same cores, as processes on a CPU do.
//!
//! The work of all that are busy at a time advances equally: at full speed while there is room for all of
//! them, else at their part of it. When work ends is only known once nothing can start before that end:
//!
//! ```text
//! room for 1     rank 0  ####====....      # alone   = with the other, at half speed
//!                rank 1  ....====##..
//! ```

use crate::{RankId, ScheduleError};

const PARTS: u64 = 1_000_000;
/// Work is counted in so many parts of a nanosecond.
const FINE: u128 = 1 << 20;

/// Ranks that compute with the same cores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The ranks.
    pub ranks: Vec<RankId>,
    /// How many of them can compute at full speed at a time, in millionths; at least 1.
    pub capacity_ppm: u64,
}

/// Work that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) end: u64,
    pub(crate) rank: u32,
    pub(crate) start: u64,
}

/// All groups of such ranks.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    of_rank: Vec<Option<usize>>,
    pools: Vec<Pool>,
}

#[derive(Debug)]
struct Pool {
    capacity_ppm: u64,
    /// Up to when work has advanced.
    now: u64,
    jobs: Vec<Job>,
}

#[derive(Debug)]
struct Job {
    rank: u32,
    start: u64,
    left: u128,
}

impl Pools {
    /// Nobody at work; refuses ranks that are in several groups or do not exist.
    pub(crate) fn new(shared: &[Shared], world_size: u32) -> Result<Self, ScheduleError> {
        let mut of_rank = vec![None; world_size as usize];
        for (index, group) in shared.iter().enumerate() {
            for rank in &group.ranks {
                let place = of_rank.get_mut(rank.index()).filter(|place| place.is_none());
                let Some(place) = place else {
                    return Err(ScheduleError::SharedTwice { rank: rank.0, world_size });
                };
                *place = Some(index);
            }
        }
        let pool = |group: &Shared| Pool {
            capacity_ppm: group.capacity_ppm.max(1),
            now: 0,
            jobs: Vec::new(),
        };
        Ok(Self { of_rank, pools: shared.iter().map(pool).collect() })
    }

    /// Whether a rank shares its cores.
    pub(crate) fn has(&self, rank: u32) -> bool {
        self.of_rank.get(rank as usize).is_some_and(Option::is_some)
    }

    /// A rank starts work that takes so long alone.
    pub(crate) fn start(&mut self, rank: u32, start: u64, duration: u64) {
        let Some(pool) = self.of_rank[rank as usize].map(|index| &mut self.pools[index]) else {
            return;
        };
        let start = start.max(pool.now);
        pool.jobs.push(Job { rank, start, left: u128::from(duration) * FINE });
    }

    /// The work that ends next, if nothing else happens before; it is taken out if it ends by `time`.
    pub(crate) fn next_by(&mut self, time: u64) -> Option<Done> {
        loop {
            let events = self.pools.iter().enumerate();
            let (next, index) =
                events.filter_map(|(index, pool)| Some((pool.next_event()?, index))).min()?;
            if next > time {
                return None;
            }
            let pool = &mut self.pools[index];
            pool.pass(next);
            if let Some(job) = pool.take_ended() {
                return Some(Done { end: next, rank: job.rank, start: job.start });
            }
        }
    }
}

impl Pool {
    fn has_ended(&self, job: &Job) -> bool {
        // Nothing is later than the last time there is.
        job.start <= self.now && (job.left == 0 || self.now == u64::MAX)
    }

    /// How fast each of those at work is.
    fn rate(&self) -> u128 {
        let busy = self.jobs.iter().filter(|job| job.start <= self.now).count() as u128;
        let needed = busy * u128::from(PARTS);
        if needed <= u128::from(self.capacity_ppm) {
            FINE
        } else {
            (u128::from(self.capacity_ppm) * FINE / needed).max(1)
        }
    }

    /// When some work starts or ends next.
    fn next_event(&self) -> Option<u64> {
        let rate = self.rate();
        let events = self.jobs.iter().map(|job| {
            if job.start > self.now {
                return job.start;
            }
            let takes = u64::try_from(job.left.div_ceil(rate)).unwrap_or(u64::MAX);
            self.now.saturating_add(takes)
        });
        events.min()
    }

    /// Lets time pass, in which nothing starts or ends.
    fn pass(&mut self, time: u64) {
        let worked = u128::from(time - self.now) * self.rate();
        for job in self.jobs.iter_mut().filter(|job| job.start <= self.now) {
            job.left = job.left.saturating_sub(worked);
        }
        self.now = time;
    }

    fn take_ended(&mut self) -> Option<Job> {
        let ended = self.jobs.iter().enumerate().filter(|(_, job)| self.has_ended(job));
        let (at, _) = ended.min_by_key(|(_, job)| job.rank)?;
        Some(self.jobs.remove(at))
    }
}

#[cfg(test)]
mod tests {
    use super::{Done, Pools, Shared};
    use crate::RankId;

    fn pools(ranks: u32, capacity_ppm: u64) -> Pools {
        let ranks = (0..ranks).map(RankId).collect();
        Pools::new(&[Shared { ranks, capacity_ppm }], 4).unwrap()
    }

    fn all(pools: &mut Pools) -> Vec<(u32, u64, u64)> {
        let done = std::iter::from_fn(|| pools.next_by(u64::MAX));
        done.map(|Done { end, rank, start }| (rank, start, end)).collect()
    }

    #[test]
    fn there_is_full_speed_while_there_is_room() {
        let mut pools = pools(2, 2_000_000);
        pools.start(0, 0, 100);
        pools.start(1, 10, 100);
        assert_eq!(all(&mut pools), [(0, 0, 100), (1, 10, 110)]);
    }

    #[test]
    fn those_at_work_share_what_there_is() {
        let mut pools = pools(2, 1_000_000);
        pools.start(0, 0, 100);
        pools.start(1, 50, 100);
        // Half is done alone, half takes twice as long, and then the other half goes on alone.
        assert_eq!(all(&mut pools), [(0, 0, 150), (1, 50, 200)]);
    }

    #[test]
    fn nothing_ends_before_it_may() {
        let mut pools = pools(2, 1_000_000);
        pools.start(0, 0, 100);
        assert_eq!(pools.next_by(99), None);
        pools.start(1, 99, 10);
        assert_eq!(all(&mut pools), [(0, 0, 101), (1, 99, 110)]);
    }

    #[test]
    fn groups_do_not_wait_for_each_other() {
        let group = |rank| Shared { ranks: vec![RankId(rank)], capacity_ppm: 500_000 };
        let mut pools = Pools::new(&[group(0), group(1)], 2).unwrap();
        pools.start(0, 0, 100);
        assert_eq!(pools.next_by(u64::MAX).map(|done| done.end), Some(200));
        pools.start(1, 200, 100);
        assert_eq!(all(&mut pools), [(1, 200, 400)]);
    }

    #[test]
    fn absurd_times_end() {
        let mut pools = pools(2, 1);
        pools.start(0, 7, u64::MAX);
        pools.start(1, u64::MAX, 5);
        assert_eq!(all(&mut pools), [(0, 7, u64::MAX), (1, u64::MAX, u64::MAX)]);
    }

    #[test]
    fn a_rank_is_in_one_group() {
        let shared = Shared { ranks: vec![RankId(0)], capacity_ppm: 1 };
        assert!(Pools::new(&[shared.clone(), shared.clone()], 4).is_err());
        assert!(Pools::new(&[shared], 0).is_err());
    }
}
