//! The JSON form `rannc.plan/1`.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Plan, PlanError};

const FORMAT: &str = "rannc.plan/1";

impl Plan {
    /// Reads the JSON form. What only a graph can tell is checked by [`Plan::place`].
    ///
    /// # Errors
    ///
    /// [`PlanError::Parse`] or [`PlanError::Format`].
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let parse = |source| PlanError::Parse { path: None, source };
        let mut fields: serde_json::Map<String, Value> =
            serde_json::from_str(text).map_err(parse)?;
        let found = match fields.remove("format") {
            Some(Value::String(found)) => found,
            Some(other) => other.to_string(),
            None => "none".into(),
        };
        if found != FORMAT {
            return Err(PlanError::Format { found, needed: FORMAT });
        }
        serde_json::from_value(Value::Object(fields)).map_err(parse)
    }

    /// The JSON form, indented for people; equal plans give equal bytes.
    pub fn to_json(&self) -> String {
        #[derive(serde::Serialize)]
        struct Written<'a> {
            format: &'a str,
            #[serde(flatten)]
            plan: &'a Plan,
        }
        let written = Written { format: FORMAT, plan: self };
        let mut text = serde_json::to_string_pretty(&written)
            .expect("a plan holds nothing that JSON cannot say");
        text.push('\n');
        text
    }

    /// Reads a deployment file.
    ///
    /// # Errors
    ///
    /// [`PlanError::Io`], [`PlanError::Parse`] or [`PlanError::Format`].
    pub fn load(path: &Path) -> Result<Self, PlanError> {
        let text = fs::read_to_string(path).map_err(|source| PlanError::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        Self::from_json(&text).map_err(|error| match error {
            PlanError::Parse { source, .. } => PlanError::Parse { path: Some(path.into()), source },
            other => other,
        })
    }

    /// Writes a deployment file: whole or not at all.
    ///
    /// # Errors
    ///
    /// [`PlanError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), PlanError> {
        let io = |source| PlanError::Io { action: "write", path: path.into(), source };
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        fs::write(&partial, self.to_json()).map_err(io)?;
        fs::rename(&partial, path).map_err(io)
    }
}
