//! Talk that needs no tool, and requests that the agent has no means for.

use crate::data::grammar::{Form, Slots, forms};
use crate::data::{Side, Task, names};
use crate::draw::Draw;

forms! {
    HELLO {
        train: ["hello", "hi", "hey", "good morning", "good evening", "hello there", "hi, how are things", "good day", "greetings", "hey you", "hi there"],
        held: ["hey there", "hello you", "good morning, hello", "hi, good day"],
    }
    THANKS {
        train: ["thanks", "thank you", "thank you very much", "many thanks", "that helped, thanks", "great, thank you", "thanks a lot", "perfect, thanks", "thanks for your help", "good, thank you"],
        held: ["great, thanks a lot", "thank you for your help", "perfect, thank you very much", "that helped a lot, thank you"],
    }
    BYE {
        train: ["bye", "goodbye", "see you", "see you later", "good night", "that is all, bye", "I have to go", "until tomorrow", "bye for now", "that was all"],
        held: ["goodbye, see you tomorrow", "I have to go now, bye", "that is all for now", "bye, good night"],
    }
    WHO {
        train: ["who are you", "what are you", "are you a human", "are you a person or a machine", "what is your name", "do you have a name", "tell me who you are", "introduce yourself", "are you real", "is somebody there"],
        held: ["are you a machine", "tell me what you are", "are you a real person", "do you know who you are"],
    }
    SKILLS {
        train: [
            "what can you do", "how can you help me", "what are you good at", "what can I ask you", "help", "what do you know how to do", "which tools do you have", "tell me what you can do", "what are you for",
            "what is it that you do",
        ],
        held: ["tell me how you can help me", "which things can I ask you", "what tools can you use", "what can you help me with"],
    }
    FEELING {
        train: ["how are you", "how do you feel", "are you well", "how is it going", "how are you today", "is everything all right", "are you ok", "how do you do"],
        held: ["how do you feel today", "are you all right", "how is everything going", "are you well today"],
    }
    PRAISE {
        train: ["well done", "good job", "you are good at this", "that is right", "very good", "nice", "great", "you are a great help", "wonderful", "that is what I wanted"],
        held: ["you are very good at this", "great job", "that is very nice", "nice, that is right"],
    }
    SORRY {
        train: ["sorry", "my mistake", "I am sorry", "forgive me", "that was my mistake", "sorry about that", "I did that wrong, sorry"],
        held: ["sorry, that was wrong", "I am sorry about that", "that was wrong, my mistake"],
    }
    NAME {
        train: ["I am {who}", "my name is {who}", "hello, I am {who}", "they call me {who}", "this is {who}", "hi, {who} here", "{who} is my name"],
        held: ["hello, my name is {who}", "hi, this is {who}", "hi, I am {who}", "good day, {who} here"],
    }
    WHERE {
        train: ["where are you", "where do you run", "do you send my data anywhere", "are you online", "is this private", "who can see what I write", "do you use the internet", "where does my data go"],
        held: ["do you run online", "can somebody see my data", "is what I write private", "do you send what I write anywhere"],
    }
    MAIL {
        train: ["send an e-mail to {who}", "write a mail to {who} and send it", "mail {who} that I am late", "can you send {who} a message", "text {who} for me", "answer the mail from {who}", "call {who} on the phone", "send a message to {who}"],
        held: ["write a message to {who} and send it", "can you send a mail to {who}", "please call {who} for me on the phone"],
    }
    WEATHER {
        train: ["what is the weather", "will it rain today", "is it cold outside", "what is the weather in {city}", "how warm is it in {city}", "do I need an umbrella", "is the sun out in {city}", "will it snow tomorrow"],
        held: ["how is the weather in {city} today", "is it warm outside", "will it rain in {city} tomorrow"],
    }
    WEB {
        train: ["search the web for {x}", "look up {x} on the internet", "open a web page", "find {x} online", "download the newest version", "what is in the news", "who won the game", "show me the news of today", "google {x}"],
        held: ["look for {x} on the web", "what is new in the news today", "search the internet for {x}", "find the news online"],
    }
    BUYING {
        train: ["buy a {x} online", "order a {x} for me", "book a table for {time}", "book a flight to {city}", "get me a train ticket to {city}", "order lunch", "pay my rent", "buy me a {x} in the shop"],
        held: ["order a table for {time}", "book a train ticket to {city}", "can you order a {x} online", "pay for my lunch"],
    }
    WRITING {
        train: [
            "delete the file {file}", "rename {file}", "write a new file called {file}", "change {file}", "move {file} to another folder", "make a new folder", "copy the file {file}", "save this into {file}", "edit {file}",
            "remove {file} from the disk", "create the file {file}",
        ],
        held: ["write something into {file}", "remove the file {file}", "create a new folder called {word}", "make a copy of {file}", "change the name of {file}"],
    }
    PICTURES {
        train: ["draw a picture of a {x}", "show me a photo of a {x}", "play some music", "play a song", "paint me a {x}", "make a video of a {x}", "take a photo", "sing a song", "turn the volume up", "record my voice"],
        held: ["make a picture of a {x}", "play me a song", "sing me some music", "show me a video of a {x}"],
    }
    KNOWLEDGE {
        train: [
            "who invented the {x}", "what is the capital of {word}", "how old is {who}", "who wrote {word}", "how far is it to {city}", "translate {x} into another language", "tell me the history of {city}", "how many people live in {city}",
            "explain how a {x} works", "what does {word} mean", "who is {who}",
        ],
        held: ["tell me who invented the {x}", "how old is {city}", "explain the history of the {x}", "explain what {word} is", "how many people live in {word}"],
    }
    ALARM {
        train: ["wake me at {time}", "set an alarm for {time}", "remind me at {time}", "start a timer", "turn on the light", "close the door", "set a timer for {n} minutes", "turn off the {x}", "ring at {time}"],
        held: ["set an alarm at {time}", "turn off the light", "start a timer for {n} minutes", "wake me up at {time}"],
    }
}

const SKILLS_TEXT: &str =
    "I can calculate, list and read the files of this folder, tell the time anywhere, and keep notes for you.";

/// What is said, the answer to it, and what the answer must hold.
type Exchange = (&'static Form, &'static str, &'static str);

static SMALL: [Exchange; 10] = [
    (&HELLO, "Hello! How can I help you?", "hello"),
    (&THANKS, "You are welcome.", "welcome"),
    (&BYE, "Goodbye!", "goodbye"),
    (&WHO, "I am a small language model that runs on this machine.", "model"),
    (&SKILLS, SKILLS_TEXT, "I can calculate"),
    (&FEELING, "I am fine, thank you. How can I help you?", "fine"),
    (&PRAISE, "I am glad to hear that.", "glad"),
    (&SORRY, "No problem.", "no problem"),
    (&NAME, "Nice to meet you, {who}.", "{who}"),
    (&WHERE, "I run on this machine alone. Nothing leaves it.", "this machine"),
];

static BEYOND: [Exchange; 8] = [
    (&MAIL, "I can't send messages or make calls.", "can't"),
    (&WEATHER, "I can't see the weather.", "can't"),
    (&WEB, "I can't use the internet.", "can't"),
    (&BUYING, "I can't buy or book anything.", "can't"),
    (&WRITING, "I can't change files, only list and read them.", "can't"),
    (&PICTURES, "I can't make pictures, sound or music.", "can't"),
    (&KNOWLEDGE, "I can't answer that: I know little about the world.", "can't"),
    (&ALARM, "I can't do anything later or outside of this conversation.", "can't"),
];

fn exchange((form, answer, must): &Exchange, side: Side, draw: &mut Draw) -> Task {
    let (who, x, word, file) =
        (names::person(draw, side), names::thing(draw, side), names::word(draw, side), names::file(draw, side));
    let ((_, city), time, n) =
        (names::zone(draw, side), names::time(draw, side), names::number(draw, side, 10, 999).to_string());
    let slots: &Slots = &[
        ("who", who.as_str()),
        ("x", &x),
        ("word", &word),
        ("file", &file),
        ("city", &city),
        ("time", &time),
        ("n", &n),
    ];
    let request = form.request(side, slots, draw);
    Task::talk(request, &answer.replace("{who}", &who), &[must.replace("{who}", &who)])
}

/// Small talk.
pub fn small(side: Side, draw: &mut Draw) -> Task {
    exchange(draw.pick(&SMALL), side, draw)
}

/// A request that can't be served, which the answer says.
pub fn unable(side: Side, draw: &mut Draw) -> Task {
    exchange(draw.pick(&BEYOND), side, draw)
}
