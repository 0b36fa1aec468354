//! Byte-pair merges: the symbols of a word to its token ids.
//!
//! The merge of lowest rank goes first, the leftmost of equals; that order defines the ids. Short words
//! are merged by scanning for it, long ones with a heap, so that time stays linear in the word but for a
//! logarithm. Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword
//! Units"; the order of ties is that of Hugging Face's `tokenizers`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

/// Above this many symbols a heap finds the next merge faster than a scan.
const SCAN_LIMIT: usize = 192;
const NO_MERGE: u32 = u32::MAX;
/// Pairs whose merge, or lack of one, is kept at hand; a power of two.
const RECENT_PAIRS: usize = 1 << 14;

/// Rank and result of a merge.
#[derive(Debug, Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

const NEVER: Merge = Merge { rank: NO_MERGE, id: 0 };

/// The merges of a vocabulary.
pub(super) struct Merges {
    pairs: HashMap<u64, Merge, FxBuildHasher>,
}

/// Room for one word, kept between words.
pub(super) struct Workspace {
    ids: Vec<u32>,
    /// Rank and result of the merge of each symbol with the next one.
    ranks: Vec<u32>,
    merged: Vec<u32>,
    links: Vec<Link>,
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
    recent: Vec<(u64, Merge)>,
}

/// The neighbours of a symbol that are left.
#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

const END: u32 = u32::MAX;

impl Default for Workspace {
    fn default() -> Self {
        Self {
            ids: Vec::new(),
            ranks: Vec::new(),
            merged: Vec::new(),
            links: Vec::new(),
            heap: BinaryHeap::new(),
            // no id pairs with itself as u32::MAX, so this key is never asked for
            recent: vec![(u64::MAX, NEVER); RECENT_PAIRS],
        }
    }
}

impl Merges {
    /// `merges` are `(left, right, result)` in the order of their ranks.
    pub(super) fn new(merges: &[(u32, u32, u32)]) -> Self {
        let mut pairs = HashMap::with_capacity_and_hasher(merges.len(), FxBuildHasher);
        for (rank, &(left, right, id)) in (0u32..).zip(merges) {
            // a pair named twice keeps its last rank, as a dictionary does
            pairs.insert(key(left, right), Merge { rank, id });
        }
        Self { pairs }
    }

    /// Merges the symbols in `workspace` and appends the ids that remain to `ids`.
    pub(super) fn apply(&self, workspace: &mut Workspace, ids: &mut Vec<u32>) {
        workspace.start(self);
        if workspace.ids.len() <= SCAN_LIMIT {
            workspace.scan(self);
            ids.extend_from_slice(&workspace.ids);
        } else {
            workspace.drain_heap(self);
            let mut at = 0;
            while at != END {
                ids.push(workspace.ids[at as usize]);
                at = workspace.links[at as usize].next;
            }
        }
    }
}

impl Workspace {
    /// Room for the symbols of a new word.
    pub(super) fn symbols(&mut self) -> &mut Vec<u32> {
        self.ids.clear();
        &mut self.ids
    }

    fn start(&mut self, merges: &Merges) {
        let length = self.ids.len();
        self.ranks.clear();
        self.ranks.resize(length, NO_MERGE);
        self.merged.clear();
        self.merged.resize(length, 0);
        for at in 1..length {
            self.look_up(merges, at - 1, at);
        }
    }

    /// Notes how the symbol at `left` merges with the one at `right`.
    fn look_up(&mut self, merges: &Merges, left: usize, right: usize) {
        let key = key(self.ids[left], self.ids[right]);
        let recent = &mut self.recent[hash(key)];
        if recent.0 != key {
            *recent = (key, merges.pairs.get(&key).copied().unwrap_or(NEVER));
        }
        self.ranks[left] = recent.1.rank;
        self.merged[left] = recent.1.id;
    }

    fn scan(&mut self, merges: &Merges) {
        loop {
            let lowest = self.ranks.iter().copied().min().unwrap_or(NO_MERGE);
            if lowest == NO_MERGE {
                return;
            }
            let Some(at) = self.ranks.iter().position(|&rank| rank == lowest) else { return };
            self.ids[at] = self.merged[at];
            self.ids.remove(at + 1);
            self.ranks.remove(at + 1);
            self.merged.remove(at + 1);
            if at > 0 {
                self.look_up(merges, at - 1, at);
            }
            if at + 1 < self.ids.len() {
                self.look_up(merges, at, at + 1);
            } else {
                self.ranks[at] = NO_MERGE;
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a word is shorter than source::MAX_ROW_BYTES")]
    fn drain_heap(&mut self, merges: &Merges) {
        let length = self.ids.len();
        self.links.clear();
        self.links.extend((0..length).map(|at| Link {
            previous: if at == 0 { END } else { at as u32 - 1 },
            next: if at + 1 == length { END } else { at as u32 + 1 },
        }));
        self.heap.clear();
        self.heap.extend(
            (0..length)
                .filter(|&at| self.ranks[at] != NO_MERGE)
                .map(|at| Reverse((self.ranks[at], at as u32, self.merged[at]))),
        );
        while let Some(Reverse((rank, place, merged))) = self.heap.pop() {
            let at = place as usize;
            // an entry is stale once either of its symbols has merged elsewhere
            if self.ranks[at] != rank || self.merged[at] != merged || self.links[at].next == END {
                continue;
            }
            let right = self.links[at].next as usize;
            let after = self.links[right].next;
            self.ranks[right] = NO_MERGE;
            self.ids[at] = merged;
            self.links[at].next = after;
            if after != END {
                self.links[after as usize].previous = place;
            }
            for left in [self.links[at].previous, place] {
                if left == END {
                    continue;
                }
                match self.links[left as usize].next {
                    END => self.ranks[left as usize] = NO_MERGE,
                    next => self.look_up(merges, left as usize, next as usize),
                }
                let rank = self.ranks[left as usize];
                if rank != NO_MERGE {
                    self.heap.push(Reverse((rank, left, self.merged[left as usize])));
                }
            }
        }
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

fn hash(key: u64) -> usize {
    const SHIFT: u32 = u64::BITS - RECENT_PAIRS.trailing_zeros();
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> SHIFT) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heap_and_scan_merge_alike() {
        // over the letters 0, 1, 2: a small vocabulary with chains and ties
        let merges =
            Merges::new(&[(0, 0, 3), (1, 2, 4), (3, 3, 5), (0, 1, 6), (4, 0, 7), (5, 4, 8), (6, 2, 9)]);
        let mut workspace = Workspace::default();
        let mut state = 7u32;
        for length in 2..500 {
            let word: Vec<u32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 16) % 3
                })
                .collect();
            let mut by_apply = Vec::new();
            workspace.symbols().extend(&word);
            merges.apply(&mut workspace, &mut by_apply);
            workspace.symbols().extend(&word);
            workspace.start(&merges);
            workspace.scan(&merges);
            assert_eq!(by_apply, workspace.ids);
        }
    }
}
