use proptest::prelude::*;

use super::*;
use crate::order::{MixBy, Mixture, Rows, Stopping};

fn plan(lengths: &[u32], options: PlanOptions) -> Plan {
    let sets = [Rows::Range(0, u32::try_from(lengths.len()).unwrap())];
    let mixture = Mixture { shares: None, by: MixBy::Rows, stopping: Stopping::FirstExhausted };
    let is_shuffled = options.mode != Mode::Sequential;
    let order = EpochOrder::new(&sets, &mixture, is_shuffled, options.seed, options.epoch, &|_| 1).unwrap();
    Plan::new(options, order, lengths, None)
}

fn options(mode: Mode, batch_size: BatchSize, micro_batches: usize, epoch: u64) -> PlanOptions {
    PlanOptions { mode, batch_size, micro_batches, capacity: 512, quadratic_cost: 1e-3, seed: 9, epoch }
}

fn any_mode() -> impl Strategy<Value = (Mode, bool)> {
    prop_oneof![
        Just((Mode::Bucket, false)),
        Just((Mode::Bucket, true)),
        Just((Mode::Pack, false)),
        Just((Mode::Sequential, false)),
        Just((Mode::Sequential, true)),
    ]
}

fn size(by_tokens: bool, batch_size: usize) -> BatchSize {
    if by_tokens {
        BatchSize::Tokens(700 * u32::try_from(batch_size).unwrap())
    } else {
        BatchSize::Rows(batch_size)
    }
}

proptest! {
    #[test]
    fn every_example_is_in_one_micro_batch_of_one_rank(
        lengths in prop::collection::vec(1_u32..500, 1..300),
        batch_size in 1_usize..5,
        accumulation in 1_usize..5,
        world_size in 1_usize..6,
        epoch in 0_u64..4,
        (mode, by_tokens) in any_mode(),
    ) {
        let batch_size = size(by_tokens, batch_size);
        let sharing = |rank| Sharing { batch_size, gradient_accumulation_steps: accumulation, rank, world_size };
        let options = options(mode, batch_size, sharing(0).micro_batches(), epoch);
        let plan = plan(&lengths, options);
        let mut seen = Vec::new();
        let mut steps = 0;
        for batch in plan.global_batches(&lengths) {
            steps += 1;
            let mut of_step = Vec::new();
            for rank in 0..world_size {
                for step in 0..accumulation {
                    let micro = batch.micro_batch(&sharing(rank), step);
                    let widths = micro.iter().map(|pack| pack.iter().map(|&row| lengths[row as usize]).sum::<u32>());
                    let width = widths.max().unwrap_or(0);
                    prop_assert!(mode != Mode::Pack || width <= 512);
                    if let BatchSize::Tokens(limit) = batch_size {
                        prop_assert!(micro.len() <= 1 || width as usize * micro.len() <= limit as usize);
                    }
                    of_step.extend(micro.iter().flatten().copied());
                }
            }
            of_step.sort_unstable();
            let mut whole: Vec<u32> = batch.rows().collect();
            whole.sort_unstable();
            prop_assert_eq!(&of_step, &whole);
            seen.extend(of_step);
        }
        prop_assert_eq!(steps, plan.num_steps());
        seen.sort_unstable();
        prop_assert!(seen.into_iter().eq(0..u32::try_from(lengths.len()).unwrap()));
    }

    #[test]
    fn global_batches_do_not_depend_on_how_they_are_shared(
        lengths in prop::collection::vec(1_u32..500, 1..200), mode in any_mode().prop_map(|(mode, _)| mode),
    ) {
        let batches = |batch_size, micro_batches| -> Vec<Vec<u32>> {
            let plan = plan(&lengths, options(mode, BatchSize::Rows(batch_size), micro_batches, 1));
            plan.global_batches(&lengths).map(|batch| batch.rows().collect()).collect()
        };
        prop_assert_eq!(&batches(1, 64), &batches(4, 16));
        prop_assert_eq!(&batches(1, 64), &batches(64, 1));
    }

    #[test]
    fn a_step_is_found_through_its_window(
        lengths in prop::collection::vec(1_u32..500, 1..300), (mode, by_tokens) in any_mode(),
    ) {
        let plan = plan(&lengths, options(mode, size(by_tokens, 2), 3, 0));
        let whole: Vec<GlobalBatch> = plan.global_batches(&lengths).collect();
        for (step, batch) in whole.iter().enumerate() {
            let (window, first) = plan.window_of(step);
            prop_assert_eq!(&plan.window(window, &lengths)[step - first], batch);
        }
    }
}

/// Lengths as real chats have them: many short, few long.
fn real_lengths(count: u32) -> Vec<u32> {
    (0..count)
        .map(|row| {
            let uniform = f64::from(u32::try_from(order::key(u64::from(row), 0, 0) >> 33).unwrap())
                / f64::from(1 << 31);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a length between 20 and 2048"
            )]
            let length = (20.0 / (1.0 - uniform * 0.99)) as u32;
            length.min(2048)
        })
        .collect()
}

#[test]
fn ranks_have_nearly_equal_work_at_every_micro_batch() {
    let lengths = real_lengths(20_000);
    for (mode, limit) in [(Mode::Bucket, 1.10), (Mode::Pack, 1.05)] {
        let sharing = |rank| Sharing {
            batch_size: BatchSize::Rows(1),
            gradient_accumulation_steps: 2,
            rank,
            world_size: 8,
        };
        let plan = plan(&lengths, PlanOptions { capacity: 2048, ..options(mode, BatchSize::Rows(1), 16, 0) });
        let cost = |micro: &[Vec<u32>]| -> f64 {
            let tokens = |&row: &u32| f64::from(lengths[row as usize]);
            micro.iter().flatten().map(|row| tokens(row) + 1e-3 * tokens(row).powi(2)).sum()
        };
        let (mut slowest, mut mean) = (0.0, 0.0);
        for batch in plan.global_batches(&lengths) {
            for step in 0..2 {
                let costs: Vec<f64> =
                    (0..8).map(|rank| cost(batch.micro_batch(&sharing(rank), step))).collect();
                slowest += costs.iter().copied().fold(0.0, f64::max);
                mean += costs.iter().sum::<f64>() / 8.0;
            }
        }
        assert!(slowest / mean < limit, "{mode:?}: {}", slowest / mean);
    }
}

#[test]
fn buckets_and_packs_hardly_pad() {
    let lengths = real_lengths(50_000);
    let padding = |mode| {
        let batch = if mode == Mode::Pack { 1 } else { 8 };
        let plan =
            plan(&lengths, PlanOptions { capacity: 2048, ..options(mode, BatchSize::Rows(batch), 1, 0) });
        let (mut tokens, mut places) = (0.0, 0.0);
        for batch in plan.global_batches(&lengths) {
            let widths =
                batch.packs.iter().map(|pack| pack.iter().map(|&row| lengths[row as usize]).sum::<u32>());
            let width = if mode == Mode::Pack { 2048 } else { widths.clone().max().unwrap() };
            tokens += widths.map(f64::from).sum::<f64>();
            places += batch.packs.iter().map(|_| f64::from(width)).sum::<f64>();
        }
        1.0 - tokens / places
    };
    assert!(padding(Mode::Bucket) < 0.02, "{}", padding(Mode::Bucket));
    assert!(padding(Mode::Pack) < 0.01, "{}", padding(Mode::Pack));
}
