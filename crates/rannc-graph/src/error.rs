//! What can be wrong with a graph or its file.

use thiserror::Error;

/// A graph that cannot be used, and where.
#[derive(Debug, Error)]
pub enum GraphError {
    /// The text is not JSON, or not of the graph's form.
    #[error("the graph file is not valid: {source}")]
    Parse {
        /// What the JSON reader found, with line and column.
        #[from]
        source: serde_json::Error,
    },
    /// The file says it is something else.
    #[error("the file has format `{found}`, needed `{needed}`")]
    Format {
        /// The format that the file names.
        found: String,
        /// The format this version reads.
        needed: &'static str,
    },
    /// An operator or the graph names a value that does not exist.
    #[error("{place} uses value {value}, but the graph has only {num_values} values")]
    Dangling {
        /// The node key, `inputs` or `outputs`.
        place: String,
        /// The id it names.
        value: u32,
        /// How many values there are.
        num_values: usize,
    },
    /// An operator reads a value that only a later operator (or none) produces.
    #[error(
        "node `{node}` reads value `{value}` before it is produced: \
         the graph has a cycle, is not in topological order, or lacks the producer"
    )]
    NotOrdered {
        /// The key of the reading node.
        node: String,
        /// The name of the value.
        value: String,
    },
    /// An operator writes to, or shares the memory of, a value that it does not read.
    #[error("node `{node}` has value `{value}` in `{field}`, but not in `inputs`")]
    NotRead {
        /// The key of the node.
        node: String,
        /// The name of the value.
        value: String,
        /// `mutates` or `aliases`.
        field: &'static str,
    },
    /// Two operators produce one value, or an operator produces an input or a parameter.
    #[error("value `{value}` is produced by node `{node}`, but it already has a source")]
    ProducedTwice {
        /// The key of the second producer.
        node: String,
        /// The name of the value.
        value: String,
    },
    /// Two operators share one key.
    #[error("the node key `{key}` is used twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// What is said of the batch cannot be.
    #[error("`batch`: {problem}")]
    BadBatch {
        /// What does not hold.
        problem: String,
    },
    /// A description contradicts itself.
    #[error("value `{value}`: {problem}")]
    BadValue {
        /// The name of the value.
        value: String,
        /// What does not hold.
        problem: String,
    },
}

impl GraphError {
    /// What the reader can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Parse { .. } | Self::Format { .. } => {
                Some("write the file again with `rannc capture`".into())
            }
            _ => None,
        }
    }
}
