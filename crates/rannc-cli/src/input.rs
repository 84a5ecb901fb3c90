//! Reads the files that the subcommands name; errors name the file.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rannc_cost::{Cluster, Profile};
use rannc_graph::Graph;
use rannc_plan::{Plan, PlanError};

use crate::args::ClusterArgs;

/// The context of an error that a file is the reason of: no question was answered.
#[derive(Debug)]
pub(crate) struct BadFile {
    what: &'static str,
    path: PathBuf,
}

impl BadFile {
    /// What to name instead.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self.what {
            "graph" => "name a file that `rannc capture` wrote",
            "profile" => "name a file of the form `rannc.profile/1`, or leave `--profile` out",
            "cluster" => "name a TOML or JSON file, or a preset as `kind:nodesxdevices`",
            _ => return None,
        };
        Some(hint.into())
    }
}

impl fmt::Display for BadFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot use the {} `{}`", self.what, self.path.display())
    }
}

/// Reads a graph.
pub(crate) fn graph(path: &Path) -> Result<Graph> {
    read(path, "graph", |text| Ok(Graph::from_json(text)?))
}

/// Reads a deployment.
pub(crate) fn plan(path: &Path) -> Result<Plan> {
    Plan::load(path).map_err(|error| match error {
        // The only one that does not name the file.
        PlanError::Invalid { .. } => {
            anyhow::Error::from(error).context(BadFile { what: "deployment", path: path.into() })
        }
        _ => error.into(),
    })
}

/// Reads a profile, where one was named.
pub(crate) fn profile(path: Option<&Path>) -> Result<Option<Profile>> {
    path.map(|path| read(path, "profile", |text| Ok(Profile::from_json(text)?))).transpose()
}

/// Reads a cluster: a file if there is one of that name, else a preset. Leaves out the devices that
/// are not to be used.
pub(crate) fn cluster(args: &ClusterArgs) -> Result<Cluster> {
    let path = Path::new(&args.cluster);
    let extension = path.extension().and_then(|extension| extension.to_str());
    let mut cluster = if matches!(extension, Some("json" | "toml")) || path.is_file() {
        read(path, "cluster", |text| {
            let json = text.trim_start().starts_with('{');
            Ok(if json { Cluster::from_json(text)? } else { Cluster::from_toml(text)? })
        })?
    } else {
        Cluster::parse(&args.cluster)?
    };
    if let Some(wanted) = args.devices {
        let found = cluster.devices.len();
        if found < wanted as usize {
            bail!("`--devices` asks for {wanted} devices, but the cluster has {found}");
        }
        cluster.truncate(wanted as usize);
    }
    Ok(cluster)
}

fn read<T>(path: &Path, what: &'static str, parse: impl Fn(&str) -> Result<T>) -> Result<T> {
    let text = fs::read_to_string(path).map_err(anyhow::Error::from);
    text.and_then(|text| parse(&text)).with_context(|| BadFile { what, path: path.into() })
}
