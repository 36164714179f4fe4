//! Where the user types.

use eframe::egui::{Button, Frame, Key, KeyboardShortcut, Modifiers, RichText, ScrollArea, Sides, TextEdit, Ui};

use super::{App, Model, name};
use crate::theme::{card, palette};

impl App {
    /// The field for the question, and the button beside it.
    pub(super) fn composer(&mut self, ui: &mut Ui) {
        let colors = palette(ui.visuals());
        let ready = matches!(self.model, Model::Ready(_));
        let newline = KeyboardShortcut::new(Modifiers::SHIFT, Key::Enter);
        let mut send = false;
        card(colors.side).stroke((1.0, colors.line)).show(ui, |ui| {
            let edit = TextEdit::multiline(&mut self.draft)
                .id_salt("draft")
                .desired_rows(2)
                .desired_width(f32::INFINITY)
                .frame(Frame::NONE)
                .return_key(newline)
                .hint_text("Ask something. Enter sends, Shift+Enter begins a new line.");
            let response = ScrollArea::vertical().max_height(140.0).show(ui, |ui| ui.add(edit)).inner;
            response.ctx.accesskit_node_builder(response.id, |node| node.set_label("Your question"));
            // Whoever opens the window wants to type.
            if std::mem::take(&mut self.fresh) && self.worker.is_some() {
                response.request_focus();
            }
            if response.has_focus() && ui.input(|input| input.key_pressed(Key::Enter) && input.modifiers.is_none()) {
                send = true;
            }
            Sides::new().shrink_left().truncate().show(
                ui,
                |ui| ui.label(RichText::new(self.status()).small().weak()),
                |ui| {
                    if self.active.is_some() {
                        if ui.button("Stop").clicked() {
                            self.stop();
                        }
                    } else {
                        let text = RichText::new("Send").color(colors.on_accent);
                        let can = ready && !self.draft.trim().is_empty();
                        let button = Button::new(text).fill(colors.accent);
                        send |= ui.add_enabled(can, button).clicked();
                    }
                },
            );
        });
        if send && self.active.is_none() && ready && !self.draft.trim().is_empty() {
            let question = std::mem::take(&mut self.draft);
            self.ask(&question);
        }
    }

    /// What runs where, in one line.
    fn status(&self) -> String {
        match &self.model {
            Model::None => "no model".into(),
            Model::Loading(..) => "the model is being loaded".into(),
            Model::Compiling(..) => "its kernels are being compiled".into(),
            Model::Ready(loaded) => {
                let model = loaded.choice.model.as_deref().map_or_else(|| "the model inside".into(), name);
                let device = loaded.account.chosen.map_or("", |at| &loaded.account.candidates[at].name);
                format!("{model} on {device}")
            }
        }
    }
}
