//! Talk that needs no tool, and requests that the agent has no means for.

use crate::data::grammar::{Form, Slots, forms};
use crate::data::memory::Fact;
use crate::data::{Side, Task, names};
use crate::draw::Draw;

forms! {
    HELLO {
        train: ["hello", "hi", "hey", "good morning", "good evening", "hello there", "hi, how are things", "good day", "greetings", "hey you", "hi there", "hello again", "hi again", "good afternoon", "hello, anybody there", "hey, good morning", "hello my friend", "hiya", "hello computer", "hi, nice to meet you", "hello hello", "well hello", "morning", "hi, I am back", "hello, it's me", "good evening to you", "hey hey", "hello, nice to see you", "hi, are you ready"],
        held: ["hey there", "hello you", "good morning, hello", "hi, good day", "hi, good evening", "hello, I am back"],
    }
    THANKS {
        train: ["thanks", "thank you", "thank you very much", "many thanks", "that helped, thanks", "great, thank you", "thanks a lot", "perfect, thanks", "thanks for your help", "good, thank you", "thanks so much", "ok thanks", "thank you, that is all I need", "cheers", "thanks for that", "I thank you", "thank you so much", "nice, thanks", "wonderful, thank you", "thanks, that was quick", "ok, thank you", "thanks again", "much appreciated", "thx", "very kind, thank you", "thanks, good work", "thank you for that", "cool, thanks", "that is what I needed, thanks"],
        held: ["great, thanks a lot", "thank you for your help", "perfect, thank you very much", "that helped a lot, thank you", "ok, many thanks", "thank you again for your help"],
    }
    BYE {
        train: ["bye", "goodbye", "see you", "see you later", "good night", "that is all, bye", "I have to go", "until tomorrow", "bye for now", "that was all", "bye bye", "see you soon", "I am leaving now", "that's all for today", "have a nice day", "until next time", "ciao", "I am done, bye", "so long", "talk to you later", "ok, bye", "I go to bed now", "have a good night", "I am off", "farewell", "later", "we are done, goodbye", "see you tomorrow", "exit", "quit", "that is all for today, goodbye"],
        held: ["goodbye, see you tomorrow", "I have to go now, bye", "that is all for now", "bye, good night", "I am done for today, see you", "bye, have a nice day"],
    }
    WHO {
        train: [
            "who are you", "what are you", "are you a human", "are you a person or a machine", "what is your name", "do you have a name", "tell me who you are", "introduce yourself", "are you real", "is somebody there", "are you a robot", "are you a computer", "are you ChatGPT", "what kind of model are you", "are you an AI", "who am I talking to", "who made you", "what's your name", "are you alive",
            "how were you made", "tell me about yourself", "say who you are", "what should I call you", "are you a language model", "what sort of thing are you", "who is there", "who built you", "how big are you", "am I talking to a machine", "are you human or not",
        ],
        held: ["are you a machine", "tell me what you are", "are you a real person", "do you know who you are", "what kind of machine are you", "am I talking to a person"],
    }
    SKILLS {
        train: [
            "what can you do", "how can you help me", "what are you good at", "what can I ask you", "help", "what do you know how to do", "which tools do you have", "tell me what you can do", "what are you for", "what is it that you do", "what can you do for me", "how do you work", "what should I ask you", "what are you able to do", "what can I do here", "how can I use you",
            "what tools do you have", "what do you do", "what are your skills", "what are you made for", "show me what you can do", "what could you help me with", "what are your tools", "list your tools", "can you help me", "I need help", "help me", "what else can you do", "give me an example of what you can do", "in what can you help",
        ],
        held: ["tell me how you can help me", "which things can I ask you", "what tools can you use", "what can you help me with", "tell me what your tools are", "show me how I can use you"],
    }
    FEELING {
        train: ["how are you", "how do you feel", "are you well", "how is it going", "how are you today", "is everything all right", "are you ok", "how do you do", "how are you doing", "how's it going", "what's up", "how was your day", "how are things", "are you fine", "are you happy", "how have you been", "are you tired", "all well", "everything ok", "you ok", "how goes it", "how is your day", "are you doing well", "do you feel good"],
        held: ["how do you feel today", "are you all right", "how is everything going", "are you well today", "how are you doing today", "is everything ok"],
    }
    PRAISE {
        train: ["well done", "good job", "you are good at this", "that is right", "very good", "nice", "great", "you are a great help", "wonderful", "that is what I wanted", "perfect", "excellent", "cool", "good", "that was fast", "I like you", "you are clever", "right", "correct", "you are nice", "awesome", "exactly", "that is correct", "super", "good work", "you did well", "I am happy with that", "you are great", "fine", "that is good"],
        held: ["you are very good at this", "great job", "that is very nice", "nice, that is right", "that was very good", "you are a good help"],
    }
    SORRY {
        train: ["sorry", "my mistake", "I am sorry", "forgive me", "that was my mistake", "sorry about that", "I did that wrong, sorry", "oh, sorry", "I apologise", "oops", "I made a mistake", "pardon me", "I was wrong", "sorry, I was wrong", "so sorry", "oops, sorry", "excuse me", "sorry, my fault", "I beg your pardon", "oh no, I was wrong"],
        held: ["sorry, that was wrong", "I am sorry about that", "that was wrong, my mistake", "oops, my mistake", "sorry, I made a mistake"],
    }
    NAME {
        train: ["I am {who}", "my name is {who}", "hello, I am {who}", "they call me {who}", "this is {who}", "hi, {who} here", "{who} is my name", "I'm {who}", "hello, {who} here", "you can call me {who}", "call me {who}", "hi, they call me {who}", "my name's {who}", "hello, this is {who}", "{who} here", "I am called {who}", "good morning, I am {who}", "let me introduce myself: {who}", "hey, I'm {who}", "my friends call me {who}"],
        held: ["hello, my name is {who}", "hi, this is {who}", "hi, I am {who}", "good day, {who} here", "hello, you can call me {who}", "good morning, my name is {who}"],
    }
    WHERE {
        train: [
            "where are you", "where do you run", "do you send my data anywhere", "are you online", "is this private", "who can see what I write", "do you use the internet", "where does my data go", "is my data safe", "do you run on this computer", "are you in the cloud", "do you keep what I say private", "does anybody read this", "do you need the internet", "can others see this",
            "are you on a server", "where do you live", "who reads what I write", "is this safe", "do you store my data anywhere", "do you work without the internet", "are you local", "do you spy on me", "does this leave my computer", "where is what I write stored",
        ],
        held: ["do you run online", "can somebody see my data", "is what I write private", "do you send what I write anywhere", "do you run without the internet", "can others read what I write"],
    }
    JOKE {
        train: ["tell me a joke", "tell a joke", "do you know a joke", "make me laugh", "say something funny", "a joke please", "another joke", "can you tell jokes", "I want to hear a joke", "joke", "give me a joke", "know any jokes", "do you know something funny", "say a joke", "got a joke for me", "be funny"],
        held: ["can you tell me a joke", "do you know any jokes", "tell me something funny", "I want a joke", "can you make me laugh"],
    }
    OK {
        train: ["ok", "okay", "alright", "I see", "yes", "no", "got it", "I understand", "understood", "hm", "aha", "interesting", "sure", "all right", "yes please", "no thanks", "never mind", "forget it", "nothing", "wait", "let me think", "well", "so", "ok then"],
        held: ["ok, I see", "all right then", "ok, I understand", "yes, I see", "no, never mind"],
    }
    MAIL {
        train: [
            "send an e-mail to {who}", "<do>write a mail to {who} and send it", "<do>mail {who} that I am late", "<do>send {who} a message", "<do>text {who} for me", "<do>answer the mail from {who}", "<do>call {who} on the phone", "<do>send a message to {who}", "do I have new mail", "read my mail", "check my e-mail", "<do>send an email to {who}", "what e-mails did I get", "<do>ring {who}",
            "phone {who}", "<do>write {who} on WhatsApp", "tell {who} by mail that I am ill", "<do>invite {who} by mail", "<do>forward this to {who}", "has {who} written to me", "<do>send my notes to {who}", "open my inbox", "<do>post this for everybody", "<do>dial the number of {who}", "is there a message from {who}", "send a letter to {who}",
        ],
        held: ["write a message to {who} and send it", "can you send a mail to {who}", "please call {who} for me on the phone", "do I have a new message from {who}", "send {who} an e-mail that I am late"],
    }
    WEATHER {
        train: [
            "what is the weather", "will it rain today", "is it cold outside", "what is the weather in {city}", "how warm is it in {city}", "do I need an umbrella", "is the sun out in {city}", "will it snow tomorrow", "what's the weather like", "weather", "weather in {city}", "how cold is it", "will it be sunny in {city}", "<noun>the weather for tomorrow", "is it raining", "what temperature is it outside",
            "is it windy in {city}", "how hot is it in {city}", "<know>if it will rain", "will there be a storm", "is there snow in {city}", "what will the weather be on [Monday|Friday|Sunday]", "do I need a coat today", "how is the weather", "the forecast for {city}", "is it going to rain in {city}",
        ],
        held: ["how is the weather in {city} today", "is it warm outside", "will it rain in {city} tomorrow", "what is the temperature in {city}", "will it be cold today", "tell me the weather for {city}"],
    }
    WEB {
        train: [
            "<do>search the web for {x}", "<do>look up {x} on the internet", "<do>open a web page", "<do>find {x} online", "<do>download the newest version", "what is in the news", "who won the game", "<do>show me the news of today", "google {x}", "<do>go to the page of {word}", "what do people say about {word} online", "latest news", "<do>open {word}.com", "<do>search online for {x}",
            "<do>find a web page about {x}", "what does Wikipedia say about {x}", "who won the match yesterday", "news from {city}", "<do>download {file}", "what is the price of gold today", "how are the stocks", "<do>look at the web page of {word}", "<do>browse to {word}", "what happened in {city} today", "what is the exchange rate of the dollar", "<do>google who {who} is", "any news",
        ],
        held: ["look for {x} on the web", "what is new in the news today", "search the internet for {x}", "find the news online", "open the web page of {word}", "who won the game in {city}"],
    }
    BUYING {
        train: [
            "<do>buy a {x} online", "<do>order a {x} for me", "<do>book a table for {time}", "<do>book a flight to {city}", "<do>get me a train ticket to {city}", "<do>order lunch", "<do>pay my rent", "<do>buy me a {x} in the shop", "<do>reserve a room in {city}", "<do>order a pizza", "<do>book a hotel in {city}", "<do>get me a taxi", "<do>rent a car in {city}", "<do>pay this bill",
            "I want to buy a {x}, order it", "<do>reserve a seat on the train to {city}", "<do>send money to {who}", "<do>transfer {n} to {who}", "<do>book a room", "<do>order flowers for {who}", "get me a ticket for tonight", "<do>call me a cab",
        ],
        held: ["order a table for {time}", "book a train ticket to {city}", "can you order a {x} online", "pay for my lunch", "book me a room in {city}", "I want to order a {x}"],
    }
    WRITING {
        train: [
            "<do>delete the file {file}", "<do>rename {file}", "<do>write a new file called {file}", "<do>change {file}", "<do>move {file} to another folder", "<do>make a new folder", "<do>copy the file {file}", "<do>save this into {file}", "<do>edit {file}", "<do>remove {file} from the disk", "<do>create the file {file}", "<do>add a line to {file}", "<do>write my name into {file}",
            "<do>delete {file}", "rm {file}", "mkdir {word}", "<do>overwrite {file}", "<do>make a file called {file}", "<do>correct the mistake in {file}", "<do>replace a word in {file}", "<do>put this text into {file}", "<do>empty {file}", "<do>create a folder named {word}", "<do>rename {file} to {word}", "<do>append this to {file}", "<do>save my notes to {file}", "<do>delete the folder {word}",
        ],
        held: ["write something into {file}", "remove the file {file}", "create a new folder called {word}", "make a copy of {file}", "change the name of {file}", "delete the whole file {file}"],
    }
    PICTURES {
        train: [
            "<do>draw a picture of a {x}", "<do>show me a photo of a {x}", "<do>play some music", "<do>play a song", "<do>paint me a {x}", "<do>make a video of a {x}", "<do>take a photo", "<do>sing a song", "<do>turn the volume up", "<do>record my voice", "<do>draw a {x}", "<do>create an image of a {x}", "<do>generate a picture of {city}", "play {word}", "play the radio", "<do>sing for me",
            "what is in this picture", "<do>look at this photo", "<do>make some noise", "<do>play a film", "<do>show me a picture of {who}", "<do>draw a map of {city}", "<do>say it out loud", "listen to this song", "<do>edit my photo", "<do>put on some music",
        ],
        held: ["make a picture of a {x}", "play me a song", "sing me some music", "show me a video of a {x}", "draw me a picture of {city}", "play some music for {who}"],
    }
    KNOWLEDGE {
        train: [
            "who invented the {x}", "what is the capital of {word}", "how old is {who}", "who wrote {word}", "how far is it to {city}", "<do>tell me the history of {city}", "how many people live in {city}", "<do>explain how a {x} works", "what does {word} mean", "who is {who}", "when was {city} founded", "why is the sky blue", "who is the president of {word}", "what is a {x} made of",
            "how do I cook {food}", "how do I repair a {x}", "what is the meaning of life", "<do>explain {word} to me", "what language do they speak in {city}", "how tall is {who}", "where is {city}", "is {food} healthy", "who was the first on the moon", "what should I eat today", "what should I do", "<know>who {who} is", "how does a {x} work", "what is the best {x}",
            "how long does {food} keep", "which river is in {city}", "what is {word}", "who lives in {word}", "how many planets are there", "what do you think about {word}", "which {x} should I buy", "give me a recipe for {food}", "where was {who} born",
        ],
        held: ["tell me who invented the {x}", "how old is {city}", "explain the history of the {x}", "explain what {word} is", "how many people live in {word}", "where is the best {x} made", "how do I make {food}"],
    }
    TRANSLATE {
        train: [
            "<do>translate {x} into another language", "what is {x} in French", "how do you say {x} in German", "<do>translate this into Spanish: {food}", "what does {word} mean in English", "<do>say {food} in Italian", "how do I say hello in Chinese", "<do>translate {food} to French", "what is the Spanish word for {x}", "<do>translate my note into German", "do you speak French",
            "do you speak Spanish", "<do>speak German with me", "<do>translate {file}",
        ],
        held: ["translate {x} into French", "how do you say {food} in Spanish", "what is {food} in German", "can you translate this to Italian: {x}", "what is the German word for {food}"],
    }
    TEXTS {
        train: [
            "<do>write a poem about a {x}", "<do>write a story about {who}", "<do>write me an essay on {word}", "<do>write a program in Python", "<do>write code for a {x}", "<do>write a poem", "<do>make up a story", "<do>write a speech for {who}", "<do>summarise {word} for me", "<do>write a letter to {who}", "<do>write a song", "<do>fix my code", "<do>write a function that adds numbers",
            "<do>tell me a story", "<do>rhyme something with {word}", "<do>write a script for me", "<do>debug this program", "<do>compose a poem about {city}", "<do>think of a name for my {x}", "<do>write an article about {food}", "<do>run this program", "<do>write a web page",
        ],
        held: ["write me a poem about {city}", "make up a story about a {x}", "write a program for me", "tell me a story about {who}", "write me some code in Python"],
    }
    ALARM {
        train: [
            "wake me at {time}", "<do>set an alarm for {time}", "<do>remind me at {time}", "<do>start a timer", "<do>turn on the light", "<do>close the door", "<do>set a timer for {n} minutes", "<do>turn off the {x}", "ring at {time}", "<do>wake me up in {n} minutes", "<do>set the alarm to {time}", "<do>switch on the {x}", "<do>open the window", "<do>turn up the heating", "alarm at {time}",
            "timer for {n} minutes", "<do>stop the timer", "<do>lock the door", "<do>start the {x}", "<do>tell me when {n} minutes are over", "<do>shut down the computer", "<do>restart the machine", "<do>put an appointment at {time} into my calendar", "what is in my calendar", "<do>open an app", "<do>switch off the light", "<do>print this on paper", "<do>start the car",
        ],
        held: ["set an alarm at {time}", "turn off the light", "start a timer for {n} minutes", "wake me up at {time}", "switch off the {x}", "ring an alarm at {time}"],
    }
}

const SKILLS_TEXT: &str =
    "I can calculate, list and read the files of this folder, tell the time anywhere, and keep notes for you.";

/// What is said, the answer to it, and what the answer must hold.
type Exchange = (&'static Form, &'static str, &'static str);

static SMALL: [Exchange; 12] = [
    (&HELLO, "Hello! How can I help you?", "hello"),
    (&THANKS, "You are welcome.", "welcome"),
    (&BYE, "Goodbye!", "goodbye"),
    (&WHO, "I am a small language model that runs on this machine.", "model"),
    (&SKILLS, SKILLS_TEXT, "I can calculate"),
    (&FEELING, "I am fine, thank you. How can I help you?", "fine"),
    (&PRAISE, "I am glad to hear that.", "glad"),
    (&SORRY, "No problem.", "no problem"),
    (&NAME, "Nice to meet you, {who}.", "{who}"),
    (&JOKE, "I know no jokes. I am better at sums.", "no jokes"),
    (&OK, "All right.", "all right"),
    (&WHERE, "I run on this machine alone. Nothing leaves it.", "this machine"),
];

/// Of all that it can't do, what sounds most like what it can.
const CHANGING: Exchange = (&WRITING, "I can't change files, only list and read them.", "can't");
static BEYOND: [Exchange; 10] = [
    (&MAIL, "I can't send messages or make calls.", "can't"),
    (&WEATHER, "I can't see the weather.", "can't"),
    (&WEB, "I can't use the internet.", "can't"),
    (&BUYING, "I can't buy or book anything.", "can't"),
    CHANGING,
    (&PICTURES, "I can't make pictures, sound or music.", "can't"),
    (&KNOWLEDGE, "I can't answer that: I know little about the world.", "can't"),
    (&TRANSLATE, "I can't translate, I only know some English.", "can't"),
    (&TEXTS, "I can't write texts or programs.", "can't"),
    (&ALARM, "I can't do anything later or outside of this conversation.", "can't"),
];

/// What is said after what can't be done.
const ABLE: &str = "I can calculate, list and read files, tell the time and keep notes.";

/// A request of `form`, and who is named in it.
fn said(form: &Form, side: Side, draw: &mut Draw) -> (String, String) {
    let (who, x, word) = (names::person(draw, side), names::thing(draw, side), names::word(draw, side));
    let (file, food, time) = (names::file(draw, side), names::food(draw, side), names::time(draw, side));
    let city = names::zone(draw, side).1.replace('_', " ");
    let n = names::number(draw, side, 10, 999).to_string();
    let slots: &Slots = &[
        ("who", who.as_str()),
        ("x", &x),
        ("word", &word),
        ("file", &file),
        ("city", &city),
        ("food", &food),
        ("time", &time),
        ("n", &n),
    ];
    (form.request(side, slots, draw), who)
}

/// Small talk.
pub fn small(side: Side, draw: &mut Draw) -> Task {
    let (form, answer, must) = draw.pick(&SMALL);
    let (request, who) = said(form, side, draw);
    Task::talk(request, &answer.replace("{who}", &who), &[must.replace("{who}", &who)])
}

/// A request that can't be served, which the answer says.
pub fn unable(side: Side, draw: &mut Draw) -> Task {
    let close = side == Side::Train && draw.chance(25);
    let (form, answer, must) = if close { &CHANGING } else { draw.pick(&BEYOND) };
    let (request, _) = said(form, side, draw);
    Task::talk(request, &format!("{answer} {ABLE}"), &[must])
}

/// The user says who they are, which may be asked for later.
pub fn name(side: Side, draw: &mut Draw) -> (Task, Fact) {
    let (request, who) = said(&NAME, side, draw);
    let task = Task::talk(request, &format!("Nice to meet you, {who}."), &[&who]);
    (task, Fact { subject: "name".to_string(), value: who })
}
