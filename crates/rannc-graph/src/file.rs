//! The JSON form `rannc.graph/1`, and the checks that make a [`Graph`] valid.

use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Batch, Graph, GraphError, Node, NodeId, Value, ValueId, ValueKind};

const FORMAT: &str = "rannc.graph/1";

#[derive(Serialize)]
struct Written<'a> {
    format: &'a str,
    name: &'a str,
    batch: &'a Batch,
    values: &'a [Value],
    nodes: &'a [Node],
    inputs: &'a [ValueId],
    outputs: &'a [ValueId],
}

#[derive(Deserialize)]
struct Read {
    name: String,
    batch: Batch,
    values: Vec<Value>,
    nodes: Vec<Node>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
}

#[derive(Deserialize)]
struct Header {
    format: String,
}

impl Graph {
    /// Reads and checks the JSON form.
    ///
    /// # Errors
    ///
    /// Any [`GraphError`], naming the place.
    pub fn from_json(text: &str) -> Result<Self, GraphError> {
        let header: Header = serde_json::from_str(text)?;
        if header.format != FORMAT {
            return Err(GraphError::Format { found: header.format, needed: FORMAT });
        }
        let read: Read = serde_json::from_str(text)?;
        Self::new(read.name, read.batch, read.values, read.nodes, read.inputs, read.outputs)
    }

    /// The JSON form; equal graphs give equal bytes.
    pub fn to_json(&self) -> String {
        to_json(&Written {
            format: FORMAT,
            name: &self.name,
            batch: &self.batch,
            values: &self.values,
            nodes: &self.nodes,
            inputs: &self.inputs,
            outputs: &self.outputs,
        })
    }

    /// A hash of all but costs and the number of rows that capture happened to see: equal on all ranks
    /// that captured the same model with the same other sizes.
    pub fn fingerprint(&self) -> String {
        let wiring = |node: &Node| {
            let Node { key, op, inputs, outputs, mutates, aliases, signature, .. } = node;
            to_json(&(key, op, inputs, outputs, mutates, aliases, signature))
        };
        let nodes: Vec<String> = self.nodes.iter().map(wiring).collect();
        let batch = (self.batch.splittable, &self.batch.reason);
        short_hash(&to_json(&(batch, &self.values, nodes, &self.inputs, &self.outputs)))
    }

    /// A hash of what makes it this model: its operators, parameters, buffers and constants, but not
    /// the sizes of what flows between them. A plan belongs to an identity.
    pub fn identity(&self) -> String {
        let nodes: Vec<_> = self.nodes.iter().map(|node| (&node.key, &node.op)).collect();
        let state = self.values.iter().filter(|value| value.is_state());
        let state: Vec<_> =
            state.map(|value| (&value.name, value.kind, &value.dtype, &value.shape)).collect();
        short_hash(&to_json(&(nodes, state)))
    }
}

fn to_json<T: Serialize>(part: &T) -> String {
    serde_json::to_string(part).expect("plain data always has a JSON form")
}

/// Half of a SHA-256 in hexadecimal: short enough to read, long enough never to collide by chance.
fn short_hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let (half, _) = digest.split_at(16);
    half.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// More rows than this in a batch are surely a mistake.
const MAX_ROWS: u64 = 1 << 40;
/// A larger tensor than this, 8 PiB, is surely a mistake.
const MAX_BYTES: u64 = 1 << 53;

/// Checks every rule of a valid graph and returns the producer of each value.
pub(crate) fn validate(
    batch: &Batch,
    values: &[Value],
    nodes: &[Node],
    inputs: &[ValueId],
    outputs: &[ValueId],
) -> Result<Vec<Option<NodeId>>, GraphError> {
    let exists = |id: ValueId, place: &str| {
        if id.index() < values.len() {
            Ok(())
        } else {
            let num_values = values.len();
            Err(GraphError::Dangling { place: place.into(), value: id.0, num_values })
        }
    };
    check_batch(batch)?;
    let mut available = vec![false; values.len()];
    let mut names = FxHashSet::default();
    for (value, available) in values.iter().zip(&mut available) {
        *available = value.is_state();
        check_value(value, batch.rows)?;
        if value.is_state() && !names.insert(value.name.as_str()) {
            return Err(bad(
                value,
                "its name is used for another part of the model's state".into(),
            ));
        }
    }
    for &id in inputs {
        exists(id, "`inputs`")?;
        let value = &values[id.index()];
        if value.kind != ValueKind::Input {
            return Err(bad(value, "it is listed as an input but has another kind".into()));
        }
        available[id.index()] = true;
    }
    let mut producers = vec![None; values.len()];
    let mut keys = FxHashSet::default();
    for (index, node) in nodes.iter().enumerate() {
        if !keys.insert(node.key.as_str()) {
            return Err(GraphError::DuplicateKey { key: node.key.clone() });
        }
        let place = format!("node `{}`", node.key);
        for (field, ids) in [("mutates", &node.mutates), ("aliases", &node.aliases)] {
            for &id in ids {
                exists(id, &place)?;
                if !node.inputs.contains(&id) {
                    let (node, value) = (node.key.clone(), values[id.index()].name.clone());
                    return Err(GraphError::NotRead { node, value, field });
                }
            }
        }
        for &id in &node.inputs {
            exists(id, &place)?;
            if !available[id.index()] {
                let value = values[id.index()].name.clone();
                return Err(GraphError::NotOrdered { node: node.key.clone(), value });
            }
        }
        for &id in &node.outputs {
            exists(id, &place)?;
            let value = &values[id.index()];
            if available[id.index()] || value.kind != ValueKind::Activation {
                let value = value.name.clone();
                return Err(GraphError::ProducedTwice { node: node.key.clone(), value });
            }
            available[id.index()] = true;
            producers[id.index()] = Some(NodeId::new(index));
        }
    }
    for &id in outputs {
        exists(id, "`outputs`")?;
        if !available[id.index()] {
            let value = values[id.index()].name.clone();
            return Err(GraphError::NotOrdered { node: "outputs".into(), value });
        }
    }
    Ok(producers)
}

fn check_batch(batch: &Batch) -> Result<(), GraphError> {
    if batch.rows <= MAX_ROWS {
        return Ok(());
    }
    let problem = format!("it has {} rows, needed at most {MAX_ROWS}", batch.rows);
    Err(GraphError::BadBatch { problem })
}

fn check_value(value: &Value, rows: u64) -> Result<(), GraphError> {
    if let crate::Rows::Split { dim, outer, inner } = value.rows {
        let per_row = value.shape.get(dim as usize).map(|size| size.per_row);
        let expected = i64::try_from(outer.saturating_mul(inner)).unwrap_or(i64::MAX);
        if per_row != Some(expected) {
            let problem = format!(
                "rows are said to lie in dimension {dim} with {outer} x rows x {inner} entries, \
                 but its sizes are {}",
                serde_json::to_string(&value.shape).unwrap_or_default()
            );
            return Err(bad(value, problem));
        }
    }
    if value.bytes(rows) > MAX_BYTES {
        let problem = format!(
            "with the {rows} rows that capture saw, its sizes {} make it larger than {MAX_BYTES} bytes",
            serde_json::to_string(&value.shape).unwrap_or_default()
        );
        return Err(bad(value, problem));
    }
    Ok(())
}

fn bad(value: &Value, problem: String) -> GraphError {
    GraphError::BadValue { value: value.name.clone(), problem }
}
