//! The operator token by token in float64: the definition that judges every backend.

use gatedelta::gdn::Inputs;

/// o `[T, Hv, V]` and ht `[N, Hv, K, V]`. `count(n)` limits how many tokens of sequence n are taken; the o of the others is 0.
pub fn recurrence(inputs: &Inputs<'_>, count: impl Fn(usize) -> u64) -> (Vec<f64>, Vec<f64>) {
    let h = inputs.shape.heads;
    let (hk, hv, dk, dv) = (h.hk as usize, h.hv as usize, h.k as usize, h.v as usize);
    let cu = inputs.shape.cu_seqlens();
    let scale = inputs.options.scale.map_or((dk as f64).powf(-0.5), f64::from);
    let unit = |x: &[f32]| -> Vec<f64> {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let r = if inputs.options.qk_l2norm { 1.0 / (squares + 1e-6).sqrt() } else { 1.0 };
        x.iter().map(|&x| f64::from(x) * r).collect()
    };
    let mut o = vec![0.0; inputs.v.len()];
    let mut ht = vec![0.0; inputs.shape.sequences() * hv * dk * dv];
    if let Some(h0) = inputs.h0 {
        ht.iter_mut().zip(h0).for_each(|(s, &x)| *s = f64::from(x));
    }
    for n in 0..inputs.shape.sequences() {
        for (head, s) in ht[n * hv * dk * dv..][..hv * dk * dv].chunks_mut(dk * dv).enumerate() {
            let kh = h.key_head(head as u32) as usize;
            for t in cu[n] as usize..(cu[n] + (cu[n + 1] - cu[n]).min(count(n))) as usize {
                let q = unit(&inputs.q[(t * hk + kh) * dk..][..dk]);
                let k = unit(&inputs.k[(t * hk + kh) * dk..][..dk]);
                let decay = f64::from(inputs.g[t * hv + head]).exp();
                let beta = f64::from(inputs.beta[t * hv + head]);
                for j in 0..dv {
                    // d = beta (v - (exp(g) S)^T k)     S <- exp(g) S + k d^T     o = s S^T q
                    (0..dk).for_each(|i| s[i * dv + j] *= decay);
                    let read: f64 = (0..dk).map(|i| s[i * dv + j] * k[i]).sum();
                    let d = beta * (f64::from(inputs.v[(t * hv + head) * dv + j]) - read);
                    (0..dk).for_each(|i| s[i * dv + j] += k[i] * d);
                    o[(t * hv + head) * dv + j] = scale * (0..dk).map(|i| s[i * dv + j] * q[i]).sum::<f64>();
                }
            }
        }
    }
    (o, ht)
}
