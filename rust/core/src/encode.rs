//! A row to an example: rendered once, encoded once, masked by byte offsets.
//!
//! A token is trained when it shares a byte with a trained segment, which is what Transformers'
//! `return_assistant_tokens_mask` does for a token astride a border. A row over `max_length` is
//! deleted, cut or refused by [`Truncation`]; never in silence: the outcome says which.

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::conversation::{Conversation, Message, Row};
use crate::template::{ChatTemplate, Controls, Lost, OnLostContent, Reasoning, Rendered, Segment};
use crate::tokenizer::{TokenizerEngine, Tokens};
use crate::{Error, ErrorKind, Result};

/// What happens to a row over `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Truncation {
    /// The row is left out, and counted.
    Delete,
    /// Tokens are cut from the start, and the row is counted.
    Left,
    /// Tokens are cut from the end, and the row is counted.
    Right,
    /// The row becomes several examples, and is counted.
    Split,
    /// The row is an error.
    Raise,
}

impl FromStr for Truncation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "delete" => Ok(Self::Delete),
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            "split" => Ok(Self::Split),
            "raise" => Ok(Self::Raise),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!(
                    "truncation_strategy \"{name}\" is unknown; expected delete, left, right, split or raise"
                ),
            )),
        }
    }
}

/// What a control token inside the content of a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ControlTokens {
    /// The token, as in Transformers.
    #[default]
    Parse,
    /// Text like any other.
    Text,
}

impl FromStr for ControlTokens {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "parse" => Ok(Self::Parse),
            "text" => Ok(Self::Text),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("control_tokens_in_content \"{name}\" is unknown; expected parse or text"),
            )),
        }
    }
}

/// A row ready for the model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Whether each token is trained; as long as `input_ids`.
    pub loss_mask: Vec<bool>,
    /// How much the loss of each token counts; empty where trained tokens count 1.
    pub loss_weights: Vec<f32>,
    /// Control tokens inside the contents of messages, parsed or (`ControlTokens::Text`) not.
    pub control_tokens: usize,
    /// The number of tokens before truncation.
    pub full_length: usize,
    /// What the row says and the text does not.
    pub lost: Vec<Lost>,
    /// Trained turns that no token ends.
    pub endless_turns: usize,
}

impl Example {
    /// A hash of its ids, mask and weights: of all that the model sees and learns.
    pub fn hash(&self) -> u64 {
        let mut bytes = Vec::with_capacity(4 * (self.input_ids.len() + self.loss_weights.len()));
        for (&id, &trained) in self.input_ids.iter().zip(&self.loss_mask) {
            // ids are below 2^31
            bytes.extend_from_slice(&((id << 1) | u32::from(trained)).to_le_bytes());
        }
        for weight in &self.loss_weights {
            bytes.extend_from_slice(&weight.to_bits().to_le_bytes());
        }
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }

    /// Number of trained tokens.
    pub fn num_trained(&self) -> usize {
        self.loss_mask.iter().filter(|&&trained| trained).count()
    }

    fn trains_something(&self) -> bool {
        // the first token of a row predicts nothing before it, so it alone trains nothing
        self.loss_mask.iter().skip(1).any(|&trained| trained)
    }

    fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let weights = if self.loss_weights.is_empty() { &[] } else { &self.loss_weights[range.clone()] };
        Self {
            input_ids: self.input_ids[range.clone()].to_vec(),
            loss_mask: self.loss_mask[range.clone()].to_vec(),
            loss_weights: weights.to_vec(),
            control_tokens: self.control_tokens,
            full_length: self.full_length,
            lost: self.lost.clone(),
            endless_turns: self.endless_turns,
        }
    }
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It is trained, perhaps cut (`full_length` tells).
    Example(Example),
    /// It was over `max_length` and is now several examples; this many more had nothing to train and are left out.
    Pieces(Vec<Example>, usize),
    /// It has this many tokens, over `max_length`, and the policy deletes it.
    Deleted(usize),
    /// Nothing of it is trained; the error says why.
    Untrained(Error),
    /// The chat template leaves out some of what it says, and the policy leaves out the row.
    Lossy(Vec<Lost>),
}

/// Turns rows into examples.
pub struct Encoder {
    /// The tokenizer.
    pub tokenizer: Arc<dyn TokenizerEngine>,
    /// The chat template; without one only documents can be encoded.
    pub template: Option<ChatTemplate>,
    /// The one for conversations with tools, where the folder names one.
    pub tool_use_template: Option<ChatTemplate>,
    /// The longest example, in tokens.
    pub max_length: usize,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// The system message for conversations that have none.
    pub system: Option<String>,
    /// The text that ends a document.
    pub eos_token: Option<String>,
    /// What is trained.
    pub controls: Controls,
    /// Control tokens inside contents.
    pub control_tokens: ControlTokens,
    /// An answer at the end of a chat that no token ends gets `eos_token`.
    pub appends_eos: bool,
    /// The control tokens of `tokenizer`.
    pub special_tokens: Arc<ControlTokenSet>,
    /// Arguments for the chat template, under those of a row.
    pub chat_template_kwargs: Map<String, Value>,
}

impl Encoder {
    /// The same but for the chat template, which stands for all chats.
    #[must_use]
    pub fn with_template(&self, template: ChatTemplate) -> Self {
        Self {
            tokenizer: self.tokenizer.clone(),
            special_tokens: self.special_tokens.clone(),
            template: Some(template),
            tool_use_template: None,
            system: self.system.clone(),
            eos_token: self.eos_token.clone(),
            controls: self.controls.clone(),
            chat_template_kwargs: self.chat_template_kwargs.clone(),
            ..*self
        }
    }

    /// The text of `row` and its segments.
    pub fn render(&self, row: &Row) -> Result<Rendered> {
        match row {
            Row::Text(text) => {
                let eos = self.eos_token.as_deref().unwrap_or_default();
                Ok(Rendered::document(format!("{text}{eos}")))
            }
            Row::Chat(conversation) => {
                let conversation = self.prepare(conversation);
                let template = self.template_for(&conversation)?;
                let mut rendered = template.render_segments(&conversation, &self.controls)?;
                if let Some(eos) = self.eos_token.as_ref().filter(|_| self.appends_eos) {
                    rendered.append_eos(eos);
                }
                if let (OnLostContent::Raise, Some(lost)) =
                    (self.controls.on_lost_content, rendered.lost.first())
                {
                    let message = format!(
                        "the chat template leaves out {lost}; choose another --template, take it out of the row, or pass \
                         --on_lost_content warn to train on the rest, skip to leave such rows out"
                    );
                    return Err(Error::new(ErrorKind::Template, message));
                }
                Ok(rendered)
            }
        }
    }

    /// The chat template for `conversation`, or an error that says how to get one.
    pub fn template_for(&self, conversation: &Conversation) -> Result<&ChatTemplate> {
        let tool_use = self.tool_use_template.as_ref().filter(|_| conversation.tools.is_some());
        tool_use.or(self.template.as_ref()).ok_or_else(|| {
            Error::new(
                ErrorKind::Template,
                "the tokenizer has no chat template, so a chat cannot be rendered; pass --template default (for \
                 a base model), --template chatml or a .jinja file",
            )
        })
    }

    /// `conversation` with what the settings of the run add to it and take from it.
    pub fn prepare<'c>(&self, conversation: &'c Conversation) -> Cow<'c, Conversation> {
        let mut conversation = Cow::Borrowed(conversation);
        let has_system = conversation.messages.first().is_some_and(|message| message.role == "system");
        if let Some(system) = self.system.as_ref().filter(|_| !has_system) {
            conversation.to_mut().messages.insert(0, Message::new("system", system.as_str()));
        }
        if self.controls.reasoning == Reasoning::Drop {
            conversation.to_mut().messages.iter_mut().for_each(Message::drop_reasoning);
        }
        for (name, value) in &self.chat_template_kwargs {
            if !conversation.chat_template_kwargs.contains_key(name) {
                conversation.to_mut().chat_template_kwargs.insert(name.clone(), value.clone());
            }
        }
        conversation
    }

    /// Encodes `row` whole, whatever its length.
    pub fn encode_full(&self, row: &Row) -> Result<(Rendered, Example)> {
        let rendered = self.render(row)?;
        let tokens = self.tokenize(row, &rendered)?;
        let (loss_mask, loss_weights) = mask(&tokens, &rendered.segments);
        let full_length = tokens.ids.len();
        let control_tokens = self.count_control_tokens(&rendered, &tokens);
        let example = Example {
            input_ids: tokens.ids,
            loss_mask,
            loss_weights,
            control_tokens,
            full_length,
            lost: rendered.lost.clone(),
            endless_turns: rendered.endless.turns,
        };
        Ok((rendered, example))
    }

    /// The tokens of a rendered row.
    pub fn tokenize(&self, row: &Row, rendered: &Rendered) -> Result<Tokens> {
        if self.control_tokens == ControlTokens::Text
            && let Row::Chat(conversation) = row
        {
            let mut contents = conversation.messages.iter().filter_map(|message| message.content.as_deref());
            if rendered.has_lost_content && contents.any(|content| self.has_control_token(content)) {
                return Err(Error::row(
                    "",
                    "the chat template changes the content of a message, so control tokens in it cannot be told \
                     from those of the template; choose --control_tokens_in_content parse, or skip the row",
                ));
            }
            return self.tokenizer.encode_plain(&rendered.text, &rendered.contents);
        }
        // a chat template writes its own special tokens; a document gets what the tokenizer adds
        self.tokenizer.encode(&rendered.text, matches!(row, Row::Text(_)))
    }

    fn has_control_token(&self, text: &str) -> bool {
        self.special_tokens.texts().any(|token| text.contains(token))
    }

    /// Control tokens that begin inside a content.
    fn count_control_tokens(&self, rendered: &Rendered, tokens: &Tokens) -> usize {
        if self.control_tokens == ControlTokens::Text {
            let contents = rendered.contents.iter().map(|&(start, end)| &rendered.text[start..end]);
            let special = &self.special_tokens;
            return contents
                .map(|text| special.texts().map(|token| text.matches(token).count()).sum::<usize>())
                .sum();
        }
        let mut contents = rendered.contents.iter().peekable();
        let special =
            tokens.ids.iter().zip(&tokens.spans).filter(|(id, _)| self.special_tokens.contains(**id));
        special
            .filter(|(_, span)| {
                let start = span.0 as usize;
                while contents.next_if(|(_, end)| *end <= start).is_some() {}
                contents.peek().is_some_and(|(from, _)| *from <= start)
            })
            .count()
    }

    /// Encodes `row` and applies `max_length`.
    pub fn encode(&self, row: &Row) -> Result<Outcome> {
        let (_, example) = self.encode_full(row)?;
        self.truncate(example)
    }

    /// Applies `max_length` to an example.
    pub fn truncate(&self, example: Example) -> Result<Outcome> {
        let length = example.input_ids.len();
        if self.controls.on_lost_content == OnLostContent::Skip && !example.lost.is_empty() {
            return Ok(Outcome::Lossy(example.lost));
        }
        if !example.loss_mask.contains(&true) {
            let message = format!(
                "none of the {length} tokens is trained (every assistant turn has \"loss\": false, or the chat template \
                 leaves the turns out); fix the row or remove it"
            );
            return Ok(Outcome::Untrained(Error::row("", message)));
        }
        if length <= self.max_length {
            return Ok(Outcome::Example(example));
        }
        let cut = match self.truncation {
            Truncation::Delete => return Ok(Outcome::Deleted(length)),
            Truncation::Raise => {
                return Err(Error::row(
                    "",
                    format!(
                        "{length} tokens are over max_length {}; raise --max_length, or choose \
                         --truncation_strategy delete, left, right or split",
                        self.max_length
                    ),
                ));
            }
            Truncation::Split => {
                let starts = (0..length).step_by(self.max_length);
                let (trained, untrained): (Vec<Example>, Vec<Example>) = starts
                    .map(|start| example.slice(start..(start + self.max_length).min(length)))
                    .partition(Example::trains_something);
                if trained.is_empty() {
                    return Ok(Outcome::Untrained(self.nothing_left(length)));
                }
                return Ok(Outcome::Pieces(trained, untrained.len()));
            }
            Truncation::Left => example.slice(length - self.max_length..length),
            Truncation::Right => example.slice(0..self.max_length),
        };
        if cut.trains_something() {
            return Ok(Outcome::Example(cut));
        }
        Ok(Outcome::Untrained(self.nothing_left(length)))
    }

    fn nothing_left(&self, length: usize) -> Error {
        Error::row(
            "",
            format!(
                "cutting {length} tokens to max_length {} leaves no trained token; raise --max_length, or choose \
                 --truncation_strategy delete",
                self.max_length
            ),
        )
    }
}

/// Whether each token shares a byte with a trained segment, and the highest weight among those it
/// does, unless all are 0 or 1. Both lists are in order of the text; a token without bytes (added by
/// the tokenizer itself) counts to the segment at its place.
fn mask(tokens: &Tokens, segments: &[Segment]) -> (Vec<bool>, Vec<f32>) {
    let mut at = 0;
    let mut loss_mask = Vec::with_capacity(tokens.ids.len());
    let is_plain = |segment: &Segment| segment.weight.to_bits() == 1f32.to_bits() || !segment.is_trained();
    let is_weighted = !segments.iter().all(is_plain);
    let mut loss_weights = Vec::new();
    for &(start, end) in &tokens.spans {
        let (start, end) = (start as usize, end as usize);
        let weight = if start == end {
            // an added token: trained at the end of a document (eos), never at its start (bos)
            segments.last().filter(|segment| start > 0 && end >= segment.end).map_or(0.0, |last| last.weight)
        } else {
            while at + 1 < segments.len() && segments[at].end <= start {
                at += 1;
            }
            let shared = segments[at..].iter().take_while(|segment| segment.start < end);
            shared.map(|segment| segment.weight).fold(0.0, f32::max)
        };
        loss_mask.push(weight > 0.0);
        if is_weighted {
            loss_weights.push(weight);
        }
    }
    (loss_mask, loss_weights)
}

/// The control tokens of a tokenizer, by id.
pub struct ControlTokenSet {
    is_special: Vec<bool>,
    texts: Vec<String>,
}

impl ControlTokenSet {
    /// Those of `tokenizer`.
    pub fn new(tokenizer: &dyn TokenizerEngine) -> Self {
        let tokens = tokenizer.special_tokens();
        let size = tokens.iter().map(|(id, _)| *id as usize + 1).max().unwrap_or_default();
        let mut is_special = vec![false; size];
        for (id, _) in &tokens {
            is_special[*id as usize] = true;
        }
        Self { is_special, texts: tokens.into_iter().map(|(_, text)| text).collect() }
    }

    fn contains(&self, id: u32) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(String::as_str)
    }
}
