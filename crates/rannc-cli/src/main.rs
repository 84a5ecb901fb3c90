//! The command `rannc`: argument parsing and error reports around the planner.

mod args;
mod capture;
mod commands;
mod input;
mod log;
mod report;
mod simulate;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    log::start(args.verbose);
    match commands::run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => report::failure(&error, args.command.in_json()),
    }
}
