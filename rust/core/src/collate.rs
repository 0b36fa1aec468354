//! Examples to one rectangle of int64 arrays.
//!
//! Rows are padded on the right to the longest of the batch, by length and never by the padding id (which is often
//! the eos id, and that one is trained). Labels are -100 off the loss mask and on the padding.

use crate::encode::Example;

/// The label that a loss ignores (`PyTorch`'s default `ignore_index`).
pub const IGNORED: i64 = -100;

/// A padded micro-batch; each array has `rows * width` values, row by row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// Number of examples.
    pub rows: usize,
    /// Tokens of the longest example.
    pub width: usize,
    /// Token ids.
    pub input_ids: Vec<i64>,
    /// 1 on tokens, 0 on padding.
    pub attention_mask: Vec<i64>,
    /// The token id where it is trained, else [`IGNORED`].
    pub labels: Vec<i64>,
    /// How much the loss of each token counts; empty where all trained tokens count 1.
    pub loss_weights: Vec<f32>,
}

impl Batch {
    /// Pads `examples`. Without any, the batch is one token that is not trained, so that every rank
    /// takes part in every step.
    pub fn new(examples: &[Example], pad_token_id: u32) -> Self {
        let width = examples.iter().map(|example| example.input_ids.len()).max().unwrap_or(1);
        let rows = examples.len().max(1);
        let mut batch = Self {
            rows,
            width,
            input_ids: vec![i64::from(pad_token_id); rows * width],
            attention_mask: vec![0; rows * width],
            labels: vec![IGNORED; rows * width],
            loss_weights: Vec::new(),
        };
        if examples.iter().any(|example| !example.loss_weights.is_empty()) {
            batch.loss_weights = vec![0.0; rows * width];
        }
        for (row, example) in examples.iter().enumerate() {
            for (column, (&id, &trained)) in example.input_ids.iter().zip(&example.loss_mask).enumerate() {
                let at = row * width + column;
                batch.input_ids[at] = i64::from(id);
                batch.attention_mask[at] = 1;
                if trained {
                    batch.labels[at] = i64::from(id);
                    if let Some(weight) = batch.loss_weights.get_mut(at) {
                        *weight = example.loss_weights.get(column).copied().unwrap_or(1.0);
                    }
                }
            }
        }
        if examples.is_empty() {
            batch.attention_mask[0] = 1;
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_by_length_so_an_eos_equal_to_pad_stays_trained() {
        let example = |ids: &[u32]| Example {
            input_ids: ids.to_vec(),
            loss_mask: ids.iter().map(|&id| id != 5).collect(),
            full_length: ids.len(),
            ..Example::default()
        };
        let batch = Batch::new(&[example(&[5, 7, 2]), example(&[5, 2])], 2);
        assert_eq!(batch.input_ids, [5, 7, 2, 5, 2, 2]);
        assert_eq!(batch.attention_mask, [1, 1, 1, 1, 1, 0]);
        assert_eq!(batch.labels, [-100, 7, 2, -100, 2, -100]);
    }
}
