//! Examples to arrays: one rectangle of int64, padded, packed or without padding.
//!
//! Rows are padded on the right to the longest of the batch, by length and never by the padding id (which is often
//! the eos id, and that one is trained). Labels are -100 off the loss mask and on the padding. Where several examples
//! share a row, positions restart at each of them, and the first token of each is not a label, as nothing before
//! it may predict it; there is no attention mask then: positions and `cu_seqlens` say where an example ends.

use crate::encode::Example;

/// The label that a loss ignores (`PyTorch`'s default `ignore_index`).
pub const IGNORED: i64 = -100;

/// How examples share the rows of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rectangle {
    /// One example in a row, with an attention mask.
    Padded,
    /// The examples of a pack in a row, one after the other.
    Packed,
    /// All examples in one row, without padding.
    Flat,
}

impl Rectangle {
    /// Rows and width of a batch whose packs have these numbers of tokens; one token where there are none.
    pub fn shape(self, tokens: &[usize]) -> (usize, usize) {
        match self {
            Self::Flat => (1, tokens.iter().sum::<usize>().max(1)),
            Self::Padded | Self::Packed => {
                (tokens.len().max(1), tokens.iter().copied().max().unwrap_or(0).max(1))
            }
        }
    }
}

/// A micro-batch; each array has `rows * width` values, row by row, but for `cu_seqlens`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Tokens of the longest row.
    pub width: usize,
    /// Token ids.
    pub input_ids: Vec<i64>,
    /// The token id where it is trained, else [`IGNORED`].
    pub labels: Vec<i64>,
    /// 1 on tokens, 0 on padding; empty where examples share rows.
    pub attention_mask: Vec<i64>,
    /// The place of each token in its example; empty where they do not share rows.
    pub position_ids: Vec<i64>,
    /// Where each example begins in the flattened batch, and the end; padding counts as an example. Empty where
    /// they do not share rows.
    pub cu_seqlens: Vec<i32>,
    /// How much the loss of each token counts; empty where all trained tokens count 1.
    pub loss_weights: Vec<f32>,
}

impl Batch {
    /// Puts `packs` of examples into a rectangle. Without any, the batch is one token that is not trained, so that every
    /// rank takes part in every step.
    pub fn new(packs: &[Vec<Example>], rectangle: Rectangle, pad_token_id: u32) -> Self {
        let tokens = |pack: &Vec<Example>| pack.iter().map(|example| example.input_ids.len()).sum::<usize>();
        let (rows, width) = rectangle.shape(&packs.iter().map(tokens).collect::<Vec<_>>());
        let is_shared = rectangle != Rectangle::Padded;
        let size = rows * width;
        let is_weighted = packs.iter().flatten().any(|example| !example.loss_weights.is_empty());
        let mut batch = Self {
            rows,
            width,
            input_ids: vec![i64::from(pad_token_id); size],
            labels: vec![IGNORED; size],
            attention_mask: vec![0; if is_shared { 0 } else { size }],
            position_ids: vec![0; if is_shared { size } else { 0 }],
            cu_seqlens: if is_shared { vec![0] } else { Vec::new() },
            loss_weights: vec![0.0; if is_weighted { size } else { 0 }],
        };
        let mut at = 0;
        for (row, pack) in packs.iter().enumerate() {
            if rectangle != Rectangle::Flat {
                at = row * width;
            }
            for example in pack {
                batch.put(example, at, is_shared);
                at += example.input_ids.len();
                batch.end_example(at);
            }
            if rectangle == Rectangle::Packed {
                batch.pad(at, (row + 1) * width);
            }
        }
        if packs.is_empty() {
            batch.attention_mask.iter_mut().for_each(|token| *token = 1);
            batch.end_example(1);
        }
        batch
    }

    fn put(&mut self, example: &Example, at: usize, is_shared: bool) {
        for (column, (&id, &trained)) in example.input_ids.iter().zip(&example.loss_mask).enumerate() {
            let place = at + column;
            self.input_ids[place] = i64::from(id);
            if let Some(token) = self.attention_mask.get_mut(place) {
                *token = 1;
            }
            if let Some(position) = self.position_ids.get_mut(place) {
                // a row has fewer than 2^32 tokens
                *position = i64::try_from(column).unwrap_or(i64::MAX);
            }
            if trained && !(is_shared && column == 0) {
                self.labels[place] = i64::from(id);
                if let Some(weight) = self.loss_weights.get_mut(place) {
                    *weight = example.loss_weights.get(column).copied().unwrap_or(1.0);
                }
            }
        }
    }

    fn end_example(&mut self, end: usize) {
        if !self.cu_seqlens.is_empty() {
            // a batch has fewer than 2^31 tokens, or no device could hold it
            self.cu_seqlens.push(i32::try_from(end).unwrap_or(i32::MAX));
        }
    }

    /// Padding is an example of its own, so that no kernel sees it beside tokens.
    fn pad(&mut self, start: usize, end: usize) {
        if start < end {
            for (position, place) in (0..).zip(start..end) {
                self.position_ids[place] = position;
            }
            self.end_example(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(ids: &[u32]) -> Example {
        Example {
            input_ids: ids.to_vec(),
            loss_mask: ids.iter().map(|&id| id != 5).collect(),
            full_length: ids.len(),
            ..Example::default()
        }
    }

    #[test]
    fn padding_is_by_length_so_an_eos_equal_to_pad_stays_trained() {
        let batch = Batch::new(&[vec![example(&[5, 7, 2])], vec![example(&[5, 2])]], Rectangle::Padded, 2);
        assert_eq!(batch.input_ids, [5, 7, 2, 5, 2, 2]);
        assert_eq!(batch.attention_mask, [1, 1, 1, 1, 1, 0]);
        assert_eq!(batch.labels, [-100, 7, 2, -100, 2, -100]);
        assert!(batch.position_ids.is_empty() && batch.cu_seqlens.is_empty());
    }

    #[test]
    fn packs_restart_positions_and_never_train_across_examples() {
        let packs = [vec![example(&[7, 8, 9]), example(&[3, 2])], vec![example(&[5, 2, 4])]];
        let batch = Batch::new(&packs, Rectangle::Packed, 0);
        assert_eq!((batch.rows, batch.width), (2, 5));
        assert_eq!(batch.input_ids, [7, 8, 9, 3, 2, 5, 2, 4, 0, 0]);
        assert_eq!(batch.labels, [-100, 8, 9, -100, 2, -100, 2, 4, -100, -100]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]);
        assert_eq!(batch.cu_seqlens, [0, 3, 5, 8, 10]);
        assert!(batch.attention_mask.is_empty());
    }

    #[test]
    fn a_flat_batch_has_no_padding() {
        let batch = Batch::new(&[vec![example(&[7, 8, 9])], vec![example(&[3, 2])]], Rectangle::Flat, 0);
        assert_eq!((batch.rows, batch.width), (1, 5));
        assert_eq!(batch.cu_seqlens, [0, 3, 5]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn an_empty_micro_batch_is_one_token_that_trains_nothing() {
        for rectangle in [Rectangle::Padded, Rectangle::Packed, Rectangle::Flat] {
            let batch = Batch::new(&[], rectangle, 2);
            assert_eq!((batch.input_ids, batch.labels), (vec![2], vec![IGNORED]));
            assert_eq!(batch.attention_mask.len() + batch.position_ids.len(), 1);
        }
    }
}
