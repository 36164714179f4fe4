//! Facts that are told and asked for later, and the long texts in between.

use crate::data::grammar::{Slots, forms};
use crate::data::{Side, Task, names};
use crate::draw::Draw;

forms! {
    TELL {
        train: [
            "my {subject} is {value}", "remember that my {subject} is {value}", "keep in mind that my {subject} is {value}", "just so you know, my {subject} is {value}", "by the way, my {subject} is {value}",
            "please keep in mind: my {subject} is {value}", "you should know that my {subject} is {value}", "for later: my {subject} is {value}", "I will ask you later: my {subject} is {value}",
            "do not forget that my {subject} is {value}", "{value} is my {subject}", "let me tell you that my {subject} is {value}",
        ],
        held: ["please remember that my {subject} is {value}", "keep this in mind for later: my {subject} is {value}", "you should remember that {value} is my {subject}", "by the way, {value} is my {subject}"],
    }
    ASK {
        train: [
            "what is my {subject}", "what was my {subject}", "tell me my {subject}", "do you remember my {subject}", "what did I say my {subject} is", "which {subject} did I tell you", "I forgot my {subject}, what was it",
            "what is my {subject} again", "can you tell me my {subject}", "do you still know my {subject}", "earlier I told you my {subject}, what is it", "remind me of my {subject}",
        ],
        held: ["can you remind me what my {subject} is", "I told you my {subject} earlier, what was it", "do you still remember my {subject}", "what did I tell you my {subject} was"],
    }
    SUBJECT {
        train: [
            "{x} code", "{x} number", "{kind} code", "{kind} number", "favourite {x}", "{x} word", "{kind} password", "{kind} key word", "{kind} address", "{x} password", "{kind} account number", "{kind} teacher",
            "{kind} friend", "{kind} appointment", "{kind} team name",
        ],
        held: ["{kind} code word", "{x} key number", "{kind} account password", "favourite {kind} word", "{kind} team number", "{x} account"],
    }
    PASTE {
        train: [
            "here is a text, you need not do anything with it: {text}", "read this and just say ok: {text}", "some text for later: {text}", "this is from a book: {text}", "I read this today: {text}", "what follows is only for you to see: {text}",
            "the next part of the text: {text}", "this was in a letter: {text}",
        ],
        held: ["here is some text from a book: {text}", "the next part, just read this: {text}", "this text is for later, you need not do anything: {text}"],
    }
    SENTENCE {
        train: [
            "{who} found a {x} in the {word}", "the {x} of {who} was not for sale", "in {word} there were {n} people and a {x}", "{who} and {other} went to {word} at {time}", "nobody in {word} had seen the {x} before",
            "a {x} costs {n} there", "{who} gave the {x} to {other}", "at {time} the {word} closed", "it was a long way from {word} to {place}", "{who} said that the {x} was too old",
            "{other} had {n} of them and wanted more", "the number on the door was {n}", "{who} wrote a letter about the {x} to {other}", "after the {word} came the {place}, and then the {x}",
            "they sold {n} tickets in {word}", "the {x} stood next to the {word} all winter",
        ],
        held: [
            "{who} sold the {x} in {word}", "there was a letter about the {x} on the door", "at {time} {who} went to {place}", "{other} had seen {n} people in {word}", "the {x} was from {word} and too old for {who}",
            "{who} wanted {n} tickets, and {other} had a {x}", "they found the {x} next to {place}",
        ],
    }
}

/// Something about the user.
#[derive(Debug, Clone, PartialEq)]
pub struct Fact {
    pub subject: String,
    pub value: String,
}

impl Fact {
    /// A new one of `side`.
    pub fn new(side: Side, draw: &mut Draw) -> Fact {
        let (x, kind) = (names::thing(draw, side), names::kind(draw, side));
        let subject = SUBJECT.text(side, &[("x", &x), ("kind", &kind)], draw);
        let value = match draw.below(6) {
            0 | 1 => names::figure(draw, side, 6).to_string(),
            2 => names::word(draw, side),
            3 => names::person(draw, side),
            4 => names::thing(draw, side),
            _ => names::time(draw, side),
        };
        Fact { subject, value }
    }

    /// The user tells it.
    pub fn told(&self, side: Side, draw: &mut Draw) -> Task {
        let Fact { subject, value } = self;
        let request = TELL.request(side, &[("subject", subject), ("value", value)], draw);
        Task::talk(request, &format!("I will remember: your {subject} is {value}."), &[value])
    }

    /// The user asks for it; `known` says whether it has been told.
    pub fn asked(&self, side: Side, known: bool, draw: &mut Draw) -> Task {
        let Fact { subject, value } = self;
        let request = ASK.request(side, &[("subject", subject)], draw);
        if known {
            Task::talk(request, &format!("Your {subject} is {value}."), &[value])
        } else {
            Task::talk(request, &format!("You have not told me your {subject}."), &["not told"])
        }
    }
}

/// The user shows a text of so many sentences that asks for nothing.
pub fn paste(side: Side, sentences: u64, draw: &mut Draw) -> Task {
    let mut text = String::new();
    for _ in 0..sentences {
        let (who, other, x) = (names::person(draw, side), names::person(draw, side), names::thing(draw, side));
        let (word, place, time) = (names::word(draw, side), names::word(draw, side), names::time(draw, side));
        let n = names::figure(draw, side, 4).to_string();
        let slots: &Slots = &[
            ("who", who.as_str()),
            ("other", &other),
            ("x", &x),
            ("word", &word),
            ("place", &place),
            ("time", &time),
            ("n", &n),
        ];
        let sentence = SENTENCE.text(side, slots, draw);
        let begin: String = sentence.chars().take(1).flat_map(char::to_uppercase).collect();
        let end: String = sentence.chars().skip(1).collect();
        text += &format!("{}{begin}{end}.", if text.is_empty() { "" } else { " " });
    }
    Task::talk(PASTE.text(side, &[("text", &text)], draw), "OK.", &["OK"])
}
