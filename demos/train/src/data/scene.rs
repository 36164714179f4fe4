//! Conversations up to a request, and with what is done about it.

use anyhow::{Context, Result, bail};
use gatedelta::qwen::ChatTemplate;
use gatedelta_agent::builtin;
use gatedelta_agent::tools::Spec;
use serde_json::Value;

use crate::data::memory::{self, Fact};
use crate::data::oracle::Oracle;
use crate::data::world::World;
use crate::data::{Group, Kind, Side, Task};
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
    /// For the distance between a fact and the question for it.
    pub measure: Measure<'a>,
    /// The least such distance in tokens; by default it varies.
    pub distance: Option<usize>,
}

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
        let Number { seed, side, index } = number;
        for attempt in 0..TRIES {
            let mut draw = Draw::new(&[seed, side as u64, kind as u64, index, attempt]);
            let world = World::new(side, &mut draw)?;
            let mut history = Vec::new();
            if draw.chance(40) {
                for _ in 0..draw.range(1, 3) {
                    let before = weighted(&mut draw, |kind| kind.group() != Group::Memory);
                    if let Some(task) = before.task(&world, &mut draw)? {
                        self.tell(&world, &mut history, &task)?;
                    }
                }
            }
            let task = match kind.group() {
                Group::Memory => Some(self.remember(kind, &world, &mut history, &mut draw)?),
                _ => kind.task(&world, &mut draw)?,
            };
            if let Some(task) = task {
                return Ok(Scene { world, history, task });
            }
        }
        bail!("no world was found for a request of the kind {}", kind.name())
    }

    /// Facts, then much else, then a question for one.
    fn remember(&self, kind: Kind, world: &World, history: &mut Vec<Value>, draw: &mut Draw) -> Result<Task> {
        let side = world.side;
        let mut facts: Vec<Fact> = Vec::new();
        let count = draw.range(2, 4) as usize;
        while facts.len() < count {
            let fact = Fact::new(side, draw);
            let apart = |a: &str, b: &str| !a.contains(b) && !b.contains(a);
            if facts.iter().all(|other| apart(&other.subject, &fact.subject) && apart(&other.value, &fact.value)) {
                facts.push(fact);
            }
        }
        // The last one is never told. The first one is asked for, and some of the others come later.
        let (Some(untold), Some(asked)) = (facts.pop(), facts.first().cloned()) else { bail!("there are no facts") };
        self.tell(world, history, &asked.told(side, draw))?;
        let mut others = facts.split_off(1);
        let longest = *draw.pick(&[50, 200, 600, 1500, 3000, 6000]);
        let distance = self.distance.unwrap_or_else(|| draw.below(longest));
        let mut passed = 0;
        while passed < distance || !others.is_empty() {
            let task = match draw.below(10) {
                0..=4 if passed < distance => Some(memory::paste(side, draw.range(2, 16), draw)),
                5 | 6 => weighted(draw, |kind| kind.group() == Group::Talk).task(world, draw)?,
                7 => weighted(draw, |kind| kind.group() == Group::SingleStep).task(world, draw)?,
                _ => others.pop().map(|fact| fact.told(side, draw)),
            };
            if let Some(task) = task {
                let before = history.len();
                self.tell(world, history, &task)?;
                let texts = history[before..].iter().filter_map(|message| message["content"].as_str());
                passed += texts.map(|text| (self.measure)(text)).sum::<usize>();
            }
        }
        Ok(match kind {
            Kind::Untold => untold.asked(side, false, draw),
            _ => asked.asked(side, true, draw),
        })
    }

    /// Serves a task and adds it to the conversation.
    fn tell(&self, world: &World, history: &mut Vec<Value>, task: &Task) -> Result<()> {
        let turn = turn::take(&mut Oracle::new(&self.template, &task.acts), world, history, &task.request, MAX_TOKENS)?;
        *history = turn.messages;
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

    /// A whole conversation as the model sees it.
    ///
    /// # Errors
    /// As [`scene`](Maker::scene) and [`play`](Maker::play).
    pub fn text(&self, kind: Kind, number: Number) -> Result<String> {
        let scene = self.scene(kind, number)?;
        let messages = self.play(&scene)?.turn.messages;
        let tools: Value = scene.world.toolbox()?.specs().iter().map(Spec::to_json).collect();
        Ok(self.template.render(&messages.into(), Some(&tools), false, None)?)
    }
}

/// A kind for a conversation of the training data, the harder ones more often.
pub fn any(draw: &mut Draw) -> Kind {
    weighted(draw, |_| true)
}

fn weighted(draw: &mut Draw, wanted: impl Fn(Kind) -> bool) -> Kind {
    let weight = |kind: Kind| match kind {
        _ if !wanted(kind) => 0,
        Kind::Calculator | Kind::ReadCompute | Kind::Recall => 6,
        Kind::ReadFile | Kind::ListRead => 4,
        Kind::NoteList | Kind::Untold | Kind::Missing => 1,
        _ => 2,
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
