//! Events for a person at a terminal, or for a plain text stream.
//!
//! Answers go to the standard output, all else to the standard error: `... | cat` gives the answer alone. Colours and progress
//! bars appear only where the stream is a terminal.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use console::{Style, Term};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::event::{Event, Sink, Start, Summary};

/// Reading gets a bar once it has taken this long.
const PATIENCE: Duration = Duration::from_millis(300);
/// Of a tool's answer so much is shown; the model gets all of it.
const RESULT_LINES: usize = 6;
const RESULT_WIDTH: usize = 160;

/// Shows events as text.
pub struct Terminal {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    dim: Style,
    call: Style,
    warn: Style,
    section: Section,
    bar: Option<ProgressBar>,
    reading: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq)]
enum Section {
    /// At the start of a line, nothing under way.
    None,
    Reasoning,
    Text {
        line_ended: bool,
    },
}

impl Terminal {
    /// The standard streams.
    pub fn new() -> Self {
        let err = || Style::new().for_stderr();
        Terminal {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            dim: err().dim(),
            call: err().cyan(),
            warn: err().yellow(),
            section: Section::None,
            bar: None,
            reading: None,
        }
    }

    /// Ends whatever line is under way.
    fn section(&mut self, section: Section) -> io::Result<()> {
        self.clear_bar();
        if section == self.section {
            return Ok(());
        }
        match self.section {
            Section::Text { line_ended: false } => {
                writeln!(self.out)?;
                self.out.flush()?;
            }
            Section::Reasoning => writeln!(self.err)?,
            _ => {}
        }
        self.section = section;
        Ok(())
    }

    fn clear_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&mut self, style: &Style, text: &str) -> io::Result<()> {
        self.section(Section::None)?;
        writeln!(self.err, "{}", style.apply_to(visible(text)))
    }

    fn prefill(&mut self, done: usize, total: usize, reused: usize) -> io::Result<()> {
        if done == total {
            self.reading = None;
            self.clear_bar();
            return Ok(());
        }
        if self.bar.is_none() {
            self.section(Section::None)?;
        }
        let since = *self.reading.get_or_insert_with(Instant::now);
        if self.bar.is_none() && since.elapsed() >= PATIENCE && total - reused > 1 {
            let style = "reading {bar:30} {pos}/{len} tokens, {eta} left";
            self.bar = Some(progress(total as u64, style).with_position(reused as u64));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        }
        Ok(())
    }

    fn done(&mut self, summary: &Summary) -> io::Result<()> {
        self.reading = None;
        let (dim, warn) = (self.dim.clone(), self.warn.clone());
        if let Some(note) = summary.reason.note() {
            self.say(&warn, &format!("[{note}]"))?;
        }
        self.say(&dim, &format!("[{}]", figures(summary)))
    }

    /// Shows what the agent runs on.
    pub fn start(&mut self, start: &Start) -> io::Result<()> {
        let dim = self.dim.clone();
        let mut lines = vec![
            ("device", format!("{}: {}", start.device, start.why)),
            ("model", format!("{}: {}", start.model, start.shape)),
        ];
        if !start.tools.is_empty() {
            lines.push(("tools", start.tools.join(", ")));
        }
        if let Some(folder) = &start.folder {
            lines.push(("files", format!("{folder} and below, for reading only")));
        }
        for (key, value) in lines {
            writeln!(self.err, "{} {}", dim.apply_to(format!("{key:<7}")), visible(&value))?;
        }
        if let Some((what, questions)) = start.try_it {
            writeln!(self.err, "{what}")?;
            writeln!(self.err, "For more, give a Qwen3.5 checkpoint with --model DIR. Things to try:")?;
            for question in questions {
                writeln!(self.err, "  {}", self.call.apply_to(question))?;
            }
        }
        self.err.flush()
    }
}

impl Sink for Terminal {
    fn event(&mut self, event: Event<'_>) -> io::Result<()> {
        let (dim, call, warn) = (self.dim.clone(), self.call.clone(), self.warn.clone());
        match event {
            Event::Start(start) => self.start(start)?,
            Event::Restored(turns, restored) => {
                let turns = if turns == 1 { "1 turn".into() } else { format!("{turns} turns") };
                self.say(&dim, &format!("The conversation of {turns} goes on: {restored}. /clear forgets it."))?;
            }
            Event::Prefill { done, total, reused } => self.prefill(done, total, reused)?,
            Event::Reasoning(text) => {
                self.section(Section::Reasoning)?;
                write!(self.err, "{}", dim.apply_to(visible(text)))?;
                self.err.flush()?;
            }
            Event::ReasoningCut(count) => {
                self.say(&warn, &format!("[reasoning ended after {}, see --think-budget]", tokens(count)))?;
            }
            Event::Token(text) => {
                if !matches!(self.section, Section::Text { .. }) {
                    self.section(Section::Text { line_ended: false })?;
                }
                self.section = Section::Text { line_ended: text.ends_with('\n') };
                write!(self.out, "{}", visible(text))?;
                self.out.flush()?;
            }
            Event::Opening(name) => {
                self.section(Section::None)?;
                self.bar = Some(spinner(&format!("writing a call of {}", visible(name))));
            }
            Event::ToolCall(made) => self.say(&call, &format!("→ {}{}", made.name, arguments(&made.arguments)))?,
            Event::ToolResult(_, outcome) => {
                let style = if outcome.ok { &dim } else { &warn };
                let mark = if outcome.ok { "  " } else { "  failed: " };
                self.say(style, &excerpt(mark, &outcome.text))?;
            }
            Event::BrokenCall(broken) => {
                self.say(&warn, &format!("→ a call that cannot be made: {} (/raw shows it)", broken.why))?;
            }
            Event::Notice(text) => self.say(&warn, &format!("[{text}]"))?,
            Event::Done(summary) => self.done(summary)?,
            Event::Error(message) => self.say(&warn, &format!("error: {message}"))?,
        }
        self.err.flush()
    }
}

/// A bar on the standard error, invisible where that is no terminal.
pub fn progress(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("━╸ "))
}

/// Says that something is under way whose end is not known.
pub fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_string());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A large number in a few characters: 752.4 M.
pub fn count(n: u64) -> String {
    match n {
        0..1000 => n.to_string(),
        1000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.1} G", n as f64 / 1e9),
    }
}

/// True if both streams that a conversation needs are terminals.
pub fn interactive() -> bool {
    console::user_attended() && io::IsTerminal::is_terminal(&io::stdin())
}

/// Clears nothing and moves nothing: text from a model or a file must not steer the terminal.
pub fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

fn tokens(n: usize) -> String {
    if n == 1 { "1 token".into() } else { format!("{n} tokens") }
}

/// Counts and speeds in one line.
fn figures(summary: &Summary) -> String {
    let mut parts = vec![format!("{} written", tokens(summary.generated_tokens))];
    // One token takes no time of its own: reading ends with it.
    if summary.decoded_tokens > 0 {
        parts[0] += &format!(" at {:.1} tokens/s", summary.rate());
    }
    let aside = match (summary.reused_tokens, summary.reread_tokens) {
        (0, 0) => String::new(),
        (0, again) => format!(" ({again} of them again)"),
        (kept, 0) => format!(" ({kept} more were in memory)"),
        (kept, again) => format!(" ({again} of them again, {kept} more were in memory)"),
    };
    parts.push(format!("{} read in {:.2} s{aside}", tokens(summary.read_tokens), summary.prefill.as_secs_f64()));
    match summary.tool_calls {
        0 => {}
        1 => parts.push("1 tool call".into()),
        n => parts.push(format!("{n} tool calls")),
    }
    parts.join("; ")
}

fn arguments(arguments: &Map<String, Value>) -> String {
    let width = Term::stderr().size_checked().map_or(100, |(_, columns)| usize::from(columns)).max(40);
    let all: Vec<String> = arguments.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let all = if all.is_empty() { String::new() } else { format!(" {}", all.join(" ")) };
    shorten(&all, width)
}

/// The beginning of a tool's answer, indented.
fn excerpt(mark: &str, text: &str) -> String {
    let total = text.lines().count();
    let mut lines: Vec<String> = text.lines().take(RESULT_LINES).map(|line| shorten(line, RESULT_WIDTH)).collect();
    if total > RESULT_LINES {
        lines.push(format!("… {} more lines", total - RESULT_LINES));
    }
    format!("{mark}{}", lines.join("\n  "))
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width { text.to_string() } else { text.chars().take(width - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;
    use crate::event::Reason;
    use crate::parse::Call;
    use crate::tools::Outcome;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn shown(events: &[Event<'_>]) -> (String, String) {
        let (out, err) = (Shared::default(), Shared::default());
        let plain = Style::new().force_styling(false);
        let mut terminal = Terminal {
            out: Box::new(out.clone()),
            err: Box::new(err.clone()),
            dim: plain.clone(),
            call: plain.clone(),
            warn: plain,
            ..Terminal::new()
        };
        for event in events {
            terminal.event(*event).unwrap();
        }
        let text = |shared: Shared| String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        (text(out), text(err))
    }

    #[test]
    fn answers_and_the_rest_are_apart() {
        let call = Call { name: "clock".into(), arguments: json!({"time_zone": "UTC"}).as_object().unwrap().clone() };
        let outcome = Outcome { ok: true, text: "noon".into() };
        let summary = Summary {
            reason: Reason::Length,
            generated_tokens: 4,
            decoded_tokens: 3,
            decode: Duration::from_secs(2),
            tool_calls: 1,
            ..Summary::default()
        };
        let (out, err) = shown(&[
            Event::Prefill { done: 0, total: 9, reused: 0 },
            Event::Prefill { done: 9, total: 9, reused: 0 },
            Event::Reasoning("hm"),
            Event::Reasoning("m"),
            Event::Token("Let me"),
            Event::Token(" see."),
            Event::Opening("clock"),
            Event::ToolCall(&call),
            Event::ToolResult("clock", &outcome),
            Event::Token("Noon.\n"),
            Event::Done(&summary),
        ]);
        assert_eq!(out, "Let me see.\nNoon.\n");
        assert_eq!(
            err,
            "hmm\n→ clock time_zone=\"UTC\"\n  noon\n[cut at the token budget, see --max-tokens]\n\
            [4 tokens written at 1.5 tokens/s; 0 tokens read in 0.00 s; 1 tool call]\n"
        );
    }

    #[test]
    fn text_does_not_steer_the_terminal() {
        let (out, err) = shown(&[Event::Token("a\u{1b}[2Jb\tc\r\n"), Event::Error("\u{7}bell")]);
        assert_eq!((out.as_str(), err.as_str()), ("a\u{fffd}[2Jb\tc\u{fffd}\n", "error: \u{fffd}bell\n"));
    }

    #[test]
    fn long_results_are_cut() {
        let outcome = Outcome { ok: false, text: "line\n".repeat(10) + &"x".repeat(1000) };
        let (_, err) = shown(&[Event::ToolResult("t", &outcome)]);
        assert_eq!(err, format!("  failed: {}\n  … 5 more lines\n", ["line"; 6].join("\n  ")));
    }
}
