//! What the model may call.

use serde_json::{Value, json};

/// What the model is told about a tool.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, unique.
    pub name: String,
    /// What it does and gives back, for the model.
    pub description: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}
impl Spec {
    /// The form that chat templates take.
    pub fn to_json(&self) -> Value {
        json!({"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters,
        }})
    }
}
