//! The log of the search on stderr.

use std::io::Write as _;

use env_logger::{Builder, Target};

/// Shows warnings, from `-v` on what the search does, from `-vv` on every step of it.
pub(crate) fn start(verbosity: u8) {
    let level = match verbosity {
        0 => "warn",
        1 => "debug",
        _ => "trace",
    };
    Builder::new()
        .parse_filters(level)
        .target(Target::Stderr)
        .format(|out, record| {
            let level = record.level().as_str().to_lowercase();
            writeln!(out, "{level}: {}", record.args())
        })
        .init();
}
