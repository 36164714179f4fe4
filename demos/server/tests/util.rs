//! A server of its own for each test, and requests to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use gatedelta::qwen::Recovery;
use gatedelta_agent::tools::{Tool, calculator::Calculator};
use gatedelta_server::options::Args;
use gatedelta_server::{Loaded, Server};
use serde_json::{Value, json};
use tokio::sync::oneshot;

pub const MODEL: &str = "gatedelta-agent";

/// The model inside the agent, on the CPU.
pub fn loaded() -> &'static Loaded {
    static LOADED: OnceLock<Loaded> = OnceLock::new();
    LOADED.get_or_init(|| gatedelta_server::load(&Args::parse_from(["server", "--device", "cpu"])).unwrap())
}

/// A server that ends with the value.
pub struct Running {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    agent: ureq::Agent,
    pub key: Option<String>,
    /// One server at a time: the tests watch how long things take.
    _turn: MutexGuard<'static, ()>,
}

/// Starts a server with these options.
pub fn start(options: &str) -> Running {
    start_with(options, None)
}

pub fn start_with(options: &str, key: Option<&str>) -> Running {
    let turn = turn();
    let line = format!("server --device cpu --port 0 {options}");
    let args = Args::parse_from(line.split_whitespace());
    start_on(loaded().recovery.clone(), args, key, turn)
}

/// Starts a server with a model of its own.
pub fn start_own(loaded: &Loaded, options: &str) -> Running {
    let args = Args::parse_from(format!("server --device cpu --port 0 {options}").split_whitespace());
    start_on(loaded.recovery.clone(), args, None, turn())
}

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

fn start_on(recovery: Recovery, args: Args, key: Option<&str>, turn: MutexGuard<'static, ()>) -> Running {
    let (stop, stopped) = oneshot::channel::<()>();
    let (tell, address) = std::sync::mpsc::channel();
    let own = key.map(str::to_string);
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::bind(recovery, &args, own).await.unwrap();
            tell.send(server.address).unwrap();
            server.run(async { drop(stopped.await) }, std::future::pending()).await.unwrap();
        });
        runtime.shutdown_timeout(Duration::from_secs(5));
    });
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(100)));
    Running {
        address: address.recv().unwrap(),
        stop: Some(stop),
        thread: Some(thread),
        agent: config.build().into(),
        key: key.map(str::to_string),
        _turn: turn,
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "the server broke down");
        }
    }
}

/// A response.
pub struct Reply {
    pub status: u16,
    pub retry_after: Option<u64>,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|why| panic!("{why}: {}", self.text))
    }

    /// Its body, which has to be an answer.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// The chunks of a stream, which has to be whole.
    pub fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let data: Vec<&str> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (last, chunks) = data.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }
}

impl Running {
    /// Has it stop as a signal would.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    pub fn get(&self, path: &str) -> Reply {
        let mut request = self.agent.get(format!("http://{}{path}", self.address));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        reply(request.call().unwrap())
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        let mut request = self.agent.post(format!("http://{}{path}", self.address));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        reply(request.send_json(body).unwrap())
    }

    pub fn chat(&self, body: Value) -> Reply {
        self.post("/v1/chat/completions", &with_model(body))
    }

    pub fn complete(&self, body: Value) -> Reply {
        self.post("/v1/completions", &with_model(body))
    }

    /// Bytes on a connection of its own, and all that comes back until the server closes it.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may answer, and close, before it has read everything.
        let _ = stream.write_all(bytes);
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back);
        String::from_utf8_lossy(&back).into_owned()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// A request on a connection of its own whose answer is read line by line.
    pub fn open(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        stream.write_all(head_and_body(path, &body.to_string()).as_bytes()).unwrap();
        BufReader::new(stream)
    }

    /// The value of a gauge or counter.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// Waits until nothing runs or waits any more.
    pub fn quiet(&self) {
        let begin = Instant::now();
        while self.metric("gatedelta_requests_running") + self.metric("gatedelta_requests_waiting") > 0.0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "a request is stuck");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn reply(mut response: ureq::http::Response<ureq::Body>) -> Reply {
    let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
    let status = response.status().as_u16();
    Reply { status, retry_after, text: response.body_mut().read_to_string().unwrap() }
}

fn with_model(mut body: Value) -> Value {
    if body.get("model").is_none() {
        body["model"] = json!(MODEL);
    }
    body
}

pub fn head_and_body(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// Waits for the first event of a stream.
pub fn first_event(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended");
    }
    line
}

/// A completion that goes on until it is ended: what would end it is forbidden.
pub fn endless(tokens: u64, stream: bool) -> Value {
    let bias: serde_json::Map<String, Value> =
        loaded().recovery.model().stop_ids().iter().map(|id| (id.to_string(), json!(-100))).collect();
    json!({"model": MODEL, "prompt": "hello", "max_tokens": tokens, "logit_bias": bias, "stream": stream, "temperature": 0})
}

pub fn system() -> Value {
    json!({"role": "system", "content": gatedelta_agent::options::SYSTEM})
}

pub fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// The tool that the model inside was trained for.
pub fn calculator() -> Value {
    Calculator.spec().to_json()
}
