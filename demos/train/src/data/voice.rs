//! How people type: polite or not, with or without capitals and marks, now and then with a slip.

use crate::data::Side;
use crate::draw::Draw;

/// What may come before a request.
const BEFORE: [&[&str]; 2] = [
    &[
        "please ",
        "hey, ",
        "hi, ",
        "ok, ",
        "hey there, ",
        "quick question: ",
        "can you help me? ",
        "good morning, ",
        "now ",
        "next: ",
        "ok ",
        "and now ",
        "hello, ",
        "good evening, ",
        "excuse me, ",
        "so, ",
        "well, ",
        "one more thing: ",
        "a question: ",
        "I have a question: ",
        "thanks. ",
        "great. ",
        "can you help me with this: ",
    ],
    &["ok, next: ", "hi there, ", "now please ", "hey, quick question: "],
];
/// What may come after it.
const AFTER: [&[&str]; 2] = [
    &[" please", ", please", ", thanks", " for me", " now", ", thank you", " pls", ", ok", " right now"],
    &[" for me please", " please, thanks"],
];

/// Words that begin a question.
const ASKING: [&str; 21] = [
    "what", "what's", "whats", "which", "who", "how", "when", "where", "can", "could", "would", "will", "do", "does",
    "is", "are", "have", "did", "may", "why", "any",
];

/// `text` as somebody of `side` types it; the `kept` values in it stay as they are.
pub fn typed(text: &str, kept: &[&str], side: Side, draw: &mut Draw) -> String {
    let first = text.split([' ', ',']).next().unwrap_or_default().to_lowercase();
    let asks = ASKING.contains(&first.as_str()) && !text.contains(". ") && !text.contains(": ");
    let mut text = if draw.chance(10) { slip(text, kept, draw) } else { text.to_string() };
    // A value at the end, or a sentence of its own, takes no "please" after it.
    let open = !text.ends_with(['.', '?', '!', ':']);
    let ends_in_value = kept.iter().any(|value| text.ends_with(value));
    let mut polite = |text: &str, phrases: &[&'static str]| {
        let phrase = *draw.pick(phrases);
        // Nobody says please twice.
        if text.contains("please") && phrase.contains("please") { "" } else { phrase }
    };
    let (before, after) = (polite(&text, BEFORE[side as usize]), polite(&text, AFTER[side as usize]));
    if open && !ends_in_value && draw.chance(12) {
        text += after;
    }
    // "Next: thanks" is what nobody says.
    let both = before.contains("please") && text.contains("please");
    if text.matches(' ').count() >= 2 && !both && draw.chance(20) {
        text.insert_str(0, before);
    }
    if open && draw.chance(60) {
        text.push(if asks { '?' } else { '.' });
    }
    let starts_with_value = kept.iter().any(|value| text.starts_with(value));
    match text.chars().next() {
        Some(c) if !starts_with_value && draw.chance(65) => {
            c.to_uppercase().collect::<String>() + &text[c.len_utf8()..]
        }
        _ => text,
    }
}

/// Two letters of one word swapped, or one of them left out or doubled.
fn slip(text: &str, kept: &[&str], draw: &mut Draw) -> String {
    let mut words: Vec<String> = text.split(' ').map(str::to_string).collect();
    let free: Vec<usize> = (0..words.len())
        .filter(|&at| words[at].len() >= 4 && words[at].bytes().all(|b| b.is_ascii_lowercase()))
        .filter(|&at| !kept.iter().any(|value| value.split([' ', '/', '.']).any(|part| part == words[at])))
        .collect();
    if free.is_empty() {
        return text.to_string();
    }
    let word = &mut words[*draw.pick(&free)];
    // The first letter is rarely the wrong one.
    let at = 1 + draw.below(word.len() - 2);
    let pair = word[at..at + 2].to_string();
    let (a, b) = pair.split_at(1);
    let wrong = match draw.below(3) {
        0 => format!("{b}{a}"),
        1 => b.to_string(),
        _ => format!("{a}{pair}"),
    };
    word.replace_range(at..at + 2, &wrong);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive() {
        let mut draw = Draw::new(&[3]);
        let mut texts = std::collections::HashSet::new();
        for _ in 0..500 {
            let text = typed(
                "what does plans/report.txt say about lemon soup",
                &["plans/report.txt", "lemon soup"],
                Side::Train,
                &mut draw,
            );
            assert!(text.contains("plans/report.txt") && text.contains("lemon soup"), "{text}");
            texts.insert(text);
        }
        assert!(texts.len() > 60, "{}", texts.len());
        assert!((0..500).all(|_| typed("a.txt", &["a.txt"], Side::HeldOut, &mut draw).contains("a.txt")));
    }

    #[test]
    fn sides_share_no_phrase() {
        for lists in [BEFORE, AFTER] {
            assert!(lists[0].iter().all(|phrase| !lists[1].contains(phrase)));
        }
    }
}
