//! Aligned tables for a terminal.

use std::fmt;
use std::io::IsTerminal;

/// A table under construction.
pub struct Table {
    head: Vec<String>,
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles; the first `left` columns are aligned left, the others right.
    pub fn new(left: usize, head: &[&str]) -> Table {
        Table { head: head.iter().map(|s| s.to_string()).collect(), left, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(self.head.len());
        let mut widths = vec![0; columns];
        for row in self.rows.iter().chain([&self.head]) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(visible(cell));
            }
        }
        let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
        for row in [&self.head, &rule].into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                if i > 0 {
                    line.push_str("  ");
                }
                let pad = " ".repeat(width - visible(cell));
                let (before, after) = if i < self.left { ("", pad.as_str()) } else { (pad.as_str(), "") };
                line.extend([before, cell, after]);
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Characters that take room on a terminal: all but colour sequences.
fn visible(cell: &str) -> usize {
    let mut parts = cell.split('\x1b');
    let first = parts.next().unwrap_or_default().chars().count();
    first + parts.map(|part| part.split_once('m').map_or(0, |(_, rest)| rest.chars().count())).sum::<usize>()
}

/// A verdict, in colour on a terminal that wants it.
pub fn verdict(pass: bool) -> String {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    match (pass, colour) {
        (true, false) => "PASS".into(),
        (false, false) => "FAIL".into(),
        (true, true) => "\x1b[32mPASS\x1b[0m".into(),
        (false, true) => "\x1b[31mFAIL\x1b[0m".into(),
    }
}

/// Three significant digits with a metric prefix: `12.3 G`.
pub fn metric(x: f64) -> String {
    for (factor, prefix) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if x.abs() >= factor {
            return format!("{} {prefix}", significant(x / factor));
        }
    }
    format!("{} ", significant(x))
}

/// Three significant digits.
pub fn significant(x: f64) -> String {
    let digits = if x.abs() >= 100.0 {
        0
    } else if x.abs() >= 10.0 {
        1
    } else if x.abs() >= 1.0 {
        2
    } else {
        3
    };
    format!("{x:.digits$}")
}

/// A relative error: `3.1e-7`, or `NaN` where the numbers do not allow one.
pub fn error(e: f64) -> String {
    if e.is_finite() { format!("{e:.1e}") } else { "NaN".into() }
}

/// A size in bytes with a binary prefix: `1.50 GiB`.
pub fn bytes(n: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if n >> shift > 0 {
            return format!("{} {unit}", significant(n as f64 / (1u64 << shift) as f64));
        }
    }
    format!("{n} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(1, &["case", "error"]);
        table.row(vec!["a".into(), "1e-7".into()]);
        table.row(vec!["longer".into(), "1.25e-7".into()]);
        assert_eq!(table.to_string(), "case      error\n------  -------\na          1e-7\nlonger  1.25e-7\n");
    }

    #[test]
    fn colours_take_no_room() {
        assert_eq!(visible("\x1b[32mPASS\x1b[0m"), 4);
        assert_eq!(visible("plain"), 5);
    }

    #[test]
    fn a_short_row_is_legal() {
        let mut table = Table::new(2, &["a", "b", "c"]);
        table.row(vec!["x".into()]);
        assert_eq!(table.to_string(), "a  b  c\n-  -  -\nx\n");
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(metric(225.4e9), "225 G");
        assert_eq!(metric(1.5e12), "1.50 T");
        assert_eq!(metric(0.5), "0.500 ");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(17), "17 B");
    }
}
