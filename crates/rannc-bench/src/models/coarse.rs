//! Coarse graphs with the shapes on which earlier planners were timed: one operator for each layer.

use rannc_graph::{Graph, ValueId};

use super::layers::cross_entropy;
use crate::Builder;

/// A chain of 101 layers, 96 of them transformer layers of the same size (Piper's BERT-96).
pub fn piper_bert96() -> Graph {
    let (tokens, hidden) = (512, 1024);
    let layer = Layer {
        width: tokens * hidden,
        parameters: 12 * hidden * hidden,
        flops: 24 * tokens * hidden * hidden + 4 * tokens * tokens * hidden,
        kept_bytes: 16 * 4 * tokens * hidden,
    };
    chain_of(
        "BERT-96",
        std::iter::repeat_n(layer, 100)
            .enumerate()
            .map(|(index, layer)| match index {
                0 | 97..=99 => {
                    Layer { parameters: hidden * hidden, flops: layer.flops / 12, ..layer }
                }
                _ => layer,
            })
            .collect(),
    )
}

/// `length` equal layers of `width x width` parameters for `tokens` tokens.
pub fn chain(length: usize, width: i64, tokens: i64) -> Graph {
    let layer = Layer {
        width: tokens * width,
        parameters: width * width,
        flops: 2 * tokens * width * width,
        kept_bytes: 4 * tokens * width,
    };
    chain_of("Chain", vec![layer; length])
}

/// 430 layers in a chain of which most also read several earlier ones (`DenseNet-121` as `PipeDream`
/// profiled it).
pub fn densenet430() -> Graph {
    let mut builder = Builder::new("DenseNet-430");
    let input = builder.input("x", &[3 * 224 * 224]);
    let target = builder.indices("target", &[]);
    let mut made = vec![input];
    for index in 0..429_usize {
        let level = index / 108;
        let layer = Layer {
            width: (32 * 56 * 56) >> level,
            parameters: 16_000 << (2 * level),
            flops: 40_000_000,
            kept_bytes: (512 * 56 * 56) >> level,
        };
        builder.module(format!("layers.{index}"));
        let mut read = vec![made[index]];
        // Every sixth layer gathers the results of its dense block.
        if index % 6 == 5 {
            let first = (index / 108) * 108;
            read.extend((first..index).rev().skip(1).step_by(6).map(|earlier| made[earlier]));
        }
        made.push(layer.add_to(&mut builder, &read));
    }
    let loss = cross_entropy(&mut builder, made[429], target);
    builder.finish(&[loss])
}

/// 78 operators in a grid of 7 times 11 that only order their neighbours, and the loss: the number of
/// ways to cut it in two is astronomical.
pub fn gnmt78() -> Graph {
    let (layers, pieces) = (7_usize, 11_usize);
    let mut builder = Builder::new("GNMT-78");
    let target = builder.indices("target", &[]);
    let layer = Layer {
        width: 1024 * 5,
        parameters: 8 * 1024 * 1024,
        flops: 16 * 1024 * 1024 * 5,
        kept_bytes: 24 * 1024 * 5,
    };
    let mut below: Vec<ValueId> =
        (0..pieces).map(|piece| builder.input(&format!("x{piece}"), &[layer.width])).collect();
    for index in 0..layers {
        builder.module(format!("layers.{index}"));
        let weight = builder.parameter("weight", &[layer.parameters]);
        let mut before = None;
        for value in &mut below {
            let mut read = vec![*value];
            read.extend(before);
            read.push(weight);
            let op = builder.op("piece", &read).flops(layer.flops).keeps_bytes(layer.kept_bytes);
            *value = op.makes(&[layer.width]);
            before = Some(*value);
        }
    }
    builder.module("loss");
    let mut read = below;
    read.push(target);
    let loss = builder.op("aten.cross_entropy_loss", &read).flops(1024).makes_sum();
    builder.finish(&[loss])
}

/// A layer as one operator; sizes are for one row.
#[derive(Clone, Copy, Debug)]
struct Layer {
    width: i64,
    parameters: i64,
    flops: i64,
    kept_bytes: i64,
}

impl Layer {
    fn add_to(self, builder: &mut Builder, read: &[ValueId]) -> ValueId {
        let weight = builder.parameter("weight", &[self.parameters]);
        let mut read = read.to_vec();
        read.push(weight);
        builder
            .op("layer", &read)
            .flops(self.flops)
            .keeps_bytes(self.kept_bytes)
            .makes(&[self.width])
    }
}

fn chain_of(name: &str, layers: Vec<Layer>) -> Graph {
    let mut builder = Builder::new(name);
    let mut x = builder.input("x", &[layers[0].width]);
    let target = builder.indices("target", &[]);
    for (index, layer) in layers.into_iter().enumerate() {
        builder.module(format!("layers.{index}"));
        x = layer.add_to(&mut builder, &[x]);
    }
    let loss = cross_entropy(&mut builder, x, target);
    builder.finish(&[loss])
}
