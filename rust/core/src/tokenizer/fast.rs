//! The fast engine: byte-pair encodings of the two kinds that language models use.
//!
//! **Byte level** (GPT-2, Llama 3, Qwen, `DeepSeek`, Phi-4): text is cut into words by expressions and
//! each word's bytes are merged. **`SentencePiece`** (Llama 2, Mistral, Gemma): spaces become `▁`, and
//! the characters of the whole text are merged, with bytes for those outside the vocabulary. There the
//! text is cut where no merge can ever join the two characters at the cut, which leaves the ids as
//! they are. In both kinds a word that was merged before is looked up.
//!
//! What a file asks for beyond this is refused when the engine is made (`build`). Text that a
//! normalizer would change goes to the reference.

use std::sync::Mutex;

use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use super::bpe::Workspace;
use super::build::Parts;
use super::cache::{WordCache, pack};
use super::characters::Characters;
use super::sentencepiece::{SPACE_MARK, SentencePiece};
use super::split::{Stage, char_length};
use super::{ReferenceTokenizer, TokenizerEngine, Tokens};
use crate::Result;

/// A byte-pair encoder that gives the ids of [`ReferenceTokenizer`].
pub(super) struct FastTokenizer {
    reference: ReferenceTokenizer,
    parts: Parts,
    /// Ids that are put before and after a text that asks for special tokens.
    wrap: Option<(Vec<u32>, Vec<u32>)>,
    scratches: Mutex<Vec<Scratch>>,
}

/// Stands for a byte without a token.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// How words are found, and what they are made of.
pub(super) enum Kind {
    ByteLevel(Box<ByteLevel>),
    SentencePiece(Box<SentencePiece>),
}

/// Text is cut by `stages`, and each word begins as bytes.
pub(super) struct ByteLevel {
    pub(super) stages: Vec<Stage>,
    pub(super) bytes: [u32; 256],
    pub(super) characters: Characters,
    pub(super) needs_nfc: bool,
}

/// What a thread needs while it encodes one text.
#[derive(Default)]
struct Scratch {
    words: WordCache,
    workspace: Workspace,
    normalized: String,
}

/// The words of one text on their way to tokens.
struct Run<'e> {
    parts: &'e Parts,
    scratch: &'e mut Scratch,
    tokens: Tokens,
    /// A byte was met that the vocabulary has no token for.
    is_lost: bool,
}

impl FastTokenizer {
    /// The engine made of `parts`, beside the reference on the same file.
    pub(super) fn new(parts: Parts, reference: ReferenceTokenizer) -> Self {
        let wrap = find_wrap(&reference);
        Self { reference, parts, wrap, scratches: Mutex::default() }
    }

    /// The engine that defines the ids.
    pub(super) fn reference(&self) -> &ReferenceTokenizer {
        &self.reference
    }

    /// Gives up the engine for the reference in it.
    pub(super) fn into_reference(self) -> ReferenceTokenizer {
        self.reference
    }

    /// Whether this engine reads `text`; else the reference does.
    fn reads(&self, text: &str) -> bool {
        match &self.parts.kind {
            Kind::ByteLevel(level) => !level.needs_nfc || is_nfc(text),
            // a mark that stands in the text could not be told from a space
            Kind::SentencePiece(_) => text.is_ascii() || !text.contains(SPACE_MARK),
        }
    }

    /// The tokens of `text`, unless it holds a byte that the vocabulary has no token for.
    fn encode_text(&self, text: &str, plain: &[(usize, usize)]) -> Option<Tokens> {
        if !self.reads(text) {
            return None;
        }
        let mut scratch = self.scratches.lock().ok().and_then(|mut free| free.pop()).unwrap_or_default();
        let mut run =
            Run { parts: &self.parts, scratch: &mut scratch, tokens: Tokens::default(), is_lost: false };
        run.tokens.ids.reserve(text.len() / 3);
        run.tokens.spans.reserve(text.len() / 3);
        self.parts.added.split(text, (0, text.len()), plain, &mut |(id, start, end)| match (
            id,
            &self.parts.kind,
        ) {
            (Some(id), _) => run.tokens.push(id, start, end),
            (None, Kind::SentencePiece(pieces)) => run.characters(pieces, text, (start, end), plain),
            (None, Kind::ByteLevel(level)) => {
                self.parts.added_normalized.split(
                    text,
                    (start, end),
                    plain,
                    &mut |(id, start, end)| match id {
                        Some(id) => run.tokens.push(id, start, end),
                        None => run.stages(level, &level.stages, text.as_bytes(), start, end),
                    },
                );
            }
        });
        let tokens = (!run.is_lost).then_some(run.tokens);
        if let Ok(mut free) = self.scratches.lock() {
            free.push(scratch);
        }
        tokens
    }
}

impl Run<'_> {
    /// Encodes bytes `start..end` through the stages of cutting that are left.
    fn stages(&mut self, level: &ByteLevel, stages: &[Stage], text: &[u8], start: usize, end: usize) {
        match stages.split_first() {
            Some((stage, [])) => {
                stage.split(text, start, end, &mut |start, end| self.bytes(level, text, start, end));
            }
            Some((stage, later)) => {
                stage.split(text, start, end, &mut |start, end| self.stages(level, later, text, start, end));
            }
            None => self.bytes(level, text, start, end),
        }
    }

    /// Encodes one word of the byte-level kind.
    fn bytes(&mut self, level: &ByteLevel, text: &[u8], start: usize, end: usize) {
        self.word(text, start, end, |symbols| {
            let word = &text[start..end];
            if !level.characters.symbols(word, &level.bytes, symbols) {
                symbols.extend(word.iter().map(|&byte| level.bytes[usize::from(byte)]));
            }
        });
    }

    /// Encodes a piece between added tokens of the `SentencePiece` kind.
    #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
    fn characters(
        &mut self,
        pieces: &SentencePiece,
        text: &str,
        (start, end): (usize, usize),
        plain: &[(usize, usize)],
    ) {
        let mut normalized = std::mem::take(&mut self.scratch.normalized);
        normalized.clear();
        let shift = usize::from(pieces.prepends);
        if pieces.prepends {
            normalized.push(' ');
        }
        normalized.push_str(&text[start..end]);
        let plain: Vec<(usize, usize)> = plain
            .iter()
            .filter(|&&(from, to)| from < end && to > start)
            .map(|&(from, to)| (from.max(start) - start + shift, to.min(end) - start + shift))
            .collect();
        let first = self.tokens.spans.len();
        let range = (0, normalized.len());
        self.parts.added_normalized.split(&normalized, range, &plain, &mut |(id, from, to)| match id {
            Some(id) => self.tokens.push(id, from, to),
            None => pieces.cut(&normalized[..to], from, &mut |from, to| {
                self.word(normalized.as_bytes(), from, to, |symbols| {
                    symbols.extend(pieces.symbols(&normalized[from..to]));
                });
            }),
        });
        // back to bytes of the text; a token of nothing but the space that was put before it stands
        // for the first character
        let least = start + char_length(text.as_bytes()[start]);
        let place = |at: u32| (at as usize + start).saturating_sub(shift).max(start);
        for span in &mut self.tokens.spans[first..] {
            let (from, to) = (place(span.0), place(span.1));
            *span = (from as u32, if to == start { least } else { to } as u32);
        }
        self.scratch.normalized = normalized;
    }

    /// Encodes the word `text[start..end]`, whose symbols are asked for when it is new.
    fn word(&mut self, text: &[u8], start: usize, end: usize, symbols: impl FnOnce(&mut Vec<u32>)) {
        let ids = &mut self.tokens.ids;
        let from = ids.len();
        let packed = pack(text, start, end);
        let known = match packed {
            Some(word) => self.scratch.words.append(word, ids),
            None => self.scratch.words.append_long(&text[start..end], ids),
        };
        if !known {
            let word = &text[start..end];
            if let Some(&id) = self.parts.whole_words.as_ref().and_then(|words| words.get(word)) {
                ids.push(id);
            } else {
                symbols(self.scratch.workspace.symbols());
                self.parts.merges.apply(&mut self.scratch.workspace, ids);
                if ids[from..].contains(&NO_TOKEN) {
                    ids.truncate(from);
                    self.is_lost = true;
                    return;
                }
            }
            match packed {
                Some(packed) => self.scratch.words.insert(packed, &ids[from..]),
                None => self.scratch.words.insert_long(word, &ids[from..]),
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "bounded by source::MAX_ROW_BYTES")]
        let (mut at, end) = (start as u32, end as u32);
        // most words are one token, whose length need not be looked up
        if let [_] = ids[from..] {
            self.tokens.spans.push((at, end));
            return;
        }
        for &id in &ids[from..] {
            let end = at + self.parts.lengths[id as usize];
            self.tokens.spans.push((at, end));
            at = end;
        }
    }
}

impl TokenizerEngine for FastTokenizer {
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Tokens> {
        let wrap = match (&self.wrap, add_special_tokens) {
            (_, false) => None,
            (Some(wrap), true) => Some(wrap),
            (None, true) => return self.reference.encode(text, true),
        };
        let Some(mut tokens) = self.encode_text(text, &[]) else {
            return self.reference.encode(text, add_special_tokens);
        };
        if let Some((before, after)) = wrap {
            for (list, at) in [(before, 0), (after, tokens.ids.len() + before.len())] {
                tokens.ids.splice(at..at, list.iter().copied());
                tokens.spans.splice(at..at, list.iter().map(|_| (0, 0)));
            }
        }
        Ok(tokens)
    }

    fn encode_plain(&self, text: &str, plain: &[(usize, usize)]) -> Result<Tokens> {
        match self.encode_text(text, plain) {
            Some(tokens) => Ok(tokens),
            None => self.reference.encode_plain(text, plain),
        }
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.reference.decode(ids, skip_special_tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.reference.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.reference.id_to_token(id)
    }

    fn vocab_size(&self) -> usize {
        self.reference.vocab_size()
    }

    fn special_tokens(&self) -> Vec<(u32, String)> {
        self.reference.special_tokens()
    }
}

/// What the reference puts round any text that asks for special tokens.
fn find_wrap(reference: &ReferenceTokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let find = |text: &str| {
        let bare = reference.encode(text, false).ok()?.ids;
        let wrapped = reference.encode(text, true).ok()?.ids;
        let at = (0..=wrapped.len().checked_sub(bare.len())?)
            .find(|&at| wrapped[at..].starts_with(&bare) && !bare.is_empty())?;
        Some((wrapped[..at].to_vec(), wrapped[at + bare.len()..].to_vec()))
    };
    let wrap = find("probe of words")?;
    (Some(&wrap) == find("9").as_ref()).then_some(wrap)
}

/// Whether normalization form C leaves `text` as it is; "perhaps" counts as no.
pub(super) fn is_nfc(text: &str) -> bool {
    if text.is_ascii() {
        return true;
    }
    // below U+0300 nothing combines, and Han characters neither decompose nor combine
    let odd = |character: &char| !matches!(character, '\0'..'\u{300}' | '\u{3400}'..'\u{A000}');
    let mut rest = text;
    while let Some(at) = rest.find(|character: char| odd(&character)) {
        // the quick check wants whole runs: from the character before the odd one to the next plain one
        let start = rest[..at].char_indices().next_back().map_or(at, |(start, _)| start);
        let end =
            rest[at..].find(|character: char| !odd(&character)).map_or(rest.len(), |length| at + length);
        if is_nfc_quick(rest[start..end].chars()) != IsNormalized::Yes {
            return false;
        }
        rest = &rest[end..];
    }
    true
}
