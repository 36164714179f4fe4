//! Keys and values of a sequence, in pages that snapshots and other sequences share.
//!
//! A page is append-only: a row is written once, and whoever holds the page up to some position does not look beyond it. So a
//! snapshot shares the pages of its sequence for nothing, and so does everything that goes on from it. The page counts the rows
//! that anyone has taken. A sequence that ends at that count writes on in place; one that ends before it, because another has
//! gone on from the same point or because it was rewound, gets a page of its own with a copy of the rows it has. A copy is of
//! at most one page, since those before it are full and nobody writes them again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Backend, View};
use crate::error::Result;
use crate::ops::{self, KvPage};
use crate::pass::Pass;

/// How keys and values of a model lie in pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct PageLayout {
    /// First position and length of every page up to the context.
    pub pages: Vec<(u64, u64)>,
    /// Full-attention layers.
    pub layers: usize,
    /// Bytes of the keys, or of the values, of one position in one layer.
    pub row: u64,
}

/// Keys and values of the positions `start .. start + len` in all layers.
#[derive(Debug)]
pub(crate) struct Page {
    pub start: u64,
    pub len: u64,
    /// Per layer k and v `[len, kv, D]`.
    layers: Vec<[View; 2]>,
    /// Rows that some holder has taken to write.
    taken: AtomicU64,
}

impl Page {
    fn new(layout: &PageLayout, backend: &dyn Backend, (start, len): (u64, u64), taken: u64) -> Result<Page> {
        let view = |what| Ok::<_, crate::Error>(backend.alloc(what, len * layout.row)?.view());
        let layer = |_| Ok([view("page of keys")?, view("page of values")?]);
        let layers = (0..layout.layers).map(layer).collect::<Result<_>>()?;
        Ok(Page { start, len, layers, taken: AtomicU64::new(taken) })
    }

    /// Device memory of it.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().flatten().map(|v| v.bytes).sum()
    }

    /// Keys and values of rows `from .. to`, layer by layer, keys first.
    pub fn rows(&self, row: u64, from: u64, to: u64) -> Result<Vec<View>> {
        self.layers.iter().flatten().map(|v| v.slice(from * row, (to - from) * row)).collect()
    }
}

/// The pages of a sequence, from position 0 without gaps.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pages(Vec<Arc<Page>>);

impl Pages {
    /// Those that hold positions below `end`.
    pub fn until(&self, end: u64) -> Pages {
        Pages(self.0.iter().take_while(|p| p.start < end).cloned().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.0.iter()
    }

    /// The cache of one full-attention layer, counted among those.
    pub fn layer(&self, layer: usize) -> Vec<KvPage> {
        let page = |p: &Arc<Page>| {
            let [k, v] = p.layers.get(layer)?;
            Some(KvPage { start: p.start, len: p.len, k: k.clone(), v: v.clone() })
        };
        self.0.iter().filter_map(page).collect()
    }

    /// Makes the positions `at .. end` writable for the holder, who has those below `at`; true if pages came or changed.
    ///
    /// # Errors
    /// What the backend reports; what the holder has stays as it was.
    pub fn take(&mut self, layout: &PageLayout, backend: &dyn Backend, at: u64, end: u64) -> Result<bool> {
        if layout.layers == 0 {
            return Ok(false);
        }
        let mut changed = false;
        for (i, &(start, len)) in layout.pages.iter().enumerate() {
            if start + len <= at {
                continue;
            }
            if start >= end {
                break;
            }
            let (from, to) = (at.max(start) - start, end.min(start + len) - start);
            let Some(page) = self.0.get_mut(i) else {
                self.0.push(Arc::new(Page::new(layout, backend, (start, len), to)?));
                changed = true;
                continue;
            };
            if let Some(own) = Arc::get_mut(page) {
                *own.taken.get_mut() = to;
            } else if page.taken.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_err() {
                let copy = Page::new(layout, backend, (start, len), to)?;
                let mut pass = Pass::new();
                for (old, new) in page.layers.iter().flatten().zip(copy.layers.iter().flatten()) {
                    ops::copy(backend.caps(), &mut pass, old, 0, new, 0, from * layout.row / 4)?;
                }
                backend.load(&pass)?;
                backend.run(&pass)?;
                *page = Arc::new(copy);
                changed = true;
            }
        }
        Ok(changed)
    }
}
