//! The time.

use jiff::{Timestamp, tz::TimeZone};
use serde_json::{Map, Value, json};

use super::{Spec, Tool};

/// Date and time, here or elsewhere.
pub struct Clock;

impl Tool for Clock {
    fn spec(&self) -> Spec {
        let zone =
            json!({"type": "string", "description": "IANA name such as Europe/Berlin; the user's own when left out"});
        Spec::new("clock", "The current date, weekday and time.", &[("time_zone", zone, false)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        let zone = match arguments.get("time_zone").and_then(Value::as_str).map(str::trim) {
            None | Some("") => TimeZone::system(),
            Some(name) => TimeZone::get(name)
                .map_err(|_| format!("no time zone is called {name:?}; use a name such as Asia/Tokyo"))?,
        };
        let now = Timestamp::now().to_zoned_datetime(zone);
        Ok(now.strftime("%A, %Y-%m-%d %H:%M:%S %:z (%Z)").to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(zone: Value) -> Result<String, String> {
        let arguments = zone.as_object().unwrap().clone();
        Clock.call(&arguments)
    }

    #[test]
    fn tells_the_time() {
        let utc = at(json!({"time_zone": "UTC"})).unwrap();
        let today = Timestamp::now().strftime("%Y-%m-").to_string();
        assert!(utc.contains(&today) && utc.ends_with("+00:00 (UTC)"), "{utc}");
        assert!(at(json!({})).unwrap().contains(':'));
        assert!(at(json!({"time_zone": "Nowhere/Land"})).unwrap_err().contains("Nowhere/Land"));
        assert!(at(json!({"time_zone": "../../etc/passwd"})).is_err());
    }
}
