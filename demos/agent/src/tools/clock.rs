//! The time.

use jiff::{ZonedDateTime, tz::TimeZone};
use serde_json::{Map, Value, json};

use super::{Spec, Tool};

/// Where the time comes from.
#[derive(Debug, Clone)]
pub enum Time {
    /// The system: the present, in its time zone.
    System,
    /// It stands still, so that what is made with it can be made again.
    Fixed(ZonedDateTime),
}

impl Time {
    /// The present.
    pub fn now(&self) -> ZonedDateTime {
        match self {
            Time::System => ZonedDateTime::now(),
            Time::Fixed(time) => time.clone(),
        }
    }
}

/// Date and time, here or elsewhere.
pub struct Clock(pub Time);

impl Tool for Clock {
    fn spec(&self) -> Spec {
        let zone =
            json!({"type": "string", "description": "IANA name such as Europe/Berlin; the user's own when left out"});
        Spec::new("clock", "The current date, weekday and time.", &[("time_zone", zone, false)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        let now = match arguments.get("time_zone").and_then(Value::as_str).map(str::trim) {
            None | Some("") => self.0.now(),
            Some(name) => self.0.now().with_time_zone(
                TimeZone::get(name)
                    .map_err(|_| format!("no time zone is called {name:?}; use a name such as Asia/Tokyo"))?,
            ),
        };
        Ok(now.strftime("%A, %Y-%m-%d %H:%M:%S %:z (%Z)").to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(zone: Value) -> Result<String, String> {
        let arguments = zone.as_object().unwrap().clone();
        Clock(Time::System).call(&arguments)
    }

    #[test]
    fn tells_the_time() {
        let utc = at(json!({"time_zone": "UTC"})).unwrap();
        let today = ZonedDateTime::now().with_time_zone(TimeZone::UTC).strftime("%Y-%m-").to_string();
        assert!(utc.contains(&today) && utc.ends_with("+00:00 (UTC)"), "{utc}");
        assert!(at(json!({})).unwrap().contains(':'));
        assert!(at(json!({"time_zone": "Nowhere/Land"})).unwrap_err().contains("Nowhere/Land"));
        assert!(at(json!({"time_zone": "../../etc/passwd"})).is_err());
    }

    #[test]
    fn a_fixed_clock_tells_one_time() {
        let clock = Clock(Time::Fixed("2026-03-01T12:30:00+01:00[Europe/Berlin]".parse().unwrap()));
        let zone = |name: &str| json!({"time_zone": name}).as_object().unwrap().clone();
        assert_eq!(clock.call(&Map::new()).unwrap(), "Sunday, 2026-03-01 12:30:00 +01:00 (CET)");
        assert_eq!(clock.call(&zone("Asia/Tokyo")).unwrap(), "Sunday, 2026-03-01 20:30:00 +09:00 (JST)");
    }
}
