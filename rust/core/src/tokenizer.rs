//! Text to token ids, with the byte span of each token.
//!
//! [`TokenizerEngine`] is the seam; [`ReferenceTokenizer`] is Hugging Face's `tokenizers` crate on the
//! very `tokenizer.json` that is saved with the model, and defines what the right ids are.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{Error, ErrorKind, Result};

/// The tokens of one text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the bytes `start..end` of the text that it stands for. The tokens of a
    /// character that was split carry the span of the whole character.
    pub spans: Vec<(u32, u32)>,
}

/// Something that turns text into [`Tokens`].
pub trait TokenizerEngine: Send + Sync {
    /// Encodes `text`. Control tokens in it are parsed; none are added unless `add_special_tokens`.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens>;
    /// Text of `ids`.
    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String>;
    /// The id of a token given by its text.
    fn token_to_id(&self, token: &str) -> Option<u32>;
    /// Number of ids, added tokens included.
    fn vocab_size(&self) -> usize;
    /// Texts of the control tokens (added tokens marked `special`).
    fn special_tokens(&self) -> Vec<String>;
}

/// Hugging Face's `tokenizers`.
pub struct ReferenceTokenizer {
    tokenizer: Tokenizer,
}

impl ReferenceTokenizer {
    /// Reads a `tokenizer.json`. Truncation and padding stored in the file are switched off: they
    /// belong to the data path, and a file that pads to 128 would silently change every row.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
        Self::from_bytes(&bytes).map_err(|error| error.in_file(path))
    }

    /// The same, from the bytes of the file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            Error::new(
                ErrorKind::Tokenizer,
                format!(
                    "not a tokenizer.json that can be read ({error}); save the tokenizer again with \
                     AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
                ),
            )
        };
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| wrong(&error))?;
        tokenizer.with_truncation(None).map_err(|error| wrong(&error))?;
        tokenizer.with_padding(None);
        Ok(Self { tokenizer })
    }
}

impl TokenizerEngine for ReferenceTokenizer {
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens> {
        let encoding = self.tokenizer.encode(text, add_special_tokens).map_err(|error| {
            Error::new(ErrorKind::Tokenizer, format!("the tokenizer refused a text: {error}"))
        })?;
        // offsets fit: a row is bounded well below 4 GiB (`source::MAX_ROW_BYTES`)
        #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
        let spans = encoding.get_offsets().iter().map(|&(start, end)| (start as u32, end as u32)).collect();
        Ok(Tokens { ids: encoding.get_ids().to_vec(), spans })
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|error| Error::new(ErrorKind::Tokenizer, format!("cannot decode: {error}")))
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    fn special_tokens(&self) -> Vec<String> {
        let mut tokens: Vec<_> = self
            .tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .collect();
        tokens.sort_unstable_by_key(|(id, _)| *id);
        tokens.into_iter().map(|(_, token)| token.content).collect()
    }
}
