//! Names, things, numbers: everything in a request that is no wording. Each belongs to one side by its hash, so that no name and
//! no number of a held-out request has been in a request that was trained on.

use std::collections::HashSet;

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

/// All names of people and cities that are no made-up ones, whichever side they belong to.
pub fn proper() -> HashSet<&'static str> {
    let cities = ZONES.iter().flat_map(|(_, cities)| cities.split(|c: char| !c.is_alphabetic()));
    PEOPLE.split_whitespace().chain(cities).filter(|name| !name.is_empty()).collect()
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

/// The same of held-out data.
const HELD_HEADS: &str = "bu cu da en fi gro hu is ju ko lu me ne os pe qui ru so spi te ul ve wi yo zu";
const HELD_MIDDLES: &str = "bi cho da fe gu ke lu mo no pu ro shi te ti vu we";
const HELD_TAILS: &str = "bert d do gan go kin l len mi nd ng po r rel s so st tz us vi";

const ONSETS: &str = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p ph pl pr qu r s sc sch sh sk sl sm sn sp st \
    str sw t th tr ts tw v vl w wh x y z zw b c d f g h k l m n p r s t v w";
const VOWELS: &str = "a e i o u a e i o u a e i o u aa ae ai au ea ee ei eo ia ie io oa oe oi oo ou ua ue ui y";
const CODAS: &str = "b ck ct d ft g k l ld lf lk ll lm lt m mb mp n nd ng nk nn ns nt p ph r rd rg rk rm rn rs rt s sh sk ss \
    st t tch th tt x z";

/// A word of syllables, or of sounds that follow each other as they may: there are many more of them than a model can know.
fn invented(draw: &mut Draw, side: Side) -> String {
    let [heads, middles, tails] = match side {
        Side::Train => [HEADS, MIDDLES, TAILS],
        Side::HeldOut => [HELD_HEADS, HELD_MIDDLES, HELD_TAILS],
    };
    if draw.chance(if side == Side::Train { 25 } else { 60 }) {
        let middle = if draw.chance(60) { one(middles, draw) } else { "" };
        let last = if draw.chance(15) { one(middles, draw) } else { "" };
        return format!("{}{middle}{last}{}", one(heads, draw), one(tails, draw));
    }
    let mut text = String::new();
    for syllable in 0..draw.range(1, 3) {
        // Two vowels meet now and then.
        if syllable == 0 && draw.chance(80) || syllable > 0 && draw.chance(95) {
            text += one(ONSETS, draw);
        }
        text += one(VOWELS, draw);
    }
    if draw.chance(65) {
        text += one(CODAS, draw);
    }
    // One or two letters are no name.
    while text.len() < 3 {
        text += one(CODAS, draw);
    }
    text
}

/// With a capital letter.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().collect::<String>() + letters.as_str())
}

/// A word that nobody has heard before: `tafilu`.
pub fn word(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| invented(draw, side))
}

/// Letters and digits without any order: `x7qpd`.
pub fn random(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let letters = b"abcdefghijklmnopqrstuvwxyz0123456789";
        // One in three has capitals.
        let letters = if draw.chance(33) { &b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[..] } else { &letters[..] };
        let letters = if draw.chance(40) { &letters[..26] } else { letters };
        (0..draw.range(3, 9)).map(|_| char::from(*draw.pick(letters))).collect()
    })
}

const PEOPLE: &str = "Ada Ahmed Alice Amir Ana Anton Aya Ben Carla Chen Clara Dan Diego Dora Elena Eli Emma Erik Eva Fatima \
    Felix Finn Grace Hana Hugo Ida Igor Ines Ivan Jack Jana Jonas Julia Kai Karl Kim Lara Lena Leo Lin Lucy Luis Maria Mark \
    Maya Mia Nadia Nina Noah Olga Omar Otto Paul Petra Rosa Ruth Sam Sara Sofia Tom Vera Wei Yuki Zoe";

/// Somebody: a name that exists, or one that could.
pub fn person(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        if draw.chance(40) {
            return one(PEOPLE, draw).to_string();
        }
        let name = capital(&invented(draw, side));
        if draw.chance(10) { format!("{name} {}", capital(&invented(draw, side))) } else { name }
    })
}

const KINDS: &str = "blue red green old new small big heavy light spare wooden round long short cheap soft dark bright cold \
    warm second third silver golden paper kitchen garden office school winter summer travel music family steel glass black \
    white yellow brown pink narrow wide tall little heated wet dry fresh sweet sour plastic leather cotton wool stone copper \
    iron electric broken lost first last main side back front upper lower north south east west bank gym work home holiday \
    sports car bike club hotel bathroom cellar attic balcony library spring autumn weekly monthly daily yearly private public \
    Monday Friday Sunday";

/// Which one of several things: `spare`, `garden`, a name.
pub fn kind(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| match draw.chance(60) {
        true => one(KINDS, draw).to_string(),
        false => invented(draw, side),
    })
}

const THINGS: &str = "axe backpack bench blanket bracelet briefcase bulb cable calendar candle carpet chain chest coin comb \
    computer curtain dice dish drawer drill earring envelope folder frame freezer glass globe guitar helmet hook hose iron \
    jacket jar jug kettle keyboard laptop lock magnet mattress microphone monitor mouse mug notebook oven paddle pencil piano \
    picture pipe plant plug printer puzzle rack razor rug ruler sack saddle saw scale scissors screw ship sink skirt socket \
    spade sponge stamp statue stool suitcase switch tablet tap tie tile torch toy tray trunk tyre vase violin wallet watch \
    whistle apple bag ball bed bell bike boat book boot bottle bowl box bread brush bucket cake camera card chair clock coat \
    cup desk door drum fan fence flag fork gate glove hammer hat key kite knife lamp ladder lemon letter map mirror nail \
    needle pan pen phone pillow plate radio ring rope scarf shelf shirt shoe soap sofa spoon stove table tent towel wheel";

/// `what`, or in `percent` of 100 cases some kind of it; one in eight is a word that nobody has heard before.
fn sorted(what: &str, percent: u32, draw: &mut Draw, side: Side) -> String {
    let what = if draw.chance(12) { invented(draw, side) } else { what.to_string() };
    if !draw.chance(percent) {
        return what;
    }
    match draw.chance(85) {
        true => format!("{} {what}", one(KINDS, draw)),
        false => format!("{} {what}", invented(draw, side)),
    }
}

/// A thing, often of some kind: `blue lamp`.
pub fn thing(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let thing = one(THINGS, draw);
        sorted(thing, 70, draw, side)
    })
}

const COSTS: &str = "heating internet phone mobile parking petrol taxi hotel flights museum cinema concert doctor dentist \
    medicine haircut clothes laundry cleaning furniture carpets curtains garden plants flowers pets toys school nursery \
    courses gym fees stamps printing software licences batteries cables lamps pans plates breakfast snacks pizza bread meat \
    fish vegetables wine beer savings pension loan interest fines donations rent food water power phone fuel tea coffee fruit \
    paper tools paint wood seeds tickets lunch dinner books shoes gifts repairs train bus taxes insurance rice milk flour \
    sugar salt eggs cheese nuts oil soap wool bricks sand nails glue";

/// What a line of an account is for.
pub fn cost(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let cost = one(COSTS, draw);
        sorted(cost, 60, draw, side)
    })
}

const FOOD: &str = "milk bread butter eggs cheese apples pears plums oranges lemons bananas grapes cherries berries nuts rice \
    pasta flour sugar salt pepper oil vinegar honey jam tea coffee juice water wine beer fish chicken beef ham sausages beans \
    peas carrots onions potatoes tomatoes cucumbers cabbage spinach garlic mushrooms soup yoghurt cream chocolate biscuits \
    crisps cereal oats";

/// Something to eat or drink, often of some kind: `milk`, `cold tea`.
pub fn food(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let food = one(FOOD, draw);
        sorted(food, 40, draw, side)
    })
}

const STEMS: &str = "README TODO index data results scores grades shopping groceries expenses receipts invoice contract offers \
    family birthdays contacts phones passwords addresses books films songs games travel packing flights hotels itinerary \
    timetable schedule appointments homework lectures exam thesis chapter story poem journal draft backup archive config \
    settings changes history users clients staff suppliers products inventory cars tools garden_plan workout training races \
    doctor medicine bills loans taxes account address agenda boat budget camping cellar club costs diary draft events garden \
    guests house ideas income kitchen letter list log meeting members menu notes orders party plan prices project readme \
    recipe report rooms sales shop stock summary team todo tour trip wages week";
const ENDINGS: &str = "txt md csv log txt md csv log dat text list tsv ini conf json yaml rst org";

/// The name of a file without its ending, or of a folder.
fn stem(draw: &mut Draw, side: Side) -> String {
    let mark = |draw: &mut Draw| *draw.pick(&["_", "_", "-", "", "."]);
    match draw.below(16) {
        0..=3 => one(STEMS, draw).to_string(),
        4 => format!("{}{}{}", one(STEMS, draw), mark(draw), draw.range(1990, 2039)),
        5 => format!("{}-{}", one(STEMS, draw), one(STEMS, draw)),
        6 => format!("{}{}{}", invented(draw, side), mark(draw), one(STEMS, draw)),
        7 => format!("{}{}", one(STEMS, draw), draw.range(1, 30)),
        8 => format!("{}_{}", one(KINDS, draw), one(STEMS, draw)),
        9 => random(draw, side),
        10 => format!("{}{}{}", invented(draw, side), mark(draw), invented(draw, side)),
        11 => format!("{}{}{}", invented(draw, side), mark(draw), draw.range(1, 2039)),
        12 => capital(&invented(draw, side)),
        _ => invented(draw, side),
    }
}

/// The name of a file: `budget_2024.csv`.
pub fn file(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| format!("{}.{}", stem(draw, side), one(ENDINGS, draw)))
}

/// The name of a folder.
pub fn folder(draw: &mut Draw, side: Side) -> String {
    // A dot would look like a file.
    own(draw, side, |draw| stem(draw, side).replace('.', "_"))
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

/// A whole number below 1000 in words: `three hundred and twelve`; none for larger ones.
pub fn spelled(number: &str) -> Option<String> {
    const ONES: [&str; 20] = [
        "",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fo \
        urteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let n: usize = number.parse().ok().filter(|n| (1..1000).contains(n))?;
    let small = |n: usize| match (n / 10, n % 10) {
        (0 | 1, _) => ONES[n].to_string(),
        (tens, 0) => TENS[tens].to_string(),
        (tens, one) => format!("{}-{}", TENS[tens], ONES[one]),
    };
    Some(match (n / 100, n % 100) {
        (0, rest) => small(rest),
        (hundreds, 0) => format!("{} hundred", ONES[hundreds]),
        (hundreds, rest) => format!("{} hundred and {}", ONES[hundreds], small(rest)),
    })
}

/// A number of `side` that `make` gives.
pub fn number_of(draw: &mut Draw, side: Side, make: impl Fn(&mut Draw) -> u64) -> u64 {
    let text = own(draw, side, |draw| make(draw).to_string());
    text.parse().unwrap_or(0)
}

/// A number with decimals, most of them halves and quarters, which floats hold exactly: `12.75`, `7.5`, `49.90`.
pub fn decimal(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let digits = draw.range(1, 4) as u32;
        let whole = draw.range(if digits == 1 { 0 } else { 10u64.pow(digits - 1) }, 10u64.pow(digits) - 1);
        match draw.below(10) {
            0 => format!("{whole}.{}", draw.range(1, 9)),
            1 => format!("{whole}.{:02}", draw.range(1, 99)),
            2 => format!("{whole}.{}", draw.pick(&["99", "95", "90", "20"])),
            _ => format!("{whole}{}", draw.pick(&[".5", ".25", ".75", ".5"])),
        }
    })
}

/// Letters and digits: `K7-204`, `nola42`.
pub fn code(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let letter = |draw: &mut Draw| char::from(b'A' + draw.below(26) as u8);
        match draw.below(4) {
            0 => format!("{}{}-{}", letter(draw), draw.range(1, 99), draw.range(10, 999)),
            1 => format!("{}{}", invented(draw, side), draw.range(10, 9999)),
            2 => format!("{}{}{}", letter(draw), letter(draw), draw.range(100, 9999)),
            _ => random(draw, side),
        }
    })
}

/// A time of day: `14:35`.
pub fn time(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| format!("{:02}:{:02}", draw.range(6, 22), draw.range(0, 59)))
}

/// Time zones by the part of the world, with the names of cities.
const ZONES: [(&str, &str); 7] = [
    (
        "Europe",
        "Amsterdam Andorra Astrakhan Athens Belgrade Berlin Bratislava Brussels Bucharest Budapest Copenhagen Dublin Gibraltar \
        Guernsey Helsinki Istanbul Isle_of_Man Jersey Kaliningrad Kirov Kyiv Lisbon Ljubljana London Luxembourg Madrid Malta \
        Minsk Monaco Moscow Oslo Paris Prague Riga Rome Samara San_Marino Sarajevo Saratov Simferopol Skopje Sofia Stockholm \
        Tallinn Tirane Ulyanovsk Vaduz Vatican Vienna Vilnius Volgograd Warsaw Zagreb Zurich",
    ),
    (
        "Asia",
        "Aden Almaty Amman Anadyr Aqtau Aqtobe Ashgabat Baghdad Bahrain Baku Bangkok Barnaul Beirut Bishkek Brunei Chita \
        Colombo Damascus Dhaka Dili Dubai Dushanbe Famagusta Gaza Hebron Ho_Chi_Minh Hong_Kong Hovd Irkutsk Jakarta Jayapura \
        Jerusalem Kabul Kamchatka Karachi Kathmandu Khandyga Kolkata Krasnoyarsk Kuala_Lumpur Kuching Kuwait Macau Magadan \
        Makassar Manila Muscat Nicosia Novokuznetsk Novosibirsk Omsk Oral Phnom_Penh Pontianak Pyongyang Qatar Qyzylorda \
        Riyadh Sakhalin Samarkand Seoul Shanghai Singapore Taipei Tashkent Tbilisi Tehran Thimphu Tokyo Tomsk Ulaanbaatar \
        Urumqi Vientiane Vladivostok Yakutsk Yangon Yekaterinburg Yerevan",
    ),
    (
        "America",
        "Adak Anchorage Anguilla Antigua Araguaina Aruba Asuncion Bahia Barbados Belem Belize Boa_Vista Bogota Boise \
        Campo_Grande Cancun Caracas Cayenne Chicago Chihuahua Costa_Rica Cuiaba Curacao Dawson Denver Detroit Dominica \
        Edmonton El_Salvador Fortaleza Grenada Guadeloupe Guatemala Guayaquil Guyana Halifax Havana Hermosillo Inuvik Iqaluit \
        Jamaica Juneau La_Paz Lima Los_Angeles Maceio Managua Manaus Martinique Matamoros Mazatlan Merida Mexico_City Moncton \
        Monterrey Montevideo Montserrat Nassau New_York Nome Noronha Nuuk Ojinaga Panama Paramaribo Phoenix Porto_Velho \
        Puerto_Rico Punta_Arenas Recife Regina Resolute Rio_Branco Santarem Santiago Santo_Domingo Sao_Paulo Sitka St_Johns \
        Tegucigalpa Tijuana Toronto Tortola Vancouver Whitehorse Winnipeg Yakutat",
    ),
    (
        "Africa",
        "Abidjan Accra Addis_Ababa Algiers Asmara Bamako Bangui Banjul Bissau Blantyre Brazzaville Bujumbura Cairo Casablanca \
        Ceuta Conakry Dakar Dar_es_Salaam Djibouti Douala El_Aaiun Freetown Gaborone Harare Johannesburg Juba Kampala Khartoum \
        Kigali Kinshasa Lagos Libreville Lome Luanda Lubumbashi Lusaka Malabo Maputo Maseru Mbabane Mogadishu Monrovia Nairobi \
        Ndjamena Niamey Nouakchott Ouagadougou Sao_Tome Tripoli Tunis Windhoek",
    ),
    ("Australia", "Adelaide Brisbane Darwin Hobart Melbourne Perth Sydney"),
    ("Pacific", "Apia Auckland Fiji Guam Honolulu Noumea Tahiti Tongatapu"),
    ("Atlantic", "Azores Bermuda Canary Madeira Reykjavik"),
];

/// The city of a zone that does not exist: one word, or two with `_` between.
pub fn town(draw: &mut Draw, side: Side) -> String {
    own(draw, side, |draw| {
        let second = if draw.chance(25) { format!("_{}", capital(&invented(draw, side))) } else { String::new() };
        capital(&invented(draw, side)) + &second
    })
}

/// Cities that many ask for by their names alone: which zone they are in is trained, so that they are of the training data.
const KNOWN: &str = "Amsterdam Athens Berlin Brussels Cairo Chicago Copenhagen Dubai Dublin Helsinki Hong_Kong Istanbul \
    Johannesburg Lisbon London Los_Angeles Madrid Melbourne Mexico_City Moscow Nairobi New_York Paris Prague Rome Sao_Paulo \
    Seoul Shanghai Singapore Stockholm Sydney Tokyo Toronto Vienna Warsaw Zurich";

/// A part of the world and a city of it; together, with a slash between, the name of a time zone.
pub fn zone(draw: &mut Draw, side: Side) -> (String, String) {
    let all: usize = ZONES.iter().map(|(_, cities)| cities.split_whitespace().count()).sum();
    loop {
        let mut at = draw.below(all);
        for (region, cities) in ZONES {
            for city in cities.split_whitespace() {
                if at == 0 {
                    let known = KNOWN.split_whitespace().any(|known| known == city);
                    let of = if known { Side::Train } else { side_of(&format!("{region}/{city}")) };
                    if of == side {
                        return (region.to_string(), city.to_string());
                    }
                }
                at = at.wrapping_sub(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sides_share_no_name_and_no_number() {
        type Make = fn(&mut Draw, Side) -> String;
        let makers: [(&str, usize, Make); 15] = [
            ("town", 500, town),
            ("code", 400, code),
            ("random", 500, random),
            ("food", 100, food),
            ("word", 500, word),
            ("person", 20, person),
            ("thing", 300, thing),
            ("cost", 200, cost),
            ("file", 400, file),
            ("folder", 200, folder),
            ("number", 400, |draw, side| number(draw, side, 10, 9999).to_string()),
            ("figure", 250, |draw, side| figure(draw, side, 5).to_string()),
            ("decimal", 300, decimal),
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
    fn numbers_are_spelled() {
        let spelled = |n: &str| spelled(n).unwrap_or_default();
        assert_eq!(["7", "13", "20", "45"].map(spelled), ["seven", "thirteen", "twenty", "forty-five"]);
        assert_eq!(
            ["100", "312", "980"].map(spelled),
            ["one hundred", "three hundred and twelve", "nine hundred and eighty"]
        );
        assert_eq!(["0", "1000", "2.5", ""].map(spelled), ["", "", "", ""]);
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
