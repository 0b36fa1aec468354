//! Added tokens: texts that stand for one id wherever they occur, before the model sees the text.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, Input, MatchKind};

use super::file::AddedToken;

/// Finds added tokens in text, as `tokenizers` does: leftmost, longest, with the white space that a
/// token swallows on its sides.
pub(super) struct AddedTokens {
    automaton: Option<AhoCorasick>,
    tokens: Arc<[AddedToken]>,
}

/// A stretch of text: an added token, or text for the model.
pub(super) type Piece = (Option<u32>, usize, usize);

impl AddedTokens {
    /// The matcher of `tokens`, each found by the text that `pattern` gives.
    pub(super) fn new(
        tokens: Vec<AddedToken>,
        pattern: impl Fn(&AddedToken) -> String,
    ) -> Result<Self, String> {
        if let Some(token) = tokens.iter().find(|token| token.single_word) {
            return Err(format!("the added token {:?} matches whole words only", token.content));
        }
        let automaton = if tokens.is_empty() {
            None
        } else {
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(pattern))
                .map_err(|error| format!("the added tokens cannot be compiled: {error}"))?;
            Some(automaton)
        };
        Ok(Self { automaton, tokens: tokens.into() })
    }

    /// Calls `each` with the pieces of `text[from..to]`. A control token that begins inside one of the
    /// `plain` byte ranges (in order) is text.
    pub(super) fn split(
        &self,
        text: &str,
        (from, to): (usize, usize),
        plain: &[(usize, usize)],
        each: &mut impl FnMut(Piece),
    ) {
        let mut done = from;
        let input = || Input::new(text).range(from..to);
        let matches = self.automaton.iter().flat_map(|automaton| automaton.find_iter(input()));
        for found in matches {
            let token = &self.tokens[found.pattern().as_usize()];
            if token.special && is_inside(plain, found.start()) {
                continue;
            }
            let (mut start, mut end) = (found.start(), found.end());
            if token.lstrip {
                start = done + text[done..start].trim_end().len();
            }
            if token.rstrip {
                end = to - text[end..to].trim_start().len();
            }
            if done < start {
                each((None, done, start));
            }
            each((Some(token.id), start, end));
            done = end;
        }
        if done < to {
            each((None, done, to));
        }
    }
}

fn is_inside(ranges: &[(usize, usize)], at: usize) -> bool {
    let next = ranges.partition_point(|&(_, end)| end <= at);
    ranges.get(next).is_some_and(|&(start, _)| start <= at)
}
