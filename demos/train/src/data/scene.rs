//! Conversations up to a request, and with what is done about it.

use anyhow::{Context, Result, bail};
use gatedelta::qwen::ChatTemplate;
use gatedelta_agent::builtin;
use gatedelta_agent::tools::Spec;
use serde_json::Value;

use crate::data::memory::{self, Fact};
use crate::data::oracle::Oracle;
use crate::data::world::World;
use crate::data::{Group, Kind, Side, Task, talk};
use crate::draw::Draw;
use crate::turn::{self, Turn};

/// Far more than any answer of the data has.
pub const MAX_TOKENS: usize = 4096;
/// Worlds that are tried for one request.
const TRIES: u64 = 100;

/// A conversation up to a request.
pub struct Scene {
    pub world: World,
    /// The messages before the request; none where it is the first.
    pub history: Vec<Value>,
    /// What the user has told in it.
    pub facts: Vec<Fact>,
    pub task: Task,
}

/// A scene with what the oracle does about it.
pub struct Played {
    pub turn: Turn,
    /// What an answer must hold to be right.
    pub must: Vec<String>,
}

/// Which scene of which data.
#[derive(Debug, Clone, Copy)]
pub struct Number {
    pub seed: u64,
    pub side: Side,
    pub index: u64,
}

/// How long a text is, in tokens.
pub type Measure<'a> = &'a (dyn Fn(&str) -> usize + Sync);

/// As long as there is no tokenizer: tokens of this data have about so many bytes.
pub fn estimate(text: &str) -> usize {
    text.len() / 4
}

/// Makes scenes and conversations.
pub struct Maker<'a> {
    pub template: ChatTemplate,
    /// For the length of a conversation and the distance between a fact and the question for it.
    pub measure: Measure<'a>,
    /// The least such distance in tokens; by default it varies.
    pub distance: Option<usize>,
}

/// Where a conversation of the training data ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Length {
    /// With its request.
    Short,
    /// After about so many tokens of requests of all kinds.
    Grown(usize),
    /// After so many questions for many facts, the first one told so many tokens before.
    Long { distance: usize, questions: usize },
}

/// The system turn with the tools has about so many tokens.
const PREAMBLE: usize = 650;
/// What a message has around its text.
const MARKERS: usize = 6;

/// The chat template of the agent's own model.
///
/// # Errors
/// If it is not there or broken.
pub fn template() -> Result<ChatTemplate> {
    let name = "chat_template.jinja";
    let (_, source) = builtin::FILES.iter().find(|(file, _)| *file == name).context("no chat template")?;
    Ok(ChatTemplate::new(std::str::from_utf8(source)?, name)?)
}

impl Maker<'_> {
    /// A scene; the same for the same number.
    ///
    /// # Errors
    /// If there is no room for its files, or no world has what the request needs.
    pub fn scene(&self, kind: Kind, number: Number) -> Result<Scene> {
        self.scene_of(kind, number, Length::Short)
    }

    fn scene_of(&self, kind: Kind, number: Number, length: Length) -> Result<Scene> {
        let Number { seed, side, index } = number;
        for attempt in 0..TRIES {
            let mut draw = Draw::new(&[seed, side as u64, kind as u64, index, attempt]);
            let world = World::new(side, &mut draw)?;
            let (mut history, mut facts) = (Vec::new(), Vec::new());
            if draw.chance(40) {
                for _ in 0..draw.range(1, 3) {
                    let before = weighted(&mut draw, |kind| kind.group() != Group::Memory);
                    if let Some(task) = before.task(&world, &mut draw)? {
                        self.tell(&world, &mut history, &task)?;
                    }
                }
            }
            let task = match kind.group() {
                Group::Memory => Some(self.remember(kind, length, &world, &mut history, &mut facts, &mut draw)?),
                _ => kind.task(&world, &mut draw)?,
            };
            if let Some(task) = task {
                return Ok(Scene { world, history, facts, task });
            }
        }
        bail!("no world was found for a request of the kind {}", kind.name())
    }

    /// Facts, then much else, then a question for one.
    fn remember(
        &self,
        kind: Kind,
        length: Length,
        world: &World,
        history: &mut Vec<Value>,
        facts: &mut Vec<Fact>,
        draw: &mut Draw,
    ) -> Result<Task> {
        let side = world.side;
        // The first one is asked for, and the others come later.
        let (count, distance) = match length {
            Length::Long { distance, .. } => (draw.range(4, 9), distance),
            Length::Grown(_) => (draw.range(1, 3), *draw.pick(&[50, 200, 600])),
            Length::Short => (draw.range(1, 3), *draw.pick(&[50, 200, 600, 1500, 3000])),
        };
        let distance = if let Length::Long { .. } = length { distance } else { draw.below(distance) };
        let distance = self.distance.unwrap_or(distance);
        while (facts.len() as u64) < count {
            facts.push(Fact::apart(facts, side, draw));
        }
        let untold = Fact::apart(facts, side, draw);
        let Some((asked, others)) = facts.split_first() else { bail!("there are no facts") };
        self.tell(world, history, &asked.told(side, draw))?;
        let mut others = others.iter();
        let mut passed = 0;
        while passed < distance || others.len() > 0 {
            let task = match draw.below(10) {
                0..=4 if passed < distance => Some(memory::paste(side, draw.range(2, 16), draw)),
                5 | 6 => weighted(draw, |kind| kind.group() == Group::Talk).task(world, draw)?,
                7 => weighted(draw, |kind| kind.group() == Group::SingleStep).task(world, draw)?,
                _ => others.next().map(|fact| fact.told(side, draw)),
            };
            if let Some(task) = task {
                let before = history.len();
                self.tell(world, history, &task)?;
                passed += history[before..].iter().map(|message| self.content(message)).sum::<usize>();
            }
        }
        Ok(match kind {
            Kind::Untold => untold.asked(side, false, draw),
            _ => asked.asked(side, true, draw),
        })
    }

    /// Serves a task and adds it to the conversation. What the oracle does needs nothing that came before: to render all of it
    /// for every request would take a time that grows with its square.
    fn tell(&self, world: &World, history: &mut Vec<Value>, task: &Task) -> Result<()> {
        let turn = turn::take(&mut Oracle::new(&self.template, &task.acts), world, &[], &task.request, MAX_TOKENS)?;
        // The system turn stands once, at the beginning.
        history.extend(turn.messages.into_iter().skip(usize::from(!history.is_empty())));
        Ok(())
    }

    /// Serves the request of a scene; its world changes.
    ///
    /// # Errors
    /// If a task does not fit the agent's loop.
    pub fn play(&self, scene: &Scene) -> Result<Played> {
        let Scene { world, history, task, .. } = scene;
        let mut oracle = Oracle::new(&self.template, &task.acts);
        let turn = turn::take(&mut oracle, world, history, &task.request, MAX_TOKENS)?;
        Ok(Played { turn, must: oracle.must })
    }

    /// The tokens of what a message says, calls aside.
    fn content(&self, message: &Value) -> usize {
        message["content"].as_str().map_or(0, |text| (self.measure)(text))
    }

    /// A conversation up to a request of this kind and with its answer, as the model sees it.
    ///
    /// # Errors
    /// As [`scene`](Maker::scene) and [`play`](Maker::play).
    pub fn text(&self, kind: Kind, number: Number) -> Result<String> {
        let scene = self.scene(kind, number)?;
        let messages = self.play(&scene)?.turn.messages;
        self.render(&scene.world, messages)
    }

    /// A conversation of the training data, and the kind of its last request. Most of them go on to 1,500 to 3,500 tokens with
    /// requests of all kinds: the tools take 650 tokens at the beginning of each, and what comes after them is what teaches. One in
    /// seven asks for many facts, told up to 6,500 tokens before.
    ///
    /// # Errors
    /// As [`text`](Maker::text).
    pub fn conversation(&self, number: Number) -> Result<(Kind, String)> {
        let mut draw = Draw::new(&[number.seed, number.side as u64, number.index]);
        let kind = any(&mut draw);
        let (kind, length) = match draw.below(20) {
            0..=2 => {
                let (distance, questions) = (draw.range(1200, 6500) as usize, draw.range(4, 10) as usize);
                (Kind::Recall, Length::Long { distance, questions })
            }
            3..=16 => (kind, Length::Grown(draw.range(1500, 3500) as usize)),
            _ => (kind, Length::Short),
        };
        let mut scene = self.scene_of(kind, number, length)?;
        self.tell(&scene.world, &mut scene.history, &scene.task)?;
        let last = self.go_on(&mut scene, length, &mut draw)?.unwrap_or(kind);
        let messages = std::mem::take(&mut scene.history);
        Ok((last, self.render(&scene.world, messages)?))
    }

    fn render(&self, world: &World, messages: Vec<Value>) -> Result<String> {
        let tools: Value = world.toolbox()?.specs().iter().map(Spec::to_json).collect();
        Ok(self.template.render(&messages.into(), Some(&tools), false, None)?)
    }

    /// More requests in the same world, up to `length`; the kind of the last one.
    fn go_on(&self, scene: &mut Scene, length: Length, draw: &mut Draw) -> Result<Option<Kind>> {
        let mut last = None;
        let mut questions = 0;
        let size = |messages: &[Value]| -> usize {
            let one = |message: &Value| {
                let calls = message.get("tool_calls").map_or(0, |calls| (self.measure)(&calls.to_string()));
                self.content(message) + calls + MARKERS
            };
            messages.iter().map(one).sum()
        };
        // The first message is the system turn, which the preamble counts.
        let mut tokens = PREAMBLE + size(scene.history.get(1..).unwrap_or_default());
        loop {
            let kind = match length {
                Length::Short => return Ok(last),
                Length::Grown(limit) if tokens >= limit => return Ok(last),
                Length::Long { questions: limit, .. } if questions >= limit => return Ok(last),
                Length::Grown(_) => any(draw),
                Length::Long { .. } => match draw.below(10) {
                    0..=4 => Kind::Recall,
                    5 | 6 => Kind::Untold,
                    _ => weighted(draw, |kind| kind.group() != Group::Memory),
                },
            };
            // Files change behind the agent's back: it has to look again.
            if draw.chance(15) {
                scene.world.change(draw)?;
            }
            let side = scene.world.side;
            let task = match kind {
                // What is asked for has been told, now or before; what was never told is not told later either.
                Kind::Recall if scene.facts.is_empty() || scene.facts.len() < 12 && draw.chance(30) => {
                    let fact = Fact::apart(&scene.facts, side, draw);
                    let task = fact.told(side, draw);
                    scene.facts.push(fact);
                    Some(task)
                }
                Kind::SmallTalk if draw.chance(30) && scene.facts.iter().all(|fact| !fact.subject.contains("name")) => {
                    let (task, fact) = talk::name(side, draw);
                    scene.facts.push(fact);
                    Some(task)
                }
                Kind::Recall => {
                    questions += 1;
                    Some(draw.pick(&scene.facts).asked(side, true, draw))
                }
                Kind::Untold => {
                    questions += 1;
                    Some(Fact::apart(&scene.facts, side, draw).asked(side, false, draw))
                }
                _ => kind.task(&scene.world, draw)?,
            };
            if let Some(task) = task {
                let before = scene.history.len();
                self.tell(&scene.world, &mut scene.history, &task)?;
                tokens += size(&scene.history[before..]);
                last = Some(kind);
            }
        }
    }
}

/// A kind for a conversation of the training data, the harder ones more often.
pub fn any(draw: &mut Draw) -> Kind {
    weighted(draw, |_| true)
}

fn weighted(draw: &mut Draw, wanted: impl Fn(Kind) -> bool) -> Kind {
    let weight = |kind: Kind| match kind {
        _ if !wanted(kind) => 0,
        Kind::ReadCompute | Kind::ListRead => 12,
        Kind::Calculator | Kind::Clock | Kind::NoteSearch | Kind::Recall => 10,
        Kind::ReadFile | Kind::NoteAdd => 8,
        Kind::ReadNote | Kind::Untold => 6,
        Kind::Unable | Kind::ListFiles => 5,
        Kind::SearchDelete | Kind::ComputeNote | Kind::NoteCompute | Kind::SmallTalk => 4,
        Kind::NoteDelete => 2,
        _ => 3,
    };
    let mut at = draw.below(Kind::all().iter().map(|&kind| weight(kind)).sum());
    for &kind in Kind::all() {
        match at.checked_sub(weight(kind)) {
            Some(rest) => at = rest,
            None => return kind,
        }
    }
    Kind::SmallTalk
}
