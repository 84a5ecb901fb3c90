//! A bar on the terminal while the search runs.

use std::io::IsTerminal as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use rannc_partition::Progress;

/// Searches shorter than this show no bar.
const DELAY: Duration = Duration::from_secs(1);

/// Shows how far the search is: only on a terminal, and only if it takes long.
pub struct Bar {
    start: Instant,
    delay: Duration,
    shown: OnceLock<ProgressBar>,
}

impl Bar {
    /// A bar that appears, if it is wanted, when the search has run for a second; never where nobody
    /// would see it.
    pub fn new(wanted: bool) -> Self {
        let visible = wanted && std::io::stderr().is_terminal();
        Self::after(if visible { DELAY } else { Duration::MAX })
    }

    fn after(delay: Duration) -> Self {
        Self { start: Instant::now(), delay, shown: OnceLock::new() }
    }
}

impl Progress for Bar {
    fn update(&self, phase: &str, done: u64, total: u64) {
        if self.start.elapsed() < self.delay {
            return;
        }
        let bar = self.shown.get_or_init(|| {
            let style = ProgressStyle::with_template("{elapsed} {bar:32} {pos}/{len} {msg}");
            ProgressBar::new(total)
                .with_style(style.expect("the template is valid"))
                .with_elapsed(self.start.elapsed())
        });
        bar.set_length(total);
        bar.set_position(done);
        if bar.message() != phase {
            bar.set_message(phase.to_owned());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.shown.get() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rannc_partition::Progress as _;

    use super::Bar;

    #[test]
    fn short_searches_show_no_bar() {
        let (late, now) = (Bar::after(Duration::MAX), Bar::after(Duration::ZERO));
        for bar in [&late, &now] {
            bar.update("blocks", 1, 9);
            bar.update("stages", 5, 8);
        }
        assert!(late.shown.get().is_none());
        let shown = now.shown.get().expect("its time has come");
        assert_eq!((shown.position(), shown.length()), (5, Some(8)));
        assert_eq!(shown.message(), "stages");
    }
}
