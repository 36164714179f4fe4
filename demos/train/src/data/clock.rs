//! Requests for the time.

use crate::data::grammar::forms;
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

forms! {
    TIME {
        train: [
            "what time is it", "what[ is|'s|s] the time", "tell me the time", "how late is it", "do you know what time it is", "what does the clock say", "time",
            "current time", "can you tell me the time", "I need to know the time", "what time do we have",
        ],
        held: ["do you know the time", "what is the current time", "can you tell me what time it is", "I need the time"],
    }
    DATE {
        train: [
            "what[ is|'s] the date", "what date is it", "what is today's date", "tell me the date", "which date do we have", "date", "I need to know today's date",
            "can you tell me the date", "current date",
        ],
        held: ["do you know the date", "what date do we have", "tell me today's date", "what is the current date"],
    }
    DAY {
        train: ["what day is it", "which day of the week is it", "what weekday is it", "tell me the weekday", "is it a weekday, which one", "what day of the week do we have", "which weekday do we have"],
        held: ["what day of the week is it", "do you know what weekday it is", "tell me which day of the week it is"],
    }
    TIME_THERE {
        train: [
            "what time is it in {zone}", "what[ is|'s|s] the time in {zone}", "tell me the time in {zone}", "how late is it in {zone}", "time in {zone}",
            "time zone {zone}: what time is it", "what does the clock say in {zone}", "can you tell me what time it is in {zone}", "I need to know the time in {zone}", "{zone} time",
        ],
        held: ["do you know the time in {zone}", "what is the current time in {zone}", "I need the time in {zone}", "what time do we have in {zone}"],
    }
    DATE_THERE {
        train: ["what[ is|'s] the date in {zone}", "what date is it in {zone}", "tell me the date in {zone}", "which date do they have in {zone}", "date in {zone}", "can you tell me today's date in {zone}"],
        held: ["do you know the date in {zone}", "what is today's date in {zone}", "can you tell me the date in {zone}"],
    }
    PLACE {
        train: ["{city} ({region})", "{city}, {region}", "{region}/{city}", "{region}/{city}", "{region}, {city}"],
        held: ["{region} ({city})"],
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

/// See the [module](self).
pub fn task(side: Side, draw: &mut Draw) -> Task {
    let what = draw.below(5);
    if what < 3 {
        let form = [&TIME, &DATE, &DAY][what];
        return Task::single(form.request(side, &[], draw), ask(None), move |told| {
            let parts = parts(told);
            match what {
                0 => Action::say(format!("It is {}.", parts[2]), &parts[2..]),
                1 => Action::say(format!("It is {}, {}.", parts[0], parts[1]), &parts[1..2]),
                _ => Action::say(format!("It is {}.", parts[0]), &parts[..1]),
            }
        });
    }
    let (region, city) = names::zone(draw, side);
    let zone = format!("{region}/{city}");
    let place = match side {
        // Half of the held-out zones are asked for as they are called.
        Side::HeldOut if draw.chance(50) => zone.clone(),
        _ => PLACE.text(side, &[("region", &region), ("city", &city)], draw),
    };
    let form = if what == 3 { &TIME_THERE } else { &DATE_THERE };
    let request = form.request(side, &[("zone", &place)], draw);
    Task::single(request, ask(Some(&zone)), move |told| {
        let [weekday, date, time] = parts(told);
        match what {
            3 => Action::say(format!("It is {time} in {city}."), &[time]),
            _ => Action::say(format!("It is {weekday}, {date} in {city}."), &[date]),
        }
    })
}
