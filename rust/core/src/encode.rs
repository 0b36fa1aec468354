//! A row to an example: rendered once, encoded once, masked by byte offsets.
//!
//! A token is trained when it shares a byte with a trained segment, which is what Transformers'
//! `return_assistant_tokens_mask` does for a token astride a border. A row over `max_length` is
//! deleted, cut or refused by [`Truncation`]; never in silence: the outcome says which.

use std::str::FromStr;

use crate::conversation::{Conversation, Message, Row};
use crate::template::{ChatTemplate, Rendered, Segment};
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
            "raise" => Ok(Self::Raise),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("truncation_strategy \"{name}\" is unknown; expected delete, left, right or raise"),
            )),
        }
    }
}

/// A row ready for the model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Whether each token is trained; as long as `input_ids`.
    pub loss_mask: Vec<bool>,
    /// The number of tokens before truncation.
    pub full_length: usize,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is trained, perhaps cut (`full_length` tells).
    Example(Example),
    /// It has this many tokens, over `max_length`, and the policy deletes it.
    Deleted(usize),
}

/// Turns rows into examples.
pub struct Encoder {
    /// The tokenizer.
    pub tokenizer: Box<dyn TokenizerEngine>,
    /// The chat template; without one only documents can be encoded.
    pub template: Option<ChatTemplate>,
    /// The longest example, in tokens.
    pub max_length: usize,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// The system message for conversations that have none.
    pub system: Option<String>,
    /// The text that ends a document.
    pub eos_token: Option<String>,
}

impl Encoder {
    /// The text of `row` and its segments.
    pub fn render(&self, row: &Row) -> Result<Rendered> {
        match row {
            Row::Text(text) => {
                let eos = self.eos_token.as_deref().unwrap_or_default();
                Ok(Rendered::document(format!("{text}{eos}")))
            }
            Row::Chat(conversation) => {
                let template = self.template()?;
                match self.with_system(conversation) {
                    Some(conversation) => template.render_segments(&conversation),
                    None => template.render_segments(conversation),
                }
            }
        }
    }

    /// The chat template, or an error that says how to get one.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Template,
                "the tokenizer has no chat template, so a chat cannot be rendered; pass --template default (for \
                 a base model), --template chatml or a .jinja file",
            )
        })
    }

    /// `conversation` with the run's system message, where it applies.
    pub fn with_system(&self, conversation: &Conversation) -> Option<Conversation> {
        let system = self.system.as_ref()?;
        if conversation.messages.first().is_some_and(|message| message.role == "system") {
            return None;
        }
        let mut conversation = conversation.clone();
        conversation.messages.insert(0, Message::new("system", system.as_str()));
        Some(conversation)
    }

    /// Encodes `row` whole, whatever its length.
    pub fn encode_full(&self, row: &Row) -> Result<(Rendered, Example)> {
        let rendered = self.render(row)?;
        // a chat template writes its own special tokens; a document gets what the tokenizer adds
        let tokens = self.tokenizer.encode(&rendered.text, matches!(row, Row::Text(_)))?;
        let loss_mask = mask(&tokens, &rendered.segments);
        let full_length = tokens.ids.len();
        if !loss_mask.contains(&true) {
            return Err(Error::row(
                "",
                format!(
                    "none of the {full_length} tokens is trained (every assistant turn has \"loss\": false, or the \
                     chat template leaves the turns out); fix the row or remove it"
                ),
            ));
        }
        Ok((rendered, Example { input_ids: tokens.ids, loss_mask, full_length }))
    }

    /// Encodes `row` and applies `max_length`.
    pub fn encode(&self, row: &Row) -> Result<Outcome> {
        let (_, example) = self.encode_full(row)?;
        self.truncate(example)
    }

    /// Applies `max_length` to an example.
    pub fn truncate(&self, mut example: Example) -> Result<Outcome> {
        let length = example.input_ids.len();
        let Some(surplus) = length.checked_sub(self.max_length).filter(|&surplus| surplus > 0) else {
            return Ok(Outcome::Example(example));
        };
        match self.truncation {
            Truncation::Delete => return Ok(Outcome::Deleted(length)),
            Truncation::Raise => {
                return Err(Error::row(
                    "",
                    format!(
                        "{length} tokens are over max_length {}; raise --max_length, or choose \
                         --truncation_strategy delete, left or right",
                        self.max_length
                    ),
                ));
            }
            Truncation::Left => {
                example.input_ids.drain(..surplus);
                example.loss_mask.drain(..surplus);
            }
            Truncation::Right => {
                example.input_ids.truncate(self.max_length);
                example.loss_mask.truncate(self.max_length);
            }
        }
        // the first token of a row predicts nothing before it, so it alone trains nothing
        if !example.loss_mask.iter().skip(1).any(|&trained| trained) {
            return Err(Error::row(
                "",
                format!(
                    "cutting {length} tokens to max_length {} leaves no trained token; raise --max_length, or choose \
                     --truncation_strategy delete",
                    self.max_length
                ),
            ));
        }
        Ok(Outcome::Example(example))
    }
}

/// Whether each token shares a byte with a trained segment. Both lists are in order of the text;
/// a token without bytes (added by the tokenizer itself) counts to the segment at its place.
fn mask(tokens: &Tokens, segments: &[Segment]) -> Vec<bool> {
    let mut at = 0;
    let mut loss_mask = Vec::with_capacity(tokens.ids.len());
    for &(start, end) in &tokens.spans {
        let (start, end) = (start as usize, end as usize);
        if start == end {
            // an added token: trained at the end of a document (eos), never at its start (bos)
            loss_mask.push(
                start > 0 && segments.last().is_some_and(|segment| segment.trained && end >= segment.end),
            );
            continue;
        }
        while at + 1 < segments.len() && segments[at].end <= start {
            at += 1;
        }
        let trained =
            segments[at..].iter().take_while(|segment| segment.start < end).any(|segment| segment.trained);
        loss_mask.push(trained);
    }
    loss_mask
}
