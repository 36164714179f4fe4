//! The routes: from a request to a job, from its updates to a response.

mod guard;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use gatedelta::qwen::{Model, Place, Recovery};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::error::{ApiError, json_response};
use crate::metrics::Metrics;
use crate::reply::chat::ChatReply;
use crate::reply::completion::CompletionReply;
use crate::reply::{Head, Reply, Usage};
use crate::request::chat::Chat;
use crate::request::completion::{Completion, Prompt};
use crate::request::{Served, Settings, Streaming};
use crate::schedule::{Desk, Failure, Job, Update};

/// What requests may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// For a body to arrive.
    pub body_time: Duration,
    /// From a request to the end of its answer.
    pub time: Duration,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Requests that have a slot.
    pub slots: usize,
}

/// What the routes share.
pub struct App {
    /// The model, and what opens its device again when that is lost.
    pub recovery: Recovery,
    /// The same, as requests see it.
    pub served: Served,
    /// The way to the thread that owns it.
    pub desk: Desk,
    /// What requests may take.
    pub limits: Limits,
    /// What happened.
    pub metrics: Arc<Metrics>,
    /// The key that clients must have, if any.
    pub key: Option<String>,
    /// Only requests that name this machine itself are served: no web page can have a browser ask in its name.
    pub local: bool,
    /// Places for requests that run or wait.
    pub places: Arc<Semaphore>,
    /// New requests are refused.
    pub stopping: AtomicBool,
    /// When it was started.
    pub started: SystemTime,
}

/// Updates on their way to a reader: where it takes none, its answer pauses.
const UPDATES: usize = 256;

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(wrong_method)
        .fallback(nowhere)
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard))
        .with_state(app)
}

async fn nowhere(request: Request) -> ApiError {
    let message = format!("Unknown request URL: {} {}.", request.method(), request.uri().path());
    ApiError { code: Some("unknown_url"), ..ApiError::unreadable(StatusCode::NOT_FOUND, message) }
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("Not allowed to {} on {}.", request.method(), request.uri().path());
    ApiError::unreadable(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_response(StatusCode::OK, &json!({"object": "list", "data": [app.model_object()]}))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    if id == app.served.name {
        json_response(StatusCode::OK, &app.model_object())
    } else {
        ApiError::no_model(&id, &app.served.name).into_response()
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.stopping.load(Ordering::Relaxed) {
        return json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "stopping"}));
    }
    if !app.desk.alive() {
        return json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "the model's thread is gone"}));
    }
    let status = if app.recovery.is_recovering() { "recovering" } else { "ok" };
    let mut health = json!({"status": status});
    let past = app.recovery.past();
    if let Some(last) = past.last() {
        health["device"] = json!({
            "name": last.to,
            "on_cpu": app.recovery.place() == Place::Cpu,
            "losses": app.recovery.losses(),
            "recoveries": past.len(),
            "last": last.to_string(),
        });
    }
    json_response(StatusCode::OK, &health)
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let recovery = &app.recovery;
    app.metrics.device(recovery.losses(), recovery.past().len(), recovery.place() == Place::Cpu);
    match app.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(why) => ApiError::failed(why.to_string()).into_response(),
    }
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let deadline = Instant::now() + app.limits.time;
    let chat = Chat::read(app.json(request).await?, &app.served)?;
    let permit = app.place()?;
    let prompt = blocking({
        let (app, chat) = (app.clone(), chat.clone());
        move || app.chat_prompt(&chat)
    });
    let ChatPrompt { ids, forced, reasoning } = prompt.await?;
    let Chat { settings, streaming, tools, parallel, .. } = chat;
    let head = Head::new("chatcmpl-", &app.served.name, streaming.usage);
    let logprobs = settings.logprobs.is_some();
    let model = app.model();
    let tokenizer = model.tokenizer().map_err(|why| ApiError::failed(why.to_string()))?;
    let reply = ChatReply::new(head, tokenizer, tools, parallel, reasoning, logprobs);
    let ask = Ask { param: "messages", ids, settings, forced, deadline, permit };
    app.answer(ask, streaming, reply).await
}

async fn completion(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let deadline = Instant::now() + app.limits.time;
    let Completion { prompt, settings, streaming } = Completion::read(app.json(request).await?, &app.served)?;
    let permit = app.place()?;
    let ids = match prompt {
        Prompt::Ids(ids) => ids,
        Prompt::Text(text) => {
            blocking({
                let app = app.clone();
                move || app.encode(&text, "prompt")
            })
            .await?
        }
    };
    let head = Head::new("cmpl-", &app.served.name, streaming.usage);
    let model = app.model();
    let tokenizer = model.tokenizer().map_err(|why| ApiError::failed(why.to_string()))?;
    let reply = CompletionReply::new(head, tokenizer, settings.logprobs.is_some());
    let ask = Ask { param: "prompt", ids, settings, forced: Vec::new(), deadline, permit };
    app.answer(ask, streaming, reply).await
}

/// A request that has a place.
struct Ask {
    /// The parameter that the prompt came from.
    param: &'static str,
    ids: Vec<u32>,
    settings: Settings,
    forced: Vec<Vec<u32>>,
    deadline: Instant,
    permit: OwnedSemaphorePermit,
}

struct ChatPrompt {
    ids: Vec<u32>,
    forced: Vec<Vec<u32>>,
    /// The prompt ends inside the model's reasoning.
    reasoning: bool,
}

impl App {
    /// The model, wherever it is now.
    fn model(&self) -> Model {
        self.recovery.model()
    }

    fn model_object(&self) -> Value {
        let created = self.started.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let context = self.model().memory().context;
        json!({
            "id": self.served.name, "object": "model", "created": created, "owned_by": "local", "max_model_len": context,
        })
    }

    /// The body of a request as JSON.
    async fn json(&self, request: Request) -> Result<Value, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        // Anything else a web page may send without asking.
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let message = format!("Unsupported content type {kind:?}: expected 'application/json'.");
            return Err(ApiError::unreadable(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let body = axum::body::to_bytes(request.into_body(), self.limits.body);
        let body = tokio::time::timeout(self.limits.body_time, body).await.map_err(|_| {
            let message = format!("The body did not arrive within {} s.", self.limits.body_time.as_secs_f32());
            ApiError::unreadable(StatusCode::REQUEST_TIMEOUT, message)
        })?;
        let body = body.map_err(|why| {
            let limited = std::error::Error::source(&why).is_some_and(|e| e.is::<http_body_util::LengthLimitError>());
            if limited {
                let message = format!("The body is larger than the {} bytes that this server takes.", self.limits.body);
                ApiError::unreadable(StatusCode::PAYLOAD_TOO_LARGE, message)
            } else {
                ApiError::unreadable(StatusCode::BAD_REQUEST, format!("The body cannot be read: {why}."))
            }
        })?;
        serde_json::from_slice(&body).map_err(|why| {
            let message = format!("We could not parse the JSON body of your request: {why}.");
            ApiError::unreadable(StatusCode::BAD_REQUEST, message)
        })
    }

    /// A place among those that run or wait.
    fn place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("The server is shutting down."));
        }
        let Limits { queue, slots, .. } = self.limits;
        self.places.clone().try_acquire_owned().map_err(|_| ApiError::busy(self.metrics.wait(queue + slots, slots)))
    }

    fn chat_prompt(&self, chat: &Chat) -> Result<ChatPrompt, ApiError> {
        let model = self.model();
        let template = model.chat_template().map_err(|why| ApiError::failed(why.to_string()))?;
        let messages = Value::from(chat.messages.clone());
        let tools = (!chat.described.is_empty()).then(|| Value::from(chat.described.clone()));
        let prompt = template.render(&messages, tools.as_ref(), true, chat.thinking).map_err(|why| match why {
            // The template's own words, without its place on this machine.
            gatedelta::Error::Load { why, .. } => ApiError::invalid("messages", why, "a conversation that it takes"),
            other => ApiError::invalid("messages", other, "a conversation that the template takes"),
        })?;
        let ids = self.encode(&prompt, "messages")?;
        let call = |name: &String| self.encode(&format!("<tool_call>\n<function={name}>\n"), "tool_choice");
        let forced = chat.forced.iter().map(call).collect::<Result<_, _>>()?;
        Ok(ChatPrompt { ids, forced, reasoning: prompt.trim_end().ends_with("<think>") })
    }

    fn encode(&self, text: &str, param: &str) -> Result<Vec<u32>, ApiError> {
        let model = self.model();
        let tokenizer = model.tokenizer().map_err(|why| ApiError::failed(why.to_string()))?;
        tokenizer.encode(text).map_err(|why| ApiError::invalid(param, why, "text that the tokenizer takes"))
    }

    /// Hands in a job and answers with what comes of it.
    async fn answer(&self, ask: Ask, streaming: Streaming, reply: impl Reply + 'static) -> Result<Response, ApiError> {
        let Ask { param, ids, settings, forced, deadline, permit } = ask;
        let context = self.model().memory().context;
        if ids.is_empty() {
            return Err(ApiError::invalid(param, "no tokens", "at least one"));
        }
        if ids.len() as u64 >= context {
            return Err(ApiError::too_long(param, ids.len(), context));
        }
        let prompt = ids.len() as u64;
        let (updates, mut inbox) = mpsc::channel(UPDATES);
        let job = Job { prompt: ids, settings, forced, updates, deadline, permit };
        if !self.desk.submit(job) {
            return Err(gone());
        }
        // Until it has a slot, what goes wrong has a status of its own.
        let cached = match inbox.recv().await {
            Some(Update::Begun { cached }) => cached as u64,
            Some(Update::Failed(why)) => return Err(failure(why, &self.limits)),
            Some(_) | None => return Err(gone()),
        };
        let usage = Usage { prompt, cached, completion: 0 };
        if streaming.stream {
            let limits = self.limits.clone();
            Ok(stream::response(stream::Writing::new(inbox, reply, usage, streaming.usage, limits)))
        } else {
            let mut whole = collect(inbox, reply, usage, &self.limits).await?;
            whole["system_fingerprint"] = Value::Null;
            Ok(json_response(StatusCode::OK, &whole))
        }
    }
}

async fn collect(
    mut inbox: mpsc::Receiver<Update>,
    mut reply: impl Reply,
    mut usage: Usage,
    limits: &Limits,
) -> Result<Value, ApiError> {
    loop {
        match inbox.recv().await {
            Some(Update::Begun { .. }) => {}
            Some(Update::Wrote { text, logprobs }) => drop(reply.wrote(&text, logprobs)),
            Some(Update::Done { end, tokens }) => {
                reply.end(&end);
                usage.completion = tokens;
                return Ok(reply.whole(&usage));
            }
            Some(Update::Failed(why)) => return Err(failure(why, limits)),
            None => return Err(gone()),
        }
    }
}

fn gone() -> ApiError {
    ApiError::unavailable("The model's thread is gone; the server has to be started again.")
}

fn failure(why: Failure, limits: &Limits) -> ApiError {
    match why {
        Failure::Waited => ApiError::timeout(format!("No slot became free within {} s.", limits.time.as_secs_f32())),
        Failure::Shutdown => ApiError::unavailable("The server is shutting down."),
        Failure::Model(why) => ApiError::failed(format!("The model failed: {why}.")),
    }
}

/// Does what takes a while where it keeps no other connection waiting.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(why) => Err(ApiError::failed(format!("The request could not be prepared: {why}."))),
    }
}
