//! The machines to plan for: devices, their memory and speed, and what joins them.
//!
//! A cluster comes from a short text (`a100-40gb:2x8`: two nodes of eight), or from a TOML or JSON
//! file that lists devices:
//!
//! ```toml
//! name = "lab"
//! [[devices]]
//! kind = "v100-32gb"      # a preset fills in what is not given
//! count = 4               # devices like this one, 1 if not given
//! node = 0
//! [inter_node]            # both links default to those of the first device's preset
//! latency_ns = 30000
//! bytes_per_second = 1250000000
//! [[shared]]              # devices that compute with the same cores
//! devices = [0, 1, 2, 3]
//! capacity_ppm = 2000000  # two of them at full speed, or all at half
//! ```
//!
//! # Where the presets come from
//!
//! Memory is what torch reports as usable in total. Compute is the data sheet's peak for float32
//! without tensor cores, which is what torch uses by default (give a higher number for TF32), and for
//! operands of 16 bits the peak of dense tensor cores. Bandwidths are the data sheets' too: `NVLink` in one direction (NVIDIA V100 SXM2,
//! A100 SXM4, H100 SXM5), between nodes one device's share of the network cards of a DGX-1, DGX A100
//! or DGX H100. Latencies are the order of magnitude of NCCL. `cpu` is a few cores of a server with
//! processes joined by gloo.

use serde::{Deserialize, Serialize};

use crate::profile::scale;
use crate::{CostError, Link};

const GIB: u64 = 1 << 30;
const GIGA: u64 = 1_000_000_000;

/// A longer name than this is surely a mistake; each device has one.
const MAX_NAME_BYTES: usize = 256;

const PARTS: u64 = 1_000_000;
/// A larger capacity than this, a million devices, is surely a mistake.
const MAX_CAPACITY_PPM: u64 = PARTS * PARTS;

/// The kinds with built-in numbers.
pub(crate) const PRESET_NAMES: [&str; 5] =
    ["v100-32gb", "a100-40gb", "a100-80gb", "h100-80gb", "cpu"];

/// One device, driven by one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// The kind's name.
    pub kind: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Floating-point operations per second at best.
    pub flops_per_second: u64,
    /// The same for operands of 16 bits, as tensor cores take them.
    pub half_flops_per_second: u64,
    /// Bytes per second between the device and its memory.
    pub memory_bytes_per_second: u64,
    /// The node it sits in.
    pub node: u32,
}

/// Devices that compute with the same cores, as processes on one CPU do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// The devices, by rank.
    pub devices: Vec<u32>,
    /// How many of them can compute at full speed at a time, in millionths.
    pub capacity_ppm: u64,
}

/// The devices by rank, and the two kinds of links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cluster {
    /// For people.
    pub name: String,
    /// The device of each rank.
    pub devices: Vec<Device>,
    /// Between devices of one node.
    pub intra_node: Link,
    /// Between devices of different nodes.
    pub inter_node: Link,
    /// Devices that are not as fast when others compute; each in one group at most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shared: Vec<Shared>,
}

struct Preset {
    memory_bytes: u64,
    flops_per_second: u64,
    half_flops_per_second: u64,
    memory_bytes_per_second: u64,
    intra_node: Link,
    inter_node: Link,
}

const fn gpu(
    memory: u64,
    gigaflops: u64,
    half_gigaflops: u64,
    memory_gb: u64,
    nvlink_gb: u64,
    network_mb: u64,
) -> Preset {
    Preset {
        memory_bytes: memory,
        flops_per_second: gigaflops * GIGA,
        half_flops_per_second: half_gigaflops * GIGA,
        memory_bytes_per_second: memory_gb * GIGA,
        intra_node: Link::new(8_000, nvlink_gb * GIGA),
        inter_node: Link::new(20_000, network_mb * 1_000_000),
    }
}

fn preset(kind: &str) -> Result<Preset, CostError> {
    Ok(match kind {
        "v100-32gb" => gpu(34_089_730_048, 15_700, 125_000, 900, 150, 6_250),
        "a100-40gb" => gpu(42_506_321_920, 19_500, 312_000, 1_555, 300, 25_000),
        "a100-80gb" => gpu(79 * GIB, 19_500, 312_000, 2_039, 300, 25_000),
        "h100-80gb" => gpu(79 * GIB, 67_000, 989_000, 3_350, 450, 50_000),
        "cpu" => Preset {
            memory_bytes: 16 * GIB,
            flops_per_second: 100 * GIGA,
            half_flops_per_second: 100 * GIGA,
            memory_bytes_per_second: 20 * GIGA,
            intra_node: Link::new(50_000, 2 * GIGA),
            inter_node: Link::new(100_000, GIGA),
        },
        _ => return Err(CostError::UnknownPreset { found: kind.to_owned() }),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    name: String,
    devices: Vec<FileDevice>,
    intra_node: Option<Link>,
    inter_node: Option<Link>,
    #[serde(default)]
    shared: Vec<Shared>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDevice {
    kind: String,
    #[serde(default = "one")]
    count: u32,
    memory_bytes: Option<u64>,
    flops_per_second: Option<u64>,
    half_flops_per_second: Option<u64>,
    memory_bytes_per_second: Option<u64>,
    #[serde(default)]
    node: u32,
}

fn one() -> u32 {
    1
}

impl Cluster {
    /// More devices than this are surely a mistake.
    pub const MAX_DEVICES: u32 = 1 << 16;

    /// `num_nodes` nodes of `devices_per_node` devices of a preset kind.
    ///
    /// # Errors
    ///
    /// [`CostError::UnknownPreset`], or [`CostError::BadCluster`] when there is no device.
    pub fn uniform(kind: &str, num_nodes: u32, devices_per_node: u32) -> Result<Self, CostError> {
        let numbers = preset(kind)?;
        let name = format!("{kind}:{num_nodes}x{devices_per_node}");
        refuse_too_many(&name, u64::from(num_nodes) * u64::from(devices_per_node))?;
        let device = |node| Device {
            kind: kind.to_owned(),
            memory_bytes: numbers.memory_bytes,
            flops_per_second: numbers.flops_per_second,
            half_flops_per_second: numbers.half_flops_per_second,
            memory_bytes_per_second: numbers.memory_bytes_per_second,
            node,
        };
        let devices = (0..num_nodes)
            .flat_map(|node| (0..devices_per_node).map(move |_| node))
            .map(device)
            .collect();
        let (intra_node, inter_node) = (numbers.intra_node, numbers.inter_node);
        Self { name, devices, intra_node, inter_node, shared: Vec::new() }.checked()
    }

    /// Reads `kind:nodesxdevices`, `kind:devices` (one node) or `kind` (one device).
    ///
    /// # Errors
    ///
    /// [`CostError::ClusterText`], [`CostError::UnknownPreset`] or [`CostError::BadCluster`].
    pub fn parse(text: &str) -> Result<Self, CostError> {
        let bad = || CostError::ClusterText { found: text.to_owned() };
        let count = |digits: &str| match digits.parse::<u32>() {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(bad()),
        };
        let (kind, size) = text.trim().split_once(':').unwrap_or((text.trim(), "1x1"));
        let (nodes, devices) = size.split_once('x').unwrap_or(("1", size));
        Self::uniform(kind, count(nodes)?, count(devices)?)
    }

    /// Reads the TOML form.
    ///
    /// # Errors
    ///
    /// [`CostError::Toml`], [`CostError::UnknownPreset`] or [`CostError::BadCluster`].
    pub fn from_toml(text: &str) -> Result<Self, CostError> {
        Self::from_file(toml::from_str(text)?)
    }

    /// Reads the JSON form.
    ///
    /// # Errors
    ///
    /// [`CostError::Json`], [`CostError::UnknownPreset`] or [`CostError::BadCluster`].
    pub fn from_json(text: &str) -> Result<Self, CostError> {
        let file = serde_json::from_str(text)
            .map_err(|source| CostError::Json { what: "cluster", source })?;
        Self::from_file(file)
    }

    /// The JSON form, every number given.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a cluster holds nothing that JSON cannot say")
    }

    /// The least memory that any of the first `num_devices` devices has.
    pub fn least_memory_bytes(&self, num_devices: usize) -> u64 {
        let devices = self.devices.iter().take(num_devices);
        devices.map(|device| device.memory_bytes).min().unwrap_or_default()
    }

    fn from_file(file: File) -> Result<Self, CostError> {
        let counts = file.devices.iter().map(|entry| u64::from(entry.count));
        refuse_too_many(&file.name, counts.sum())?;
        refuse_long_names(&file)?;
        refuse_far_nodes(&file)?;
        let mut devices = Vec::new();
        for entry in &file.devices {
            let device = entry.device()?;
            devices.extend((0..entry.count).map(|_| device.clone()));
        }
        let link =
            |given: Option<Link>, of: fn(&Preset) -> Link| match (given, file.devices.first()) {
                (Some(link), _) => Ok(link),
                (None, Some(first)) => preset(&first.kind).map(|numbers| of(&numbers)),
                (None, None) => Ok(Link::new(0, 1)),
            };
        let intra_node = link(file.intra_node, |numbers| numbers.intra_node)?;
        let inter_node = link(file.inter_node, |numbers| numbers.inter_node)?;
        Self { name: file.name, devices, intra_node, inter_node, shared: file.shared }.checked()
    }

    fn checked(self) -> Result<Self, CostError> {
        let links = [("intra_node", &self.intra_node), ("inter_node", &self.inter_node)];
        let slow = links.into_iter().find(|(_, link)| link.bytes_per_second == 0);
        let idle = self.devices.iter().zip(0u32..).find_map(|(device, rank)| {
            device.lacks().map(|field| (rank, device.kind.as_str(), field))
        });
        let problem = if self.devices.is_empty() {
            "it has no devices, needed at least one".to_owned()
        } else if let Some((field, _)) = slow {
            format!("`{field}` has 0 for `bytes_per_second`, needed at least 1")
        } else if let Some((rank, kind, field)) = idle {
            format!("device {rank} (`{kind}`) has 0 for `{field}`, needed at least 1")
        } else if let Some(problem) = self.badly_shared() {
            problem
        } else {
            return Ok(self);
        };
        Err(CostError::BadCluster { name: self.name, problem })
    }

    /// What is wrong with the groups of devices that share cores.
    fn badly_shared(&self) -> Option<String> {
        let mut group_of: Vec<Option<usize>> = vec![None; self.devices.len()];
        for (index, group) in self.shared.iter().enumerate() {
            if !(1..=MAX_CAPACITY_PPM).contains(&group.capacity_ppm) {
                let (found, most) = (group.capacity_ppm, MAX_CAPACITY_PPM);
                return Some(format!(
                    "`shared` {index} has {found} for `capacity_ppm`, needed 1 to {most}"
                ));
            }
            for &rank in &group.devices {
                let Some(known) = group_of.get_mut(rank as usize) else {
                    let most = self.devices.len() - 1;
                    return Some(format!(
                        "`shared` {index} names device {rank}, needed 0 to {most}"
                    ));
                };
                if let Some(other) = known.replace(index) {
                    return Some(format!(
                        "device {rank} is in `shared` {other} and again in {index}, needed in one"
                    ));
                }
            }
        }
        None
    }

    /// Leaves out all but the first `num_devices` devices.
    pub fn truncate(&mut self, num_devices: usize) {
        self.devices.truncate(num_devices);
        for group in &mut self.shared {
            group.devices.retain(|&rank| (rank as usize) < num_devices);
        }
        self.shared.retain(|group| !group.devices.is_empty());
    }

    /// How many times longer these devices take when all of them compute, in millionths.
    pub fn crowding_ppm(&self, ranks: &[u32]) -> u64 {
        let slowed = self.shared.iter().map(|group| {
            let busy = ranks.iter().filter(|rank| group.devices.contains(rank)).count() as u64;
            scale(busy * PARTS, PARTS, group.capacity_ppm)
        });
        slowed.fold(PARTS, u64::max)
    }
}

fn refuse_too_many(name: &str, num_devices: u64) -> Result<(), CostError> {
    if num_devices <= u64::from(Cluster::MAX_DEVICES) {
        return Ok(());
    }
    let most = Cluster::MAX_DEVICES;
    let problem = format!("it has {num_devices} devices, needed at most {most}");
    Err(CostError::BadCluster { name: name.to_owned(), problem })
}

fn refuse_long_names(file: &File) -> Result<(), CostError> {
    let kinds = file.devices.iter().zip(0u32..);
    let kinds = kinds.map(|(entry, index)| (format!("the kind of `devices` {index}"), &entry.kind));
    let long = [("its name".to_owned(), &file.name)]
        .into_iter()
        .chain(kinds)
        .find(|(_, name)| name.len() > MAX_NAME_BYTES);
    let Some((place, name)) = long else { return Ok(()) };
    let problem = format!("{place} has {} bytes, needed at most {MAX_NAME_BYTES}", name.len());
    let shown = file.name.chars().take(32).collect();
    Err(CostError::BadCluster { name: shown, problem })
}

fn refuse_far_nodes(file: &File) -> Result<(), CostError> {
    let far = file.devices.iter().position(|entry| entry.node >= Cluster::MAX_DEVICES);
    let Some(index) = far else { return Ok(()) };
    let (node, most) = (file.devices[index].node, Cluster::MAX_DEVICES - 1);
    let problem = format!("`devices` {index} has {node} for `node`, needed 0 to {most}");
    Err(CostError::BadCluster { name: file.name.clone(), problem })
}

impl Device {
    /// The number without which nothing runs on it, where it is 0.
    fn lacks(&self) -> Option<&'static str> {
        let numbers = [
            ("memory_bytes", self.memory_bytes),
            ("flops_per_second", self.flops_per_second),
            ("half_flops_per_second", self.half_flops_per_second),
            ("memory_bytes_per_second", self.memory_bytes_per_second),
        ];
        numbers.into_iter().find(|&(_, number)| number == 0).map(|(field, _)| field)
    }
}

impl FileDevice {
    fn device(&self) -> Result<Device, CostError> {
        let given = (self.memory_bytes, self.flops_per_second, self.memory_bytes_per_second);
        let (memory_bytes, flops_per_second, memory_bytes_per_second) =
            if let (Some(memory), Some(flops), Some(bandwidth)) = given {
                (memory, flops, bandwidth)
            } else {
                let numbers = preset(&self.kind)?;
                (
                    given.0.unwrap_or(numbers.memory_bytes),
                    given.1.unwrap_or(numbers.flops_per_second),
                    given.2.unwrap_or(numbers.memory_bytes_per_second),
                )
            };
        // Whoever gives a speed of their own for a preset means all operands, unless they say so.
        let known = if self.flops_per_second.is_none() { preset(&self.kind).ok() } else { None };
        let half = known.map_or(flops_per_second, |numbers| numbers.half_flops_per_second);
        Ok(Device {
            kind: self.kind.clone(),
            memory_bytes,
            flops_per_second,
            half_flops_per_second: self.half_flops_per_second.unwrap_or(half),
            memory_bytes_per_second,
            node: self.node,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Cluster, PRESET_NAMES};

    #[test]
    fn every_preset_has_numbers_and_round_trips() {
        for kind in PRESET_NAMES {
            let cluster = Cluster::parse(&format!("{kind}:2x3")).unwrap();
            assert_eq!(cluster.devices.len(), 6);
            assert_eq!(cluster.devices[5].node, 1);
            assert_eq!(Cluster::from_json(&cluster.to_json()).unwrap(), cluster);
        }
        assert_eq!(Cluster::parse("cpu").unwrap(), Cluster::parse("cpu:1").unwrap());
    }

    #[test]
    fn bad_texts_say_what_is_needed() {
        let help = |text: &str| {
            let error = Cluster::parse(text).unwrap_err();
            format!("{error}\nhint: {}", error.help().unwrap())
        };
        insta::assert_snapshot!(help("a100-40gb:0x8"), @r"
        `a100-40gb:0x8` does not describe a cluster
        hint: write `kind:nodesxdevices`, for example `a100-40gb:2x8`; the kinds are `v100-32gb`, `a100-40gb`, `a100-80gb`, `h100-80gb`, `cpu`
        ");
        insta::assert_snapshot!(help("tpu:1x8"), @r"
        there is no device preset `tpu`
        hint: use one of `v100-32gb`, `a100-40gb`, `a100-80gb`, `h100-80gb`, `cpu`, or give all numbers in a cluster file
        ");
    }

    #[test]
    fn toml_fills_in_from_presets() {
        let text = r#"
            name = "lab"
            [[devices]]
            kind = "v100-32gb"
            count = 2
            [[devices]]
            kind = "mine"
            memory_bytes = 100
            flops_per_second = 200
            memory_bytes_per_second = 300
            node = 1
            [inter_node]
            latency_ns = 7
            bytes_per_second = 9
        "#;
        let cluster = Cluster::from_toml(text).unwrap();
        assert_eq!(cluster.devices.len(), 3);
        assert_eq!(cluster.least_memory_bytes(3), 100);
        assert_eq!(cluster.link(0, 2).latency_ns, 7);
        assert_eq!(cluster.intra_node, Cluster::parse("v100-32gb").unwrap().intra_node);
        assert!(Cluster::from_toml("devices = [{kind = \"mine\"}]").is_err());
    }

    #[test]
    fn devices_may_share_cores() {
        let text = |shared: &str| format!("devices = [{{kind = \"cpu\", count = 4}}]\n{shared}");
        let two = "[[shared]]\ndevices = [0, 1, 2]\ncapacity_ppm = 2000000";
        let cluster = Cluster::from_toml(&text(two)).unwrap();
        assert_eq!(Cluster::from_json(&cluster.to_json()).unwrap(), cluster);
        let crowding = |ranks: &[u32]| cluster.crowding_ppm(ranks);
        assert_eq!(crowding(&[0, 1, 2, 3]), 1_500_000);
        assert_eq!([crowding(&[0, 1]), crowding(&[3]), crowding(&[])], [1_000_000; 3]);
        let mut fewer = cluster.clone();
        fewer.truncate(2);
        assert_eq!(fewer.shared[0].devices, [0, 1]);
        let refused = |shared: &str| Cluster::from_toml(&text(shared)).unwrap_err().to_string();
        let found = [
            refused("[[shared]]\ndevices = [4]\ncapacity_ppm = 1"),
            refused("[[shared]]\ndevices = [1]\ncapacity_ppm = 0"),
            refused(&format!("{two}\n{two}")),
        ];
        insta::assert_snapshot!(found.join("\n"), @r"
        the cluster `` cannot be used: `shared` 0 names device 4, needed 0 to 3
        the cluster `` cannot be used: `shared` 0 has 0 for `capacity_ppm`, needed 1 to 1000000000000
        the cluster `` cannot be used: device 0 is in `shared` 0 and again in 1, needed in one
        ");
    }

    #[test]
    fn unusable_clusters_name_the_place() {
        let refused = |text: &str| Cluster::from_toml(text).unwrap_err().to_string();
        let long = format!("devices = [{{kind = \"{}\"}}]", "k".repeat(1 << 20));
        let found = [
            refused("devices = []"),
            refused("devices = [{kind = \"cpu\"}, {kind = \"cpu\", flops_per_second = 0}]"),
            refused(
                "devices = [{kind = \"cpu\"}]\n[intra_node]\nlatency_ns = 1\nbytes_per_second = 0",
            ),
            refused("devices = [{kind = \"cpu\", count = 4294967295}]"),
            refused("devices = [{kind = \"cpu\", node = 4294967295}]"),
            refused(&long),
            Cluster::parse("cpu:65536x65536").unwrap_err().to_string(),
            refused("devices = [{kind = \"cpu\", count = 4294967296}]"),
        ];
        insta::assert_snapshot!(found.join("\n"), @r#"
        the cluster `` cannot be used: it has no devices, needed at least one
        the cluster `` cannot be used: device 1 (`cpu`) has 0 for `flops_per_second`, needed at least 1
        the cluster `` cannot be used: `intra_node` has 0 for `bytes_per_second`, needed at least 1
        the cluster `` cannot be used: it has 4294967295 devices, needed at most 65536
        the cluster `` cannot be used: `devices` 0 has 4294967295 for `node`, needed 0 to 65535
        the cluster `` cannot be used: the kind of `devices` 0 has 1048576 bytes, needed at most 256
        the cluster `cpu:65536x65536` cannot be used: it has 4294967296 devices, needed at most 65536
        the cluster file is not valid: TOML parse error at line 1, column 35
          |
        1 | devices = [{kind = "cpu", count = 4294967296}]
          |                                   ^^^^^^^^^^
        invalid value: integer `4294967296`, expected u32
        "#);
    }
}
