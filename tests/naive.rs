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

/// Gradients of a scalar, token by token in reverse, as [`Gradients`](gatedelta::gdn::Gradients) holds them.
pub struct Grads {
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    pub dg: Vec<f64>,
    pub dbeta: Vec<f64>,
    pub dh0: Vec<f64>,
}

impl Grads {
    /// Names and tensors.
    pub fn named(&self) -> [(&'static str, &[f64]); 6] {
        [
            ("dq", &self.dq),
            ("dk", &self.dk),
            ("dv", &self.dv),
            ("dg", &self.dg),
            ("dbeta", &self.dbeta),
            ("dh0", &self.dh0),
        ]
    }
}

/// The gradients of `sum(d_o o) + sum(dht ht)`, each step of [`recurrence`] differentiated by hand.
pub fn recurrence_grad(inputs: &Inputs<'_>, d_o: &[f32], dht: Option<&[f32]>) -> Grads {
    let h = inputs.shape.heads;
    let (hk, hv, dk, dv) = (h.hk as usize, h.hv as usize, h.k as usize, h.v as usize);
    let cu = inputs.shape.cu_seqlens();
    let scale = inputs.options.scale.map_or((dk as f64).powf(-0.5), f64::from);
    let states = inputs.shape.sequences() * hv * dk * dv;
    let wide = |x: Option<&[f32]>| x.map_or(vec![0.0; states], |x| x.iter().map(|&x| f64::from(x)).collect());
    let (h0, mut dh0) = (wide(inputs.h0), wide(dht));
    let mut out = Grads {
        dq: vec![0.0; inputs.q.len()],
        dk: vec![0.0; inputs.k.len()],
        dv: vec![0.0; inputs.v.len()],
        dg: vec![0.0; inputs.g.len()],
        dbeta: vec![0.0; inputs.beta.len()],
        dh0: Vec::new(),
    };
    let unit = |x: &[f32]| -> (Vec<f64>, f64) {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let r = if inputs.options.qk_l2norm { 1.0 / (squares + 1e-6).sqrt() } else { 1.0 };
        (x.iter().map(|&x| f64::from(x) * r).collect(), r)
    };
    // The gradient of x from that of its normed form y = r x.
    let raw = |dy: &[f64], y: &[f64], r: f64, into: &mut [f64]| {
        let along = if inputs.options.qk_l2norm { dy.iter().zip(y).map(|(a, b)| a * b).sum() } else { 0.0 };
        for i in 0..y.len() {
            into[i] += r * (dy[i] - y[i] * along);
        }
    };
    for n in 0..inputs.shape.sequences() {
        for head in 0..hv {
            let kh = h.key_head(head as u32) as usize;
            let own = (n * hv + head) * dk * dv;
            // The state before each token, then after the last.
            let mut before = vec![h0[own..own + dk * dv].to_vec()];
            let tokens: Vec<usize> = (cu[n] as usize..cu[n + 1] as usize).collect();
            let value = |t: usize, j: usize| f64::from(inputs.v[(t * hv + head) * dv + j]);
            for &t in &tokens {
                let (k, _) = unit(&inputs.k[(t * hk + kh) * dk..][..dk]);
                let decay = f64::from(inputs.g[t * hv + head]).exp();
                let beta = f64::from(inputs.beta[t * hv + head]);
                let mut s: Vec<f64> = before[before.len() - 1].iter().map(|x| decay * x).collect();
                for j in 0..dv {
                    let d = beta * (value(t, j) - (0..dk).map(|i| s[i * dv + j] * k[i]).sum::<f64>());
                    (0..dk).for_each(|i| s[i * dv + j] += k[i] * d);
                }
                before.push(s);
            }
            let ds = &mut dh0[own..own + dk * dv];
            for (at, &t) in tokens.iter().enumerate().rev() {
                let (q, rq) = unit(&inputs.q[(t * hk + kh) * dk..][..dk]);
                let (k, rk) = unit(&inputs.k[(t * hk + kh) * dk..][..dk]);
                let decay = f64::from(inputs.g[t * hv + head]).exp();
                let beta = f64::from(inputs.beta[t * hv + head]);
                let (old, new) = (&before[at], &before[at + 1]);
                let (mut dq, mut dk_, mut dg, mut dbeta) = (vec![0.0; dk], vec![0.0; dk], 0.0, 0.0);
                for j in 0..dv {
                    // o = s S^T q
                    let d_o = f64::from(d_o[(t * hv + head) * dv + j]);
                    for i in 0..dk {
                        dq[i] += scale * new[i * dv + j] * d_o;
                        ds[i * dv + j] += scale * q[i] * d_o;
                    }
                    // S = S~ + k d^T, d = beta r, r = v - S~^T k, S~ = exp(g) S
                    let r = value(t, j) - (0..dk).map(|i| decay * old[i * dv + j] * k[i]).sum::<f64>();
                    let dd: f64 = (0..dk).map(|i| ds[i * dv + j] * k[i]).sum();
                    dbeta += dd * r;
                    out.dv[(t * hv + head) * dv + j] = beta * dd;
                    for i in 0..dk {
                        let faded = decay * old[i * dv + j];
                        dk_[i] += ds[i * dv + j] * beta * r - faded * beta * dd;
                        let d_faded = ds[i * dv + j] - k[i] * beta * dd;
                        dg += d_faded * faded;
                        ds[i * dv + j] = decay * d_faded;
                    }
                }
                (out.dg[t * hv + head], out.dbeta[t * hv + head]) = (dg, dbeta);
                raw(&dq, &q, rq, &mut out.dq[(t * hk + kh) * dk..][..dk]);
                raw(&dk_, &k, rk, &mut out.dk[(t * hk + kh) * dk..][..dk]);
            }
        }
    }
    out.dh0 = dh0;
    out
}
