//! burn's tensors and the kernels on one device: the same numbers as on two, and nothing is lost between their queues.

use ::burn::module::Module;
use ::burn::tensor::{DType, Device, DeviceKind, Tensor};
use gatedelta::backend::webgpu::{DeviceType, WebGpu};
use gatedelta::burn::{Engine, Mixer, Qwen35, gated_delta_rule};
use gatedelta::gdn::Options;

use crate::burn::{NAMES, Operator, differentiate, distance, flex, ids, inputs, model, recurrence, weights, wide};
use crate::util::skipped;

/// The driver in software, shared. A process shares it once, so this file has one test for all that needs it.
fn shared() -> Option<(Engine, Device)> {
    if !WebGpu::enumerate().found.iter().any(|found| found.info.device_type == DeviceType::Cpu) {
        skipped("lavapipe", "no driver in software was found");
        return None;
    }
    let (engine, device) = Engine::share(DeviceKind::Cpu).unwrap();
    Some((engine, device.autodiff()))
}

#[test]
fn a_shared_device_gives_the_numbers_of_two() {
    let Some((engine, place)) = shared() else { return };
    for (i, (sizes, h0, l2norm)) in [
        ([2, 70, 1, 2, 16, 32], true, true),
        ([1, 1, 1, 1, 16, 16], false, false),
        ([3, 130, 2, 2, 32, 16], false, true),
        // The first shape again, after others have used the queue.
        ([2, 70, 1, 2, 16, 32], false, true),
    ]
    .into_iter()
    .enumerate()
    {
        let options = Options { qk_l2norm: l2norm, scale: Some(0.4), ..Options::default() };
        let mut x = inputs(sizes, 30 + i as u64);
        if !h0 {
            x[5].fill(0.0);
        }
        if !l2norm {
            x[1].iter_mut().for_each(|k| *k *= 0.1);
        }
        let w = weights(x[2].len() + x[5].len(), 40);
        let kernels: Operator<'_> = &|qkv, gates, h0| gated_delta_rule(&engine, qkv, gates, h0, &options);
        let (out, grads) = differentiate(kernels, &x, sizes, &w, h0, (DType::F32, &place));
        let again = differentiate(kernels, &x, sizes, &w, h0, (DType::F32, &place));
        assert_eq!((&out, &grads), (&again.0, &again.1), "{sizes:?}: other bits the second time");
        let e = distance(&out, &recurrence(&x, sizes, &options, true));
        assert!(e <= 1e-5, "{sizes:?}: {e:e}");
        let host = Engine::open(Some("cpu")).unwrap();
        let kernels: Operator<'_> = &|qkv, gates, h0| gated_delta_rule(&host, qkv, gates, h0, &options);
        let (_, expected) = differentiate(kernels, &x, sizes, &w, h0, (DType::F32, &flex()));
        for (name, (found, expected)) in NAMES.iter().zip(grads.iter().zip(&expected)) {
            let e = distance(found, expected);
            println!("{sizes:?} d{name}: {e:.1e}");
            assert!(e <= 1e-5, "{sizes:?} d{name}: {e:e}");
        }
        // Tensors of another device cross through the host.
        let kernels: Operator<'_> = &|qkv, gates, h0| gated_delta_rule(&engine, qkv, gates, h0, &options);
        let (far, _) = differentiate(kernels, &x, sizes, &w, h0, (DType::F32, &flex()));
        assert!(distance(&far, &out) <= 1e-6);
    }

    // A whole model: the loss and a gradient of every kind of layer, on both devices.
    let host = Engine::open(Some("cpu")).unwrap();
    let here = model(&host, true, 7);
    let (_, tokens) = ids([2, 40], 40);
    let both = [(here.clone(), tokens.clone()), (moved(&here, &engine, &place), tokens.to_device(&place))];
    let found = both.map(|(model, tokens)| {
        let loss = model.forward(tokens).square().mean();
        let grads = loss.backward();
        let of = |x: Tensor<2>| wide(x.grad(&grads).unwrap());
        let mixers: Vec<Vec<f64>> = model
            .layers
            .iter()
            .map(|block| match &block.mixer {
                Mixer::Linear(mixer) => of(mixer.in_proj_qkv.weight.val()),
                Mixer::Full(mixer) => of(mixer.q_proj.weight.val()),
            })
            .collect();
        (wide(loss), of(model.embed_tokens.weight.val()), mixers)
    });
    let [here, there] = found;
    assert!(distance(&there.0, &here.0) <= 1e-5);
    assert!(distance(&there.1, &here.1) <= 1e-4, "embedding: {:e}", distance(&there.1, &here.1));
    for (found, expected) in there.2.iter().zip(&here.2) {
        assert!(distance(found, expected) <= 1e-4, "{:e}", distance(found, expected));
    }
}

/// The same weights where the other engine's kernels are.
fn moved(model: &Qwen35, engine: &Engine, place: &Device) -> Qwen35 {
    let fresh = model.config().init(engine, place).unwrap();
    fresh.load_record(model.clone().into_record())
}
