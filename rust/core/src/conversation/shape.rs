//! The layouts of a row, told apart by its keys.

use std::fmt;

use serde_json::Value;

use super::{key_list, kind_of};
use crate::{Error, Result};

/// The keys that name a question, in the order in which they are looked for.
pub const QUERY_KEYS: [&str; 6] = ["query", "prompt", "input", "instruction", "question", "problem"];
/// The keys that name an answer, in the order in which they are looked for.
pub const RESPONSE_KEYS: [&str; 9] =
    ["response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "completion"];
/// Keys beside `text` that make it a question rather than a document.
const NOT_A_DOCUMENT: [&str; 3] = ["code", "label", "summary"];

/// The layout of a row; fixed for a file by its first row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `{"messages": [{"role", "content"}]}`, or the bare list.
    Messages,
    /// `{"conversations": [{"from", "value"}]}`.
    ShareGpt,
    /// `{"instruction", "input", "output"}`.
    Alpaca,
    /// `{"query", "response", "history", "system"}` and the aliases of these names.
    QueryResponse,
    /// `{"text"}`: a document, trained whole.
    Text,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "messages",
            Self::ShareGpt => "ShareGPT conversations",
            Self::Alpaca => "Alpaca (instruction, input, output)",
            Self::QueryResponse => "query/response",
            Self::Text => "plain text",
        })
    }
}

impl Shape {
    /// The shape of `row`, from its keys alone.
    pub fn detect(row: &Value) -> Result<Self> {
        let object = match row {
            Value::Array(_) => return Ok(Self::Messages),
            Value::Object(object) => object,
            other => {
                return Err(Error::row("", format!("a row is {}; expected a JSON object", kind_of(other))));
            }
        };
        let has = |key: &str| object.contains_key(key);
        if has("messages") {
            return Ok(Self::Messages);
        }
        if has("conversations") {
            return Ok(Self::ShareGpt);
        }
        let response = RESPONSE_KEYS.iter().find(|key| has(key));
        if let Some(response) = response {
            if has("instruction") {
                return Ok(Self::Alpaca);
            }
            if QUERY_KEYS.iter().any(|key| has(key)) {
                return Ok(Self::QueryResponse);
            }
            if *response == "response" {
                return Ok(Self::Text);
            }
        } else if has("text") {
            return match NOT_A_DOCUMENT.iter().find(|key| has(key)) {
                None => Ok(Self::Text),
                Some(other) => Err(Error::row(
                    "",
                    format!(
                        "a row has both \"text\" and \"{other}\", so it may be a document or a question and \
                         its answer; rename them to query and response, or remove \"{other}\""
                    ),
                )),
            };
        }
        let preference =
            if has("chosen") { " (a preference row: SFT needs one answer as \"response\")" } else { "" };
        Err(Error::row(
            "",
            format!(
                "a row with the keys {} is in none of the known shapes{preference}; expected messages, \
                 conversations, instruction+output, query+response or text",
                key_list(object)
            ),
        ))
    }
}
