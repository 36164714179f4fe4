//! The program itself on a virtual display: a real window, drawn by the software driver, with a real keyboard.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use x11rb::connection::Connection;
use x11rb::protocol::xproto::{
    AtomEnum, ClientMessageEvent, ConnectionExt as _, EventMask, ImageFormat, InputFocus, KEY_PRESS_EVENT,
    KEY_RELEASE_EVENT, MapState, Window,
};
use x11rb::protocol::xtest::ConnectionExt as _;
use x11rb::rust_connection::RustConnection;
use x11rb::wrapper::ConnectionExt as _;

use crate::{PATIENCE, Place, screen};

/// A process that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn end(&mut self) -> ExitStatus {
        wait("the end of the program", || self.0.try_wait().unwrap())
    }
}

#[track_caller]
fn wait<T>(what: &str, mut arrives: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(arrived) = arrives() {
            return arrived;
        }
        assert!(begin.elapsed() < PATIENCE, "waited for: {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// A display of 1280 x 800 in memory, and its name.
fn display() -> Option<(Running, String)> {
    let started = Command::new("Xvfb")
        .args(["-displayfd", "1", "-screen", "0", "1280x800x24", "-nolisten", "tcp"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut server = match started {
        Ok(server) => Running(server),
        Err(why) => {
            let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|name| name.trim() == "xvfb"),
                "Xvfb is required, and does not start: {why}"
            );
            println!("skipped: there is no virtual display: Xvfb does not start: {why}");
            return None;
        }
    };
    let mut number = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut number).unwrap();
    assert!(!number.trim().is_empty(), "Xvfb has no display left");
    Some((server, format!(":{}", number.trim())))
}

/// The program's window on a display.
struct Desktop {
    x: RustConnection,
    window: Window,
}

impl Desktop {
    /// Waits for a window of this title that is shown.
    fn find(display: &str) -> Self {
        let (x, screen) = RustConnection::connect(Some(display)).unwrap();
        let root = x.setup().roots[screen].root;
        let shown = |&window: &Window| {
            let title = x.get_property(false, window, AtomEnum::WM_NAME, AtomEnum::ANY, 0, 64).unwrap().reply();
            let state = x.get_window_attributes(window).unwrap().reply();
            title.is_ok_and(|title| title.value == b"gatedelta")
                && state.is_ok_and(|state| state.map_state == MapState::VIEWABLE)
        };
        let window = wait("a window", || x.query_tree(root).unwrap().reply().unwrap().children.into_iter().find(shown));
        Desktop { x, window }
    }

    /// How many colours the window shows.
    fn colors(&self) -> usize {
        let size = self.x.get_geometry(self.window).unwrap().reply().unwrap();
        let image = self.x.get_image(ImageFormat::Z_PIXMAP, self.window, 0, 0, size.width, size.height, !0).unwrap();
        let mut pixels: Vec<[u8; 4]> = image.reply().unwrap().data.as_chunks().0.to_vec();
        pixels.sort_unstable();
        pixels.dedup();
        pixels.len()
    }

    /// Types a text of small letters and spaces, and Enter.
    fn type_and_enter(&self, text: &str) {
        // Without a window manager nobody else gives it the keyboard.
        self.x.set_input_focus(InputFocus::PARENT, self.window, x11rb::CURRENT_TIME).unwrap().check().unwrap();
        let (least, most) = (self.x.setup().min_keycode, self.x.setup().max_keycode);
        let keys = self.x.get_keyboard_mapping(least, most - least + 1).unwrap().reply().unwrap();
        let each = keys.keysyms_per_keycode as usize;
        const ENTER: u32 = 0xff0d;
        for symbol in text.bytes().map(u32::from).chain([ENTER]) {
            let at = keys.keysyms.chunks(each).position(|key| key[0] == symbol).unwrap();
            for event in [KEY_PRESS_EVENT, KEY_RELEASE_EVENT] {
                self.x.xtest_fake_input(event, least + at as u8, 0, x11rb::NONE, 0, 0, 0).unwrap();
            }
            // As fast as a very fast typist.
            self.x.sync().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Asks the program to close its window, as a window manager does.
    fn close(&self) {
        let atom = |name: &[u8]| self.x.intern_atom(false, name).unwrap().reply().unwrap().atom;
        let data = [atom(b"WM_DELETE_WINDOW"), 0, 0, 0, 0];
        let message = ClientMessageEvent::new(32, self.window, atom(b"WM_PROTOCOLS"), data);
        self.x.send_event(false, self.window, EventMask::NO_EVENT, message).unwrap().check().unwrap();
    }
}

/// What is kept of the conversation.
fn kept(data: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(data.join("conversation.json")).ok()?).ok()
}

#[test]
fn a_question_in_a_real_window() {
    let (Some(_), Some((_server, display))) = (screen(), display()) else { return };
    let place = Place::new();
    let mut program = Command::new(env!("CARGO_BIN_EXE_gatedelta-desktop"));
    program.args(["--greedy", "--device", "cpu", "--data"]).arg(place.data());
    program
        .arg("--folder")
        .arg(place.dir.path().join("folder"))
        .arg("--notes")
        .arg(place.dir.path().join("notes.json"));
    program.env("DISPLAY", &display).env_remove("WAYLAND_DISPLAY").env("XDG_RUNTIME_DIR", place.dir.path());
    let mut program = Running(program.spawn().unwrap());
    let desktop = Desktop::find(&display);
    // The first screen: text and panels, more than a cleared background.
    wait("the first screen", || (desktop.colors() > 50).then_some(()));
    wait("a model", || place.data().join("settings.json").exists().then_some(()));
    desktop.type_and_enter("hello");
    let answered = |turns: usize| {
        wait("an answer", || {
            let kept = kept(&place.data())?;
            let whole = kept["turns"].as_array()?.iter().filter(|turn| !turn["figures"].is_null()).count() == turns;
            whole.then_some(kept)
        })
    };
    let first = answered(1);
    assert_eq!(first["turns"][0]["question"], "hello");
    assert_eq!(first["turns"][0]["items"][0]["text"], "Hello! How can I help you?", "{first}");
    desktop.close();
    assert!(program.end().success());
    assert_eq!(kept(&place.data()), Some(first));
}
