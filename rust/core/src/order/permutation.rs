//! Permutations and shuffles that a key decides, and the keys themselves.

/// A permutation of `0..count`, decided by its key: a Feistel network (Luby, Rackoff 1988) on the smallest
/// power of two that holds `count`, walked until it falls into the range (Black, Rogaway 2002). Halves of one or two
/// bits would favour some places, so a small range lies in a network of 256.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    count: u32,
    /// Bits of the low half; the high half has as many or one less.
    low_bits: u32,
    low_mask: u32,
    high_mask: u32,
    round_keys: [u32; 6],
}

impl Permutation {
    /// The permutation of `0..count` that belongs to `key`.
    pub fn new(count: u32, key: u64) -> Self {
        let bits = (32 - count.saturating_sub(1).leading_zeros()).max(8);
        let low_bits = bits.div_ceil(2);
        let mut state = key;
        let round_keys = std::array::from_fn(|_| {
            state = splitmix64(state);
            low_word(state)
        });
        let mask = |bits: u32| 1_u32.checked_shl(bits).map_or(u32::MAX, |power| power - 1);
        Self { count, low_bits, low_mask: mask(low_bits), high_mask: mask(bits - low_bits), round_keys }
    }

    /// Where `position` goes; it is below `count`.
    pub fn at(&self, position: u32) -> u32 {
        debug_assert!(position < self.count);
        if self.count == 1 {
            return 0;
        }
        let mut value = position;
        loop {
            value = self.rounds(value);
            if value < self.count {
                return value;
            }
        }
    }

    fn rounds(&self, value: u32) -> u32 {
        let (mut low, mut high) = (value & self.low_mask, value >> self.low_bits);
        for pair in self.round_keys.chunks_exact(2) {
            high ^= scramble(low, pair[0]) & self.high_mask;
            low ^= scramble(high, pair[1]) & self.low_mask;
        }
        (high << self.low_bits) | low
    }
}

/// A keyed hash of one half, by the finalizer of murmur3.
fn scramble(half: u32, key: u32) -> u32 {
    let mut mixed = half.wrapping_mul(0x9E37_79B1) ^ key;
    mixed = (mixed ^ (mixed >> 16)).wrapping_mul(0x85EB_CA6B);
    mixed = (mixed ^ (mixed >> 13)).wrapping_mul(0xC2B2_AE35);
    mixed ^ (mixed >> 16)
}

#[expect(clippy::cast_possible_truncation, reason = "half of the bits are wanted")]
fn low_word(state: u64) -> u32 {
    state as u32
}

/// Shuffles `items` in place, decided by `key` alone (Fisher-Yates over splitmix64).
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

/// One step of splitmix64 (Steele, Lea, Flood 2014).
pub(crate) fn splitmix64(state: u64) -> u64 {
    let mut mixed = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
