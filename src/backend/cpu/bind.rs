//! From a [`Launch`] to typed memory: every size is checked here, before anything runs.
//!
//! What the types below rest on: no argument that a launch writes overlaps another argument of it ([`Bind::new`] refuses
//! that), launches run one after the other, and the pass keeps every buffer alive while it runs. So reading through a
//! shared reference is sound within a launch, and all that remains to be upheld is that cells of a launch write to
//! different places.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::memory::Memory;
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::{Access, Fields};
use crate::pass::Launch;
use crate::shape::Dtype;

/// A launch whose arguments are being bound.
pub(super) struct Bind<'p> {
    launch: &'p Launch,
    owner: u64,
}

/// Numbers that a launch reads.
pub(super) struct Read<'p, T> {
    ptr: *const T,
    len: usize,
    /// Host bytes that do not start at a multiple of the number's size are copied.
    copy: Option<Vec<T>>,
    life: PhantomData<&'p T>,
}

/// Numbers that a launch writes.
pub(super) struct Write<'p, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'p T>,
}

/// Stored numbers of any type and alignment that a launch reads.
#[derive(Clone, Copy)]
pub(super) struct Stored<'p> {
    pub dtype: Dtype,
    ptr: *const u8,
    /// In numbers.
    pub len: usize,
    life: PhantomData<&'p u8>,
}

/// Stored numbers of any type that a launch writes.
pub(super) struct StoredMut<'p> {
    pub dtype: Dtype,
    ptr: *mut u8,
    pub len: usize,
    life: PhantomData<&'p u8>,
}

// SAFETY: these are views of plain numbers; what makes sharing sound is said at the top of the file.
unsafe impl<T: Sync> Sync for Read<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Write<'_, T> {}
// SAFETY: as above.
unsafe impl Sync for Stored<'_> {}
// SAFETY: as above.
unsafe impl Sync for StoredMut<'_> {}

impl<T: Pod> Read<'_, T> {
    /// All of it, at least what was asked for.
    pub fn all(&self) -> &[T] {
        match &self.copy {
            Some(copy) => copy,
            // SAFETY: checked in `Bind::read`; nothing writes here during the launch.
            None => unsafe { std::slice::from_raw_parts(self.ptr, self.len) },
        }
    }
}

impl<T: Pod> Write<'_, T> {
    /// `len` numbers from `start`.
    ///
    /// # Safety
    /// No other reference into these numbers is alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: `at` has checked the bounds; unaliased as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at(start, len), len) }
    }

    /// `len` numbers from `start`, for reading.
    ///
    /// # Safety
    /// Nothing writes these numbers meanwhile.
    pub unsafe fn peek(&self, start: usize, len: usize) -> &[T] {
        // SAFETY: `at` has checked the bounds; unwritten as the caller promises.
        unsafe { std::slice::from_raw_parts(self.at(start, len), len) }
    }

    /// Pointer to number `start` of at least `len` from there.
    pub fn at(&self, start: usize, len: usize) -> *mut T {
        assert!(start <= self.len && len <= self.len - start, "{len} numbers from {start} of {}", self.len);
        self.ptr.wrapping_add(start)
    }

    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Stored<'_> {
    /// Where number `at` lies, for prefetching only: it need not exist.
    #[inline(always)]
    pub fn place(&self, at: usize) -> *const u8 {
        self.ptr.wrapping_add(at * self.dtype.size() as usize)
    }

    /// The bytes of `n` numbers from `at`.
    #[inline(always)]
    pub fn bytes(&self, at: usize, n: usize) -> &[u8] {
        assert!(at <= self.len && n <= self.len - at, "{n} numbers from {at} of {}", self.len);
        let size = self.dtype.size() as usize;
        // SAFETY: in bounds as just asserted; nothing writes here during the launch.
        unsafe { std::slice::from_raw_parts(self.ptr.add(at * size), n * size) }
    }
}

impl StoredMut<'_> {
    /// The bytes of `n` numbers from `at`.
    ///
    /// # Safety
    /// No other reference into these numbers is alive.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes(&self, at: usize, n: usize) -> &mut [u8] {
        assert!(at <= self.len && n <= self.len - at, "{n} numbers from {at} of {}", self.len);
        let size = self.dtype.size() as usize;
        // SAFETY: in bounds as just asserted; unaliased as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at * size), n * size) }
    }
}

impl<'p> Bind<'p> {
    /// Checks that the arguments are this backend's, that what is written may be, and that it overlaps nothing.
    pub fn new(launch: &'p Launch, owner: u64) -> Result<Self> {
        let bind = Bind { launch, owner };
        if launch.args.len() != launch.kernel.args.len() {
            let found = format!("{} arguments", launch.args.len());
            return Err(Error::argument(launch.kernel.name, found, launch.kernel.args.len()));
        }
        for (i, view) in launch.args.iter().enumerate() {
            let memory = bind.memory(i)?;
            let end = view.offset.checked_add(view.bytes);
            if end.is_none_or(|end| end > memory.len() as u64) {
                let found = format!("{} bytes from {}", view.bytes, view.offset);
                return Err(Error::argument(bind.name(i), found, format!("inside {} bytes", memory.len())));
            }
            if launch.kernel.args[i].access == Access::Read {
                continue;
            }
            if memory.ptr_mut().is_none() {
                return Err(Error::argument(bind.name(i), "imported host bytes", "memory that can be written"));
            }
            for (j, other) in launch.args.iter().enumerate() {
                if i != j && overlap(view, other) {
                    let found = format!("the same memory as {}", launch.kernel.args[j].name);
                    return Err(Error::argument(bind.name(i), found, "memory of its own"));
                }
            }
        }
        Ok(bind)
    }

    /// `kernel: argument`, for errors.
    pub fn name(&self, i: usize) -> String {
        format!("{}: {}", self.launch.kernel.name, self.launch.kernel.args[i].name)
    }

    /// Cells along x, y, z.
    pub fn grid(&self) -> [usize; 3] {
        self.launch.grid.map(|n| n as usize)
    }

    /// Refuses a grid other than the one that the row's numbers give.
    pub fn expect_grid(&self, expected: [usize; 3]) -> Result<()> {
        if self.grid() == expected {
            return Ok(());
        }
        let what = format!("{}: grid", self.launch.kernel.name);
        Err(Error::argument(what, format!("{:?}", self.grid()), format!("{expected:?}")))
    }

    /// Refuses a number of the row.
    pub fn expect(&self, what: &str, found: u32, ok: bool, expected: &str) -> Result<()> {
        if ok { Ok(()) } else { Err(Error::argument(format!("{}: {what}", self.launch.kernel.name), found, expected)) }
    }

    /// The compile-time numbers.
    pub fn consts<C: Fields>(&self) -> Result<C> {
        numbers(self.launch.kernel.name, "consts", &self.launch.consts)
    }

    /// The run-time numbers.
    pub fn params<P: Fields>(&self) -> Result<P> {
        numbers(self.launch.kernel.name, "params", &self.launch.params)
    }

    /// The type behind a code.
    pub fn dtype(&self, what: &str, code: u32) -> Result<Dtype> {
        Dtype::from_code(code)
            .ok_or_else(|| Error::argument(format!("{}: {what}", self.launch.kernel.name), code, "a type code, 0 to 2"))
    }

    /// Argument `i` as at least `need` numbers to read.
    pub fn read<T: Pod>(&self, i: usize, need: u64) -> Result<Read<'p, T>> {
        let ptr = self.start(i, need, size_of::<T>())?.cast::<T>();
        let len = self.launch.args[i].bytes as usize / size_of::<T>();
        let copy = if ptr.is_aligned() {
            None
        } else if self.memory(i)?.ptr_mut().is_none() {
            // SAFETY: `len` numbers lie inside the view, which host bytes back; they never change.
            Some((0..len).map(|k| unsafe { ptr.add(k).read_unaligned() }).collect())
        } else {
            return Err(self.misaligned::<T>(i));
        };
        Ok(Read { ptr, len, copy, life: PhantomData })
    }

    /// Argument `i` as at least `need` numbers to write.
    pub fn write<T: Pod>(&self, i: usize, need: u64) -> Result<Write<'p, T>> {
        let ptr = self.start(i, need, size_of::<T>())?.cast_mut().cast::<T>();
        if !ptr.is_aligned() {
            return Err(self.misaligned::<T>(i));
        }
        Ok(Write { ptr, len: self.launch.args[i].bytes as usize / size_of::<T>(), life: PhantomData })
    }

    /// Argument `i` as at least `need` stored numbers to read.
    pub fn stored(&self, i: usize, dtype: Dtype, need: u64) -> Result<Stored<'p>> {
        let size = dtype.size() as usize;
        let ptr = self.start(i, need, size)?;
        Ok(Stored { dtype, ptr, len: self.launch.args[i].bytes as usize / size, life: PhantomData })
    }

    /// Argument `i` as at least `need` stored numbers to write.
    pub fn stored_mut(&self, i: usize, dtype: Dtype, need: u64) -> Result<StoredMut<'p>> {
        let size = dtype.size() as usize;
        let ptr = self.start(i, need, size)?.cast_mut();
        Ok(StoredMut { dtype, ptr, len: self.launch.args[i].bytes as usize / size, life: PhantomData })
    }

    /// Whole rows of `width` numbers in `len` numbers, where row t starts at `off + t * stride`.
    pub fn rows(&self, i: usize, len: usize, off: u32, stride: u32, width: usize) -> Result<usize> {
        let (off, stride) = (off as usize, stride as usize);
        if stride < width {
            return Err(Error::argument(format!("{} stride", self.name(i)), stride, format!("at least {width}")));
        }
        Ok(if len < off + width { 0 } else { 1 + (len - off - width) / stride })
    }

    fn memory(&self, i: usize) -> Result<&'p Memory> {
        match self.launch.args[i].buffer.handle::<Memory>() {
            Some(memory) if memory.owner == self.owner => Ok(memory),
            _ => Err(Error::argument(self.name(i), "memory of another backend", "memory of this CPU backend")),
        }
    }

    fn start(&self, i: usize, need: u64, size: usize) -> Result<*const u8> {
        let view = &self.launch.args[i];
        let bytes = need.saturating_mul(size as u64);
        if view.bytes < bytes {
            let found = format!("{} bytes", view.bytes);
            return Err(Error::argument(self.name(i), found, format!("at least {bytes} bytes")));
        }
        // SAFETY: `new` has checked that the view lies inside the memory.
        Ok(unsafe { self.memory(i)?.ptr().add(view.offset as usize) })
    }

    fn misaligned<T>(&self, i: usize) -> Error {
        let found = format!("a view from byte {}", self.launch.args[i].offset);
        Error::argument(self.name(i), found, format!("a start that is a multiple of {}", size_of::<T>()))
    }
}

/// Numbers that `rows` rows of `width` numbers reach to, where row t starts at `off + t * stride`.
pub(super) fn reach(off: u32, stride: u32, rows: u32, width: u32) -> u64 {
    if rows == 0 { 0 } else { off as u64 + (rows as u64 - 1) * stride as u64 + width as u64 }
}

fn overlap(a: &View, b: &View) -> bool {
    a.buffer.id() == b.buffer.id() && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes
}

fn numbers<F: Fields>(kernel: &str, what: &str, words: &[u32]) -> Result<F> {
    bytemuck::try_pod_read_unaligned(bytemuck::cast_slice(words)).map_err(|_| {
        let expected = format!("{} numbers", F::FIELDS.len());
        Error::argument(format!("{kernel}: {what}"), format!("{} numbers", words.len()), expected)
    })
}
