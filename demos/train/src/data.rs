//! Conversations out of seeds: requests in many wordings, and what the perfect agent does about them.
//!
//! A [`Task`] is one request and how to serve it; [`Kind::task`] makes one for a [`World`]. A [`Scene`](scene::Scene) is a
//! conversation up to a request. What tools answer is never made up: the agent's own loop runs its own tools, and the
//! [`Oracle`](oracle::Oracle) stands in for the model.
//!
//! Held-out data has templates, names and numbers of its own (`grammar`, `names`): a score on it measures what was
//! understood, not what was remembered.

pub mod calculator;
pub mod clock;
pub mod content;
pub mod files;
pub mod grammar;
pub mod memory;
pub mod names;
pub mod notes;
pub mod oracle;
pub mod scene;
pub mod steps;
pub mod talk;
#[cfg(test)]
mod tests;
pub mod voice;
pub mod world;

use anyhow::Result;
use clap::ValueEnum;
use gatedelta_agent::parse::Call;
use serde_json::Value;

use crate::data::grammar::Form;
use crate::data::world::World;
use crate::draw::Draw;

/// Every form, by name.
fn forms() -> impl Iterator<Item = (&'static str, &'static Form)> {
    [
        calculator::FORMS,
        clock::FORMS,
        content::FORMS,
        files::FORMS,
        memory::FORMS,
        notes::FORMS,
        steps::FORMS,
        talk::FORMS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

/// Which wordings, names and numbers are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Train,
    HeldOut,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Arithmetic
    Calculator,
    /// What is in a folder
    ListFiles,
    /// What is in a file, or in one line of it
    ReadFile,
    /// Time, date or weekday, here or elsewhere
    Clock,
    /// Keep a note
    NoteAdd,
    /// All notes
    NoteList,
    /// Notes about something
    NoteSearch,
    /// Delete a note by its number
    NoteDelete,
    /// A file that is not there
    Missing,
    /// Read a file, then compute with its numbers
    ReadCompute,
    /// Find a file in a folder, then read it
    ListRead,
    /// Read a file, then note a line of it
    ReadNote,
    /// Find a note, then delete it
    SearchDelete,
    /// Ask the clock, then note something with the date
    DateNote,
    /// Find a note, then compute with its number
    NoteCompute,
    /// Compute, then note the result
    ComputeNote,
    /// A fact that was told long before
    Recall,
    /// A fact that was never told
    Untold,
    /// Greetings, thanks, who are you
    SmallTalk,
    /// What the agent has no means for
    Unable,
}

/// Kinds that are judged together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    SingleStep,
    TwoSteps,
    Memory,
    Talk,
}

impl Group {
    pub const ALL: [Group; 4] = [Group::SingleStep, Group::TwoSteps, Group::Memory, Group::Talk];

    pub fn name(self) -> &'static str {
        match self {
            Group::SingleStep => "single-step",
            Group::TwoSteps => "two-step",
            Group::Memory => "memory",
            Group::Talk => "no tool",
        }
    }
}

impl Kind {
    /// All kinds, group by group.
    pub fn all() -> &'static [Kind] {
        Kind::value_variants()
    }

    pub fn group(self) -> Group {
        match self {
            Kind::Calculator
            | Kind::ListFiles
            | Kind::ReadFile
            | Kind::Clock
            | Kind::NoteAdd
            | Kind::NoteList
            | Kind::NoteSearch
            | Kind::NoteDelete
            | Kind::Missing => Group::SingleStep,
            Kind::ReadCompute
            | Kind::ListRead
            | Kind::ReadNote
            | Kind::SearchDelete
            | Kind::DateNote
            | Kind::NoteCompute
            | Kind::ComputeNote => Group::TwoSteps,
            Kind::Recall | Kind::Untold => Group::Memory,
            Kind::SmallTalk | Kind::Unable => Group::Talk,
        }
    }

    /// As the command line calls it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// A request of this kind, `None` where the world has nothing that it could be about. Those of [`Group::Memory`] need a
    /// conversation before them: here they are about a fact that was never told.
    ///
    /// # Errors
    /// If the world's notes cannot be listed.
    pub fn task(self, world: &World, draw: &mut Draw) -> Result<Option<Task>> {
        let side = world.side;
        Ok(match self {
            Kind::Calculator => Some(calculator::task(side, draw)),
            Kind::ListFiles => Some(files::list(world, draw)),
            Kind::ReadFile => files::read(world, draw),
            Kind::Missing => Some(files::missing(world, draw)),
            Kind::Clock => Some(clock::task(side, draw)),
            Kind::NoteAdd => Some(notes::add_task(side, draw)),
            Kind::NoteList => Some(notes::list_task(side, draw)),
            Kind::NoteSearch => Some(notes::search_task(side, &world.notes()?, draw)),
            Kind::NoteDelete => Some(notes::delete_task(side, &world.notes()?, draw)),
            Kind::ReadCompute => steps::read_compute(world, draw),
            Kind::ListRead => steps::list_read(world, draw),
            Kind::ReadNote => steps::read_note(world, draw),
            Kind::SearchDelete => steps::search_delete(side, &world.notes()?, draw),
            Kind::DateNote => Some(steps::date_note(side, draw)),
            Kind::NoteCompute => steps::note_compute(side, &world.notes()?, draw),
            Kind::ComputeNote => Some(steps::compute_note(side, draw)),
            Kind::Recall | Kind::Untold => Some(memory::Fact::new(side, draw).asked(side, false, draw)),
            Kind::SmallTalk => Some(talk::small(side, draw)),
            Kind::Unable => Some(talk::unable(side, draw)),
        })
    }
}

/// What the agent does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Call(Call),
    /// A call after a word about what was found so far. What is written down once need only be copied from there.
    Work {
        text: String,
        call: Call,
    },
    /// The answer, and what an answer in other words must hold to be right.
    Say {
        text: String,
        must: Vec<String>,
    },
}

impl Action {
    pub fn call(name: &str, arguments: &[(&str, Value)]) -> Action {
        let arguments = arguments.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        Action::Call(Call { name: name.to_string(), arguments })
    }

    /// The same call, after a word about it.
    #[must_use]
    pub fn after(self, text: String) -> Action {
        match self {
            Action::Call(call) => Action::Work { text, call },
            other => other,
        }
    }

    pub fn say<S: ToString>(text: impl Into<String>, must: &[S]) -> Action {
        Action::Say { text: text.into(), must: must.iter().map(S::to_string).collect() }
    }
}

/// What to do once the calls so far have given these results.
pub type Act = Box<dyn Fn(&[String]) -> Action>;

/// A request and how to serve it.
pub struct Task {
    pub request: String,
    /// Calls, one each but the last; the last one answers.
    pub acts: Vec<Act>,
}

impl Task {
    /// Answered at once.
    pub fn talk<S: ToString>(request: String, answer: &str, must: &[S]) -> Task {
        let action = Action::say(answer, must);
        Task { request, acts: vec![Box::new(move |_| action.clone())] }
    }

    /// Answered from what one call gives.
    pub fn single(request: String, call: Action, answer: impl Fn(&str) -> Action + 'static) -> Task {
        let answer = move |results: &[String]| answer(results.last().map_or("", String::as_str));
        Task { request, acts: vec![Box::new(move |_| call.clone()), Box::new(answer)] }
    }

    /// The first call's result leads to the second call.
    pub fn double(
        request: String,
        first: Action,
        second: impl Fn(&str) -> Action + 'static,
        answer: impl Fn(&str) -> Action + 'static,
    ) -> Task {
        let mut task = Task::single(request, first, answer);
        task.acts.insert(1, Box::new(move |results| second(results.last().map_or("", String::as_str))));
        task
    }
}
