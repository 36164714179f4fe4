//! `bench --rows`: the operator over the rows of a file that other libraries are timed over too (`compare/`).
//!
//! Inputs and method are theirs: [`crate::counted`] makes the numbers; a row runs once over fresh memory with outputs full of
//! NaN, is compared with float64, and is then timed with other data in the caches before each run.
//!
//! What it is compared with: the float64 answers that `compare/peers_cuda.py` leaves, at sampled tokens and states of every
//! head; without them, for rows small enough, this program's own float64 recurrence at the same places. Numbers that are not
//! finite are looked for everywhere. A row that can be compared with nothing has failed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gatedelta::backend::{Backend, View};
use gatedelta::device::class_name;
use gatedelta::gdn::{Backward, Commit, GradIo, Io, Options, Prefill, Step};
use gatedelta::ops;
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};
use gatedelta::tune;
use half::bf16;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::bench::print_json;
use crate::bench_op::{loaded, stored};
use crate::case::{self, Case, Cotangents};
use crate::counted::{self, Gates, Tensor};
use crate::devices::backend_name;
use crate::table::{Table, error, significant};
use crate::{grads, oracle, oracle_grad, say, timing};

/// Tokens of a row whose outputs are compared, beside the last of each sequence.
const SAMPLES: u64 = 24;
/// Rows of a state of which one is compared.
const STATE_STEP: usize = 32;
/// Tokens times value heads up to which this program computes the answer itself.
const OWN: u64 = 4096;
/// NaN in f32, and twice in f16 and bf16.
const NAN: u32 = 0x7fc0_7fc0;

/// What is asked for.
pub struct Ask<'a> {
    /// Directory of answers.
    pub answers: Option<&'a Path>,
    /// Kinds of rows.
    pub kinds: &'a [String],
    /// How to compute.
    pub options: Options,
    /// Time to measure each row.
    pub seconds: Duration,
    /// Seconds after which no row begins.
    pub within: f64,
}

/// What a row does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    Backward,
    Decode,
}

impl Kind {
    fn parse(name: &str) -> Result<Kind> {
        match name {
            "forward" => Ok(Kind::Forward),
            "backward" => Ok(Kind::Backward),
            "decode" => Ok(Kind::Decode),
            _ => bail!("kind {name:?}: expected forward, backward or decode"),
        }
    }
}

/// One row of the file.
struct Row {
    id: String,
    kind: Kind,
    gates: Gates,
    shape: Shape,
    /// Kind, heads, lengths and gates as the file has them.
    told: Map<String, Value>,
}

/// The file's rows, in its order, and the seed of their inputs.
fn read(path: &Path) -> Result<(Vec<Row>, u64)> {
    let of_file = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(of_file)?;
    let file: Value = serde_json::from_str(&text).with_context(of_file)?;
    let number = |of: &Value, name: &str| of[name].as_u64().with_context(|| format!("{name}: expected a number"));
    let parse = |row: &Value| -> Result<Row> {
        let word = |name: &str| row[name].as_str().with_context(|| format!("{name}: expected a string"));
        let head = |of: &Value, name: &str| -> Result<u32> { Ok(u32::try_from(number(of, name)?)?) };
        let (hk, hv) = (head(row, "hk")?, head(row, "hv")?);
        let heads = Heads::new(hk, hv, head(&file, "k")?, head(&file, "v")?, HeadMap::Div)?;
        let lengths = row["seqlens"].as_array().context("seqlens: expected a list")?;
        let mut cu = vec![0u64];
        for length in lengths {
            let length = length.as_u64().context("seqlens: expected numbers")?;
            cu.push(cu[cu.len() - 1].checked_add(length).context("seqlens: too many tokens")?);
        }
        let kind = Kind::parse(word("kind")?)?;
        ensure!(kind != Kind::Decode || lengths.iter().all(|n| n == 1), "seqlens: expected ones in a decode");
        let mut told = Map::new();
        for name in ["kind", "hk", "hv", "lengths", "gates"] {
            told.insert(name.into(), row[name].clone());
        }
        let (id, gates) = (word("id")?.to_string(), Gates::parse(word("gates")?)?);
        Ok(Row { id, kind, gates, shape: Shape::new(heads, cu)?, told })
    };
    let rows = file["rows"].as_array().with_context(|| format!("{}: rows: expected a list", path.display()))?;
    let seed = number(&file, "seed").with_context(of_file)?;
    let rows =
        rows.iter().enumerate().map(|(i, row)| parse(row).with_context(|| format!("{}: row {i}", path.display())));
    Ok((rows.collect::<Result<_>>()?, seed))
}

/// Runs the rows; true if every answer was right.
///
/// # Errors
/// A file that cannot be used, a kind that does not exist.
pub fn run(backend: &dyn Backend, path: &Path, ask: &Ask<'_>, json: bool) -> Result<bool> {
    ensure!(ask.within >= 0.0, "--within {}: expected a time of 0 or more", ask.within);
    let kinds = ask.kinds.iter().map(|name| Kind::parse(name).context("--kinds")).collect::<Result<Vec<_>>>()?;
    let (mut rows, seed) = read(path)?;
    rows.retain(|row| kinds.contains(&row.kind));
    ensure!(!rows.is_empty(), "{}: no row of these kinds", path.display());
    let (begin, caps) = (Instant::now(), backend.caps());
    let side = format!("gatedelta-{}", backend_name(caps.kind));
    // What the CUDA backend goes by: rows computed otherwise must not pass for these.
    let variable = |name: &str| std::env::var(name).ok().filter(|_| caps.kind == tune::Kind::Cuda);
    let how = json!({
        "store": ask.options.store.to_string(),
        "cut": ask.options.cut,
        "exact": ask.options.exact,
        "scratch_bytes": ask.options.scratch,
        "hopper": caps.kind == tune::Kind::Cuda && variable("GATEDELTA_HOPPER").as_deref() != Some("0"),
        "hopper_cut": variable("GATEDELTA_HOPPER_CUT").and_then(|v| v.parse::<u32>().ok()),
    });
    if json {
        print_json(json!({
            "bench": "peer", "side": side, "device": caps.name, "driver": caps.driver, "class": class_name(caps.class),
            "options": how,
        }));
    }
    let mut table = Table::new(1, &["row", "median ms", "min..max ms", "runs", "error"]);
    let (mut notes, mut right) = (String::new(), true);
    let mut kept = Kept::new(backend, seed, ask.options.store)?;
    let (mut left, mut called) = (Vec::new(), false);
    for (i, row) in rows.iter().enumerate() {
        if begin.elapsed().as_secs_f64() > ask.within {
            left.extend(rows[i..].iter().map(|row| row.id.as_str()));
            break;
        }
        let longest = rows.iter().filter(|r| r.shape.heads == row.shape.heads && r.gates == row.gates);
        let tokens = longest.map(|r| r.shape.tokens()).max().unwrap_or(0);
        let mut line = json!({ "bench": "row", "side": side, "id": row.id });
        let entry = |line: &mut Value, name: &str, value: Value| line[name] = value;
        match kept.prepare(backend, row, tokens).and_then(|()| measure(backend, &kept, row, ask)) {
            Ok(done) => {
                let s = &done.sample;
                if json && !called {
                    // A process's first: what starting costs beyond opening the device.
                    let (first, second) = (done.first, s.median());
                    print_json(json!({
                        "bench": "first_call", "side": side, "id": row.id, "first_call_s": first, "second_call_s": second,
                    }));
                    called = true;
                }
                table.row(vec![
                    row.id.clone(),
                    significant(s.median() * 1e3),
                    format!("{}..{}", significant(s.min() * 1e3), significant(s.max() * 1e3)),
                    s.runs().to_string(),
                    error(done.worst()),
                ]);
                for (name, value) in &row.told {
                    entry(&mut line, name, value.clone());
                }
                let errors: Map<String, Value> = done.errors.iter().map(|(n, e)| ((*n).into(), json!(e))).collect();
                for (name, value) in [
                    ("median_s", json!(s.median())),
                    ("min_s", json!(s.min())),
                    ("max_s", json!(s.max())),
                    ("runs", json!(s.runs())),
                    ("device_clock", json!(s.device_clock)),
                    ("first_call_s", json!(done.first)),
                    ("errors", errors.into()),
                    ("relative_error", json!(done.worst())),
                    ("finite", json!(true)),
                    ("right", json!(done.worst() <= grads::bound(ask.options.store))),
                    ("checked", json!(done.checked)),
                    ("inputs", json!(done.inputs)),
                    ("options", how.clone()),
                ] {
                    entry(&mut line, name, value);
                }
                if done.worst() > grads::bound(ask.options.store) {
                    right = false;
                    notes.push_str(&format!("{}: the answer is wrong: relative error {:.1e}\n", row.id, done.worst()));
                }
            }
            Err(error) => {
                right = false;
                entry(&mut line, "failed", json!(format!("{error:#}")));
                notes.push_str(&format!("{} failed: {error:#}\n", row.id));
            }
        }
        if json {
            print_json(line);
        }
    }
    if json && !left.is_empty() {
        print_json(json!({ "bench": "left", "side": side, "rows": left }));
    } else if !json {
        if !left.is_empty() {
            notes.push_str(&format!("{} rows were not reached in {} s (--within)\n", left.len(), ask.within));
        }
        say(&format!("{side} on {}\n{table}{notes}", caps.name));
    }
    Ok(right)
}

/// Inputs on the device, for as many rows as share them.
struct Kept {
    seed: u64,
    store: Dtype,
    flush: Pass,
    of: Option<(Heads, Gates)>,
    tokens: u64,
    host: Host,
    device: Option<Device>,
}

/// Inputs that are made again from here, or summed up.
#[derive(Default)]
struct Host {
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    g: Vec<f32>,
    beta: Vec<f32>,
}

struct Device {
    q: View,
    k: View,
    v: View,
    g: View,
    beta: View,
}

impl Kept {
    fn new(backend: &dyn Backend, seed: u64, store: Dtype) -> Result<Kept> {
        let flush = timing::flush(backend)?;
        Ok(Kept { seed, store, flush, of: None, tokens: 0, host: Host::default(), device: None })
    }

    /// Has the inputs of the row, and of rows of the same heads of up to `tokens` tokens.
    fn prepare(&mut self, backend: &dyn Backend, row: &Row, tokens: u64) -> Result<()> {
        let heads = row.shape.heads;
        if self.of == Some((heads, row.gates)) && self.tokens >= row.shape.tokens() {
            return Ok(());
        }
        // What is there goes first: both may not fit.
        (self.of, self.device, self.host) = (None, None, Host::default());
        let (qk, vo) = (heads.hk as u64 * tokens, heads.hv as u64 * tokens);
        let (g, beta) = counted::gates(row.gates, self.seed, tokens, heads.hv);
        let host = Host {
            q: counted::unit(Tensor::Q, self.seed, qk, heads.k),
            k: counted::unit(Tensor::K, self.seed, qk, heads.k),
            v: counted::normal(Tensor::V, self.seed, vo, heads.v),
            g,
            beta,
        };
        self.device = Some(Device {
            q: upload(backend, "q", &bytes(&host.q, self.store))?,
            k: upload(backend, "k", &bytes(&host.k, self.store))?,
            v: upload(backend, "v", &bytes(&host.v, self.store))?,
            g: upload(backend, "g", bytemuck::cast_slice(&host.g))?,
            beta: upload(backend, "beta", bytemuck::cast_slice(&host.beta))?,
        });
        (self.of, self.tokens, self.host) = (Some((heads, row.gates)), tokens, host);
        Ok(())
    }

    /// As the other side sums up the row's q, k and v.
    fn checksum(&self, shape: &Shape) -> String {
        let (qk, vo) = widths(&shape.heads);
        let sum = |x: &[bf16], width: u64| counted::bits(&x[..(shape.tokens() * width) as usize]);
        let (k, v) = (sum(&self.host.k, qk).wrapping_mul(3), sum(&self.host.v, vo).wrapping_mul(5));
        format!("{:016x}", sum(&self.host.q, qk).wrapping_add(k).wrapping_add(v))
    }

    /// The row as a case, for the float64 recurrence.
    fn case(&self, row: &Row) -> Case {
        let (shape, (qk, vo)) = (row.shape.clone(), widths(&row.shape.heads));
        let floats =
            |x: &[bf16], width: u64| x[..(shape.tokens() * width) as usize].iter().map(|x| x.to_f32()).collect();
        let gates = |x: &[f32]| x[..(shape.tokens() * shape.heads.hv as u64) as usize].to_vec();
        Case {
            name: row.id.clone(),
            q: floats(&self.host.q, qk),
            k: floats(&self.host.k, qk),
            v: floats(&self.host.v, vo),
            g: gates(&self.host.g),
            beta: gates(&self.host.beta),
            h0: Some(self.states(Tensor::H0, &shape)),
            shape,
            scale: None,
            qk_l2norm: false,
            cut: None,
            large: false,
            answers: None,
            cotangents: None,
            gradients: None,
        }
    }

    /// h0, or the gradient of ht.
    fn states(&self, tensor: Tensor, shape: &Shape) -> Vec<f32> {
        let (heads, by) = (shape.heads, if tensor == Tensor::Dht { 8.0 } else { 1.0 });
        let rows = shape.sequences() as u64 * heads.hv as u64 * heads.k as u64;
        counted::states(tensor, self.seed, rows, heads.v, by)
    }
}

/// Numbers of a token in q and k, and in v and o.
fn widths(heads: &Heads) -> (u64, u64) {
    (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64)
}

fn bytes(numbers: &[bf16], store: Dtype) -> Vec<u8> {
    match store {
        Dtype::Bf16 => bytemuck::cast_slice(numbers).to_vec(),
        _ => stored(&numbers.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), store),
    }
}

fn upload(backend: &dyn Backend, what: &str, bytes: &[u8]) -> Result<View> {
    let view = backend.alloc(what, bytes.len() as u64)?.view();
    backend.write(&view, bytes)?;
    Ok(view)
}

/// Memory for so many numbers that is full of NaN once `pass` has run.
fn fresh(backend: &dyn Backend, pass: &mut Pass, what: &str, numbers: u64, store: Dtype) -> Result<View> {
    let bytes = (numbers * store.size()).next_multiple_of(4);
    let view = backend.alloc(what, bytes)?.view();
    poison(backend, pass, &view)?;
    Ok(view)
}

/// Fills with NaN, in pieces that any device can bind.
fn poison(backend: &dyn Backend, pass: &mut Pass, view: &View) -> Result<()> {
    for at in (0..view.bytes).step_by(64 << 20) {
        let part = view.slice(at, (64 << 20).min(view.bytes - at))?;
        ops::fill(backend.caps(), pass, &part, 0, part.bytes / 4, NAN)?;
    }
    Ok(())
}

/// A tensor that a row gives: its name, where it is, numbers of a token (0 for states), how they are stored.
type Output = (&'static str, View, u64, Dtype);

/// What outputs should be at the sampled places, by their names.
type Wanted = Vec<(String, Vec<f32>)>;

/// One measured row.
struct Done {
    sample: timing::Sample,
    /// Seconds of planning, loading and the first run.
    first: f64,
    errors: Vec<(&'static str, f64)>,
    checked: &'static str,
    /// The checksum of the inputs.
    inputs: String,
}

impl Done {
    fn worst(&self) -> f64 {
        self.errors.iter().map(|e| e.1).fold(0.0, f64::max)
    }
}

fn measure(backend: &dyn Backend, kept: &Kept, row: &Row, ask: &Ask<'_>) -> Result<Done> {
    let device = kept.device.as_ref().context("inputs are on the device")?;
    let (shape, heads, options, store) = (&row.shape, row.shape.heads, &ask.options, kept.store);
    let (tokens, (qk, vo)) = (shape.tokens(), widths(&row.shape.heads));
    let cut = |view: &View, width: u64, store: Dtype| view.slice(0, tokens * width * store.size());
    let packed = |view: &View, width: u64| Ok::<_, gatedelta::Error>(Rows::packed(cut(view, width, store)?, width));
    let (q, k, v) = (packed(&device.q, qk)?, packed(&device.k, qk)?, packed(&device.v, vo)?);
    let gates = heads.hv as u64;
    let (g, beta) = (cut(&device.g, gates, Dtype::F32)?, cut(&device.beta, gates, Dtype::F32)?);
    let (mut pass, mut fill) = (Pass::new(), Pass::new());
    let h0 = upload(backend, "h0", bytemuck::cast_slice(&kept.states(Tensor::H0, shape)))?;
    let mut new = |what, numbers, store| fresh(backend, &mut fill, what, numbers, store);
    let begin;
    let outputs: Vec<Output> = if row.kind == Kind::Backward {
        let d_o = counted::normal(Tensor::DO, kept.seed, tokens * gates, heads.v);
        let dht = kept.states(Tensor::Dht, shape);
        let io = GradIo {
            q,
            k,
            v,
            g,
            beta,
            h0: Some(h0),
            d_o: Rows::packed(upload(backend, "do", &bytes(&d_o, store))?, vo),
            dq: Rows::packed(new("dq", tokens * qk, store)?, qk),
            dk: Rows::packed(new("dk", tokens * qk, store)?, qk),
            dv: Rows::packed(new("dv", tokens * vo, store)?, vo),
            dg: new("dg", tokens * gates, Dtype::F32)?,
            dbeta: new("dbeta", tokens * gates, Dtype::F32)?,
            dstate: upload(backend, "dht", bytemuck::cast_slice(&dht))?,
        };
        begin = filled(backend, &fill)?;
        Backward::new(backend, shape, options, qk.max(vo))?.record(&mut pass, &io)?;
        vec![
            ("dq", io.dq.view, qk, store),
            ("dk", io.dk.view, qk, store),
            ("dv", io.dv.view, vo, store),
            ("dg", io.dg, gates, Dtype::F32),
            ("dbeta", io.dbeta, gates, Dtype::F32),
            ("dh0", io.dstate, 0, Dtype::F32),
        ]
    } else {
        let o = new("o", tokens * vo, store)?;
        let io = Io { q, k, v, g, beta, state: h0, o: Rows::packed(o.clone(), vo) };
        begin = filled(backend, &fill)?;
        if row.kind == Kind::Forward {
            Prefill::new(backend, shape, options, qk.max(vo))?.record(&mut pass, &io)?;
        } else {
            let step = Step::new(backend, shape, &vec![1; shape.sequences()], options, qk.max(vo))?;
            step.record(&mut pass, &io, Commit::Store)?;
        }
        vec![("o", o, vo, store), ("ht", io.state, 0, Dtype::F32)]
    };
    backend.load(&pass)?;
    backend.run(&pass)?;
    backend.wait()?;
    let first = begin.elapsed().as_secs_f64();
    let inputs = kept.checksum(shape);
    let (wanted, checked) = answers(kept, row, ask, &inputs)?;
    let mut errors = Vec::new();
    for (name, view, width, store) in &outputs {
        let found = sample(backend, name, view, *width, *store, shape)?;
        let wanted = wanted.iter().find(|(n, _)| n == name).with_context(|| format!("the answers have no {name}"))?;
        ensure!(
            found.len() == wanted.1.len(),
            "{name}: {} numbers in the answers, expected {}",
            wanted.1.len(),
            found.len()
        );
        errors.push((*name, oracle::error(&found, &wanted.1)));
    }
    let sample = timing::flushed(backend, &pass, &kept.flush, ask.seconds)?;
    Ok(Done { sample, first, errors, checked, inputs })
}

/// When outputs are full of NaN: what comes then is the call.
fn filled(backend: &dyn Backend, fill: &Pass) -> Result<Instant> {
    backend.run(fill)?;
    backend.wait()?;
    Ok(Instant::now())
}

/// The tokens whose outputs are compared: spread evenly, and the last of each sequence.
fn sampled(shape: &Shape) -> Vec<u64> {
    let (tokens, cu) = (shape.tokens(), shape.cu_seqlens());
    let count = SAMPLES.min(tokens);
    let even = (0..count).map(|i| i * (tokens - 1) / count.saturating_sub(1).max(1));
    let mut all: Vec<u64> = even.chain(cu[1..].iter().filter(|&&end| end > 0).map(|end| end - 1)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Every 32nd row of the states.
fn of_states(all: &[f32], heads: &Heads) -> Vec<f32> {
    all.chunks_exact(heads.v as usize).step_by(STATE_STEP).flatten().copied().collect()
}

/// The compared numbers of an output, all of which must be finite.
fn sample(backend: &dyn Backend, name: &str, view: &View, width: u64, store: Dtype, shape: &Shape) -> Result<Vec<f32>> {
    let picked = sampled(shape);
    let (per_row, rows) = match width {
        0 => (shape.heads.v as u64, view.bytes / 4 / shape.heads.v as u64),
        _ => (width, shape.tokens()),
    };
    // Whole states or whole tokens at a time, about 64 MiB.
    let unit = if width == 0 { shape.heads.k as u64 } else { 1 };
    let step = ((64 << 20) / (per_row * store.size() * unit)).max(1) * unit;
    let mut kept = Vec::new();
    for at in (0..rows).step_by(step as usize) {
        let count = step.min(rows - at);
        let size = per_row * store.size();
        let bytes = backend.read(&view.slice(at * size, count * size)?)?.wait()?;
        let bad = not_finite(&bytes, store);
        ensure!(bad == 0, "the answer is wrong: {bad} numbers of {name} are not finite");
        if width == 0 {
            kept.extend(of_states(&loaded(&bytes, store), &shape.heads));
        } else {
            for token in picked.iter().filter(|&&t| (at..at + count).contains(&t)) {
                let from = ((token - at) * size) as usize;
                kept.extend(loaded(&bytes[from..from + size as usize], store));
            }
        }
    }
    Ok(kept)
}

/// How many stored numbers are NaN or infinite: their exponent is all ones.
fn not_finite(bytes: &[u8], store: Dtype) -> usize {
    let halves = |ones: u16| bytes.chunks_exact(2).filter(|b| u16::from_le_bytes([b[0], b[1]]) & ones == ones).count();
    match store {
        Dtype::Bf16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => {
            let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            words.filter(|word| word & 0x7f80_0000 == 0x7f80_0000).count()
        }
    }
}

/// What the row should give at the sampled places, and where that comes from.
fn answers(kept: &Kept, row: &Row, ask: &Ask<'_>, inputs: &str) -> Result<(Wanted, &'static str)> {
    let path: Option<PathBuf> =
        ask.answers.map(|dir| dir.join(row.id.replace(['/', ' '], "_") + ".safetensors")).filter(|path| path.exists());
    if let Some(path) = path {
        let data = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let of_file = || path.display().to_string();
        let (_, header) = SafeTensors::read_metadata(&data).with_context(of_file)?;
        let theirs = header.metadata().as_ref().and_then(|m| m.get("inputs").cloned());
        let theirs = theirs.with_context(|| format!("{}: no inputs", path.display()))?;
        ensure!(inputs == theirs, "{}: answers for other inputs: {theirs}, expected {inputs}", path.display());
        let file = SafeTensors::deserialize(&data).with_context(of_file)?;
        let names = file.names();
        let read = names.into_iter().map(|name| Ok((name.to_string(), case::floats(&file, name)?.1)));
        return Ok((
            read.collect::<Result<_>>().with_context(of_file)?,
            "float64 answers, at sampled tokens and states",
        ));
    }
    let work = row.shape.tokens() * row.shape.heads.hv as u64;
    ensure!(
        work <= OWN,
        "nothing to compare with: no answers for a row of {work} tokens times heads, at most {OWN} without"
    );
    let (mut case, heads) = (kept.case(row), row.shape.heads);
    let picked = sampled(&row.shape);
    let at_tokens = |x: &[f32], width: u64| -> Vec<f32> {
        picked.iter().flat_map(|&t| &x[(t * width) as usize..((t + 1) * width) as usize]).copied().collect()
    };
    let ((qk, vo), gates) = (widths(&heads), heads.hv as u64);
    let own = "this program's float64 recurrence, at sampled tokens and states";
    if row.kind != Kind::Backward {
        let found = oracle::answers(&case);
        return Ok((vec![("o".into(), at_tokens(&found.o, vo)), ("ht".into(), of_states(&found.ht, &heads))], own));
    }
    let d_o = counted::normal(Tensor::DO, kept.seed, row.shape.tokens() * gates, heads.v);
    let d_o = d_o.iter().map(|x| x.to_f32()).collect();
    case.cotangents = Some(Cotangents { d_o, dht: Some(kept.states(Tensor::Dht, &row.shape)) });
    let cotangents = case.cotangents.as_ref().context("cotangents are there")?;
    let found = oracle_grad::gradients(&case, cotangents);
    let dh0 = found.dh0.context("the adjoint has dh0")?;
    let all = [
        ("dq", at_tokens(&found.dq, qk)),
        ("dk", at_tokens(&found.dk, qk)),
        ("dv", at_tokens(&found.dv, vo)),
        ("dg", at_tokens(&found.dg, gates)),
        ("dbeta", at_tokens(&found.dbeta, gates)),
        ("dh0", of_states(&dh0, &heads)),
    ];
    Ok((all.into_iter().map(|(name, numbers)| (name.into(), numbers)).collect(), own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_tokens_are_those_of_the_other_program() {
        // compare/reference.py: sampled([5, 3]), sampled([100, 0, 33]).
        let heads = Heads::new(1, 1, 16, 16, HeadMap::Div).unwrap();
        assert_eq!(sampled(&Shape::new(heads, vec![0, 5, 8]).unwrap()), (0..8).collect::<Vec<_>>());
        let wanted =
            [0, 5, 11, 17, 22, 28, 34, 40, 45, 51, 57, 63, 68, 74, 80, 86, 91, 97, 99, 103, 109, 114, 120, 126, 132];
        assert_eq!(sampled(&Shape::new(heads, vec![0, 100, 100, 133]).unwrap()), wanted);
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let numbers = [0.0, -1.5, f32::NAN, 3e-39, f32::INFINITY, f32::NEG_INFINITY, 6e4];
        for store in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert_eq!(not_finite(&stored(&numbers, store), store), 3, "{store}");
        }
        assert_eq!(not_finite(&NAN.to_le_bytes(), Dtype::F32), 1);
        assert_eq!(not_finite(&NAN.to_le_bytes(), Dtype::Bf16), 2);
        assert_eq!(not_finite(&NAN.to_le_bytes(), Dtype::F16), 2);
    }

    #[test]
    fn the_files_rows_are_flash_qlas_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("compare/rows.json");
        let (rows, seed) = read(&path).unwrap();
        let count = |kind| rows.iter().filter(|r| r.kind == kind && r.gates == Gates::Table).count();
        assert_eq!((count(Kind::Forward), count(Kind::Backward), seed), (9 * 19, 4 * 8, 7));
        assert!(rows.iter().any(|r| r.kind == Kind::Decode) && rows.iter().any(|r| r.gates == Gates::Spread));
        assert_eq!(rows[0].shape.cu_seqlens(), [0, 32768]);
    }
}
