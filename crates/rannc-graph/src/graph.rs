//! The graph itself, valid by construction.

use fixedbitset::FixedBitSet;
use serde::{Deserialize, Serialize};

use crate::{Affine, GraphError, NodeId, ValueId};

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueKind {
    /// An argument of the model's forward.
    Input,
    /// A trainable or frozen parameter of the model.
    Parameter,
    /// A buffer of the model.
    Buffer,
    /// A tensor that capture found in the model's code.
    Constant,
    /// The result of an operator.
    Activation,
}

/// How a value depends on the rows of the batch, hence how it can be split and put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// The same for any batch.
    None,
    /// One slice for each row. Dimension `dim` has the size `outer * rows * inner`, row-major: the
    /// rows are contiguous when `outer` is 1.
    Split {
        /// The dimension that holds the rows.
        dim: u32,
        /// How many runs of rows that dimension holds.
        outer: u64,
        /// How many consecutive entries belong to one row.
        inner: u64,
    },
    /// A sum over rows: the value of a batch is the sum of the values of its parts.
    Sum,
    /// Depends on the whole batch in a way that cannot be taken apart.
    Whole,
}

/// A tensor of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// Unique among values: the parameter's or buffer's qualified name, or the capture's name.
    pub name: String,
    /// Where it comes from.
    pub kind: ValueKind,
    /// The element type as torch spells it, without `torch.`: `float32`, `int64`.
    pub dtype: String,
    /// The size of each dimension.
    pub shape: Vec<Affine>,
    /// How it depends on the batch.
    pub rows: Rows,
    /// Whether a gradient flows through it.
    pub requires_grad: bool,
}

impl Value {
    /// Bytes of one element.
    pub fn element_bytes(&self) -> u64 {
        match self.dtype.as_str() {
            "bool" | "uint8" | "int8" => 1,
            name if name.starts_with("float8") => 1,
            "float16" | "bfloat16" | "int16" | "uint16" => 2,
            "float64" | "int64" | "uint64" | "complex64" => 8,
            "complex128" => 16,
            _ => 4,
        }
    }

    /// Bytes of the whole tensor for a batch of `rows`; saturates.
    pub fn bytes(&self, rows: u64) -> u64 {
        self.shape
            .iter()
            .fold(self.element_bytes(), |bytes, size| bytes.saturating_mul(size.at(rows)))
    }

    /// Bytes as a function of the rows; exact unless several dimensions grow with the batch, when it
    /// is the tangent through one row.
    pub fn affine_bytes(&self) -> Affine {
        let as_signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let (none, one) = (as_signed(self.bytes(0)), as_signed(self.bytes(1)));
        Affine { per_row: one - none, fixed: none }
    }

    /// Whether it lives in the model rather than in one step.
    pub fn is_state(&self) -> bool {
        matches!(self.kind, ValueKind::Parameter | ValueKind::Buffer | ValueKind::Constant)
    }
}

/// An operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Stable identity: module path, operator and its ordinal there, `h.0.attn/aten.linear.default#1`.
    pub key: String,
    /// The operator as torch spells it: `aten.linear.default`.
    pub op: String,
    /// Qualified name of the module whose forward called it; empty for the model itself.
    pub module: String,
    /// Every tensor it reads, parameters and buffers included, in argument order.
    pub inputs: Vec<ValueId>,
    /// The tensors it makes.
    pub outputs: Vec<ValueId>,
    /// Values of `inputs` whose storage it writes to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mutates: Vec<ValueId>,
    /// Values of `inputs` whose storage its outputs share (views and in-place results).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<ValueId>,
    /// Operators with the same signature cost the same.
    pub signature: String,
    /// Floating-point operations of the forward pass.
    pub flops: Affine,
    /// Bytes that autograd keeps for this operator's backward and for no earlier one's.
    pub saved_bytes: Affine,
}

/// What is known of the batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Rows of the batch that capture saw.
    pub rows: u64,
    /// Whether the model may run on parts of the batch.
    pub splittable: bool,
    /// Why not, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Operators in topological order and the values between them.
///
/// Always valid: every id exists, every value has at most one producer and is produced before it is
/// read, keys are unique.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    pub(crate) name: String,
    pub(crate) batch: Batch,
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
    pub(crate) producers: Vec<Option<NodeId>>,
    pub(crate) batch_nodes: FixedBitSet,
}

impl Graph {
    /// Checks the parts and puts them together.
    ///
    /// # Errors
    ///
    /// Any [`GraphError`] but `Parse` and `Format`.
    pub fn new(
        name: String,
        batch: Batch,
        values: Vec<Value>,
        nodes: Vec<Node>,
        inputs: Vec<ValueId>,
        outputs: Vec<ValueId>,
    ) -> Result<Self, GraphError> {
        let producers = crate::file::validate(&batch, &values, &nodes, &inputs, &outputs)?;
        let batch_nodes = crate::query::batch_nodes(&values, &nodes, &inputs);
        Ok(Self { name, batch, values, nodes, inputs, outputs, producers, batch_nodes })
    }

    /// The model's class name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is known of the batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// All values, by id.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// All operators, in topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The model's tensor arguments in flattened order.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The model's tensor results in flattened order; a value may occur twice, or be an input.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The value with this id.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// The operator with this id.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The operator that makes a value; none for inputs and for the model's state.
    pub fn producer(&self, id: ValueId) -> Option<NodeId> {
        self.producers[id.index()]
    }

    /// Ids of all operators, in topological order.
    pub fn node_ids(&self) -> impl ExactSizeIterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId::new)
    }

    /// Ids of all values.
    pub fn value_ids(&self) -> impl ExactSizeIterator<Item = ValueId> + use<> {
        (0..self.values.len()).map(ValueId::new)
    }
}
