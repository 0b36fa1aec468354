//! One row of a data file as a conversation.
//!
//! A row is JSON in one of five [`Shape`]s; [`Row::parse`] turns it into messages with the roles and
//! keys of the field (`system`, `user`, `assistant`, `tool`). Everything a chat template could want
//! stays as it was written: unknown keys of a message, key order, numbers. A row that does not fit is
//! an error that points at the offending value.

mod message;
mod shape;

use serde_json::{Map, Value};

use crate::{Error, Result};

pub(crate) use message::VERBATIM_CALL;
use message::push_messages;
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
        if !matches!(row, Value::Array(_)) || shape != Shape::Messages {
            let found = Shape::detect(&row)?;
            if found != shape {
                return Err(Error::row(
                    "",
                    format!(
                        "a row of shape {found} in a file whose first row is {shape}; one file holds one shape, split it"
                    ),
                ));
            }
        }
        let mut object = match row {
            Value::Object(object) => object,
            list => Map::from_iter([("messages".to_owned(), list)]),
        };
        if let Some(key) = ["images", "videos", "audios"].into_iter().find(|key| is_given(object.get(*key))) {
            return Err(Error::row(
                format!("/{key}"),
                format!("a row carries \"{key}\", but sftcore trains on text; remove the key or the row"),
            ));
        }
        let mut conversation = Conversation {
            tools: parse_tools(object.shift_remove("tools"))?,
            chat_template_kwargs: match object.shift_remove("chat_template_kwargs") {
                None | Some(Value::Null) => Map::new(),
                Some(Value::Object(kwargs)) => kwargs,
                Some(other) => {
                    return Err(Error::row(
                        "/chat_template_kwargs",
                        format!("\"chat_template_kwargs\" is {}; expected an object", kind_of(&other)),
                    ));
                }
            },
            messages: Vec::new(),
        };
        if let Some(system) = take_system(&mut object)? {
            conversation.messages.push(Message::new("system", system));
        }
        match shape {
            Shape::Text => return parse_text(object),
            Shape::Messages => push_messages(&mut conversation.messages, object, "messages")?,
            Shape::ShareGpt => push_messages(&mut conversation.messages, object, "conversations")?,
            Shape::Alpaca | Shape::QueryResponse => push_query(&mut conversation.messages, object, shape)?,
        }
        check_turns(&conversation.messages, shape)?;
        Ok(Self::Chat(conversation))
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

/// Parses JSON; an error carries line and column within `text`.
pub fn parse_json(text: &[u8]) -> Result<Value> {
    let text = std::str::from_utf8(text).map_err(|error| {
        let valid = &text[..error.valid_up_to()];
        let mut problem = Error::row(
            "",
            format!(
                "byte 0x{:02x} is not UTF-8; convert the file, for example with iconv -t UTF-8",
                text[error.valid_up_to()]
            ),
        );
        let (line, column) = line_and_column(valid, valid.len());
        problem.place.line = Some(line);
        problem.place.column = Some(column);
        problem
    })?;
    serde_json::from_str(text).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.split(" at line ").next().unwrap_or_default();
        let mut problem = Error::row("", format!("not JSON: {reason}"));
        problem.place.line = Some(error.line().max(1) as u64);
        problem.place.column = Some(error.column().max(1) as u64);
        problem
    })
}

/// Line and column, both from 1, of a byte offset in UTF-8 text; columns are characters.
pub(crate) fn line_and_column(text: &[u8], offset: usize) -> (u64, u64) {
    let before = &text[..offset.min(text.len())];
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let line = before.split(|&byte| byte == b'\n').count();
    // a continuation byte (0b10xxxxxx) does not start a character
    let column = before[start..].iter().filter(|&&byte| byte & 0xC0 != 0x80).count() + 1;
    (line as u64, column as u64)
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

fn take_system(object: &mut Map<String, Value>) -> Result<Option<String>> {
    for key in SYSTEM_KEYS {
        match object.shift_remove(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => return Ok(Some(text)),
            Some(other) => {
                return Err(Error::row(
                    format!("/{key}"),
                    format!("\"{key}\" is {}; expected a string", kind_of(&other)),
                ));
            }
        }
    }
    Ok(None)
}

fn parse_tools(tools: Option<Value>) -> Result<Option<Value>> {
    match tools {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(Value::Array(list)) => Ok((!list.is_empty()).then_some(Value::Array(list))),
            _ => Err(Error::row("/tools", "\"tools\" is a string that is not a JSON list of tool schemas")),
        },
        Some(Value::Array(list)) => Ok((!list.is_empty()).then_some(Value::Array(list))),
        Some(other) => Err(Error::row(
            "/tools",
            format!("\"tools\" is {}; expected a list of tool schemas", kind_of(&other)),
        )),
    }
}

fn parse_text(mut object: Map<String, Value>) -> Result<Row> {
    let key = if object.contains_key("text") { "text" } else { "response" };
    let text = string_at(object.shift_remove(key), key, &format!("/{key}"))?;
    if text.trim().is_empty() {
        return Err(Error::row(format!("/{key}"), format!("\"{key}\" is empty; remove the row")));
    }
    Ok(Row::Text(text))
}

fn string_at(value: Option<Value>, key: &str, pointer: &str) -> Result<String> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => {
            Err(Error::row(pointer, format!("\"{key}\" is {}; expected a string", kind_of(&other))))
        }
        None => Err(Error::row(pointer, format!("a row has no \"{key}\""))),
    }
}

fn push_query(messages: &mut Vec<Message>, mut object: Map<String, Value>, shape: Shape) -> Result<()> {
    push_history(messages, object.shift_remove("history"))?;
    let response_key =
        RESPONSE_KEYS.into_iter().find(|key| object.contains_key(*key)).unwrap_or(RESPONSE_KEYS[0]);
    let response = object.shift_remove(response_key);
    let query = if shape == Shape::Alpaca {
        let instruction = string_at(object.shift_remove("instruction"), "instruction", "/instruction")?;
        match object.shift_remove("input") {
            None | Some(Value::Null) => instruction,
            Some(Value::String(input)) if input.is_empty() => instruction,
            Some(Value::String(input)) => format!("{instruction}\n{input}"),
            Some(other) => {
                return Err(Error::row(
                    "/input",
                    format!("\"input\" is {}; expected a string", kind_of(&other)),
                ));
            }
        }
    } else {
        let key = QUERY_KEYS.into_iter().find(|key| object.contains_key(*key)).unwrap_or(QUERY_KEYS[0]);
        string_at(object.shift_remove(key), key, &format!("/{key}"))?
    };
    let pointer = format!("/{response_key}");
    let response = match response {
        Some(Value::Array(mut answers)) if !answers.is_empty() => Some(answers.swap_remove(0)),
        other => other,
    };
    let response = string_at(response, response_key, &pointer)?;
    if response.trim().is_empty() {
        return Err(Error::row(
            pointer,
            format!(
                "\"{response_key}\" is an empty assistant turn, which would teach the model to say nothing; fill it \
                 or remove the row"
            ),
        ));
    }
    messages.push(Message::new("user", query));
    messages.push(Message::new("assistant", response));
    Ok(())
}

fn push_history(messages: &mut Vec<Message>, history: Option<Value>) -> Result<()> {
    let wrong = |pointer: String| {
        Error::row(
            pointer,
            "\"history\" is not a list of [query, response] pairs or {query, response} objects",
        )
    };
    let rounds = match history {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(rounds)) => rounds,
        Some(_) => return Err(wrong("/history".to_owned())),
    };
    for (index, round) in rounds.into_iter().enumerate() {
        let pair = match round {
            Value::Array(pair) => <[Value; 2]>::try_from(pair).ok(),
            Value::Object(mut round) => {
                let mut take = |keys: &[&str]| keys.iter().find_map(|key| round.shift_remove(*key));
                take(&QUERY_KEYS).zip(take(&RESPONSE_KEYS)).map(|(query, response)| [query, response])
            }
            _ => None,
        };
        let Some([Value::String(query), Value::String(response)]) = pair else {
            return Err(wrong(format!("/history/{index}")));
        };
        messages.push(Message::new("user", query));
        messages.push(Message::new("assistant", response));
    }
    Ok(())
}

fn check_turns(messages: &[Message], shape: Shape) -> Result<()> {
    if messages.iter().any(|message| message.role == "assistant") {
        return Ok(());
    }
    let key = if shape == Shape::ShareGpt { "conversations" } else { "messages" };
    let roles: Vec<_> = messages.iter().map(|message| message.role).collect();
    Err(Error::row(
        format!("/{key}"),
        format!("\"{key}\" has no assistant turn to train on (roles: {})", roles.join(", ")),
    ))
}
