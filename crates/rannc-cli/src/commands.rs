//! The subcommands: read files, call the library, print.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use rannc_cost::{Cluster, Profile};
use rannc_graph::Graph;
use rannc_plan::{Options, Plan};
use rannc_schedule::{Mode, ScheduleKind, grid, listing};

use crate::args::{Command, PlanArgs};
use crate::report;

/// Runs one subcommand.
pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Plan(args) => plan(args),
        Command::Show { deployment, batch } => {
            let plan = Plan::load(deployment)?;
            report::result(&batch.map_or_else(|| plan.report(), |rows| plan.report_for(rows)));
            Ok(())
        }
        Command::Check { deployment, graph } => {
            let plan = Plan::load(deployment)?;
            plan.check(&read_graph(graph)?, plan.world_size)?;
            report::result("the deployment fits the graph\n");
            Ok(())
        }
        Command::Program { deployment, graph } => {
            let (plan, graph) = (Plan::load(deployment)?, read_graph(graph)?);
            plan.check(&graph, plan.world_size)?;
            let rows = rannc_plan::even_rows(plan.batch_size, plan.world_size);
            let placement = plan.place(&graph)?;
            let program = placement.program(rows, true, Mode::Training)?;
            let grid = grid(&program, &placement.pipeline).map_err(rannc_plan::PlanError::from)?;
            report::result(&format!("{grid}\n{}", listing(&program)));
            Ok(())
        }
    }
}

fn plan(args: &PlanArgs) -> Result<()> {
    let graph = read_graph(&args.graph)?;
    let cluster = read_cluster(&args.cluster)?;
    let profile = match &args.profile {
        Some(path) => Some(Profile::from_json(&read(path)?)?),
        None => None,
    };
    let options = Options {
        batch_size: args.batch,
        optimizer_state_factor: args.optimizer_state_factor,
        num_stages: args.stages,
        num_replicas: args.replicas,
        microbatches: args.microbatches,
        memory_limit_gib: args.memory_limit_gib,
        memory_margin: args.memory_margin,
        schedules: args.schedule.map_or_else(|| ScheduleKind::ALL.to_vec(), |kind| vec![kind]),
        ..Options::default()
    };
    let plan = rannc_plan::compile(&graph, profile.as_ref(), &cluster, &options)?;
    if let Some(path) = &args.output {
        plan.save(path)?;
    }
    report::result(&plan.report());
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

fn read_graph(path: &Path) -> Result<Graph> {
    Ok(Graph::from_json(&read(path)?)?)
}

/// A file where there is one of that name, else a preset.
fn read_cluster(text: &str) -> Result<Cluster> {
    let path = Path::new(text);
    let extension = path.extension().and_then(|extension| extension.to_str());
    Ok(match extension {
        Some("json") => Cluster::from_json(&read(path)?)?,
        Some("toml") => Cluster::from_toml(&read(path)?)?,
        _ => Cluster::parse(text)?,
    })
}
