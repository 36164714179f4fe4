//! Times a whole model with random weights: loading, reading a prompt, writing an answer.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use gatedelta::backend::Backend;
use gatedelta::qwen::{Config, Model};
use serde_json::json;

use crate::bench::print_json;
use crate::peak::Peak;
use crate::say;
use crate::table::{bytes, significant};
use crate::timing::Sample;

/// Ids of the prompt.
const PROMPT: usize = 512;

/// Ids of the answer that are timed, one by one.
const ANSWER: usize = 32;
