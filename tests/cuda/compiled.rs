//! The compiled kernels: there is one for everything that `choose` may ask for, made from the sources as they are, and within a
//! budget of registers' overflow.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use gatedelta::backend::cuda::{choose, families};
use gatedelta::kernel::{self, Kernel};
use gatedelta::shape::{Dtype, HeadMap, Heads};
use gatedelta::tune::{self, Caps, Class, Kind};

use crate::util::skipped;

fn cuda() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// The checksum of POSIX's `cksum`.
fn checksum(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: u8| {
        (0..8).fold(crc ^ u32::from(byte) << 24, |c, _| if c >> 31 == 1 { c << 1 ^ 0x04c1_1db7 } else { c << 1 })
    };
    let mut crc = bytes.iter().fold(0, |crc, &b| step(crc, b));
    let mut length = bytes.len();
    while length > 0 {
        crc = step(crc, (length & 0xff) as u8);
        length >>= 8;
    }
    !crc
}

/// The sources, as paths from `cuda/`.
fn sources() -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["", "hopper/"] {
        for entry in std::fs::read_dir(cuda().join(dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".cu") || name.ends_with(".cuh") {
                found.push(format!("{dir}{name}"));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn the_compiled_kernels_are_those_of_the_sources() {
    assert_eq!(checksum(b"123456789"), 930_766_865, "the value of POSIX");
    let listed = std::fs::read_to_string(cuda().join("compiled/sources")).unwrap();
    let mut listed: Vec<String> = listed.lines().map(String::from).collect();
    listed.sort_by_key(|line| line.split(' ').nth(2).map(String::from));
    let found: Vec<String> = sources()
        .iter()
        .map(|name| {
            let bytes = std::fs::read(cuda().join(name)).unwrap();
            format!("{} {} {name}", checksum(&bytes), bytes.len())
        })
        .collect();
    assert_eq!(listed, found, "sh cuda/build.sh renews cuda/compiled");
}

#[test]
fn together_they_are_small() {
    let bytes: u64 =
        families().map(|f| std::fs::metadata(cuda().join(format!("compiled/{f}.fatbin"))).unwrap().len()).sum();
    // 4 MiB, and 512 KiB for attention on the matrix units and what is Hopper's alone.
    assert!(bytes <= (4 << 20) + (512 << 10), "{bytes} bytes");
}

/// What the compiler said of each kernel: family, then (kernel, architecture), then registers, bytes of stack, bytes spilled.
fn resources(dir: &Path, family: &str) -> BTreeMap<(String, String), [u32; 3]> {
    let path = dir.join(format!("{family}.txt"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |i: usize| words[i].parse().unwrap();
            ((words[0].into(), words[1].into()), [number(2), number(3), number(4)])
        })
        .collect()
}

const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// Bytes of stack that a kernel may have: none, but for those whose name starts like this.
const STACK: &[(&str, u32)] = &[];

/// Nothing spills, and every kernel is there for every architecture.
fn check_resources(dir: &Path) {
    for family in families() {
        let found = resources(dir, family);
        let names: BTreeSet<&str> = found.keys().map(|(name, _)| name.as_str()).collect();
        assert!(!names.is_empty(), "{family}");
        let architectures = if family.starts_with("hopper") { &["sm_90a"][..] } else { &ARCHITECTURES };
        for name in names {
            for arch in architectures {
                let Some([registers, stack, spills]) = found.get(&(name.into(), (*arch).into())) else {
                    panic!("{name} of cuda/{family}.cu is not compiled for {arch}");
                };
                let most = STACK.iter().find(|(start, _)| name.starts_with(start)).map_or(0, |(_, most)| *most);
                assert!(
                    *stack <= most && *spills == 0,
                    "{name}, {arch}: {registers} registers, {stack} stack, {spills} spilled"
                );
            }
        }
    }
}

#[test]
fn nothing_spills() {
    check_resources(&cuda().join("compiled"));
}

/// Compiles everything where there is a compiler (the variable NVCC, or nvcc in the PATH), kernels that are not chosen yet too.
#[test]
fn every_kernel_compiles_for_every_architecture() {
    let nvcc = std::env::var("NVCC").unwrap_or("nvcc".into());
    if std::process::Command::new(&nvcc).arg("--version").output().is_err() {
        return skipped("nvcc", &format!("there is no compiler {nvcc} for the CUDA kernels"));
    }
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-compiled");
    let script = cuda().join("build.sh");
    let mut build = std::process::Command::new("sh");
    let built = build.arg(&script).env("NVCC", &nvcc).env("OUT", &out).env("HOPPER_ALL", "1").output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    check_resources(&out);
}

fn caps() -> Caps {
    Caps {
        name: "a CUDA device".into(),
        driver: String::new(),
        kind: Kind::Cuda,
        class: Class::Discrete,
        max_binding: 8 << 30,
        max_buffer: 8 << 30,
        align: 256,
        workgroup_memory: 48 << 10,
        workgroup_threads: 1024,
        subgroup: Some((32, 32)),
        f16: true,
        threads: 0,
        memory: Some(8 << 30),
    }
}

/// In proportion to tokens and heads from what 4096 tokens of 16 may take, and a small part of the device.
#[test]
fn scratch_of_a_backward_pass_grows_with_its_work() {
    let caps = Caps { max_buffer: 128 << 30, ..caps() };
    let of = |tokens: u64, hv: u32| {
        let tile = tune::grad_tile(&caps, &Heads::new(1, hv, 128, 128, HeadMap::Div).unwrap(), tokens);
        (tile.grad_scratch, tile.grad_states)
    };
    let (scratch, states) = of(4096, 16);
    assert!(scratch + states < 200_000_000, "{scratch} and {states} bytes");
    assert_eq!(of(1, 1), (scratch, states), "no less for less");
    assert_eq!(of(8192, 16), (2 * scratch, 2 * states));
    assert_eq!(of(8192, 32), (4 * scratch, 4 * states));
    let (most, _) = of(u64::MAX, 16);
    assert!(most > 20 * scratch && most <= caps.max_buffer / 32, "{most} bytes");
}

/// Large devices read more tokens at a time, so that a product has tiles for all multiprocessors.
#[test]
fn pieces_of_a_prompt_grow_with_the_device() {
    let of = |memory: Option<u64>| tune::prefill_tokens(&Caps { memory, ..caps() });
    assert_eq!([None, Some(8 << 30)].map(of), [512, 512]);
    assert_eq!([Some(16_900_000_000), Some(24 << 30), Some(48 << 30)].map(of), [2048; 3]);
    assert_eq!([Some(80 << 30), Some(141 << 30)].map(of), [4096; 2]);
}

/// Chunks of a segment of one sequence of 128 chunks, by value heads: f32 alone, and few heads of it.
#[test]
fn prefills_in_f32_are_cut_where_heads_are_few() {
    let span = |hv: u32, store: Dtype| {
        let tile = tune::prefill_tile(&caps(), &Heads::new(16, hv, 128, 128, HeadMap::Div).unwrap(), store);
        let cells = u64::from(hv * 128 / tile.dv_tile);
        tile.cut.map_or(u64::MAX, |cut| cut.span(128, 128, cells))
    };
    assert_eq!([16, 32, 64].map(|hv| span(hv, Dtype::F32)), [11, 22, u64::MAX]);
    assert_eq!([Dtype::F16, Dtype::Bf16].map(|store| span(16, store)), [u64::MAX; 2]);
}

/// Everything that the builders may ask for is compiled: for all head sizes, types and counts.
#[test]
fn every_choice_is_compiled() {
    let compiled: BTreeMap<&str, BTreeSet<String>> = families()
        .map(|f| (f, resources(&cuda().join("compiled"), f).into_keys().map(|(name, _)| name).collect()))
        .collect();
    let caps = caps();
    let mut chosen = BTreeSet::new();
    let mut check = |kernel: &'static Kernel, consts: &[(&str, u32)]| {
        let names: Vec<&str> = kernel.consts.iter().map(|f| f.name).collect();
        let given: Vec<&str> = consts.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, given, "consts of {}", kernel.name);
        let values: Vec<u32> = consts.iter().map(|(_, value)| *value).collect();
        let choice = choose(kernel, &values).unwrap_or_else(|e| panic!("{consts:?}: {e}"));
        assert!(compiled[choice.family].contains(&choice.name), "{choice:?}");
        chosen.insert(choice.name);
    };
    for (k, v) in (1..=16).flat_map(|k| (1..=16).map(move |v| (16 * k, 16 * v))) {
        let heads = Heads::new(2, 4, k, v, HeadMap::Div).unwrap();
        let t = tune::tile(&caps, &heads);
        let (chunk, dk, dv) = (("chunk", t.chunk), ("dk", k), ("dv", v));
        for ty in 0..3 {
            let (qk, vt, l2) = (("qk_type", ty), ("v_type", ty), ("l2norm", 1));
            let columns = |n: u32| ("dv_tile", n);
            let lanes = |n: u32| ("lanes", n);
            check(&kernel::gdn::PREPARE, &[chunk, dk, ("group", 2), qk, l2, ("grad", 1), lanes(t.prepare_lanes)]);
            check(
                &kernel::gdn::SCAN,
                &[chunk, dk, columns(t.dv_tile), qk, vt, ("save", 1), ("walk", 0), ("grad", 1), lanes(t.scan_lanes)],
            );
            check(&kernel::gdn::STEP, &[dk, columns(t.dv_step), qk, vt, l2, ("store", 1), lanes(t.step_lanes)]);
            check(
                &kernel::gdn_grad::GRAD_SCAN,
                &[chunk, dk, columns(t.dv_grad), qk, vt, ("walk", 1), lanes(t.grad_lanes)],
            );
            check(&kernel::gdn_grad::GRAD_CHUNK, &[chunk, dk, dv, vt, lanes(tune::grad_chunk_lanes(&caps))]);
            let qk_lanes = tune::grad_qk_lanes(&caps, k, t.chunk);
            check(&kernel::gdn_grad::GRAD_QK, &[chunk, dk, dv, ("group", 2), qk, l2, lanes(qk_lanes)]);
        }
        let carry_lanes = ("lanes", tune::carry_lanes(&caps, &heads, t.dv_tile));
        check(&kernel::gdn_cut::CARRY, &[dk, ("dv_tile", t.dv_tile), ("back", 0), carry_lanes]);
        check(&kernel::gdn::MIX_STEP, &[dk, dv, ("lanes", tune::mix_lanes(&caps, &heads))]);
        check(&kernel::gdn::GATED_NORM, &[dv, ("lanes", tune::head_lanes(&caps, v))]);
        check(&kernel::grad::GATED_NORM_GRAD, &[dv, ("lanes", tune::norm_grad_lanes(&caps, v))]);
    }
    check(&kernel::gdn_cut::CUT, &[("chunk", 32), ("grad", 0), ("back", 0), ("exact", 1)]);
    check(&kernel::gdn_grad::GRAD_GATES, &[("chunk", 32)]);
    for taps in 2..=8 {
        check(&kernel::gdn::CONV, &[("taps", taps), ("silu", 1), ("store_tail", 0)]);
        check(&kernel::gdn::CONV_TAIL, &[("taps", taps)]);
        check(&kernel::grad::CONV_GRAD, &[("taps", taps), ("silu", 1)]);
        check(&kernel::grad::CONV_TAIL_GRAD, &[("taps", taps), ("silu", 1), ("add", 1), ("store", 1)]);
    }
    check(&kernel::gdn::GATE, &[("block", tune::block(&caps))]);
    for hv in [1, 16, 48, 200] {
        check(&kernel::grad::GATE_GRAD, &[("lanes", tune::gate_grad_lanes(&caps, hv))]);
    }
    let (columns, lanes) = tune::sum_rows(&caps);
    check(&kernel::grad::SUM_ROWS, &[("columns", columns), ("lanes", lanes)]);
    for dim in [1, 64, 1000, 4096] {
        check(&kernel::model::RMS_NORM, &[("lanes", tune::row_lanes(&caps, dim))]);
    }
    for dtype in [gatedelta::shape::Dtype::F32, gatedelta::shape::Dtype::F16, gatedelta::shape::Dtype::Bf16] {
        let w_type = ("w_type", dtype.code());
        for wide in 0..2 {
            let wide = ("wide", wide);
            for (m, n) in [(9, 40), (64, 1024), (4096, 4096)] {
                let t = tune::matmul(&caps, m, n, 1024, dtype);
                let tiles = [("tile_m", t.tile_m), ("tile_n", t.tile_n), ("tile_k", t.tile_k)];
                let regs = [("reg_m", t.reg_m), ("reg_n", t.reg_n), ("lanes", t.lanes())];
                check(&kernel::model::MATMUL, &[&[w_type, ("add", 1)][..], &tiles, &regs, &[wide]].concat());
            }
            for k in [8, 1024, 9216] {
                let t = tune::matvec(&caps, 64, k, dtype);
                for (batch, glu) in [1, 2, 4, 8].into_iter().flat_map(|b| [(b, 0), (b, 1)]) {
                    let sizes = [("rows", t.rows), ("batch", batch), ("lanes", t.lanes), wide];
                    check(
                        &kernel::model::MATVEC,
                        &[&[w_type, ("add", 1), ("norm", 1), ("glu", glu)][..], &sizes].concat(),
                    );
                }
            }
        }
        check(&kernel::model::EMBED, &[w_type]);
        for dim in (1..=16).map(|i| 16 * i) {
            let (dim_c, kv, lanes) = (("dim", dim), ("kv_type", dtype.code()), ("lanes", tune::head_lanes(&caps, dim)));
            check(&kernel::model::ATTN_PREPARE, &[dim_c, ("rot", dim / 4 * 2), kv, lanes]);
            check(&kernel::model::ATTEND_MERGE, &[dim_c, lanes]);
            for rows in [1, 8, 16, 17, 2048] {
                let t = tune::attend(&caps, rows, 2, 512, 4096);
                let sizes = [("tile_q", t.tile_q), ("tile_k", t.tile_k), ("lanes", t.lanes)];
                check(&kernel::model::ATTEND, &[&[dim_c, kv][..], &sizes].concat());
            }
        }
    }
    check(&kernel::model::SWIGLU, &[("block", tune::block(&caps))]);
    check(&kernel::model::ARGMAX, &[("lanes", tune::argmax_lanes(&caps))]);
    check(&kernel::model::COPY, &[("block", tune::block(&caps))]);
    check(&kernel::model::FILL, &[("block", tune::block(&caps))]);

    let all: BTreeSet<String> =
        compiled.iter().filter(|(f, _)| !f.starts_with("hopper")).flat_map(|(_, names)| names.clone()).collect();
    let idle: Vec<&String> = all.difference(&chosen).collect();
    assert!(idle.is_empty(), "compiled and never chosen: {idle:?}");
}
