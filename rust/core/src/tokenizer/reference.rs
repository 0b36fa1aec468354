//! The engine that defines the ids.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use tokenizers::Tokenizer;

use super::added::AddedTokens;
use super::file::AddedToken;
use super::scores::set_scores;
use super::{TokenizerEngine, Tokens};
use crate::{Error, ErrorKind, Result};

/// Hugging Face's `tokenizers`.
pub struct ReferenceTokenizer {
    tokenizer: Tokenizer,
    /// The same, but blind to control tokens; made when first asked for.
    blind: OnceLock<std::result::Result<(Tokenizer, AddedTokens), String>>,
}

impl ReferenceTokenizer {
    /// Reads the bytes of a `tokenizer.json`. Truncation and padding stored in the file are switched
    /// off: they belong to the data path, and a file that pads to 128 would silently change every
    /// row. So is `trim_offsets`, which leaves white space out of spans (the ids are the same).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            Error::new(
                ErrorKind::Tokenizer,
                format!(
                    "not a tokenizer.json that can be read ({error}); download the file again, or save the \
                     tokenizer again with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
                ),
            )
        };
        let mut json: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| wrong(&error))?;
        let trimmed = json.get_mut("post_processor").is_some_and(keep_white_space);
        let scored = set_scores(&mut json, bytes);
        let tokenizer = if trimmed || scored {
            serde_json::from_value(json).map_err(|error| wrong(&error))
        } else {
            Tokenizer::from_bytes(bytes).map_err(|error| wrong(&error))
        };
        let mut tokenizer: Tokenizer = tokenizer?;
        tokenizer.with_truncation(None).map_err(|error| wrong(&error))?;
        tokenizer.with_padding(None);
        Ok(Self { tokenizer, blind: OnceLock::new() })
    }

    fn encode_with(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Tokens> {
        let encoding = tokenizer.encode(text, add_special_tokens).map_err(|error| {
            Error::new(ErrorKind::Tokenizer, format!("the tokenizer refused a text: {error}"))
        })?;
        // offsets fit: a row is bounded well below 4 GiB (`source::MAX_ROW_BYTES`)
        #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
        let spans = encoding.get_offsets().iter().map(|&(start, end)| (start as u32, end as u32)).collect();
        Ok(Tokens { ids: encoding.get_ids().to_vec(), spans })
    }

    fn blinded(&self) -> std::result::Result<(Tokenizer, AddedTokens), String> {
        let mut tokenizer = self.tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        let mut tokens = Vec::new();
        let decoder: BTreeMap<_, _> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        for (id, token) in decoder {
            if token.special && token.normalized {
                return Err(format!(
                    "its control token {:?} is looked for in normalized text, which the reference engine \
                     cannot switch off for content alone",
                    token.content
                ));
            }
            if !token.normalized {
                tokens.push(AddedToken {
                    id,
                    content: token.content.clone(),
                    single_word: token.single_word,
                    lstrip: token.lstrip,
                    rstrip: token.rstrip,
                    normalized: false,
                    special: token.special,
                });
            }
        }
        Ok((tokenizer, AddedTokens::new(tokens, |token| token.content.clone())?))
    }
}

/// Sets `trim_offsets` to false in a post-processor; whether that changed anything.
fn keep_white_space(value: &mut serde_json::Value) -> bool {
    match value {
        serde_json::Value::Object(object) => {
            let trimmed = object.get("trim_offsets").is_some_and(|on| on == true);
            if trimmed {
                object.insert("trim_offsets".to_owned(), false.into());
            }
            object.values_mut().fold(trimmed, |changed, inner| keep_white_space(inner) | changed)
        }
        serde_json::Value::Array(list) => {
            list.iter_mut().fold(false, |changed, inner| keep_white_space(inner) | changed)
        }
        _ => false,
    }
}

impl TokenizerEngine for ReferenceTokenizer {
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens> {
        Self::encode_with(&self.tokenizer, text, add_special_tokens)
    }

    fn encode_plain(&self, text: &str, plain: &[(usize, usize)]) -> Result<Tokens> {
        let (blind, added) = self.blind.get_or_init(|| self.blinded()).as_ref().map_err(|reason| {
            Error::new(
                ErrorKind::Config,
                format!("control_tokens_in_content text cannot be had with this tokenizer: {reason}"),
            )
        })?;
        let mut tokens = Tokens::default();
        let mut failed = None;
        added.split(text, (0, text.len()), plain, &mut |(id, start, end)| match id {
            Some(id) => tokens.push(id, start, end),
            None => match Self::encode_with(blind, &text[start..end], false) {
                Ok(piece) => {
                    #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
                    let shift = start as u32;
                    tokens.ids.extend(piece.ids);
                    tokens.spans.extend(piece.spans.iter().map(|&(from, to)| (from + shift, to + shift)));
                }
                Err(error) => failed = failed.take().or(Some(error)),
            },
        });
        failed.map_or(Ok(tokens), Err)
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|error| Error::new(ErrorKind::Tokenizer, format!("cannot decode: {error}")))
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    fn special_tokens(&self) -> Vec<(u32, String)> {
        let mut tokens: Vec<_> = self
            .tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();
        tokens.sort_unstable();
        tokens
    }
}
