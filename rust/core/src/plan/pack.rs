//! Best-fit packing of a whole epoch.
//!
//! Rows go into packs of a fixed number of tokens, longest first, each into the fullest pack that has room for it
//! (best-fit decreasing, Johnson 1973). Rows of one length are alike for that, so whole lengths are placed at once and what
//! is kept is a few *groups* of like packs. Which row of a length a pack gets is decided by keyed permutations, so
//! packs are made anew each epoch from other rows, and any pack of any epoch is found at once.

use std::collections::BTreeMap;

use crate::order::{Permutation, key};

/// The packs of an epoch's rows.
#[derive(Debug, Clone)]
pub struct Packing {
    /// Rows, those of one length together.
    by_length: Vec<u32>,
    /// Lengths, longest first.
    classes: Vec<Class>,
    groups: Vec<Group>,
    entries: Vec<Entry>,
    capacity: u32,
    num_packs: u32,
}

/// The rows of one length.
#[derive(Debug, Clone, Copy)]
struct Class {
    length: u32,
    /// Its first place in `by_length`.
    start: u32,
    count: u32,
}

/// Packs that hold rows of the same lengths.
#[derive(Debug, Clone, Copy)]
struct Group {
    /// Its first pack.
    first_pack: u32,
    /// Its part of `entries`.
    first_entry: u32,
    num_entries: u32,
    /// Tokens of each of its packs.
    tokens: u32,
    /// Σ L² over the rows of each of its packs.
    squares: u64,
}

/// Rows of one length in each pack of a group.
#[derive(Debug, Clone, Copy)]
struct Entry {
    class: u32,
    /// The place among the rows of the length that the first pack of the group begins with.
    first: u32,
    per_pack: u32,
}

/// Packs under construction: `count` of them with the same lengths.
#[derive(Debug, Clone)]
struct Open {
    count: u32,
    entries: Vec<Entry>,
}

impl Open {
    /// Takes `count` of the packs away.
    fn split_off(&mut self, count: u32) -> Self {
        let taken = Self { count, entries: self.entries.clone() };
        for entry in &mut self.entries {
            entry.first += count * entry.per_pack;
        }
        self.count -= count;
        taken
    }
}

const CLASS: u64 = 5;

impl Packing {
    /// Packs `rows`, whose lengths stand in `lengths`, into packs of `capacity` tokens. No row is longer than that.
    pub fn new<I: Iterator<Item = u32>>(rows: impl Fn() -> I, lengths: &[u32], capacity: u32) -> Self {
        let longest = rows().map(|row| lengths[row as usize]).max().unwrap_or(0);
        // a counting sort by length
        let mut places = vec![0_u32; longest as usize + 1];
        for row in rows() {
            places[lengths[row as usize] as usize] += 1;
        }
        let (mut start, mut classes) = (0, Vec::new());
        for length in (0..=longest).rev() {
            let place = &mut places[length as usize];
            let count = std::mem::replace(place, start);
            if count > 0 {
                classes.push(Class { length, start, count });
                start += count;
            }
        }
        let mut by_length = vec![0; start as usize];
        for row in rows() {
            let place = &mut places[lengths[row as usize] as usize];
            by_length[*place as usize] = row;
            *place += 1;
        }
        let mut packing =
            Self { by_length, classes, groups: Vec::new(), entries: Vec::new(), capacity, num_packs: 0 };
        packing.close(packing.fill());
        packing
    }

    /// Packs by the room that is left in them.
    fn fill(&self) -> BTreeMap<u32, Vec<Open>> {
        let mut open = BTreeMap::<u32, Vec<Open>>::new();
        for (number, class) in (0_u32..).zip(&self.classes) {
            let (length, mut first, mut left) = (class.length, 0, class.count);
            let mut place = |open: &mut BTreeMap<u32, Vec<Open>>, mut packs: Open, room: u32, each: u32| {
                packs.entries.push(Entry { class: number, first, per_pack: each });
                first += packs.count * each;
                left -= packs.count * each;
                open.entry(room - each * length).or_default().push(packs);
                left
            };
            let mut rest = class.count;
            while rest > 0 {
                let fits = open.range_mut(length.max(1)..).next().map(|(room, groups)| (*room, groups));
                let Some((room, groups)) = fits else {
                    // the fullest pack with room is the one just begun, so it takes all it can
                    let each = (self.capacity / length.max(1)).max(1);
                    let full = rest / each;
                    if full > 0 {
                        rest =
                            place(&mut open, Open { count: full, entries: Vec::new() }, self.capacity, each);
                    } else {
                        let last = rest;
                        rest = place(&mut open, Open { count: 1, entries: Vec::new() }, self.capacity, last);
                    }
                    continue;
                };
                let each = (room / length.max(1)).min(rest);
                let Some(mut packs) = groups.pop() else {
                    open.remove(&room);
                    continue;
                };
                let wanted = (rest / each).min(packs.count);
                let taken = packs.split_off(wanted);
                if packs.count > 0 {
                    groups.push(packs);
                } else if groups.is_empty() {
                    open.remove(&room);
                }
                rest = place(&mut open, taken, room, each);
            }
        }
        open
    }

    fn close(&mut self, open: BTreeMap<u32, Vec<Open>>) {
        for packs in open.into_values().flatten() {
            let group = Group {
                first_pack: self.num_packs,
                first_entry: u32::try_from(self.entries.len()).unwrap_or(u32::MAX),
                num_entries: u32::try_from(packs.entries.len()).unwrap_or(u32::MAX),
                tokens: packs.entries.iter().map(|entry| entry.per_pack * self.length(entry)).sum(),
                squares: packs
                    .entries
                    .iter()
                    .map(|entry| u64::from(entry.per_pack) * u64::from(self.length(entry)).pow(2))
                    .sum(),
            };
            self.num_packs += packs.count;
            self.entries.extend(packs.entries);
            self.groups.push(group);
        }
    }

    fn length(&self, entry: &Entry) -> u32 {
        self.classes[entry.class as usize].length
    }

    /// Number of packs.
    pub fn num_packs(&self) -> u32 {
        self.num_packs
    }

    fn group(&self, pack: u32) -> &Group {
        let after = self.groups.partition_point(|group| group.first_pack <= pack);
        &self.groups[after - 1]
    }

    /// The tokens of a pack and the sum of the squared lengths of its rows.
    pub fn size(&self, pack: u32) -> (u32, u64) {
        let group = self.group(pack);
        (group.tokens, group.squares)
    }

    /// The rows of a pack in an epoch, longest first.
    pub fn rows(&self, pack: u32, seed: u64, epoch: u64) -> Vec<u32> {
        let group = self.group(pack);
        let entries = &self.entries[group.first_entry as usize..][..group.num_entries as usize];
        let number = pack - group.first_pack;
        let mut rows = Vec::new();
        for entry in entries {
            let class = self.classes[entry.class as usize];
            let permutation =
                Permutation::new(class.count, key(seed, epoch, CLASS ^ u64::from(class.length) << 8));
            let first = entry.first + number * entry.per_pack;
            rows.extend(
                (first..first + entry.per_pack)
                    .map(|place| self.by_length[(class.start + permutation.at(place)) as usize]),
            );
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The number of packs of best-fit decreasing, a row at a time.
    fn best_fit(lengths: &[u32], capacity: u32) -> usize {
        let mut sorted = lengths.to_vec();
        sorted.sort_unstable_by(|one, other| other.cmp(one));
        let mut rooms: Vec<u32> = Vec::new();
        for length in sorted {
            match rooms.iter_mut().filter(|room| **room >= length).min() {
                Some(room) => *room -= length,
                None => rooms.push(capacity - length),
            }
        }
        rooms.len()
    }

    proptest! {
        #[test]
        fn packing_loses_no_example_and_passes_no_limit(
            lengths in prop::collection::vec(1_u32..=64, 1..400), epoch in 0_u64..3,
        ) {
            let count = u32::try_from(lengths.len()).unwrap();
            let packing = Packing::new(|| 0..count, &lengths, 64);
            let mut seen = Vec::new();
            for pack in 0..packing.num_packs() {
                let rows = packing.rows(pack, 9, epoch);
                let tokens: u32 = rows.iter().map(|&row| lengths[row as usize]).sum();
                let squares: u64 = rows.iter().map(|&row| u64::from(lengths[row as usize]).pow(2)).sum();
                prop_assert!(tokens <= 64);
                prop_assert_eq!(packing.size(pack), (tokens, squares));
                seen.extend(rows);
            }
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..count));
        }

        #[test]
        fn whole_lengths_at_once_are_as_good_as_a_row_at_a_time(
            lengths in prop::collection::vec(1_u32..=64, 1..300),
        ) {
            let count = u32::try_from(lengths.len()).unwrap();
            let packs = Packing::new(|| 0..count, &lengths, 64).num_packs();
            prop_assert_eq!(packs as usize, best_fit(&lengths, 64));
        }
    }

    #[test]
    fn each_epoch_packs_other_rows_together() {
        let lengths: Vec<u32> = (0..1000).map(|row| 10 + row % 5).collect();
        let packing = Packing::new(|| 0..1000, &lengths, 64);
        let packs = |epoch| -> Vec<Vec<u32>> {
            (0..packing.num_packs()).map(|pack| packing.rows(pack, 1, epoch)).collect()
        };
        assert_ne!(packs(0), packs(1));
        assert_eq!(packs(1), packs(1));
    }
}
