//! The right side: which model, which device and why, how fast, how much memory.

use std::path::PathBuf;

use eframe::egui::{Button, RichText, Role, TextEdit, Ui, WidgetInfo};
use gatedelta::device::{Candidate, Verdict, class_name};
use gatedelta::tune::Kind;

use crate::app::{App, Model, name};
use crate::chat;
use crate::store::Theme;
use crate::theme::{self, card, palette};
use crate::tree::size;
use crate::worker::Choice;

/// Shows all of it.
pub fn show(app: &mut App, ui: &mut Ui) {
    let idle = !app.answering() && !matches!(app.model, Model::Loading(..) | Model::Compiling(..));
    let mut wanted = None;
    title(ui, "Model");
    wanted = model(app, ui, idle).or(wanted);
    ui.add_space(12.0);
    title(ui, "Device");
    wanted = device(app, ui, idle).or(wanted);
    ui.add_space(12.0);
    title(ui, "Speed and memory");
    app.samples.show(ui);
    ui.add_space(12.0);
    title(ui, "Colours");
    colours(app, ui);
    if let Some(choice) = wanted {
        let ctx = ui.ctx().clone();
        app.load(&ctx, choice);
    }
}

fn title(ui: &mut Ui, text: &str) {
    ui.strong(text);
}

fn model(app: &mut App, ui: &mut Ui, idle: bool) -> Option<Choice> {
    let device = app.settings.device.clone();
    match &app.model {
        Model::None => {
            ui.label(RichText::new("None is loaded.").weak());
        }
        Model::Loading(done, total) if *total > 0 => {
            ui.label(format!("Loading: {} of {}", size(*done), size(*total)));
        }
        Model::Loading(..) => {
            ui.label("Loading");
        }
        Model::Compiling(done, total) => {
            ui.label(format!("Compiling: {done} of {total} kernels"));
        }
        Model::Ready(loaded) => {
            ui.label(loaded.choice.model.as_deref().map_or_else(|| "The one inside the program".into(), name));
            ui.label(RichText::new(&loaded.start.shape).small().weak());
            let memory = &loaded.memory;
            let parts = format!(
                "weights {}, states {}, full context {}; loaded in {}",
                size(memory.weights),
                size(memory.states + memory.tails),
                size(memory.cache),
                chat::time(loaded.time.as_secs_f64()),
            );
            ui.label(RichText::new(parts).small().weak());
        }
    }
    let mut wanted = None;
    let label = ui.label(RichText::new("Checkpoint directory (or drop one here)").small());
    let edit = TextEdit::singleline(&mut app.directory).desired_width(f32::INFINITY).hint_text("/models/Qwen3.5-0.8B");
    let edit = ui.add(edit).labelled_by(label.id);
    let entered = edit.lost_focus() && ui.input(|input| input.key_pressed(eframe::egui::Key::Enter));
    let typed = app.directory.trim();
    ui.horizontal_wrapped(|ui| {
        let load = ui.add_enabled(idle && !typed.is_empty(), Button::new("Load"));
        if load.clicked() || entered && idle && !typed.is_empty() {
            wanted = Some(Some(PathBuf::from(typed)));
        }
        if ui.add_enabled(idle, Button::new("Use the one inside")).clicked() {
            wanted = Some(None);
        }
    });
    let used = app.settings.model.as_ref();
    for recent in app.settings.recent.iter().filter(|recent| Some(*recent) != used).take(4) {
        let link = ui.add_enabled(idle, Button::new(RichText::new(name(recent)).small()).frame(false).truncate());
        if link.on_hover_text(recent.display().to_string()).clicked() {
            wanted = Some(Some(recent.clone()));
        }
    }
    wanted.map(|model| Choice { model, device })
}

fn device(app: &mut App, ui: &mut Ui, idle: bool) -> Option<Choice> {
    let Some(account) = app.account.clone() else {
        ui.label(RichText::new("Not looked for yet.").weak());
        return None;
    };
    let mut wanted = None;
    for (at, candidate) in account.candidates.iter().enumerate() {
        let used = account.chosen == Some(at) && matches!(app.model, Model::Ready(_));
        if row(ui, candidate, used, idle) {
            wanted = Some(Some(candidate.name.clone()));
        }
    }
    if let Model::Ready(loaded) = &app.model {
        let shared = if loaded.shared { " It also draws this window." } else { "" };
        ui.label(RichText::new(format!("In use: {}.{shared}", loaded.account.why)).small().weak());
    }
    ui.horizontal_wrapped(|ui| {
        if ui.add_enabled(idle, Button::new("Use the best")).clicked() {
            wanted = Some(None);
        }
        let test = ui.add_enabled(idle && !app.testing, Button::new("Test all"));
        if test.on_hover_text("Open every device and run its self-test").clicked() {
            let ctx = ui.ctx().clone();
            app.test_devices(&ctx);
        }
        if app.testing {
            ui.spinner();
        }
    });
    let model = app.settings.model.clone();
    wanted.map(|device| Choice { model, device })
}

/// A device; true if it is to be used.
fn row(ui: &mut Ui, candidate: &Candidate, used: bool, idle: bool) -> bool {
    let colors = palette(ui.visuals());
    let fill = if used { colors.question } else { colors.page };
    let absent = candidate.driver == "absent";
    let mut clicked = false;
    card(fill).stroke((1.0, if used { colors.accent } else { colors.line })).show(ui, |ui| {
        ui.set_min_width(ui.available_width());
        ui.horizontal_wrapped(|ui| {
            ui.strong(&candidate.name);
            ui.label(RichText::new(class(candidate)).small().weak());
        });
        if !absent {
            ui.label(RichText::new(&candidate.driver).small().weak());
        }
        let color = match candidate.verdict {
            Verdict::Works(_) => colors.good,
            Verdict::NotTried(_) => colors.dim,
            Verdict::Refused(_) => colors.bad,
        };
        ui.label(RichText::new(candidate.verdict.to_string()).small().color(color));
        if !used && !absent {
            let button = ui.add_enabled(idle, Button::new("Use").small());
            let what = format!("Use {}", candidate.name);
            button.widget_info(|| WidgetInfo::labeled(Role::Button, idle, &what));
            clicked = button.clicked();
        }
    });
    clicked
}

fn class(candidate: &Candidate) -> &'static str {
    match candidate.kind {
        Kind::Cuda | Kind::WebGpu if candidate.driver == "absent" => "",
        _ => class_name(candidate.class),
    }
}

fn colours(app: &mut App, ui: &mut Ui) {
    let before = app.settings.theme;
    ui.horizontal(|ui| {
        for (theme, text) in [(Theme::System, "System"), (Theme::Light, "Light"), (Theme::Dark, "Dark")] {
            ui.selectable_value(&mut app.settings.theme, theme, text);
        }
    });
    if app.settings.theme != before {
        theme::choose(ui.ctx(), app.settings.theme);
        app.keep_settings();
    }
}
