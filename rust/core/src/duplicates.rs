//! Rows that say nearly the same.
//!
//! A text comes in and a [`Sketch`] goes out: the band keys of its `MinHash` signature over shingles. Texts
//! whose shingle sets have a Jaccard similarity of 0.8 share a band in 99 of 100 cases, texts at 0.3 in
//! one. [`SketchIndex`] finds the rows that share one; [`Sketcher::similarity`] then says exactly how near
//! they are. All of it is a pure function of the texts, whatever the machine or the number of threads.

use minhash_rs::prelude::{Fnv, MinHash, MinHasher};
use rustc_hash::{FxHashMap, FxHashSet};
use xxhash_rust::xxh3::xxh3_64;

/// Words of a shingle.
const SHINGLE: usize = 5;
/// Bands of a signature, and minima of a band.
const BANDS: usize = 16;
const MINIMA: usize = 6;
const PERMUTATIONS: usize = BANDS * MINIMA;
/// Rows that are remembered for one band key, besides the first.
const LATER_ROWS: usize = 3;

/// The sketch of one text: the band keys of its `MinHash` signature, 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sketch([u32; BANDS]);

/// Makes sketches, and compares texts exactly.
///
/// A shingle is five words on end, in lower case. A word is a run of letters and digits; every other mark,
/// and every character of a script that puts no spaces between words, is a word of its own. A text of fewer
/// than five words is one shingle, so that short texts are near only where they are equal but for case and
/// white space.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sketcher(());

impl Sketcher {
    /// The one way to make sketches.
    pub fn new() -> Self {
        Self(())
    }

    /// The sketch of `text`, in time linear in its length.
    pub fn sketch(&self, text: &str) -> Sketch {
        // the digests are 32 bits wide, which SIMD takes twice as many of; a chance hit is one in four billion
        let signature: MinHash<u32, PERMUTATIONS, Fnv, u32, u64> = Shingles::new(text).collect();
        // FNV mixes into the low bits first, so both halves are needed
        Sketch(signature.band_hashes::<BANDS>().map(|key| {
            #[expect(clippy::cast_possible_truncation, reason = "the key is folded into 32 bits")]
            let key = (key ^ (key >> 32)) as u32;
            key
        }))
    }

    /// The Jaccard similarity of the shingle sets of two texts: 0 with none in common, 1 for equal sets.
    pub fn similarity(&self, a: &str, b: &str) -> f64 {
        let a: FxHashSet<u64> = Shingles::new(a).collect();
        let b: FxHashSet<u64> = Shingles::new(b).collect();
        if a.is_empty() && b.is_empty() {
            return 1.0;
        }
        let common = a.intersection(&b).count();
        #[expect(clippy::cast_precision_loss, reason = "a text has far fewer than 2^52 shingles")]
        let similarity = common as f64 / (a.len() + b.len() - common) as f64;
        similarity
    }
}

/// Finds, for sketches added in order, the earlier rows that share a band.
///
/// Takes 16 to 32 bytes a row for each of its 16 bands, 256 to 512 bytes a row in all, however many rows are
/// alike.
#[derive(Debug, Default)]
pub struct SketchIndex {
    /// For each band, the first row with a key.
    first: [FxHashMap<u32, u32>; BANDS],
    /// The next few rows with a key that more than one has, by band and key.
    later: FxHashMap<(usize, u32), Vec<u32>>,
}

impl SketchIndex {
    /// An index without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// The rows that share a band with `sketch`, each once and in rising order; at most 64, since a band key
    /// remembers the first four rows that have it.
    pub fn candidates(&self, sketch: &Sketch) -> Vec<u32> {
        let mut rows = Vec::new();
        for (band, (first, key)) in self.first.iter().zip(sketch.0).enumerate() {
            let Some(&row) = first.get(&key) else { continue };
            rows.push(row);
            rows.extend(self.later.get(&(band, key)).into_iter().flatten());
        }
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// Adds `row`, whose sketch is `sketch`.
    pub fn insert(&mut self, row: u32, sketch: &Sketch) {
        for (band, (first, key)) in self.first.iter_mut().zip(sketch.0).enumerate() {
            if *first.entry(key).or_insert(row) == row {
                continue;
            }
            let later = self.later.entry((band, key)).or_default();
            if later.len() < LATER_ROWS {
                later.push(row);
            }
        }
    }
}

/// The hashes of the shingles of a text.
struct Shingles<'t> {
    words: Words<'t>,
    /// The hashes of the last words; the oldest is overwritten.
    window: [u64; SHINGLE],
    num_words: usize,
    is_done: bool,
}

impl<'t> Shingles<'t> {
    fn new(text: &'t str) -> Self {
        Self { words: Words::new(text), window: [0; SHINGLE], num_words: 0, is_done: false }
    }

    /// The hash of the window, in which the oldest word comes first.
    fn hash(&self) -> u64 {
        let mut bytes = [0; SHINGLE * 8];
        let start = self.num_words % SHINGLE;
        let words = self.window.iter().cycle().skip(start).take(SHINGLE);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        xxh3_64(&bytes)
    }
}

impl Iterator for Shingles<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.is_done {
            return None;
        }
        for word in self.words.by_ref() {
            if let Some(place) = self.window.get_mut(self.num_words % SHINGLE) {
                *place = word;
            }
            self.num_words += 1;
            if self.num_words >= SHINGLE {
                return Some(self.hash());
            }
        }
        self.is_done = true;
        (1..SHINGLE).contains(&self.num_words).then(|| self.hash())
    }
}

/// The hashes of the words of a text, in lower case.
struct Words<'t> {
    rest: &'t str,
    lowered: String,
}

impl<'t> Words<'t> {
    fn new(text: &'t str) -> Self {
        Self { rest: text, lowered: String::new() }
    }
}

impl Iterator for Words<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.rest = self.rest.trim_start();
        let first = self.rest.chars().next()?;
        let end = if joins(first) {
            self.rest.find(|letter| !joins(letter)).unwrap_or(self.rest.len())
        } else {
            first.len_utf8()
        };
        let (word, rest) = self.rest.split_at_checked(end)?;
        self.rest = rest;
        if word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
            return Some(xxh3_64(word.as_bytes()));
        }
        self.lowered.clear();
        self.lowered.extend(word.chars().flat_map(char::to_lowercase));
        Some(xxh3_64(self.lowered.as_bytes()))
    }
}

/// Whether `letter` makes a word with its neighbours.
fn joins(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || (!letter.is_ascii() && letter.is_alphanumeric() && !is_unspaced(letter))
}

/// Whether `letter` is of a script that puts no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, and
/// the Chinese and Japanese blocks.
fn is_unspaced(letter: char) -> bool {
    matches!(
        u32::from(letter),
        0x0E00..=0x0FFF
            | 0x1000..=0x109F
            | 0x1780..=0x17FF
            | 0x2E80..=0x312F
            | 0x3190..=0x4DBF
            | 0x4E00..=0x9FFF
            | 0xF900..=0xFAFF
            | 0xFF66..=0xFF9F
            | 0x20000..=0x3FFFF
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Shingles, Sketch, SketchIndex, Sketcher};

    /// A text of `num_words` words that no other seed has.
    fn text(seed: u64, num_words: u64) -> String {
        let word =
            |at: u64| format!("w{}", xxhash_rust::xxh3::xxh3_64_with_seed(&at.to_le_bytes(), seed) % 9973);
        (0..num_words).map(word).collect::<Vec<_>>().join(" ")
    }

    /// The text with the words at some places replaced.
    fn edited(text: &str, places: &[usize]) -> String {
        let mut words: Vec<_> = text.split(' ').collect();
        for &place in places {
            words[place] = "edited";
        }
        words.join(" ")
    }

    fn shares_a_band(a: &Sketch, b: &Sketch) -> bool {
        let mut index = SketchIndex::new();
        index.insert(7, a);
        index.candidates(b) == [7]
    }

    #[test]
    fn a_word_changed_in_a_long_text_is_found() {
        let sketcher = Sketcher::new();
        let found = (0..500).filter(|&seed| {
            let original = text(seed, 200);
            let other = edited(&original, &[usize::try_from(seed).unwrap() % 200]);
            assert!(sketcher.similarity(&original, &other) >= 0.9);
            shares_a_band(&sketcher.sketch(&original), &sketcher.sketch(&other))
        });
        assert_eq!(found.count(), 500);
    }

    #[test]
    fn texts_at_the_threshold_are_found_in_98_of_100_cases() {
        let sketcher = Sketcher::new();
        let found = (0..500).filter(|&seed| {
            let original = text(seed, 184);
            let other = edited(&original, &[20, 60, 100, 140]);
            let similarity = sketcher.similarity(&original, &other);
            assert!((0.8..0.81).contains(&similarity), "{similarity}");
            shares_a_band(&sketcher.sketch(&original), &sketcher.sketch(&other))
        });
        let found = found.count();
        assert!(found >= 490, "{found} of 500");
    }

    #[test]
    fn unrelated_texts_are_not_found() {
        let sketcher = Sketcher::new();
        let mut index = SketchIndex::new();
        let found = (0..2000).map(|row| {
            let sketch = sketcher.sketch(&text(u64::from(row), 100));
            let candidates = index.candidates(&sketch).len();
            index.insert(row, &sketch);
            candidates
        });
        assert_eq!(found.sum::<usize>(), 0);
        assert!(sketcher.similarity(&text(1, 100), &text(2, 100)) < 0.01);
    }

    #[test]
    fn texts_with_little_in_common_rarely_share_a_band() {
        let sketcher = Sketcher::new();
        let shared = text(9_999, 60);
        let found = (0..500).filter(|&seed| {
            let pair = [2 * seed, 2 * seed + 1].map(|seed| format!("{shared} {}", text(seed, 70)));
            let similarity = sketcher.similarity(&pair[0], &pair[1]);
            assert!((0.25..0.3).contains(&similarity), "{similarity}");
            shares_a_band(&sketcher.sketch(&pair[0]), &sketcher.sketch(&pair[1]))
        });
        let found = found.count();
        assert!(found <= 15, "{found} of 500");
    }

    #[test]
    fn chinese_is_compared_by_characters() {
        let sketcher = Sketcher::new();
        let original = "保持健康有三个秘诀。第一，均衡饮食，多吃水果和蔬菜，少吃油炸和含糖的食物。第二，坚持锻炼，每周至少\
                        进行三次中等强度的运动，例如快走、游泳或者骑自行车。第三，保证充足的睡眠，每天晚上按时休息，睡前不要长时间\
                        看手机，让身体和大脑都得到充分的放松与恢复。";
        let other = original.replace("游泳", "跑步");
        assert_eq!(Shingles::new("第一，均衡").count(), 1);
        assert!(sketcher.similarity(original, &other) >= 0.8);
        assert!(shares_a_band(&sketcher.sketch(original), &sketcher.sketch(&other)));
        let unrelated = "请解释细胞理论和日心说这两个科学理论，并且说明它们各自的历史意义。";
        assert!(sketcher.similarity(original, unrelated) < 0.01);
        assert!(!shares_a_band(&sketcher.sketch(original), &sketcher.sketch(unrelated)));
    }

    #[test]
    fn short_and_empty_texts_are_near_only_where_equal() {
        let sketcher = Sketcher::new();
        let texts = [
            "",
            "a",
            "b",
            "3 + 4",
            "3 - 4",
            "你好",
            "您好",
            "one two three four five",
            "one two three four six",
        ];
        for (at, a) in texts.iter().enumerate() {
            for (other, b) in texts.iter().enumerate() {
                let similarity = sketcher.similarity(a, b);
                assert!(similarity.total_cmp(&f64::from(u8::from(at == other))).is_eq(), "{a:?} {b:?}");
                assert_eq!(
                    shares_a_band(&sketcher.sketch(a), &sketcher.sketch(b)),
                    at == other,
                    "{a:?} {b:?}"
                );
            }
        }
        assert!((sketcher.similarity(" Hello,\n world ", "hello, WORLD") - 1.0).abs() < f64::EPSILON);
        assert_eq!(sketcher.sketch(" \n"), sketcher.sketch(""));
    }

    #[test]
    fn a_sketch_never_changes_between_versions_and_machines() {
        let sketch = Sketcher::new().sketch("The quick brown fox jumps over the lazy dog. 你好，世界！");
        assert_eq!(sketch.0[..4], [3_394_172_664, 1_622_666_154, 3_538_753_583, 1_085_317_668]);
        assert_eq!(size_of::<Sketch>(), 64);
    }

    #[test]
    fn equal_rows_have_few_candidates() {
        let sketch = Sketcher::new().sketch(&text(1, 50));
        let mut index = SketchIndex::new();
        for row in 0..1_000_000 {
            let candidates = index.candidates(&sketch);
            assert!(candidates.len() <= 4);
            assert_eq!(candidates.first(), (row > 0).then_some(&0));
            index.insert(row, &sketch);
        }
        // what is kept for them is bounded as well
        assert!(index.later.values().all(|rows| rows.len() <= 3));
    }

    proptest! {
        #[test]
        fn similarity_is_a_similarity(a in "\\PC{0,60}", b in "\\PC{0,60}") {
            let sketcher = Sketcher::new();
            let similarity = sketcher.similarity(&a, &b);
            prop_assert!((0.0..=1.0).contains(&similarity));
            prop_assert!(similarity.total_cmp(&sketcher.similarity(&b, &a)).is_eq());
            prop_assert!((sketcher.similarity(&a, &a) - 1.0).abs() < f64::EPSILON);
            prop_assert!(shares_a_band(&sketcher.sketch(&a), &sketcher.sketch(&a)));
        }
    }
}
