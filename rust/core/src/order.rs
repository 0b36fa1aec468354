//! Which rows an epoch takes, and in what order.
//!
//! Pure functions of the seed and the epoch: no thread, no world size, and no list of the epoch's rows. A position
//! of an epoch leads to its row through keyed permutations, so a run may go on anywhere at once, and a
//! shuffle of any number of rows takes no memory.

use std::str::FromStr;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

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

/// Rows of the index, in order.
#[derive(Debug, Clone)]
pub enum Rows {
    /// All from the first number up to the second.
    Range(u32, u32),
    /// These.
    List(Arc<[u32]>),
}

impl Rows {
    /// How many.
    pub fn len(&self) -> u32 {
        match self {
            Self::Range(start, end) => end - start,
            // an index has fewer rows than 2^32
            Self::List(rows) => u32::try_from(rows.len()).unwrap_or(u32::MAX),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row at `position`, which is below [`len`](Self::len).
    pub fn at(&self, position: u32) -> u32 {
        match self {
            Self::Range(start, _) => start + position,
            Self::List(rows) => rows[position as usize],
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len()).map(|position| self.at(position))
    }

    /// Those for which `keep` holds.
    #[must_use]
    pub fn filter(&self, mut keep: impl FnMut(u32) -> bool) -> Self {
        let kept: Vec<u32> = self.iter().filter(|&row| keep(row)).collect();
        if kept.len() == self.len() as usize { self.clone() } else { Self::List(kept.into()) }
    }

    /// `count` of them, drawn by `key`, in order.
    #[must_use]
    pub fn draw(&self, count: u32, key: u64) -> Self {
        let permutation = Permutation::new(self.len(), key);
        let mut drawn: Vec<u32> = (0..count).map(|position| self.at(permutation.at(position))).collect();
        drawn.sort_unstable();
        Self::List(drawn.into())
    }
}

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

/// What shares are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MixBy {
    /// Rows.
    Rows,
    /// Trained tokens.
    Tokens,
}

impl FromStr for MixBy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "rows" => Ok(Self::Rows),
            "tokens" => Ok(Self::Tokens),
            _ => Err(unknown("mix_by", name, "rows or tokens")),
        }
    }
}

/// When an epoch of mixed data sets ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stopping {
    /// When the first data set is used up: no row comes twice.
    FirstExhausted,
    /// When the last one is used up: the others come again.
    AllExhausted,
}

impl FromStr for Stopping {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "first_exhausted" => Ok(Self::FirstExhausted),
            "all_exhausted" => Ok(Self::AllExhausted),
            _ => Err(unknown("stopping_strategy", name, "first_exhausted or all_exhausted")),
        }
    }
}

fn unknown(setting: &str, name: &str, expected: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{setting} \"{name}\" is unknown; expected {expected}"))
}

/// How data sets share an epoch.
#[derive(Debug, Clone)]
pub struct Mixture {
    /// The share of each; without shares an epoch is all rows once.
    pub shares: Option<Vec<f64>>,
    /// What the shares are of.
    pub by: MixBy,
    /// When an epoch ends.
    pub stopping: Stopping,
}

/// What an epoch takes of one data set: `count` rows from place `start` of an endless sequence of permutations.
#[derive(Debug, Clone)]
struct Part {
    rows: Rows,
    key: u64,
    start: u64,
    count: u32,
}

impl Part {
    fn at(&self, position: u32) -> u32 {
        let length = u64::from(self.rows.len());
        let place = self.start + u64::from(position);
        let permutation = Permutation::new(self.rows.len(), key(self.key, place / length, PASS));
        self.rows.at(permutation.at(u32::try_from(place % length).unwrap_or(0)))
    }
}

/// Purposes of keys.
const PASS: u64 = 3;
const EPOCH: u64 = 1;
pub(crate) const DRAW: u64 = 4;

/// The rows of one epoch, each position with its row.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    parts: Vec<Part>,
    /// The first position after each part.
    ends: Vec<u32>,
    is_mixed: bool,
    sequence: Sequence,
}

#[derive(Debug, Clone)]
enum Sequence {
    /// One permutation over all parts.
    Shuffled(Permutation),
    /// One part after the other.
    Files,
    /// Parts in turn by their shares, as places of the files' sequence.
    Turns(Arc<[u32]>),
}

impl EpochOrder {
    /// The epoch `epoch` of `sets`; `trained_tokens` of a row counts for shares in tokens.
    pub fn new(
        sets: &[Rows],
        mixture: &Mixture,
        is_shuffled: bool,
        seed: u64,
        epoch: u64,
        trained_tokens: &dyn Fn(u32) -> u32,
    ) -> Result<Self> {
        let mut parts: Vec<Part> = (0_u64..)
            .zip(sets)
            .map(|(number, rows)| Part {
                rows: rows.clone(),
                key: key(seed, number, PASS),
                start: 0,
                count: rows.len(),
            })
            .collect();
        if let Some(shares) = &mixture.shares {
            check_shares(sets, shares)?;
            let available: Vec<u64> = sets
                .iter()
                .map(|rows| match mixture.by {
                    MixBy::Rows => u64::from(rows.len()),
                    MixBy::Tokens => rows.iter().map(|row| u64::from(trained_tokens(row))).sum(),
                })
                .collect();
            let quotas = quotas(&available, shares, mixture.stopping);
            for ((part, quota), available) in parts.iter_mut().zip(quotas).zip(available) {
                part.take(quota, available, mixture.by, epoch, trained_tokens)?;
            }
        }
        let mut ends = Vec::with_capacity(parts.len());
        let mut all = 0_u32;
        for part in &parts {
            all = all.checked_add(part.count).ok_or_else(too_many)?;
            ends.push(all);
        }
        let is_mixed = mixture.shares.is_some();
        let sequence = match (is_shuffled, is_mixed) {
            (true, _) => Sequence::Shuffled(Permutation::new(all, key(seed, epoch, EPOCH))),
            (false, false) => Sequence::Files,
            (false, true) => Sequence::Turns(turns(&parts)),
        };
        Ok(Self { parts, ends, is_mixed, sequence })
    }

    /// Number of rows of the epoch; a row that comes twice counts twice.
    pub fn len(&self) -> u32 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether every epoch has the same rows, each once.
    pub fn is_whole(&self) -> bool {
        !self.is_mixed
    }

    /// The row at `position` of the epoch.
    pub fn at(&self, position: u32) -> u32 {
        match &self.sequence {
            Sequence::Shuffled(permutation) => self.in_files(permutation.at(position)),
            Sequence::Files => self.in_files(position),
            Sequence::Turns(places) => self.in_files(places[position as usize]),
        }
    }

    /// The rows of each data set, one after the other.
    pub fn of_set(&self, set: usize) -> impl Iterator<Item = u32> + '_ {
        let end = self.ends[set];
        (end - self.parts[set].count..end).map(|place| self.in_files(place))
    }

    /// The rows of the epoch in no particular order, each as often as it comes.
    pub fn unordered(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.parts.len()).flat_map(|set| self.of_set(set))
    }

    fn in_files(&self, place: u32) -> u32 {
        let set = self.ends.partition_point(|&end| end <= place);
        let part = &self.parts[set];
        let position = place - (self.ends[set] - part.count);
        if self.is_mixed { part.at(position) } else { part.rows.at(position) }
    }
}

impl Part {
    /// Takes rows for `quota` of the `available` rows or trained tokens.
    fn take(
        &mut self,
        quota: f64,
        available: u64,
        by: MixBy,
        epoch: u64,
        trained_tokens: &dyn Fn(u32) -> u32,
    ) -> Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let rows_wanted = quota * f64::from(self.rows.len()) / available.max(1) as f64;
        if rows_wanted > f64::from(u32::MAX - 1) {
            return Err(too_many());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        let per_epoch = rows_wanted.round() as u32;
        self.start = epoch * u64::from(per_epoch);
        self.count = per_epoch;
        // a whole number of passes is exact as it is
        if by == MixBy::Rows || per_epoch.is_multiple_of(self.rows.len().max(1)) {
            return Ok(());
        }
        let (mut tokens, mut count) = (0.0, 0_u32);
        while tokens < quota {
            let next = f64::from(trained_tokens(self.at(count)));
            if tokens + next / 2.0 > quota {
                break;
            }
            tokens += next;
            count = count.checked_add(1).ok_or_else(too_many)?;
        }
        self.count = count;
        Ok(())
    }
}

fn too_many() -> Error {
    Error::new(
        ErrorKind::Config,
        "an epoch of this mix would have more than 4294967295 rows; lower the shares of small data sets, or choose \
         stopping_strategy first_exhausted",
    )
}

fn check_shares(sets: &[Rows], shares: &[f64]) -> Result<()> {
    let message = if shares.len() != sets.len() {
        format!("{} shares for {} data sets; expected one each", shares.len(), sets.len())
    } else if let Some(share) = shares.iter().find(|share| !(share.is_finite() && **share > 0.0)) {
        format!("a share of {share}; expected numbers above 0 (leave a data set out instead)")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Config, format!("mix: {message}")))
}

/// How much of each data set an epoch takes, in the unit of `available`.
fn quotas(available: &[u64], shares: &[f64], stopping: Stopping) -> Vec<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    let totals = available.iter().zip(shares).map(|(&have, share)| have as f64 / share);
    let total = match stopping {
        Stopping::FirstExhausted => totals.fold(f64::INFINITY, f64::min),
        Stopping::AllExhausted => totals.fold(0.0, f64::max),
    };
    shares.iter().map(|share| share * total).collect()
}

/// Places of the files' sequence, so that each part's rows are spread evenly over the epoch.
fn turns(parts: &[Part]) -> Arc<[u32]> {
    let mut start = 0;
    let mut places: Vec<(f64, u32)> = Vec::new();
    for part in parts {
        let time = |position: u32| (f64::from(position) + 0.5) / f64::from(part.count);
        places.extend((0..part.count).map(|position| (time(position), start + position)));
        start += part.count;
    }
    places.sort_by(|one, other| one.partial_cmp(other).unwrap_or(std::cmp::Ordering::Equal));
    places.into_iter().map(|(_, place)| place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mixture(shares: Option<Vec<f64>>, by: MixBy, stopping: Stopping) -> Mixture {
        Mixture { shares, by, stopping }
    }

    fn whole() -> Mixture {
        mixture(None, MixBy::Rows, Stopping::FirstExhausted)
    }

    proptest! {
        #[test]
        fn a_permutation_hits_each_number_once(count in 1_u32..3000, key in any::<u64>()) {
            let permutation = Permutation::new(count, key);
            let mut hit: Vec<u32> = (0..count).map(|position| permutation.at(position)).collect();
            hit.sort_unstable();
            prop_assert!(hit.into_iter().eq(0..count));
        }

        #[test]
        fn an_epoch_without_shares_is_every_row_once(
            sizes in prop::collection::vec(1_u32..200, 1..5), seed in any::<u64>(), is_shuffled in any::<bool>(),
        ) {
            let sets: Vec<Rows> = sizes.iter().scan(0, |start, size| {
                let rows = Rows::Range(*start, *start + size);
                *start += size;
                Some(rows)
            }).collect();
            let order = EpochOrder::new(&sets, &whole(), is_shuffled, seed, 2, &|_| 1).unwrap();
            let mut rows: Vec<u32> = (0..order.len()).map(|position| order.at(position)).collect();
            rows.sort_unstable();
            prop_assert!(rows.into_iter().eq(0..sizes.iter().sum()));
        }
    }

    #[test]
    fn places_are_uniform_over_keys() {
        // 5 rows, 20,000 keys: each row is at each place 4,000 times give or take 5 standard deviations
        let mut counts = [[0_i32; 5]; 5];
        for number in 0..20_000 {
            let permutation = Permutation::new(5, key(number, 0, 0));
            for position in 0..5 {
                counts[position as usize][permutation.at(position) as usize] += 1;
            }
        }
        assert!(counts.iter().flatten().all(|count| (count - 4000).abs() < 285), "{counts:?}");
    }

    #[test]
    fn first_exhausted_uses_up_one_set_and_repeats_nothing() {
        let sets = [Rows::Range(0, 100), Rows::Range(100, 1100)];
        let mix = mixture(Some(vec![0.5, 0.5]), MixBy::Rows, Stopping::FirstExhausted);
        let mut seen = std::collections::HashSet::new();
        for epoch in 0..10 {
            let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &|_| 1).unwrap();
            let rows: std::collections::HashSet<u32> = (0..order.len()).map(|at| order.at(at)).collect();
            assert_eq!(rows.len(), 200);
            assert_eq!(rows.iter().filter(|&&row| row < 100).count(), 100);
            seen.extend(rows);
        }
        // ten epochs take turns through the larger set, so each of its rows was used
        assert_eq!(seen.len(), 1100);
    }

    #[test]
    fn all_exhausted_repeats_the_smaller_set_evenly() {
        let sets = [Rows::Range(0, 100), Rows::Range(100, 1100)];
        let mix = mixture(Some(vec![0.3, 0.7]), MixBy::Rows, Stopping::AllExhausted);
        let mut times = vec![0; 1100];
        for epoch in 0..5 {
            let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &|_| 1).unwrap();
            assert_eq!(order.of_set(0).count(), 429);
            (0..order.len()).for_each(|at| times[order.at(at) as usize] += 1);
        }
        assert!(times[100..].iter().all(|&count| count == 5));
        // 5 · 429 rows are 21 whole passes and a part of one
        assert!(times[..100].iter().all(|&count| (21..=22).contains(&count)));
    }

    #[test]
    fn shares_in_trained_tokens_are_met_within_a_row() {
        let sets = [Rows::Range(0, 1000), Rows::Range(1000, 3000)];
        let trained = |row: u32| if row < 1000 { 10 + row % 91 } else { 5 + row % 7 };
        let mix = mixture(Some(vec![0.7, 0.3]), MixBy::Tokens, Stopping::FirstExhausted);
        for epoch in 0..4 {
            let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &trained).unwrap();
            let tokens = |set| order.of_set(set).map(|row| f64::from(trained(row))).sum::<f64>();
            let share = tokens(0) / (tokens(0) + tokens(1));
            assert!((share - 0.7).abs() < 0.002, "{share}");
        }
    }

    #[test]
    fn sequential_mixes_spread_each_set_over_the_epoch() {
        let sets = [Rows::Range(0, 10), Rows::Range(10, 40)];
        let mix = mixture(Some(vec![0.25, 0.75]), MixBy::Rows, Stopping::FirstExhausted);
        let order = EpochOrder::new(&sets, &mix, false, 1, 0, &|_| 1).unwrap();
        for start in (0..order.len()).step_by(4) {
            let first = (start..start + 4).filter(|&at| order.at(at) < 10).count();
            assert_eq!(first, 1);
        }
    }

    #[test]
    fn a_row_stays_on_its_side_when_rows_are_appended() {
        let hash = |row: u32| key(u64::from(row), 0, 0);
        let sides = |count| split(&[Rows::Range(0, count)], 0.1, 7, hash).1[0].iter().collect::<Vec<_>>();
        let (before, after) = (sides(900), sides(1000));
        assert!((60..120).contains(&before.len()), "{}", before.len());
        assert_eq!(before, after.into_iter().filter(|&row| row < 900).collect::<Vec<_>>());
    }

    #[test]
    fn a_split_has_both_sides_and_every_row_once() {
        for (count, ratio) in [(2, 0.000_001), (2, 0.999_999), (97, 0.1), (3, 0.5)] {
            let sets = [Rows::Range(0, 1), Rows::Range(1, count)];
            let (train, held) = split(&sets, ratio, 3, |row| key(u64::from(row), 1, 1));
            let mut all: Vec<u32> = train.iter().chain(&held).flat_map(Rows::iter).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
            assert!(held.iter().any(|rows| !rows.is_empty()) && train.iter().any(|rows| !rows.is_empty()));
        }
        let (train, held) = split(&[Rows::Range(0, 1)], 0.5, 3, |_| 0);
        assert_eq!((train[0].len(), held[0].len()), (1, 0));
    }

    #[test]
    fn wrong_shares_are_refused() {
        let sets = [Rows::Range(0, 10), Rows::Range(10, 40)];
        for shares in [vec![0.5], vec![0.5, 0.0], vec![0.5, f64::NAN]] {
            let mix = mixture(Some(shares), MixBy::Rows, Stopping::FirstExhausted);
            assert!(EpochOrder::new(&sets, &mix, true, 1, 0, &|_| 1).is_err());
        }
    }
}
