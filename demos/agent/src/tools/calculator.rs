//! Arithmetic: a recursive-descent parser that evaluates as it goes.
//!
//! ```text
//! sum     = product (("+" | "-") product)*
//! product = sign (("*" | "/" | "//" | "%") sign)*
//! sign    = ("-" | "+") sign | power
//! power   = atom (("^" | "**") sign)?
//! atom    = number | name | name "(" sum ("," sum)* ")" | "(" sum ")"
//! ```
//!
//! Whole numbers are exact up to 128 bits and become floats beyond; a result that is not a finite number is an error.

use serde_json::{Map, Value, json};

use super::{Spec, Tool};

const LENGTH_LIMIT: usize = 2000;
/// Nested parentheses, signs and powers.
const DEPTH_LIMIT: usize = 100;

/// See the [module](self).
pub struct Calculator;

impl Tool for Calculator {
    fn spec(&self) -> Spec {
        let expression = json!({"type": "string", "description": "for example: 2 * (3 + 4.5) ^ 2 / sqrt(7)"});
        let what = "Computes an expression of numbers, + - * / // % ^, parentheses, pi, e, and the functions sqrt cbrt abs round floor \
            ceil exp ln log2 log10 log(x, base) sin cos tan asin acos atan atan2 sinh cosh tanh min max gcd factorial (angles in radians).";
        Spec::new("calculator", what, &[("expression", expression, true)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        let expression = arguments.get("expression").and_then(Value::as_str).unwrap_or_default();
        Ok(evaluate(expression)?.to_string())
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Number {
    Whole(i128),
    Real(f64),
}
use Number::{Real, Whole};

impl Number {
    fn real(self) -> f64 {
        match self {
            Whole(n) => n as f64,
            Real(x) => x,
        }
    }

    fn is_zero(self) -> bool {
        self.real() == 0.0
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Whole(n) => write!(f, "{n}"),
            Real(x) if x != 0.0 && !(1e-6..1e21).contains(&x.abs()) => write!(f, "{x:e}"),
            Real(x) => write!(f, "{x}"),
        }
    }
}

fn evaluate(expression: &str) -> Result<Number, String> {
    if expression.len() > LENGTH_LIMIT {
        return Err(format!("the expression has {} bytes; the limit is {LENGTH_LIMIT}", expression.len()));
    }
    let expression = expression.replace(['×', '·'], "*").replace('÷', "/").replace(['−', '–'], "-").replace('π', "pi");
    let mut parser = Parser { text: &expression, at: 0, depth: 0 };
    if parser.peek().is_none() {
        return Err("the expression is empty".into());
    }
    let value = parser.sum()?;
    match parser.peek() {
        None => Ok(value),
        Some(found) => Err(parser.unexpected(found, "an operator or the end")),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    /// The next character that is not white space.
    fn peek(&mut self) -> Option<char> {
        let rest = self.text[self.at..].trim_start();
        self.at = self.text.len() - rest.len();
        rest.chars().next()
    }

    fn eat(&mut self, token: &str) -> bool {
        self.peek();
        let found = self.text[self.at..].starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn unexpected(&self, found: char, expected: &str) -> String {
        let hint = if found == '=' { " (equations are not solved here)" } else { "" };
        format!("expected {expected} at position {}, found {found:?}{hint}", self.at + 1)
    }

    fn sum(&mut self) -> Result<Number, String> {
        let mut value = self.product()?;
        loop {
            if self.eat("+") {
                value = both(value, self.product()?, i128::checked_add, |a, b| a + b)?;
            } else if self.eat("-") {
                value = both(value, self.product()?, i128::checked_sub, |a, b| a - b)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<Number, String> {
        let mut value = self.sign()?;
        loop {
            if self.eat("//") {
                value = both(value, divisor(self.sign()?)?, floor_div, |a, b| (a / b).floor())?;
            } else if self.eat("*") {
                value = both(value, self.sign()?, i128::checked_mul, |a, b| a * b)?;
            } else if self.eat("/") {
                let exact = |a: i128, b: i128| a.checked_div(b).filter(|_| a % b == 0);
                value = both(value, divisor(self.sign()?)?, exact, |a, b| a / b)?;
            } else if self.eat("%") {
                value = both(value, divisor(self.sign()?)?, floor_mod, |a, b| a - b * (a / b).floor())?;
            } else {
                return Ok(value);
            }
        }
    }

    fn sign(&mut self) -> Result<Number, String> {
        self.deeper(|parser| {
            if parser.eat("-") {
                both(Whole(0), parser.sign()?, i128::checked_sub, |_, b| -b)
            } else if parser.eat("+") {
                parser.sign()
            } else {
                parser.power()
            }
        })
    }

    fn power(&mut self) -> Result<Number, String> {
        let base = self.atom()?;
        if !self.eat("**") && !self.eat("^") {
            return Ok(base);
        }
        let exponent = self.sign()?;
        if base.is_zero() && exponent.real() < 0.0 {
            return Err("division by zero".into());
        }
        let exact = |a: i128, b: i128| a.checked_pow(u32::try_from(b).ok()?);
        both(base, exponent, exact, f64::powf)
    }

    fn atom(&mut self) -> Result<Number, String> {
        match self.peek() {
            None => Err("the expression ends too early".into()),
            Some('(') => {
                self.eat("(");
                let value = self.deeper(Self::sum)?;
                self.close()?;
                Ok(value)
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_alphabetic() || c == '_' => self.name(),
            Some(c) => Err(self.unexpected(c, "a number")),
        }
    }

    fn close(&mut self) -> Result<(), String> {
        match self.peek() {
            Some(')') => {
                self.eat(")");
                Ok(())
            }
            Some(c) => Err(self.unexpected(c, "\")\"")),
            None => Err("a \")\" is missing".into()),
        }
    }

    fn number(&mut self) -> Result<Number, String> {
        let bytes = self.text.as_bytes();
        let mut end = self.at;
        while let Some(&b) = bytes.get(end) {
            let exponent = matches!(b, b'e' | b'E')
                && matches!(bytes.get(end + 1..), Some([b'0'..=b'9', ..] | [b'+' | b'-', b'0'..=b'9', ..]));
            if exponent {
                end += 1;
            } else if !(b.is_ascii_digit() || matches!(b, b'.' | b'_')) {
                break;
            }
            end += 1;
        }
        let text = &self.text[self.at..end];
        let digits = text.replace('_', "");
        let value = match digits.parse::<i128>() {
            Ok(n) => Whole(n),
            Err(_) => Real(digits.parse().map_err(|_| format!("{text:?} is not a number"))?),
        };
        self.at = end;
        finite(value)
    }

    fn name(&mut self) -> Result<Number, String> {
        let rest = &self.text[self.at..];
        let name = &rest[..rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len())];
        self.at += name.len();
        let lower = name.to_lowercase();
        if !self.eat("(") {
            return match lower.as_str() {
                "pi" => Ok(Real(std::f64::consts::PI)),
                "tau" => Ok(Real(std::f64::consts::TAU)),
                "e" => Ok(Real(std::f64::consts::E)),
                _ => Err(format!("{name:?} is not known; constants are pi, tau and e, functions need parentheses")),
            };
        }
        let mut values = Vec::new();
        if self.peek() != Some(')') {
            values.push(self.deeper(Self::sum)?);
            while self.eat(",") {
                values.push(self.deeper(Self::sum)?);
            }
        }
        self.close()?;
        finite(apply(&lower, &values)?)
    }

    fn deeper(&mut self, parse: impl FnOnce(&mut Self) -> Result<Number, String>) -> Result<Number, String> {
        self.depth += 1;
        if self.depth > DEPTH_LIMIT {
            return Err(format!("the expression is nested deeper than {DEPTH_LIMIT} levels"));
        }
        let value = parse(self);
        self.depth -= 1;
        value
    }
}

/// Exactly if both are whole and the exact result exists, else in floats.
fn both(
    a: Number,
    b: Number,
    exact: impl Fn(i128, i128) -> Option<i128>,
    real: impl Fn(f64, f64) -> f64,
) -> Result<Number, String> {
    if let (Whole(a), Whole(b)) = (a, b)
        && let Some(n) = exact(a, b)
    {
        return Ok(Whole(n));
    }
    finite(Real(real(a.real(), b.real())))
}

fn floor_div(a: i128, b: i128) -> Option<i128> {
    let quotient = a.checked_div(b)?;
    Some(if a % b != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient })
}

fn floor_mod(a: i128, b: i128) -> Option<i128> {
    let rest = a.checked_rem(b)?;
    Some(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
}

fn divisor(value: Number) -> Result<Number, String> {
    if value.is_zero() { Err("division by zero".into()) } else { Ok(value) }
}

fn finite(value: Number) -> Result<Number, String> {
    match value {
        Real(x) if x.is_nan() => Err("the result is not a real number".into()),
        Real(x) if x.is_infinite() => Err("the result is too large (beyond 1.8e308)".into()),
        value => Ok(value),
    }
}

fn apply(name: &str, values: &[Number]) -> Result<Number, String> {
    let outside = |what: &str| Err(format!("{name} is not defined for {what}"));
    let whole = |x: f64| if x.abs() < 9e15 { Whole(x as i128) } else { Real(x) };
    let value = match (name, values) {
        ("abs", &[Whole(n)]) => n.checked_abs().map_or(Real(-(n as f64)), Whole),
        ("round" | "floor" | "ceil", &[Whole(n)]) => Whole(n),
        ("factorial", &[Whole(n)]) if (0..=170).contains(&n) => {
            return (1..=n).try_fold(Whole(1), |all, n| both(all, Whole(n), i128::checked_mul, |a, b| a * b));
        }
        ("factorial", &[x]) => return outside(&format!("{x}: it takes whole numbers from 0 to 170")),
        ("gcd", &[Whole(a), Whole(b)]) => {
            let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
            while b != 0 {
                (a, b) = (b, a % b);
            }
            i128::try_from(a).map_or(Real(a as f64), Whole)
        }
        ("gcd", &[_, _]) => return outside("fractions"),
        ("sqrt", &[x]) if x.real() < 0.0 => return outside("negative numbers"),
        ("ln" | "log" | "log2" | "log10", &[x, ..]) if x.real() <= 0.0 => return outside("zero and below"),
        ("asin" | "acos", &[x]) if x.real().abs() > 1.0 => return outside("numbers beyond -1 and 1"),
        ("min", [first, rest @ ..]) => rest.iter().fold(*first, |a, &b| if b.real() < a.real() { b } else { a }),
        ("max", [first, rest @ ..]) => rest.iter().fold(*first, |a, &b| if b.real() > a.real() { b } else { a }),
        ("round", &[x]) => whole(x.real().round()),
        ("floor", &[x]) => whole(x.real().floor()),
        ("ceil", &[x]) => whole(x.real().ceil()),
        ("sqrt", &[x]) => exact_root(x).unwrap_or_else(|| Real(x.real().sqrt())),
        ("atan2", &[y, x]) => Real(y.real().atan2(x.real())),
        ("log", &[x, base]) if base.real() > 0.0 && base.real() != 1.0 => Real(x.real().log(base.real())),
        ("log", &[_, _]) => return outside("that base"),
        ("round", &[x, digits]) => {
            let scale = 10f64.powf(digits.real().clamp(0.0, 15.0).trunc());
            Real((x.real() * scale).round() / scale)
        }
        (_, &[x]) => {
            Real(of_one(name, x.real()).ok_or_else(|| format!("there is no function {name:?} of one argument"))?)
        }
        _ => return Err(format!("there is no function {name:?} of {} arguments", values.len())),
    };
    Ok(value)
}

fn exact_root(x: Number) -> Option<Number> {
    let Whole(n) = x else { return None };
    let root = (n as f64).sqrt() as i128;
    (root.checked_mul(root) == Some(n)).then_some(Whole(root))
}

fn of_one(name: &str, x: f64) -> Option<f64> {
    Some(match name {
        "abs" => x.abs(),
        "sqrt" => x.sqrt(),
        "cbrt" => x.cbrt(),
        "exp" => x.exp(),
        "ln" | "log" => x.ln(),
        "log2" => x.log2(),
        "log10" => x.log10(),
        "sin" => x.sin(),
        "cos" => x.cos(),
        "tan" => x.tan(),
        "asin" => x.asin(),
        "acos" => x.acos(),
        "atan" => x.atan(),
        "sinh" => x.sinh(),
        "cosh" => x.cosh(),
        "tanh" => x.tanh(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn result(expression: &str) -> String {
        evaluate(expression).map_or_else(|why| format!("error: {why}"), |value| value.to_string())
    }

    #[test]
    fn arithmetic() {
        for (expression, expected) in [
            ("1 + 2 * 3", "7"),
            ("(1 + 2) * 3", "9"),
            ("2 - 3 - 4", "-5"),
            ("2 ^ 3 ^ 2", "512"),
            ("-2 ^ 2", "-4"),
            ("2 ** -1", "0.5"),
            ("7 / 2", "3.5"),
            ("8 / 2", "4"),
            ("-7 // 2", "-4"),
            ("-7 % 3", "2"),
            ("7.5 % 2", "1.5"),
            ("2 ^ 100", "1267650600228229401496703205376"),
            ("99999999999 * 99999999999", "9999999999800000000001"),
            ("2 ^ 200", "1.6069380442589903e60"),
            ("1e3 + .5", "1000.5"),
            ("1_000_000 × 2 ÷ 4", "500000"),
            ("sqrt(16) + abs(-3)", "7"),
            ("sqrt(2)", "1.4142135623730951"),
            ("max(1, 2.5, -3)", "2.5"),
            ("round(2.675, 2)", "2.68"),
            ("round(2.5)", "3"),
            ("log(8, 2)", "3"),
            ("cos(pi)", "-1"),
            ("gcd(-12, 18)", "6"),
            ("factorial(30)", "265252859812191058636308480000000"),
            ("--3", "3"),
            ("1e-9", "1e-9"),
            ("0.1 + 0.2", "0.30000000000000004"),
        ] {
            assert_eq!(result(expression), expected, "{expression}");
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        for (expression, expected) in [
            ("", "empty"),
            ("1 / 0", "division by zero"),
            ("1 % 0.0", "division by zero"),
            ("0 ^ -1", "division by zero"),
            ("10 ^ 400", "too large"),
            ("1e400", "too large"),
            ("exp(1000)", "too large"),
            ("(-8) ^ 0.5", "not a real number"),
            ("sqrt(-1)", "sqrt is not defined for negative numbers"),
            ("ln(0)", "ln is not defined for zero and below"),
            ("factorial(171)", "from 0 to 170"),
            ("factorial(2.5)", "whole numbers"),
            ("1 +", "ends too early"),
            ("(1 + 2", "\")\" is missing"),
            ("1 2", "at position 3, found '2'"),
            ("2 * x", "\"x\" is not known"),
            ("2 * 3 = 6", "equations"),
            ("system(1)", "no function \"system\""),
            ("min()", "of 0 arguments"),
            ("1.2.3", "is not a number"),
            ("$5", "expected a number at position 1"),
        ] {
            let found = result(expression);
            assert!(found.starts_with("error: ") && found.contains(expected), "{expression}: {found}");
        }
        assert!(result(&"(".repeat(1500)).contains("nested deeper"));
        assert!(result(&"-".repeat(1500)).contains("nested deeper"));
        assert!(result(&"2^".repeat(900)).contains("nested deeper"));
        assert!(result(&"1+".repeat(5000)).contains("limit is 2000"));
    }

    proptest! {
        #[test]
        fn any_text_has_a_result(expression in "[0-9a-z+*/%^(),. _π×-]{0,40}|\\PC{0,20}") {
            result(&expression);
        }

        #[test]
        fn whole_numbers_as_in_rust(a in -1_000_000i128..1_000_000, b in -1_000_000i128..1_000_000, c in 1i128..1000) {
            prop_assert_eq!(result(&format!("{a} - {b} * ({c} + {a}) % {c}")), (a - (b * (c + a)).rem_euclid(c)).to_string());
            prop_assert_eq!(result(&format!("({a}) // ({c})")), a.div_euclid(c).to_string());
        }
    }
}
