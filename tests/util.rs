//! Devices under test, case files, seeded inputs, and the measure of error.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::gdn::{Inputs, Options};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};

/// A device under test.
pub struct Device {
    pub name: &'static str,
    pub backend: Arc<dyn Backend>,
}

/// The CPU; lavapipe as it is; lavapipe taken for a GPU and held to WebGPU's default limits; and the CUDA kernels on the stand-in
/// for the driver. `GATEDELTA_TEST_DEVICE=cuda` takes this machine's CUDA device in the place of all but the CPU, `emulator` the
/// stand-in alone.
pub fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let mut devices = vec![Device { name: "cpu", backend: Arc::new(Cpu::new(None).unwrap()) }];
        match std::env::var("GATEDELTA_TEST_DEVICE").as_deref() {
            Ok("cuda") => devices.push(crate::cuda::device("cuda").unwrap()),
            Ok("emulator") => devices.push(crate::cuda::emulator().unwrap()),
            Ok(other) => panic!("GATEDELTA_TEST_DEVICE is {other:?}, not cuda or emulator"),
            Err(_) => {
                devices.extend(lavapipe());
                match crate::cuda::emulator() {
                    Ok(device) => devices.push(device),
                    Err(why) => skipped("emulator", &why),
                }
            }
        }
        devices
    })
}

/// The software driver as it is, with the kernels for drivers in software; and held to WebGPU's default limits, with the
/// kernels for GPUs. `GATEDELTA_TEST_ADAPTER` names another adapter to test
/// instead: any part of its name.
#[cfg(feature = "webgpu")]
fn lavapipe() -> Vec<Device> {
    use gatedelta::backend::webgpu::{DeviceType, OpenOptions, WebGpu};
    let wanted = std::env::var("GATEDELTA_TEST_ADAPTER").unwrap_or("llvmpipe".into()).to_lowercase();
    let adapters = WebGpu::enumerate();
    let Some(found) = adapters.found.iter().find(|f| f.caps.name.to_lowercase().contains(&wanted)) else {
        let names: Vec<&str> = adapters.found.iter().map(|f| f.caps.name.as_str()).collect();
        skipped("lavapipe", &format!("no adapter named {wanted:?} among {names:?} {}", adapters.why_none));
        return Vec::new();
    };
    let open = |options| -> Arc<dyn Backend> { Arc::new(WebGpu::open(found, &options).unwrap()) };
    let as_gpu = OpenOptions { default_limits: true, device_type: Some(DeviceType::Other), ..OpenOptions::default() };
    vec![
        Device { name: "lavapipe", backend: open(OpenOptions::default()) },
        Device { name: "lavapipe as a GPU with default limits", backend: open(as_gpu) },
    ]
}

#[cfg(not(feature = "webgpu"))]
fn lavapipe() -> Vec<Device> {
    skipped("lavapipe", "built without the feature webgpu");
    Vec::new()
}

/// Says that a test is skipped, or fails if `GATEDELTA_REQUIRE` names what it lacks.
pub fn skipped(what: &str, why: &str) {
    let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|r| r.trim() == what), "{what} is required: {why}");
    println!("skipped: {what}: {why}");
}

/// Relative L2 error against float64; infinite if anything is NaN or the lengths differ.
pub fn error(found: &[f32], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let norm: f64 = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let diff: f64 = found.iter().zip(expected).map(|(&f, &e)| (f64::from(f) - e).powi(2)).sum::<f64>().sqrt();
    if norm == 0.0 { diff } else { diff / norm }
}

/// The largest error that this way of storing q, k, v and o may show.
pub fn bound(store: Dtype) -> f64 {
    match store {
        Dtype::F32 => 1e-5,
        Dtype::F16 => 1e-3,
        Dtype::Bf16 => 5e-3,
    }
}

/// Numbers drawn from a seed, the same on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        // splitmix64 (Steele, Lea, Flood 2014)
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, to bf16 so that every way of storing it is exact.
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        let x = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        half::bf16::from_f64(x).to_f32()
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// A batch that owns its numbers.
#[derive(Clone)]
pub struct Batch {
    pub shape: Shape,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub g: Vec<f32>,
    pub beta: Vec<f32>,
    pub h0: Option<Vec<f32>>,
    pub options: Options,
}

impl Batch {
    /// Random inputs as a model has them: q and k normed inside, gates from none at all (head 0) to fast (the last head).
    pub fn random(heads: Heads, lens: &[u64], h0: bool, seed: u64) -> Self {
        let mut r = Random::new(seed);
        let cu = std::iter::once(0).chain(lens.iter().scan(0, |t, n| {
            *t += n;
            Some(*t)
        }));
        let shape = Shape::new(heads, cu.collect()).unwrap();
        let t = shape.tokens() as usize;
        let (hk, hv, k, v) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
        let rate = |h: usize| if hv > 1 { 16.0 * (h as f64 / (hv - 1) as f64).powi(3) } else { 0.5 };
        Batch {
            q: r.normals(t * hk * k),
            k: r.normals(t * hk * k),
            v: r.normals(t * hv * v),
            g: (0..t * hv).map(|i| (-rate(i % hv) * (r.unit() + 0.05)) as f32).collect(),
            beta: (0..t * hv).map(|_| r.unit() as f32).collect(),
            h0: h0.then(|| r.normals(shape.sequences() * heads.state_len() as usize)),
            options: Options { qk_l2norm: true, ..Options::default() },
            shape,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            shape: self.shape.clone(),
            q: &self.q,
            k: &self.k,
            v: &self.v,
            g: &self.g,
            beta: &self.beta,
            h0: self.h0.as_deref(),
            options: self.options,
        }
    }

    /// Tokens `range` of a batch of one sequence, starting from `h0`.
    pub fn part(&self, range: std::ops::Range<usize>, h0: Option<Vec<f32>>) -> Self {
        assert_eq!(self.shape.sequences(), 1);
        let h = self.shape.heads;
        let cut = |x: &[f32], width: u32| x[range.start * width as usize..range.end * width as usize].to_vec();
        Batch {
            shape: Shape::one(h, range.len() as u64),
            q: cut(&self.q, h.hk * h.k),
            k: cut(&self.k, h.hk * h.k),
            v: cut(&self.v, h.hv * h.v),
            g: cut(&self.g, h.hv),
            beta: cut(&self.beta, h.hv),
            h0,
            options: self.options,
        }
    }
}

/// `heads(hk, hv, k, v)` with the first head map.
pub fn heads(hk: u32, hv: u32, k: u32, v: u32) -> Heads {
    Heads::new(hk, hv, k, v, HeadMap::Div).unwrap()
}

/// A folder of `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A case file: inputs and the answers o, ht.
pub struct Case {
    pub name: String,
    pub batch: Batch,
    pub o: Vec<f64>,
    pub ht: Vec<f64>,
    pub d_o: Vec<f32>,
    pub dht: Vec<f32>,
    /// Answers dq, dk, dv, dg, dbeta, and dh0 where there is an h0, by name.
    pub grads: Vec<(&'static str, Vec<f64>)>,
}

/// Every file in `tests/golden/cases`.
pub fn cases() -> Vec<Case> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(golden("cases"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 10, "the case files are missing");
    paths.iter().map(|p| case(p)).collect()
}

fn case(path: &Path) -> Case {
    let bytes = std::fs::read(path).unwrap();
    let (_, meta) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let meta = meta.metadata().clone().unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let dims = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    let get = |name: &str| -> Option<Vec<f32>> {
        file.tensor(name).ok().map(|t| bytemuck::allocation::pod_collect_to_vec(t.data()))
    };
    let cu: Vec<i32> = bytemuck::allocation::pod_collect_to_vec(file.tensor("cu_seqlens").unwrap().data());
    let (q, v) = (dims("q"), dims("v"));
    let wide = |name: &str| get(name).unwrap().into_iter().map(f64::from).collect();
    Case {
        name: path.file_stem().unwrap().to_string_lossy().into_owned(),
        batch: Batch {
            shape: Shape::new(
                heads(q[1] as u32, v[1] as u32, q[2] as u32, v[2] as u32),
                cu.iter().map(|&c| c as u64).collect(),
            )
            .unwrap(),
            q: get("q").unwrap(),
            k: get("k").unwrap(),
            v: get("v").unwrap(),
            g: get("g").unwrap(),
            beta: get("beta").unwrap(),
            h0: get("h0"),
            options: Options {
                scale: Some(meta["scale"].parse().unwrap()),
                qk_l2norm: meta["qk_l2norm"] == "true",
                store: Dtype::F32,
                ..Options::default()
            },
        },
        o: wide("o"),
        ht: wide("ht"),
        d_o: get("do").unwrap(),
        dht: get("dht").unwrap(),
        grads: ["dq", "dk", "dv", "dg", "dbeta", "dh0"]
            .into_iter()
            .filter(|name| *name != "dh0" || get("h0").is_some())
            .map(|name| (name, wide(name)))
            .collect(),
    }
}
