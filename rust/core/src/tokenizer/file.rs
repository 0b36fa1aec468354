//! The parts of a `tokenizer.json` that the fast engine reads.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

/// A `tokenizer.json` of kind BPE.
#[derive(Deserialize)]
pub(super) struct TokenizerFile {
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
    pub(super) normalizer: Option<Value>,
    pub(super) pre_tokenizer: Option<Value>,
    pub(super) model: Model,
}

/// An entry of `added_tokens`.
#[derive(Debug, Clone, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the layout of the file")]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    pub(super) single_word: bool,
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    pub(super) normalized: bool,
    pub(super) special: bool,
}

/// The `model` of the file.
#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) dropout: Option<f32>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) ignore_merges: bool,
    pub(super) vocab: Vocabulary,
    #[serde(default)]
    pub(super) merges: Vec<MergePair>,
}

/// Token → id; the list of a Unigram model is skipped.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Vocabulary {
    Map(std::collections::HashMap<String, u32, rustc_hash::FxBuildHasher>),
    Other(IgnoredAny),
}

/// A merge, as a pair or as the two parts with a space between.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum MergePair {
    Pair(String, String),
    Joined(String),
}

impl MergePair {
    pub(super) fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Joined(text) => text.split_once(' '),
        }
    }
}
