//! How long something takes and how much memory.

use std::fs;
use std::time::Instant;

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Wall clock time.
    pub nanoseconds: u64,
    /// Processor time of all threads, to ten milliseconds; none where Linux does not tell.
    pub processor_ns: Option<u64>,
    /// The most memory that the process held, that from before included; none where Linux does not
    /// tell.
    pub peak_bytes: Option<u64>,
}

/// Runs something.
pub fn measure<T>(run: impl FnOnce() -> T) -> (T, Usage) {
    // Forgets the peak so far; where that is refused, the peak is that of the whole process.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let (before, start) = (processor_ns(), Instant::now());
    let result = run();
    let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let processor_ns = processor_ns().zip(before).map(|(after, before)| after - before);
    (result, Usage { nanoseconds, processor_ns, peak_bytes: peak_bytes() })
}

/// Time in user and kernel mode.
fn processor_ns() -> Option<u64> {
    /// Linux counts in hundredths of a second on every machine.
    const TICK_NS: u64 = 10_000_000;
    let status = fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = status.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(ticks * TICK_NS)
}

fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}
