//! Words already merged.
//!
//! Text repeats its words; a word of up to fifteen bytes is looked up in one table slot of half a cache
//! line, without a pointer. The tables are bounded: a full one is emptied and filled anew.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

/// The longest word that fits a slot.
const PACKED: usize = 15;
const FIRST_SLOTS: usize = 1 << 14;
const MOST_SLOTS: usize = 1 << 18;
/// Ids that fit a slot; longer lists lie in `overflow`.
const INLINE: usize = 3;
const MOST_OVERFLOW: usize = 1 << 20;
/// Words above `PACKED` bytes; longer ones than this are merged each time.
const LONGEST: usize = 128;
const MOST_LONG: usize = 1 << 16;

/// A word of up to 15 bytes with its length in the last byte; zero is no word.
pub(super) type PackedWord = u128;

/// Half a cache line, and never across two.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    word: PackedWord,
    ids: [u32; INLINE],
    num_ids: u32,
}

/// Word → ids.
pub(super) struct WordCache {
    slots: Vec<Slot>,
    used: usize,
    overflow: Vec<u32>,
    long: HashMap<Box<[u8]>, Box<[u32]>, FxBuildHasher>,
}

impl Default for WordCache {
    fn default() -> Self {
        Self {
            slots: vec![Slot::default(); FIRST_SLOTS],
            used: 0,
            overflow: Vec::new(),
            long: HashMap::default(),
        }
    }
}

/// Packs `text[start..end]`, where it is short enough.
pub(super) fn pack(text: &[u8], start: usize, end: usize) -> Option<PackedWord> {
    let length = end - start;
    if length > PACKED {
        return None;
    }
    let mut bytes = [0; 16];
    if let Some(window) = text.get(start..start + 16) {
        // a copy of fixed length, cut by a mask: faster than one of variable length
        bytes.copy_from_slice(window);
    } else {
        bytes[..length].copy_from_slice(&text[start..end]);
    }
    let word = u128::from_le_bytes(bytes) & ((1 << (8 * length)) - 1);
    Some(word | (length as u128) << 120)
}

#[expect(clippy::cast_possible_truncation, reason = "folding 128 bits into an index")]
fn hash(word: PackedWord) -> usize {
    let folded = u128::from(word as u64 ^ 0x9E37_79B9_7F4A_7C15)
        * u128::from((word >> 64) as u64 ^ 0xD1B5_4A32_D192_ED03);
    ((folded >> 64) as u64 ^ folded as u64) as usize
}

impl WordCache {
    /// Appends the ids of `word`, where they are known.
    pub(super) fn append(&self, word: PackedWord, ids: &mut Vec<u32>) -> bool {
        let mask = self.slots.len() - 1;
        let mut at = hash(word) & mask;
        loop {
            let slot = &self.slots[at];
            if slot.word == word {
                match slot.num_ids {
                    1 => ids.push(slot.ids[0]),
                    2 => ids.extend_from_slice(&slot.ids[..2]),
                    3 => ids.extend_from_slice(&slot.ids),
                    _ => {
                        let start = slot.ids[0] as usize;
                        ids.extend_from_slice(&self.overflow[start..start + slot.num_ids as usize]);
                    }
                }
                return true;
            }
            if slot.word == 0 {
                return false;
            }
            at = (at + 1) & mask;
        }
    }

    /// Keeps the ids of `word`, which is not in the table.
    #[expect(clippy::cast_possible_truncation, reason = "the overflow is bounded")]
    pub(super) fn insert(&mut self, word: PackedWord, ids: &[u32]) {
        if 2 * self.used >= self.slots.len() || self.overflow.len() > MOST_OVERFLOW {
            self.make_room();
        }
        let mut slot = Slot { word, ids: [0; INLINE], num_ids: ids.len() as u32 };
        if ids.len() <= INLINE {
            slot.ids[..ids.len()].copy_from_slice(ids);
        } else {
            slot.ids[0] = self.overflow.len() as u32;
            self.overflow.extend_from_slice(ids);
        }
        self.place(slot);
    }

    fn place(&mut self, slot: Slot) {
        let mask = self.slots.len() - 1;
        let mut at = hash(slot.word) & mask;
        while self.slots[at].word != 0 {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
        self.used += 1;
    }

    fn make_room(&mut self) {
        let grown = 4 * self.slots.len();
        self.used = 0;
        if grown > MOST_SLOTS || self.overflow.len() > MOST_OVERFLOW {
            self.slots.fill(Slot::default());
            self.overflow.clear();
            return;
        }
        let slots = std::mem::replace(&mut self.slots, vec![Slot::default(); grown]);
        for slot in slots.into_iter().filter(|slot| slot.word != 0) {
            self.place(slot);
        }
    }

    /// Appends the ids of a word too long for a slot, where they are known.
    pub(super) fn append_long(&self, word: &[u8], ids: &mut Vec<u32>) -> bool {
        match self.long.get(word) {
            Some(known) => {
                ids.extend_from_slice(known);
                true
            }
            None => false,
        }
    }

    /// Keeps the ids of a word too long for a slot.
    pub(super) fn insert_long(&mut self, word: &[u8], ids: &[u32]) {
        if word.len() > LONGEST {
            return;
        }
        if self.long.len() >= MOST_LONG {
            self.long.clear();
        }
        self.long.insert(word.into(), ids.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_told_apart_by_their_length() {
        let text = b"a\0\0aaaaaaaaaaaaaaaaaaaaaa";
        assert_ne!(pack(text, 0, 1), pack(text, 0, 2));
        assert_eq!(pack(text, 3, 4), pack(b"xa", 1, 2));
        assert_eq!(pack(text, 0, 16), None);
    }

    #[test]
    fn a_full_table_still_answers() {
        let mut cache = WordCache::default();
        let mut ids = Vec::new();
        for number in 0..400_000u32 {
            let text = format!("{number:06}");
            let word = pack(text.as_bytes(), 0, 6).expect("short");
            if !cache.append(word, &mut ids) {
                cache.insert(word, &vec![number; (number % 5 + 1) as usize]);
            }
            ids.clear();
            assert!(cache.append(word, &mut ids));
            assert_eq!(ids, vec![number; (number % 5 + 1) as usize]);
            ids.clear();
        }
        assert!(cache.slots.len() <= MOST_SLOTS);
    }
}
