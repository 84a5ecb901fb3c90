//! Graphs for tests: chains, diamonds and random ones, as data and as `proptest` strategies.

use proptest::prelude::*;

use crate::{Affine, Batch, Graph, Node, NodeId, Rows, Value, ValueId, ValueKind};

/// Builds a graph operator by operator; every operator is `rows x width` in and out.
#[derive(Clone, Debug, Default)]
pub struct Sketch {
    values: Vec<Value>,
    nodes: Vec<Node>,
    inputs: Vec<ValueId>,
}

impl Sketch {
    /// A graph with one input of `width` elements a row.
    pub fn new(width: i64) -> (Self, ValueId) {
        let mut sketch = Self::default();
        let input = sketch.value("x", ValueKind::Input, row_shape(width), true);
        sketch.inputs.push(input);
        (sketch, input)
    }

    fn value(&mut self, name: &str, kind: ValueKind, shape: Vec<Affine>, batch: bool) -> ValueId {
        let rows = if batch { Rows::Split { dim: 0, outer: 1, inner: 1 } } else { Rows::None };
        let requires_grad = kind != ValueKind::Input;
        let dtype = "float32".to_owned();
        self.values.push(Value { name: name.into(), kind, dtype, shape, rows, requires_grad });
        ValueId::new(self.values.len() - 1)
    }

    /// A parameter of `size` float32 elements.
    pub fn parameter(&mut self, name: &str, size: i64) -> ValueId {
        self.value(name, ValueKind::Parameter, vec![Affine::fixed(size)], false)
    }

    /// An operator with one output of `width` elements a row and `flops` a row.
    pub fn op(&mut self, inputs: &[ValueId], width: i64, flops: i64) -> ValueId {
        let index = self.nodes.len();
        let output =
            self.value(&format!("v{index}"), ValueKind::Activation, row_shape(width), true);
        self.nodes.push(Node {
            key: format!("layer{index}/op#0"),
            op: "op".into(),
            module: format!("layer{index}"),
            inputs: inputs.to_vec(),
            outputs: vec![output],
            mutates: vec![],
            aliases: vec![],
            signature: format!("op({width},{flops})"),
            flops: Affine::per_row(flops),
            saved_bytes: Affine::per_row(4 * width),
        });
        output
    }

    /// The node added last.
    pub fn last(&self) -> NodeId {
        NodeId::new(self.nodes.len() - 1)
    }

    /// The finished graph.
    pub fn finish(self, outputs: &[ValueId]) -> Graph {
        let batch = Batch { rows: 8, splittable: true, reason: None };
        Graph::new("Sketch".into(), batch, self.values, self.nodes, self.inputs, outputs.to_vec())
            .expect("a sketch is built in topological order")
    }
}

fn row_shape(width: i64) -> Vec<Affine> {
    vec![Affine::per_row(1), Affine::fixed(width)]
}

/// `length` layers, each with a `width x width` parameter: the tutorial's model.
pub fn chain(length: usize, width: i64) -> Graph {
    let (mut sketch, mut value) = Sketch::new(width);
    for index in 0..length {
        let weight = sketch.parameter(&format!("layer{index}.weight"), width * width);
        value = sketch.op(&[value, weight], width, 2 * width * width);
    }
    sketch.finish(&[value])
}

/// A U-net: `depth` layers down, `depth` up, each upper one reading its mirror image below.
pub fn unet(depth: usize, width: i64) -> Graph {
    let (mut sketch, mut value) = Sketch::new(width);
    let mut skips = Vec::new();
    for _ in 0..depth {
        value = sketch.op(&[value], width, 100 * width);
        skips.push(value);
    }
    for skip in skips.into_iter().rev() {
        value = sketch.op(&[value, skip], width, 100 * width);
    }
    sketch.finish(&[value])
}

/// Random graphs of up to `max_nodes` operators, some with parameters, some of them shared.
pub fn graphs(max_nodes: usize) -> impl Strategy<Value = Graph> {
    let op = (any::<u64>(), any::<u64>(), 1..64i64, 1..10_000i64, 0..4u8);
    prop::collection::vec(op, 1..=max_nodes).prop_map(|ops| {
        let (mut sketch, input) = Sketch::new(8);
        let mut values = vec![input];
        let mut parameters: Vec<ValueId> = Vec::new();
        for (first, second, width, flops, kind) in ops {
            let mut inputs = vec![values[(first % values.len() as u64) as usize]];
            if kind & 1 == 1 {
                inputs.push(values[(second % values.len() as u64) as usize]);
            }
            if kind == 2 {
                let name = format!("p{}", parameters.len());
                parameters.push(sketch.parameter(&name, width * 16));
            }
            if kind >= 2 && !parameters.is_empty() {
                inputs.push(parameters[(second % parameters.len() as u64) as usize]);
            }
            inputs.dedup();
            values.push(sketch.op(&inputs, width, flops));
        }
        let outputs = [*values.last().expect("there is at least the input")];
        sketch.finish(&outputs)
    })
}
