//! Transformers: decoder, encoder, both, and with experts.

use rannc_graph::{Graph, ValueId};

use super::layers::{
    add, add_all, attention, cross_entropy, dropout, elementwise, embedding, layer_norm, linear,
    multiply,
};
use crate::Builder;

/// The sizes of a transformer.
#[derive(Clone, Copy, Debug)]
pub struct Transformer {
    /// Layers of each stack.
    pub layers: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Attention heads.
    pub heads: i64,
    /// Tokens in each row.
    pub tokens: i64,
    /// Words in the table.
    pub vocabulary: i64,
}

impl Transformer {
    /// A transformer with heads of 64 or 128 channels.
    pub fn new(layers: i64, hidden: i64, tokens: i64) -> Self {
        let heads = if hidden % 128 == 0 && hidden >= 2048 { hidden / 128 } else { hidden / 64 };
        Self { layers, hidden, heads: heads.max(1), tokens, vocabulary: 50_304 }
    }
}

/// Where a feed-forward block gets its experts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FeedForward {
    Dense,
    Experts(i64),
}

/// A decoder with one table for words and logits, and its loss (GPT-2's layout).
pub fn gpt(size: Transformer) -> Graph {
    decoder("GPT", size, |_| FeedForward::Dense)
}

/// A decoder whose every other layer has `experts` feed-forward blocks, two of them for each token.
pub fn mixture_of_experts(size: Transformer, experts: i64) -> Graph {
    let kind =
        |layer| if layer % 2 == 1 { FeedForward::Experts(experts) } else { FeedForward::Dense };
    decoder("MixtureOfExperts", size, kind)
}

fn decoder(name: &str, size: Transformer, kind: impl Fn(i64) -> FeedForward) -> Graph {
    let mut builder = Builder::new(name);
    let (words, mut x) = words_and_positions(&mut builder, size, "");
    for layer in 0..size.layers {
        let module = format!("layers.{layer}");
        builder.module(format!("{module}.attn"));
        let normed = layer_norm(&mut builder, "ln", x);
        let attended = attention(&mut builder, (normed, normed), size.heads, true);
        let dropped = dropout(&mut builder, attended);
        x = add(&mut builder, x, dropped);
        builder.module(format!("{module}.mlp"));
        let normed = layer_norm(&mut builder, "ln", x);
        let forward = match kind(layer) {
            FeedForward::Dense => feed_forward(&mut builder, "fc", normed, 4 * size.hidden),
            FeedForward::Experts(count) => experts(&mut builder, normed, count),
        };
        let dropped = dropout(&mut builder, forward);
        x = add(&mut builder, x, dropped);
    }
    builder.module("head");
    let normed = layer_norm(&mut builder, "ln", x);
    let logits = multiply(&mut builder, &[normed, words], size.vocabulary);
    let target = builder.indices("target", &[size.tokens]);
    let loss = cross_entropy(&mut builder, logits, target);
    builder.finish(&[loss])
}

/// An encoder with a masked-word head that shares the table, and its loss (BERT's layout).
pub fn bert(size: Transformer) -> Graph {
    let mut builder = Builder::new("BERT");
    let (words, embedded) = words_and_positions(&mut builder, size, "");
    let mut x = layer_norm(&mut builder, "ln", embedded);
    for layer in 0..size.layers {
        let module = format!("layers.{layer}");
        builder.module(format!("{module}.attn"));
        let attended = attention(&mut builder, (x, x), size.heads, false);
        x = add_and_norm(&mut builder, x, attended);
        builder.module(format!("{module}.mlp"));
        let forward = feed_forward(&mut builder, "fc", x, 4 * size.hidden);
        x = add_and_norm(&mut builder, x, forward);
    }
    builder.module("head");
    let transformed = linear(&mut builder, "transform", x, size.hidden);
    let activated = elementwise(&mut builder, "aten.gelu", transformed, 8);
    let normed = layer_norm(&mut builder, "ln", activated);
    let bias = builder.parameter("bias", &[size.vocabulary]);
    let logits = multiply(&mut builder, &[normed, words, bias], size.vocabulary);
    let target = builder.indices("target", &[size.tokens]);
    let loss = cross_entropy(&mut builder, logits, target);
    builder.finish(&[loss])
}

/// An encoder whose result every layer of a decoder reads; both share one table (T5's layout).
pub fn encoder_decoder(size: Transformer) -> Graph {
    let mut builder = Builder::new("EncoderDecoder");
    let (words, mut encoded) = words_and_positions(&mut builder, size, "encoder.");
    for layer in 0..size.layers {
        builder.module(format!("encoder.layers.{layer}"));
        encoded = self_attention(&mut builder, encoded, size.heads);
        encoded = normed_feed_forward(&mut builder, encoded, 4 * size.hidden);
    }
    builder.module("encoder.final");
    let encoded = layer_norm(&mut builder, "ln", encoded);
    let indices = builder.indices("decoder.words", &[size.tokens]);
    builder.module("decoder.embeddings");
    let mut x = embedding(&mut builder, words, indices, size.hidden);
    for layer in 0..size.layers {
        builder.module(format!("decoder.layers.{layer}"));
        x = self_attention(&mut builder, x, size.heads);
        builder.module(format!("decoder.layers.{layer}.cross"));
        let normed = layer_norm(&mut builder, "ln", x);
        let attended = attention(&mut builder, (normed, encoded), size.heads, false);
        let dropped = dropout(&mut builder, attended);
        x = add(&mut builder, x, dropped);
        builder.module(format!("decoder.layers.{layer}"));
        x = normed_feed_forward(&mut builder, x, 4 * size.hidden);
    }
    builder.module("head");
    let normed = layer_norm(&mut builder, "ln", x);
    let logits = multiply(&mut builder, &[normed, words], size.vocabulary);
    let target = builder.indices("target", &[size.tokens]);
    let loss = cross_entropy(&mut builder, logits, target);
    builder.finish(&[loss])
}

fn words_and_positions(
    builder: &mut Builder,
    size: Transformer,
    prefix: &str,
) -> (ValueId, ValueId) {
    let words = builder.indices(&format!("{prefix}words"), &[size.tokens]);
    let positions = builder.indices(&format!("{prefix}positions"), &[size.tokens]);
    builder.module(format!("{prefix}embeddings"));
    let table = builder.parameter("words.weight", &[size.vocabulary, size.hidden]);
    let places = builder.parameter("positions.weight", &[size.tokens, size.hidden]);
    let word = embedding(builder, table, words, size.hidden);
    let place = embedding(builder, places, positions, size.hidden);
    let sum = add(builder, word, place);
    (table, dropout(builder, sum))
}

fn self_attention(builder: &mut Builder, x: ValueId, heads: i64) -> ValueId {
    let module = builder.current_module().to_owned();
    builder.module(format!("{module}.attn"));
    let normed = layer_norm(builder, "ln", x);
    let attended = attention(builder, (normed, normed), heads, false);
    let dropped = dropout(builder, attended);
    let sum = add(builder, x, dropped);
    builder.module(module);
    sum
}

fn normed_feed_forward(builder: &mut Builder, x: ValueId, width: i64) -> ValueId {
    let module = builder.current_module().to_owned();
    builder.module(format!("{module}.mlp"));
    let normed = layer_norm(builder, "ln", x);
    let forward = feed_forward(builder, "fc", normed, width);
    let dropped = dropout(builder, forward);
    let sum = add(builder, x, dropped);
    builder.module(module);
    sum
}

fn feed_forward(builder: &mut Builder, name: &str, x: ValueId, width: i64) -> ValueId {
    let hidden = *builder.dims(x).last().expect("tokens have a width");
    let wide = linear(builder, &format!("{name}_up"), x, width);
    let activated = elementwise(builder, "aten.gelu", wide, 8);
    linear(builder, &format!("{name}_down"), activated, hidden)
}

fn add_and_norm(builder: &mut Builder, x: ValueId, change: ValueId) -> ValueId {
    let dropped = dropout(builder, change);
    let sum = add(builder, x, dropped);
    layer_norm(builder, "ln", sum)
}

/// A router that sends each token to two of the experts, which all take equally many.
fn experts(builder: &mut Builder, x: ValueId, count: i64) -> ValueId {
    let (tokens, hidden) = (builder.dims(x)[0], builder.dims(x)[1]);
    let module = builder.current_module().to_owned();
    let scores = linear(builder, "router", x, count);
    let weights = elementwise(builder, "aten.softmax.int", scores, 5);
    let chosen = builder.op("aten.topk", &[weights]).flops(tokens * count).makes(&[tokens, 2]);
    let capacity = (2 * tokens / count).max(1);
    let mut results = Vec::new();
    for expert in 0..count {
        builder.module(format!("{module}.experts.{expert}"));
        let taken = builder.op("aten.index_select", &[x, chosen]).makes(&[capacity, hidden]);
        let forward = feed_forward(builder, "fc", taken, 4 * hidden);
        let back = builder.op("aten.index_put", &[forward, chosen]).makes(&[tokens, hidden]);
        results.push(back);
    }
    builder.module(module);
    add_all(builder, &results)
}
