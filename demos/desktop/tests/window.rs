//! What a user does, and what comes of it.

use egui_kittest::kittest::Queryable;

use crate::{Place, app, ask, nowhere, screen, shows, type_and_send, until, until_ready, window};
use gatedelta_desktop::app::Model;
use gatedelta_desktop::conversation::{Item, Turn};

fn text(item: &Item) -> String {
    match item {
        Item::Text(text) => text.clone(),
        Item::Call(call) => {
            format!("[{} {}]", call.name, call.outcome.as_ref().map_or("runs", |outcome| &outcome.text))
        }
        other => format!("{other:?}"),
    }
}

/// What is shown of the current answer.
fn answer(window: &crate::Window) -> Vec<String> {
    let conversation = app(window).conversation();
    let turn = conversation.current().and_then(|id| conversation.turn(id)).unwrap();
    turn.items.iter().map(text).collect()
}

#[test]
fn a_question_is_answered_with_a_tool() {
    let place = Place::new();
    let mut window = window(place.setup(), None);
    until_ready(&mut window);
    for suggestion in ["What is 17.5% of 2480?", "What time is it in Tokyo?", "Make a note: buy milk and bread"] {
        window.get_by_label(suggestion);
    }
    window.get_by_label("What is 17.5% of 2480?").click();
    window.step();
    window.step();
    assert_eq!(app(&window).conversation().turns().len(), 1, "a suggestion is asked at once");
    until(&mut window, "an answer", |window| !app(window).answering());
    assert_eq!(answer(&window)[0], "[calculator 434]");
    for shown in ["calculator", "expression=", "434", "done", "The result is 434.", "Answer complete:"] {
        assert!(shows(&window, shown), "{shown}");
    }
    ask(&mut window, "add up all numbers in budget.csv");
    assert!(answer(&window).concat().contains("1422"), "{:?}", answer(&window));
    assert!(shows(&window, "Go to: add up all numbers"));
}

#[test]
fn going_back_forks_and_everything_is_there_again() {
    let place = Place::new();
    let mut window = window(place.setup(), None);
    until_ready(&mut window);
    ask(&mut window, "hello");
    ask(&mut window, "what is 12 * (3 + 4)");
    assert!(shows(&window, "The result is 84."));
    window.get_by_label("Go to: hello").click();
    window.step();
    window.step();
    assert_eq!(app(&window).conversation().current(), Some(0));
    assert!(!shows(&window, "The result is 84."));
    ask(&mut window, "What is 17.5% of 2480?");
    let before = app(&window).conversation().clone();
    let reused = before.turn(2).unwrap().figures.as_ref().unwrap().reused;
    assert!(reused > 0, "what comes before the fork is not read again");
    until(&mut window, "what is held", |window| shows(window, "Go to: hello"));
    let parents: Vec<Option<u64>> = before.turns().iter().map(|turn| turn.parent).collect();
    assert_eq!(parents, [None, Some(0), Some(0)]);
    drop(window);

    let mut again = crate::window(place.setup(), None);
    again.step();
    assert_eq!(*app(&again).conversation(), before);
    assert!(shows(&again, "The result is 434.") && shows(&again, "Go to: what is 12 * (3 + 4)"));
    until_ready(&mut again);
    again.get_by_label("Go to: what is 12 * (3 + 4)").click();
    again.step();
    again.step();
    assert!(shows(&again, "The result is 84."));
    again.get_by_label("New").click();
    again.step();
    again.step();
    assert!(shows(&again, "What shall it be?"));
    assert_eq!(app(&again).conversation().turns().len(), 3);
}

#[test]
fn closing_in_the_middle_of_an_answer_loses_nothing() {
    // Between the question and the end of the answer, as far as it goes before the window closes.
    type Reached = fn(&Turn) -> bool;
    let stages: [(&str, Reached); 4] = [
        ("the question", |_| true),
        ("a call", |turn| !turn.items.is_empty()),
        ("its outcome", |turn| matches!(turn.items.first(), Some(Item::Call(call)) if call.outcome.is_some())),
        ("a text", |turn| matches!(turn.items.get(1), Some(Item::Text(_)))),
    ];
    let mut in_the_middle = 0;
    for (stage, reached) in stages {
        let place = Place::new();
        // A long list, so that the model has to read for a while between the tool's answer and its own.
        for n in 0..150 {
            std::fs::write(place.dir.path().join(format!("folder/file-{n}.txt")), "").unwrap();
        }
        let mut window = window(place.setup(), None);
        until_ready(&mut window);
        type_and_send(&mut window, "Which files are here?");
        let turn = |window: &crate::Window| app(window).conversation().turn(0).unwrap().clone();
        until(&mut window, stage, |window| reached(&turn(window)));
        in_the_middle += usize::from(app(&window).answering());
        let shown: Vec<String> = turn(&window).items.iter().map(text).collect();
        drop(window);

        let mut again = crate::window(place.setup(), None);
        again.step();
        assert_eq!(turn(&again).question, "Which files are here?");
        assert!(shows(&again, "Which files are here?"), "{stage}");
        let kept: Vec<String> = turn(&again).items.iter().map(text).collect();
        // What was under way when the window closed may have gone on a little: a call has run, a text has grown.
        assert!(kept.len() >= shown.len(), "{stage}: {shown:?}, {kept:?}");
        for (shown, kept) in shown.iter().zip(&kept) {
            assert!(kept.starts_with(shown.trim_end_matches(" runs]")), "{stage}: {shown:?}, {kept:?}");
        }
        until_ready(&mut again);
        ask(&mut again, "what is 12 * (3 + 4)");
        assert_eq!(answer(&again).last().unwrap(), "The result is 84.", "{stage}");
    }
    // A machine that is busy elsewhere may hold the window up until an answer is complete, but not each time.
    assert!(in_the_middle > 0, "every answer was complete before the window closed");
}

#[test]
fn an_answer_can_be_stopped() {
    let place = Place::new();
    let mut window = window(place.setup(), None);
    until_ready(&mut window);
    // As above: one that is complete before it can be stopped does not count.
    for _ in 0..5 {
        let before = app(&window).conversation().turns().len();
        type_and_send(&mut window, "add up all numbers in budget.csv");
        let stop = window.query_by_label("Stop");
        let stopped = stop.map(|stop| stop.click()).is_some();
        until(&mut window, "the end", |window| !app(window).answering());
        assert!(window.query_by_label("Stop").is_none());
        let kept = &app(&window).conversation().turns()[before..];
        if kept.is_empty() {
            // Stopped before the first token: the question is back where it was typed.
            assert!(stopped);
            assert_eq!(window.state_mut().as_mut().unwrap().draft(), "add up all numbers in budget.csv");
            return;
        }
        if let (true, Some(note)) = (stopped, &kept[0].figures.as_ref().unwrap().note) {
            assert_eq!(note, "Stopped.");
            return;
        }
    }
    panic!("every answer was complete before it could be stopped");
}

#[test]
fn a_directory_without_a_model_is_refused() {
    let place = Place::new();
    let mut window = window(place.setup(), None);
    until_ready(&mut window);
    let wrong = nowhere(&place);
    let field = window.get_by_label("Checkpoint directory (or drop one here)");
    field.focus();
    field.type_text(wrong.to_str().unwrap());
    window.step();
    window.get_by_label("Load").click();
    until(&mut window, "an error", |window| !app(window).errors().is_empty());
    assert!(shows(&window, "it is not there; expected the directory of a checkpoint"));
    // The model that was there goes on.
    until_ready(&mut window);
    ask(&mut window, "what is 12 * (3 + 4)");
    window.get_by_label_contains("Dismiss:").click();
    window.step();
    window.step();
    assert!(app(&window).errors().is_empty());
    // A directory that looks like one: its own error, and the model that was there comes back.
    std::fs::create_dir(&wrong).unwrap();
    std::fs::write(wrong.join("config.json"), "{}").unwrap();
    window.get_by_label("Load").click();
    until(&mut window, "an error", |window| !app(window).errors().is_empty());
    assert!(app(&window).errors()[0].contains("config.json"), "{:?}", app(&window).errors());
    until_ready(&mut window);
    ask(&mut window, "what is 12 * (3 + 4)");
    assert_eq!(answer(&window).last().unwrap(), "The result is 84.");
}

#[test]
fn the_device_is_chosen_in_the_window() {
    let Some(screen) = screen() else { return };
    let place = Place::new();
    let mut setup = place.setup();
    setup.host = Some(screen.gpu.clone());
    // The CPU first, then everything is looked for.
    let mut window = window(setup, Some(&screen));
    until_ready(&mut window);
    assert!(shows(&window, "not looked for: the CPU was asked for"));
    window.get_by_label("Test all").click();
    until(&mut window, "a test", |window| shows(window, "llvmpipe"));
    assert!(shows(&window, "passed its self-test in"));
    let name = window.get_by_label_contains("Use llvmpipe");
    name.scroll_to_me();
    window.step();
    window.get_by_label_contains("Use llvmpipe").click();
    until(&mut window, "the other device", |window| match app(window).model() {
        Model::Ready(loaded) => {
            loaded.account.chosen.is_some_and(|at| loaded.account.candidates[at].name.contains("llvmpipe"))
        }
        _ => false,
    });
    assert!(shows(&window, "It also draws this window."));
    ask(&mut window, "what is 12 * (3 + 4)");
    assert_eq!(answer(&window).last().unwrap(), "The result is 84.");
    window.render().unwrap();
    assert!(app(&window).errors().is_empty(), "{:?}", app(&window).errors());
}
