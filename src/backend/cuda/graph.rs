//! Passes that come again, replayed as CUDA graphs: one call of the driver for hundreds of launches.
//!
//! A pass is the same as one before if it launches the same kernels in the same order. What differs (a position, a page of a cache
//! that has grown) is written into the graph's nodes before it is launched; a decoded token changes a few of its hundreds.
//! The first time a pass comes it is launched as it is: most passes of a prompt never come again.

use cudarc::driver::sys::{self, CUDA_KERNEL_NODE_PARAMS, CUgraph, CUgraphExec, CUgraphNode};

use super::Shared;
use super::launch::Call;
use crate::error::Result;

/// Launches from which a graph pays, where none is beside another: queued one by one, those would wait for each other.
const LEAST: usize = 8;
/// Passes that are remembered; a model has one for a token and few for pieces of a prompt.
const MOST: usize = 8;

/// The passes that came before, the last one at the end.
#[derive(Default)]
pub(super) struct Graphs {
    known: Vec<Known>,
}

struct Known {
    /// Kernels and threads, in order, and which are beside the one before.
    shape: Vec<(usize, u32, bool)>,
    graph: Option<Graph>,
}

struct Graph {
    graph: CUgraph,
    exec: CUgraphExec,
    nodes: Vec<CUgraphNode>,
    /// What the nodes hold.
    held: Vec<Held>,
}

struct Held {
    grid: [u32; 3],
    launch: Vec<u64>,
}

// SAFETY: handles of the driver, which any thread may use; changes are made under the lock that holds them.
unsafe impl Send for Graph {}

impl Graphs {
    /// Launches the calls as a graph, if they came before; false if they must be launched one by one. The device's context is
    /// current.
    pub(super) fn replay(&mut self, shared: &Shared, calls: &[Call]) -> Result<bool> {
        if calls.len() < LEAST && !calls.iter().any(|call| call.beside) {
            return Ok(false);
        }
        let of = |c: &Call| (c.variant.function as usize, c.variant.threads, c.beside);
        let shape: Vec<(usize, u32, bool)> = calls.iter().map(of).collect();
        let Some(at) = self.known.iter().position(|k| k.shape == shape) else {
            if self.known.len() == MOST
                && let Some(graph) = self.known.remove(0).graph
            {
                graph.free();
            }
            self.known.push(Known { shape, graph: None });
            return Ok(false);
        };
        let mut known = self.known.remove(at);
        let result = match &mut known.graph {
            Some(graph) => graph.update(shared, calls),
            None => Graph::new(shared, calls).map(|graph| known.graph = Some(graph)),
        };
        // A graph whose update failed holds something in between.
        if result.is_err()
            && let Some(graph) = known.graph.take()
        {
            graph.free();
        }
        let launched = result.and_then(|()| match &known.graph {
            // SAFETY: the graph is whole, and its memory is that of the pass, whose views are alive.
            Some(graph) => {
                shared.fault.result("launch of a graph", unsafe { sys::cuGraphLaunch(graph.exec, shared.stream) })
            }
            None => Ok(()),
        });
        self.known.push(known);
        launched.map(|()| true)
    }

    /// Gives all graphs back. The device's context is current, and nothing is queued.
    pub(super) fn free(&mut self) {
        for known in self.known.drain(..) {
            if let Some(graph) = known.graph {
                graph.free();
            }
        }
    }
}

impl Graph {
    /// The calls, stage after stage: a call waits for all of the stage before its own.
    fn new(shared: &Shared, calls: &[Call]) -> Result<Self> {
        let fault = &shared.fault;
        let mut graph = Graph {
            graph: std::ptr::null_mut(),
            exec: std::ptr::null_mut(),
            nodes: Vec::with_capacity(calls.len()),
            held: Vec::with_capacity(calls.len()),
        };
        // SAFETY: the driver writes to the graph's own fields, and copies what the parameters point to.
        let built = unsafe {
            fault.result("creating a graph", sys::cuGraphCreate(&mut graph.graph, 0)).and_then(|()| {
                // The stage before, and where the one that grows starts.
                let (mut before, mut start) = (0..0, 0);
                for call in calls {
                    if !call.beside {
                        before = start..graph.nodes.len();
                        start = graph.nodes.len();
                    }
                    let waits_for = graph.nodes[before.clone()].to_vec();
                    let mut args = call.parameters();
                    let params = params(call, &mut args);
                    let mut node = std::ptr::null_mut();
                    let code = sys::cuGraphAddKernelNode_v2(
                        &mut node,
                        graph.graph,
                        waits_for.as_ptr(),
                        waits_for.len(),
                        &params,
                    );
                    fault.result("adding to a graph", code)?;
                    graph.nodes.push(node);
                    graph.held.push(Held { grid: call.grid, launch: call.launch.clone() });
                }
                fault.result("instantiating a graph", sys::cuGraphInstantiateWithFlags(&mut graph.exec, graph.graph, 0))
            })
        };
        match built {
            Ok(()) => Ok(graph),
            Err(error) => {
                graph.free();
                Err(error)
            }
        }
    }

    /// Writes what differs from the calls into the nodes.
    fn update(&mut self, shared: &Shared, calls: &[Call]) -> Result<()> {
        for ((node, held), call) in self.nodes.iter().zip(&mut self.held).zip(calls) {
            if held.grid == call.grid && held.launch == call.launch {
                continue;
            }
            let mut args = call.parameters();
            let params = params(call, &mut args);
            // SAFETY: the node belongs to the graph and launches the same kernel; the driver copies the parameters.
            let code = unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.exec, *node, &params) };
            shared.fault.result("changing a graph", code)?;
            held.grid = call.grid;
            held.launch.clone_from(&call.launch);
        }
        Ok(())
    }

    fn free(self) {
        // SAFETY: handles of the driver or null; a graph that runs is let go when it has ended.
        unsafe {
            if !self.exec.is_null() {
                sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

/// A call as the parameters of a node; `args` says where its own are.
fn params(call: &Call, args: &mut [*mut std::ffi::c_void; 2]) -> CUDA_KERNEL_NODE_PARAMS {
    let [x, y, z] = call.grid;
    CUDA_KERNEL_NODE_PARAMS {
        func: call.variant.function,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: call.variant.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: call.variant.shared_bytes,
        kernelParams: args.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    }
}
