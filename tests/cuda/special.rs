//! When the Hopper kernels stand in for the rows of a prefill, and when not.

use std::path::Path;

use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::cuda::special;
use gatedelta::gdn::{Io, Options, Prefill};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};
use gatedelta::tune::{Caps, Class, Kind};

/// The launches of a prefill of 100 tokens as the CUDA backend gets them, with rows that start `off` numbers into their views.
fn launches(k: u32, v: u32, store: Dtype, off: u64) -> Pass {
    launches_of(2, k, v, store, off)
}

/// The same with so many value heads for each key head.
fn launches_of(group: u32, k: u32, v: u32, store: Dtype, off: u64) -> Pass {
    let backend = Cpu::new(Some(1)).unwrap();
    let caps = Caps { kind: Kind::Cuda, class: Class::Discrete, align: 256, ..backend.caps().clone() };
    let heads = Heads::new(4 / group, 4, k, v, HeadMap::Div).unwrap();
    let (shape, options) = (Shape::one(heads, 100), Options { store, ..Options::default() });
    let backend = As { backend, caps };
    let prefill = Prefill::new(&backend, &shape, &options, 8192).unwrap();
    let rows = |width: u64| {
        let bytes = (100 * width + off) * store.size();
        Rows { view: backend.alloc("rows", bytes).unwrap().view(), off, stride: width }
    };
    let gates = || backend.alloc("gates", 100 * 4 * 4).unwrap().view();
    let io = Io {
        q: rows((4 / group * k) as u64),
        k: rows((4 / group * k) as u64),
        v: rows(4 * v as u64),
        g: gates(),
        beta: gates(),
        state: backend.alloc("state", heads.state_len() * 4).unwrap().view(),
        o: rows(4 * v as u64),
    };
    let mut pass = Pass::new();
    prefill.record(&mut pass, &io).unwrap();
    pass
}

/// The CPU's memory with the capabilities of a CUDA device: what builders of passes see.
struct As {
    backend: Cpu,
    caps: Caps,
}

impl Backend for As {
    fn caps(&self) -> &Caps {
        &self.caps
    }
    fn alloc(&self, what: &str, bytes: u64) -> gatedelta::Result<gatedelta::backend::Buffer> {
        self.backend.alloc(what, bytes)
    }
    fn import(
        &self,
        what: &str,
        bytes: gatedelta::backend::HostBytes,
    ) -> gatedelta::Result<gatedelta::backend::Buffer> {
        self.backend.import(what, bytes)
    }
    fn write(&self, to: &gatedelta::backend::View, bytes: &[u8]) -> gatedelta::Result<()> {
        self.backend.write(to, bytes)
    }
    fn read(&self, from: &gatedelta::backend::View) -> gatedelta::Result<gatedelta::backend::Readback> {
        self.backend.read(from)
    }
    fn load(&self, _: &Pass) -> gatedelta::Result<()> {
        Ok(())
    }
    fn run(&self, pass: &Pass) -> gatedelta::Result<()> {
        self.backend.run(pass)
    }
    fn wait(&self) -> gatedelta::Result<()> {
        self.backend.wait()
    }
    fn time(&self, pass: &Pass) -> gatedelta::Result<gatedelta::backend::Timing> {
        self.backend.time(pass)
    }
}

#[test]
fn prefills_of_16_bits_and_released_heads_are_replaced() {
    for (k, v, consumers) in [(128, 128, 1), (64, 64, 1), (64, 128, 1), (128, 64, 1)] {
        for (store, name) in [(Dtype::Bf16, "bf16"), (Dtype::F16, "f16")] {
            let pass = launches(k, v, store, 8);
            let found = special(&pass, 0, 132, None).unwrap();
            assert_eq!(found.launches, pass.launches.len());
            assert_eq!(found.prepare, format!("hopper_prepare_{name}_k{k}"));
            assert_eq!(found.scan, format!("hopper_scan_{name}_k{k}_w{consumers}"));
            let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/compiled/hopper.txt");
            let compiled = std::fs::read_to_string(table).unwrap();
            for kernel in [&found.prepare, &found.scan] {
                assert!(compiled.contains(&format!("{kernel} sm_90a ")), "{kernel}");
            }
            // What a block of an H100 may have.
            assert!(found.prepare_bytes.max(found.scan_bytes) <= 227 << 10, "{found:?}");
        }
    }
    // A value head for each key head: with few blocks the kernel with a block more at once; with many the scan makes P.
    for (k, v, multiprocessors, prepare, scan, blocks) in [
        (128, 64, 132, "hopper_prepare_one_f16_k128", "hopper_scan_f16_k128_w1", 5),
        (128, 64, 1, "hopper_prepare_keys_f16_k128", "hopper_scan_making_f16_k128_w1", 6),
        (128, 128, 1, "hopper_prepare_keys_f16_k128", "hopper_scan_making_f16_k128_w2", 6),
        (64, 64, 1, "hopper_prepare_f16_k64", "hopper_scan_f16_k64_w1", 5),
    ] {
        let found = special(&launches_of(1, k, v, Dtype::F16, 0), 0, multiprocessors, None).unwrap();
        assert_eq!((found.prepare.as_str(), found.scan.as_str()), (prepare, scan));
        // What so many blocks of an H100 may have, with the 1024 bytes that the system takes of each.
        assert!(blocks * (found.prepare_bytes + 1024) <= 228 << 10, "{found:?}");
        assert!(found.scan_bytes <= 227 << 10, "{found:?}");
    }
    // Few blocks take one consumer each, many two.
    let pass = launches(128, 128, Dtype::Bf16, 0);
    assert_eq!(special(&pass, 0, 132, None).unwrap().consumers, 1);
    assert_eq!(special(&pass, 0, 4, None).unwrap().consumers, 2);
    // 100 tokens are not worth cutting, unless it is asked for.
    assert_eq!(special(&pass, 0, 132, None).unwrap().cut, 0);
    assert_eq!(special(&pass, 0, 132, Some(1)).unwrap().cut, 1);
    // 32768 tokens, in one sequence or in two, and 8192: as measured, see `cuda/hopper/NOTES.md`.
    for (hv, sequences, longest, chunks, cut, consumers) in [
        (16, 1, 32768, 1024, 64, 2),
        (32, 1, 32768, 1024, 128, 2),
        (64, 1, 32768, 1024, 0, 1),
        (32, 2, 16384, 1024, 0, 1),
        (16, 2, 28672, 1024, 64, 2),
        (16, 1, 8192, 256, 32, 1),
    ] {
        let mut long = launches(128, 128, Dtype::Bf16, 0);
        long.launches[0].grid[0] = chunks;
        long.launches[1].grid = [sequences, hv, 1];
        long.longest = longest;
        let found = special(&long, 0, 132, None).unwrap();
        assert_eq!((found.cut, found.consumers), (cut, consumers), "{hv} heads, {sequences} sequences");
    }
}

#[test]
fn others_are_not() {
    assert_eq!(special(&launches(128, 128, Dtype::F32, 0), 0, 132, None), None, "f32");
    assert_eq!(special(&launches(96, 128, Dtype::Bf16, 0), 0, 132, None), None, "K = 96");
    assert_eq!(special(&launches(128, 256, Dtype::Bf16, 0), 0, 132, None), None, "V = 256");
    assert_eq!(special(&launches(128, 128, Dtype::Bf16, 2), 0, 132, None), None, "rows that start at 4 bytes");
    let pass = launches(128, 128, Dtype::Bf16, 0);
    assert_eq!(special(&pass, 1, 132, None), None, "a scan alone");
    let alone = Pass { launches: pass.launches[..1].to_vec(), ..pass.clone() };
    assert_eq!(special(&alone, 0, 132, None), None, "chunks alone");
    // Somebody else reads what lies between the two.
    let mut seen = pass.clone();
    seen.launches.push(pass.launches[1].clone());
    seen.launches[2].args[2] = pass.launches[0].args[5].clone();
    assert_eq!(special(&seen, 0, 132, None), None, "scratch that is seen");
}
