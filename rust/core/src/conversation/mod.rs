//! One row of a data file as a conversation.
//!
//! A row is JSON in one of the [`Shape`]s; [`Row::parse`] turns it into messages with the roles and
//! keys of the field (`system`, `user`, `assistant`, `tool`). Everything a chat template could want
//! stays as it was written: unknown keys of a message, key order, numbers. A row that does not fit is
//! an error that points at the offending value. [`Columns`] renames the keys of other layouts first.

mod calls;
mod columns;
mod content;
mod json;
mod literal;
mod message;
mod query;
mod shape;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

use crate::{Error, Result};

pub(crate) use calls::VERBATIM_CALL;
use calls::parse_tools;
pub use columns::{Columns, Tags};
pub(crate) use json::line_and_column;
pub use json::parse_json;
use message::{push_messages, take_list};
use query::{parse_document, push_prompt, push_query, take_system};
use shape::preference_remedy;
pub use shape::{QUERY_KEYS, RESPONSE_KEYS, Shape};

const SYSTEM_KEYS: [&str; 2] = ["system", "system_prompt"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// The text, where there is one; `None` is JSON `null`.
    pub content: Option<String>,
    /// The content as a list of text parts, where the row has it so; `content` is their text.
    pub parts: Option<Vec<Value>>,
    /// How much the loss of its tokens counts, where its role is trained: 1 unless the row says else.
    pub weight: f32,
    /// All other keys as they were written (`tool_calls`, `reasoning_content`, `name`, …).
    pub extra: Map<String, Value>,
}

/// A chat: messages and what else a chat template reads.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// At least one, in order.
    pub messages: Vec<Message>,
    /// The tool schemas, as a list.
    pub tools: Option<Value>,
    /// The row's own arguments for the chat template.
    pub chat_template_kwargs: Map<String, Value>,
    /// The name of the group that the row belongs to, where it has one.
    pub channel: Option<String>,
}

/// A parsed row.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// Rendered with the chat template; assistant turns are trained.
    Chat(Conversation),
    /// A document; all of it is trained.
    Text(String),
}

impl Row {
    /// Parses `row`, whose shape is `shape`.
    pub fn parse(row: Value, shape: Shape) -> Result<Self> {
        let found = Shape::detect(&row)?;
        if found != shape {
            return Err(Error::row(
                "",
                format!(
                    "a row of shape {found} in a file whose first row is {shape}; one file holds one shape, split it"
                ),
            ));
        }
        match row {
            Value::Object(object) => Self::parse_object(object, shape),
            list => {
                let object = Map::from_iter([("messages".to_owned(), list)]);
                Self::parse_object(object, shape).map_err(|mut error| {
                    // the list is the row itself
                    error.place.pointer =
                        error.place.pointer.map(|at| at.strip_prefix("/messages").unwrap_or(&at).to_owned());
                    error
                })
            }
        }
    }

    fn parse_object(mut object: Map<String, Value>, shape: Shape) -> Result<Self> {
        if let Some(key) = ["images", "videos", "audios"].into_iter().find(|key| is_given(object.get(*key))) {
            return Err(Error::row(
                format!("/{key}"),
                format!("a row carries \"{key}\", but sftcore trains on text; remove the key or the row"),
            ));
        }
        if shape == Shape::Text {
            return parse_document(object);
        }
        let remedy = preference_remedy(&object);
        let mut conversation = Conversation {
            tools: parse_tools(object.shift_remove("tools"))?,
            chat_template_kwargs: take_kwargs(&mut object)?,
            channel: take_channel(&mut object)?,
            messages: Vec::new(),
        };
        let messages = &mut conversation.messages;
        messages.extend(take_system(&mut object)?.map(|system| Message::new("system", system)));
        match shape {
            Shape::Messages => push_list(messages, object, "messages")?,
            Shape::ShareGpt => push_list(messages, object, "conversations")?,
            Shape::Rounds => push_list(messages, object, "conversation")?,
            Shape::PromptCompletion => push_prompt(messages, object)?,
            Shape::Alpaca | Shape::QueryResponse | Shape::Text => push_query(messages, object, shape)?,
        }
        if messages.iter().any(|message| message.role == "assistant") {
            return Ok(Self::Chat(conversation));
        }
        let key = match shape {
            Shape::ShareGpt => "conversations",
            Shape::Rounds => "conversation",
            _ => "messages",
        };
        let roles: Vec<_> = messages.iter().map(|message| message.role).collect();
        let remedy = remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
        Err(Error::row(
            format!("/{key}"),
            format!("\"{key}\" has no assistant turn to train on (roles: {}){remedy}", roles.join(", ")),
        ))
    }

    /// Parses one JSON document, detecting its shape.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let value = parse_json(text)?;
        let shape = Shape::detect(&value)?;
        Self::parse(value, shape)
    }
}

impl Message {
    /// Takes the reasoning of an assistant out: its key, or a leading `<think>` block of its content.
    pub fn drop_reasoning(&mut self) {
        if self.role != "assistant" {
            return;
        }
        for key in ["reasoning_content", "reasoning", "thinking"] {
            self.extra.shift_remove(key);
        }
        let block = self.content.as_deref().and_then(|text| text.trim_start().strip_prefix("<think>"));
        if let Some((_, answer)) = block.and_then(|block| block.split_once("</think>")) {
            self.content = Some(answer.trim_start().to_owned());
            self.parts = None;
        }
    }

    /// A message of text alone.
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: Some(content.into()), parts: None, weight: 1.0, extra: Map::new() }
    }

    /// The tool calls of an assistant message, where it makes any.
    pub fn tool_calls(&self) -> &[Value] {
        self.extra.get("tool_calls").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn key_list(object: &Map<String, Value>) -> String {
    if object.is_empty() {
        return "(none)".to_owned();
    }
    object.keys().take(12).map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn is_given(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    }
}

fn push_list(messages: &mut Vec<Message>, mut object: Map<String, Value>, key: &str) -> Result<()> {
    let list = take_list(&mut object, key)?;
    push_messages(messages, list, key)
}

fn take_kwargs(object: &mut Map<String, Value>) -> Result<Map<String, Value>> {
    let kwargs = match object.shift_remove("chat_template_kwargs") {
        // a table holds it as text
        Some(Value::String(text)) => literal::parse_literal(&text).unwrap_or(Value::String(text)),
        kwargs => kwargs.unwrap_or_default(),
    };
    match kwargs {
        Value::Null => Ok(Map::new()),
        Value::Object(kwargs) => Ok(kwargs),
        other => Err(Error::row(
            "/chat_template_kwargs",
            format!("\"chat_template_kwargs\" is {}; expected an object", kind_of(&other)),
        )),
    }
}

fn take_channel(object: &mut Map<String, Value>) -> Result<Option<String>> {
    match object.shift_remove("channel") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(channel)) => Ok((!channel.is_empty()).then_some(channel)),
        Some(other) => {
            Err(Error::row("/channel", format!("\"channel\" is {}; expected a string", kind_of(&other))))
        }
    }
}
