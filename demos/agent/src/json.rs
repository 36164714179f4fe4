//! Events as lines of JSON, for programs.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::event::{Event, Sink};

/// Writes one object a line and flushes it.
pub struct JsonLines<W>(pub W);

impl<W: Write> Sink for JsonLines<W> {
    fn event(&mut self, event: Event<'_>) -> io::Result<()> {
        if let Some(value) = to_json(event) {
            writeln!(self.0, "{value}")?;
            self.0.flush()?;
        }
        Ok(())
    }
}

fn to_json(event: Event<'_>) -> Option<Value> {
    Some(match event {
        Event::Start(start) => json!({
            "event": "start",
            "device": start.device,
            "why": start.why,
            "model": start.model,
            "shape": start.shape,
            "tools": start.tools,
            "folder": start.folder,
            "context": start.context,
            "sampling": start.sampling,
        }),
        Event::Restored(turns, restored) => json!({
            "event": "restored",
            "turns": turns,
            "tokens": restored.tokens,
            "total": restored.total,
            "seconds": restored.took.as_secs_f64(),
        }),
        Event::Prefill { done, total, reused } => {
            json!({"event": "prefill", "done": done, "total": total, "reused": reused})
        }
        Event::Reasoning(text) => json!({"event": "reasoning", "text": text}),
        Event::ReasoningCut(tokens) => json!({"event": "reasoning_cut", "tokens": tokens}),
        Event::Token(text) => json!({"event": "token", "text": text}),
        // The call itself follows, complete.
        Event::Opening(_) => return None,
        Event::ToolCall(call) => json!({"event": "tool_call", "name": call.name, "arguments": call.arguments}),
        Event::ToolResult(name, outcome) => {
            json!({"event": "tool_result", "name": name, "ok": outcome.ok, "text": outcome.text})
        }
        Event::Notice(text) => json!({"event": "notice", "text": text}),
        Event::BrokenCall(broken) => {
            json!({"event": "broken_call", "name": broken.name, "why": broken.why, "raw": broken.raw})
        }
        Event::Done(summary) => json!({
            "event": "done",
            "reason": summary.reason.name(),
            "prompt_tokens": summary.prompt_tokens,
            "read_tokens": summary.read_tokens,
            "reused_tokens": summary.reused_tokens,
            "reread_tokens": summary.reread_tokens,
            "generated_tokens": summary.generated_tokens,
            "reasoning_tokens": summary.reasoning_tokens,
            "reasoning_cut": summary.reasoning_cut,
            "tool_calls": summary.tool_calls,
            "prefill_seconds": summary.prefill.as_secs_f64(),
            "decode_seconds": summary.decode.as_secs_f64(),
            "tokens_per_second": summary.rate(),
        }),
        Event::Error(message) => json!({"event": "error", "message": message}),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Reason, Summary};
    use crate::tools::Outcome;

    #[test]
    fn one_object_a_line() {
        let mut out = Vec::new();
        let mut sink = JsonLines(&mut out);
        let summary = Summary { reason: Reason::ToolLimit, ..Summary::default() };
        sink.event(Event::Prefill { done: 1, total: 2, reused: 0 }).unwrap();
        sink.event(Event::Token("a\n\"b\" 日本\u{1b}")).unwrap();
        sink.event(Event::Opening("clock")).unwrap();
        sink.event(Event::ToolResult("clock", &Outcome { ok: true, text: "noon".into() })).unwrap();
        sink.event(Event::Done(&summary)).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[1], json!({"event": "token", "text": "a\n\"b\" 日本\u{1b}"}));
        assert_eq!((&lines[3]["reason"], &lines[3]["tokens_per_second"]), (&json!("tool_limit"), &json!(0.0)));
    }
}
