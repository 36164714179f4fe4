//! What every request passes first: whom it asks for, whether it has the key; and last, its response is counted.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::App;
use crate::error::ApiError;

/// Paths that are counted by name; a client shall not make names of its own.
const PATHS: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"];

pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let known = PATHS.iter().find(|known| path == **known).copied().unwrap_or("other");
    let open = path == "/health";
    let response = match check(&app, request.headers(), open) {
        Ok(()) => next.run(request).await,
        Err(why) => why.into_response(),
    };
    app.metrics.response(known, response.status().as_u16());
    response
}

fn check(app: &App, headers: &HeaderMap, open: bool) -> Result<(), ApiError> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    if app.local && !host.is_some_and(is_local) {
        let found = host.unwrap_or("none");
        let message = format!("This server answers to localhost only, and the request's host is '{found}'.");
        return Err(ApiError::unreadable(StatusCode::FORBIDDEN, message));
    }
    match &app.key {
        Some(key) if !open => has_key(headers, key),
        _ => Ok(()),
    }
}

/// A host that names this machine, with or without a port.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn has_key(headers: &HeaderMap, key: &str) -> Result<(), ApiError> {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let given = given.and_then(|value| {
        let (scheme, token) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
    });
    match given {
        None => Err(ApiError::unauthorized("This server needs an API key in the header 'Authorization: Bearer KEY'.")),
        Some(given) if bool::from(given.ct_eq(key.as_bytes())) => Ok(()),
        Some(_) => Err(ApiError::unauthorized("The API key is wrong.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        for host in ["localhost", "LocalHost:80", "127.0.0.1:8080", "127.3.2.1", "[::1]:8080", "[::1]"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com", "10.0.0.1:8080", "127.0.0.1.example.com:80", "[::2]:1"]
        {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn keys() {
        let check = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            has_key(&headers, "secret").map_err(|why| why.status)
        };
        assert_eq!(check(Some("Bearer secret")), Ok(()));
        assert_eq!(check(Some("bearer  secret ")), Ok(()));
        for bad in [None, Some(""), Some("Bearer"), Some("Bearer secre"), Some("Bearer secrets"), Some("Basic secret")]
        {
            assert_eq!(check(bad), Err(StatusCode::UNAUTHORIZED), "{bad:?}");
        }
    }
}
