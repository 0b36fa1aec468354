//! Characters of a `SentencePiece` byte-pair encoding, and where its text may be cut.

use std::collections::{HashMap, HashSet};

use rustc_hash::FxBuildHasher;

/// What `SentencePiece` writes for a space.
pub(super) const SPACE_MARK: char = '▁';

/// The first symbols of text, over text whose spaces were not replaced.
pub(super) struct SentencePiece {
    /// A space is put before each piece of text.
    pub(super) prepends: bool,
    pub(super) characters: HashMap<char, u32, FxBuildHasher>,
    /// The tokens of the bytes of other characters.
    pub(super) bytes: [u32; 256],
    pub(super) joins: Joins,
}

/// The pairs of neighbours that some merge joins.
pub(super) struct Joins {
    ascii: [u128; 128],
    others: HashSet<(char, char), FxBuildHasher>,
}

impl Joins {
    /// `pairs` are the last character of the left part and the first of the right, of each merge.
    pub(super) fn new(pairs: impl Iterator<Item = (char, char)>) -> Self {
        let mut joins = Self { ascii: [0; 128], others: HashSet::default() };
        for (left, right) in pairs {
            if left.is_ascii() && right.is_ascii() {
                joins.ascii[left as usize] |= 1 << (right as u32);
            } else {
                joins.others.insert((left, right));
            }
        }
        joins
    }

    fn holds(&self, left: char, right: char) -> bool {
        if left.is_ascii() && right.is_ascii() {
            return self.ascii[left as usize] >> (right as u32) & 1 == 1;
        }
        self.others.contains(&(left, right))
    }
}

impl SentencePiece {
    /// The tokens that merging begins with.
    pub(super) fn symbols(&self, text: &str) -> impl Iterator<Item = u32> {
        text.chars().flat_map(|character| {
            let known = self.characters.get(&character).copied();
            let mut bytes = [0; 4];
            let length = if known.is_some() { 0 } else { character.encode_utf8(&mut bytes).len() };
            known.into_iter().chain(bytes.into_iter().take(length).map(|byte| self.bytes[usize::from(byte)]))
        })
    }

    /// Calls `each` with the words of `text[start..]`.
    pub(super) fn cut(&self, text: &str, start: usize, each: &mut impl FnMut(usize, usize)) {
        let bytes = text.as_bytes();
        let mut word = start;
        let mut at = start;
        let mut previous = '\0';
        while at < bytes.len() {
            let byte = bytes[at];
            let character =
                if byte < 0x80 { char::from(byte) } else { text[at..].chars().next().unwrap_or_default() };
            if at > word && !self.joins.holds(previous, character) {
                each(word, at);
                word = at;
            }
            previous = character;
            at += character.len_utf8();
        }
        if word < bytes.len() {
            each(word, bytes.len());
        }
    }
}
