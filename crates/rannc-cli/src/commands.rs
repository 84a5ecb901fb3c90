//! The subcommands: read files, call the library, print.

use anyhow::Result;
use rannc_plan::{Options, Plan, PlanError, Planner};
use rannc_schedule::{Mode, ScheduleKind, grid, listing};
use serde_json::json;

use crate::args::{Args, CheckArgs, Command, PlanArgs, ShowArgs};
use crate::{capture, input, report, simulate};

/// Runs one subcommand; its exit code.
pub(crate) fn run(args: &Args) -> Result<u8> {
    match &args.command {
        Command::Capture(args) => return capture::run(args),
        Command::Plan(plan_args) => plan(plan_args, args.verbose)?,
        Command::Show(args) => show(args)?,
        Command::Simulate(args) => simulate::run(args)?,
        Command::Check(args) => check(args)?,
        Command::Program { deployment, graph } => {
            let (plan, graph) = (input::plan(deployment)?, input::graph(graph)?);
            plan.check(&graph, plan.world_size)?;
            let rows = rannc_plan::even_rows(plan.batch_size, plan.world_size);
            let placement = plan.place(&graph)?;
            let program = placement.program(rows, true, Mode::Training)?;
            let grid = grid(&program, &placement.pipeline).map_err(PlanError::from)?;
            report::result(&format!("{grid}\n{}", listing(&program)));
        }
    }
    Ok(0)
}

fn plan(args: &PlanArgs, verbosity: u8) -> Result<()> {
    let graph = input::graph(&args.graph)?;
    let cluster = input::cluster(&args.cluster)?;
    let profile = input::profile(args.cluster.profile.as_deref())?;
    let defaults = Options::default();
    let options = Options {
        batch_size: args.batch,
        optimizer_state_factor: args.optimizer_state_factor,
        num_stages: args.stages.map(|stages| stages as usize),
        num_replicas: args.replicas.map(|replicas| replicas as usize),
        microbatches: args.microbatches,
        max_microbatches: args.max_microbatches.unwrap_or(defaults.max_microbatches),
        memory_limit_gib: args.memory_limit_gib,
        memory_margin: args.memory_margin,
        schedules: args.schedule.map_or_else(|| ScheduleKind::ALL.to_vec(), |kind| vec![kind]),
        recompute: !args.no_recompute,
        sharding: args.sharding,
        ..defaults
    };
    let planner = Planner::new(&graph, profile.as_ref());
    let progress = rannc_plan::Bar::new(verbosity == 0);
    let plan = match &args.from {
        Some(path) => planner.replan(&input::plan(path)?, &cluster, &options, &progress)?,
        None => planner.plan(&cluster, &options, &progress)?,
    };
    if let Some(path) = &args.output {
        plan.save(path)?;
    }
    report::result(&if args.json { plan.to_json() } else { plan.report() });
    Ok(())
}

fn show(args: &ShowArgs) -> Result<()> {
    let plan = input::plan(&args.deployment)?;
    report::result(&match args.batch {
        _ if args.json => plan.to_json(),
        Some(rows) => plan.report_for(rows),
        None => plan.report(),
    });
    Ok(())
}

fn check(args: &CheckArgs) -> Result<()> {
    let graph = input::graph(&args.graph)?;
    let plan = Plan::load(&args.deployment)?;
    plan.check(&graph, plan.world_size)?;
    report::result(&if args.json {
        format!("{}\n", json!({ "fits": true, "model_identity": plan.model_identity }))
    } else {
        "the deployment fits the graph\n".into()
    });
    Ok(())
}
