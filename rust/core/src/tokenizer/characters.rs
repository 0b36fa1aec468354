//! Characters of several bytes that may be merged before anything else.
//!
//! A byte-level encoding merges the three bytes of a Han character anew wherever it stands. In a trained
//! vocabulary that can be done once. Let `R(c)` be the highest rank among the merges that make the
//! token of character `c` out of its bytes. While `c` is unfinished, one of them is open, so no merge
//! above `R(c)` runs before it; and a merge that uses a token ranks above those that made it (checked
//! here for every merge). What is left to rule out is a merge across the border of two characters
//! that uses a fragment of one of them and ranks below `R` of either. Those are few, and are looked up
//! for each border; a word that has one is merged from its bytes.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use super::fast::NO_TOKEN;
use super::split::char_length;

/// The tokens of whole characters.
pub(super) struct Characters {
    /// By code point below U+10000: the token and `R`, or `NO_TOKEN`.
    tokens: Vec<(u32, u32)>,
    /// Merges across a border that use a fragment, by the bytes at the border.
    fragments: HashMap<(u8, u8), Vec<FragmentMerge>, FxBuildHasher>,
}

struct FragmentMerge {
    rank: u32,
    left: Box<[u8]>,
    right: Box<[u8]>,
}

impl Characters {
    /// Of `merges`, the bytes of both parts in the order of rank, and a way to merge bytes alone.
    pub(super) fn new<'m>(
        merges: impl Iterator<Item = (&'m [u8], &'m [u8])>,
        mut merge: impl FnMut(&[u8]) -> Vec<u32>,
    ) -> Self {
        let mut none = Self { tokens: Vec::new(), fragments: HashMap::default() };
        let mut made: HashMap<Vec<u8>, u32, FxBuildHasher> = HashMap::default();
        let mut fragments: HashMap<_, Vec<_>, _> = HashMap::default();
        for (rank, (left, right)) in (0u32..).zip(merges) {
            if [left, right].into_iter().any(|part| made.get(part).is_some_and(|&earlier| earlier >= rank)) {
                return none;
            }
            // a merge that makes its token again later would rank above merges that use it
            made.insert([left, right].concat(), rank);
            let (Some(&last), Some(&first)) = (left.last(), right.first()) else { return none };
            let at_border = first & 0xC0 != 0x80;
            if at_border && (is_tail(left) || right.len() < char_length(first)) {
                let merge = FragmentMerge { rank, left: left.into(), right: right.into() };
                fragments.entry((last, first)).or_insert_with(Vec::new).push(merge);
            }
        }
        none.tokens = (0..0x1_0000u32)
            .map(|code| {
                let mut bytes = [0; 4];
                let character = char::from_u32(code).filter(|character| !character.is_ascii());
                let Some(character) = character else { return (NO_TOKEN, 0) };
                let bytes = character.encode_utf8(&mut bytes).as_bytes();
                match (merge(bytes).as_slice(), made.get(bytes)) {
                    (&[id], Some(&rank)) => (id, rank),
                    _ => (NO_TOKEN, 0),
                }
            })
            .collect();
        Self { tokens: none.tokens, fragments }
    }

    /// Puts the symbols of `word` into `symbols`: tokens of characters, and bytes of the others.
    /// False where the word has to be merged from its bytes.
    pub(super) fn symbols(&self, word: &[u8], bytes: &[u32; 256], symbols: &mut Vec<u32>) -> bool {
        if self.tokens.is_empty() || word.is_ascii() {
            return false;
        }
        let Ok(text) = std::str::from_utf8(word) else { return false };
        let mut at = 0;
        let mut previous: (&[u8], u32) = (&[], 0);
        for character in text.chars() {
            let length = character.len_utf8();
            let current = &word[at..at + length];
            let known = self.tokens.get(character as usize).filter(|(id, _)| *id != NO_TOKEN);
            let rank = known.map_or(0, |&(_, rank)| rank);
            if self.may_interfere(previous, (current, rank)) {
                symbols.clear();
                return false;
            }
            match known {
                Some(&(id, _)) => symbols.push(id),
                None => symbols.extend(current.iter().map(|&byte| bytes[usize::from(byte)])),
            }
            previous = (current, rank);
            at += length;
        }
        true
    }

    /// Whether a merge across the border could run before the characters beside it are whole.
    fn may_interfere(&self, left: (&[u8], u32), right: (&[u8], u32)) -> bool {
        let highest = left.1.max(right.1);
        let (Some(&last), Some(&first)) = (left.0.last(), right.0.first()) else { return false };
        if highest == 0 {
            return false;
        }
        self.fragments.get(&(last, first)).is_some_and(|merges| {
            merges.iter().any(|merge| {
                merge.rank <= highest
                    && (left.0.ends_with(&merge.left) || merge.left.ends_with(left.0))
                    && (right.0.starts_with(&merge.right) || merge.right.starts_with(right.0))
            })
        })
    }
}

/// Whether `bytes` are the end of one character, without its beginning.
fn is_tail(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| byte & 0xC0 == 0x80)
}
