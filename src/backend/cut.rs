//! Cuts a grid of cells into blocks that a device dispatches at once.

/// A block of cells: where it starts in the grid, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) base: [u32; 3],
    pub(crate) size: [u32; 3],
}

/// The blocks of `grid`, in order, each at most `most_side` along a dimension and `most_cells` in all. Together they cover
/// every cell once.
pub(crate) fn blocks(grid: [u32; 3], most_side: u32, most_cells: u64) -> impl Iterator<Item = Block> {
    let side = block_size(grid, most_side.max(1), most_cells.max(1));
    let [nx, ny, nz] = [0, 1, 2].map(|d| (grid[d] as u64).div_ceil(side[d] as u64));
    (0..nx.saturating_mul(ny).saturating_mul(nz)).map(move |i| {
        let at = [i % nx, i / nx % ny, i / (nx * ny)];
        let base = [0, 1, 2].map(|d| (at[d] * side[d] as u64) as u32);
        Block { base, size: [0, 1, 2].map(|d| side[d].min(grid[d] - base[d])) }
    })
}

/// Whole rows while they fit, then parts of one; parts of a dimension are equal but for the last.
fn block_size(grid: [u32; 3], most_side: u32, most_cells: u64) -> [u32; 3] {
    let mut left = most_cells;
    grid.map(|n| {
        let fits = (n as u64).min(most_side as u64).min(left).max(1);
        left = (left / fits).max(1);
        let parts = (n as u64).div_ceil(fits).max(1);
        (n as u64).div_ceil(parts).max(1) as u32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_each_cell_once_and_keep_the_limits() {
        for grid in [[1, 1, 1], [7, 5, 3], [100, 1, 1], [1, 130, 2], [0, 3, 1], [3, 0, 3]] {
            for (side, cells) in [(65535, u64::MAX), (4, u64::MAX), (65535, 6), (3, 4), (1, 1), (65535, 0)] {
                let mut seen = std::collections::HashSet::new();
                for b in blocks(grid, side, cells) {
                    assert!(b.size.iter().all(|&n| n > 0 && n <= side), "{grid:?} {b:?}");
                    assert!(b.size.iter().map(|&n| n as u64).product::<u64>() <= cells.max(1), "{grid:?} {b:?}");
                    for z in 0..b.size[2] {
                        for y in 0..b.size[1] {
                            for x in 0..b.size[0] {
                                assert!(seen.insert([b.base[0] + x, b.base[1] + y, b.base[2] + z]));
                            }
                        }
                    }
                }
                assert_eq!(seen.len() as u64, grid.iter().map(|&n| n as u64).product::<u64>());
            }
        }
    }

    #[test]
    fn the_largest_grid_does_not_overflow() {
        let first = blocks([u32::MAX; 3], 65535, 1 << 20).next();
        assert_eq!(first.map(|b| b.base), Some([0; 3]));
    }
}
