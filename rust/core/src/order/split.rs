//! Which rows are held out for validation: each row by its own hash.

use std::sync::Arc;

use super::Rows;
use super::permutation::splitmix64;

/// Whether a row with this hash is held out for validation. The answer depends on the row and the seed alone, so it
/// stays when other rows are added, and equal rows are on the same side.
pub fn is_held_out(hash: u64, ratio: f64, seed: u64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "2^64 steps of a share are more than enough")]
    let share = splitmix64(hash ^ splitmix64(seed)) as f64 / u64::MAX as f64;
    share < ratio
}

/// The rows of each data set for training and those held out: at least one is held out where there are two.
pub fn split(sets: &[Rows], ratio: f64, seed: u64, hash: impl Fn(u32) -> u64) -> (Vec<Rows>, Vec<Rows>) {
    let mut held: Vec<Rows> =
        sets.iter().map(|rows| rows.filter(|row| is_held_out(hash(row), ratio, seed))).collect();
    let all: u64 = sets.iter().map(|rows| u64::from(rows.len())).sum();
    let num_held: u64 = held.iter().map(|rows| u64::from(rows.len())).sum();
    let rank = |row: &u32| (splitmix64(hash(*row) ^ splitmix64(seed)), *row);
    // the row nearest to the border changes sides where one side would be empty
    let moved = if all < 2 || (num_held > 0 && num_held < all) {
        None
    } else if num_held == 0 {
        sets.iter().flat_map(Rows::iter).min_by_key(rank)
    } else {
        sets.iter().flat_map(Rows::iter).max_by_key(rank)
    };
    if let Some(moved) = moved {
        for (rows, held) in sets.iter().zip(&mut held) {
            *held = rows.filter(|row| (row == moved) == (num_held == 0));
        }
    }
    if all < 2 {
        held = sets.iter().map(|_| Rows::List(Arc::new([]))).collect();
    }
    let train = sets
        .iter()
        .zip(&held)
        .map(|(rows, held)| {
            let mut held = held.iter().peekable();
            rows.filter(|row| held.next_if_eq(&row).is_none())
        })
        .collect();
    (train, held)
}
