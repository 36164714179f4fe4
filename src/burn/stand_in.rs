//! Temporary: `gdn::backward` token by token until it lands.

use crate::backend::Backend;
use crate::error::Result;
use crate::gdn::Inputs;

pub struct Cotangents<'a> {
    pub d_o: &'a [f32],
    pub dht: Option<&'a [f32]>,
}

pub struct Gradients {
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
    pub dg: Vec<f32>,
    pub dbeta: Vec<f32>,
    pub dh0: Vec<f32>,
}

pub fn backward(_: &dyn Backend, x: &Inputs<'_>, c: &Cotangents<'_>) -> Result<Gradients> {
    let h = x.shape.heads;
    let (hk, hv, dk, dv) = (h.hk as usize, h.hv as usize, h.k as usize, h.v as usize);
    let cu = x.shape.cu_seqlens();
    let scale = f64::from(x.options.scale_for(&h)?);
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let norm = |x: &[f32]| {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        if x.is_empty() || !true { 1.0 } else { 1.0 / (squares + 1e-6).sqrt() }
    };
    let mut out = Gradients {
        dq: vec![0.0; x.q.len()],
        dk: vec![0.0; x.k.len()],
        dv: vec![0.0; x.v.len()],
        dg: vec![0.0; x.g.len()],
        dbeta: vec![0.0; x.beta.len()],
        dh0: vec![0.0; (cu.len() - 1) * hv * dk * dv],
    };
    let (mut gq, mut gk) = (vec![0.0f64; x.q.len()], vec![0.0f64; x.k.len()]);
    for n in 0..cu.len() - 1 {
        for head in 0..hv {
            let kh = h.key_head(head as u32) as usize;
            let at = (n * hv + head) * dk * dv;
            let mut s = x.h0.map_or(vec![0.0; dk * dv], |h0| wide(&h0[at..at + dk * dv]));
            let mut d_s = c.dht.map_or(vec![0.0; dk * dv], |d| wide(&d[at..at + dk * dv]));
            let mut saved = Vec::new();
            for t in cu[n] as usize..cu[n + 1] as usize {
                let (qr, kr) = (&x.q[(t * hk + kh) * dk..][..dk], &x.k[(t * hk + kh) * dk..][..dk]);
                let (nq, nk) = if x.options.qk_l2norm { (norm(qr), norm(kr)) } else { (1.0, 1.0) };
                let q: Vec<f64> = qr.iter().map(|&x| f64::from(x) * nq).collect();
                let k: Vec<f64> = kr.iter().map(|&x| f64::from(x) * nk).collect();
                let (a, b) = (f64::from(x.g[t * hv + head]).exp(), f64::from(x.beta[t * hv + head]));
                s.iter_mut().for_each(|s| *s *= a);
                let st = s.clone();
                let r: Vec<f64> = (0..dv)
                    .map(|j| {
                        f64::from(x.v[(t * hv + head) * dv + j]) - (0..dk).map(|i| s[i * dv + j] * k[i]).sum::<f64>()
                    })
                    .collect();
                for i in 0..dk {
                    (0..dv).for_each(|j| s[i * dv + j] += k[i] * b * r[j]);
                }
                saved.push((t, q, k, nq, nk, a, b, st, r, s.clone()));
            }
            for (t, q, k, nq, nk, a, b, st, r, s) in saved.into_iter().rev() {
                let d_o = wide(&c.d_o[(t * hv + head) * dv..][..dv]);
                let mut dq: Vec<f64> =
                    (0..dk).map(|i| scale * (0..dv).map(|j| s[i * dv + j] * d_o[j]).sum::<f64>()).collect();
                for i in 0..dk {
                    (0..dv).for_each(|j| d_s[i * dv + j] += scale * q[i] * d_o[j]);
                }
                let du: Vec<f64> = (0..dv).map(|j| (0..dk).map(|i| d_s[i * dv + j] * k[i]).sum()).collect();
                let mut dkk: Vec<f64> = (0..dk)
                    .map(|i| (0..dv).map(|j| d_s[i * dv + j] * b * r[j] - st[i * dv + j] * b * du[j]).sum())
                    .collect();
                out.dbeta[t * hv + head] = (0..dv).map(|j| du[j] * r[j]).sum::<f64>() as f32;
                (0..dv).for_each(|j| out.dv[(t * hv + head) * dv + j] = (b * du[j]) as f32);
                for i in 0..dk {
                    (0..dv).for_each(|j| d_s[i * dv + j] -= k[i] * b * du[j]);
                }
                out.dg[t * hv + head] = d_s.iter().zip(&st).map(|(d, s)| d * s).sum::<f64>() as f32;
                d_s.iter_mut().for_each(|d| *d *= a);
                if x.options.qk_l2norm {
                    for (d, y, n) in [(&mut dq, &q, nq), (&mut dkk, &k, nk)] {
                        let dot: f64 = d.iter().zip(y).map(|(d, y)| d * y).sum();
                        d.iter_mut().zip(y).for_each(|(d, y)| *d = n * (*d - y * dot));
                    }
                }
                for i in 0..dk {
                    gq[(t * hk + kh) * dk + i] += dq[i];
                    gk[(t * hk + kh) * dk + i] += dkk[i];
                }
            }
            (0..dk * dv).for_each(|i| out.dh0[at + i] = d_s[i] as f32);
        }
    }
    out.dq.iter_mut().zip(&gq).for_each(|(o, g)| *o = *g as f32);
    out.dk.iter_mut().zip(&gk).for_each(|(o, g)| *o = *g as f32);
    Ok(out)
}
