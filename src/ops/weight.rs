//! Weight matrices that may lie in several parts.

use std::ops::Range;

use crate::backend::View;
use crate::error::{Error, Result};
use crate::shape::Dtype;
use crate::tune::Caps;

/// A matrix `[n, k]` in its stored type, by rows in one or more parts.
#[derive(Debug, Clone)]
pub struct Weight {
    /// How its numbers are stored.
    pub dtype: Dtype,
    /// Rows: outputs of a product, entries of an embedding.
    pub n: u64,
    /// Numbers in a row.
    pub k: u64,
    /// Where the rows are, in rising order without gaps.
    pub parts: Vec<Part>,
}

/// Some rows of a [`Weight`].
#[derive(Debug, Clone)]
pub struct Part {
    /// First row.
    pub row0: u64,
    /// Rows.
    pub rows: u64,
    /// `[rows, k]`, packed.
    pub view: View,
}

impl Weight {
    /// Rows that may lie together: each range fits one buffer and one kernel argument, and its first byte is aligned if
    /// that of row 0 is.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if not even one aligned group of rows fits.
    pub fn split(caps: &Caps, dtype: Dtype, n: u64, k: u64) -> Result<Vec<Range<u64>>> {
        let row = k.saturating_mul(dtype.size());
        let most = caps.max_binding.min(caps.max_buffer);
        if n.saturating_mul(row) <= most {
            return Ok(std::iter::once(0..n).filter(|r| !r.is_empty()).collect());
        }
        // The smallest number of rows whose bytes are a multiple of the alignment.
        let group = caps.align.max(1) / gcd(caps.align.max(1), row);
        let rows = most / row / group * group;
        if rows == 0 {
            return Err(Error::Unsupported {
                what: format!("a weight with rows of {row} bytes"),
                by: caps.name.clone(),
                why: format!("{group} rows must fit into {most} bytes, the largest part that a kernel sees"),
            });
        }
        Ok((0..n.div_ceil(rows)).map(|i| i * rows..((i + 1) * rows).min(n)).collect())
    }

    /// A weight that lies in one view, cut into parts as [`Weight::split`] says.
    ///
    /// # Errors
    /// [`Error::Argument`] if the view is too short; as [`Weight::split`].
    pub fn new(caps: &Caps, dtype: Dtype, n: u64, k: u64, view: &View) -> Result<Self> {
        let row = k.saturating_mul(dtype.size());
        if view.bytes < n.saturating_mul(row) {
            let expected = format!("at least {} bytes for [{n}, {k}] {dtype}", n.saturating_mul(row));
            return Err(Error::argument("weight", format!("{} bytes", view.bytes), expected));
        }
        let part = |r: Range<u64>| {
            let rows = r.end - r.start;
            Ok(Part { row0: r.start, rows, view: view.slice(r.start * row, rows * row)? })
        };
        let parts = Self::split(caps, dtype, n, k)?.into_iter().map(part).collect::<Result<_>>()?;
        Ok(Weight { dtype, n, k, parts })
    }

    /// The weights below one another as one: `[sum of n, k]`. Nothing is copied.
    ///
    /// # Errors
    /// [`Error::Argument`] if types or row lengths differ, or there is no weight.
    pub fn stack(weights: &[Weight]) -> Result<Self> {
        let Some(first) = weights.first() else {
            return Err(Error::argument("weights to stack", 0, "at least 1"));
        };
        let mut all = Weight { dtype: first.dtype, n: 0, k: first.k, parts: Vec::new() };
        for w in weights {
            if (w.dtype, w.k) != (all.dtype, all.k) {
                let found = format!("rows of {} {}", w.k, w.dtype);
                return Err(Error::argument("weights to stack", found, format!("rows of {} {}", all.k, all.dtype)));
            }
            all.parts.extend(w.parts.iter().map(|p| Part { row0: p.row0 + all.n, ..p.clone() }));
            all.n += w.n;
        }
        Ok(all)
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.n.saturating_mul(self.k).saturating_mul(self.dtype.size())
    }

    /// That the parts cover the rows in order.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        let mut next = 0;
        for p in &self.parts {
            if p.row0 != next {
                return Err(Error::argument(format!("{what}: first row of a part"), p.row0, next));
            }
            next = p.rows.saturating_add(next);
        }
        if next != self.n {
            return Err(Error::argument(format!("{what}: rows in all parts"), next, self.n));
        }
        Ok(())
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
