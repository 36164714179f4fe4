//! Facts that are told and asked for later, and the long texts in between.

use crate::data::grammar::{Slots, forms};
use crate::data::{Side, Task, names};
use crate::draw::Draw;

forms! {
    TELL {
        train: [
            "my {subject} is {value}", "[please |]remember that my {subject} is {value}", "keep in mind that my {subject} is {value}", "just so you know, my {subject} is {value}", "by the way, my {subject} is {value}", "please keep in mind: my {subject} is {value}", "you should know that my {subject} is {value}", "for later: my {subject} is {value}",
            "I will ask you later: my {subject} is {value}", "do not forget that my {subject} is {value}", "{value} is my {subject}", "let me tell you that my {subject} is {value}", "remember: my {subject} is {value}", "remember my {subject}: {value}", "remember this: my {subject} is {value}", "I want you to remember that my {subject} is {value}",
            "[can|could|will] you remember that my {subject} is {value}", "my {subject}: {value}", "so, my {subject} is {value}", "also, my {subject} is {value}", "and my {subject} is {value}", "I tell you now that my {subject} is {value}", "this is important: my {subject} is {value}", "my {subject} is {value}, remember that",
            "my {subject} is {value}, keep it in mind", "my {subject} is {value}. I will ask for it later", "in case I ask, my {subject} is {value}", "before I forget it, my {subject} is {value}", "you have to know that my {subject} is {value}", "learn this: my {subject} is {value}", "one more thing: my {subject} is {value}", "{value}, that is my {subject}",
            "remember {value} as my {subject}", "they told me that my {subject} is {value}", "my {subject} ({value}) is for you to keep in mind", "remember what I chose ({value}) as my {subject}", "from today my {subject} is {value}", "I chose {value} as my {subject}", "keep {value} in mind, it is my {subject}", "it may help you that my {subject} is {value}", "for your information, my {subject} is {value}",
        ],
        held: [
            "please remember that my {subject} is now {value}", "keep this in mind for later: my {subject} is {value}", "you should remember that {value} is my {subject}", "by the way, {value} is my {subject}", "I tell you this for later: my {subject} is {value}", "remember for me that my {subject} is {value}",
        ],
    }
    ASK {
        train: [
            "what is my {subject}", "what was my {subject}", "<do>tell me my {subject}", "do you remember my {subject}", "what did I say my {subject} is", "which {subject} did I tell you", "I forgot my {subject}, what was it", "what is my {subject} again", "can you tell me my {subject}", "do you still know my {subject}",
            "earlier I told you my {subject}, what is it", "<do>remind me of my {subject}", "my {subject}", "what's my {subject}", "<know>what my {subject} is", "<know>what my {subject} was", "I need my {subject}[ now|]", "which was my {subject}", "what did I say about my {subject}", "do you know my {subject}", "what {subject} did I give you",
            "and my {subject}, what was it", "I cannot remember my {subject}", "what did I call my {subject}", "have I told you my {subject}? What is it", "what have I told you about my {subject}", "<do>repeat my {subject}", "you should know my {subject}, what is it", "say my {subject} again", "I told you my {subject}, tell me what it is", "my {subject} was what",
            "what was my {subject} again", "some time ago I told you my {subject}, say it again", "did I tell you my {subject}", "so what is my {subject}", "now, what is my {subject}", "I lost my {subject}, do you have it", "<noun>my {subject}", "I told you my {subject} before, what was it", "I mentioned my {subject} some time ago, what was it", "I gave you my {subject} at the beginning, what is it", "I said my {subject} once, say it again", "you heard my {subject} a while ago, what was it", "I named my {subject} at the start, <do>tell me what it is", "I let you know my {subject} long ago, do you have it", "what is the {subject} that I gave you earlier", "you know my {subject} from earlier, what is it", "what I told you earlier, my {subject}, what was it", "you got my {subject} earlier today, what was it", "I gave you my {subject} this morning, what was it",
        ],
        held: ["can you remind me what my {subject} is", "I told you my {subject} earlier, what was it", "do you still remember my {subject}", "what did I tell you my {subject} was", "I forgot what my {subject} is, tell me", "what did you say my {subject} was"],
    }
    SUBJECT {
        train: [
            "{x} code", "{x} number", "{kind} code", "{kind} number", "favourite {x}", "{x} word", "{kind} password", "{kind} key word", "{kind} address", "{x} password", "{kind} account number", "{kind} teacher", "{kind} friend", "{kind} appointment", "{kind} team name", "locker code", "{kind} locker", "{kind} room number", "{kind} seat",
            "favourite {kind} {x}", "{x} owner", "{kind} account", "phone number", "door code", "{kind} door code", "{kind} team", "{kind} boss", "{x} colour", "name for the {x}", "bank PIN", "{kind} PIN", "{kind} user name", "{kind} train", "{kind} bus number", "{kind} dentist", "order number for the {x}", "{kind} street", "{kind} neighbour",
            "house number", "birthday wish", "{kind} membership number", "size in {x}s", "code for the {x}", "number at {place}", "password for {place}", "contact at {place}", "favourite colour", "favourite food", "middle name", "city", "{kind} hotel", "{kind} flight", "library number", "car number", "brother", "sister", "dog", "cat", "{kind} address in {place}",
        ],
        held: ["{kind} code word", "{x} key number", "{kind} account password", "favourite {kind} word", "{kind} team number", "{x} account", "{kind} room", "password for the {x}", "{kind} door number", "{x} code number"],
    }
    PASTE {
        train: [
            "here is a text, you need not do anything with it: {text}", "read this and just say ok: {text}", "some text for later: {text}", "this is from a book: {text}", "I read this today: {text}", "what follows is only for you to see: {text}", "the next part of the text: {text}", "this was in a letter: {text}",
            "a story: {text}", "listen: {text}", "here is what I wrote: {text}", "just read this: {text}", "for your information: {text}", "this was in the paper: {text}", "another part: {text}", "let me tell you a story: {text}", "read this, nothing more: {text}", "something I found: {text}", "the story goes on: {text}", "nothing to do here, just text: {text}",
        ],
        held: ["here is some text from a book: {text}", "the next part, just read this: {text}", "this text is for later, you need not do anything: {text}", "read what I found in a letter: {text}"],
    }
    SENTENCE {
        train: [
            "{who} found a {x} in the {word}", "the {x} of {who} was not for sale", "in {word} there were {n} people and a {x}", "{who} and {other} went to {word} at {time}", "nobody in {word} had seen the {x} before", "a {x} costs {n} there", "{who} gave the {x} to {other}", "at {time} the {word} closed", "it was a long way from {word} to {place}",
            "{who} said that the {x} was too old", "{other} had {n} of them and wanted more", "the number on the door was {n}", "{who} wrote a letter about the {x} to {other}", "after the {word} came the {place}, and then the {x}", "they sold {n} tickets in {word}", "the {x} stood next to the {word} all winter",
            "{who} lived in {city} for {n} days", "the code on the {x} was {n}, but {who} did not know it", "{who} ate {food} and drank nothing", "the password of {other} was {word}", "in {city} it was {time} when {who} woke up", "{who} bought {food} for {n} and a {x} for less", "the favourite {x} of {who} was lost in {city}", "every morning at {time} {other} walked to {place}",
            "{who} never liked {food}", "there was a {x} on the table and {food} on the floor", "the account of {who} had the number {n}", "{other} asked {who} for the {x}, but got {food}", "a train to {city} left at {time}", "{who} called it {word}", "the {x} cost {n} more than the year before", "the room of {other} was number {n}",
        ],
        held: [
            "{who} sold the {x} in {word}", "there was a letter about the {x} on the door", "at {time} {who} went to {place}", "{other} had seen {n} people in {word}", "the {x} was from {word} and too old for {who}", "{who} wanted {n} tickets, and {other} had a {x}", "they found the {x} next to {place}", "{who} and {other} had {food} in {city}",
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
        let (x, kind, place) = (names::thing(draw, side), names::kind(draw, side), names::word(draw, side));
        let subject = SUBJECT.text(side, &[("x", &x), ("kind", &kind), ("place", &place)], draw);
        let value = match draw.below(10) {
            0..=2 => names::figure(draw, side, 6).to_string(),
            3 => names::word(draw, side),
            4 => names::person(draw, side),
            5 => names::thing(draw, side),
            6 => names::food(draw, side),
            7 => names::zone(draw, side).1.replace('_', " "),
            8 => names::code(draw, side),
            _ => names::time(draw, side),
        };
        Fact { subject, value }
    }

    /// A new one that shares neither subject nor value with `others`.
    pub fn apart(others: &[Fact], side: Side, draw: &mut Draw) -> Fact {
        let apart = |a: &str, b: &str| !a.contains(b) && !b.contains(a);
        loop {
            let fact = Fact::new(side, draw);
            if others.iter().all(|other| apart(&other.subject, &fact.subject) && apart(&other.value, &fact.value)) {
                return fact;
            }
        }
    }

    /// As somebody says it.
    pub fn sentence(&self) -> String {
        format!("my {} is {}", self.subject, self.value)
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
            // Begins as the answer that knows it: whether it was told is seen while its name is said.
            Task::talk(request, &format!("Your {subject}? You have not told me that."), &["not told"])
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
        let (food, city) = (names::food(draw, side), names::zone(draw, side).1.replace('_', " "));
        let slots: &Slots = &[
            ("food", food.as_str()),
            ("city", &city),
            ("who", &who),
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
