//! Which rows an epoch takes, and in what order.
//!
//! Pure functions of the seed and the epoch: no thread, no world size, and no list of the epoch's rows. A position
//! of an epoch leads to its row through keyed permutations, so a run may go on anywhere at once, and a
//! shuffle of any number of rows takes no memory.

mod mix;
mod permutation;
mod split;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::mix::{check_shares, quotas};
use crate::{Error, ErrorKind, Result};

pub use self::mix::{MixBy, Mixture, Stopping};
pub use self::permutation::{Permutation, key, shuffle};
pub use self::split::{is_held_out, split};

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
