//! The Hopper kernels (`cuda/hopper/backward.cuh`) in the place of a backward pass's rows:
//! see [`super::OpenOptions::hopper`].
//!
//! A piece of a [`crate::gdn::Backward`] has two halves in its pass, with those of other pieces between them: `gdn_prepare` and a
//! `gdn_scan` that saves; then `gdn_grad_scan`, `gdn_grad_chunk`, `gdn_grad_qk` and `gdn_grad_gates`. What the Hopper kernels leave for each
//! other lies in the rows' own scratch, which is larger: in ws the images and where sums cancel, in saved S, e and what is left of C, P and e there, in
//! dsaved dS' and what is left of it and of dV. So either both halves are replaced or none, and each half finds the other to decide it.

use super::Shared;
use super::hopper::{
    BACKWARD, CARRY_COLUMNS, CHUNK_BYTES, CUT_BYTES, FORGOTTEN, GRAD_BYTES, Hopper, Numbers, PANEL, Prepare,
    SEGMENT_BYTES, carry_bytes, longest, map_of, places, prepare_bytes, push_tables, transition_bytes,
};
use super::launch::Call;
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::{gdn, gdn_grad};
use crate::pass::{Launch, Pass};
use crate::shape::Dtype;

/// Which half of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The states again.
    Forward,
    /// The gradients.
    Backward,
    /// Both, where nothing is between them: what the states before the segments need and what their gradients need, and the two scans, are
    /// independent of each other and run at once.
    Both,
}

/// Launches in the place of a half's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialGrad {
    /// Which half.
    pub half: Half,
    /// Launches of the pass that they replace.
    pub launches: usize,
    /// What kernels' names end with: type and K.
    pub kind: String,
    /// Warpgroups of 64 columns of V that a block of the scans has, beside the one that loads.
    pub consumers: u32,
    /// Blocks of the last kernel.
    pub blocks: u32,
    /// Chunks of 64 tokens in a segment; 0: sequences stay whole.
    pub cut: u32,
}

/// Where the memory for segments starts in `saved`, behind S, e and what is left of C, P and e of all chunks, and what is in it: for each segment and head how many chunks
/// its end's state depends on, the same of its start's gradient, the state before it, the gradient of the state behind it, and the
/// transition over the segment before.
fn segment_memory(chunks: u64, segments: u64, k: u32, v: u32, hv: u32) -> ([u64; 5], u64) {
    let (k, v, hv) = (k as u64, v as u64, hv as u64);
    let sizes = [4, 4, 4 * k * v, 4 * k * v, transition_bytes(k)].map(|bytes| bytes * (segments + 1) * hv);
    let mut end = (kept_bytes(chunks, k, v) + lows_bytes(chunks, v)).next_multiple_of(256);
    let offsets = sizes.map(|size| {
        let offset = end;
        end += size.next_multiple_of(256);
        offset
    });
    (offsets, end)
}

/// Bytes of S or dS' of a chunk and head: 16 bits, and the next 8 (`kept_bytes` of backward.cuh).
fn state_bytes(k: u64, v: u64) -> u64 {
    3 * k * v
}

/// Bytes of S and e of so many chunks and heads.
fn kept_bytes(chunks: u64, k: u64, v: u64) -> u64 {
    chunks * (state_bytes(k, v) + 2 * 64 * v)
}

/// Bytes of what rounding leaves of C, P and e of so many chunks and heads, behind zeros: `lows` of backward.cuh.
fn lows_bytes(chunks: u64, v: u64) -> u64 {
    (2 * (1 + chunks) + chunks * v / 64) * u64::from(PANEL)
}

/// The same of dS' and dV: `rests`.
fn rests_bytes(chunks: u64, k: u64, v: u64) -> u64 {
    chunks * (v / 64) * (k / 64 + 1) * u64::from(PANEL)
}

/// Chunks of 64 tokens at most, of sequences that have so many of 32.
fn whole_chunks(chunks: u32, sequences: u32) -> u32 {
    (chunks + sequences).div_ceil(2).min(chunks)
}

/// Where `ws` says in which chunks sums cancel, behind the images of so many chunks and heads.
fn cancels_at(chunks: u64) -> u64 {
    (chunks * GRAD_BYTES).next_multiple_of(256)
}

fn same(a: &View, b: &View) -> bool {
    a.buffer.id() == b.buffer.id() && a.offset == b.offset && a.bytes == b.bytes
}

/// Whether a half starts at `at` that saves for a later one.
fn saves(launches: &[Launch], at: usize) -> bool {
    let [prepare, scan, ..] = &launches[at..] else { return false };
    *prepare.kernel == gdn::PREPARE
        && *scan.kernel == gdn::SCAN
        && [Numbers(prepare).get("grad"), Numbers(scan).get("grad"), Numbers(scan).get("save")] == [1; 3]
}

/// Where the halves of a piece start of which one starts at `at`: those between which nobody else saves to the same memory.
fn halves(launches: &[Launch], at: usize) -> Option<[usize; 2]> {
    let grads = |i: usize| *launches[i].kernel == gdn_grad::GRAD_SCAN;
    if saves(launches, at) {
        let ws = &launches[at].args[5];
        let next = (at + 2..launches.len()).find(|&i| {
            grads(i) && same(&launches[i].args[3], ws) || saves(launches, i) && same(&launches[i].args[5], ws)
        })?;
        return grads(next).then_some([at, next]);
    }
    if !grads(at) {
        return None;
    }
    let ws = &launches[at].args[3];
    let before = (0..at).rev().find(|&i| {
        grads(i) && same(&launches[i].args[3], ws) || saves(launches, i) && same(&launches[i].args[5], ws)
    })?;
    saves(launches, before).then_some([before, at])
}

/// The launches that replace those from `at` on, if there are any: those of a backward pass with bf16 q, k, v and d_o, a K of 128, a V
/// of 64 or 128, and rows that start at multiples of 16 bytes, whose sequences are not cut. `multiprocessors` are those of the device; `cut` is
/// how long segments shall be instead of what is best there.
pub fn special_grad(pass: &Pass, at: usize, multiprocessors: u32, cut: Option<u32>) -> Option<SpecialGrad> {
    let launches = &pass.launches;
    let [forward, backward] = halves(launches, at)?;
    let [prepare, scan] = &launches[forward..forward + 2] else { return None };
    let [grad_scan, grad_chunk, grad_qk, grad_gates] = launches.get(backward..backward + 4)? else { return None };
    let rows = [&gdn_grad::GRAD_SCAN, &gdn_grad::GRAD_CHUNK, &gdn_grad::GRAD_QK, &gdn_grad::GRAD_GATES];
    if [grad_scan, grad_chunk, grad_qk, grad_gates].iter().zip(rows).any(|(launch, row)| *launch.kernel != *row) {
        return None;
    }
    let [p, s, g, c, x] = [prepare, scan, grad_scan, grad_chunk, grad_qk].map(Numbers);
    let name = match Dtype::from_code(p.get("qk_type"))? {
        // dg of a head without decay, taken alone, may miss its bound in f16, and in bf16 where K is 64; the general kernels come closer.
        Dtype::F32 | Dtype::F16 => return None,
        Dtype::Bf16 => "bf16",
    };
    let (k, v, hv) = (p.get("dk"), s.get("dv"), p.get("hv"));
    let types = [s.get("v_type"), g.get("qk_type"), g.get("v_type"), c.get("v_type"), x.get("qk_type")];
    let fits = types == [p.get("qk_type"); 5] && [s.get("walk"), g.get("walk")] == [0; 2] && p.get("chunk") == 32;
    if !fits || k != 128 || ![64, 128].contains(&v) {
        return None;
    }
    // All work on the same tokens and the same scratch.
    let (ws, saved, dsaved) = (&prepare.args[5], &scan.args[7], &grad_scan.args[7]);
    let pairs = [
        (&prepare.args[0], &grad_scan.args[0]),
        (&prepare.args[1], &grad_scan.args[1]),
        (&prepare.args[1], &scan.args[1]),
        (&prepare.args[0], &grad_qk.args[0]),
        (&prepare.args[1], &grad_qk.args[1]),
        (&grad_scan.args[2], &grad_chunk.args[1]),
        (&prepare.args[4], &scan.args[4]),
        (&prepare.args[4], &grad_scan.args[4]),
        (&scan.args[5], &grad_scan.args[5]),
        (ws, &scan.args[3]),
        (ws, &grad_scan.args[3]),
        (ws, &grad_chunk.args[2]),
        (ws, &grad_qk.args[2]),
        (ws, &grad_gates.args[0]),
        (saved, &grad_chunk.args[3]),
        (saved, &grad_qk.args[3]),
        (dsaved, &grad_chunk.args[4]),
        (dsaved, &grad_qk.args[4]),
    ];
    if pairs.iter().any(|(a, b)| !same(a, b)) {
        return None;
    }
    let whole = whole_chunks(prepare.grid[0], scan.grid[0]);
    let (chunks, k_64, v_64) = (whole as u64 * hv as u64, k as u64, v as u64);
    let needs = [
        (ws, cancels_at(chunks) + whole as u64 * p.get("hk") as u64),
        (saved, kept_bytes(chunks, k_64, v_64) + lows_bytes(chunks, v_64)),
        (dsaved, chunks * state_bytes(k_64, v_64) + rests_bytes(chunks, k_64, v_64)),
    ];
    if needs.iter().any(|(view, bytes)| view.bytes < *bytes) {
        return None;
    }
    let of = |numbers: &Numbers, names: &[&str]| {
        names.iter().all(|name| ["stride", "off"].iter().all(|what| numbers.get(&format!("{name}_{what}")) % 8 == 0))
    };
    if !(of(&s, &["k", "v"]) && of(&g, &["q", "k", "do"]) && of(&c, &["dv"]) && of(&x, &["dq", "dk"])) {
        return None;
    }
    let (sequences, heads) = (scan.grid[0] as u64, hv as u64 * (v as u64).div_ceil(128));
    // dv is not in the memory of v: gdn_grad_chunk has both, and what it writes may not be what it reads.
    let both = backward == forward + 2;
    let at_once = 1 + u64::from(both);
    let places_64 = prepare.grid[0] as u64 / 2;
    let cut = cut.unwrap_or_else(|| {
        BACKWARD.best_cut(longest(pass, sequences, places_64), places_64 * at_once * heads, multiprocessors)
    });
    let segments = places(sequences, prepare.grid[0] as u64, cut);
    let fits = saved.bytes >= segment_memory(chunks, segments, k, v, hv).1;
    let (cut, segments) = if fits { (cut, segments) } else { (0, sequences) };
    // Two consumers share the loads of a block; with few blocks, one each fills the device better. Of two scans at once on an H200, the second
    // block of a multiprocessor gains up to there: 8 sequences of 32768 tokens in all take 0.66 ms with one, 0.79 with two at 4/8, 1.14 and
    // 1.21 at 8/16, and 4 of them the same at 16/32; cut, 8 sequences at 2/4 0.356 and 0.364, but one at 8/16 1.169 and 1.148.
    let few = match (both, cut) {
        (true, 0) => sequences * heads <= multiprocessors as u64,
        (true, _) => 4 * places_64.div_ceil(cut.into()) * heads <= 3 * multiprocessors as u64,
        (false, _) => 3 * segments * heads < 2 * multiprocessors as u64,
    };
    let consumers = if v % 128 != 0 || few { 1 } else { 2 };
    let (half, launches) = match at == forward {
        true if both => (Half::Both, 6),
        true => (Half::Forward, 2),
        false => (Half::Backward, 4),
    };
    let blocks = multiprocessors.min(whole * p.get("hk"));
    Some(SpecialGrad { half, launches, kind: format!("{name}_k{k}"), consumers, blocks, cut })
}

/// ScanSmem::BYTES of scan.cuh for a pass that keeps, with 3 stages.
fn keep_bytes(k: u32, consumers: u32) -> u32 {
    let stage = (k / 64 + consumers + 1) * PANEL + 1024;
    3 * stage + consumers * (k / 64 + 1) * PANEL + 128 + 1024
}

/// ScanSmem::BYTES of scan.cuh for a pass over the image of the backward that only carries.
fn state_bytes_of(k: u32) -> u32 {
    3 * ((k / 64 + 2) * PANEL + 1024) + 128 + 1024
}

/// REVERSE_BYTES of reverse.cuh, with 3 stages, or with 2 for two consumers; 2 where sums cancel, with two panels more.
fn reverse_bytes(k: u32, consumers: u32) -> u32 {
    let stages = if consumers == 2 { 2 } else { 3 };
    let stage = (2 * (k / 64) + consumers + 2) * PANEL + 1024;
    (stages * stage).max(2 * (stage + 2 * PANEL)) + consumers * (k / 64 + 1) * PANEL + 128 + 1024
}

/// GradientSmem::BYTES of gradients.cuh.
fn gradient_bytes(k: u32) -> u32 {
    let (slots, slot) = (8, k / 64 * PANEL);
    slots * slot + 2 * 2 * slot + 2 * PANEL + 4 * 2048 + 2 * 4160 + 1024 + slots * 16 + 128 + 1024
}

/// CarefulSmem::BYTES of gradients_careful.cuh.
fn careful_bytes(k: u32, v: u32) -> u32 {
    let panels = 2 * (k / 64) + 5 * (v / 64) + 2 * (v / 64) * (k / 64) + 3;
    panels * PANEL + 2048 + 4160 + 256 + 1024 + 64 + 1024
}

impl Hopper {
    /// Appends the calls for a half or both, whose launches' arguments start at `addresses`.
    pub(super) fn grad_calls(
        &self,
        shared: &Shared,
        special: &SpecialGrad,
        launches: &[Launch],
        exact: bool,
        addresses: &[Vec<u64>],
        calls: &mut Vec<Call>,
    ) -> Result<()> {
        if special.half != Half::Both {
            return self.half_calls(shared, special, launches, exact, addresses, calls);
        }
        let half = |half: Half, range: std::ops::Range<usize>| {
            let (mut calls, special) = (Vec::new(), SpecialGrad { half, ..special.clone() });
            self.half_calls(shared, &special, &launches[range.clone()], exact, &addresses[range], &mut calls)?;
            Ok(calls)
        };
        let (forward, mut backward) = (half(Half::Forward, 0..2)?, half(Half::Backward, 2..6)?);
        let last = backward.split_off(backward.len() - 2);
        // The tables are there already; what is left is beside the last ones of the forward half, each beside its like.
        let mut backward = backward.into_iter().skip(1);
        let alone = forward.len() - backward.len();
        for (i, call) in forward.into_iter().enumerate() {
            if i == 0 {
                push_tables(calls, call);
            } else {
                calls.push(call);
            }
            if i >= alone {
                calls.extend(backward.next().map(|call| Call { beside: true, ..call }));
            }
        }
        calls.extend(last);
        Ok(())
    }

    /// Appends the calls for one half.
    fn half_calls(
        &self,
        shared: &Shared,
        special: &SpecialGrad,
        launches: &[Launch],
        exact: bool,
        addresses: &[Vec<u64>],
        calls: &mut Vec<Call>,
    ) -> Result<()> {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let (kind, consumers) = (&special.kind, special.consumers);
        let forward = special.half == Half::Forward;
        // The row that walks: gdn_scan or gdn_grad_scan. Both have q, k, v or d_o, ws, chunks, segments, the state and saved or dsaved.
        let walk = forward as usize;
        let (w, at) = (Numbers(&launches[walk]), &addresses[walk]);
        let (k, v, f16) = (w.get("dk"), w.get("dv"), w.get("qk_type") == Dtype::F16.code());
        let (hk, hv, head_map) = (w.get("hk"), w.get("hv"), w.get("head_map"));
        // Places of the tables: those of chunks of 32 tokens, the cells of gdn_prepare and gdn_grad_chunk.
        let places = launches[!forward as usize].grid[0];
        let sequences = launches[walk].grid[0];
        let at16 = |address: u64, numbers: &Numbers, name: &str| address + 2 * u64::from(numbers.get(name));
        let map = |launch: usize, i: usize, name: &str, width: u32| {
            map_of(shared, &launches[launch], i, name, addresses[launch][i], width, f16)
        };
        let whole = whole_chunks(places, sequences);

        // Segments, each of them a place of the tables, and what belongs to them.
        let (cut, chunks) = (special.cut, whole as u64 * hv as u64);
        let states = chunks * state_bytes(k as u64, v as u64);
        let segments = super::hopper::places(sequences as u64, places as u64, cut) as u32;
        let saved = if forward { at[7] } else { addresses[1][3] };
        let [warm, warm_back, starts, ends, transitions] =
            segment_memory(chunks, segments as u64, k, v, hv).0.map(|offset| saved + offset);
        // Where sums cancel.
        let lows = saved + kept_bytes(chunks, k as u64, v as u64);
        let cancels = (if forward { addresses[0][5] } else { at[3] }) + cancels_at(chunks);
        let of_segments = segments as u64 * SEGMENT_BYTES;
        let sizes = [places as u64 * CHUNK_BYTES, of_segments, of_segments, of_segments, sequences as u64 * CUT_BYTES];
        let mut needed = 0;
        let offsets = sizes.map(|size| {
            let offset = needed;
            needed += size.next_multiple_of(256);
            offset
        });
        let Some(tables) = self.scratch(shared, needed)? else {
            let (device, what) = (shared.caps.name.clone(), "tables of a backward pass".into());
            return Err(Error::OutOfMemory { device, what, needed, limit: "the device has no more".into() });
        };
        let [tables, own, back, ordered, cuts] = offsets.map(|offset| tables + offset);
        // TablesArgs of tables.cuh. Whole sequences are the same segments in both directions.
        let variant = self.function(shared, "hopper_tables", 128, 0, &[64])?;
        let [to_ordered, to_back] = if cut == 0 { [0, 0] } else { [ordered, back] };
        let launch = vec![at[4], at[5], tables, own, to_ordered, cuts, to_back, pair(cut, segments)];
        push_tables(calls, Call::new("hopper_tables", variant, [sequences, 1, 1], launch, None));
        // CarryArgs of forward.cuh: from the states (or gradients) that a sequence begins with, those that segments begin with.
        let threshold = if exact { f32::NEG_INFINITY } else { FORGOTTEN };
        let carry = |images: u64, from: u64, to: u64| {
            let numbers = [pair(threshold.to_bits(), hv), v.into()];
            [&[ordered, cuts, images, warm, from, to, transitions][..], &numbers].concat()
        };
        let (jobs, carry_grid) = (segments * hv, [sequences * hv, v / CARRY_COLUMNS, 1]);

        let scan_grid = [segments * hv * (v / 64 / consumers), 1, 1];
        let threads = (consumers + 1) * 128;
        let shape = [pair(hk, hv), pair(head_map, v), 0];
        if forward {
            let p = Numbers(&launches[0]);
            let [before, after] = [&addresses[0], &addresses[1]];
            let gates = 4 * u64::from(p.get("g_off"));
            // PrepareArgs, then PrepareMaps of forward.cuh.
            let args = [
                before[2] + gates,
                before[3] + gates,
                tables,
                before[5],
                pair(p.get("scale"), hk),
                pair(hv, head_map),
                pair(p.get("l2norm"), whole),
                lows,
                cancels,
            ];
            let launch = [&args[..], &map(0, 0, "q", hk * k)?, &map(0, 1, "k", hk * k)?].concat();
            let bytes = prepare_bytes(Prepare::Backward, k, hv / hk);
            let variant = self.function(shared, &format!("hopper_grad_prepare_{kind}"), 128, bytes, &[72, 256])?;
            calls.push(Call::new("hopper_grad_prepare", variant, [whole * hk, 1, 1], launch, Some(9)));

            let asked = [lows, cancels, whole.into(), 0];
            // ScanArgs, then ScanMaps, whose maps of q and o are not used.
            let (key, value) = (map(1, 1, "k", hk * k)?, map(1, 2, "v", hv * v)?);
            let maps = [key, key, value, value].concat();
            if cut > 0 {
                // GradWarmArgs of backward.cuh.
                let launch = [&carry(before[5], after[6], starts)[..], &[warm_back]].concat();
                let variant = self.function(shared, "hopper_grad_warm", 128, 0, &[80])?;
                calls.push(Call::new("hopper_grad_warm", variant, [jobs, 1, 1], launch, None));

                let args = [ordered, before[5], 0, starts, transitions, warm, 0, 0];
                let launch = [&args[..], &shape, &asked, &maps].concat();
                let bytes = state_bytes_of(k);
                let variant = self.function(shared, &format!("hopper_grad_state_{kind}"), 256, bytes, &[120, 512])?;
                let grid = [jobs * (v / 64 + k / 64), 1, 1];
                calls.push(Call::new("hopper_grad_state", variant, grid, launch, Some(15)));

                let launch = carry(before[5], after[6], starts);
                let name = format!("hopper_grad_carry_k{k}");
                let variant = self.function(shared, &name, k, carry_bytes(k), &[72])?;
                calls.push(Call::new("hopper_grad_carry", variant, carry_grid, launch, None));
            }
            // Without segments states are read and written in place.
            let from = if cut > 0 { starts } else { after[6] };
            let args = [own, before[5], from, after[6], after[7], 0, after[7] + states, 0];
            let launch = [&args[..], &shape, &asked, &maps].concat();
            let name = format!("hopper_keep_{kind}_w{consumers}");
            let variant = self.function(shared, &name, threads, keep_bytes(k, consumers), &[120, 512])?;
            calls.push(Call::new("hopper_keep", variant, scan_grid, launch, Some(15)));
            return Ok(());
        }

        let [c, x, gates] = [1, 2, 3].map(|i| Numbers(&launches[i]));
        let [of_chunk, of_qk, of_gates] = [&addresses[1], &addresses[2], &addresses[3]];
        let qk = [map(0, 0, "q", hk * k)?, map(0, 1, "k", hk * k)?];
        let d_o = map(0, 2, "do", hv * v)?;
        // ReverseArgs of backward.cuh, then ReverseMaps.
        let (dv, dv_stride) = (at16(of_chunk[6], &c, "dv_off"), u64::from(c.get("dv_stride")));
        let rests = at[7] + states;
        let reverse = |segments: u64, from: u64, to: u64, warm: u64| {
            let args = [segments, at[3], from, to, at[7], dv, dv_stride];
            [&args[..], &shape, &[warm, lows, rests, cancels], &qk.concat(), &d_o].concat()
        };
        if cut > 0 {
            let launch = reverse(ordered, 0, ends, warm_back);
            let name = format!("hopper_reverse_state_{kind}");
            let variant = self.function(shared, &name, 256, reverse_bytes(k, 1), &[112, 384])?;
            let grid = [jobs * (v / 64), 1, 1];
            calls.push(Call::new("hopper_reverse_state", variant, grid, launch, Some(14)));

            let launch = carry(at[3], at[6], ends);
            let name = format!("hopper_reverse_carry_k{k}");
            let variant = self.function(shared, &name, k, carry_bytes(k), &[72])?;
            calls.push(Call::new("hopper_reverse_carry", variant, carry_grid, launch, None));
        }
        // Without segments the gradient of the states is read and written in place.
        let launch = if cut > 0 { reverse(back, ends, at[6], 0) } else { reverse(own, at[6], at[6], 0) };
        let name = format!("hopper_reverse_{kind}_w{consumers}");
        let variant = self.function(shared, &name, threads, reverse_bytes(k, consumers), &[112, 384])?;
        calls.push(Call::new("hopper_reverse", variant, scan_grid, launch, Some(14)));

        // GradientArgs, then GradientMaps.
        let gate_off = 4 * u64::from(gates.get("g_off"));
        let args = [
            tables,
            at[3],
            of_chunk[3],
            at[7],
            of_chunk[3] + states,
            at16(of_qk[6], &x, "dq_off"),
            at16(of_qk[7], &x, "dk_off"),
            of_gates[2] + gate_off,
            of_gates[3] + gate_off,
            x.get("dq_stride").into(),
            x.get("dk_stride").into(),
            pair(c.get("scale"), whole),
            pair(hk, hv),
            pair(head_map, x.get("l2norm")),
            0,
            cancels,
            lows,
            rests,
            whole.into(),
        ];
        let of_qk_maps = [map(2, 6, "dq", hk * k)?, map(2, 7, "dk", hk * k)?].concat();
        let maps = [&qk.concat()[..], &d_o, &map(1, 6, "dv", hv * v)?, &of_qk_maps].concat();
        // The maps are aligned to 64 bytes from the start of the parameters, not of the vector: the driver copies each by itself.
        let launch = [&args[..], &maps].concat();
        let name = format!("hopper_gradients_{kind}_v{v}");
        let variant = self.function(shared, &name, 384, gradient_bytes(k), &[152, 768])?;
        let grid = [special.blocks, 1, 1];
        calls.push(Call::new("hopper_gradients", variant, grid, launch.clone(), Some(19)));
        // The chunks that it leaves alone.
        let name = format!("hopper_gradients_careful_{kind}_v{v}");
        let variant = self.function(shared, &name, 256, careful_bytes(k, v), &[152, 768])?;
        let careful = Call::new("hopper_gradients_careful", variant, grid, launch, Some(19));
        calls.push(Call { beside: true, ..careful });
        Ok(())
    }
}
