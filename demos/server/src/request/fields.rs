//! The parameters of one JSON object, taken out one by one: what is left at the end was not known.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// See the [module](self).
pub struct Fields {
    /// How errors name the object; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The parameters of an object.
    ///
    /// # Errors
    /// If the value is no object.
    pub fn new(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { path, map }),
            other if path.is_empty() => Err(ApiError::wrong_type("body", &other, "an object")),
            other => Err(ApiError::wrong_type(&path, &other, "an object")),
        }
    }

    /// How errors name one of the parameters.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a parameter; none where it is absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Takes one that must be there.
    pub fn required(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| ApiError::missing(&self.path(name)))
    }

    /// Takes a string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), &other, "a string")),
        }
    }

    /// Takes a boolean.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), &other, "a boolean")),
        }
    }

    /// Takes a number within bounds.
    pub fn number(&mut self, name: &str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (low..=high).contains(&number) => Ok(Some(number as f32)),
            Some(number) => Err(ApiError::invalid(&self.path(name), number, format!("{low} to {high}"))),
            None => Err(ApiError::wrong_type(&self.path(name), &value, "a number")),
        }
    }

    /// Takes a whole number within bounds.
    pub fn whole(&mut self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if (low..=high).contains(&number) => Ok(Some(number)),
            None if !value.is_number() => Err(ApiError::wrong_type(&self.path(name), &value, "an integer")),
            _ => Err(ApiError::invalid(&self.path(name), value, format!("a whole number from {low} to {high}"))),
        }
    }

    /// Takes an array.
    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), &other, "an array")),
        }
    }

    /// Takes an object.
    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(ApiError::wrong_type(&self.path(name), &other, "an object")),
        }
    }

    /// Takes parameters that nothing depends on.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.shift_remove(*name);
        }
    }

    /// Takes a parameter that is known and not supported, but for the values that change nothing.
    pub fn refuse(&mut self, name: &str, harmless: impl Fn(&Value) -> bool, why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !harmless(&value) => Err(ApiError::unsupported(&self.path(name), why)),
            _ => Ok(()),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// Naming the first parameter that nobody took.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            Some(name) => Err(ApiError::unknown(&self.path(name))),
            None => Ok(()),
        }
    }
}
