//! Convolutional networks: residual, dense, wide cells, and down and up again.

use rannc_graph::{Graph, ValueId};

use super::layers::{
    add, add_all, batch_norm, classify, concatenate, conv, conv_norm_relu, cross_entropy, image,
    pool, relu, strided,
};
use crate::Builder;

const CLASSES: i64 = 1_000;

/// Bottleneck blocks with `widen` times the channels of `ResNet`; `blocks` for each resolution
/// (`[3, 4, 6, 3]` is `ResNet-50`, `[3, 8, 36, 3]` `ResNet-152`). Activations shrink, parameters grow.
pub fn wide_resnet(blocks: [i64; 4], widen: i64, pixels: i64) -> Graph {
    let mut builder = Builder::new("WideResNet");
    let mut x = stem(&mut builder, 64, pixels);
    for (level, count) in blocks.into_iter().enumerate() {
        let channels = 64 << level;
        for block in 0..count {
            builder.module(format!("layer{level}.{block}"));
            let stride = if block == 0 && level > 0 { 2 } else { 1 };
            x = bottleneck(&mut builder, x, channels * widen, channels * 4, stride);
        }
    }
    let loss = classify(&mut builder, x, CLASSES);
    builder.finish(&[loss])
}

fn stem(builder: &mut Builder, channels: i64, pixels: i64) -> ValueId {
    let x = builder.input("image", &[3, pixels, pixels]);
    builder.module("stem");
    let convolved = conv_norm_relu(builder, "conv", x, (channels, 7, 2));
    pool(builder, "aten.max_pool2d", convolved, 2)
}

fn bottleneck(
    builder: &mut Builder,
    x: ValueId,
    inner: i64,
    channels: i64,
    stride: i64,
) -> ValueId {
    let narrow = conv_norm_relu(builder, "conv1", x, (inner, 1, 1));
    let middle = conv_norm_relu(builder, "conv2", narrow, (inner, 3, stride));
    let convolved = conv(builder, "conv3", middle, (channels, 1, 1));
    let main = batch_norm(builder, "conv3_norm", convolved);
    let shortcut = if builder.dims(x)[0] == channels && stride == 1 {
        x
    } else {
        let convolved = conv(builder, "down", x, (channels, 1, stride));
        batch_norm(builder, "down_norm", convolved)
    };
    let sum = add(builder, main, shortcut);
    relu(builder, sum)
}

/// `depth` resolutions down and up again; each on the way up also reads its mirror image.
pub fn unet(depth: i64, channels: i64, pixels: i64) -> Graph {
    let mut builder = Builder::new("UNet");
    let mut x = builder.input("image", &[3, pixels, pixels]);
    let target = builder.indices("target", &[pixels, pixels]);
    let mut skips = Vec::new();
    for level in 0..depth {
        builder.module(format!("down.{level}"));
        x = double_conv(&mut builder, x, channels << level);
        skips.push(x);
        x = pool(&mut builder, "aten.max_pool2d", x, 2);
    }
    builder.module("middle");
    x = double_conv(&mut builder, x, channels << depth);
    for (level, skip) in skips.into_iter().enumerate().rev() {
        builder.module(format!("up.{level}"));
        let dims = builder.dims(skip).to_vec();
        let inputs = builder.dims(x)[0];
        let weight = builder.parameter("up.weight", &[inputs, dims[0], 2, 2]);
        let flops = 2 * inputs * dims.iter().product::<i64>();
        let op = builder.op("aten.conv_transpose2d", &[x, weight]);
        let up = op.flops(flops).keeps(x).makes(&dims);
        let both = concatenate(&mut builder, &[skip, up], 0);
        x = double_conv(&mut builder, both, channels << level);
    }
    builder.module("head");
    let logits = conv(&mut builder, "conv", x, (16, 1, 1));
    let loss = cross_entropy(&mut builder, logits, target);
    builder.finish(&[loss])
}

fn double_conv(builder: &mut Builder, x: ValueId, channels: i64) -> ValueId {
    let first = conv_norm_relu(builder, "conv1", x, (channels, 3, 1));
    conv_norm_relu(builder, "conv2", first, (channels, 3, 1))
}

/// Each layer reads the results of all before it at its resolution (DenseNet-121's layout with
/// `growth` channels a layer; 32 is the original).
pub fn densenet(growth: i64, pixels: i64) -> Graph {
    let mut builder = Builder::new("DenseNet");
    let mut x = stem(&mut builder, 2 * growth, pixels);
    for (level, count) in [6, 12, 24, 16].into_iter().enumerate() {
        let mut features = vec![x];
        for layer in 0..count {
            builder.module(format!("dense{level}.{layer}"));
            let all = concatenate(&mut builder, &features, 0);
            let normed = batch_norm(&mut builder, "norm1", all);
            let active = relu(&mut builder, normed);
            let narrow = conv_norm_relu(&mut builder, "conv1", active, (4 * growth, 1, 1));
            features.push(conv(&mut builder, "conv2", narrow, (growth, 3, 1)));
        }
        builder.module(format!("transition{level}"));
        let all = concatenate(&mut builder, &features, 0);
        let normed = batch_norm(&mut builder, "norm", all);
        x = relu(&mut builder, normed);
        if level < 3 {
            let channels = builder.dims(x)[0] / 2;
            let halved = conv(&mut builder, "conv", x, (channels, 1, 1));
            x = pool(&mut builder, "aten.avg_pool2d", halved, 2);
        }
    }
    let loss = classify(&mut builder, x, CLASSES);
    builder.finish(&[loss])
}

/// Cells of five pairs of branches; each cell reads the two before it (`NASNet`'s layout).
pub fn nasnet(cells: i64, channels: i64, pixels: i64) -> Graph {
    let mut builder = Builder::new("NASNet");
    let mut last = stem(&mut builder, channels, pixels);
    let mut before = last;
    for cell in 0..cells {
        let width = channels << (3 * cell / cells);
        let reduces = cell > 0 && 3 * cell / cells > 3 * (cell - 1) / cells;
        let next = branchy_cell(&mut builder, (before, last), width, cell, reduces);
        (before, last) = (last, next);
    }
    let loss = classify(&mut builder, last, CLASSES);
    builder.finish(&[loss])
}

fn branchy_cell(
    builder: &mut Builder,
    (before, last): (ValueId, ValueId),
    width: i64,
    cell: i64,
    reduces: bool,
) -> ValueId {
    builder.module(format!("cells.{cell}"));
    let stride = if reduces { 2 } else { 1 };
    let height = strided(image(builder, last).1, stride);
    let fit = strided(image(builder, before).1, height);
    let left = conv_norm_relu(builder, "left", before, (width, 1, fit));
    let right = conv_norm_relu(builder, "right", last, (width, 1, stride));
    let mut results = Vec::new();
    for pair in 0..5 {
        builder.module(format!("cells.{cell}.pairs.{pair}"));
        let first = separable(builder, "first", if pair % 2 == 0 { left } else { right }, 3);
        let second = match pair {
            0 | 3 => separable(builder, "second", right, 5),
            1 => pool(builder, "aten.avg_pool2d", left, 1),
            2 => pool(builder, "aten.max_pool2d", right, 1),
            _ => results[0],
        };
        results.push(add_all(builder, &[first, second]));
    }
    builder.module(format!("cells.{cell}"));
    concatenate(builder, &results, 0)
}

/// A convolution for each channel, then one over channels, normalised.
fn separable(builder: &mut Builder, name: &str, x: ValueId, kernel: i64) -> ValueId {
    let (channels, height, width) = image(builder, x);
    let active = relu(builder, x);
    let weight = builder.parameter(&format!("{name}_depth.weight"), &[channels, 1, kernel, kernel]);
    let flops = 2 * kernel * kernel * channels * height * width;
    let op = builder.op("aten.conv2d", &[active, weight]);
    let depth = op.flops(flops).keeps(active).makes(&[channels, height, width]);
    let point = conv(builder, &format!("{name}_point"), depth, (channels, 1, 1));
    batch_norm(builder, &format!("{name}_norm"), point)
}
