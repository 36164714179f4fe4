//! Requests for the time.

use crate::data::grammar::forms;
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

forms! {
    TIME {
        train: [
            "what time is it[ now|]", "what[ is|'s|s] the time", "<do>tell me the time", "how late is it[ now|]", "<know>what time it is", "what does the clock say", "time", "current time", "the time[, please|]", "I need to know the time", "what time do we have",
            "do you have the time", "what is the time now", "what hour is it", "how late is it right now", "is it late? Tell me the time", "the current time", "<do>check the clock", "<do>look at the clock", "what time have we got", "<noun>the current time", "time now", "I have no watch, what time is it",
            "<noun>the exact time", "<know>how late it is", "[sorry|excuse me], what time is it",
        ],
        held: ["do you know the time", "what is the current time right now", "can you tell me what time it is now", "I need the time", "what time does the clock say", "I wonder how late it is now"],
    }
    DATE {
        train: [
            "what[ is|'s] the date[ today|]", "what date is it[ today|]", "what is today's date", "<do>tell me the date", "which date do we have", "date", "I need to know today's date", "current date", "today's date", "what is the date of today", "<noun>today's date",
            "<know>what date it is", "which date is it today", "the date[, please|]", "<do>tell me today's date", "<noun>the date of today", "the date today", "what day of the month is it", "<noun>the current date", "what is the full date", "I have to write a letter, what date is it", "which day of the month do we have",
        ],
        held: ["do you know the date", "what date do we have", "can you tell me what date it is today", "what is the current date now", "I need the date for a letter", "which date is it"],
    }
    DAY {
        train: [
            "what day is it[ today|]", "which day of the week is it", "what weekday is it", "<do>tell me the weekday", "which weekday do we have", "what day of the week do we have", "what day is today", "which day is it[ today|]", "<know>what day it is", "weekday", "day of the week", "<noun>the weekday",
            "<noun>the day of the week", "is it Monday or which day", "what weekday do we have today", "which weekday is today", "today is which day of the week", "<know>which day of the week it is", "what is the day today", "I lost count of the days, what day is it",
        ],
        held: ["what day of the week is it", "do you know what weekday it is today", "tell me which day it is today", "which day of the week do we have today", "what is today, which weekday"],
    }
    BOTH {
        train: [
            "what[ is|'s] the date and [the |]time", "<noun>date and time", "<do>tell me the date and the time", "what day and time is it", "date and time", "what time and date do we have", "<know>what date and time it is", "the time and the date[, please|]", "<noun>the time and the date",
            "what is the current date and time", "[current|today's] date and [current |]time", "I need [today's|the] date and the [current |]time", "<know>the date and the time", "time and date", "what is the time, and what is the date", "<noun>the time and also the date", "<do>check the date and the time", "what time is it, and which date", "both date and time",
        ],
        held: ["do you know the date and the time", "what date and what time is it", "tell me the date and also the time", "I need the current time and date"],
    }
    TIME_THERE {
        train: [
            "what time is it[ now|] in {zone}", "what[ is|'s|s] the time in {zone}", "<do>tell me the time in {zone}", "how late is it[ now|] in {zone}", "time in {zone}", "time zone {zone}: what time is it", "what does the clock say in {zone}", "<know>what time it is in {zone}", "I need to know the time in {zone}",
            "{zone} time", "what time do they have in {zone}", "what hour is it in {zone}", "in {zone}, what time is it", "<noun>the [current |]time in {zone}", "<know>how late it is in {zone}", "current time {zone}", "what is the [local |]time in {zone} now", "what time is it over in {zone}", "<do>look up the time in {zone}", "<do>check the time in {zone}", "how late [do we have|have they] it in {zone}", "I want to know how late it is in {zone}", "the time zone is {zone}, what time is it", "now in {zone}: what time is it", "what is the hour in {zone}", "time right now, {zone}", "if I call somebody in {zone}, what time is it there", "is it late in {zone}? What time is it there",
            "{zone}: what time is it there", "and in {zone}, how late is it", "what time is it right now in {zone}", "the clock in {zone}, what does it say", "I call {zone}, what is the time there", "the time in {zone}[, please|]", "what is the time over in {zone}", "which time do they have in {zone}", "time at {zone}",
        ],
        held: ["do you know the time in {zone}", "what is the current time in {zone}", "I need the time in {zone}", "what time do we have in {zone}", "in {zone}, how late is it now", "what does the clock say now in {zone}"],
    }
    DATE_THERE {
        train: [
            "what[ is|'s] the date in {zone}", "what date is it in {zone}", "<do>tell me the date in {zone}", "which date do they have in {zone}", "date in {zone}", "<do>tell me today's date in {zone}", "<know>what date it is in {zone}", "in {zone}, what is the date", "<noun>the date in {zone}",
            "what date do they have now in {zone}", "current date {zone}", "what is the date over in {zone}", "and in {zone}, what date is it", "{zone}: which date is it there", "the date in {zone}[, please|]", "<do>look up the date in {zone}", "which date is it now in {zone}", "what day of the month is it in {zone}", "today's date in {zone}", "<noun>today's date in {zone}", "<noun>the current date in {zone}",
        ],
        held: ["do you know the date in {zone}", "what is today's date in {zone}", "can you tell me which date it is in {zone}", "in {zone}, which date do they have", "I need the current date in {zone}"],
    }
    DAY_THERE {
        train: [
            "what day is it in {zone}", "which day of the week is it in {zone}", "what weekday is it in {zone}", "<do>tell me the weekday in {zone}", "<know>what day it is in {zone}", "in {zone}, what day is it", "what day do they have in {zone}", "weekday in {zone}", "<noun>the weekday in {zone}",
            "<noun>the day of the week in {zone}", "and in {zone}, what day is it", "{zone}: which weekday is it there",
        ],
        held: ["do you know what weekday it is in {zone}", "what day of the week is it in {zone}", "tell me which day it is in {zone}", "in {zone}, which weekday do they have"],
    }
    PLACE {
        train: ["{city} ({region})", "{city}, {region}", "{region}/{city}", "{region}/{city}", "{region}/{city}", "{region}, {city}", "{city} in {region}", "{region} - {city}", "{region}: {city}", "{city} / {region}", "{region} {city}", "{region}, in {city}", "{region}; {city}", "{region} \"{city}\"", "region {region}, city {city}", "city {city}, region {region}", "{region} <{city}>", "{region} with {city}", "{city} \"{region}\"", "{region}, more exactly {city}", "{region} = {city}", "{region} (I mean {city})", "{region} (city: {city})", "{region} (near {city})", "{region} (that is, {city})", "{region} (namely {city})"],
        held: ["{region} ({city})", "{region}/{city}"],
    }
}

/// `Tuesday, 2026-03-03 14:05:09 +01:00 (CET)` cut into weekday, date and hours with minutes.
pub fn parts(told: &str) -> [&str; 3] {
    let mut words = told.split([' ', ',']).filter(|word| !word.is_empty());
    let [weekday, date, time] = [(); 3].map(|()| words.next().unwrap_or_default());
    [weekday, date, time.rsplit_once(':').map_or(time, |(minutes, _)| minutes)]
}

/// A call of the clock.
pub fn ask(zone: Option<&str>) -> Action {
    match zone {
        Some(zone) => Action::call("clock", &[("time_zone", zone.into())]),
        None => Action::call("clock", &[]),
    }
}

/// What a request of the clock is for: its place in the forms.
fn answer(what: usize, told: &str, place: &str) -> Action {
    let [weekday, date, time] = parts(told);
    match what {
        0 => Action::say(format!("It is {time}{place}."), &[time]),
        1 => Action::say(format!("It is {weekday}, {date}{place}."), &[date]),
        2 => Action::say(format!("It is {weekday}{place}."), &[weekday]),
        _ => Action::say(format!("It is {weekday}, {date}, {time}."), &[date, time]),
    }
}

/// A zone that does not exist, which the clock says: of names that exist there are too few to learn copying from.
fn nowhere(region: String, draw: &mut Draw) -> Task {
    let city = names::town(draw, Side::Train);
    let named = if draw.chance(50) { city.replace('_', " ") } else { city.clone() };
    let place = PLACE.text(Side::Train, &[("region", &region), ("city", &named)], draw);
    let form = *draw.pick(&[&TIME_THERE, &TIME_THERE, &DATE_THERE, &DAY_THERE]);
    let request = form.request(Side::Train, &[("zone", &place)], draw);
    let zone = format!("{region}/{city}");
    let answer = Action::say(format!("There is no time zone {zone}."), &["no time zone", &zone]);
    Task::single(request, ask(Some(&zone)), move |_| answer.clone())
}

/// See the [module](self).
pub fn task(side: Side, draw: &mut Draw) -> Task {
    if draw.chance(50) {
        let what = *draw.pick(&[0, 0, 1, 1, 2, 2, 3]);
        let form = [&TIME, &DATE, &DAY, &BOTH][what];
        return Task::single(form.request(side, &[], draw), ask(None), move |told| answer(what, told, ""));
    }
    // Which zone a city is in has to be known: in training cities come with their zones and alone, in held-out data with them.
    let (region, city) = names::zone(draw, side);
    if side == Side::Train && draw.chance(25) {
        return nowhere(region, draw);
    }
    let alone = side == Side::Train && draw.chance(30);
    // As people write it; that the zone has no spaces is to be learnt.
    let spaced = side == Side::Train && (alone || draw.chance(50));
    let named = if spaced { city.replace('_', " ") } else { city.clone() };
    let place = if alone { named } else { PLACE.text(side, &[("region", &region), ("city", &named)], draw) };
    let what = *draw.pick(&[0, 0, 0, 1, 2]);
    let request = [&TIME_THERE, &DATE_THERE, &DAY_THERE][what].request(side, &[("zone", &place)], draw);
    Task::single(request, ask(Some(&format!("{region}/{city}"))), move |told| {
        answer(what, told, &format!(" in {}", city.replace('_', " ")))
    })
}
