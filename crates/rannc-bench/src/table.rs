//! Markdown tables and the few statistics in them.

use std::fmt::Write as _;

/// A Markdown table that grows row by row.
#[derive(Clone, Debug)]
pub struct Table {
    text: String,
    columns: usize,
}

impl Table {
    /// A table with these columns; all but the first are aligned to the right.
    pub fn new(columns: &[&str]) -> Self {
        let rule = format!("|---|{}\n", "---:|".repeat(columns.len() - 1));
        Self { text: format!("| {} |\n{rule}", columns.join(" | ")), columns: columns.len() }
    }

    /// Adds a row; returns it, to be shown at once.
    ///
    /// # Panics
    ///
    /// When the number of cells is not that of the columns.
    pub fn row(&mut self, cells: &[String]) -> String {
        assert_eq!(cells.len(), self.columns, "a row has a cell for each column");
        let row = format!("| {} |\n", cells.join(" | "));
        let _ = self.text.write_str(&row);
        row
    }

    /// The table so far.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// Nanoseconds as milliseconds or seconds with three digits.
pub fn time(nanoseconds: u64) -> String {
    let seconds = nanoseconds as f64 / 1e9;
    match seconds {
        _ if seconds >= 100.0 => format!("{seconds:.0} s"),
        _ if seconds >= 10.0 => format!("{seconds:.1} s"),
        _ if seconds >= 1.0 => format!("{seconds:.2} s"),
        _ if seconds >= 0.1 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds >= 0.01 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{:.2} ms", seconds * 1e3),
    }
}

/// The middle of some numbers; none of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let last = sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) { sorted[middle - 1].midpoint(*last) } else { *last })
}

/// The exponent `b` of the law `y = a x^b` that fits points best: least squares of logarithms.
pub fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let (x_mean, y_mean) =
        logs.iter().fold((0.0, 0.0), |sum, &(x, y)| (sum.0 + x / count, sum.1 + y / count));
    let (rise, run) = logs.iter().fold((0.0, 0.0), |(rise, run), &(x, y)| {
        (rise + (x - x_mean) * (y - y_mean), run + (x - x_mean) * (x - x_mean))
    });
    rise / run
}

#[cfg(test)]
mod tests {
    use super::{Table, exponent, median, time};

    #[test]
    fn statistics() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        let points: Vec<(f64, f64)> =
            (1..5).map(|x| (f64::from(x), 3.0 * f64::from(x * x))).collect();
        // Logarithms are rounded.
        assert!((exponent(&points) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn rows_are_markdown() {
        let mut table = Table::new(&["case", "step"]);
        table.row(&["a".into(), time(12_345_678)]);
        assert_eq!(table.text(), "| case | step |\n|---|---:|\n| a | 12.3 ms |\n");
    }
}
