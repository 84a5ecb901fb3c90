//! Costs on every kind of device that a cluster has.

use rannc_graph::{Graph, NodeId};

use crate::profile::scale;
use crate::{AnalyticCosts, Cluster, CostError, CostModel, Device, Profile, ProfiledCosts};

const PARTS: u64 = 1_000_000;

/// The devices of a cluster by *class*: devices of one class have equal kinds, memory and speeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// One device of each class, in the order in which ranks first have them.
    pub devices: Vec<Device>,
    /// The class of each rank's device.
    pub of_rank: Vec<usize>,
}

impl Cluster {
    /// The classes of the first `num_devices` devices.
    pub fn classes(&self, num_devices: usize) -> Classes {
        let mut devices: Vec<Device> = Vec::new();
        let alike = |a: &Device, b: &Device| {
            let numbers = |device: &Device| {
                [
                    device.memory_bytes,
                    device.flops_per_second,
                    device.half_flops_per_second,
                    device.memory_bytes_per_second,
                ]
            };
            a.kind == b.kind && numbers(a) == numbers(b)
        };
        let of_rank = self.devices.iter().take(num_devices).map(|device| {
            devices.iter().position(|known| alike(known, device)).unwrap_or_else(|| {
                devices.push(device.clone());
                devices.len() - 1
            })
        });
        let of_rank = of_rank.collect();
        Classes { devices, of_rank }
    }
}

/// What operators take on each class of devices.
pub struct DeviceCosts<'a> {
    models: Vec<Box<dyn CostModel + 'a>>,
    source: String,
}

impl<'a> DeviceCosts<'a> {
    /// Costs on these devices: from the profile for the kind that was measured, for other kinds
    /// from the profile and how their data sheets compare; without a profile from data sheets alone.
    ///
    /// # Errors
    ///
    /// [`CostError::UnknownSignature`] when the profile does not belong to the graph.
    pub fn new(
        graph: &'a Graph,
        profile: Option<&Profile>,
        devices: &[Device],
    ) -> Result<Self, CostError> {
        let Some(profile) = profile else {
            let kinds: Vec<&str> = devices.iter().map(|device| device.kind.as_str()).collect();
            let models = devices.iter().map(|device| {
                Box::new(AnalyticCosts::new(graph, device)) as Box<dyn CostModel + 'a>
            });
            let source = format!("estimated from the data of {}", listed(&kinds));
            return Ok(Self { models: models.collect(), source });
        };
        let measured = ProfiledCosts::new(graph, profile)?;
        let at = devices.iter().position(|device| device.kind == profile.device).unwrap_or(0);
        let models = devices.iter().map(|device| {
            let speeds = |device: &Device| {
                let Device { flops_per_second, half_flops_per_second, .. } = *device;
                [flops_per_second, half_flops_per_second, device.memory_bytes_per_second]
            };
            let same = speeds(device) == speeds(&devices[at]);
            if same {
                Box::new(measured.clone()) as Box<dyn CostModel + 'a>
            } else {
                let slower = AnalyticCosts::new(graph, &devices[at]);
                let other = AnalyticCosts::new(graph, device);
                Box::new(Scaled::new(graph, &measured, slower, other)) as Box<dyn CostModel + 'a>
            }
        });
        let models = models.collect();
        Ok(Self { models, source: format!("measured on {}", profile.device) })
    }

    /// Costs on devices that are all alike.
    pub fn uniform(model: Box<dyn CostModel + 'a>, source: String) -> Self {
        Self { models: vec![model], source }
    }

    /// The costs while all devices of a cluster compute; none if none of them shares its cores.
    pub fn crowded<'b>(&'b self, cluster: &Cluster) -> Option<DeviceCosts<'b>> {
        if cluster.shared.is_empty() {
            return None;
        }
        let classes = cluster.classes(cluster.devices.len());
        let models = self.models.iter().enumerate().map(|(class, model)| {
            let groups = cluster.shared.iter().filter(|group| {
                group.devices.iter().any(|&rank| classes.of_rank[rank as usize] == class)
            });
            let ppm = groups.map(|group| cluster.crowding_ppm(&group.devices)).max();
            let model: &'b (dyn CostModel + 'a) = &**model;
            let slowed = Slowed { model, ppm: ppm.unwrap_or(PARTS) };
            Box::new(slowed) as Box<dyn CostModel + 'b>
        });
        Some(DeviceCosts { models: models.collect(), source: self.source.clone() })
    }

    /// The costs on a class of devices.
    pub fn class(&self, class: usize) -> &(dyn CostModel + 'a) {
        &*self.models[class]
    }

    /// How many classes there are.
    pub fn num_classes(&self) -> usize {
        self.models.len()
    }

    /// Where the times come from, for a person.
    pub fn source(&self) -> &str {
        &self.source
    }
}

fn listed(kinds: &[&str]) -> String {
    let mut distinct: Vec<&str> = Vec::new();
    for kind in kinds {
        if !distinct.contains(kind) {
            distinct.push(kind);
        }
    }
    distinct.join(" and ")
}

/// Costs on devices that others slow down.
struct Slowed<'b, 'a> {
    model: &'b (dyn CostModel + 'a),
    ppm: u64,
}

impl CostModel for Slowed<'_, '_> {
    fn num_kinds(&self) -> usize {
        self.model.num_kinds()
    }

    fn kind(&self, node: NodeId) -> usize {
        self.model.kind(node)
    }

    fn forward_of(&self, kind: usize, rows: u64) -> u64 {
        scale(self.model.forward_of(kind, rows), self.ppm, PARTS)
    }

    fn backward_of(&self, kind: usize, rows: u64) -> u64 {
        scale(self.model.backward_of(kind, rows), self.ppm, PARTS)
    }

    fn least_per_row(&self, kind: usize, most_rows: u64) -> u64 {
        scale(self.model.least_per_row(kind, most_rows), self.ppm, PARTS)
    }
}

/// Measured times on one device, carried over to another by the ratio of their estimates.
struct Scaled<'a> {
    measured: ProfiledCosts,
    from: AnalyticCosts<'a>,
    to: AnalyticCosts<'a>,
    /// A node of each kind of the measured costs, which may differ in size from the others.
    kind_of: Vec<usize>,
    kinds: Vec<(usize, NodeId)>,
}

impl<'a> Scaled<'a> {
    fn new(
        graph: &Graph,
        measured: &ProfiledCosts,
        from: AnalyticCosts<'a>,
        to: AnalyticCosts<'a>,
    ) -> Self {
        let mut numbers = std::collections::BTreeMap::new();
        let mut kinds = Vec::new();
        let kind_of = graph.node_ids().map(|id| {
            let key = (measured.kind(id), from.kind(id));
            *numbers.entry(key).or_insert_with(|| {
                kinds.push((key.0, id));
                kinds.len() - 1
            })
        });
        let kind_of = kind_of.collect();
        Self { measured: measured.clone(), from, to, kind_of, kinds }
    }
}

impl CostModel for Scaled<'_> {
    fn num_kinds(&self) -> usize {
        self.kinds.len()
    }

    fn kind(&self, node: NodeId) -> usize {
        self.kind_of[node.index()]
    }

    fn forward_of(&self, kind: usize, rows: u64) -> u64 {
        let (measured, node) = self.kinds[kind];
        let (from, to) = (self.from.forward_ns(node, rows), self.to.forward_ns(node, rows));
        scale(self.measured.forward_of(measured, rows), to, from)
    }

    fn backward_of(&self, kind: usize, rows: u64) -> u64 {
        let (measured, node) = self.kinds[kind];
        let (from, to) = (self.from.forward_ns(node, rows), self.to.forward_ns(node, rows));
        scale(self.measured.backward_of(measured, rows), to, from)
    }

    fn least_per_row(&self, kind: usize, most_rows: u64) -> u64 {
        // The ratio changes with the rows between that of arithmetic and that of traffic.
        let (measured, node) = self.kinds[kind];
        let rows = [1, most_rows.max(1)];
        let ratio = rows.map(|rows| {
            scale(1_000_000, self.to.forward_ns(node, rows), self.from.forward_ns(node, rows))
        });
        let least = self.measured.least_per_row(measured, most_rows);
        scale(least, ratio[0].min(ratio[1]) / 2, 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use rannc_graph::{NodeId, testing};

    use super::DeviceCosts;
    use crate::{Cluster, Profile, Sample};

    #[test]
    fn devices_of_a_class_are_alike() {
        let text = "devices = [{kind = \"cpu\", count = 2}, {kind = \"a100-40gb\"}, {kind = \"cpu\", node = 1}]";
        let classes = Cluster::from_toml(text).unwrap().classes(4);
        assert_eq!(classes.of_rank, [0, 0, 1, 0]);
        assert_eq!(classes.devices.len(), 2);
    }

    #[test]
    fn crowded_devices_are_slower() {
        let graph = testing::chain(1, 64);
        let text = "devices = [{kind = \"cpu\", count = 3}]\n[[shared]]\ndevices = [0, 1, 2]\ncapacity_ppm = 2000000";
        let cluster = Cluster::from_toml(text).unwrap();
        let costs = DeviceCosts::new(&graph, None, &cluster.classes(3).devices).unwrap();
        let crowded = costs.crowded(&cluster).unwrap();
        let [alone, together] = [&costs, &crowded].map(|c| c.class(0).forward_ns(NodeId(0), 8));
        assert_eq!(together, alone * 3 / 2);
        assert!(costs.crowded(&Cluster::parse("cpu:3").unwrap()).is_none());
    }

    #[test]
    fn other_kinds_are_scaled_by_their_data_sheets() {
        let graph = testing::chain(1, 4096);
        let text = "devices = [{kind = \"a100-40gb\"}, {kind = \"h100-80gb\"}]";
        let classes = Cluster::from_toml(text).unwrap().classes(2);
        let mut profile = Profile { device: "a100-40gb".into(), ..Profile::default() };
        let samples = vec![Sample { rows: 4096, forward_ns: 1_000_000, backward_ns: 2_000_000 }];
        profile.entries.insert(graph.nodes()[0].signature.clone(), samples);
        let costs = DeviceCosts::new(&graph, Some(&profile), &classes.devices).unwrap();
        let [a100, h100] = [0, 1].map(|class| costs.class(class).forward_ns(NodeId(0), 4096));
        assert_eq!(a100, 1_000_000);
        assert!((280_000..300_000).contains(&h100), "19.5 to 67 TFLOP/s: {h100}");
    }
}
