//! Which rows belong to a split, and in what order an epoch takes them.
//!
//! Pure functions of the seed and the epoch: no thread, no world size.

/// A permutation of `0..count`, decided by `key` alone (Fisher-Yates over splitmix64).
pub fn shuffled(count: u32, key: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    shuffle(&mut order, key);
    order
}

/// Shuffles `items` in place, decided by `key` alone.
pub fn shuffle<T>(items: &mut [T], key: u64) {
    let mut state = key;
    for last in (1..items.len()).rev() {
        state = splitmix64(state);
        // the high word of a 64x64-bit product is uniform below the bound up to 2^-32 (Lemire 2019)
        let other = usize::try_from((u128::from(state) * (last as u128 + 1)) >> 64).unwrap_or(0);
        items.swap(last, other);
    }
}

/// A key for one purpose of one epoch of a run.
pub fn key(seed: u64, epoch: u64, purpose: u64) -> u64 {
    splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ purpose)
}

/// The rows held out for validation: the `round(ratio * n)` rows (at least one) with the smallest keyed hash
/// of their bytes, so that a row stays on its side when other rows are appended.
pub fn held_out(hashes: &[u64], ratio: f64, seed: u64) -> Vec<bool> {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a row count"
    )]
    let wanted = ((hashes.len() as f64 * ratio).round() as usize).max(1).min(hashes.len().saturating_sub(1));
    let mut out = vec![false; hashes.len()];
    if ratio <= 0.0 {
        return out;
    }
    let mut ranked: Vec<(u64, usize)> =
        hashes.iter().enumerate().map(|(row, hash)| (splitmix64(hash ^ splitmix64(seed)), row)).collect();
    ranked.sort_unstable();
    for &(_, row) in ranked.iter().take(wanted) {
        out[row] = true;
    }
    out
}

/// One step of splitmix64 (Steele, Lea, Flood 2014).
fn splitmix64(state: u64) -> u64 {
    let mut mixed = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_is_a_permutation_and_depends_on_its_key() {
        let mut one = shuffled(1000, 1);
        assert_ne!(one, shuffled(1000, 2));
        assert_eq!(one, shuffled(1000, 1));
        one.sort_unstable();
        assert!(one.into_iter().eq(0..1000));
    }

    #[test]
    fn appended_rows_move_few_rows_between_the_splits() {
        let hashes: Vec<u64> = (0..1000).map(|row| key(row, 0, 0)).collect();
        let before = held_out(&hashes[..900], 0.1, 7);
        let after = held_out(&hashes, 0.1, 7);
        let moved = before.iter().zip(&after).filter(|(one, other)| one != other).count();
        assert_eq!(before.iter().filter(|&&held| held).count(), 90);
        assert!(moved <= 10, "{moved}");
    }
}
