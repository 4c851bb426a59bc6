//! Rows of figures, printed as they are measured.

/// Prints rows in columns.
pub(crate) struct Table(());

impl Table {
    pub(crate) fn new() -> Self {
        row("what", "floor", "ours", "ratio", "budget");
        row("----", "-----", "----", "-----", "------");
        Self(())
    }

    /// A figure that has a floor.
    pub(crate) fn beside(&mut self, what: &str, unit: &str, floor: f64, ours: f64, budget: &str) {
        let ratio = format!("{:.2}", ours / floor);
        row(what, &figure(floor, unit), &figure(ours, unit), &ratio, budget);
    }

    /// A figure that stands alone.
    pub(crate) fn alone(&mut self, what: &str, unit: &str, ours: f64, budget: &str) {
        row(what, "-", &figure(ours, unit), "-", budget);
    }
}

fn row(what: &str, floor: &str, ours: &str, ratio: &str, budget: &str) {
    println!("| {what:<58} | {floor:>12} | {ours:>12} | {ratio:>5} | {budget:<16} |");
}

fn figure(value: f64, unit: &str) -> String {
    let digits = if value >= 100.0 {
        0
    } else if value >= 1.0 {
        1
    } else {
        3
    };
    format!("{value:.digits$} {unit}")
}

/// The `percent`th percentile of sorted values.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}
