//! The window: what it knows, what it does with what the user and the worker say, and how it is laid out.

mod composer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use eframe::egui::{
    CentralPanel, Context, Frame, Margin, Panel, ProgressBar, RichText, Role, ScrollArea, Sides, Spinner, Ui,
    WidgetInfo,
};
use gatedelta::backend::webgpu::WebGpu;
use gatedelta::device::Account;
use gatedelta_agent::options::Args;

use crate::chat::{Activity, Chat, column};
use crate::conversation::{Call, Conversation, Figures, Item};
use crate::plots::Samples;
use crate::side;
use crate::store::{Settings, Store};
use crate::theme::{self, palette};
use crate::tree::{self, Node};
use crate::worker::{Choice, Held, Loaded, Update, Worker};

/// While an answer comes it is kept this often.
const KEEP: Duration = Duration::from_secs(1);
/// An answer that is under way when the window closes gets this long to end.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the window is given.
pub struct Setup {
    /// What the agent is given; model and device come before what the settings say.
    pub args: Args,
    /// Where the conversation is kept; nowhere if none.
    pub folder: Option<PathBuf>,
    /// The device that draws the window.
    pub host: Option<WebGpu>,
}

/// What is known of the model.
#[derive(Debug, Clone, Default)]
pub enum Model {
    /// Nothing is loaded, nothing is on its way.
    #[default]
    None,
    /// So many bytes of so many are loaded.
    Loading(u64, u64),
    /// It is loaded; so many of its kernels of so many are compiled.
    Compiling(u64, u64),
    /// It answers.
    Ready(Box<Loaded>),
}

/// The turn that is being answered.
struct Active {
    turn: u64,
    activity: Activity,
    kept: Instant,
}

/// The window's content.
#[derive(Default)]
pub struct App {
    args: Args,
    host: Option<WebGpu>,
    worker: Option<Worker>,
    store: Option<Store>,
    pub(crate) settings: Settings,
    conversation: Conversation,
    pub(crate) model: Model,
    /// The devices, as the last choice or test left them.
    pub(crate) account: Option<Account>,
    pub(crate) testing: bool,
    active: Option<Active>,
    /// What the model holds of each turn.
    held: HashMap<u64, Held>,
    chat: Chat,
    /// What the user is typing.
    draft: String,
    /// The model directory that the user is typing.
    pub(crate) directory: String,
    errors: Vec<String>,
    pub(crate) samples: Samples,
    /// Nothing was shown yet.
    fresh: bool,
    closed: bool,
}

impl App {
    /// Opens what was kept, and begins to load the model.
    pub fn new(ctx: &Context, setup: Setup) -> Self {
        theme::install(ctx);
        let mut app = App::default();
        (app.args, app.host, app.fresh) = (setup.args, setup.host, true);
        if let Some(folder) = &setup.folder {
            match Store::open(folder) {
                Ok((store, kept)) => {
                    app.store = Some(store);
                    (app.conversation, app.settings) = (kept.conversation, kept.settings);
                    app.errors = kept.notices;
                }
                Err(why) => app.errors.push(format!("{why:#}")),
            }
        }
        theme::choose(ctx, app.settings.theme);
        let choice = Choice {
            model: app.args.model.clone().or_else(|| app.settings.model.clone()),
            device: app.args.device.clone().or_else(|| app.settings.device.clone()),
        };
        app.directory = choice.model.as_ref().map_or_else(String::new, |dir| dir.display().to_string());
        app.load(ctx, choice);
        app
    }

    /// Shows a conversation and devices with no worker behind it: for pictures.
    pub fn still(ctx: &Context, conversation: Conversation, loaded: Loaded, samples: Samples) -> Self {
        theme::install(ctx);
        let mut app = App::default();
        (app.conversation, app.samples) = (conversation, samples);
        app.account = Some(loaded.account.clone());
        app.model = Model::Ready(Box::new(loaded));
        app
    }

    /// The conversation.
    pub fn conversation(&self) -> &Conversation {
        &self.conversation
    }

    /// The errors that are shown.
    pub fn errors(&self) -> &[String] {
        &self.errors
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Whether an answer is under way.
    pub fn answering(&self) -> bool {
        self.active.is_some()
    }

    /// What the user is typing.
    pub fn draft(&mut self) -> &mut String {
        &mut self.draft
    }

    /// Shows an error.
    pub fn report(&mut self, error: String) {
        if self.errors.last() != Some(&error) {
            self.errors.push(error);
        }
    }

    /// Loads a model onto a device.
    pub(crate) fn load(&mut self, ctx: &Context, choice: Choice) {
        if self.active.is_some() {
            return self.report("An answer is under way: stop it before another model or device is loaded.".into());
        }
        if let Err(why) = self.with_worker(ctx, |worker| worker.load(choice)) {
            return self.report(format!("{why:#}"));
        }
        self.model = Model::Loading(0, 0);
    }

    /// Tries every device.
    pub(crate) fn test_devices(&mut self, ctx: &Context) {
        match self.with_worker(ctx, Worker::test_devices) {
            Ok(()) => self.testing = true,
            Err(why) => self.report(format!("{why:#}")),
        }
    }

    fn with_worker(&mut self, ctx: &Context, f: impl FnOnce(&Worker)) -> Result<()> {
        if self.worker.is_none() {
            let wake = ctx.clone();
            // A window that keeps nothing leaves the model's state to the one that does.
            let state = self.store.as_ref().filter(|store| store.writes()).map(|store| store.folder().join("state"));
            let worker = Worker::start(self.args.clone(), self.host.clone(), state, move || wake.request_repaint())?;
            self.worker = Some(worker);
        }
        if let Some(worker) = &self.worker {
            f(worker);
        }
        Ok(())
    }

    /// Asks a question after the current turn.
    pub fn ask(&mut self, question: &str) {
        let question = question.trim();
        if question.is_empty() || self.active.is_some() || !matches!(self.model, Model::Ready(_)) {
            return;
        }
        let Some(worker) = &self.worker else { return };
        let history = self.conversation.told(self.conversation.current());
        let turn = self.conversation.ask(question);
        worker.ask(turn, history, question.to_string());
        self.active = Some(Active { turn, activity: Activity::Waiting, kept: Instant::now() });
        self.keep();
    }

    /// Ends the answer that is under way.
    pub fn stop(&self) {
        if let Some(worker) = &self.worker {
            worker.stop();
        }
    }

    /// Goes to an earlier turn, or before the first one.
    pub fn go(&mut self, to: Option<u64>) {
        if self.active.is_none() {
            self.conversation.go(to);
            self.keep();
        }
    }

    fn keep(&mut self) {
        if let Some(store) = &self.store {
            store.keep(&self.conversation);
        }
        if let Some(active) = &mut self.active {
            active.kept = Instant::now();
        }
    }

    pub(crate) fn keep_settings(&mut self) {
        if let Some(store) = &self.store {
            store.keep_settings(&self.settings);
        }
    }

    /// Takes what the worker has said.
    fn listen(&mut self) {
        while let Some(worker) = &self.worker {
            match worker.next() {
                Ok(Some(update)) => self.hear(update),
                Ok(None) => break,
                Err(why) => {
                    // What came of the answer stays.
                    self.worker = None;
                    self.active = None;
                    self.model = Model::None;
                    self.testing = false;
                    self.keep();
                    self.report(format!("{why:#}"));
                }
            }
        }
        if let Some(trouble) = self.store.as_ref().and_then(Store::trouble) {
            self.report(trouble);
        }
        if self.active.as_ref().is_some_and(|active| active.kept.elapsed() > KEEP) {
            self.keep();
        }
    }

    /// Takes one update.
    fn hear(&mut self, update: Update) {
        match update {
            Update::Loading(done, total) => self.model = Model::Loading(done, total),
            Update::Compiling(done, total) => self.model = Model::Compiling(done, total),
            Update::Loaded(loaded) => self.loaded(loaded),
            Update::Refused(why) => {
                // If another model takes its place, it says so next.
                self.model = Model::None;
                self.report(why);
            }
            Update::Tested(account) => {
                self.testing = false;
                self.tested(account);
            }
            Update::Notice(text) => self.report(text),
            Update::Answered(turn, answer) => self.answered(turn, answer),
            Update::Held(held) => self.held = held.into_iter().map(|held| (held.turn, held)).collect(),
            update => self.progress(update),
        }
    }

    fn loaded(&mut self, loaded: Box<Loaded>) {
        let Choice { model, device } = loaded.choice.clone();
        // A path that was refused stays in its field, to be corrected.
        if let Some(dir) = &model {
            self.directory = dir.display().to_string();
            self.settings.recent.retain(|recent| recent != dir);
            self.settings.recent.insert(0, dir.clone());
            self.settings.recent.truncate(8);
        }
        (self.settings.model, self.settings.device) = (model, device);
        self.keep_settings();
        self.account = Some(loaded.account.clone());
        self.held.clear();
        self.model = Model::Ready(loaded);
    }

    /// What a test found, with the device that is in use still marked.
    fn tested(&mut self, mut account: Account) {
        if let Model::Ready(loaded) = &self.model {
            let used = loaded.account.chosen.map(|at| &loaded.account.candidates[at]);
            let same = |used: &gatedelta::device::Candidate| {
                account.candidates.iter().position(|c| c.name == used.name && c.driver == used.driver)
            };
            account.chosen = used.and_then(same);
            account.why.clone_from(&loaded.account.why);
        }
        self.account = Some(account);
    }

    fn progress(&mut self, update: Update) {
        let Some(active) = &mut self.active else { return };
        let Some(turn) = self.conversation.turn_mut(active.turn) else { return };
        active.activity = match update {
            Update::Reading(done, total) if done < total => Activity::Reading(done, total),
            Update::Reading(..) => Activity::Writing,
            Update::Reasoning(text) => {
                turn.push(true, &text);
                Activity::Writing
            }
            Update::Text(text) => {
                turn.push(false, &text);
                Activity::Writing
            }
            Update::Opening(name) => Activity::Opening(name),
            Update::Called(name, arguments) => {
                turn.items.push(Item::Call(Call { name, arguments, outcome: None }));
                Activity::Calling
            }
            Update::Returned(outcome) => {
                turn.resolve(outcome);
                Activity::Waiting
            }
            Update::Broken(why) => {
                turn.items.push(Item::Broken(why));
                Activity::Writing
            }
            _ => return,
        };
    }

    fn answered(&mut self, id: u64, answer: std::result::Result<(Figures, Vec<serde_json::Value>), String>) {
        self.active = None;
        let Some(turn) = self.conversation.turn_mut(id) else { return };
        match answer {
            Ok((figures, messages)) if !messages.is_empty() => {
                (turn.figures, turn.messages) = (Some(figures), messages);
            }
            // Nothing was written before the window closes: the question stays, as after a crash.
            _ if self.closed => {}
            // Nothing was written: the question goes back to where it was typed.
            other => {
                let question = turn.question.clone();
                self.conversation.forget(id);
                if self.draft.trim().is_empty() {
                    self.draft = question;
                }
                if let Err(why) = other {
                    self.report(why);
                }
            }
        }
        self.keep();
    }

    /// Ends everything: an answer under way is stopped, and what came of it is kept. To be called before the window goes.
    pub fn close(&mut self) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        self.stop();
        let begin = Instant::now();
        while self.active.is_some() && begin.elapsed() < PATIENCE {
            let update = self.worker.as_ref().and_then(|worker| worker.wait(Duration::from_millis(50)));
            if let Some(update) = update {
                self.hear(update);
            } else if self.worker.as_ref().is_none_or(|worker| worker.next().is_err()) {
                break;
            }
        }
        self.keep();
        if let Some(store) = &self.store {
            store.flush();
        }
        if let Some(worker) = self.worker.take() {
            worker.end(PATIENCE.saturating_sub(begin.elapsed()));
        }
        self.store = None;
    }

    /// One frame.
    pub fn ui(&mut self, ui: &mut Ui) {
        self.listen();
        let ctx = ui.ctx().clone();
        let tokens = self.worker.as_ref().map(Worker::tokens);
        if let Some(tokens) = tokens {
            self.samples.take(ui.input(|input| input.time), tokens);
        }
        if self.active.is_some() || self.samples.moving() {
            ctx.request_repaint_after(Duration::from_millis(100));
        }
        self.take_dropped(&ctx);
        let colors = palette(ui.visuals());
        let side = Frame::new().fill(colors.side).inner_margin(Margin::same(10));
        if !self.errors.is_empty() {
            let frame = Frame::new().fill(colors.bad_fill);
            Panel::top("errors").frame(frame).resizable(false).show(ui, |ui| self.banners(ui));
        }
        Panel::left("history")
            .frame(side)
            .default_size(230.0)
            .size_range(160.0..=420.0)
            .show(ui, |ui| self.history(ui));
        Panel::right("machine").frame(side).default_size(280.0).size_range(220.0..=480.0).show(ui, |ui| {
            ScrollArea::vertical().auto_shrink(false).show(ui, |ui| side::show(self, ui));
        });
        CentralPanel::default().frame(Frame::new().fill(colors.page)).show(ui, |ui| {
            Panel::bottom("composer")
                .frame(Frame::new().fill(colors.page).inner_margin(Margin { left: 0, right: 0, top: 4, bottom: 12 }))
                .show_separator_line(false)
                .show(ui, |ui| column(ui, |ui| self.composer(ui)));
            CentralPanel::default().frame(Frame::new().fill(colors.page)).show(ui, |ui| {
                if self.conversation.current().is_none() {
                    ScrollArea::vertical().auto_shrink(false).show(ui, |ui| column(ui, |ui| self.welcome(ui)));
                } else {
                    let active = self.active.as_ref().map(|active| (active.turn, &active.activity));
                    self.chat.show(ui, &self.conversation, active);
                }
            });
        });
    }

    /// The tree of turns.
    fn history(&mut self, ui: &mut Ui) {
        let idle = self.active.is_none();
        Sides::new().show(
            ui,
            |ui| ui.strong("Conversation"),
            |ui| {
                let fresh =
                    ui.add_enabled(idle && self.conversation.current().is_some(), eframe::egui::Button::new("New"));
                if fresh.on_hover_text("Begin another conversation; this one stays in the tree").clicked() {
                    self.go(None);
                }
            },
        );
        ui.add_space(4.0);
        if self.conversation.turns().is_empty() {
            ui.label(RichText::new("Every question becomes a point here. Click one to go back to it, and ask something else from there.").small().weak());
            return;
        }
        let nodes: Vec<Node> = self
            .conversation
            .turns()
            .iter()
            .map(|turn| {
                let held = self.held.get(&turn.id).map(|held| tree::Held { again: held.again, bytes: held.bytes });
                let wrote = turn.figures.as_ref().map_or(0, |figures| figures.wrote);
                let tokens = self.held.get(&turn.id).map_or(wrote, |held| held.tokens);
                Node {
                    id: turn.id,
                    parent: turn.parent,
                    label: turn.question.clone(),
                    tokens,
                    bytes: turn.bytes(),
                    held,
                }
            })
            .collect();
        if let Some(id) = tree::show(ui, &nodes, self.conversation.current(), idle) {
            self.go(Some(id));
        }
    }

    fn banners(&mut self, ui: &mut Ui) {
        let colors = palette(ui.visuals());
        let mut gone = None;
        for (at, error) in self.errors.iter().enumerate() {
            Frame::new().fill(colors.bad_fill).inner_margin(Margin::symmetric(14, 8)).show(ui, |ui| {
                Sides::new().shrink_left().wrap().show(
                    ui,
                    |ui| ui.label(RichText::new(error).color(colors.text)),
                    |ui| {
                        let button = ui.small_button("Dismiss");
                        button.widget_info(|| WidgetInfo::labeled(Role::Button, true, format!("Dismiss: {error}")));
                        if button.clicked() {
                            gone = Some(at);
                        }
                    },
                );
            });
        }
        if let Some(at) = gone {
            self.errors.remove(at);
        }
    }

    /// What is there before the first question.
    fn welcome(&mut self, ui: &mut Ui) {
        ui.add_space((ui.available_height() * 0.18).min(120.0));
        match &self.model {
            Model::None => {
                ui.heading("No model is loaded");
                ui.label("Choose one on the right.");
            }
            Model::Loading(done, total) => {
                ui.heading("Loading");
                if *total > 0 {
                    ui.add(ProgressBar::new(*done as f32 / *total as f32).desired_width(320.0).show_percentage());
                } else {
                    ui.horizontal(|ui| {
                        ui.add(Spinner::new());
                        ui.label("Looking for devices");
                    });
                }
            }
            Model::Compiling(done, total) => {
                ui.heading("Compiling kernels");
                let share = *done as f32 / (*total).max(1) as f32;
                ui.add(ProgressBar::new(share).desired_width(320.0).text(format!("{done} of {total}")));
            }
            Model::Ready(loaded) => {
                let start = loaded.start.clone();
                ui.heading("What shall it be?");
                ui.add_space(4.0);
                match start.try_it {
                    Some((what, questions)) => {
                        ui.label(what);
                        ui.label(
                            RichText::new("For more, choose a Qwen3.5 checkpoint on the right. Things to try:").weak(),
                        );
                        ui.add_space(8.0);
                        for question in questions {
                            if ui.button(*question).clicked() {
                                self.ask(question);
                            }
                        }
                    }
                    None => {
                        ui.label("Ask anything. Nothing leaves this machine.");
                    }
                }
                ui.add_space(8.0);
                if let Some(folder) = start.folder {
                    ui.label(RichText::new(format!("It may read {folder} and below.")).small().weak());
                }
            }
        }
    }

    /// A folder that is dropped on the window is a model to load.
    fn take_dropped(&mut self, ctx: &Context) {
        let dropped = ctx.input(|input| input.raw.dropped_files.first().map(|file| file.path().to_path_buf()));
        if let Some(path) = dropped {
            let device = self.settings.device.clone();
            self.load(ctx, Choice { model: Some(path), device });
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.close();
    }
}

/// The last part of a path.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

impl eframe::App for App {
    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        App::ui(self, ui);
    }

    fn on_exit(&mut self) {
        self.close();
    }
}
