//! Requests for arithmetic.

use crate::data::grammar::{Form, Slots, expand, forms};
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

forms! {
    SUM {
        train: [
            "what[ is|'s|s] {a} plus {b}", "add {a} and {b}", "add {b} to {a}", "{a} plus {b}", "{a} + {b}", "what is {a} + {b}", "how much is {a} plus {b}",
            "[give|tell] me the sum of {a} and {b}", "compute {a} + {b}", "calculate the sum of {a} and {b}", "[work|figure] out {a} plus {b}",
            "what do {a} and {b} make", "put {a} and {b} together, what is the total", "{a} and {b} added, how much is that",
        ],
        held: ["what is the sum of {a} and {b}", "how much do {a} and {b} make", "tell me what {a} plus {b} is", "calculate {a} + {b}", "total of {a} and {b}"],
    }
    DIFFERENCE {
        train: [
            "what[ is|'s] {a} minus {b}", "subtract {b} from {a}", "{a} minus {b}", "{a} - {b}", "take {b} away from {a}", "how much is {a} less {b}",
            "what is left of {a} without {b}", "compute {a} - {b}", "[tell|give] me {a} minus {b}", "calculate {a} less {b}",
        ],
        held: ["how much is {a} minus {b}", "what is {a} - {b}", "what is left when I take {b} from {a}", "work out {a} minus {b}"],
    }
    PRODUCT {
        train: [
            "what[ is|'s] {a} times {b}", "multiply {a} by {b}", "{a} times {b}", "{a} * {b}", "{a} x {b}", "how much is {a} multiplied by {b}",
            "[give|tell] me the product of {a} and {b}", "compute {a} * {b}", "calculate {a} times {b}", "what do I get when I multiply {a} by {b}",
        ],
        held: ["how much is {a} times {b}", "what is the product of {a} and {b}", "work out {a} * {b}", "what is {a} multiplied by {b}"],
    }
    QUOTIENT {
        train: [
            "what[ is|'s] {a} divided by {b}", "divide {a} by {b}", "{a} divided by {b}", "{a} / {b}", "how many times does {b} go into {a}",
            "compute {a} / {b}", "[split|share] {a} into {b} equal parts, how much is each", "calculate {a} over {b}",
        ],
        held: ["how much is {a} divided by {b}", "what is {a} / {b}", "work out {a} divided by {b}", "what do I get when I divide {a} by {b}"],
    }
    PERCENT {
        train: [
            "what[ is|'s] {a} percent of {b}", "{a}% of {b}", "how much is {a}% of {b}", "compute {a} percent of {b}", "[tell|give] me {a}% of {b}",
            "of {b}, how much is {a} percent", "calculate {a}% of {b}", "take {a} percent of {b}",
        ],
        held: ["what is {a}% of {b}", "how much is {a} percent of {b}", "work out {a}% of {b}"],
    }
    SQUARE {
        train: [
            "what[ is|'s] {a} squared", "{a} squared", "the square of {a}", "multiply {a} by itself", "compute the square of {a}", "[tell|give] me {a} times itself",
            "raise {a} to the power of two",
        ],
        held: ["what is the square of {a}", "how much is {a} squared", "what is {a} times itself"],
    }
    ROOT {
        train: ["what[ is|'s] the square root of {a}", "square root of {a}", "the root of {a}", "compute the square root of {a}", "which number squared is {a}", "calculate the root of {a}"],
        held: ["tell me the square root of {a}", "what is the root of {a}", "what number squared gives {a}"],
    }
    REST {
        train: ["what[ is|'s] the remainder of {a} divided by {b}", "{a} mod {b}", "what remains when {a} is divided by {b}", "divide {a} by {b} and give me the remainder", "compute {a} modulo {b}"],
        held: ["give me the remainder of {a} divided by {b}", "what is {a} mod {b}"],
    }
    SUM3 {
        train: [
            "add {a}, {b} and {c}", "what is {a} plus {b} plus {c}", "{a} + {b} + {c}", "[tell|give] me the sum of {a}, {b} and {c}", "how much do {a}, {b} and {c} make together",
            "total up {a}, {b} and {c}", "compute {a} + {b} + {c}",
        ],
        held: ["what is the sum of {a}, {b} and {c}", "how much is {a} plus {b} plus {c}", "what is {a} + {b} + {c}"],
    }
    BRACKET {
        train: [
            "add {a} and {b}, then multiply by {c}", "{c} times the sum of {a} and {b}", "what is ({a} + {b}) * {c}", "multiply the sum of {a} and {b} by {c}",
            "compute ({a} + {b}) * {c}", "take the sum of {a} and {b} and multiply it by {c}",
        ],
        held: ["what is the sum of {a} and {b} times {c}", "calculate ({a} + {b}) * {c}", "add {a} and {b} and multiply the sum by {c}"],
    }
    BUY {
        train: [
            "I buy {a} of these at {b} each, what do I pay", "one {x} costs {b}, how much do {a} cost", "{who} buys {a} at {b} each, what is the total",
            "how much do I pay for {a} when each costs {b}", "there are {a} boxes of {b} each, how many is that", "a {x} costs {b}. What do {a} of them cost",
            "{a} people pay {b} each, how much is that together", "each {x} weighs {b}, how much do {a} weigh",
        ],
        held: ["{who} buys {a} boxes at {b} each, how much is that", "each {x} costs {b}. How much do I pay for {a}", "a {x} weighs {b}, what do {a} of them weigh"],
    }
    MORE {
        train: [
            "{who} has {a} and gets {b} more, how many is that", "I had {a} and found {b}, how many do I have", "there were {a} people and {b} came, how many are there",
            "I pay {a} for the {x} and {b} for the rest, what is the total", "{who} has {a} coins and I have {b}, how many are there together",
        ],
        held: ["I have {a} and get {b} more, how many do I have", "{who} had {a} coins and found {b}, how many are there", "I pay {a} for a {x} and {b} for the rest, how much is that together"],
    }
    LEFT {
        train: [
            "{who} has {a} and gives away {b}, how many are left", "I had {a} and lost {b}, what is left", "of {a} people {b} left, how many are there",
            "I have {a} and pay {b} for a {x}, how much do I have left", "there were {a} in the box and {who} took {b}, how many remain",
        ],
        held: ["{who} had {a} and lost {b}, how many are left", "I had {a} and gave away {b}, how many do I have left", "there were {a} and {who} took {b}, how many are left"],
    }
    WRITTEN {
        train: ["{x}", "compute {x}", "[what is|what's] {x}", "calculate {x}", "evaluate {x}", "{x}, how much is that", "[work|figure] out {x}", "solve {x}", "how much is {x}", "[tell|give] me the value of {x}"],
        held: ["what is the value of {x}", "calculate the value of {x}", "tell me what {x} is", "I need the result of {x}", "can you compute {x}"],
    }
    NEEDED {
        train: ["I need the result of {a} + {b}", "can you add {a} and {b}", "could you tell me {a} plus {b}", "I want to know the result of {a} + {b}"],
        held: ["could you add {b} to {a}", "I want to know what {a} plus {b} is"],
    }
}

/// An operation: its wording, the expression, and the digits of its numbers.
struct Operation {
    form: &'static Form,
    expression: &'static str,
    digits: [u32; 3],
    /// Some numbers have quarters.
    quarters: bool,
}

const fn operation(form: &'static Form, expression: &'static str, digits: [u32; 3], quarters: bool) -> Operation {
    Operation { form, expression, digits, quarters }
}

static OPERATIONS: [Operation; 12] = [
    operation(&SUM, "{a} + {b}", [5, 5, 2], true),
    operation(&NEEDED, "{a} + {b}", [5, 5, 2], true),
    operation(&DIFFERENCE, "{a} - {b}", [5, 5, 2], true),
    operation(&PRODUCT, "{a} * {b}", [4, 3, 2], true),
    operation(&PERCENT, "{a} * {b} / 100", [2, 4, 2], false),
    operation(&SQUARE, "{a} ^ 2", [4, 2, 2], false),
    operation(&REST, "{a} % {b}", [5, 2, 2], false),
    operation(&SUM3, "{a} + {b} + {c}", [4, 4, 4], false),
    operation(&BRACKET, "({a} + {b}) * {c}", [3, 3, 2], false),
    operation(&BUY, "{a} * {b}", [2, 3, 2], true),
    operation(&MORE, "{a} + {b}", [4, 4, 2], false),
    operation(&LEFT, "{a} - {b}", [4, 3, 2], false),
];

/// A request and its expression.
pub fn question(side: Side, draw: &mut Draw) -> (String, String) {
    match draw.below(OPERATIONS.len() + 5) {
        0 | 1 => {
            let x = written(side, draw);
            (WRITTEN.request(side, &[("x", &x)], draw), x)
        }
        2 | 3 => {
            // Divisions come out even.
            let b = names::figure(draw, side, 2);
            let a = even(side, draw, |draw| b * draw.range(2, 999));
            let (a, b) = (a.to_string(), b.to_string());
            (QUOTIENT.request(side, &[("a", &a), ("b", &b)], draw), format!("{a} / {b}"))
        }
        4 => {
            let a = even(side, draw, |draw| draw.range(4, 999).pow(2)).to_string();
            (ROOT.request(side, &[("a", &a)], draw), format!("sqrt({a})"))
        }
        at => {
            let operation = &OPERATIONS[at - 5];
            let [a, b, c] = operation.digits.map(|digits| {
                if operation.quarters && draw.chance(20) {
                    names::quarters(draw, side)
                } else {
                    names::figure(draw, side, digits).to_string()
                }
            });
            let (who, x) = (names::person(draw, side), names::thing(draw, side));
            let slots: &Slots = &[("a", a.as_str()), ("b", &b), ("c", &c), ("who", &who), ("x", &x)];
            let request = operation.form.request(side, slots, draw);
            (request, expand(operation.expression, slots, draw))
        }
    }
}

/// A number of `side` that `make` gives.
fn even(side: Side, draw: &mut Draw, make: impl Fn(&mut Draw) -> u64) -> u64 {
    let mut number = make(draw);
    for _ in 0..400 {
        if names::side_of(&number.to_string()) == side {
            break;
        }
        number = make(draw);
    }
    number
}

/// An expression as people write it.
pub fn written(side: Side, draw: &mut Draw) -> String {
    let gap = if draw.chance(50) { " " } else { "" };
    let number = |draw: &mut Draw| names::figure(draw, side, 3).to_string();
    let mut text = number(draw);
    for _ in 0..draw.range(1, 3) {
        let sign = *draw.pick(&["+", "-", "*", "+", "*"]);
        let right = if draw.chance(25) {
            let inner = *draw.pick(&["+", "-"]);
            format!("({}{gap}{inner}{gap}{})", number(draw), number(draw))
        } else {
            number(draw)
        };
        text = if draw.chance(20) {
            format!("({text}){gap}{sign}{gap}{right}")
        } else {
            format!("{text}{gap}{sign}{gap}{right}")
        };
    }
    text
}

/// A call of the calculator.
pub fn compute(expression: &str) -> Action {
    Action::call("calculator", &[("expression", expression.into())])
}

/// The answer that gives its result.
pub fn result(result: &str) -> Action {
    Action::say(format!("The result is {result}."), &[result])
}

/// See the [module](self).
pub fn task(side: Side, draw: &mut Draw) -> Task {
    let (request, expression) = question(side, draw);
    Task::single(request, compute(&expression), result)
}
