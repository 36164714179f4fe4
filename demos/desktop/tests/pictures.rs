//! Pictures of the window against those in `tests/snapshots`. `UPDATE_SNAPSHOTS=1` makes them anew.

use std::time::Duration;

use eframe::egui::Theme;
use eframe::egui_wgpu::WgpuSetup;
use egui_kittest::{Harness, SnapshotOptions};
use gatedelta::device::{Account, Candidate, Verdict};
use gatedelta::qwen::MemoryPlan;
use gatedelta::shape::Dtype;
use gatedelta::tune::{Class, Kind};
use gatedelta_agent::builtin;
use gatedelta_agent::event::Start;
use gatedelta_desktop::app::App;
use gatedelta_desktop::conversation::{Call, Conversation, Figures, Item, Outcome};
use gatedelta_desktop::plots::{Sample, Samples};
use gatedelta_desktop::worker::{Choice, Loaded};
use serde_json::json;

use crate::{Window, screen};

fn account() -> Account {
    let candidate = |name: &str, driver: &str, kind, class, verdict| Candidate {
        name: name.into(),
        driver: driver.into(),
        kind,
        class,
        caps: None,
        verdict,
    };
    let works = Verdict::Works(Duration::from_millis(41));
    Account {
        candidates: vec![
            candidate(
                "cuda",
                "absent",
                Kind::Cuda,
                Class::Other,
                Verdict::Refused("this build has no CUDA backend".into()),
            ),
            candidate(
                "Quadro of a long name 5000 Ti SUPER",
                "Some driver 555.42.02, Vulkan",
                Kind::WebGpu,
                Class::Discrete,
                Verdict::Refused("the self-test gave 0.25 where 0.5 was expected".into()),
            ),
            candidate("cpu", "native, 2 threads", Kind::Cpu, Class::Cpu, works),
            candidate(
                "llvmpipe (LLVM 15.0.6, 256 bits)",
                "llvmpipe, Mesa 22.3.6, Vulkan",
                Kind::WebGpu,
                Class::Software,
                Verdict::NotTried("a driver in software is never chosen by itself".into()),
            ),
        ],
        chosen: Some(2),
        why: "1 GPU(s) found, and none of them works".into(),
    }
}

fn loaded() -> Loaded {
    Loaded {
        choice: Choice::default(),
        start: Start {
            device: "cpu (native, 2 threads)".into(),
            why: account().why,
            model: "the one inside the program".into(),
            shape: "5.4 M parameters, 8 layers; 37.94 MiB with a context of 8192 tokens".into(),
            try_it: Some((builtin::WHAT, builtin::TRY)),
            tools: Vec::new(),
            folder: Some("/home/you".into()),
            context: 8192,
            sampling: json!({}),
        },
        account: account(),
        memory: MemoryPlan {
            device: "cpu".into(),
            context: 8192,
            piece: 512,
            kv: Dtype::F32,
            weights: 11 << 20,
            states: 1 << 20,
            tails: 1 << 16,
            cache: 16 << 20,
            scratch: 9 << 20,
            snapshots: 512 << 20,
            available: None,
        },
        shared: false,
        time: Duration::from_millis(420),
    }
}

fn samples() -> Samples {
    let mut samples = Samples::default();
    for n in 0..200 {
        let writing = (40..90).contains(&n) || (130..160).contains(&n);
        let rate = if writing { 700.0 + f64::from(n * 37 % 90) } else { 0.0 };
        samples.push(Sample { time: f64::from(n) * 0.5, rate, memory: Some((120 << 20) + ((n as u64 * 150) << 10)) });
    }
    samples
}

fn figures(note: Option<&str>) -> Option<Figures> {
    Some(Figures { note: note.map(String::from), wrote: 38, rate: 712.4, read: 57, reused: 310, reading: 0.043 })
}

fn call(name: &str, arguments: serde_json::Value, outcome: Option<(bool, &str)>) -> Item {
    Item::Call(Call {
        name: name.into(),
        arguments: arguments.as_object().unwrap().clone(),
        outcome: outcome.map(|(ok, text)| Outcome { ok, text: text.into(), seconds: 0.0123 }),
    })
}

fn conversation() -> Conversation {
    let mut conversation = Conversation::default();
    let add = |conversation: &mut Conversation, question: &str, items: Vec<Item>, note: Option<&str>| {
        let id = conversation.ask(question);
        let turn = conversation.turn_mut(id).unwrap();
        (turn.items, turn.figures) = (items, figures(note));
        id
    };
    let text = |text: &str| Item::Text(text.into());
    add(
        &mut conversation,
        "What is 17.5% of 2480?",
        vec![
            call("calculator", json!({"expression": "17.5 * 2480 / 100"}), Some((true, "434"))),
            text("The result is **434**."),
        ],
        None,
    );
    let fork = add(&mut conversation, "Which files are here?", vec![text("None.")], None);
    add(&mut conversation, "And what time is it in Tokyo?", vec![text("Noon.")], None);
    conversation.go(Some(fork));
    add(
        &mut conversation,
        "A question that is far too long for one line of the tree, and wraps in the conversation as well, \
        because nobody wants to scroll sideways: will it?",
        vec![text("Yes.")],
        Some("Stopped."),
    );
    conversation.go(Some(0));
    let files = (1..=9).map(|n| format!("file-{n}.txt  {} bytes", n * 1017)).collect::<Vec<_>>().join("\n");
    add(
        &mut conversation,
        "Show me the files, then explain the rule with a list, `code` and a block",
        vec![
            Item::Reasoning("The user wants files.".into()),
            call(
                "list_files",
                json!({"path": "a/very/long/path/that/goes/on/and/on/for/no/good/reason/at/all/until/the/line/ends"}),
                Some((true, &files)),
            ),
            call(
                "read_file",
                json!({"path": "../secret"}),
                Some((
                    false,
                    "\"../secret\" is refused: \"..\" is not allowed, only files inside the shared folder can be read",
                )),
            ),
            text(
                "# The rule\n\nThe state is updated with `S <- exp(g) S + k d^T`:\n\n1. decay\n2. *correct*\n3. write\n\n```\n\
                d = beta (v - S^T k)\n```\n",
            ),
            call("clock", json!({"time_zone": "Asia/Tokyo"}), None),
        ],
        None,
    );
    conversation
}

fn picture(name: &str, theme: Theme, size: [f32; 2], conversation: Conversation, error: Option<&str>) {
    let Some(screen) = screen() else { return };
    // Drivers of other versions round edges of glyphs otherwise.
    let options = SnapshotOptions::new().threshold(1.2).max_failed_pixels(400).output_path("tests/snapshots");
    let builder = Harness::builder()
        .with_size(size)
        .with_theme(theme)
        .with_options(options)
        // The button that copies a block of code has its sign from the system's fonts, which tests do without.
        .allow_missing_glyphs()
        .wgpu_setup(WgpuSetup::Existing(screen.setup.clone()));
    let mut made = Some((conversation, error.map(String::from)));
    let mut window: Window = builder.build_ui_state(
        move |ui, app: &mut Option<App>| {
            if let Some((conversation, error)) = made.take() {
                let mut still = App::still(ui.ctx(), conversation, loaded(), samples());
                error.into_iter().for_each(|error| still.report(error));
                *app = Some(still);
            }
            if let Some(app) = app {
                app.ui(ui);
            }
        },
        None,
    );
    window.run_steps(6);
    window.remove_cursor();
    window.snapshot(name);
}

#[test]
fn first_screen() {
    picture("first-light", Theme::Light, [1100.0, 700.0], Conversation::default(), None);
}

#[test]
fn conversation_in_light() {
    picture("conversation-light", Theme::Light, [1100.0, 760.0], conversation(), None);
}

#[test]
fn conversation_in_dark() {
    picture("conversation-dark", Theme::Dark, [1100.0, 760.0], conversation(), None);
}

#[test]
fn a_small_window_with_a_long_error() {
    let error = "The model /home/somebody/models/with/a/path/that/is/much/longer/than/the/window/Qwen3.5-0.8B-Instruct cannot be \
        used: it has no config.json; expected the directory of a checkpoint: config.json, safetensors, tokenizer.json.";
    picture("small-dark", Theme::Dark, [760.0, 480.0], conversation(), Some(error));
}
