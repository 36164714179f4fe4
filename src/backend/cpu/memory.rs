//! Memory of the CPU backend: aligned allocations, and host bytes kept by reference.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use memmap2::MmapMut;

use crate::backend::HostBytes;

/// Start of every allocation: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// Memory from this size on comes straight from the system, which zeroes a page when it is first touched. In large pages where
/// it has them: a cache of keys and values is tens of thousands of small ones.
const MAPPED: usize = 1 << 20;

/// What a [`crate::backend::Buffer`] of this backend holds.
pub(super) struct Memory {
    /// The backend that made it: only its lock orders access.
    pub owner: u64,
    store: Store,
}

enum Store {
    Own { ptr: NonNull<u8>, layout: Layout },
    Mapped { ptr: NonNull<u8>, map: MmapMut },
    Host(HostBytes),
}

// SAFETY: the memory is plain bytes owned by this value. Access goes through the backend, which holds its lock.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory, or None where the system has none.
    pub fn new(owner: u64, bytes: u64) -> Option<Self> {
        let bytes = usize::try_from(bytes).ok()?;
        if bytes >= MAPPED {
            let mut map = MmapMut::map_anon(bytes).ok()?;
            // Advice: a system that does not take it is as right, and slower.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            let ptr = NonNull::new(map.as_mut_ptr())?;
            return Some(Memory { owner, store: Store::Mapped { ptr, map } });
        }
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).ok()?;
        // SAFETY: the layout has a size of at least 1.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Memory { owner, store: Store::Own { ptr, layout } })
    }

    /// Read-only memory that stays where it is.
    pub fn host(owner: u64, bytes: HostBytes) -> Self {
        Memory { owner, store: Store::Host(bytes) }
    }

    /// The first byte, for reading.
    pub fn ptr(&self) -> *const u8 {
        match &self.store {
            Store::Own { ptr, .. } | Store::Mapped { ptr, .. } => ptr.as_ptr(),
            Store::Host(bytes) => bytes.bytes().as_ptr(),
        }
    }

    /// The first byte, for writing; None for host bytes.
    pub fn ptr_mut(&self) -> Option<*mut u8> {
        match &self.store {
            Store::Own { ptr, .. } | Store::Mapped { ptr, .. } => Some(ptr.as_ptr()),
            Store::Host(_) => None,
        }
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        match &self.store {
            Store::Own { layout, .. } => layout.size(),
            Store::Mapped { map, .. } => map.len(),
            Store::Host(bytes) => bytes.bytes().len(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Store::Own { ptr, layout } = &self.store {
            // SAFETY: allocated with this layout in `new`, freed once.
            unsafe { dealloc(ptr.as_ptr(), *layout) }
        }
    }
}

/// A cache line of numbers: what scratch is made of.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Memory of one thread, or of all threads for one launch, that grows and is used again.
#[derive(Default)]
pub(super) struct Scratch(Vec<Line>);

impl Scratch {
    /// `n` numbers of any content, starting at a cache line.
    pub fn floats(&mut self, n: usize) -> &mut [f32] {
        let lines = n.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..lines])[..n]
    }
}

/// Cuts the next `n` numbers off `rest`; pieces of whole cache lines stay aligned.
pub(super) fn cut<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    head
}
