//! The batches of an epoch: lengths to global batches to micro-batches for each rank.
//!
//! A global batch is decided by the seed, the epoch and its size alone; ranks and accumulation steps
//! only share it out. Each rank gets exactly `gradient_accumulation_steps` micro-batches of every
//! global batch; where the last one of an epoch is too small for all, the rest are empty.

use crate::order;

/// How examples are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Shuffled, and examples of like length together.
    Bucket,
    /// In the order of the files.
    Sequential,
}

/// Global batches are sorted by length within this many of them.
const WINDOW: usize = 64;

/// The batches of one epoch, as positions into the rows of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Each global batch in the order of training; within it, longest example first.
    pub global_batches: Vec<Vec<u32>>,
}

/// How a global batch is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sharing {
    /// Examples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step on one rank.
    pub gradient_accumulation_steps: usize,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

impl Sharing {
    /// Examples of a global batch.
    pub fn global_batch_size(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps * self.world_size
    }

    /// This rank's micro-batch number `step` (from 0) of `global_batch`.
    pub fn micro_batch<'b>(&self, global_batch: &'b [u32], step: usize) -> &'b [u32] {
        let start = ((step * self.world_size + self.rank) * self.batch_size).min(global_batch.len());
        &global_batch[start..(start + self.batch_size).min(global_batch.len())]
    }
}

impl Plan {
    /// Plans the epoch of a split whose examples have these `lengths`.
    pub fn new(lengths: &[u32], mode: Mode, global_batch_size: usize, seed: u64, epoch: u64) -> Self {
        // a split has fewer rows than 2^32: `index` refuses more
        let count = u32::try_from(lengths.len()).unwrap_or(u32::MAX);
        if mode == Mode::Sequential {
            let order: Vec<u32> = (0..count).collect();
            return Self { global_batches: order.chunks(global_batch_size).map(<[u32]>::to_vec).collect() };
        }
        let mut order = order::shuffled(count, order::key(seed, epoch, 1));
        let by_length = |&row: &u32| std::cmp::Reverse(lengths[row as usize]);
        let mut global_batches = Vec::with_capacity(lengths.len().div_ceil(global_batch_size));
        for window in order.chunks_mut(WINDOW * global_batch_size) {
            window.sort_by_key(by_length);
            global_batches.extend(window.chunks(global_batch_size).map(<[u32]>::to_vec));
        }
        order::shuffle(&mut global_batches, order::key(seed, epoch, 2));
        Self { global_batches }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_example_is_in_one_micro_batch_of_one_rank(
            lengths in prop::collection::vec(1_u32..500, 1..300),
            batch_size in 1_usize..5,
            accumulation in 1_usize..5,
            world_size in 1_usize..5,
            epoch in 0_u64..4,
            bucket in any::<bool>(),
        ) {
            let mode = if bucket { Mode::Bucket } else { Mode::Sequential };
            let sharing = |rank| Sharing { batch_size, gradient_accumulation_steps: accumulation, rank, world_size };
            let plan = Plan::new(&lengths, mode, sharing(0).global_batch_size(), 9, epoch);
            let mut seen = Vec::new();
            for batch in &plan.global_batches {
                for rank in 0..world_size {
                    for step in 0..accumulation {
                        seen.extend_from_slice(sharing(rank).micro_batch(batch, step));
                    }
                }
            }
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..u32::try_from(lengths.len()).unwrap()));
        }

        #[test]
        fn global_batches_do_not_depend_on_how_they_are_shared(lengths in prop::collection::vec(1_u32..500, 1..200)) {
            let plans = [(1, 16, 1), (4, 4, 1), (2, 2, 4)].map(|(batch_size, steps, world_size)| {
                let sharing = Sharing { batch_size, gradient_accumulation_steps: steps, rank: 0, world_size };
                Plan::new(&lengths, Mode::Bucket, sharing.global_batch_size(), 3, 1)
            });
            prop_assert_eq!(&plans[0], &plans[1]);
            prop_assert_eq!(&plans[1], &plans[2]);
        }
    }
}
