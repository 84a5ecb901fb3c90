//! Models on clusters: what the suite compares plans on.

use rannc_cost::{Cluster, Link};
use rannc_graph::Graph;
use rannc_plan::Options;

use crate::models::{
    Transformer, bert, densenet, encoder_decoder, gnmt, gpt, mixture_of_experts, mlp, nasnet,
    recommender, unet, wide_resnet,
};

/// Ten gigabit Ethernet between nodes.
const ETHERNET: Link = Link::new(50_000, 1_250_000_000);
/// PCI Express between the devices of a node.
const PCI: Link = Link::new(10_000, 12_000_000_000);

const WIDE_RESNET_50: [i64; 4] = [3, 4, 6, 3];
const WIDE_RESNET_101: [i64; 4] = [3, 4, 23, 3];
const WIDE_RESNET_152: [i64; 4] = [3, 8, 36, 3];

/// A model, a cluster and a batch.
#[derive(Debug)]
pub struct Case {
    /// Unique, for tables and for choosing it.
    pub name: &'static str,
    /// What it is trained on.
    pub cluster: Cluster,
    /// Rows of the global batch.
    pub batch_rows: u64,
    model: fn() -> Graph,
}

impl Case {
    /// The model.
    pub fn graph(&self) -> Graph {
        (self.model)()
    }

    /// The planner's options for it: the default ones.
    pub fn options(&self) -> Options {
        Options { batch_size: self.batch_rows, ..Options::default() }
    }

    /// Whether the devices or the nodes differ.
    pub fn is_mixed(&self) -> bool {
        self.name.starts_with("mixed")
    }
}

/// Every case, the small ones of a kind first.
pub fn all() -> Vec<Case> {
    let mut cases = transformers();
    cases.extend(convolutions());
    cases.extend(others());
    cases.extend(mixed());
    cases
}

fn case(name: &'static str, cluster: &str, batch_rows: u64, model: fn() -> Graph) -> Case {
    let cluster = Cluster::parse(cluster).expect("the cases name presets");
    Case { name, cluster, batch_rows, model }
}

impl Case {
    /// With Ethernet between nodes and PCI Express within.
    fn slow(mut self) -> Self {
        (self.cluster.intra_node, self.cluster.inter_node) = (PCI, ETHERNET);
        self.cluster.name += ", slow links";
        self
    }

    /// With less memory on every device.
    fn tight(mut self, gib: u64) -> Self {
        for device in &mut self.cluster.devices {
            device.memory_bytes = gib << 30;
        }
        self.cluster.name = format!("{}, {gib} GiB", self.cluster.name);
        self
    }
}

fn transformers() -> Vec<Case> {
    vec![
        case("gpt 124M, 4", "a100-40gb:1x4", 64, || gpt(Transformer::new(12, 768, 1024))),
        case("gpt 1.5B, 8 tight", "a100-40gb:1x8", 64, || gpt(Transformer::new(48, 1600, 1024)))
            .tight(16),
        case("gpt 6.7B, 32", "a100-80gb:4x8", 128, || gpt(Transformer::new(32, 4096, 2048))),
        case("gpt 22B, 64 slow", "v100-32gb:8x8", 256, || gpt(Transformer::new(48, 6144, 2048)))
            .slow(),
        case("gpt 100B, 512", "h100-80gb:64x8", 1024, || gpt(Transformer::new(80, 10_240, 2048))),
        case("gpt 175B, 1024", "a100-80gb:128x8", 1536, || gpt(Transformer::new(96, 12_288, 2048))),
        case("bert large, 8", "v100-32gb:1x8", 256, || bert(Transformer::new(24, 1024, 512))),
        case("bert large, 16 slow", "v100-32gb:4x4", 256, || bert(Transformer::new(24, 1024, 512)))
            .slow(),
        case("bert large, 8 tight", "v100-32gb:1x8", 256, || bert(Transformer::new(24, 1024, 512)))
            .tight(4),
        case("bert 4.9B, 32", "v100-32gb:4x8", 256, || bert(Transformer::new(96, 2048, 512))),
        case("bert 100B, 256", "a100-40gb:32x8", 512, || bert(Transformer::new(124, 8192, 512))),
        case("t5 0.7B, 16", "a100-40gb:2x8", 256, || {
            encoder_decoder(Transformer::new(24, 1024, 512))
        }),
        case("t5 0.7B, 16 tight", "a100-40gb:4x4", 256, || {
            encoder_decoder(Transformer::new(24, 1024, 512))
        })
        .tight(8),
        case("t5 11B, 64", "v100-32gb:8x8", 256, || {
            encoder_decoder(Transformer::new(24, 4096, 512))
        }),
        case("moe 16 experts, 16", "a100-40gb:2x8", 128, || {
            mixture_of_experts(Transformer::new(12, 1024, 1024), 16)
        }),
        case("moe 16 experts, 16 slow", "v100-32gb:2x8", 128, || {
            mixture_of_experts(Transformer::new(12, 1024, 1024), 16)
        })
        .slow()
        .tight(12),
        case("moe 64 experts, 64", "a100-80gb:8x8", 256, || {
            mixture_of_experts(Transformer::new(32, 2048, 1024), 64)
        }),
    ]
}

fn convolutions() -> Vec<Case> {
    vec![
        case("resnet50 x2, 4", "v100-32gb:1x4", 256, || wide_resnet(WIDE_RESNET_50, 2, 224)),
        case("resnet101 x4, 8 slow", "v100-32gb:2x4", 256, || wide_resnet(WIDE_RESNET_101, 4, 224))
            .slow(),
        case("resnet101 x4, 8 tight", "v100-32gb:1x8", 256, || {
            wide_resnet(WIDE_RESNET_101, 4, 224)
        })
        .tight(5),
        case("resnet152 x8, 32", "v100-32gb:4x8", 512, || wide_resnet(WIDE_RESNET_152, 8, 224)),
        case("unet, 8", "a100-40gb:1x8", 128, || unet(4, 64, 256)),
        case("unet, 16 tight", "v100-32gb:2x8", 64, || unet(5, 128, 512)).tight(8),
        case("unet, 16 slow", "v100-32gb:4x4", 128, || unet(5, 64, 256)).slow(),
        case("densenet, 4", "v100-32gb:1x4", 256, || densenet(32, 224)),
        case("nasnet, 8 slow", "v100-32gb:2x4", 128, || nasnet(18, 96, 224)).slow(),
    ]
}

fn others() -> Vec<Case> {
    vec![
        case("gnmt, 4", "v100-32gb:1x4", 256, || gnmt(8, 1024, 50, 10)),
        case("gnmt wide, 64 tight", "v100-32gb:8x8", 1024, || gnmt(16, 2048, 64, 16)).tight(16),
        case("recommender, 16", "v100-32gb:2x8", 65_536, || recommender(64, 1_000_000, 64, 8)),
        case("recommender, 16 slow", "v100-32gb:4x4", 65_536, || recommender(64, 1_000_000, 64, 8))
            .slow(),
        case("recommender, 32 tight", "a100-40gb:4x8", 65_536, || {
            recommender(26, 10_000_000, 128, 8)
        }),
        case("mlp 2.5B, 8", "a100-40gb:1x8", 1024, || mlp(100, 5000)),
        case("mlp 2.5B, 16 slow", "a100-40gb:4x4", 1024, || mlp(100, 5000)).slow(),
    ]
}

fn mixed() -> Vec<Case> {
    let of = |name, batch_rows, parts: &[(&str, u32, u32)], model| {
        let entry = |&(kind, count, node): &(&str, u32, u32)| {
            format!("[[devices]]\nkind = \"{kind}\"\ncount = {count}\nnode = {node}\n")
        };
        let text: String = parts.iter().map(entry).collect();
        let name_of = |&(kind, count, _): &(&str, u32, u32)| format!("{kind}:{count}");
        let names: Vec<String> = parts.iter().map(name_of).collect();
        let mut cluster = Cluster::from_toml(&text).expect("the cases name presets");
        cluster.name = names.join(" + ");
        Case { name, cluster, batch_rows, model }
    };
    vec![
        of("mixed bert large, 8", 256, &[("a100-40gb", 4, 0), ("v100-32gb", 4, 1)], || {
            bert(Transformer::new(24, 1024, 512))
        }),
        of("mixed gpt 1.5B, 16", 128, &[("h100-80gb", 8, 0), ("v100-32gb", 8, 1)], || {
            gpt(Transformer::new(48, 1600, 1024))
        }),
        of("mixed resnet101 x4, 8", 256, &[("v100-32gb", 2, 0), ("a100-80gb", 6, 1)], || {
            wide_resnet(WIDE_RESNET_101, 4, 224)
        }),
        of(
            "mixed gpt 6.7B, 24",
            96,
            &[("a100-80gb", 8, 0), ("a100-80gb", 8, 1), ("a100-40gb", 8, 2)],
            || gpt(Transformer::new(32, 4096, 2048)),
        ),
        of(
            "mixed nodes t5 0.7B, 14",
            256,
            &[("a100-40gb", 8, 0), ("a100-40gb", 4, 1), ("a100-40gb", 2, 2)],
            || encoder_decoder(Transformer::new(24, 1024, 512)),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::all;

    #[test]
    fn cases_have_unique_names_and_cover_what_they_should() {
        let cases = all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases.len());
        assert!(cases.len() >= 24);
        assert!(cases.iter().filter(|case| case.is_mixed()).count() >= 3);
        let sizes: Vec<usize> = cases.iter().map(|case| case.cluster.devices.len()).collect();
        assert_eq!((sizes.iter().min(), sizes.iter().max()), (Some(&4), Some(&1024)));
    }
}
