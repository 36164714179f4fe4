//! The conversation as text: questions, answers, tool calls as they run.

use std::collections::HashMap;

use eframe::egui::{
    Align, CollapsingHeader, Layout, Rect, RichText, Role, ScrollArea, Spinner, TextStyle, Ui, UiBuilder, Vec2,
    WidgetInfo,
};
use egui_commonmark::{CommonMarkCache, CommonMarkViewer};
use serde_json::{Map, Value};

use crate::conversation::{Call, Conversation, Figures, Item, Turn};
use crate::theme::{card, palette};

/// Widest text, points.
const WIDTH: f32 = 760.0;
/// Of a tool's answer so many lines are shown; the rest on demand.
const LINES: usize = 6;

/// What is going on in the turn that is being answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Activity {
    /// The question waits.
    Waiting,
    /// So many tokens of so many are read.
    Reading(usize, usize),
    /// Text comes.
    Writing,
    /// A call of this tool is being written.
    Opening(String),
    /// A tool runs.
    Calling,
}

/// What the view remembers between frames.
#[derive(Default)]
pub struct Chat {
    markdown: CommonMarkCache,
    /// Heights of complete turns, and the width they were laid out for: those out of sight are not laid out again.
    heights: HashMap<u64, (f32, f32)>,
}

impl Chat {
    /// Shows the turns up to the current one. `active` is the one that is being answered.
    pub fn show(&mut self, ui: &mut Ui, conversation: &Conversation, active: Option<(u64, &Activity)>) {
        ScrollArea::vertical().auto_shrink(false).stick_to_bottom(true).show(ui, |ui| {
            column(ui, |ui| {
                ui.add_space(12.0);
                for turn in conversation.path(conversation.current()) {
                    let activity = active.filter(|(id, _)| *id == turn.id).map(|(_, activity)| activity);
                    self.turn(ui, turn, activity);
                    ui.add_space(14.0);
                }
            });
        });
    }

    fn turn(&mut self, ui: &mut Ui, turn: &Turn, activity: Option<&Activity>) {
        let width = ui.available_width();
        let top = ui.cursor().min;
        if let Some(&(height, at)) = self.heights.get(&turn.id)
            && at == width
            && activity.is_none()
        {
            let rect = Rect::from_min_size(top, Vec2::new(width, height));
            if !ui.clip_rect().expand(200.0).intersects(rect) {
                ui.allocate_space(rect.size());
                return;
            }
        }
        let response = ui.push_id(turn.id, |ui| {
            ui.vertical(|ui| {
                question(ui, &turn.question);
                for (at, item) in turn.items.iter().enumerate() {
                    ui.push_id(at, |ui| self.item(ui, item));
                }
                match (activity, &turn.figures) {
                    (Some(activity), _) => under_way(ui, activity),
                    (None, Some(figures)) => ending(ui, figures),
                    (None, None) => {
                        ui.label(RichText::new("The program ended before this answer was complete.").small().weak());
                    }
                }
            })
        });
        if activity.is_none() {
            self.heights.insert(turn.id, (response.response.rect.height(), width));
        }
    }

    fn item(&mut self, ui: &mut Ui, item: &Item) {
        match item {
            Item::Reasoning(text) => {
                CollapsingHeader::new("Reasoning").id_salt("reasoning").show(ui, |ui| {
                    ui.label(RichText::new(text.trim()).weak());
                });
            }
            Item::Text(text) if text.trim().is_empty() => {}
            Item::Text(text) => {
                CommonMarkViewer::new().show(ui, &mut self.markdown, text.trim());
            }
            Item::Call(call) => tool(ui, call),
            Item::Broken(why) => {
                let colors = palette(ui.visuals());
                ui.label(RichText::new(format!("A call that cannot be made: {why}")).color(colors.bad));
            }
        }
    }
}

/// A column of text in the middle, no wider than can be read.
pub fn column<R>(ui: &mut Ui, content: impl FnOnce(&mut Ui) -> R) -> R {
    let all = ui.available_rect_before_wrap();
    let width = (all.width() - 32.0).clamp(80.0, WIDTH);
    let left = all.left() + ((all.width() - width) / 2.0).max(0.0).round();
    let rect = Rect::from_min_size([left, all.top()].into(), Vec2::new(width, all.height()));
    let layout = Layout::top_down(Align::Min);
    let response = ui.scope_builder(UiBuilder::new().max_rect(rect).layout(layout), |ui| {
        ui.set_max_width(width);
        content(ui)
    });
    response.inner
}

fn question(ui: &mut Ui, text: &str) {
    let colors = palette(ui.visuals());
    ui.with_layout(Layout::top_down(Align::Max), |ui| {
        ui.set_max_width(ui.available_width() * 0.85);
        card(colors.question).show(ui, |ui| {
            ui.with_layout(Layout::top_down(Align::Min), |ui| ui.label(text));
        });
    });
    ui.add_space(4.0);
}

fn tool(ui: &mut Ui, call: &Call) {
    let colors = palette(ui.visuals());
    card(colors.tool).show(ui, |ui| {
        ui.set_min_width(ui.available_width());
        ui.horizontal_wrapped(|ui| {
            ui.label(RichText::new(&call.name).strong().color(colors.accent));
            ui.label(RichText::new(arguments(&call.arguments)).monospace());
            match &call.outcome {
                None => {
                    ui.add(Spinner::new().size(14.0));
                    ui.label(RichText::new("runs").small().weak());
                }
                Some(outcome) => {
                    let (word, color) = if outcome.ok { ("done", colors.good) } else { ("failed", colors.bad) };
                    ui.label(RichText::new(word).small().color(color));
                    ui.label(RichText::new(time(outcome.seconds)).small().weak());
                }
            }
        });
        let Some(outcome) = &call.outcome else { return };
        let text = outcome.text.trim_end();
        let shown = |text: &str| RichText::new(text).text_style(TextStyle::Monospace).color(colors.text);
        let lines = text.lines().count();
        if lines <= LINES {
            ui.label(shown(text));
        } else {
            let first: Vec<&str> = text.lines().take(LINES).collect();
            ui.label(shown(&first.join("\n")));
            let rest: Vec<&str> = text.lines().skip(LINES).collect();
            CollapsingHeader::new(RichText::new(format!("{} more lines", rest.len())).small())
                .id_salt("rest")
                .show(ui, |ui| ui.label(shown(&rest.join("\n"))));
        }
    });
}

fn under_way(ui: &mut Ui, activity: &Activity) {
    let text = match activity {
        // The text itself shows that it comes, and the card of a tool that it runs.
        Activity::Writing | Activity::Calling => return,
        Activity::Waiting => "Waiting for the model".to_string(),
        Activity::Reading(done, total) => format!("Reading: {done} of {total} tokens"),
        Activity::Opening(name) => format!("Writing a call of {name}"),
    };
    ui.horizontal(|ui| {
        ui.add(Spinner::new().size(14.0));
        ui.label(RichText::new(text).small().weak());
    });
}

fn ending(ui: &mut Ui, figures: &Figures) {
    if let Some(note) = &figures.note {
        ui.label(RichText::new(note).color(palette(ui.visuals()).bad));
    }
    let mut text = format!("{} tokens", figures.wrote);
    if figures.rate > 0.0 {
        text += &format!(" at {:.0}/s", figures.rate);
    }
    text += &format!("; {} read in {}", figures.read, time(figures.reading));
    if figures.reused > 0 {
        text += &format!(", {} were in memory", figures.reused);
    }
    let response = ui.label(RichText::new(&text).small().weak());
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, format!("Answer complete: {text}")));
}

fn arguments(arguments: &Map<String, Value>) -> String {
    let all: Vec<String> = arguments.iter().map(|(key, value)| format!("{key}={value}")).collect();
    all.join(" ")
}

/// Seconds for people.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s < 0.001 => "under 1 ms".into(),
        s if s < 1.0 => format!("{:.0} ms", s * 1000.0),
        s => format!("{s:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people() {
        assert_eq!([0.0, 0.0123, 2.34].map(time), ["under 1 ms", "12 ms", "2.3 s"]);
    }
}
