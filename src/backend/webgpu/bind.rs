//! Bind groups, kept by what they bind: a decoded token binds the same hundreds as the one before.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use super::pipeline::{Layout, Pipeline};
use super::{Memory, Shared};
use crate::error::{Error, Result};
use crate::kernel::Access;
use crate::pass::Launch;

/// Bind groups that are kept; far more than a model has launches.
const MOST: usize = 8192;
/// Bytes bound for an argument of none.
const NOTHING_BYTES: u64 = 256;

/// The layout's address, then (memory, offset, bytes) for each argument.
type Key = Vec<u64>;

/// All bind groups of a device.
pub(super) struct Binds {
    groups: HashMap<Key, Kept>,
    key: Key,
    nothing_read: wgpu::Buffer,
    nothing_written: wgpu::Buffer,
}

struct Kept {
    group: wgpu::BindGroup,
    /// Keeps the address in the key from being used again.
    _layout: Arc<Layout>,
}

impl Binds {
    pub(super) fn new(device: &wgpu::Device) -> Self {
        let nothing = || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("bound for arguments of no bytes"),
                size: NOTHING_BYTES,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        };
        Binds { groups: HashMap::new(), key: Vec::new(), nothing_read: nothing(), nothing_written: nothing() }
    }

    /// Forgets the groups that bind memory which went away.
    pub(super) fn purge(&mut self, dropped: &mut Vec<u64>) {
        if dropped.is_empty() {
            return;
        }
        let gone: HashSet<u64> = dropped.drain(..).collect();
        self.groups.retain(|key, _| !key[1..].chunks(3).any(|arg| gone.contains(&arg[0])));
    }

    /// The bind group of a launch.
    pub(super) fn get(
        &mut self,
        shared: &Shared,
        pipeline: &Pipeline,
        launch: &Launch,
        uniforms: &wgpu::Buffer,
    ) -> Result<wgpu::BindGroup> {
        let kernel = launch.kernel;
        if launch.args.len() != kernel.args.len() || launch.params.len() != kernel.params.len() {
            let found = format!("{} arguments, {} params", launch.args.len(), launch.params.len());
            let expected = format!("{} and {}", kernel.args.len(), kernel.params.len());
            return Err(Error::argument(format!("launch of {}", kernel.name), found, expected));
        }
        let mut key = std::mem::take(&mut self.key);
        key.clear();
        key.push(Arc::as_ptr(&pipeline.layout) as u64);
        let mut memories = Vec::with_capacity(launch.args.len());
        for (i, view) in launch.args.iter().enumerate() {
            let memory = shared.memory(kernel.args[i].name, view)?;
            key.extend([memory.id, view.offset, view.bytes]);
            memories.push(memory);
        }
        let group = match self.groups.get(&key) {
            Some(kept) => kept.group.clone(),
            None => {
                check(shared, launch, &memories)?;
                let group =
                    shared.guarded(kernel.name, || self.create(shared, pipeline, launch, &memories, uniforms))?;
                if self.groups.len() >= MOST {
                    self.groups.clear();
                }
                let kept = Kept { group: group.clone(), _layout: pipeline.layout.clone() };
                self.groups.insert(key.clone(), kept);
                group
            }
        };
        self.key = key;
        Ok(group)
    }

    fn create(
        &self,
        shared: &Shared,
        pipeline: &Pipeline,
        launch: &Launch,
        memories: &[&Memory],
        uniforms: &wgpu::Buffer,
    ) -> wgpu::BindGroup {
        let bytes = |n| NonZeroU64::new(n);
        let uniform = wgpu::BufferBinding { buffer: uniforms, offset: 0, size: bytes(pipeline.layout.uniform_bytes) };
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(uniform) }];
        for (i, view) in launch.args.iter().enumerate() {
            // Memory is padded to 16 bytes, so the last row of 16 is there whole for kernels that read such rows.
            let buffer = match (view.bytes, launch.kernel.args[i].access) {
                (0, Access::Read) => wgpu::BufferBinding { buffer: &self.nothing_read, offset: 0, size: None },
                (0, _) => wgpu::BufferBinding { buffer: &self.nothing_written, offset: 0, size: None },
                (n, _) => wgpu::BufferBinding {
                    buffer: &memories[i].buffer,
                    offset: view.offset,
                    size: bytes(n.next_multiple_of(16)),
                },
            };
            let resource = wgpu::BindingResource::Buffer(buffer);
            entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
        }
        shared.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(launch.kernel.name),
            layout: &pipeline.layout.bind,
            entries: &entries,
        })
    }
}

/// What WebGPU would refuse, said in our words.
fn check(shared: &Shared, launch: &Launch, memories: &[&Memory]) -> Result<()> {
    let caps = &shared.caps;
    for (i, (arg, view)) in launch.kernel.args.iter().zip(&launch.args).enumerate() {
        let what = || format!("argument {} of {}", arg.name, launch.kernel.name);
        if view.offset.checked_add(view.bytes).is_none_or(|end| end > view.buffer.bytes()) {
            let found = format!("{} bytes from {}", view.bytes, view.offset);
            return Err(Error::argument(what(), found, format!("inside {} bytes", view.buffer.bytes())));
        }
        if view.offset % caps.align != 0 {
            let found = format!("a view that starts at byte {}", view.offset);
            return Err(Error::argument(what(), found, format!("a multiple of {}", caps.align)));
        }
        if view.bytes > caps.max_binding {
            return Err(Error::Unsupported {
                what: format!("{} with {} bytes", what(), view.bytes),
                by: caps.name.clone(),
                why: format!("a kernel sees at most {} bytes through one argument", caps.max_binding),
            });
        }
        // Memory that is written may not be seen through another argument: the order would be open.
        let written = arg.access != Access::Read && view.bytes > 0;
        for (j, other) in launch.args.iter().enumerate() {
            let other_read = launch.kernel.args[j].access == Access::Read && other.bytes > 0;
            if written && other_read && memories[i].id == memories[j].id {
                let found = format!("the memory that {} reads", launch.kernel.args[j].name);
                return Err(Error::argument(what(), found, "a buffer of its own: it is written"));
            }
        }
    }
    Ok(())
}
