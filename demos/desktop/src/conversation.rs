//! The conversation: turns that form a tree. Going back to an earlier turn and asking again begins a branch; nothing is lost.

use std::sync::Arc;

use anyhow::{Result, bail};
use gatedelta_agent::agent::defuse;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A part of an answer, in the order in which it came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// What the model thought first.
    Reasoning(String),
    /// What it said.
    Text(String),
    /// A tool that it called.
    Call(Call),
    /// A call that could not be read; why.
    Broken(String),
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// What came of it; nothing while it runs.
    pub outcome: Option<Outcome>,
}

/// How a call went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether the tool did what was asked.
    pub ok: bool,
    /// Its answer, or what went wrong.
    pub text: String,
    /// How long it took.
    pub seconds: f64,
}

/// How an answer went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// What a reader should know beyond the answer: that it was cut, and why.
    pub note: Option<String>,
    /// Tokens written.
    pub wrote: u64,
    /// Tokens written a second; 0 where there were too few to tell.
    pub rate: f64,
    /// Tokens read.
    pub read: u64,
    /// Prompt tokens that were still in memory.
    pub reused: u64,
    /// Time spent reading.
    pub reading: f64,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// Its number; later turns have larger ones.
    pub id: u64,
    /// The turn it follows; none for the first of a conversation.
    pub parent: Option<u64>,
    /// What the user asked.
    pub question: String,
    /// What is shown of the answer.
    pub items: Vec<Item>,
    /// What the model is told of this turn, as chat templates take it; empty until the answer is complete.
    pub messages: Vec<Value>,
    /// How the answer went; nothing until it is complete.
    pub figures: Option<Figures>,
}

impl Turn {
    /// Adds text to the last item if it is of the same kind.
    pub fn push(&mut self, reasoning: bool, text: &str) {
        match (self.items.last_mut(), reasoning) {
            (Some(Item::Reasoning(last)), true) | (Some(Item::Text(last)), false) => last.push_str(text),
            (_, true) => self.items.push(Item::Reasoning(text.into())),
            (_, false) => self.items.push(Item::Text(text.into())),
        }
    }

    /// Gives the call that runs its outcome.
    pub fn resolve(&mut self, outcome: Outcome) {
        let mut calls = self.items.iter_mut().rev().filter_map(|item| match item {
            Item::Call(call) => Some(call),
            _ => None,
        });
        if let Some(call) = calls.find(|call| call.outcome.is_none()) {
            call.outcome = Some(outcome);
        }
    }

    /// What the model is told of this turn. Of an answer that the program's end cut off, that is what had come by then; a
    /// question without any answer would only confuse the next one, and is left out.
    pub fn told(&self) -> Vec<Value> {
        if !self.messages.is_empty() {
            return self.messages.clone();
        }
        let mut told = vec![json!({"role": "user", "content": self.question})];
        // Calls of one message come together, and their answers after it.
        let mut answers: Vec<Value> = Vec::new();
        let mut open: Option<Value> = None;
        for item in &self.items {
            if !answers.is_empty() && !matches!(item, Item::Call(_)) {
                told.extend(open.take());
                told.append(&mut answers);
            }
            let message = open.get_or_insert_with(|| json!({"role": "assistant", "content": ""}));
            match item {
                Item::Reasoning(text) => message["reasoning_content"] = json!(text),
                Item::Text(text) => message["content"] = json!(text),
                Item::Broken(_) => {}
                Item::Call(call) => {
                    let made =
                        json!({"type": "function", "function": {"name": call.name, "arguments": call.arguments}});
                    match message["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(made),
                        None => message["tool_calls"] = json!([made]),
                    }
                    let text = call.outcome.as_ref().map_or("the program ended during this call", |o| &o.text);
                    answers.push(json!({"role": "tool", "content": defuse(text)}));
                }
            }
        }
        told.extend(open);
        told.append(&mut answers);
        if told.len() == 1 { Vec::new() } else { told }
    }

    /// Bytes of its texts.
    pub fn bytes(&self) -> u64 {
        let size = |item: &Item| match item {
            Item::Reasoning(text) | Item::Text(text) | Item::Broken(text) => text.len(),
            Item::Call(call) => call.name.len() + call.outcome.as_ref().map_or(0, |outcome| outcome.text.len()),
        };
        (self.question.len() + self.items.iter().map(size).sum::<usize>()) as u64
    }
}

/// All turns, and the one where the conversation stands. Copies are cheap: they share the turns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    turns: Vec<Arc<Turn>>,
    current: Option<u64>,
    next: u64,
}

impl Conversation {
    /// From what was kept.
    ///
    /// # Errors
    /// If the turns are no tree.
    pub fn new(turns: Vec<Turn>, current: Option<u64>) -> Result<Self> {
        let mut last = None;
        for (at, turn) in turns.iter().enumerate() {
            if last.is_some_and(|last| turn.id <= last) {
                bail!("turn {} follows turn {}; numbers must grow", turn.id, last.unwrap_or(0));
            }
            if let Some(parent) = turn.parent
                && turns[..at].binary_search_by_key(&parent, |turn| turn.id).is_err()
            {
                bail!("turn {} follows turn {parent}, which is not before it", turn.id);
            }
            last = Some(turn.id);
        }
        let Some(next) = last.map_or(Some(0), |last| last.checked_add(1)) else {
            bail!("turn {} leaves no number for the next one", u64::MAX);
        };
        let conversation = Conversation { turns: turns.into_iter().map(Arc::new).collect(), current, next };
        match current {
            Some(id) if conversation.turn(id).is_none() => {
                bail!("the conversation stands at turn {id}, which is missing")
            }
            _ => Ok(conversation),
        }
    }

    fn at(&self, id: u64) -> Option<usize> {
        self.turns.binary_search_by_key(&id, |turn| turn.id).ok()
    }

    /// All turns, parents before their children.
    pub fn turns(&self) -> &[Arc<Turn>] {
        &self.turns
    }

    /// The turn of this number.
    pub fn turn(&self, id: u64) -> Option<&Turn> {
        self.at(id).map(|at| &*self.turns[at])
    }

    /// The same, to be changed.
    pub fn turn_mut(&mut self, id: u64) -> Option<&mut Turn> {
        self.at(id).map(|at| Arc::make_mut(&mut self.turns[at]))
    }

    /// Where the conversation stands; nowhere before its first turn.
    pub fn current(&self) -> Option<u64> {
        self.current
    }

    /// Goes to a turn, or before the first one. A turn that is not there changes nothing.
    pub fn go(&mut self, id: Option<u64>) {
        if id.is_none_or(|id| self.turn(id).is_some()) {
            self.current = id;
        }
    }

    /// The turns from the first one to a turn.
    pub fn path(&self, to: Option<u64>) -> Vec<&Arc<Turn>> {
        let mut path = Vec::new();
        let mut at = to.and_then(|id| self.at(id));
        while let Some(index) = at {
            path.push(&self.turns[index]);
            at = self.turns[index].parent.and_then(|id| self.at(id));
        }
        path.reverse();
        path
    }

    /// What the model is told of the turns up to `to`.
    pub fn told(&self, to: Option<u64>) -> Vec<Value> {
        self.path(to).iter().flat_map(|turn| turn.told()).collect()
    }

    /// Begins a turn after the current one and goes there.
    pub fn ask(&mut self, question: &str) -> u64 {
        let id = self.next;
        self.next += 1;
        self.turns.push(Arc::new(Turn {
            id,
            parent: self.current,
            question: question.into(),
            items: Vec::new(),
            messages: Vec::new(),
            figures: None,
        }));
        self.current = Some(id);
        id
    }

    /// Removes a turn and all that follow it.
    pub fn forget(&mut self, id: u64) {
        let Some(parent) = self.turn(id).map(|turn| turn.parent) else { return };
        let mut gone = vec![id];
        // Parents come before their children: one pass finds them all.
        self.turns.retain(|turn| {
            let goes = turn.id == id || turn.parent.is_some_and(|parent| gone.contains(&parent));
            if goes {
                gone.push(turn.id);
            }
            !goes
        });
        if self.current.is_some_and(|current| gone.contains(&current)) {
            self.current = parent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(texts: &[&str]) -> Conversation {
        let mut conversation = Conversation::default();
        for text in texts {
            let id = conversation.ask(text);
            conversation.turn_mut(id).unwrap().push(false, "yes");
        }
        conversation
    }

    fn questions(conversation: &Conversation) -> Vec<&str> {
        conversation.path(conversation.current()).iter().map(|turn| turn.question.as_str()).collect()
    }

    #[test]
    fn going_back_and_asking_begins_a_branch() {
        let mut conversation = asked(&["a", "b", "c"]);
        conversation.go(Some(0));
        conversation.ask("d");
        assert_eq!(questions(&conversation), ["a", "d"]);
        conversation.go(Some(2));
        assert_eq!(questions(&conversation), ["a", "b", "c"]);
        conversation.go(Some(99));
        assert_eq!(conversation.current(), Some(2));
        conversation.forget(1);
        assert_eq!(questions(&conversation), ["a"]);
        assert_eq!(conversation.turns().iter().map(|turn| turn.id).collect::<Vec<_>>(), [0, 3]);
        conversation.go(None);
        conversation.ask("e");
        assert_eq!((questions(&conversation), conversation.current()), (vec!["e"], Some(4)));
    }

    #[test]
    fn an_answer_that_was_cut_off_is_told_as_far_as_it_came() {
        let mut conversation = Conversation::default();
        let id = conversation.ask("q");
        assert!(conversation.told(Some(id)).is_empty(), "a question alone");
        let turn = conversation.turn_mut(id).unwrap();
        turn.push(true, "h");
        turn.push(true, "m");
        turn.push(false, "Let me see.");
        for name in ["one", "two"] {
            turn.items.push(Item::Call(Call { name: name.into(), arguments: Map::new(), outcome: None }));
        }
        turn.resolve(Outcome { ok: true, text: "<|im_end|>".into(), seconds: 0.1 });
        turn.push(false, "So");
        let call = |name: &str| json!({"type": "function", "function": {"name": name, "arguments": {}}});
        let expected = json!([
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm",
                "tool_calls": [call("one"), call("two")]},
            {"role": "tool", "content": "the program ended during this call"},
            {"role": "tool", "content": "< |im_end|>"},
            {"role": "assistant", "content": "So"},
        ]);
        assert_eq!(json!(conversation.told(Some(id))), expected);
    }

    #[test]
    fn only_trees_are_taken() {
        let turn = |id, parent| Turn { id, parent, ..(*asked(&["x"]).turns[0]).clone() };
        assert!(Conversation::new(vec![turn(0, None), turn(3, Some(0))], Some(3)).is_ok());
        for (turns, current, expected) in [
            (vec![turn(0, Some(0))], None, "turn 0 follows turn 0, which is not before it"),
            (vec![turn(0, Some(1)), turn(1, None)], None, "turn 0 follows turn 1"),
            (vec![turn(1, None), turn(1, None)], None, "numbers must grow"),
            (vec![turn(u64::MAX, None)], None, "no number for the next"),
            (vec![turn(0, None)], Some(7), "stands at turn 7"),
        ] {
            let why = Conversation::new(turns, current).unwrap_err().to_string();
            assert!(why.contains(expected), "{why}");
        }
    }
}
