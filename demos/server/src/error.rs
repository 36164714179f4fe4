//! Errors as OpenAI's API gives them.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// The status of the response.
    pub status: StatusCode,
    /// `type` of the error.
    pub kind: &'static str,
    /// `code` of the error.
    pub code: Option<&'static str>,
    /// The parameter that it is about, as a path such as `messages[0].role`.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// Seconds after which another try makes sense.
    pub retry_after: Option<u64>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        ApiError { status, kind, code, param: None, message, retry_after: None }
    }

    fn of(mut self, param: &str) -> Self {
        self.param = Some(param.to_string());
        self
    }

    /// A request that cannot be read at all.
    pub fn unreadable(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, INVALID, None, message.into())
    }

    /// A parameter that holds something else than it should.
    pub fn invalid(param: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Self {
        let message = format!("Invalid '{param}': found {found}, expected {expected}.");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_value"), message).of(param)
    }

    /// A parameter of the wrong type.
    pub fn wrong_type(param: &str, found: &Value, expected: &str) -> Self {
        let message = format!("Invalid type for '{param}': expected {expected}, but got {} instead.", kind_of(found));
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_type"), message).of(param)
    }

    /// A parameter that is not there.
    pub fn missing(param: &str) -> Self {
        let message = format!("Missing required parameter: '{param}'.");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("missing_required_parameter"), message).of(param)
    }

    /// A parameter that OpenAI's API has and this server cannot serve.
    pub fn unsupported(param: &str, why: &str) -> Self {
        let message = format!("Unsupported parameter: '{param}': {why}.");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("unsupported_parameter"), message).of(param)
    }

    /// A parameter that nobody knows.
    pub fn unknown(param: &str) -> Self {
        let message = format!("Unknown parameter: '{param}'.");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("unknown_parameter"), message).of(param)
    }

    /// A prompt that leaves no room for an answer.
    pub fn too_long(param: &str, tokens: usize, context: u64) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens, and an answer needs at least one of them. However, \
             your request has {tokens} tokens. Please reduce its length."
        );
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded"), message).of(param)
    }

    /// A model that is not served.
    pub fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("The model '{asked}' does not exist; this server has '{served}'.");
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message).of("model")
    }

    /// No API key, or a wrong one.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key"), message.to_string())
    }

    /// More requests than may wait.
    pub fn busy(retry_after: u64) -> Self {
        let message = format!("All slots are busy and as many requests wait as may. Try again in {retry_after} s.");
        let busy = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message);
        ApiError { retry_after: Some(retry_after), ..busy }
    }

    /// The server cannot answer now: it is stopping, or its worker is gone.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable"), message.into())
    }

    /// The request ran out of time before its answer began.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout"), message.into())
    }

    /// The model or the device failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message.into())
    }

    /// The body of the response.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.body());
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A response that holds JSON.
pub fn json_response(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The type of a JSON value in words.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
