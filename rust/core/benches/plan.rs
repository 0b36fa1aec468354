//! Seconds to plan an epoch of 1, 4 and 10 million rows, and to find one step of it.
//!
//! Lengths are those of real chats in shape: many short, few long. What is planned is asserted before it is timed: every row
//! comes once.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::time::Instant;

use sftcore::order::{EpochOrder, MixBy, Mixture, Rows, Stopping, key};
use sftcore::plan::{BatchSize, Mode, Plan, PlanOptions};

fn lengths(count: u32) -> Vec<u32> {
    (0..count)
        .map(|row| {
            // 60 over a uniform number: half are below 120, one in 34 is 2,048
            let uniform = u32::try_from(key(u64::from(row), 0, 0) >> 48).unwrap_or(0);
            (60 * 65_536 / (65_536 - uniform * 64 / 65)).min(2048)
        })
        .collect()
}

fn plan(lengths: &[u32], mode: Mode, batch_size: BatchSize, epoch: u64) -> Plan {
    let options = PlanOptions {
        mode,
        batch_size,
        micro_batches: 2,
        capacity: 2048,
        quadratic_cost: 4e-5,
        seed: 1,
        epoch,
    };
    let sets = [Rows::Range(0, u32::try_from(lengths.len()).expect("fewer than 2^32 rows"))];
    let mixture = Mixture { shares: None, by: MixBy::Rows, stopping: Stopping::FirstExhausted };
    let order = EpochOrder::new(&sets, &mixture, true, 1, epoch, &|_| 1).expect("one data set has no shares");
    Plan::new(options, order, lengths, None)
}

fn check(lengths: &[u32], plan: &Plan) {
    let mut seen = vec![false; lengths.len()];
    for row in plan.global_batches(lengths).flat_map(|batch| batch.rows().collect::<Vec<_>>()) {
        assert!(!std::mem::replace(&mut seen[row as usize], true), "row {row} comes twice");
    }
    assert!(seen.into_iter().all(|seen| seen), "a row is missing");
}

fn main() {
    println!("{:<8}{:>12}{:>14}{:>16}{:>20}", "mode", "rows", "plan, s", "one step, ms", "all batches, s");
    for (name, mode, batch_size) in [
        ("bucket", Mode::Bucket, BatchSize::Rows(8)),
        ("tokens", Mode::Bucket, BatchSize::Tokens(16_384)),
        ("pack", Mode::Pack, BatchSize::Rows(1)),
    ] {
        check(&lengths(100_000), &plan(&lengths(100_000), mode, batch_size, 1));
        for count in [1_000_000, 4_000_000, 10_000_000] {
            let lengths = lengths(count);
            let started = Instant::now();
            let plan = plan(&lengths, mode, batch_size, 0);
            let planned = started.elapsed().as_secs_f64();
            let step = plan.num_steps() * 9 / 10;
            let started = Instant::now();
            let (window, first) = plan.window_of(step);
            assert!(plan.window(window, &lengths).len() > step - first);
            let found = started.elapsed().as_secs_f64();
            let started = Instant::now();
            let rows: usize = plan.global_batches(&lengths).map(|batch| batch.rows().count()).sum();
            assert_eq!(rows, lengths.len());
            let all = started.elapsed().as_secs_f64();
            println!("{name:<8}{count:>12}{planned:>14.2}{:>16.2}{all:>20.2}", found * 1e3);
        }
    }
}
