//! Builds graphs of models by hand, operator by operator, as capture would give them.
//!
//! Sizes are those of one row; the batch dimension is put before them. Operators say which tensors
//! autograd keeps for their backward, and a tensor is counted where it is kept first.

use std::collections::{BTreeMap, BTreeSet};

use rannc_graph::{Affine, Batch, Graph, Node, Rows, Value, ValueId, ValueKind};

/// Every element is a float32 or, for indices, an int64.
const ELEMENT_BYTES: i64 = 4;
/// Rows of the batch that capture would have seen.
const CAPTURED_ROWS: u64 = 8;

/// A graph that grows.
#[derive(Debug, Default)]
pub struct Builder {
    name: String,
    values: Vec<Value>,
    /// The size of each value without its batch dimension.
    dims: Vec<Vec<i64>>,
    nodes: Vec<Node>,
    inputs: Vec<ValueId>,
    module: String,
    ordinals: BTreeMap<String, usize>,
    kept: BTreeSet<ValueId>,
}

/// An operator that is being described; [`Op::makes`] adds it.
#[derive(Debug)]
#[must_use]
pub struct Op<'a> {
    builder: &'a mut Builder,
    name: &'a str,
    inputs: Vec<ValueId>,
    mutates: Vec<ValueId>,
    flops: i64,
    kept_bytes: i64,
    keeps_output: bool,
    is_view: bool,
}

impl Builder {
    /// An empty model.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Operators and parameters that follow belong to this module.
    pub fn module(&mut self, path: impl Into<String>) {
        self.module = path.into();
    }

    /// The module that operators belong to at present.
    pub fn current_module(&self) -> &str {
        &self.module
    }

    /// The size of one row of a value.
    pub fn dims(&self, value: ValueId) -> &[i64] {
        &self.dims[value.index()]
    }

    /// The number of elements in one row of a value.
    pub fn elements(&self, value: ValueId) -> i64 {
        self.dims(value).iter().product()
    }

    /// A tensor of numbers that the model is called with.
    pub fn input(&mut self, name: &str, dims: &[i64]) -> ValueId {
        self.argument(name, "float32", dims)
    }

    /// A tensor of indices that the model is called with.
    pub fn indices(&mut self, name: &str, dims: &[i64]) -> ValueId {
        self.argument(name, "int64", dims)
    }

    /// A trained parameter of the present module.
    pub fn parameter(&mut self, name: &str, dims: &[i64]) -> ValueId {
        let name = self.qualified(name);
        self.state(name, ValueKind::Parameter, dims)
    }

    /// A buffer of the present module.
    pub fn buffer(&mut self, name: &str, dims: &[i64]) -> ValueId {
        let name = self.qualified(name);
        self.state(name, ValueKind::Buffer, dims)
    }

    /// Describes an operator of the present module.
    pub fn op<'a>(&'a mut self, name: &'a str, inputs: &[ValueId]) -> Op<'a> {
        Op {
            builder: self,
            name,
            inputs: inputs.to_vec(),
            mutates: Vec::new(),
            flops: 0,
            kept_bytes: 0,
            keeps_output: false,
            is_view: false,
        }
    }

    /// The finished model.
    pub fn finish(self, outputs: &[ValueId]) -> Graph {
        let batch = Batch { rows: CAPTURED_ROWS, splittable: true, reason: None };
        Graph::new(self.name, batch, self.values, self.nodes, self.inputs, outputs.to_vec())
            .expect("a builder adds operators in topological order")
    }

    fn argument(&mut self, name: &str, dtype: &str, dims: &[i64]) -> ValueId {
        let value = Value {
            name: name.to_owned(),
            kind: ValueKind::Input,
            dtype: dtype.to_owned(),
            shape: with_rows(dims),
            rows: Rows::Split { dim: 0, outer: 1, inner: 1 },
            requires_grad: false,
        };
        let id = self.push(value, dims);
        self.inputs.push(id);
        id
    }

    fn state(&mut self, name: String, kind: ValueKind, dims: &[i64]) -> ValueId {
        let value = Value {
            name,
            kind,
            dtype: "float32".to_owned(),
            shape: dims.iter().map(|&size| Affine::fixed(size)).collect(),
            rows: Rows::None,
            requires_grad: kind == ValueKind::Parameter,
        };
        self.push(value, dims)
    }

    fn push(&mut self, value: Value, dims: &[i64]) -> ValueId {
        self.values.push(value);
        self.dims.push(dims.to_vec());
        ValueId::new(self.values.len() - 1)
    }

    fn qualified(&self, name: &str) -> String {
        if self.module.is_empty() { name.to_owned() } else { format!("{}.{name}", self.module) }
    }

    /// Bytes per row that keeping a value adds, unless it is kept or held already.
    fn keep(&mut self, value: ValueId) -> i64 {
        let is_activation = self.values[value.index()].kind == ValueKind::Activation;
        if is_activation && self.kept.insert(value) {
            self.elements(value) * ELEMENT_BYTES
        } else {
            0
        }
    }
}

impl Op<'_> {
    /// Floating-point operations for one row.
    pub fn flops(mut self, flops: i64) -> Self {
        self.flops = flops;
        self
    }

    /// Autograd keeps this value for the backward pass.
    pub fn keeps(mut self, value: ValueId) -> Self {
        self.kept_bytes += self.builder.keep(value);
        self
    }

    /// Autograd keeps this many more bytes for each row.
    pub fn keeps_bytes(mut self, bytes: i64) -> Self {
        self.kept_bytes += bytes;
        self
    }

    /// Autograd keeps what the operator makes.
    pub fn keeps_output(mut self) -> Self {
        self.keeps_output = true;
        self
    }

    /// The result shares the memory of the first input.
    pub fn view(mut self) -> Self {
        self.is_view = true;
        self
    }

    /// The operator writes to this value.
    pub fn mutates(mut self, value: ValueId) -> Self {
        self.mutates.push(value);
        self
    }

    /// Adds the operator with one result that has `dims` for each row.
    pub fn makes(self, dims: &[i64]) -> ValueId {
        self.makes_each(&[dims])[0]
    }

    /// Adds the operator with several results.
    pub fn makes_each(self, dims: &[&[i64]]) -> Vec<ValueId> {
        let rows = Rows::Split { dim: 0, outer: 1, inner: 1 };
        self.add(dims.iter().map(|dims| (with_rows(dims), rows, dims.to_vec())).collect())
    }

    /// Adds the operator with one number as its result: a sum over rows.
    pub fn makes_sum(self) -> ValueId {
        self.add(vec![(Vec::new(), Rows::Sum, Vec::new())])[0]
    }

    fn add(mut self, results: Vec<(Vec<Affine>, Rows, Vec<i64>)>) -> Vec<ValueId> {
        let signature = self.signature(&results);
        let requires_grad =
            self.inputs.iter().any(|input| self.builder.values[input.index()].requires_grad);
        let builder = self.builder;
        let index = builder.nodes.len();
        let outputs: Vec<ValueId> = results
            .into_iter()
            .enumerate()
            .map(|(output, (shape, rows, dims))| {
                let value = Value {
                    name: format!("v{index}_{output}"),
                    kind: ValueKind::Activation,
                    dtype: "float32".to_owned(),
                    shape,
                    rows,
                    requires_grad,
                };
                builder.push(value, &dims)
            })
            .collect();
        if self.keeps_output {
            self.kept_bytes += outputs.iter().map(|&output| builder.keep(output)).sum::<i64>();
        }
        if self.is_view && builder.kept.contains(&self.inputs[0]) {
            builder.kept.extend(&outputs);
        }
        let stem = format!("{}/{}", builder.module, self.name);
        let ordinal = builder.ordinals.entry(stem.clone()).or_default();
        let key = format!("{stem}#{ordinal}");
        *ordinal += 1;
        builder.nodes.push(Node {
            key,
            op: self.name.to_owned(),
            module: builder.module.clone(),
            aliases: if self.is_view { vec![self.inputs[0]] } else { Vec::new() },
            inputs: self.inputs,
            outputs: outputs.clone(),
            mutates: self.mutates,
            signature,
            flops: Affine::per_row(self.flops),
            saved_bytes: Affine::per_row(if requires_grad { self.kept_bytes } else { 0 }),
        });
        outputs
    }

    fn signature(&self, results: &[(Vec<Affine>, Rows, Vec<i64>)]) -> String {
        let inputs: Vec<&[i64]> =
            self.inputs.iter().map(|&input| self.builder.dims(input)).collect();
        let outputs: Vec<&Vec<i64>> = results.iter().map(|(_, _, dims)| dims).collect();
        format!("{}({inputs:?} -> {outputs:?}; {})", self.name, self.flops)
    }
}

fn with_rows(dims: &[i64]) -> Vec<Affine> {
    let fixed = dims.iter().map(|&size| Affine::fixed(size));
    std::iter::once(Affine::per_row(1)).chain(fixed).collect()
}
