//! How long frames take while the model works.

use std::time::{Duration, Instant};

use gatedelta_desktop::app::Model;

use crate::{Place, Window, app, ask, screen, type_and_send, until_ready, window};

/// How long frames took, in order of length.
struct Frames(Vec<Duration>);

impl Frames {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        Frames(times)
    }

    /// So long at most takes this share of them.
    fn within(&self, share: f64) -> Duration {
        self.0[((self.0.len() - 1) as f64 * share) as usize]
    }

    fn tell(&self, what: &str) {
        let [median, most, worst] = [0.5, 0.95, 1.0].map(|share| self.within(share).as_secs_f64() * 1e3);
        println!(
            "{what}: {} frames, median {median:.1} ms, 95 % within {most:.1} ms, worst {worst:.1} ms",
            self.0.len()
        );
    }
}

/// Logic, layout, drawing and reading back the picture, which is more than a window does.
fn frame(window: &mut Window) -> Duration {
    let begin = Instant::now();
    window.step();
    window.render().unwrap();
    begin.elapsed()
}

/// Frames at rest, and while answers are written.
fn frames(device: &str) -> Option<[Frames; 2]> {
    let screen = screen()?;
    let place = Place::new();
    let mut setup = place.setup();
    setup.args.device = Some(device.into());
    setup.host = Some(screen.gpu.clone());
    let mut window = window(setup, Some(&screen));
    until_ready(&mut window);
    let Model::Ready(loaded) = app(&window).model() else { unreachable!() };
    assert_eq!(loaded.shared, device == "lavapipe");
    ask(&mut window, "hello");
    let rest = Frames::of((0..30).map(|_| frame(&mut window)).collect::<Vec<_>>().into_iter());
    let mut busy = Vec::new();
    for question in ["add up all numbers in budget.csv", "Make a note: buy milk and bread", "list my notes"] {
        type_and_send(&mut window, question);
        while app(&window).answering() {
            busy.push(frame(&mut window));
        }
    }
    Some([rest, Frames::of(busy.into_iter())])
}

#[test]
fn the_window_moves_while_the_model_works() {
    for device in ["cpu", "lavapipe"] {
        // Other tests run beside this one: where they slow down even a window at rest, frames may take some times as long as there.
        // What they do may change between the two, so that one slow round proves nothing; a window that stands still does in each.
        let mut slow = Vec::new();
        for _ in 0..4 {
            let Some([rest, busy]) = frames(device) else { return };
            rest.tell(&format!("{device}, at rest"));
            busy.tell(&format!("{device}, answering"));
            assert!(!busy.0.is_empty(), "{device}: no frame while it answers");
            let bound = Duration::from_millis(50).max(rest.within(0.95) * 4);
            if busy.within(0.95) <= bound {
                slow.clear();
                break;
            }
            slow.push(format!("{:?}, expected at most {bound:?}", busy.within(0.95)));
        }
        assert!(slow.is_empty(), "{device}: {slow:?}");
    }
}
