//! Every kernel row in every variant that `tune` can choose, checked without a device: it parses, validates, binds exactly
//! what the row says, keeps the limits, and can be written as SPIR-V, MSL and HLSL.

use std::collections::BTreeSet;

use gatedelta::kernel::{self, Access, Kernel, Scalar};
use gatedelta::shape::{Dtype, HeadMap, Heads};
use gatedelta::source::{self, Features};
use gatedelta::tune::{self, Caps, Class, Kind};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

/// Devices that `tune` tells apart.
fn devices() -> Vec<Caps> {
    let base = Caps {
        name: "default limits".into(),
        driver: String::new(),
        kind: Kind::WebGpu,
        class: Class::Other,
        max_binding: 128 << 20,
        max_buffer: 256 << 20,
        align: 256,
        workgroup_memory: 16 << 10,
        workgroup_threads: 256,
        subgroup: None,
        f16: false,
        threads: 0,
        memory: None,
    };
    let mut devices = vec![base.clone()];
    for class in [Class::Other, Class::Discrete, Class::Software] {
        for (memory, threads) in [(16 << 10, 256), (48 << 10, 1024)] {
            for subgroup in [None, Some((4, 4)), Some((8, 32))] {
                devices.push(Caps {
                    name: format!("{class:?}, {memory} bytes, {threads} threads, subgroups {subgroup:?}"),
                    class,
                    workgroup_memory: memory,
                    workgroup_threads: threads,
                    subgroup,
                    f16: subgroup.is_some(),
                    max_binding: 2 << 30,
                    max_buffer: 4 << 30,
                    align: 32,
                    ..base.clone()
                });
            }
        }
    }
    devices
}

/// Head sizes and groups: the released models', the smallest, the largest, and sizes that no power of two divides well.
fn heads() -> Vec<Heads> {
    [(128, 128, 1), (128, 128, 2), (128, 128, 3), (16, 16, 1), (256, 256, 1), (64, 128, 2), (48, 80, 1), (176, 16, 4)]
        .into_iter()
        .chain([(240, 208, 1), (16, 256, 2), (256, 16, 1), (96, 64, 1)])
        .map(|(k, v, group)| Heads::new(2, 2 * group, k, v, HeadMap::Div).expect("heads"))
        .collect()
}

/// A variant: the consts of a row, and the device it was chosen for.
struct Variant {
    kernel: &'static Kernel,
    consts: Vec<u32>,
    caps: Caps,
}

/// Consts in the order of the row, by name: a const that a row gains or loses fails here.
fn variant(kernel: &'static Kernel, caps: &Caps, consts: &[(&str, u32)]) -> Variant {
    let names: Vec<&str> = kernel.consts.iter().map(|f| f.name).collect();
    let given: Vec<&str> = consts.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, given, "consts of {}", kernel.name);
    Variant { kernel, consts: consts.iter().map(|(_, value)| *value).collect(), caps: caps.clone() }
}

/// The variants of the operator's rows for one device and head shape.
fn gdn_variants(caps: &Caps, heads: &Heads, out: &mut Vec<Variant>) {
    use kernel::gdn::*;
    let tile = tune::tile(caps, heads);
    for ty in 0..3 {
        for l2norm in 0..2 {
            for grad in 0..2 {
                let prepare = [
                    ("chunk", tile.chunk),
                    ("dk", heads.k),
                    ("group", heads.group()),
                    ("qk_type", ty),
                    ("l2norm", l2norm),
                    ("grad", grad),
                    ("lanes", tile.prepare_lanes),
                ];
                out.push(variant(&PREPARE, caps, &prepare));
            }
            for store in 0..2 {
                let step = [
                    ("dk", heads.k),
                    ("dv_tile", tile.dv_step),
                    ("qk_type", ty),
                    ("v_type", ty),
                    ("l2norm", l2norm),
                    ("store", store),
                    ("lanes", tile.step_lanes),
                ];
                out.push(variant(&STEP, caps, &step));
            }
        }
        for (save, walk, grad) in
            [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 0), (2, 1, 0), (2, 2, 0), (2, 2, 1)]
        {
            let scan = [
                ("chunk", tile.chunk),
                ("dk", heads.k),
                ("dv_tile", tile.dv_tile),
                ("qk_type", ty),
                ("v_type", ty),
                ("save", save),
                ("walk", walk),
                ("grad", grad),
                ("lanes", tile.scan_lanes),
            ];
            out.push(variant(&SCAN, caps, &scan));
        }
        // The state of a transition has K columns.
        let square = tune::tile(caps, &Heads { v: heads.k, ..*heads });
        for grad in 0..2 {
            let scan = [
                ("chunk", tile.chunk),
                ("dk", heads.k),
                ("dv_tile", square.dv_tile),
                ("qk_type", ty),
                ("v_type", ty),
                ("save", 2),
                ("walk", 3),
                ("grad", grad),
                ("lanes", square.scan_lanes),
            ];
            out.push(variant(&SCAN, caps, &scan));
        }
    }
    for flags in 0..12 {
        let cut = [("chunk", tile.chunk), ("grad", flags & 1), ("back", flags >> 1 & 1), ("exact", flags >> 2)];
        out.push(variant(&kernel::gdn_cut::CUT, caps, &cut));
    }
    for back in 0..2 {
        let lanes = tune::carry_lanes(caps, heads, tile.dv_tile);
        let carry = [("dk", heads.k), ("dv_tile", tile.dv_tile), ("back", back), ("lanes", lanes)];
        out.push(variant(&kernel::gdn_cut::CARRY, caps, &carry));
    }
    out.push(variant(&GATED_NORM, caps, &[("dv", heads.v), ("lanes", tune::head_lanes(caps, heads.v))]));
    let mix = [("dk", heads.k), ("dv", heads.v), ("lanes", tune::mix_lanes(caps, heads))];
    out.push(variant(&MIX_STEP, caps, &mix));
    let norm = [("dv", heads.v), ("lanes", tune::norm_grad_lanes(caps, heads.v))];
    out.push(variant(&kernel::grad::GATED_NORM_GRAD, caps, &norm));
}

/// The variants of the gradients around the operator.
fn around_grad_variants(caps: &Caps, out: &mut Vec<Variant>) {
    use kernel::grad::*;
    for taps in [2, 4, 8] {
        for flag in 0..8 {
            let (silu, add, store) = (flag & 1, flag >> 1 & 1, flag >> 2);
            out.push(variant(&CONV_GRAD, caps, &[("taps", taps), ("silu", silu)]));
            let consts = [("taps", taps), ("silu", silu), ("add", add), ("store", store)];
            out.push(variant(&CONV_TAIL_GRAD, caps, &consts));
        }
    }
    for hv in [1, 16, 48, 70] {
        out.push(variant(&GATE_GRAD, caps, &[("lanes", tune::gate_grad_lanes(caps, hv))]));
    }
    let (columns, lanes) = tune::sum_rows(caps);
    out.push(variant(&SUM_ROWS, caps, &[("columns", columns), ("lanes", lanes)]));
}

/// The variants of the backward pass's rows for one device and head shape.
fn grad_variants(caps: &Caps, heads: &Heads, out: &mut Vec<Variant>) {
    use kernel::gdn_grad::*;
    let tile = tune::tile(caps, heads);
    for ty in 0..3 {
        for walk in 0..3 {
            let scan = [
                ("chunk", tile.chunk),
                ("dk", heads.k),
                ("dv_tile", tile.dv_grad),
                ("qk_type", ty),
                ("v_type", ty),
                ("walk", walk),
                ("lanes", tile.grad_lanes),
            ];
            out.push(variant(&GRAD_SCAN, caps, &scan));
        }
        let chunk = [
            ("chunk", tile.chunk),
            ("dk", heads.k),
            ("dv", heads.v),
            ("v_type", ty),
            ("lanes", tune::grad_chunk_lanes(caps)),
        ];
        out.push(variant(&GRAD_CHUNK, caps, &chunk));
        for l2norm in 0..2 {
            let qk = [
                ("chunk", tile.chunk),
                ("dk", heads.k),
                ("dv", heads.v),
                ("group", heads.group()),
                ("qk_type", ty),
                ("l2norm", l2norm),
                ("lanes", tune::grad_qk_lanes(caps, heads.k, tile.chunk)),
            ];
            out.push(variant(&GRAD_QK, caps, &qk));
        }
    }
    out.push(variant(&GRAD_GATES, caps, &[("chunk", tile.chunk)]));
}

/// The variants of rows that do not depend on heads.
fn other_variants(caps: &Caps, out: &mut Vec<Variant>) {
    use kernel::gdn::*;
    use kernel::model::*;
    for taps in [2, 4, 8] {
        for flag in 0..4 {
            out.push(variant(&CONV, caps, &[("taps", taps), ("silu", flag & 1), ("store_tail", flag >> 1)]));
        }
        out.push(variant(&CONV_TAIL, caps, &[("taps", taps)]));
    }
    for row in [&GATE, &COPY, &FILL, &SWIGLU] {
        out.push(variant(row, caps, &[("block", tune::block(caps))]));
    }
    out.push(variant(&RMS_NORM, caps, &[("lanes", tune::row_lanes(caps, 1024))]));
    out.push(variant(&ARGMAX, caps, &[("lanes", tune::argmax_lanes(caps))]));
    for (ty, dtype) in [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().enumerate() {
        let ty = ty as u32;
        out.push(variant(&EMBED, caps, &[("w_type", ty)]));
        for flags in 0..4 {
            products(caps, dtype, flags & 1, flags >> 1, out);
        }
        for dim in [64, 128, 256] {
            let lanes = tune::head_lanes(caps, dim);
            let consts = [("dim", dim), ("rot", dim / 4), ("kv_type", ty), ("lanes", lanes)];
            out.push(variant(&ATTN_PREPARE, caps, &consts));
            out.push(variant(&ATTEND_MERGE, caps, &[("dim", dim), ("lanes", lanes)]));
            for rows in [1, 4, 8, 16, 1000] {
                let tile = tune::attend(caps, rows, 2, 4096, 1 << 16);
                let consts = [
                    ("dim", dim),
                    ("kv_type", ty),
                    ("tile_q", tile.tile_q),
                    ("tile_k", tile.tile_k),
                    ("lanes", tile.lanes),
                ];
                out.push(variant(&ATTEND, caps, &consts));
            }
        }
    }
}

/// The variants of products with weights.
fn products(caps: &Caps, dtype: Dtype, add: u32, wide: u32, out: &mut Vec<Variant>) {
    use kernel::model::*;
    for (m, n, k) in [(2048, 6144, 1024), (512, 2048, 1024), (64, 512, 1024), (9, 48, 80)] {
        let tile = tune::matmul(caps, m, n, k, dtype);
        let consts = [
            ("w_type", dtype.code()),
            ("add", add),
            ("tile_m", tile.tile_m),
            ("tile_n", tile.tile_n),
            ("tile_k", tile.tile_k),
            ("reg_m", tile.reg_m),
            ("reg_n", tile.reg_n),
            ("lanes", tile.lanes()),
            ("wide", wide),
        ];
        out.push(variant(&MATMUL, caps, &consts));
    }
    let tile = tune::matvec(caps, 3072, 1024, dtype);
    for fused in 0..4 {
        for batch in [1, 2, 4, 8] {
            let (norm, glu) = (fused & 1, fused >> 1);
            let consts = [
                ("w_type", dtype.code()),
                // The activation replaces y.
                ("add", add & (1 - glu)),
                ("norm", norm),
                ("glu", glu),
                ("rows", tile.rows),
                ("batch", batch),
                ("lanes", tile.lanes),
                ("wide", wide),
            ];
            out.push(variant(&MATVEC, caps, &consts));
        }
    }
}

/// All variants, each text once, for the least workgroup memory that it was chosen for.
fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for caps in devices() {
        for heads in heads() {
            gdn_variants(&caps, &heads, &mut all);
            grad_variants(&caps, &heads, &mut all);
        }
        other_variants(&caps, &mut all);
        around_grad_variants(&caps, &mut all);
    }
    all.sort_by_key(|v| v.caps.workgroup_memory);
    let mut seen = BTreeSet::new();
    all.retain(|v| seen.insert((v.kernel.name, v.consts.clone(), Features::of(&v.caps))));
    all
}

fn parse(text: &str) -> Result<(naga::Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let mut validator =
        Validator::new(ValidationFlags::all(), Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16_IN_FLOAT32);
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(text))?;
    Ok((module, info))
}

/// Holds the text against the row.
fn check(kernel: &Kernel, text: &str, caps: &Caps) -> Result<(), String> {
    let (module, info) = parse(text)?;
    let [entry] = &module.entry_points[..] else {
        return Err(format!("{} entry points", module.entry_points.len()));
    };
    if entry.name != kernel.name {
        return Err(format!("entry point {}, row {}", entry.name, kernel.name));
    }
    let used = info.get_entry_point(0);
    let threads: u32 = entry.workgroup_size.iter().product();
    if threads == 0 || threads > caps.workgroup_threads {
        return Err(format!("{threads} threads of {}", caps.workgroup_threads));
    }
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).map_err(|e| e.to_string())?;
    let mut workgroup_bytes = 0;
    let mut bound = Vec::new();
    for (handle, global) in module.global_variables.iter() {
        let name = global.name.clone().unwrap_or_default();
        match global.space {
            naga::AddressSpace::WorkGroup if !used[handle].is_empty() => {
                workgroup_bytes += layouter[global.ty].to_stride();
            }
            naga::AddressSpace::WorkGroup | naga::AddressSpace::Private => {}
            naga::AddressSpace::Uniform => check_params(kernel, &module, global)?,
            naga::AddressSpace::Storage { access } => {
                let binding = global.binding.ok_or(format!("{name} has no binding"))?;
                if binding.group != 0 {
                    return Err(format!("{name} is in group {}", binding.group));
                }
                if used[handle].is_empty() {
                    return Err(format!("{name} is never used"));
                }
                bound.push((binding.binding, name, access));
            }
            _ => return Err(format!("{name} lives in {:?}", global.space)),
        }
    }
    if workgroup_bytes > caps.workgroup_memory {
        return Err(format!("{workgroup_bytes} bytes of workgroup memory of {}", caps.workgroup_memory));
    }
    bound.sort();
    let expected: Vec<_> = kernel
        .args
        .iter()
        .enumerate()
        .map(|(i, arg)| {
            let access = match arg.access {
                Access::Read => naga::StorageAccess::LOAD,
                Access::Write | Access::Update => naga::StorageAccess::LOAD | naga::StorageAccess::STORE,
            };
            (i as u32 + 1, arg.name.to_string(), access)
        })
        .collect();
    if bound != expected {
        return Err(format!("bound {bound:?}, row says {expected:?}"));
    }
    if kernel.args.len() > 8 {
        return Err(format!("{} storage buffers", kernel.args.len()));
    }
    Ok(())
}

/// The uniform: base, then the params of the row, 4 bytes each.
fn check_params(kernel: &Kernel, module: &naga::Module, global: &naga::GlobalVariable) -> Result<(), String> {
    if global.binding != Some(naga::ResourceBinding { group: 0, binding: 0 }) {
        return Err(format!("params at {:?}", global.binding));
    }
    let naga::TypeInner::Struct { members, .. } = &module.types[global.ty].inner else {
        return Err("params is no struct".into());
    };
    let found: Vec<_> = members
        .iter()
        .map(|m| (m.name.clone().unwrap_or_default(), module.types[m.ty].inner.clone(), m.offset))
        .collect();
    let scalar = naga::TypeInner::Scalar;
    let mut expected = vec![(
        "base".to_string(),
        naga::TypeInner::Vector { size: naga::VectorSize::Tri, scalar: naga::Scalar::U32 },
        0,
    )];
    for (i, field) in kernel.params.iter().enumerate() {
        let ty = match field.ty {
            Scalar::U32 => scalar(naga::Scalar::U32),
            Scalar::F32 => scalar(naga::Scalar::F32),
        };
        expected.push((field.name.to_string(), ty, 12 + 4 * i as u32));
    }
    if found == expected { Ok(()) } else { Err(format!("params {found:?}, row says {expected:?}")) }
}

/// Writes the kernel in the languages of the drivers.
fn write_out(text: &str, name: &str) -> Result<(), String> {
    let (module, info) = parse(text)?;
    let spv_options = spv::Options { lang_version: (1, 3), ..Default::default() };
    let stage = naga::ShaderStage::Compute;
    let pipeline = spv::PipelineOptions { shader_stage: stage, entry_point: name.into() };
    let words = spv::write_vec(&module, &info, &spv_options, Some(&pipeline)).map_err(|e| format!("SPIR-V: {e}"))?;
    if words.len() < 64 {
        return Err("SPIR-V: empty".into());
    }
    let msl_options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    let (text, _) = msl::write_string(&module, &info, &msl_options, &msl::PipelineOptions::default())
        .map_err(|e| format!("MSL: {e}"))?;
    if !text.contains("kernel void") {
        return Err("MSL: no kernel".into());
    }
    let hlsl_options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_0, ..Default::default() };
    let hlsl_pipeline = hlsl::PipelineOptions { entry_point: Some((stage, name.into())) };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &hlsl_options, &hlsl_pipeline)
        .write(&module, &info, None)
        .map_err(|e| format!("HLSL: {e}"))?;
    if !text.contains("numthreads") {
        return Err("HLSL: no kernel".into());
    }
    Ok(())
}

#[test]
fn every_row_has_a_variant_in_this_test() {
    let covered: BTreeSet<&str> = variants().iter().map(|v| v.kernel.name).collect();
    let missing: Vec<&str> = kernel::ALL.iter().map(|k| k.name).filter(|name| !covered.contains(name)).collect();
    assert!(missing.is_empty(), "rows without a variant: {missing:?}");
}

#[test]
fn every_variant_keeps_its_row() {
    let mut failures = Vec::new();
    let all = variants();
    for v in &all {
        let checked = source::wgsl(v.kernel, &v.consts, Features::of(&v.caps))
            .map_err(|e| e.to_string())
            .and_then(|text| check(v.kernel, &text, &v.caps));
        if let Err(e) = checked {
            failures.push(format!("{} {:?} on {}: {e}", v.kernel.name, v.consts, v.caps.name));
        }
    }
    println!("{} variants", all.len());
    failures.truncate(5);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_variant_can_be_written_for_every_driver() {
    let mut failures = Vec::new();
    for v in variants() {
        let written = source::wgsl(v.kernel, &v.consts, Features::of(&v.caps))
            .map_err(|e| e.to_string())
            .and_then(|text| write_out(&text, v.kernel.name));
        if let Err(e) = written {
            failures.push(format!("{} {:?}: {e}", v.kernel.name, v.consts));
        }
    }
    failures.truncate(5);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn planted_errors_are_found() {
    let caps = &devices()[0];
    let row = &kernel::gdn::GATED_NORM;
    let text = source::wgsl(row, &[64, 32], Features::default()).expect("text");
    check(row, &text, caps).expect("the shader as it is");
    let planted = [
        ("a renamed binding", text.replace("> z:", "> zz:").replace("silu(z[", "silu(zz["), "bound"),
        ("a wrong access", text.replace("<storage, read> w:", "<storage, read_write> w:"), "bound"),
        ("swapped bindings", text.replace("binding(1)", "binding(9)").replace("binding(2)", "binding(1)"), "bound"),
        ("an extra param", text.replace("    eps: f32,", "    eps: f32,\n    more: u32,"), "params"),
        ("a param of another type", text.replace("    tokens: u32,", "    tokens: f32,"), "params"),
        (
            "params in another order",
            text.replace("    hv: u32,\n    tokens: u32,", "    tokens: u32,\n    hv: u32,"),
            "params",
        ),
        ("another entry point", text.replace("fn gated_norm(", "fn gated_norms("), "entry point"),
        ("too many threads", text.replace("workgroup_size(LANES)", "workgroup_size(512)"), "threads"),
        (
            "too much memory",
            text.replace("reduce_part: array<vec4<f32>, LANES>", "reduce_part: array<vec4<f32>, 1025>"),
            "workgroup memory",
        ),
        ("a type error", text.replace("f32(DV)", "DV"), "error"),
    ];
    for (what, planted, says) in planted {
        assert_ne!(planted, text, "{what} was not planted");
        match check(row, &planted, caps) {
            Ok(()) => panic!("{what} was not found"),
            Err(e) => assert!(e.contains(says), "{what} was found as: {e}"),
        }
    }
    let missing = Kernel { name: "no_such_kernel", args: &[], consts: &[], params: &[] };
    assert!(source::wgsl(&missing, &[], Features::default()).is_err());
    assert!(source::wgsl(row, &[64], Features::default()).is_err());
}
