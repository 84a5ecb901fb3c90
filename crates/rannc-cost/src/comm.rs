//! How long transfers take: latency plus size over bandwidth.

use serde::{Deserialize, Serialize};

use crate::Cluster;
use crate::profile::scale;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// A connection between two devices, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Time before the first byte arrives.
    pub latency_ns: u64,
    /// Bytes that one device sends to one other in a second.
    pub bytes_per_second: u64,
    /// The same while devices add up what they send each other, where that is slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce_bytes_per_second: Option<u64>,
}

impl Link {
    /// A link on which adding up takes no time of its own.
    pub const fn new(latency_ns: u64, bytes_per_second: u64) -> Self {
        Self { latency_ns, bytes_per_second, reduce_bytes_per_second: None }
    }

    /// Time to move `bytes` as one message.
    pub fn transfer_ns(&self, bytes: u64) -> u64 {
        self.latency_ns.saturating_add(scale(bytes, NS_PER_SECOND, self.bytes_per_second))
    }

    /// Time to sum `bytes` over a ring of `num_ranks` devices joined by links like this one: every
    /// device sends `2 (n - 1) / n` of the bytes in `2 (n - 1)` messages.
    pub fn all_reduce_ns(&self, bytes: u64, num_ranks: u64) -> u64 {
        if num_ranks < 2 || bytes == 0 {
            return 0;
        }
        let messages = 2 * (num_ranks - 1);
        let volume = scale(bytes, messages, num_ranks);
        let speed = self.reduce_bytes_per_second.unwrap_or(self.bytes_per_second);
        let moving = scale(volume, NS_PER_SECOND, speed);
        moving.saturating_add(self.latency_ns.saturating_mul(messages))
    }
}

impl Cluster {
    /// The connection between two ranks; ranks beyond the cluster count as other nodes.
    pub fn link(&self, a: u32, b: u32) -> &Link {
        if self.is_near(a, b) { &self.intra_node } else { &self.inter_node }
    }

    fn is_near(&self, a: u32, b: u32) -> bool {
        let node = |rank: u32| self.devices.get(rank as usize).map(|device| device.node);
        node(a).is_some() && node(a) == node(b)
    }

    /// Time to move `bytes` from one rank to another; nothing from a rank to itself.
    pub fn transfer_ns(&self, bytes: u64, a: u32, b: u32) -> u64 {
        if a == b { 0 } else { self.link(a, b).transfer_ns(bytes) }
    }

    /// Time to sum `bytes` over `ranks`, in a ring limited by its slowest link; longer where these share
    /// the cores that add up.
    pub fn all_reduce_ns(&self, bytes: u64, ranks: &[u32]) -> u64 {
        let neighbours = ranks.iter().zip(ranks.iter().cycle().skip(1));
        let (mut near, mut far) = (false, false);
        for (&a, &b) in neighbours {
            if self.is_near(a, b) { near = true } else { far = true }
        }
        let links = [(near, &self.intra_node), (far, &self.inter_node)];
        let times = links.into_iter().filter(|&(used, _)| used);
        let time = times.map(|(_, link)| link.all_reduce_ns(bytes, ranks.len() as u64)).max();
        scale(time.unwrap_or(0), self.crowding_ppm(ranks), 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::Link;
    use crate::Cluster;

    const LINK: Link = Link::new(10, 1_000_000_000);

    #[test]
    fn a_ring_sends_twice_all_but_one_share() {
        assert_eq!(LINK.all_reduce_ns(1000, 4), 1500 + 6 * 10);
        assert_eq!(LINK.all_reduce_ns(1000, 1), 0);
        let slower = Link { reduce_bytes_per_second: Some(500_000_000), ..LINK };
        assert_eq!(slower.all_reduce_ns(1000, 4), 3000 + 6 * 10);
        assert_eq!(slower.transfer_ns(1000), LINK.transfer_ns(1000));
    }

    #[test]
    fn nodes_decide_which_link_counts() {
        let cluster = Cluster::parse("a100-40gb:2x2").unwrap();
        let (near, far) = (cluster.transfer_ns(1 << 20, 0, 1), cluster.transfer_ns(1 << 20, 1, 2));
        assert!(near < far);
        assert_eq!(cluster.transfer_ns(1 << 20, 3, 3), 0);
        assert!(cluster.all_reduce_ns(1 << 20, &[0, 1]) < cluster.all_reduce_ns(1 << 20, &[0, 2]));
    }
}
