//! Layers that models are built of, each as the operators that torch runs for it.

use rannc_graph::ValueId;

use crate::Builder;

/// `x W^T + b` over the last dimension.
pub(super) fn linear(builder: &mut Builder, name: &str, x: ValueId, width: i64) -> ValueId {
    let inputs = *builder.dims(x).last().expect("a linear layer needs a dimension");
    let weight = builder.parameter(&format!("{name}.weight"), &[width, inputs]);
    let bias = builder.parameter(&format!("{name}.bias"), &[width]);
    multiply(builder, &[x, weight, bias], width)
}

/// `x W^T` with a parameter from elsewhere; `inputs` are x, the weight and perhaps a bias.
pub(super) fn multiply(builder: &mut Builder, inputs: &[ValueId], width: i64) -> ValueId {
    let x = inputs[0];
    let flops = 2 * builder.elements(x) * width;
    let mut dims = builder.dims(x).to_vec();
    *dims.last_mut().expect("a linear layer needs a dimension") = width;
    builder.op("aten.linear", inputs).flops(flops).keeps(x).makes(&dims)
}

/// Normalises over the last dimension.
pub(super) fn layer_norm(builder: &mut Builder, name: &str, x: ValueId) -> ValueId {
    let dims = builder.dims(x).to_vec();
    let width = dims[dims.len() - 1];
    let weight = builder.parameter(&format!("{name}.weight"), &[width]);
    let bias = builder.parameter(&format!("{name}.bias"), &[width]);
    let elements = builder.elements(x);
    let statistics = elements / width * 8;
    let op = builder.op("aten.layer_norm", &[x, weight, bias]);
    op.flops(5 * elements).keeps(x).keeps_bytes(statistics).makes(&dims)
}

/// An operator on each element of its inputs that keeps its first input for backward.
pub(super) fn elementwise(builder: &mut Builder, op: &str, x: ValueId, flops: i64) -> ValueId {
    let (dims, elements) = (builder.dims(x).to_vec(), builder.elements(x));
    builder.op(op, &[x]).flops(flops * elements).keeps(x).makes(&dims)
}

/// A rectifier, which keeps its result.
pub(super) fn relu(builder: &mut Builder, x: ValueId) -> ValueId {
    let (dims, elements) = (builder.dims(x).to_vec(), builder.elements(x));
    builder.op("aten.relu", &[x]).flops(elements).keeps_output().makes(&dims)
}

/// Dropout, which keeps a mask of one byte for each element.
pub(super) fn dropout(builder: &mut Builder, x: ValueId) -> ValueId {
    let (dims, elements) = (builder.dims(x).to_vec(), builder.elements(x));
    builder.op("aten.dropout", &[x]).flops(2 * elements).keeps_bytes(elements).makes(&dims)
}

/// A sum, which keeps nothing.
pub(super) fn add(builder: &mut Builder, left: ValueId, right: ValueId) -> ValueId {
    let (dims, elements) = (builder.dims(left).to_vec(), builder.elements(left));
    builder.op("aten.add.Tensor", &[left, right]).flops(elements).makes(&dims)
}

/// A sum of several values of the same size.
pub(super) fn add_all(builder: &mut Builder, values: &[ValueId]) -> ValueId {
    let sum = |left, &right| add(builder, left, right);
    values[1..].iter().fold(values[0], sum)
}

/// Values one after the other along dimension `dim` of a row.
pub(super) fn concatenate(builder: &mut Builder, values: &[ValueId], dim: usize) -> ValueId {
    let mut dims = builder.dims(values[0]).to_vec();
    dims[dim] = values.iter().map(|&value| builder.dims(value)[dim]).sum();
    builder.op("aten.cat", values).makes(&dims)
}

/// Rows of a table.
pub(super) fn embedding(
    builder: &mut Builder,
    table: ValueId,
    indices: ValueId,
    width: i64,
) -> ValueId {
    let mut dims = builder.dims(indices).to_vec();
    dims.push(width);
    builder.op("aten.embedding", &[table, indices]).makes(&dims)
}

/// Softmax attention of `queries` over `keys` and `values`, all `tokens x width`.
///
/// Projections, a split into heads, the fused kernel, and the projection of its result: 11
/// operators, or 9 when `joint` projects queries, keys and values at once.
pub(super) fn attention(
    builder: &mut Builder,
    (queries, keys): (ValueId, ValueId),
    heads: i64,
    joint: bool,
) -> ValueId {
    let (tokens, width) = (builder.dims(queries)[0], builder.dims(queries)[1]);
    let sources = builder.dims(keys)[0];
    let projected = if joint {
        let all = linear(builder, "qkv", queries, 3 * width);
        let part = [tokens, width];
        builder.op("aten.split.Tensor", &[all]).view().makes_each(&[&part, &part, &part])
    } else {
        let query = linear(builder, "q", queries, width);
        let key = linear(builder, "k", keys, width);
        vec![query, key, linear(builder, "v", keys, width)]
    };
    let mut split = Vec::new();
    for value in projected {
        let dims = [heads, builder.dims(value)[0], width / heads];
        split.push(builder.op("aten.transpose.int", &[value]).view().makes(&dims));
    }
    let attended = builder
        .op("aten.scaled_dot_product_attention", &split)
        .flops(4 * tokens * sources * width)
        .keeps(split[0])
        .keeps(split[1])
        .keeps(split[2])
        .keeps_bytes(4 * heads * tokens)
        .keeps_output()
        .makes(&[heads, tokens, width / heads]);
    let merged = builder.op("aten.reshape", &[attended]).makes(&[tokens, width]);
    linear(builder, "out", merged, width)
}

/// A convolution with `kernel x kernel` weights over `channels x height x width`, padded so that
/// only the stride makes the image smaller.
pub(super) fn conv(
    builder: &mut Builder,
    name: &str,
    x: ValueId,
    (channels, kernel, stride): (i64, i64, i64),
) -> ValueId {
    let (inputs, height, width) = image(builder, x);
    let dims = [channels, strided(height, stride), strided(width, stride)];
    let weight = builder.parameter(&format!("{name}.weight"), &[channels, inputs, kernel, kernel]);
    let flops = 2 * kernel * kernel * inputs * dims.iter().product::<i64>();
    builder.op("aten.conv2d", &[x, weight]).flops(flops).keeps(x).makes(&dims)
}

/// Normalises each channel over the batch and the image.
pub(super) fn batch_norm(builder: &mut Builder, name: &str, x: ValueId) -> ValueId {
    let (dims, elements) = (builder.dims(x).to_vec(), builder.elements(x));
    let channels = [dims[0]];
    let weight = builder.parameter(&format!("{name}.weight"), &channels);
    let bias = builder.parameter(&format!("{name}.bias"), &channels);
    let mean = builder.buffer(&format!("{name}.running_mean"), &channels);
    let variance = builder.buffer(&format!("{name}.running_var"), &channels);
    let op = builder.op("aten.batch_norm", &[x, weight, bias, mean, variance]);
    op.flops(5 * elements).keeps(x).mutates(mean).mutates(variance).makes(&dims)
}

/// Convolution, normalisation and rectifier.
pub(super) fn conv_norm_relu(
    builder: &mut Builder,
    name: &str,
    x: ValueId,
    shape: (i64, i64, i64),
) -> ValueId {
    let convolved = conv(builder, name, x, shape);
    let normalised = batch_norm(builder, &format!("{name}_norm"), convolved);
    relu(builder, normalised)
}

/// A window that moves by `stride` in both directions.
pub(super) fn pool(builder: &mut Builder, op: &str, x: ValueId, stride: i64) -> ValueId {
    let (channels, height, width) = image(builder, x);
    let elements = builder.elements(x);
    let dims = [channels, strided(height, stride), strided(width, stride)];
    builder.op(op, &[x]).flops(elements).keeps(x).makes(&dims)
}

/// The mean over the image, a linear layer and the loss.
pub(super) fn classify(builder: &mut Builder, x: ValueId, classes: i64) -> ValueId {
    let target = builder.indices("target", &[]);
    builder.module("head");
    let (channels, elements) = (builder.dims(x)[0], builder.elements(x));
    let mean = builder.op("aten.mean.dim", &[x]).flops(elements).makes(&[channels]);
    let logits = linear(builder, "fc", mean, classes);
    cross_entropy(builder, logits, target)
}

/// The loss: a sum over rows.
pub(super) fn cross_entropy(builder: &mut Builder, logits: ValueId, target: ValueId) -> ValueId {
    let elements = builder.elements(logits);
    builder.module("loss");
    let bytes = 4 * elements;
    let op = builder.op("aten.cross_entropy_loss", &[logits, target]);
    op.flops(5 * elements).keeps_bytes(bytes).makes_sum()
}

/// Channels, height and width.
pub(super) fn image(builder: &Builder, x: ValueId) -> (i64, i64, i64) {
    let dims = builder.dims(x);
    (dims[0], dims[1], dims[2])
}

/// How many steps of `stride` it takes to pass `size` pixels.
pub(super) const fn strided(size: i64, stride: i64) -> i64 {
    (size + stride - 1) / stride
}
