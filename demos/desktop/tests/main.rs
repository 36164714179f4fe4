//! The window, driven by its accessibility tree.

mod frames;
mod pictures;
mod window;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use eframe::egui::Theme;
use eframe::egui_wgpu::{WgpuSetup, WgpuSetupExisting};
use eframe::wgpu;
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use gatedelta::backend::webgpu::WebGpu;
use gatedelta_agent::options::Args;
use gatedelta_desktop::app::{App, Model, Setup};
use gatedelta_desktop::host;

/// A loaded machine needs its time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A wgpu device of the software driver, as the window would open it.
#[derive(Clone)]
struct Screen {
    setup: WgpuSetupExisting,
    gpu: WebGpu,
}

/// The screen that all tests share; none where there is no software driver, which is said and may be a failure.
fn screen() -> Option<Screen> {
    static SCREEN: OnceLock<Option<Screen>> = OnceLock::new();
    let screen = SCREEN.get_or_init(|| {
        pollster::block_on(async {
            let new = host::setup();
            let instance = wgpu::Instance::new(new.instance_descriptor);
            let adapters = instance.enumerate_adapters(wgpu::Backends::VULKAN).await;
            let adapter = adapters.into_iter().find(|adapter| adapter.get_info().name.contains("llvmpipe"))?;
            let (device, queue) = adapter.request_device(&(new.device_descriptor)(&adapter)).await.unwrap();
            let gpu = host::share_device(&adapter, &device, &queue).unwrap();
            Some(Screen { setup: WgpuSetupExisting { instance, adapter, device, queue }, gpu })
        })
    });
    if screen.is_none() {
        let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name.trim() == "lavapipe"), "lavapipe is required, and is not there");
        println!("skipped: there is no lavapipe to draw on");
    }
    screen.clone()
}

/// A folder with what the tools may read, and a place for what is kept.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("folder")).unwrap();
        std::fs::write(dir.path().join("folder/budget.csv"), "rent: 950\nfood: 410\nbus: 62\n").unwrap();
        Place { dir }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn setup(&self) -> Setup {
        let args = Args {
            device: Some("cpu".into()),
            folder: self.dir.path().join("folder"),
            notes: Some(self.dir.path().join("notes.json")),
            greedy: true,
            ..Args::default()
        };
        Setup { args, folder: Some(self.data()), host: None }
    }
}

type Window = Harness<'static, Option<App>>;

/// A window; drawn where there is a screen to draw on.
fn window(setup: Setup, screen: Option<&Screen>) -> Window {
    let mut builder = Harness::builder().with_size([1100.0, 700.0]).with_theme(Theme::Light);
    if let Some(screen) = screen {
        builder = builder.wgpu_setup(WgpuSetup::Existing(screen.setup.clone()));
    }
    let mut setup = Some(setup);
    builder.build_ui_state(
        move |ui, app: &mut Option<App>| {
            if let Some(setup) = setup.take() {
                *app = Some(App::new(ui.ctx(), setup));
            }
            if let Some(app) = app {
                app.ui(ui);
            }
        },
        None,
    )
}

fn app(window: &Window) -> &App {
    window.state().as_ref().unwrap()
}

/// Goes on frame by frame until something is so.
#[track_caller]
fn until(window: &mut Window, what: &str, is_so: impl Fn(&Window) -> bool) {
    let begin = Instant::now();
    loop {
        window.step();
        if is_so(window) {
            window.step();
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "waited for: {what}; errors: {:?}", app(window).errors());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
fn until_ready(window: &mut Window) {
    until(window, "a model", |window| matches!(app(window).model(), Model::Ready(_)));
}

/// Types a question, presses Enter, and waits for the answer.
#[track_caller]
fn ask(window: &mut Window, question: &str) {
    let before = app(window).conversation().turns().len();
    type_and_send(window, question);
    assert_eq!(app(window).conversation().turns().len(), before + 1, "Enter sends");
    until(window, "an answer", |window| !app(window).answering());
}

#[track_caller]
fn type_and_send(window: &mut Window, question: &str) {
    let field = window.get_by_label("Your question");
    field.focus();
    field.type_text(question);
    window.step();
    window.key_press(eframe::egui::Key::Enter);
    window.step();
    window.step();
}

fn shows(window: &Window, text: &str) -> bool {
    window.query_all_by_label_contains(text).next().is_some()
}

/// A directory that holds no checkpoint.
fn nowhere(place: &Place) -> PathBuf {
    Path::new(place.dir.path()).join("no model here")
}
