//! Rows of figures beside their goals, printed as they are measured.

use crate::{cgroup::LIMIT_MIB, probes::Tries, rows::Row, scene::Figures};

/// What a neighbour may notice, in milliseconds.
const P99_MS: f64 = 50.0;
const MAX_MS: f64 = 250.0;
const LINES_PER_SECOND: u64 = 100;

const COLUMNS: [(&str, usize); 13] = [
    ("attack", 16),
    ("rate", 22),
    ("p50", 7),
    ("p99", 8),
    ("max", 8),
    ("new p99", 8),
    ("new max", 8),
    ("failed", 7),
    ("late", 8),
    ("probes", 8),
    ("others", 7),
    ("MiB", 9),
    ("log/s", 9),
];

/// Prints rows in columns.
pub(crate) struct Table(());

impl Table {
    pub(crate) fn new() -> Self {
        println!(
            "{}. Goals: no failure, no renewal late, p99 < {P99_MS} ms, max < {MAX_MS} ms, memory < {LIMIT_MIB} MiB, log < \
             {LINES_PER_SECOND} lines in every second; ! where one is missed.",
            machine()
        );
        println!(
            "p50, p99, max: of a neighbour's calls, held connection and new ones, in ms. late: of its renewals. probes: /livez \
             and /readyz that failed. others: commands of others that failed.\n"
        );
        line(&COLUMNS.map(|(name, _)| name.to_owned()));
        line(&COLUMNS.map(|(_, width)| "-".repeat(width)));
        Self(())
    }

    pub(crate) fn row(&mut self, row: &Row, figures: &Figures) {
        let neighbour = &figures.neighbour;
        let milliseconds = |value: f64, goal: f64| marked(format!("{value:.2}"), value.is_nan() || value >= goal);
        let memory = match &figures.fate {
            Some(fate) => format!("{fate}!"),
            None => marked(format!("{:.0}", figures.peak_mib), figures.peak_mib >= LIMIT_MIB as f64),
        };
        line(&[
            row.name.clone(),
            rate(row, figures),
            format!("{:.2}", neighbour.held.p50),
            milliseconds(neighbour.held.p99, P99_MS),
            milliseconds(neighbour.held.max, MAX_MS),
            milliseconds(neighbour.new.p99, P99_MS),
            milliseconds(neighbour.new.max, MAX_MS),
            marked(neighbour.failures.to_string(), neighbour.failures > 0),
            marked(format!("{}/{}", neighbour.late, neighbour.renewals), neighbour.late > 0 || neighbour.renewals == 0),
            tries(&figures.probes),
            figures.others.as_ref().map_or("-".to_owned(), tries),
            memory,
            marked(figures.busiest.to_string(), figures.busiest >= LINES_PER_SECOND),
        ]);
        for (what, first) in notes(figures) {
            if !first.is_empty() {
                println!("    {what}: {first}");
            }
        }
    }
}

/// Cores and kernel.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores, Linux {}", kernel.trim())
}

fn rate(row: &Row, figures: &Figures) -> String {
    let did = &figures.did;
    match row.rate {
        None => format!("{} open", did.open),
        Some(_) if row.groups.is_empty() => "-".to_owned(),
        Some(unit) => {
            let a_second = |count: u64| count as f64 / row.seconds as f64;
            let (done, refused) = (a_second(did.done), a_second(did.refused));
            match unit {
                _ if did.done == 0 && did.refused > 0 => format!("0 of {refused:.0} {unit}"),
                _ if done < 10.0 => format!("{done:.1} {unit}"),
                _ => format!("{done:.0} {unit}"),
            }
        }
    }
}

fn tries(tries: &Tries) -> String {
    marked(format!("{}/{}", tries.failed, tries.all), tries.failed > 0)
}

/// What failed first, in words.
fn notes(figures: &Figures) -> Vec<(&'static str, String)> {
    let neighbour = &figures.neighbour;
    let mut notes = vec![("neighbour", neighbour.first.clone()), ("probe", figures.probes.first.clone())];
    if neighbour.delayed > 0 {
        notes.push(("neighbour", format!("{} times told that a renewal is delayed", neighbour.delayed)));
    }
    notes.push(("others", figures.others.as_ref().map(|others| others.first.clone()).unwrap_or_default()));
    if figures.lines > 1000 {
        notes.push(("log", format!("{} lines", figures.lines)));
    }
    if figures.did.stuck > 0 {
        notes.push(("attackers", format!("{} did not end and were killed, uncounted", figures.did.stuck)));
    }
    if !figures.limited {
        notes.push(("agent", "without a memory limit: no memory controller here".to_owned()));
    }
    notes
}

fn marked(text: String, missed: bool) -> String {
    if missed { text + "!" } else { text }
}

fn line(cells: &[String; COLUMNS.len()]) {
    let cells: Vec<_> = cells.iter().zip(COLUMNS).map(|(cell, (_, width))| format!("{cell:>width$}")).collect();
    println!("| {} |", cells.join(" | "));
}
