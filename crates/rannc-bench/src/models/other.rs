//! Recommenders, recurrent translation, plain layers.

use rannc_graph::{Graph, ValueId};

use super::layers::{add, concatenate, cross_entropy, dropout, embedding, linear, relu};
use crate::Builder;

/// `layers` square linear layers with rectifiers, and a loss (the original's tutorial).
pub fn mlp(layers: i64, width: i64) -> Graph {
    let mut builder = Builder::new("MLP");
    let mut x = builder.input("x", &[width]);
    let target = builder.indices("target", &[]);
    for layer in 0..layers {
        builder.module(format!("layers.{layer}"));
        let wide = linear(&mut builder, "fc", x, width);
        x = relu(&mut builder, wide);
    }
    let loss = cross_entropy(&mut builder, x, target);
    builder.finish(&[loss])
}

/// `tables` tables of `entries x width` of which each row of the batch reads `lookups` entries, a
/// bottom and a top stack of linear layers, and all products between features (DLRM's layout).
pub fn recommender(tables: i64, entries: i64, width: i64, lookups: i64) -> Graph {
    let mut builder = Builder::new("Recommender");
    let dense = builder.input("dense", &[16]);
    let target = builder.indices("target", &[]);
    let mut features = Vec::new();
    for table in 0..tables {
        let indices = builder.indices(&format!("indices{table}"), &[lookups]);
        builder.module(format!("tables.{table}"));
        let weight = builder.parameter("weight", &[entries, width]);
        let op = builder.op("aten.embedding_bag", &[weight, indices]);
        features.push(op.flops(lookups * width).makes(&[1, width]));
    }
    let mut x = stack(&mut builder, "bottom", dense, &[512, 256, width]);
    x = builder.op("aten.unsqueeze", &[x]).view().makes(&[1, width]);
    builder.module("interaction");
    features.insert(0, x);
    let count = tables + 1;
    let all = concatenate(&mut builder, &features, 0);
    let op = builder.op("aten.bmm", &[all]).flops(2 * count * count * width);
    let products = op.keeps(all).makes(&[count * count]);
    let x = stack(&mut builder, "top", products, &[2048, 2048, 1024, 512, 2]);
    let loss = cross_entropy(&mut builder, x, target);
    builder.finish(&[loss])
}

fn stack(builder: &mut Builder, name: &str, mut x: ValueId, widths: &[i64]) -> ValueId {
    for (layer, &width) in widths.iter().enumerate() {
        builder.module(format!("{name}.{layer}"));
        let wide = linear(builder, "fc", x, width);
        x = relu(builder, wide);
    }
    x
}

/// Recurrent encoder and decoder of `layers` layers, unrolled into `chunks` pieces of time; the first
/// encoder layer runs both ways, every decoder layer reads the attention (GNMT's layout).
///
/// The pieces form a grid of layers and time, in which almost nothing is ordered.
pub fn gnmt(layers: i64, hidden: i64, tokens: i64, chunks: i64) -> Graph {
    let mut builder = Builder::new("GNMT");
    let target = builder.indices("target", &[tokens]);
    let size = (hidden, tokens / chunks);
    let mut encoded = Vec::new();
    builder.module("encoder");
    let table = builder.parameter("words.weight", &[32_000, hidden]);
    for chunk in 0..chunks {
        let words = builder.indices(&format!("words{chunk}"), &[size.1]);
        encoded.push(embedding(&mut builder, table, words, hidden));
    }
    builder.module("encoder.0.forward");
    let forward = recurrent(&mut builder, &encoded, &[], size);
    builder.module("encoder.0.backward");
    let reversed: Vec<ValueId> = encoded.iter().rev().copied().collect();
    let backward = recurrent(&mut builder, &reversed, &[], size);
    builder.module("encoder.0");
    let both = forward.iter().zip(backward.iter().rev());
    encoded = both.map(|(&left, &right)| concatenate(&mut builder, &[left, right], 1)).collect();
    for layer in 1..layers {
        builder.module(format!("encoder.{layer}"));
        let next = recurrent(&mut builder, &encoded, &[], size);
        encoded = if layer == 1 { next } else { residual(&mut builder, &encoded, &next) };
    }
    builder.module("attention");
    let memory = concatenate(&mut builder, &encoded, 0);
    builder.module("decoder");
    let table = builder.parameter("words.weight", &[32_000, hidden]);
    let mut decoded = Vec::new();
    for chunk in 0..chunks {
        let words = builder.indices(&format!("targets{chunk}"), &[size.1]);
        decoded.push(embedding(&mut builder, table, words, hidden));
    }
    builder.module("decoder.0");
    decoded = recurrent(&mut builder, &decoded, &[], size);
    builder.module("attention");
    let mut contexts = Vec::new();
    for &query in &decoded {
        let op = builder.op("aten.scaled_dot_product_attention", &[query, memory, memory]);
        let op = op.flops(4 * size.1 * tokens * hidden).keeps(query).keeps(memory);
        contexts.push(op.keeps_output().makes(&[size.1, hidden]));
    }
    for layer in 1..layers {
        builder.module(format!("decoder.{layer}"));
        let next = recurrent(&mut builder, &decoded, &contexts, size);
        decoded = if layer == 1 { next } else { residual(&mut builder, &decoded, &next) };
    }
    builder.module("head");
    let all = concatenate(&mut builder, &decoded, 0);
    let logits = linear(&mut builder, "fc", all, 32_000);
    let loss = cross_entropy(&mut builder, logits, target);
    builder.finish(&[loss])
}

/// A recurrent layer: each piece of time needs its input and the piece before.
fn recurrent(
    builder: &mut Builder,
    inputs: &[ValueId],
    contexts: &[ValueId],
    (hidden, tokens): (i64, i64),
) -> Vec<ValueId> {
    let width = builder.dims(inputs[0])[1] + if contexts.is_empty() { 0 } else { hidden };
    let input_weight = builder.parameter("weight_ih", &[4 * hidden, width]);
    let state_weight = builder.parameter("weight_hh", &[4 * hidden, hidden]);
    let mut before: Option<ValueId> = None;
    let mut results = Vec::new();
    for (index, &input) in inputs.iter().enumerate() {
        let mut read = vec![input];
        read.extend(contexts.get(index));
        read.extend(before);
        read.extend([input_weight, state_weight]);
        let op = builder.op("aten.lstm.input", &read);
        let flops = 8 * tokens * hidden * (width + hidden);
        let kept = 4 * 6 * tokens * hidden;
        let result = op.flops(flops).keeps(input).keeps_bytes(kept).makes(&[tokens, hidden]);
        before = Some(result);
        results.push(dropout(builder, result));
    }
    results
}

fn residual(builder: &mut Builder, left: &[ValueId], right: &[ValueId]) -> Vec<ValueId> {
    left.iter().zip(right).map(|(&left, &right)| add(builder, left, right)).collect()
}
