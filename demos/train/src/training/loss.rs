//! How well a model says the next token.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gatedelta::burn::Qwen35;

use super::batches::{Batch, Role};

/// Logits that are computed at once: 128 MiB, the smallest limit of a binding among the GPUs that wgpu reaches.
const LOGITS: usize = 1 << 25;

/// The sums of the cross entropies of a batch, `[2]`: of the tokens that the model writes, and of those that it reads.
///
/// ```text
/// -log softmax(logits[t])[ids[t + 1]]
/// ```
pub fn sums(model: &Qwen35, batch: &Batch, device: &Device) -> Tensor<1> {
    sums_by(LOGITS, model, batch, device)
}

/// The same with so many logits at once.
fn sums_by(logits: usize, model: &Qwen35, batch: &Batch, device: &Device) -> Tensor<1> {
    let [b, t] = batch.shape;
    let (rows, ids) =
        (b * t, |ids: &[i64], shape| Tensor::<2, Int>::from_data(TensorData::new(ids.to_vec(), shape), device));
    let next = ids(&batch.next, [rows, 1]);
    let of = |role: Role| batch.role.iter().map(move |found| f32::from(u8::from(*found == role)));
    let roles: Vec<f32> = of(Role::Answer).chain(of(Role::Context)).collect();
    let roles = Tensor::<2>::from_data(TensorData::new(roles, [2, rows]), device);

    let hidden = model.hidden(ids(&batch.ids, [b, t]));
    let hidden = hidden.reshape([1, rows, model.config().hidden_size]);
    let at_once = (logits / model.config().vocab_size).clamp(1, rows);
    let parts = (0..rows).step_by(at_once).map(|from| {
        let n = at_once.min(rows - from);
        let logits = model.logits(hidden.clone().narrow(1, from, n)).reshape([n, model.config().vocab_size]);
        let said = log_softmax(logits, 1).gather(1, next.clone().narrow(0, from, n)).reshape([1, n]);
        (roles.clone().narrow(1, from, n) * said).sum_dim(1)
    });
    parts.reduce(|sum, part| sum + part).map_or_else(|| Tensor::zeros([2], device), |sum| sum.reshape([2]).neg())
}

/// The means of [`sums`], `[2]`; 0 where there is no such token.
pub fn means(model: &Qwen35, batch: &Batch, device: &Device) -> Tensor<1> {
    let count = |role: Role| 1.0 / batch.count(role).max(1) as f32;
    let counts = TensorData::from([count(Role::Answer), count(Role::Context)]);
    sums(model, batch, device) * Tensor::<1>::from_data(counts, device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use crate::learn::alone;
    use crate::training::batches::Batches;
    use crate::training::tests::{conversations, engine, tiny};

    #[test]
    fn padding_and_slices_make_no_difference() {
        let _alone = alone();
        let device = Device::flex();
        let model = tiny().init(&engine(), &device).unwrap();
        let data = conversations(&[30, 70, 100]);
        let mut together = Batches::new(&data, 0, 1000, 1000).unwrap();
        let batch = together.batch(0);
        assert_eq!(batch.shape, [3, 128]);
        let numbers = |sums: Tensor<1>| sums.try_into_vec_as::<f32>().unwrap();
        let whole = numbers(sums(&model, &batch, &device));

        let mut one_by_one = [0.0; 2];
        for at in 0..3 {
            let range = data.offsets[at] as usize..data.offsets[at + 1] as usize;
            let mut one = Dataset::new();
            one.ids = data.ids[range.clone()].to_vec();
            one.mask = data.mask[range].to_vec();
            one.offsets.push(one.ids.len() as u64);
            one.kinds.push(0);
            let batch = Batches::new(&one, 0, 1000, 1000).unwrap().batch(0);
            // Logits by softmax in f64, without the loss's own functions.
            let n = one.ids.len() - 1;
            let ids = TensorData::new(one.ids[..n].iter().map(|&id| i64::from(id)).collect::<Vec<_>>(), [1, n]);
            let logits = numbers(model.forward(Tensor::from_data(ids, &device)).reshape([n * 50]));
            for (i, row) in logits.chunks(50).enumerate() {
                let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                let loss = sum.ln() - f64::from(row[usize::from(one.ids[i + 1])]);
                one_by_one[usize::from(one.mask[i + 1] == 0)] += loss;
            }
            assert_eq!(batch.shape[0], 1);
        }
        let near = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-5 * b.abs();
        assert!(near(whole[0], one_by_one[0]) && near(whole[1], one_by_one[1]), "{whole:?} {one_by_one:?}");
        let sliced = numbers(sums_by(7 * 50, &model, &batch, &device));
        assert!(near(sliced[0], one_by_one[0]) && near(sliced[1], one_by_one[1]), "{sliced:?} {one_by_one:?}");
        let (answers, context) = (batch.count(Role::Answer) as f32, batch.count(Role::Context) as f32);
        assert_eq!(numbers(means(&model, &batch, &device)), [whole[0] * (1.0 / answers), whole[1] * (1.0 / context)]);
    }
}
