//! From a `tokenizer.json` to the parts of the fast engine, or the reason why not.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;
use serde_json::Value;

use super::added::AddedTokens;
use super::bpe::{Merges, Workspace};
use super::characters::Characters;
use super::fast::{ByteLevel, Kind, NO_TOKEN, is_nfc};
use super::file::{AddedToken, Model, TokenizerFile, Vocabulary};
use super::sentencepiece::{Joins, SPACE_MARK, SentencePiece};
use super::split::{GPT2, Gap, Stage};

type Map = HashMap<String, u32, FxBuildHasher>;

/// What the fast engine knows of a tokenizer.
pub(super) struct Parts {
    pub(super) added: AddedTokens,
    /// Added tokens that are looked for in normalized text.
    pub(super) added_normalized: AddedTokens,
    pub(super) kind: Kind,
    pub(super) merges: Merges,
    /// Whole words of the vocabulary, where they go before merges.
    pub(super) whole_words: Option<HashMap<Box<[u8]>, u32, FxBuildHasher>>,
    /// Bytes of text that each id of the model stands for.
    pub(super) lengths: Vec<u32>,
}

impl Parts {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let file: TokenizerFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let model = &file.model;
        check_model(model)?;
        let Vocabulary::Map(vocab) = &model.vocab else { return Err("its model is not BPE".to_owned()) };
        let (normalized, plain): (Vec<AddedToken>, Vec<AddedToken>) =
            file.added_tokens.iter().cloned().partition(|token| token.normalized);
        let merges = read_merges(model, vocab)?;
        let added = AddedTokens::new(plain, |token| token.content.clone())?;
        let (kind, added_normalized) = if model.byte_fallback {
            let prepends = sentencepiece_normalizer(file.normalizer.as_ref(), file.pre_tokenizer.as_ref())?;
            if let Some(token) = normalized.iter().find(|token| token.lstrip || token.rstrip) {
                return Err(format!("the added token {:?} is normalized and swallows spaces", token.content));
            }
            let pattern = |token: &AddedToken| {
                let text = token.content.replace(SPACE_MARK, " ");
                if prepends { format!(" {text}") } else { text }
            };
            let added = AddedTokens::new(normalized, pattern)?;
            (Kind::SentencePiece(Box::new(sentencepiece(model, vocab, prepends)?)), added)
        } else {
            let needs_nfc = byte_level_normalizer(file.normalizer.as_ref())?;
            if let Some(token) = normalized.iter().find(|token| needs_nfc && !is_nfc(&token.content)) {
                return Err(format!("the added token {:?} changes when it is normalized", token.content));
            }
            let stages = read_stages(file.pre_tokenizer.as_ref())?;
            let bytes = byte_tokens(vocab);
            let added = AddedTokens::new(normalized, |token| token.content.clone())?;
            let characters = read_characters(model, &merges, &bytes)?;
            (Kind::ByteLevel(Box::new(ByteLevel { stages, bytes, characters, needs_nfc })), added)
        };
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut lengths = vec![0; size];
        let mut whole_words = model.ignore_merges.then(HashMap::default);
        #[expect(clippy::iter_over_hash_type, reason = "each token has a place of its own")]
        for (token, &id) in vocab {
            let text = if model.byte_fallback { Some(spaced(token)) } else { unmapped(token) };
            let length = text.as_ref().map_or(token.len(), Vec::len);
            lengths[id as usize] = u32::try_from(length).map_err(|_| "a token is too long".to_owned())?;
            if let (Some(words), Some(text)) = (&mut whole_words, text) {
                words.insert(text.into(), id);
            }
        }
        Ok(Self { added, added_normalized, kind, merges, whole_words, lengths })
    }
}

fn check_model(model: &Model) -> Result<(), String> {
    let is_bpe = model.kind.as_deref().is_none_or(|kind| kind == "BPE") && !model.merges.is_empty();
    if !is_bpe {
        return Err(format!("its model is {}, not BPE", model.kind.as_deref().unwrap_or("of an old kind")));
    }
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return Err("its merges drop out at random".to_owned());
    }
    if model.ignore_merges && model.byte_fallback {
        return Err("it takes whole texts from its vocabulary before it merges".to_owned());
    }
    for affix in [&model.continuing_subword_prefix, &model.end_of_word_suffix].into_iter().flatten() {
        if !affix.is_empty() {
            return Err(format!("it marks parts of words with {affix:?}"));
        }
    }
    Ok(())
}

fn read_merges(model: &Model, vocab: &Map) -> Result<Merges, String> {
    let find = |token: &str| {
        vocab
            .get(token)
            .copied()
            .ok_or_else(|| format!("the merged token {token:?} is not in the vocabulary"))
    };
    let mut merges = Vec::with_capacity(model.merges.len());
    let mut joined = String::new();
    for merge in &model.merges {
        let (left, right) = merge.parts().ok_or("a merge has no two parts")?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        merges.push((find(left)?, find(right)?, find(&joined)?));
    }
    Ok(Merges::new(&merges))
}

/// Whether text goes through normalization form C; other normalizers are refused.
fn byte_level_normalizer(normalizer: Option<&Value>) -> Result<bool, String> {
    match flatten(normalizer, "normalizers").as_slice() {
        [] => Ok(false),
        [only] if kind_of(only) == "NFC" => Ok(true),
        [first, ..] => Err(format!("its normalizer is {}", kind_of(first))),
    }
}

/// Whether a space is put before text; other normalizers are refused.
fn sentencepiece_normalizer(
    normalizer: Option<&Value>,
    pre_tokenizer: Option<&Value>,
) -> Result<bool, String> {
    let is_replace = |value: &Value| {
        kind_of(value) == "Replace" && value["pattern"]["String"] == " " && value["content"] == "▁"
    };
    let is_prepend = |value: &Value| kind_of(value) == "Prepend" && value["prepend"] == "▁";
    let prepends = match flatten(normalizer, "normalizers").as_slice() {
        [replace] if is_replace(replace) => false,
        [prepend, replace] if is_prepend(prepend) && is_replace(replace) => true,
        [] => return Err("it has no normalizer that replaces spaces".to_owned()),
        [first, ..] => return Err(format!("its normalizer begins with {}", kind_of(first))),
    };
    match flatten(pre_tokenizer, "pretokenizers").as_slice() {
        [] => Ok(prepends),
        // after the normalizer there is no space left to cut at
        [split] if kind_of(split) == "Split" && split["pattern"]["String"] == " " => Ok(prepends),
        [first, ..] => Err(format!("its pre-tokenizer is {}", kind_of(first))),
    }
}

fn read_stages(pre_tokenizer: Option<&Value>) -> Result<Vec<Stage>, String> {
    let stages = flatten(pre_tokenizer, "pretokenizers");
    let Some((last, earlier)) = stages.split_last() else {
        return Err("it has no pre-tokenizer".to_owned());
    };
    if kind_of(last) != "ByteLevel" {
        return Err(format!("its pre-tokenizer ends in {}, not ByteLevel", kind_of(last)));
    }
    if last["add_prefix_space"] != false {
        return Err("it puts a space before each piece of text".to_owned());
    }
    let mut stages = earlier.iter().map(|stage| read_stage(stage)).collect::<Result<Vec<_>, _>>()?;
    if last.get("use_regex").is_none_or(|on| on == true) {
        stages.push(Stage::regex(GPT2, Gap::Keep)?);
    }
    Ok(stages)
}

fn read_stage(stage: &Value) -> Result<Stage, String> {
    match kind_of(stage) {
        "Digits" => Ok(Stage::Digits { individual: stage["individual_digits"] == true }),
        "Split" => {
            let gap = match (stage["behavior"].as_str(), &stage["invert"]) {
                (Some("Isolated"), _) => Gap::Keep,
                (Some("Removed"), Value::Bool(true)) => Gap::Drop,
                (behavior, _) => {
                    return Err(format!("it splits with {}", behavior.unwrap_or("no behaviour")));
                }
            };
            let pattern = stage["pattern"]["Regex"].as_str().ok_or("it splits at a literal text")?;
            Stage::regex(pattern, gap)
        }
        kind => Err(format!("its pre-tokenizer has a {kind} stage")),
    }
}

fn kind_of(value: &Value) -> &str {
    value["type"].as_str().unwrap_or("nameless")
}

/// The stages of a sequence, a single one as a list of one.
fn flatten<'v>(value: Option<&'v Value>, key: &str) -> Vec<&'v Value> {
    match value {
        None | Some(Value::Null) => Vec::new(),
        Some(value) if kind_of(value) == "Sequence" => match value[key].as_array() {
            Some(list) => list.iter().flat_map(|inner| flatten(Some(inner), key)).collect(),
            None => Vec::new(),
        },
        Some(value) => vec![value],
    }
}

/// The id of each byte; the vocabulary of a byte-level model names bytes by printable characters. Some
/// have no token for bytes that were not in their training text.
fn byte_tokens(vocab: &Map) -> [u32; 256] {
    let mut bytes = [0; 256];
    for (byte, id) in (0..=u8::MAX).zip(&mut bytes) {
        let known = vocab.get(byte_character(byte).encode_utf8(&mut [0; 4]));
        *id = known.copied().unwrap_or(NO_TOKEN);
    }
    bytes
}

/// The character for a byte: itself where it prints, else one above U+0100, in order.
/// Source: `bytes_to_unicode` of GPT-2.
fn byte_character(byte: u8) -> char {
    let shifted = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0..=0x20 => u32::from(byte),
        0x7F..=0xA0 => 0x21 + u32::from(byte) - 0x7F,
        0xAD => 0x43,
    };
    char::from_u32(0x100 + shifted).unwrap_or_default()
}

fn read_characters(model: &Model, merges: &Merges, bytes: &[u32; 256]) -> Result<Characters, String> {
    let mut pairs = Vec::with_capacity(model.merges.len());
    for merge in &model.merges {
        let (left, right) = merge.parts().ok_or("a merge has no two parts")?;
        let (Some(left), Some(right)) = (unmapped(left), unmapped(right)) else {
            return Err(format!("it merges {left:?} and {right:?}, which are not bytes"));
        };
        pairs.push((left, right));
    }
    let mut workspace = Workspace::default();
    let pairs = pairs.iter().map(|(left, right)| (left.as_slice(), right.as_slice()));
    Ok(Characters::new(pairs, |word| {
        let mut ids = Vec::new();
        workspace.symbols().extend(word.iter().map(|&byte| bytes[usize::from(byte)]));
        merges.apply(&mut workspace, &mut ids);
        ids
    }))
}

/// The bytes that a token of a byte-level vocabulary stands for; none for one of other characters, such as an
/// added token that the vocabulary lists, which text is never cut into.
fn unmapped(token: &str) -> Option<Vec<u8>> {
    let byte = |character: char| match u32::from(character) {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(u32::from(character)).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    };
    token.chars().map(byte).collect()
}

/// The text that a `SentencePiece` token stands for, before spaces were replaced.
fn spaced(token: &str) -> Vec<u8> {
    match byte_of(token) {
        Some(byte) => vec![byte],
        None => token.replace(SPACE_MARK, " ").into_bytes(),
    }
}

/// The byte of a token `<0xHH>`.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn sentencepiece(model: &Model, vocab: &Map, prepends: bool) -> Result<SentencePiece, String> {
    let mut bytes = [0; 256];
    for (byte, id) in (0..=u8::MAX).zip(&mut bytes) {
        *id = vocab
            .get(&format!("<{byte:#04X}>"))
            .copied()
            .ok_or_else(|| format!("its vocabulary lacks the byte {byte:#04x}"))?;
    }
    let space = |character: char| if character == SPACE_MARK { ' ' } else { character };
    let mut characters = HashMap::default();
    #[expect(clippy::iter_over_hash_type, reason = "each character has a place of its own")]
    for (token, &id) in vocab {
        let mut letters = token.chars();
        if let (Some(only), None) = (letters.next(), letters.next())
            && only != ' '
        {
            characters.insert(space(only), id);
        }
    }
    let mut pairs = Vec::with_capacity(model.merges.len());
    for merge in &model.merges {
        let (left, right) = merge.parts().ok_or("a merge has no two parts")?;
        if let Some(part) = [left, right].into_iter().find(|part| byte_of(part).is_some()) {
            return Err(format!("it merges the byte token {part}"));
        }
        let (last, first) = (left.chars().next_back(), right.chars().next());
        let (Some(last), Some(first)) = (last, first) else {
            return Err("a merge has an empty part".to_owned());
        };
        pairs.push((space(last), space(first)));
    }
    Ok(SentencePiece { prepends, characters, bytes, joins: Joins::new(pairs.into_iter()) })
}
