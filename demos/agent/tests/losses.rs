//! A device that fails at any stage of a conversation with tools: the answers are the same, and the user is told.

use std::sync::Arc;

use clap::Parser;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::faulty::{Fault, Plan};
use gatedelta::device::Account;
use gatedelta::qwen::Place;
use gatedelta_agent::agent::{Agent, Options};
use gatedelta_agent::engine::Engine;
use gatedelta_agent::engine::local::Local;
use gatedelta_agent::event::{Event, Reason, Sink};
use gatedelta_agent::options::{Args, SYSTEM};
use gatedelta_agent::tools::{TIME_LIMIT, Toolbox, calculator::Calculator};

const GREEDY: &[&str] = &["agent", "--greedy"];
const SEEDED: &[&str] = &["agent", "--seed", "3", "--temperature", "0.9"];

/// What the user sees, and the calls of the device up to the tool's.
#[derive(Default)]
struct Log {
    plan: Plan,
    said: String,
    notices: Vec<String>,
    tool: Option<u64>,
}

impl Sink for Log {
    fn event(&mut self, event: Event<'_>) -> std::io::Result<()> {
        match event {
            Event::Token(text) => self.said += text,
            Event::ToolCall(call) => {
                self.said += &format!("[{} {:?}]", call.name, call.arguments);
                self.tool.get_or_insert(self.plan.calls());
            }
            Event::ToolResult(_, outcome) => self.said += &format!("[{}]", outcome.text),
            Event::Notice(text) => self.notices.push(text.to_string()),
            _ => {}
        }
        Ok(())
    }
}

/// Two questions, the state being saved between them: what was seen, the ends of the parts in calls, and where the model ended up.
fn converse(args: &[&str], plan: &Plan) -> (Log, [u64; 5], Place) {
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::new(None).unwrap());
    let of_plan = plan.clone();
    let open = move |place| {
        let backend: Arc<dyn Backend> = match place {
            Place::Chosen => Arc::new(of_plan.around(cpu.clone())),
            Place::Cpu => cpu.clone(),
        };
        Ok((backend, Account::default()))
    };
    let mut local = Local::load_on(&Args::parse_from(args), open, &mut |_, _| {}).unwrap();
    let folder = tempfile::tempdir().unwrap();
    local.keep_in(folder.path()).unwrap();
    let mut log = Log { plan: plan.clone(), notices: local.notices(), ..Log::default() };
    let loaded = plan.calls();
    let options = Options { system: Some(SYSTEM.into()), thinking: None, think_budget: None, max_tokens: 200 };
    let mut agent = Agent::new(local, Toolbox::new(vec![Arc::new(Calculator)], TIME_LIMIT), options);
    let summary = agent.answer("What is 17.5% of 2480?", &|| false, &mut log).unwrap();
    assert_eq!((summary.reason, summary.tool_calls > 0), (Reason::Stop, true), "{}", log.said);
    let answered = plan.calls();
    agent.engine_mut().save().unwrap();
    let saved = plan.calls();
    log.said += "\n";
    agent.answer("hello", &|| false, &mut log).unwrap();
    let marks = [loaded, log.tool.unwrap(), answered, saved, plan.calls()];
    log.notices.extend(agent.engine().notices());
    (log, marks, agent.engine().recovery().place())
}

#[test]
fn a_conversation_survives_its_device() {
    for (i, args) in [GREEDY, SEEDED].into_iter().enumerate() {
        let plan = Plan::default();
        let (clean, [loaded, tool, answered, saved, end], _) = converse(args, &plan);
        assert!(clean.notices.is_empty(), "{:?}", clean.notices);
        assert!(clean.said.contains("434"), "{}", clean.said);
        assert!(loaded < tool && tool < answered && answered < saved && saved < end);
        let between = |a: u64, b: u64| (a + b) / 2;
        let stages = [
            ("load", loaded / 2),
            ("the begin of reading", loaded),
            ("reading", loaded + 3),
            ("the first tokens", loaded + (tool - loaded) / 8),
            ("writing a call", between(loaded, tool)),
            ("the last token of a call", tool - 1),
            ("reading a tool's result", tool),
            ("the answer to it", between(tool, answered)),
            ("its last token", answered - 1),
            ("saving", answered),
            ("saving what is shared", between(answered, saved)),
            ("going back", saved),
            ("the next answer", between(saved, end)),
            ("the last token", end - 1),
        ];
        let others = [Fault::Driver, Fault::OutOfMemory, Fault::NoMemory];
        for (n, (stage, at)) in stages.into_iter().enumerate() {
            let fault = if n % 2 == i { Fault::Lost } else { others[n % 3] };
            let plan = Plan::new(&[(at, fault)]);
            let (log, ..) = converse(args, &plan);
            assert_eq!(log.said, clean.said, "{fault:?} in {stage}");
            // After the last token nothing needs the device any more.
            if fault == Fault::Lost && stage != "the last token" {
                assert!(
                    log.notices.iter().any(|n| n.contains("was lost") && n.contains("opened again")),
                    "{:?}",
                    log.notices
                );
            }
        }
        // Twice: the second time in the middle of coming back, and in the tool's step.
        for second in [loaded + 30, tool + 60] {
            let plan = Plan::new(&[(loaded + 20, Fault::Lost), (second, Fault::Lost)]);
            let (log, _, place) = converse(args, &plan);
            assert_eq!(log.said, clean.said, "a second loss at {second}");
            assert_eq!(place, Place::Cpu);
            assert!(log.notices.iter().any(|n| n.contains("runs on the CPU")), "{:?}", log.notices);
        }
    }
}
