//! A mixer as one operation: against the same layer in float64, its pieces in burn's operations, on every device.

use ::burn::module::{Module, Param};
use ::burn::tensor::{DType, Tensor};
use gatedelta::burn::{Engine, GatedDeltaNet, GatedDeltaNetConfig, MixInputs, Rule, gated_delta_mix};

use crate::burn::{Collect, Fill, Nudge, distance, flex, said, tensor, weights};
use crate::util::{Random, devices};

/// Output, gradient of x, gradients of all weights.
fn differentiate(layer: &GatedDeltaNet, x: &[f64], dims: [usize; 3], dtype: DType) -> Vec<(String, Vec<f64>)> {
    let x: Param<Tensor<3>> = Param::from_tensor(tensor(x, &dims, dtype, &flex()));
    let y = layer.forward(x.val());
    let w = tensor::<3>(&weights(dims.iter().product(), 5), &dims, dtype, &flex());
    let grads = (y.clone() * w).sum().backward();
    let mut collect = Collect { grads: &grads, path: Vec::new(), found: Vec::new() };
    x.visit(&mut collect);
    layer.visit(&mut collect);
    collect.found.push(("y".into(), crate::burn::wide(y)));
    collect.found
}

#[test]
fn a_mixer_has_the_output_and_gradients_of_its_pieces() {
    for device in devices() {
        let engine = Engine::new(device.backend.clone());
        // B, T, Hk, Hv, K, V, taps
        for [b, t, hk, hv, k, v, taps] in
            [[1, 1, 1, 1, 16, 16, 4], [2, 70, 1, 2, 16, 32, 4], [3, 5, 2, 2, 32, 16, 2], [2, 130, 1, 3, 16, 16, 8]]
        {
            let layer = GatedDeltaNetConfig::new(24)
                .with_linear_num_key_heads(hk)
                .with_linear_num_value_heads(hv)
                .with_linear_key_head_dim(k)
                .with_linear_value_head_dim(v)
                .with_linear_conv_kernel_dim(taps)
                .init(&engine, &flex())
                .unwrap()
                .map(&mut Fill(Random::new(t as u64)));
            let exact = layer.clone().with_rule(Rule::Plain).map(&mut Nudge { at: usize::MAX, step: 0.0, seen: 0 });
            let x = weights(b * t * 24, 3);
            let found = differentiate(&layer, &x, [b, t, 24], DType::F32);
            assert_eq!(found, differentiate(&layer, &x, [b, t, 24], DType::F32), "other bits the second time");
            let expected = differentiate(&exact, &x, [b, t, 24], DType::F64);
            assert_eq!(found.len(), 11);
            let mut worst = (0f64, "");
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                let e = distance(found, expected);
                assert!(e <= 1e-5, "{}, {t} tokens, {name}: {e:e}", device.name);
                worst = if e > worst.0 { (e, name) } else { worst };
            }
            println!("{}, {t} tokens: {:.1e} ({})", device.name, worst.0, worst.1);
        }
    }
}

#[test]
fn wrong_shapes_of_a_mixer_are_named() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let zeros = |dims: &[usize]| Tensor::<3>::zeros([dims[0], dims[1], dims[2]], &flex());
    let row = |n: usize| Tensor::<1>::zeros([n], &flex());
    // Hk 1, Hv 2, K 16, V 32
    let good = || MixInputs {
        qkv: zeros(&[2, 3, 96]),
        z: zeros(&[2, 3, 64]),
        ab: zeros(&[2, 3, 4]),
        conv: zeros(&[96, 1, 4]),
        a_log: row(2),
        dt_bias: row(2),
        norm: row(32),
    };
    let call = |x: MixInputs| said(|| gated_delta_mix(&engine, [1, 2, 16, 32], x, 1e-6));
    let bad: [(&str, MixInputs); 9] = [
        ("qkv: found the shape [2, 3, 95], expected [2, 3, 96]", MixInputs { qkv: zeros(&[2, 3, 95]), ..good() }),
        ("qkv: found the shape [2, 0, 96], expected at least one", MixInputs { qkv: zeros(&[2, 0, 96]), ..good() }),
        ("z: found the shape [2, 4, 64], expected [2, 3, 64]", MixInputs { z: zeros(&[2, 4, 64]), ..good() }),
        ("ab: found the shape [2, 3, 2], expected [2, 3, 4]", MixInputs { ab: zeros(&[2, 3, 2]), ..good() }),
        ("conv: found the shape [96, 4, 1], expected [96, 1, 1]", MixInputs { conv: zeros(&[96, 4, 1]), ..good() }),
        ("taps of conv: found 9, expected 2 to 8", MixInputs { conv: zeros(&[96, 1, 9]), ..good() }),
        ("a_log: found the shape [3], expected [2]", MixInputs { a_log: row(3), ..good() }),
        ("dt_bias: found the shape [1], expected [2]", MixInputs { dt_bias: row(1), ..good() }),
        ("norm: found the shape [64], expected [32]", MixInputs { norm: row(64), ..good() }),
    ];
    for (expected, x) in bad {
        let found = call(x);
        assert!(found.contains(expected), "{found}");
    }
}
