//! The JSON form `rannc.plan/1`.

use std::fs;
use std::path::Path;

use rannc_cost::ScheduleKind;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::{Estimates, Plan, PlanError, PlanStage};

const FORMAT: &str = "rannc.plan/1";

#[derive(Deserialize)]
struct Header {
    #[serde(default = "no_format")]
    format: String,
}

fn no_format() -> String {
    "none".into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    #[serde(rename = "format")]
    _format: IgnoredAny,
    model: String,
    model_identity: String,
    world_size: u32,
    batch_size: u64,
    microbatches: u64,
    schedule: ScheduleKind,
    stages: Vec<PlanStage>,
    #[serde(default)]
    estimates: Option<Estimates>,
}

impl Plan {
    /// Reads the JSON form. What only a graph can tell is checked by [`Plan::check`].
    ///
    /// # Errors
    ///
    /// [`PlanError::Parse`], [`PlanError::Format`] or, where it contradicts itself,
    /// [`PlanError::Invalid`].
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let parse = |source| PlanError::Parse { path: None, source };
        let header: Header = serde_json::from_str(text).map_err(parse)?;
        if header.format != FORMAT {
            return Err(PlanError::Format { found: header.format, needed: FORMAT });
        }
        let read: Read = serde_json::from_str(text).map_err(parse)?;
        let plan = Self {
            model: read.model,
            model_identity: read.model_identity,
            world_size: read.world_size,
            batch_size: read.batch_size,
            microbatches: read.microbatches,
            schedule: read.schedule,
            stages: read.stages,
            estimates: read.estimates,
        };
        plan.check_form()?;
        Ok(plan)
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
    /// [`PlanError::Io`], or what [`Plan::from_json`] finds.
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

#[cfg(test)]
mod tests {
    use crate::Plan;

    const VALID: &str = r#"{
        "format": "rannc.plan/1", "model": "M", "model_identity": "0", "world_size": 2,
        "batch_size": 8, "microbatches": 2, "schedule": "1f1b",
        "stages": [{"ranks": [0, 1], "shares": [1, 2], "nodes": ["a"], "recompute": [["a"]]}]
    }"#;

    fn refused(from: &str, to: &str) -> String {
        Plan::from_json(VALID).unwrap();
        assert!(VALID.contains(from));
        Plan::from_json(&VALID.replace(from, to)).unwrap_err().to_string()
    }

    #[test]
    fn damage_is_placed_by_line_and_column() {
        let found = [
            refused("\"model\": \"M\",", ""),
            refused("\"batch_size\": 8", "\"batch_size\": -8"),
            refused("1f1b", "2f2b"),
            refused("\"ranks\"", "\"rank\""),
            refused("rannc.plan/1", "rannc.plan/9"),
            refused("\"format\": \"rannc.plan/1\",", ""),
            Plan::from_json("").unwrap_err().to_string(),
        ];
        insta::assert_snapshot!(found.join("\n"), @"
        the deployment file is damaged or incomplete: missing field `model` at line 5 column 5
        the deployment file is damaged or incomplete: invalid value: integer `-8`, expected u64 at line 3 column 24
        the deployment file is damaged or incomplete: unknown variant `2f2b`, expected `fill_drain` or `1f1b` at line 3 column 62
        the deployment file is damaged or incomplete: unknown field `rank`, expected one of `ranks`, `shares`, `sharding`, `nodes`, `recompute` at line 4 column 26
        the deployment file has format `rannc.plan/9`, needed `rannc.plan/1`
        the deployment file has format `none`, needed `rannc.plan/1`
        the deployment file is damaged or incomplete: EOF while parsing a value at line 1 column 0
        ");
    }

    #[test]
    fn groups_that_a_path_enters_again_are_refused() {
        let graph = rannc_graph::testing::chain(3, 8);
        let mut plan = Plan::from_json(VALID).unwrap();
        plan.model_identity = graph.identity();
        let key = |layer: usize| graph.nodes()[layer].key.clone();
        plan.stages[0].nodes = (0..3).map(key).collect();
        plan.stages[0].recompute = vec![vec![key(0), key(1)], vec![key(2)]];
        plan.check(&graph, 2).unwrap();
        plan.stages[0].recompute = vec![vec![key(0), key(2)]];
        insta::assert_snapshot!(plan.check(&graph, 2).unwrap_err(), @"the deployment is not valid: group 0 of stage 0's `recompute` is not convex: a path leaves it, to `layer1/op#0`, and enters it again");
    }

    #[test]
    fn contradictions_are_placed_by_stage() {
        let found = [
            refused("\"world_size\": 2", "\"world_size\": 0"),
            refused("\"world_size\": 2", "\"world_size\": 4000000000"),
            refused("\"microbatches\": 2", "\"microbatches\": 0"),
            refused("\"microbatches\": 2", "\"microbatches\": 18446744073709551615"),
            refused("\"batch_size\": 8", "\"batch_size\": 18446744073709551615"),
            refused("[0, 1]", "[]"),
            refused("[0, 1]", "[1, 0]"),
            refused("[0, 1]", "[0, 2]"),
            refused("\"nodes\": [\"a\"]", "\"nodes\": [\"a\", \"a\"]"),
            refused("[1, 2]", "[1]"),
            refused("[1, 2]", "[0, 0]"),
            refused("[[\"a\"]]", "[[\"a\"], [\"a\"]]"),
        ];
        insta::assert_snapshot!(found.join("\n"), @"
        the deployment is not valid: it has 0 processes, needed 1 to 65536
        the deployment is not valid: it has 4000000000 processes, needed 1 to 65536
        the deployment is not valid: it has 0 microbatches, needed 1 to 4096
        the deployment is not valid: it has 18446744073709551615 microbatches, needed 1 to 4096
        the deployment is not valid: it has 18446744073709551615 rows, needed 1 to 1099511627776
        the deployment is not valid: stage 0 has no ranks, needed at least one
        the deployment is not valid: stage 0 has rank 1 before rank 0, needed ascending
        the deployment is not valid: stage 0 has rank 2, needed 0 to 1
        the deployment is not valid: the operator `a` is listed in stages 0 and 0
        the deployment is not valid: stage 0 has 1 shares for 2 ranks, needed one for each
        the deployment is not valid: stage 0 has a share of 0, needed 1 to 1099511627776
        the deployment is not valid: group 1 of stage 0's `recompute` has `a`, which is in group 0 already
        ");
    }
}
