//! Text to token ids, with the byte span of each token.
//!
//! [`TokenizerEngine`] is the seam. [`ReferenceTokenizer`] is Hugging Face's `tokenizers` crate on the
//! very `tokenizer.json` that is saved with the model, and defines what the right ids are.
//! The `fast` engine gives the same ids for byte-pair encodings, many times faster; [`open`] uses it
//! after it has agreed with the reference on a [probe] of that tokenizer.

mod added;
mod bpe;
mod build;
mod cache;
mod characters;
mod fast;
mod file;
pub mod probe;
mod reference;
mod scores;
mod sentencepiece;
mod split;

use std::str::FromStr;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

use build::Parts;
use fast::FastTokenizer;
pub use reference::ReferenceTokenizer;

/// The tokens of one text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the bytes `start..end` of the text that it stands for. A token of part of a
    /// character carries the span of those bytes or of the whole character, as the engine has it.
    pub spans: Vec<(u32, u32)>,
}

impl Tokens {
    /// The spans, made longer so that each of the `length` bytes of the text is in one: what a normalizer or the white
    /// space between words leaves to no token belongs to the one before it, at the start to the first.
    pub fn covering_spans(&self, length: usize) -> Vec<(usize, usize)> {
        let mut spans: Vec<(usize, usize)> =
            self.spans.iter().map(|&(start, end)| (start as usize, end as usize)).collect();
        let mut covered = 0;
        let mut last: Option<usize> = None;
        for number in 0..spans.len() {
            let (start, end) = spans[number];
            if start == end {
                // added by the tokenizer, it stands for nothing
                continue;
            }
            if start > covered {
                match last {
                    Some(last) => spans[last].1 = start,
                    None => spans[number].0 = covered,
                }
            }
            if end >= covered {
                covered = end;
                last = Some(number);
            }
        }
        if let Some(last) = last.filter(|_| covered < length) {
            spans[last].1 = length;
        }
        spans
    }
}

impl Tokens {
    #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
    fn push(&mut self, id: u32, start: usize, end: usize) {
        self.ids.push(id);
        self.spans.push((start as u32, end as u32));
    }
}

/// Something that turns text into [`Tokens`].
pub trait TokenizerEngine: Send + Sync {
    /// Encodes `text`. Control tokens in it are parsed; none are added unless `add_special_tokens`.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens>;
    /// Encodes `text`, where a control token that begins inside one of the `plain` byte ranges (in
    /// order, not touching each other) is text like any other.
    fn encode_plain(&self, text: &str, plain: &[(usize, usize)]) -> Result<Tokens>;
    /// Text of `ids`.
    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String>;
    /// The id of a token given by its text.
    fn token_to_id(&self, token: &str) -> Option<u32>;
    /// The text of a token as the vocabulary writes it.
    fn id_to_token(&self, id: u32) -> Option<String>;
    /// Number of ids, added tokens included.
    fn vocab_size(&self) -> usize;
    /// Ids and texts of the control tokens (added tokens marked `special`), by id.
    fn special_tokens(&self) -> Vec<(u32, String)>;
}

/// Which engine a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The fast one where it agrees with the reference, else the reference.
    #[default]
    Auto,
    /// Hugging Face's `tokenizers`.
    Reference,
    /// The fast one, or an error.
    Fast,
}

impl FromStr for EngineChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "reference" => Ok(Self::Reference),
            "fast" => Ok(Self::Fast),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("tokenizer_engine \"{name}\" is unknown; expected auto, reference or fast"),
            )),
        }
    }
}

/// An engine, and which one it is.
pub struct Opened {
    /// Encodes.
    pub engine: Arc<dyn TokenizerEngine>,
    /// Whether it is the fast one.
    pub is_fast: bool,
    /// Why the fast one does not run, where it was asked for.
    pub reason: Option<String>,
}

/// Makes the engine of the `tokenizer.json` whose bytes are `bytes`.
pub fn open(bytes: &[u8], choice: EngineChoice) -> Result<Opened> {
    let reference = ReferenceTokenizer::from_bytes(bytes)?;
    if choice == EngineChoice::Reference {
        return Ok(Opened { engine: Arc::new(reference), is_fast: false, reason: None });
    }
    let (reference, reason) = match Parts::read(bytes) {
        Ok(parts) => {
            let fast = FastTokenizer::new(parts, reference);
            match probe::disagreement(&fast, fast.reference()) {
                None => return Ok(Opened { engine: Arc::new(fast), is_fast: true, reason: None }),
                Some(reason) => (fast.into_reference(), reason),
            }
        }
        Err(reason) => (reference, reason),
    };
    if choice == EngineChoice::Fast {
        return Err(Error::new(
            ErrorKind::Tokenizer,
            format!("the fast engine cannot run this tokenizer: {reason}; choose --tokenizer_engine auto"),
        ));
    }
    Ok(Opened { engine: Arc::new(reference), is_fast: false, reason: Some(reason) })
}

#[cfg(test)]
mod tests {
    use super::Tokens;

    #[test]
    fn covering_spans_leave_no_byte_out() {
        let covering = |spans: &[(u32, u32)], length| {
            Tokens { ids: vec![0; spans.len()], spans: spans.to_vec() }.covering_spans(length)
        };
        assert_eq!(covering(&[(0, 2), (2, 5)], 5), [(0, 2), (2, 5)]);
        assert_eq!(covering(&[(1, 2), (4, 5)], 7), [(0, 4), (4, 7)]);
        assert_eq!(
            covering(&[(0, 0), (1, 3), (1, 3), (5, 6), (6, 6)], 6),
            [(0, 0), (0, 3), (1, 5), (5, 6), (6, 6)]
        );
        assert_eq!(covering(&[], 4), []);
    }
}
