//! Capturing a model: Python does it, in a process of its own.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::args::CaptureArgs;
use crate::report::Hint;

const FIND_PACKAGE: &str =
    "import importlib.util, sys; sys.exit(importlib.util.find_spec('pyrannc') is None)";

/// Runs `python -m pyrannc capture`, which prints its own errors; its exit code.
pub(crate) fn run(args: &CaptureArgs) -> Result<u8> {
    let python = args.python.clone().unwrap_or_else(interpreter);
    require_package(&python)?;
    let mut command = Command::new(&python);
    command.args(["-m", "pyrannc", "capture", &args.source]);
    if args.meta {
        command.arg("--meta");
    }
    let status = command.arg("-o").arg(&args.output).status().with_context(|| not_run(&python))?;
    // A process that a signal ended has no code.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(2))
}

/// That of the active virtual environment, else the one on the path.
fn interpreter() -> PathBuf {
    let environment =
        std::env::var_os("VIRTUAL_ENV").map(|folder| PathBuf::from(folder).join("bin/python"));
    environment.filter(|python| python.is_file()).unwrap_or_else(|| "python3".into())
}

fn require_package(python: &Path) -> Result<()> {
    let found = Command::new(python).args(["-c", FIND_PACKAGE]).stdin(Stdio::null()).status();
    let found = found.map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::NotFound => "install Python 3.10 or later, or name it with `--python`",
            _ => "name another interpreter with `--python`",
        };
        anyhow::Error::from(error).context(Hint::of(&not_run(python), hint))
    })?;
    if found.success() {
        return Ok(());
    }
    let problem = format!("`{}` does not have the package `pyrannc`", python.display());
    let hint = "install it there, or name the interpreter that has it with `--python`";
    Err(Hint::of(&problem, hint).into())
}

fn not_run(python: &Path) -> String {
    format!("cannot run the Python interpreter `{}`", python.display())
}
