//! Answers as server-sent events: one chunk an event, `[DONE]` at the end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::Value;
use tokio::sync::mpsc;

use super::{Limits, failure, gone};
use crate::reply::{Reply, Usage};
use crate::schedule::Update;

/// So often something is sent while a long prompt is read: connections that say nothing are closed on the way.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An answer on its way. Dropping it ends the job.
pub struct Writing<R> {
    inbox: mpsc::Receiver<Update>,
    reply: R,
    usage: Usage,
    /// The client wants the usage.
    tell_usage: bool,
    limits: Limits,
    ready: VecDeque<String>,
    over: bool,
}

impl<R: Reply> Writing<R> {
    /// An answer that has a slot.
    pub fn new(inbox: mpsc::Receiver<Update>, mut reply: R, usage: Usage, tell_usage: bool, limits: Limits) -> Self {
        let ready = texts(reply.begin());
        Writing { inbox, reply, usage, tell_usage, limits, ready, over: false }
    }

    /// The data of the next event; none at the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.pop_front() {
                return Some(text);
            }
            if self.over {
                return None;
            }
            match self.inbox.recv().await {
                Some(Update::Begun { .. }) => {}
                Some(Update::Wrote { text, logprobs }) => self.ready = texts(self.reply.wrote(&text, logprobs)),
                Some(Update::Done { end, tokens }) => {
                    self.usage.completion = tokens;
                    self.ready = texts(self.reply.end(&end));
                    if self.tell_usage {
                        self.ready.push_back(self.reply.usage_chunk(&self.usage).to_string());
                    }
                    self.end();
                }
                Some(Update::Failed(why)) => {
                    self.ready.push_back(failure(why, &self.limits).body().to_string());
                    self.end();
                }
                None => {
                    self.ready.push_back(gone().body().to_string());
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.ready.push_back("[DONE]".to_string());
        self.over = true;
    }
}

fn texts(chunks: Vec<Value>) -> VecDeque<String> {
    chunks.iter().map(Value::to_string).collect()
}

/// The response that sends it.
pub fn response<R: Reply + 'static>(writing: Writing<R>) -> Response {
    let events = unfold(writing, |mut writing| async move {
        let data = writing.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), writing))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
