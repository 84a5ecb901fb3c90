//! What can be written on the command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use rannc_schedule::ScheduleKind;

/// Plans how to spread the training of a PyTorch model over devices, from files.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Plan a deployment of a captured graph on a cluster.
    Plan(PlanArgs),
    /// Show a deployment: stages, replicas, and the predicted time and memory.
    Show {
        /// The deployment file.
        deployment: PathBuf,
        /// Also show how a global batch of this many rows is cut.
        #[arg(long)]
        batch: Option<u64>,
    },
    /// Check that a deployment belongs to a graph and can be carried out.
    Check {
        /// The deployment file.
        deployment: PathBuf,
        /// The captured graph.
        graph: PathBuf,
    },
    /// Print every rank's actions for one training step.
    Program {
        /// The deployment file.
        deployment: PathBuf,
        /// The captured graph.
        graph: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// The captured graph.
    pub(crate) graph: PathBuf,
    /// A cluster file (TOML or JSON), or a preset as `kind:nodesxdevices`, such as `a100-40gb:1x8`.
    #[arg(long)]
    pub(crate) cluster: String,
    /// Measured times; without them they are estimated for the cluster's devices.
    #[arg(long)]
    pub(crate) profile: Option<PathBuf>,
    /// Rows of the global batch.
    #[arg(long)]
    pub(crate) batch: u64,
    /// Where to write the deployment; by default it is only shown.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// Bytes of optimizer state per parameter byte: 2 for Adam, 1 for momentum, 0 for plain SGD.
    #[arg(long, default_value_t = 2.0)]
    pub(crate) optimizer_state_factor: f64,
    /// Use exactly this many stages.
    #[arg(long)]
    pub(crate) stages: Option<usize>,
    /// Use exactly this many replicas of every stage.
    #[arg(long)]
    pub(crate) replicas: Option<usize>,
    /// Use exactly this many microbatches.
    #[arg(long)]
    pub(crate) microbatches: Option<u64>,
    /// Use at most this many GiB of each device.
    #[arg(long)]
    pub(crate) memory_limit_gib: Option<f64>,
    /// Part of the memory to leave free.
    #[arg(long, default_value_t = 0.1)]
    pub(crate) memory_margin: f64,
    /// Use only this schedule: `fill_drain` or `1f1b`.
    #[arg(long)]
    pub(crate) schedule: Option<ScheduleKind>,
}
