//! What can be written on the command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, value_parser};
use rannc_cost::{ScheduleKind, Sharding};

const EXIT_CODES: &str = "\
Exit codes:
  0  the answer is yes, or was printed
  1  the answer is no: nothing fits, or the deployment is not one for the graph
  2  the question could not be answered: bad usage, a file that cannot be read, a bug";

/// Plans how to spread the training of a PyTorch model over devices, from files.
#[derive(Debug, Parser)]
#[command(name = "rannc", version, about, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Say on stderr what the search does; twice for every candidate.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Capture the graph of a model; needs Python with the package `pyrannc`.
    #[command(after_help = EXIT_CODES)]
    Capture(CaptureArgs),
    /// Plan a deployment of a captured graph on a cluster.
    #[command(after_help = EXIT_CODES)]
    Plan(PlanArgs),
    /// Show a deployment: stages, replicas, and the predicted time and memory.
    #[command(after_help = EXIT_CODES)]
    Show(ShowArgs),
    /// Simulate a training step: when each rank does what, and how much memory it takes.
    #[command(after_help = EXIT_CODES)]
    Simulate(SimulateArgs),
    /// Check that a deployment belongs to a graph and can be carried out.
    #[command(after_help = EXIT_CODES)]
    Check(CheckArgs),
    /// Print every rank's actions for one training step.
    #[command(after_help = EXIT_CODES)]
    Program {
        /// The deployment file.
        deployment: PathBuf,
        /// The captured graph.
        graph: PathBuf,
    },
}

impl Command {
    /// Whether the results and errors are for programs.
    pub(crate) fn in_json(&self) -> bool {
        match self {
            Self::Plan(args) => args.json,
            Self::Show(args) => args.json,
            Self::Simulate(args) => args.json,
            Self::Check(args) => args.json,
            Self::Capture(_) | Self::Program { .. } => false,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct CaptureArgs {
    /// A function without arguments in a Python file, as `FILE.py:FUNCTION`. It returns
    /// `(model, args, kwargs)`: the model and the arguments of one call.
    #[arg(value_name = "FILE.py:FUNCTION")]
    pub(crate) source: String,
    /// Make the model on the meta device: shapes only, no memory and no values.
    #[arg(long)]
    pub(crate) meta: bool,
    /// Where to write the graph.
    #[arg(long, short)]
    pub(crate) output: PathBuf,
    /// The Python interpreter; by default that of the active virtual environment, else `python3`.
    #[arg(long)]
    pub(crate) python: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ClusterArgs {
    /// A cluster file (TOML or JSON), or a preset as `kind:nodesxdevices`, such as `a100-40gb:1x8`.
    #[arg(long, value_name = "FILE|PRESET")]
    pub(crate) cluster: String,
    /// Use only the first devices of the cluster, this many.
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    pub(crate) devices: Option<u32>,
    /// Measured times; without them they are estimated for the cluster's devices.
    #[arg(long)]
    pub(crate) profile: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// The captured graph.
    pub(crate) graph: PathBuf,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Rows of the global batch.
    #[arg(long, value_parser = value_parser!(u64).range(1..=1 << 40))]
    pub(crate) batch: u64,
    /// Where to write the deployment; by default it is only shown.
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
    /// An earlier deployment of the same graph, on other devices or with another batch or memory limit:
    /// its stages are kept where they are still good, which takes far less time.
    #[arg(long, value_name = "DEPLOYMENT")]
    pub(crate) from: Option<PathBuf>,
    /// Print the deployment as JSON, and errors, too.
    #[arg(long)]
    pub(crate) json: bool,
    /// Bytes of optimizer state per parameter byte: 2 for Adam, 1 for momentum, 0 for plain SGD.
    #[arg(long, default_value_t = 2.0, value_parser = state_factor)]
    pub(crate) optimizer_state_factor: f64,
    /// Use exactly this many stages.
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    pub(crate) stages: Option<u32>,
    /// Use exactly this many replicas of every stage.
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    pub(crate) replicas: Option<u32>,
    /// Use exactly this many microbatches.
    #[arg(long, value_parser = value_parser!(u64).range(1..))]
    pub(crate) microbatches: Option<u64>,
    /// Use at most this many microbatches.
    #[arg(long, value_parser = value_parser!(u64).range(1..), conflicts_with = "microbatches")]
    pub(crate) max_microbatches: Option<u64>,
    /// Use at most this many GiB of each device.
    #[arg(long, value_parser = gibibytes)]
    pub(crate) memory_limit_gib: Option<f64>,
    /// Part of the memory to leave free.
    #[arg(long, default_value_t = 0.1, value_parser = fraction)]
    pub(crate) memory_margin: f64,
    /// Use only this schedule: `fill_drain` or `1f1b`.
    #[arg(long)]
    pub(crate) schedule: Option<ScheduleKind>,
    /// What the replicas of a stage may divide among themselves at most: `none`, `optimizer`,
    /// `gradients` or `parameters`.
    #[arg(long, value_name = "LEVEL", default_value_t)]
    pub(crate) sharding: Sharding,
    /// Keep all activations: compute nothing again in backward.
    #[arg(long)]
    pub(crate) no_recompute: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ShowArgs {
    /// The deployment file.
    pub(crate) deployment: PathBuf,
    /// Also show how a global batch of this many rows is cut.
    #[arg(long, conflicts_with = "json")]
    pub(crate) batch: Option<u64>,
    /// Print the deployment as JSON, and errors, too.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SimulateArgs {
    /// The deployment file.
    pub(crate) deployment: PathBuf,
    /// The captured graph.
    pub(crate) graph: PathBuf,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Bytes of optimizer state per parameter byte: 2 for Adam, 1 for momentum, 0 for plain SGD.
    #[arg(long, default_value_t = 2.0, value_parser = state_factor)]
    pub(crate) optimizer_state_factor: f64,
    /// Write the timeline for `chrome://tracing` or Perfetto.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) trace: Option<PathBuf>,
    /// Print times and memory as JSON, and errors, too.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The deployment file.
    pub(crate) deployment: PathBuf,
    /// The captured graph.
    pub(crate) graph: PathBuf,
    /// Print the answer as JSON, and errors, too.
    #[arg(long)]
    pub(crate) json: bool,
}

fn state_factor(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1000", |number| (0.0..=1000.0).contains(&number))
}

fn gibibytes(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |number| number > 0.0 && number.is_finite())
}

fn fraction(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to below 1", |number| (0.0..1.0).contains(&number))
}

fn number(text: &str, needed: &str, holds: fn(f64) -> bool) -> Result<f64, String> {
    let found = text.parse().ok().filter(|&number| holds(number));
    found.ok_or_else(|| format!("needed {needed}"))
}
