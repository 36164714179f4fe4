//! The matrix product for Hopper in the place of the row `matmul`, on the stand-in for the driver in a process of its own.

use std::path::Path;

use gatedelta::backend::cuda::{Cuda, OpenOptions, product};
use gatedelta::backend::{Backend, View};
use gatedelta::ops::{self, Weight};
use gatedelta::pass::{Launch, Pass, Rows};
use gatedelta::shape::Dtype;
use gatedelta::tune::Caps;

use crate::formula;
use crate::ops::{Bench, close, wide};
use crate::util::{Random, error};

/// One product with everything that can vary.
#[derive(Debug, Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    add: bool,
    /// Unused numbers before and between the rows of x, and of y.
    gaps: [usize; 2],
    /// Parts that w is cut into, about.
    parts: u64,
}

impl Case {
    const fn new(m: usize, n: usize, k: usize) -> Case {
        Case { m, n, k, add: false, gaps: [0, 0], parts: 1 }
    }

    /// x, w and what y is at first.
    fn numbers(&self) -> [Vec<f32>; 3] {
        let mut r = Random::new((self.m * 31 + self.n * 7 + self.k) as u64);
        let mut x = r.normals(self.m * self.k);
        // Rows of every size: each is judged by itself.
        for (i, row) in x.chunks_mut(self.k).enumerate() {
            let scale = [1.0, 1e-20, 3e15, 0.01][i % 4];
            row.iter_mut().for_each(|x| *x *= scale);
        }
        let w: Vec<f32> = r.normals(self.n * self.k).iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        [x, w, r.normals(self.m * self.n)]
    }

    /// The launches, and y.
    fn record(&self, b: &Bench, [x, w, y0]: &[Vec<f32>; 3]) -> (Pass, Rows) {
        let spread = |x: &[f32], width: usize, gap: usize| -> Vec<f32> {
            let row = |row: &[f32]| std::iter::repeat_n(f32::NAN, gap).chain(row.iter().copied()).collect::<Vec<_>>();
            x.chunks(width).flat_map(row).collect()
        };
        let rows = |view: View, width: usize, gap: usize| Rows { view, off: gap as u64, stride: (width + gap) as u64 };
        let [gap_x, gap_y] = self.gaps;
        let x = rows(b.floats(&spread(x, self.k, gap_x)), self.k, gap_x);
        let start = if self.add { spread(y0, self.n, gap_y) } else { vec![f32::NAN; self.m * (self.n + gap_y)] };
        let y = rows(b.floats(&start), self.n, gap_y);
        let view = b.stored(Dtype::Bf16, w);
        let small = Caps { max_binding: view.bytes / self.parts + 512, ..b.caps.clone() };
        let caps = if self.parts > 1 { &small } else { &b.caps };
        let weight = Weight::new(caps, Dtype::Bf16, self.n as u64, self.k as u64, &view).unwrap();
        let mut pass = Pass::new();
        ops::linear(&b.caps, &mut pass, &x, &weight, &y, self.m as u64, self.add).unwrap();
        (pass, y)
    }
}

fn bench(options: &OpenOptions) -> Bench {
    let cuda = Cuda::open(&Cuda::enumerate().found[0], options).unwrap();
    let caps = cuda.caps().clone();
    Bench { name: "emulator".into(), backend: std::sync::Arc::new(cuda), caps }
}

const CASES: [Case; 16] = [
    // A tile that is not full, one that is, borders behind tiles of 64 and 128 and behind slices of 64 of k.
    Case::new(9, 16, 64),
    Case::new(64, 64, 8),
    Case { add: true, ..Case::new(65, 63, 72) },
    Case { gaps: [4, 0], ..Case::new(128, 128, 1024) },
    Case { gaps: [0, 5], add: true, ..Case::new(129, 129, 136) },
    Case { gaps: [8, 2], ..Case::new(130, 200, 264) },
    Case { gaps: [8, 2], add: true, ..Case::new(256, 256, 320) },
    Case { gaps: [12, 3], ..Case::new(255, 250, 120) },
    // More tiles than blocks, more tiles one below the other than a band has, few columns, few rows, a slice that is all there is.
    Case { add: true, ..Case::new(1200, 256, 64) },
    Case::new(700, 16, 96),
    Case { add: true, gaps: [0, 1], ..Case::new(300, 32, 2048) },
    Case::new(17, 1000, 320),
    Case { gaps: [4, 4], ..Case::new(300, 520, 200) },
    Case::new(600, 390, 136),
    // Weights in parts, each a launch.
    Case { parts: 3, add: true, ..Case::new(100, 517, 192) },
    Case { parts: 2, gaps: [0, 7], ..Case::new(260, 600, 128) },
];

/// Run by the test below: against float64, twice with the same bits, with nothing written beside the rows.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn products() {
    let b = bench(&OpenOptions::default());
    for case in CASES {
        let numbers = case.numbers();
        let [x, w, y0] = &numbers;
        let mut expected = formula::matmul(&wide(x), &wide(w), case.k);
        if case.add {
            expected.iter_mut().zip(y0).for_each(|(e, &y)| *e += f64::from(y));
        }
        let run = || {
            let (pass, y) = case.record(&b, &numbers);
            b.backend.run(&pass).unwrap();
            b.read(&y.view)
        };
        let found = run();
        let gap = case.gaps[1];
        let rows: Vec<&[f32]> = found.chunks(case.n + gap).map(|row| &row[gap..]).collect();
        let worst = rows.iter().zip(expected.chunks(case.n)).map(|(row, e)| error(row, e)).fold(0.0, f64::max);
        println!("{case:?}: worst row {worst:.1e}");
        close(&format!("{case:?}"), &rows.concat(), &expected, 2e-6);
        assert!(worst <= 1e-5, "{case:?}: a row's relative error is {worst:.2e}");
        assert!(found.chunks(case.n + gap).all(|row| row[..gap].iter().all(|x| x.is_nan())), "{case:?}: between rows");
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&run()) == bits(&found), "{case:?}: the same inputs, other bits");
    }
    // What it leaves to the general kernels: rows that start anywhere, other weights.
    for (k, dtype) in [(66, Dtype::Bf16), (64, Dtype::F16)] {
        let (x, w) = (b.floats(&vec![1.0; 64 * k]), b.stored(dtype, &vec![1.0; 64 * k]));
        let weight = Weight::new(&b.caps, dtype, 64, k as u64, &w).unwrap();
        let y = Rows::packed(b.poisoned(64 * 64), 64);
        b.run(|pass| ops::linear(&b.caps, pass, &Rows::packed(x, k as u64), &weight, &y, 64, false).unwrap());
        assert_eq!(b.read(&y.view), vec![k as f32; 64 * 64]);
    }
}

#[test]
fn they_agree_with_their_formula() {
    let Some(text) = super::child("product::products", "arch=90,tell=1", &[]) else { return };
    for kernel in ["hopper_matmul_bf16_large", "hopper_matmul_bf16_small", "matmul_bf16", "matmul_mma_f16"] {
        assert!(text.contains(&format!("kernel {kernel}\n")), "{kernel} was not used: {text}");
    }
    assert!(!text.contains("kernel matmul_mma_bf16\n"), "some product did without the Hopper kernels: {text}");
    let off = [("GATEDELTA_HOPPER_MATMUL", "0")];
    let Some(text) = super::child("product::products", "arch=90,tell=1", &off) else { return };
    assert!(text.contains("kernel matmul_mma_bf16\n") && !text.contains("kernel hopper_matmul"), "{text}");
}

/// The launch of a product on a device with much memory.
fn launch(m: usize, n: usize, k: usize) -> Launch {
    let cpu = gatedelta::backend::cpu::Cpu::new(Some(1)).unwrap();
    let caps = Caps { kind: gatedelta::tune::Kind::Cuda, align: 256, ..cpu.caps().clone() };
    let b = Bench { name: String::new(), backend: std::sync::Arc::new(cpu), caps };
    let case = Case::new(m, n, k);
    let zeros = [vec![0.0; m * k], vec![0.0; n * k], Vec::new()];
    case.record(&b, &zeros).0.launches.remove(0)
}

#[test]
fn few_tiles_are_small_ones() {
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/compiled/hopper_matmul.txt");
    let compiled = std::fs::read_to_string(table).unwrap();
    for (m, n, side) in [
        (512, 2048, 64),
        (512, 3584, 128),
        (512, 1024, 64),
        (2048, 1024, 128),
        (2048, 16, 64),
        (9, 512, 64),
        (4096, 1024, 128),
    ] {
        let launch = launch(m, n, 256);
        let found = product(&launch, 132).unwrap();
        assert_eq!(found.tile, [side, side], "{m} x {n}");
        assert!(compiled.contains(&format!("{} sm_90a ", found.kernel)), "{found:?}");
        // What a block of an H100 may have.
        assert!(found.bytes <= 227 << 10 && found.blocks <= 132, "{found:?}");
    }
    // Rows of x that are not one after the other.
    let mut shared = launch(16, 16, 64);
    shared.params[3] = 32;
    assert_eq!(product(&shared, 132), None);
}
