//! Where the turns of a chat begin, seen in its ids.

use crate::qwen::tokenizer::Tokenizer;

/// The markers of the chat format.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    /// `<|im_start|>`
    start: u32,
    /// The same with the role behind it.
    system: Vec<u32>,
    user: Vec<u32>,
}

/// What a new turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    System,
    User,
    Other,
}

impl Turns {
    /// The markers as a tokenizer writes them; none if it knows no chats.
    pub fn new(tokenizer: &Tokenizer) -> Option<Turns> {
        let role = |role: &str| tokenizer.encode(&format!("<|im_start|>{role}")).ok();
        Some(Turns { start: tokenizer.id("<|im_start|>")?, system: role("system")?, user: role("user")? })
    }

    /// Where each turn but the first begins, and what ended there.
    pub fn ends(&self, ids: &[u32]) -> Vec<(usize, Ended)> {
        let starts: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == self.start).collect();
        let kind = |at: usize| match &ids[at..] {
            turn if turn.starts_with(&self.system) => Ended::System,
            turn if turn.starts_with(&self.user) => Ended::User,
            _ => Ended::Other,
        };
        starts.windows(2).map(|w| (w[1], kind(w[0]))).collect()
    }
}
