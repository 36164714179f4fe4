//! Names, things, numbers: everything in a request that is no wording. Each belongs to one side by its hash, so that no name and
//! no number of a held-out request has been in a request that was trained on.

use crate::data::Side;
use crate::draw::Draw;

/// One of so many names and numbers is held out.
const HELD_OUT: u64 = 4;

/// The side that a name or a number belongs to.
pub fn side_of(name: &str) -> Side {
    // FNV-1a, then a mix: the low bits of FNV alone are poor.
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    if Draw::new(&[hash]).below(HELD_OUT as usize) == 0 { Side::HeldOut } else { Side::Train }
}

/// What `make` gives once it belongs to `side`.
fn own(draw: &mut Draw, side: Side, make: impl Fn(&mut Draw) -> String) -> String {
    // At one in four the chance to find none in 400 is 1e-50; the bound is there for lists that lack a side.
    let mut name = make(draw);
    for _ in 0..400 {
        if side_of(&name) == side {
            break;
        }
        name = make(draw);
    }
    name
}

/// One word of a list.
fn one<'a>(list: &'a str, draw: &mut Draw) -> &'a str {
    let words: Vec<&str> = list.split_whitespace().collect();
    draw.pick::<&str>(&words)
}

const HEADS: &str = "ba do fe gi ha jo ka le mi no pa ra se ti vo wa ze bri cla dra fro gle sta tru";
const MIDDLES: &str = "ba ce di fa go la li ma ne pi ra re ri sa se ta to va vi zo";
const TAILS: &str = "ban ck del dra fin ka la lo mar na nix per ra ris rn sel ta ton va x";

/// A word that nobody has heard before: `tafilu`.
pub fn word(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let middle = if draw.chance(60) { one(MIDDLES, draw) } else { "" };
        format!("{}{middle}{}", one(HEADS, draw), one(TAILS, draw))
    })
}

const PEOPLE: &str = "Ada Ahmed Alice Amir Ana Anton Aya Ben Carla Chen Clara Dan Diego Dora Elena Eli Emma Erik Eva Fatima Felix Finn \
    Grace Hana Hugo Ida Igor Ines Ivan Jack Jana Jonas Julia Kai Karl Kim Lara Lena Leo Lin Lucy Luis Maria Mark \
    Maya Mia Nadia Nina Noah Olga Omar Otto Paul Petra Rosa Ruth Sam Sara Sofia Tom Vera Wei Yuki Zoe";

/// Somebody: a name that exists, or one that could.
pub fn person(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        if draw.chance(50) {
            return one(PEOPLE, draw).to_string();
        }
        let name = format!("{}{}", one(HEADS, draw), one(TAILS, draw));
        name[..1].to_uppercase() + &name[1..]
    })
}

const KINDS: &str = "blue red green old new small big heavy light spare wooden round long short cheap soft dark bright cold warm \
    second third silver golden paper kitchen garden office school winter summer travel music family steel glass";
/// Which one of several things: `spare`, `garden`, a name.
pub fn kind(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| match draw.chance(60) {
        true => one(KINDS, draw).to_string(),
        false => format!("{}{}", one(HEADS, draw), one(TAILS, draw)),
    })
}

const THINGS: &str = "apple bag ball bed bell bike boat book boot bottle bowl box bread brush bucket cake camera card chair clock coat \
    cup desk door drum fan fence flag fork gate glove hammer hat key kite knife lamp ladder lemon letter map mirror \
    nail needle pan pen phone pillow plate radio ring rope scarf shelf shirt shoe soap sofa spoon stove table tent \
    towel wheel";

/// A thing, often of some kind: `blue lamp`.
pub fn thing(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let thing = one(THINGS, draw);
        if draw.chance(70) { format!("{} {thing}", one(KINDS, draw)) } else { thing.to_string() }
    })
}

const COSTS: &str = "rent food water power phone fuel tea coffee fruit paper tools paint wood seeds tickets lunch dinner books shoes \
    gifts repairs train bus taxes insurance rice milk flour sugar salt eggs cheese nuts oil soap wool bricks sand \
    nails glue";

/// What a line of an account is for.
pub fn cost(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let cost = one(COSTS, draw);
        if draw.chance(60) { format!("{} {cost}", one(KINDS, draw)) } else { cost.to_string() }
    })
}

const STEMS: &str = "account address agenda boat budget camping cellar club costs diary draft events garden guests house ideas income \
    kitchen letter list log meeting members menu notes orders party plan prices project readme recipe report rooms \
    sales shop stock summary team todo tour trip wages week";
const ENDINGS: &str = "txt md csv log";

/// The name of a file: `budget_2024.csv`.
pub fn file(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let stem = match draw.below(5) {
            0 => one(STEMS, draw).to_string(),
            1 => format!("{}_{}", one(STEMS, draw), draw.range(1990, 2039)),
            2 => format!("{}-{}", one(STEMS, draw), one(STEMS, draw)),
            3 => format!("{}_{}", one(HEADS, draw), one(STEMS, draw)),
            _ => format!("{}{}", one(HEADS, draw), one(TAILS, draw)),
        };
        format!("{stem}.{}", one(ENDINGS, draw))
    })
}

/// The name of a folder.
pub fn folder(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| match draw.below(3) {
        0 => one(STEMS, draw).to_string(),
        1 => format!("{}_{}", one(KINDS, draw), one(STEMS, draw)),
        _ => format!("{}{}", one(HEADS, draw), one(TAILS, draw)),
    })
}

/// A whole number from `low` to `high`, which should hold a hundred or more.
pub fn number(draw: &mut Draw, side: Side, low: u64, high: u64) -> u64 {
    let text = own(draw, side, |draw| draw.range(low, high).to_string());
    text.parse().unwrap_or(low)
}

/// A number of `digits` digits at most and two at least, shorter ones as often as longer ones.
pub fn figure(draw: &mut Draw, side: Side, digits: u32) -> u64 {
    let digits = draw.range(2, u64::from(digits.max(2))) as u32;
    number(draw, side, 10u64.pow(digits - 1), 10u64.pow(digits) - 1)
}

/// A number with quarters, which floats hold exactly: `12.75`.
pub fn quarters(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| format!("{}{}", draw.range(10, 999), draw.pick(&[".5", ".25", ".75"])))
}

/// A time of day: `14:35`.
pub fn time(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| format!("{:02}:{:02}", draw.range(6, 22), draw.range(0, 59)))
}

/// Time zones by the part of the world, with the names of cities.
const ZONES: [(&str, &str); 6] = [
    (
        "Europe",
        "Amsterdam Athens Belgrade Berlin Brussels Bucharest Budapest Dublin Helsinki Istanbul Kyiv Lisbon \
        London Madrid Moscow Oslo Paris Prague Riga Rome Sofia Stockholm Vienna Vilnius Warsaw Zurich",
    ),
    (
        "Asia",
        "Baghdad Bangkok Beirut Colombo Dhaka Dubai Jakarta Kabul Karachi Kathmandu Kolkata Manila \
        Riyadh Seoul Shanghai Singapore Taipei Tashkent Tehran Tokyo",
    ),
    (
        "America",
        "Bogota Caracas Chicago Denver Halifax Havana Lima Montevideo Panama Phoenix Santiago Toronto \
        Vancouver",
    ),
    ("Africa", "Accra Algiers Cairo Casablanca Dakar Harare Khartoum Lagos Nairobi Tripoli Tunis"),
    ("Australia", "Adelaide Brisbane Darwin Hobart Melbourne Perth Sydney"),
    ("Pacific", "Auckland Fiji Guam Honolulu Tahiti Tongatapu"),
];

/// A part of the world and a city of it; together, with a slash between, the name of a time zone.
pub fn zone(draw: &mut Draw, side: Side) -> (String, String) {
    let name = own(draw, side, |draw| {
        let (region, cities) = draw.pick(&ZONES);
        format!("{region}/{}", one(cities, draw))
    });
    let (region, city) = name.split_once('/').unwrap_or(("Europe", "London"));
    (region.to_string(), city.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sides_share_no_name_and_no_number() {
        type Make = fn(&mut Draw, Side) -> String;
        let makers: [(&str, usize, Make); 11] = [
            ("word", 500, word),
            ("person", 20, person),
            ("thing", 300, thing),
            ("cost", 200, cost),
            ("file", 400, file),
            ("folder", 200, folder),
            ("number", 400, |draw, side| number(draw, side, 10, 9999).to_string()),
            ("figure", 250, |draw, side| figure(draw, side, 5).to_string()),
            ("quarters", 300, quarters),
            ("time", 150, time),
            ("zone", 10, |draw, side| format!("{:?}", zone(draw, side))),
        ];
        for (name, least, make) in makers {
            let drawn = |side| {
                let mut draw = Draw::new(&[9]);
                (0..2000).map(|_| make(&mut draw, side)).collect::<HashSet<String>>()
            };
            let (train, held) = (drawn(Side::Train), drawn(Side::HeldOut));
            assert!(train.is_disjoint(&held), "{name}");
            assert!(held.len() >= least && train.len() > held.len() / 2, "{name}: {} and {}", train.len(), held.len());
        }
    }

    #[test]
    fn zones_exist() {
        for (region, cities) in ZONES {
            for city in cities.split_whitespace() {
                assert!(jiff::tz::TimeZone::get(&format!("{region}/{city}")).is_ok(), "{region}/{city}");
            }
        }
    }
}
