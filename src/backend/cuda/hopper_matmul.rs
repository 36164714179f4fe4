//! The matrix product for Hopper (`cuda/hopper/matmul.cuh`) in the place of the row `matmul`, where [`super::OpenOptions::hopper_matmul`]
//! says so: bf16 weights, rows of x and w that start at multiples of 16 bytes.

use super::Shared;
use super::hopper::{Numbers, tensor_map};
use super::launch::Call;
use crate::error::Result;
use crate::kernel::model::MATMUL;
use crate::pass::Launch;
use crate::shape::Dtype;

/// A launch in the place of a row `matmul`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// The kernel.
    pub kernel: &'static str,
    /// Rows and columns of its tiles of y.
    pub tile: [u32; 2],
    /// Its bytes of shared memory.
    pub bytes: u32,
    /// Blocks, each of which takes every so many-th tile.
    pub blocks: u32,
}

/// Numbers of k in a slice: SLICE of matmul.cuh.
const SLICE: u32 = 64;

/// A kernel with its tile, the cycles that a slice of k takes where all multiprocessors work, and those of a tile beside them, its first loads and
/// its stores. From an H200's times of one round of tiles with k of 1024 and 3584 (21.0 and 62.5 us, 10.7 and 27.8), 3 us of them the
/// launch, at 1.75 GHz; counted were 1700 and 880 a slice (`cuda/hopper/NOTES.md`).
const KERNELS: [(&str, u32, u64, u64); 2] =
    [("hopper_matmul_bf16_large", 128, 1815, 2700), ("hopper_matmul_bf16_small", 64, 750, 1750)];

/// MatmulSmem::BYTES of matmul.cuh, for the tile's side.
fn smem_bytes(side: u32) -> u32 {
    let (stages, exchange) = if side == 64 { (8, 2 * 16 * 128 * 4) } else { (4, 0) };
    stages * (2 * side * 128 + side * 128) + exchange + 128 + 1024
}

/// The launch that replaces this one, if there is one, on a device with so many multiprocessors.
pub fn product(launch: &Launch, multiprocessors: u32) -> Option<Product> {
    if *launch.kernel != MATMUL {
        return None;
    }
    let get = |name: &str| Numbers(launch).get(name);
    if Dtype::from_code(get("w_type"))? != Dtype::Bf16 || get("wide") != 1 {
        return None;
    }
    let (m, n, k, x_stride) = (get("m"), get("n"), get("k"), get("x_stride"));
    // The copy engine wants rows one after the other; its coordinates are signed.
    if m == 0 || n == 0 || k == 0 || m.max(n).max(k) > 1 << 30 || (m > 1 && (x_stride < k || x_stride % 4 != 0)) {
        return None;
    }
    let multiprocessors = multiprocessors.max(1);
    let tiles = |side: u32| u64::from(m.div_ceil(side)) * u64::from(n.div_ceil(side));
    // Rounds of tiles over the device, each as long as a tile.
    let time = |&(_, side, slice, beside): &(&str, u32, u64, u64)| {
        tiles(side).div_ceil(multiprocessors.into()) * (u64::from(k.div_ceil(SLICE)) * slice + beside)
    };
    let (kernel, side, ..) = *KERNELS.iter().min_by_key(|kernel| time(kernel))?;
    let blocks = tiles(side).min(multiprocessors.into()) as u32;
    Some(Product { kernel, tile: [side, side], bytes: smem_bytes(side), blocks })
}

/// The call for it; the launch's arguments x, w and y start at `addresses`.
pub(super) fn call(shared: &Shared, product: &Product, launch: &Launch, addresses: &[u64]) -> Result<Call> {
    let get = |name: &str| Numbers(launch).get(name);
    let (m, n, k) = (get("m"), get("n"), get("k"));
    let [rows, columns] = product.tile;
    let x = addresses[0] + 4 * u64::from(get("x_off"));
    let y = addresses[2] + 4 * u64::from(get("y_off"));
    let stride = if m > 1 { get("x_stride") } else { k };
    let maps = [
        tensor_map(shared, x, [m.into(), k.into()], stride.into(), Dtype::F32, [rows, 32])?,
        tensor_map(shared, addresses[1], [n.into(), k.into()], k.into(), Dtype::Bf16, [columns, 64])?,
    ];
    // MatmulArgs, then MatmulMaps.
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let args = [y, get("y_stride").into(), pair(m, n), pair(k, get("add")), 0];
    let packed = args.into_iter().chain(maps.iter().flat_map(|map| map.opaque)).collect();
    let variant = shared.hopper.function(shared, product.kernel, 384, product.bytes, &[40, 256])?;
    Ok(Call::new(MATMUL.name, variant, [product.blocks, 1, 1], packed, Some(args.len())))
}
