//! Templates of wording: `[a|b|]` is one of its alternatives, which nest; `{name}` is a value; `<name>` is a beginning that many
//! templates share.

use std::collections::HashSet;
use std::sync::OnceLock;

use crate::data::Side;
use crate::data::voice;
use crate::draw::Draw;

/// The ways to say one thing: those of the training data, and those kept for held-out data.
#[derive(Debug)]
pub struct Form {
    pub train: &'static [&'static str],
    pub held: &'static [&'static str],
}

/// Beginnings, by what goes on after them: a noun ("the time"), an order ("add 1 and 2"), what is asked for ("what 1 and 2 make").
/// Their end has its space, so that there may be none at all.
const BEGINNINGS: [(&str, &str); 3] = [
    (
        "noun",
        "[what[ is|'s|s] |what[ is|'s] |what[ is|'s] ||[tell|give] me |[can|could|would] you [please |][tell|give] me |do you know |I [need|want] |\
         I [need|want|would like] to know |let me [know|have] |please [tell|give] me |[find|work] out |get me |could I have |I am looking for ]",
    ),
    (
        "do",
        "[||||[can|could|would|will] you [please |]|[can|could] you |please |I [want|need|would like] you to |I'd like you to |now |\
         let us |go and |you [should|have to] |help me [to |]|be so kind and ]",
    ),
    (
        "know",
        "[tell me |[can|could|would] you [please |]tell me |do you know |I [want|need|would like] to know |I wonder |let me know |please tell me |\
         find out |any idea |I have to know |say |can you say |I'd like to know |try to find out ]",
    ),
];

/// Forms by name, and the list of them all: what is said cannot be left out of the tests.
macro_rules! forms {
    ($($name:ident { train: [$($train:literal),* $(,)?], held: [$($held:literal),* $(,)?] $(,)? })*) => {
        $(static $name: $crate::data::grammar::Form =
            $crate::data::grammar::Form { train: &[$($train),*], held: &[$($held),*] };)*
        /// Every form of this module.
        pub static FORMS: &[(&str, &$crate::data::grammar::Form)] = &[$((stringify!($name), &$name)),*];
    };
}
pub(crate) use forms;

/// Values by name.
pub type Slots<'a> = [(&'a str, &'a str)];

impl Form {
    /// The templates of one side.
    pub fn of(&self, side: Side) -> &'static [&'static str] {
        match side {
            Side::Train => self.train,
            Side::HeldOut => self.held,
        }
    }

    /// A wording, its values still open. What is held out never comes up in training, even where its templates would make it.
    pub fn wording(&self, side: Side, draw: &mut Draw) -> String {
        loop {
            let text = expand(draw.pick::<&str>(self.of(side)), &[], draw);
            if side == Side::HeldOut || !held_out().contains(&text.to_lowercase()) {
                return text;
            }
        }
    }

    /// Plain text of this form.
    pub fn text(&self, side: Side, slots: &Slots, draw: &mut Draw) -> String {
        expand(&self.wording(side, draw), slots, draw)
    }

    /// A request of this form, as people type.
    pub fn request(&self, side: Side, slots: &Slots, draw: &mut Draw) -> String {
        let text = self.text(side, slots, draw);
        let kept: Vec<&str> = slots.iter().map(|(_, value)| *value).collect();
        voice::typed(&text, &kept, side, draw)
    }
}

/// Every held-out wording. A value alone is none.
fn held_out() -> &'static HashSet<String> {
    static TEXTS: OnceLock<HashSet<String>> = OnceLock::new();
    TEXTS.get_or_init(|| {
        let forms = super::forms().flat_map(|(_, form)| form.held);
        let texts = forms.flat_map(|template| all(template)).map(|text| text.to_lowercase());
        texts.filter(|text| !(text.starts_with('{') && text.find('}') == Some(text.len() - 1))).collect()
    })
}

#[derive(Debug, PartialEq)]
enum Node<'a> {
    Text(&'a str),
    Slot(&'a str),
    Choice(Vec<Vec<Node<'a>>>),
}

/// Reads a template up to its end or to what ends an alternative; what does not close is text.
fn parse<'a>(template: &'a str, at: &mut usize) -> Vec<Node<'a>> {
    let mut nodes = Vec::new();
    while *at < template.len() {
        let rest = &template[*at..];
        let Some(mark) = rest.find(['[', '|', ']', '{', '<']) else {
            nodes.push(Node::Text(rest));
            *at = template.len();
            break;
        };
        if mark > 0 {
            nodes.push(Node::Text(&rest[..mark]));
            *at += mark;
        }
        let shared = BEGINNINGS.iter().find(|(name, _)| {
            rest[mark..]
                .strip_prefix('<')
                .and_then(|rest| rest.strip_prefix(name))
                .is_some_and(|rest| rest.starts_with('>'))
        });
        match (rest.as_bytes()[mark], rest[mark..].find('}')) {
            (b'<', _) => {
                match shared {
                    Some((_, template)) => nodes.extend(parse(template, &mut 0)),
                    None => nodes.push(Node::Text(&rest[mark..mark + 1])),
                }
                *at += shared.map_or(1, |(name, _)| name.len() + 2);
            }
            (b'[', _) => {
                let mut choices = Vec::new();
                loop {
                    *at += 1;
                    choices.push(parse(template, at));
                    if template.as_bytes().get(*at) != Some(&b'|') {
                        break;
                    }
                }
                *at += 1;
                nodes.push(Node::Choice(choices));
            }
            (b'{', Some(end)) => {
                nodes.push(Node::Slot(&rest[mark + 1..mark + end]));
                *at += end + 1;
            }
            (b'{', None) => {
                nodes.push(Node::Text(&rest[mark..mark + 1]));
                *at += 1;
            }
            _ => break,
        }
    }
    nodes
}

/// One text of a template. A slot without a value stays as it is.
pub fn expand(template: &str, slots: &Slots, draw: &mut Draw) -> String {
    fn write(nodes: &[Node], slots: &Slots, draw: &mut Draw, out: &mut String) {
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Slot(name) => match slots.iter().find(|(slot, _)| slot == name) {
                    Some((_, value)) => out.push_str(value),
                    None => *out += &format!("{{{name}}}"),
                },
                Node::Choice(choices) => {
                    let choice = draw.pick(choices);
                    write(choice, slots, draw, out);
                }
            }
        }
    }
    let mut out = String::new();
    write(&parse(template, &mut 0), slots, draw, &mut out);
    out
}

/// Every text of a template, its slots left as they are.
pub fn all(template: &str) -> Vec<String> {
    fn texts(nodes: &[Node]) -> Vec<String> {
        nodes.iter().fold(vec![String::new()], |heads, node| {
            let tails = match node {
                Node::Text(text) => vec![text.to_string()],
                Node::Slot(name) => vec![format!("{{{name}}}")],
                Node::Choice(choices) => choices.iter().flat_map(|choice| texts(choice)).collect(),
            };
            heads.iter().flat_map(|head| tails.iter().map(move |tail| format!("{head}{tail}"))).collect()
        })
    }
    let mut at = 0;
    let nodes = parse(template, &mut at);
    debug_assert_eq!(at, template.len(), "{template:?} closes what it did not open");
    texts(&nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternatives_nest() {
        let mut found = all("[a[x|y]|b|] {n}[!|]");
        found.sort();
        assert_eq!(found, [" {n}", " {n}!", "ax {n}", "ax {n}!", "ay {n}", "ay {n}!", "b {n}", "b {n}!"]);
        let mut draw = Draw::new(&[1]);
        let drawn: std::collections::HashSet<String> =
            (0..200).map(|_| expand("[a[x|y]|b|] {n}[!|]", &[("n", "7")], &mut draw)).collect();
        assert_eq!(drawn.len(), 8);
        assert!(drawn.contains("ay 7!"));
        assert_eq!(expand("{a} {b} {", &[("a", "[x|{b}]")], &mut draw), "[x|{b}] {b} {");
        let shared = all("<know>if < is <less>");
        assert!(shared.contains(&"do you know if < is <less>".to_string()), "{shared:?}");
    }
}
