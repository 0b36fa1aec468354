//! One message of a row: its role, its content, its calls of tools and its weight.
//!
//! A list of messages comes in as it is written, by the keys of `OpenAI` (`role`, `content`), `ShareGPT`
//! (`from`, `value`) or as rounds (`human`, `assistant`); messages of the chat-template world go out. A
//! message that answers several calls at once becomes several, in the order in which they are written.

use std::fmt;

use serde_json::{Map, Value};

use super::calls::{VERBATIM_CALL, parse_function_call, read_calls};
use super::content::{self, Content};
use super::literal::parse_literal;
use super::query::push_round;
use super::{Message, key_list, kind_of};
use crate::{Error, Result};

/// The place of a message in its row, written out only for an error.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spot<'k> {
    /// The key of the list.
    pub(super) list: &'k str,
    /// The place in the list.
    pub(super) index: usize,
}

impl fmt::Display for Spot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.list, self.index)
    }
}

impl Spot<'_> {
    /// An error about what stands at `path` (empty, or with a leading slash) within the message.
    pub(super) fn error(self, path: &str, message: impl fmt::Display) -> Error {
        Error::row(format!("/{}/{}{path}", self.list, self.index), format!("{self}{message}"))
    }
}

/// The list of messages under `key`, which a table may hold as text.
pub(super) fn take_list(object: &mut Map<String, Value>, key: &str) -> Result<Vec<Value>> {
    let wrong = |found: &str| {
        Error::row(format!("/{key}"), format!("\"{key}\" is {found}; expected a list of messages"))
    };
    let list = match object.shift_remove(key) {
        Some(Value::Array(list)) => list,
        Some(Value::String(text)) => match parse_literal(&text) {
            Some(Value::Array(list)) => list,
            _ => return Err(wrong("a string")),
        },
        other => return Err(wrong(kind_of(&other.unwrap_or_default()))),
    };
    if list.is_empty() {
        return Err(Error::row(format!("/{key}"), format!("\"{key}\" is an empty list; remove the row")));
    }
    Ok(list)
}

/// Adds the messages of `list`, the value under `key`.
pub(super) fn push_messages(messages: &mut Vec<Message>, list: Vec<Value>, key: &str) -> Result<()> {
    let is_led = messages.first().is_some_and(|message| message.role == "system");
    for (index, message) in list.into_iter().enumerate() {
        let spot = Spot { list: key, index };
        let first = messages.len();
        push_message(messages, message, spot)?;
        if index == 0 && is_led && messages.get(first).is_some_and(|message| message.role == "system") {
            let problem = format!("a row has both \"system\" and a system message in {spot}; keep one");
            return Err(Error::row(format!("/{key}/0"), problem));
        }
    }
    Ok(())
}

/// What a written role stands for.
enum Role {
    /// A role of the chat template.
    Is(&'static str),
    /// An assistant whose content is a call of a tool.
    Call,
}

fn role_of(written: &str) -> Option<Role> {
    let role = match written {
        "user" | "human" | "prompter" => "user",
        "assistant" | "gpt" | "bot" | "chatgpt" | "bard" | "bing" | "model" | "ai" => "assistant",
        "system" => "system",
        "developer" => "developer",
        "tool" | "tool_response" | "observation" | "function" | "function_response" | "tool_result"
        | "ipython" => "tool",
        "function_call" | "tool_call" => return Some(Role::Call),
        _ if written.bytes().any(|byte| byte.is_ascii_uppercase()) => {
            return role_of(&written.to_ascii_lowercase());
        }
        _ => return None,
    };
    Some(Role::Is(role))
}

fn push_message(messages: &mut Vec<Message>, message: Value, spot: Spot) -> Result<()> {
    let mut object = match message {
        Value::Object(object) => object,
        other => {
            let found = kind_of(&other);
            return Err(
                spot.error("", format!(" is {found}; expected an object with \"role\" and \"content\""))
            );
        }
    };
    let Some(role_key) = ["role", "from"].into_iter().find(|key| object.contains_key(*key)) else {
        return push_round(messages, object, spot);
    };
    let content_key = ["content", "value"].into_iter().find(|key| object.contains_key(*key));
    let makes_calls = || ["tool_calls", "function_call"].iter().any(|key| object.contains_key(*key));
    let content_key = match content_key {
        Some(key) => key,
        None if makes_calls() => "content",
        None => return Err(missing_key(&object, spot, "content")),
    };
    let written = match object.shift_remove(role_key) {
        Some(Value::String(role)) => role,
        other => {
            let found = kind_of(&other.unwrap_or_default());
            return Err(
                spot.error(&format!("/{role_key}"), format!(".{role_key} is {found}; expected a string"))
            );
        }
    };
    let content = object.shift_remove(content_key).unwrap_or_default();
    let weight = take_weight(&mut object, spot)?;
    let role = match role_of(&written) {
        Some(Role::Is(role)) => role,
        Some(Role::Call) => {
            let call = parse_function_call(object, content, weight, content_key, spot)?;
            add_call(messages, call);
            return Ok(());
        }
        None => {
            return Err(spot.error(
                &format!("/{role_key}"),
                format!(
                    ".{role_key} is \"{written}\"; expected system, user (human), assistant (gpt, bot), \
                     tool (observation, tool_response) or function_call"
                ),
            ));
        }
    };
    if role == "assistant" {
        read_calls(&mut object, spot)?;
    }
    let content = match content {
        Value::Array(parts)
            if role == "assistant" && content::has_part(&parts, &["tool_use", "thinking"]) =>
        {
            content::read_tool_use(parts, &mut object, content_key, spot)?
        }
        Value::Array(parts) if role == "user" && content::has_part(&parts, &["tool_result"]) => {
            return content::push_tool_results(messages, parts, &object, weight, content_key, spot);
        }
        other => Content::read(other, content_key, spot)?,
    };
    let message = Message { role, content: content.text, parts: content.parts, weight, extra: object };
    check_content(&message, content_key, spot)?;
    messages.push(message);
    Ok(())
}

/// Refuses a message that says nothing.
pub(super) fn check_content(message: &Message, content_key: &str, spot: Spot) -> Result<()> {
    let is_blank = message.content.as_deref().is_none_or(|text| text.trim().is_empty());
    if !is_blank || !message.tool_calls().is_empty() {
        return Ok(());
    }
    let path = format!("/{content_key}");
    if message.content.is_none() {
        let problem = format!(".{content_key} is null; expected a string, or tool_calls beside it");
        return Err(spot.error(&path, problem));
    }
    if message.role == "assistant" && message.weight > 0.0 {
        return Err(spot.error(
            &path,
            " is an empty assistant turn, which would teach the model to say nothing; fill it, remove it, or \
             set \"loss\": false on it",
        ));
    }
    Ok(())
}

/// Adds a message that is a call. What the assistant said right before and calls side by side are one turn:
/// it ends where the tools answer.
fn add_call(messages: &mut Vec<Message>, mut call: Message) {
    #[expect(clippy::float_cmp, reason = "weights as the row writes them")]
    let turn = messages
        .last_mut()
        .filter(|last| last.role == "assistant" && last.weight == call.weight && call.extra.len() == 2);
    let Some(turn) = turn else {
        messages.push(call);
        return;
    };
    let verbatim = match (turn.extra.shift_remove(VERBATIM_CALL), call.extra.shift_remove(VERBATIM_CALL)) {
        (Some(Value::String(first)), Some(Value::String(second))) => Some(format!("{first}\n{second}")),
        (None, Some(Value::String(text))) if turn.tool_calls().is_empty() => Some(text),
        _ => None,
    };
    if let Some(Value::Array(calls)) = call.extra.shift_remove("tool_calls") {
        match turn.extra.get_mut("tool_calls") {
            Some(Value::Array(all)) => all.extend(calls),
            _ => {
                turn.extra.insert("tool_calls".to_owned(), Value::Array(calls));
            }
        }
    }
    if let Some(text) = verbatim {
        turn.extra.insert(VERBATIM_CALL.to_owned(), Value::String(text));
    }
}

/// The error for a message without role or content.
pub(super) fn missing_key(object: &Map<String, Value>, spot: Spot, key: &str) -> Error {
    let alias = if key == "role" { "from" } else { "value" };
    spot.error(
        "",
        format!(" has no \"{key}\" (found keys: {}); rename the key to {key} or {alias}", key_list(object)),
    )
}

/// Reads and removes the weights of the field: `loss`, `loss_weight`, `loss_scale`, `weight`, `train`.
pub(super) fn take_weight(object: &mut Map<String, Value>, spot: Spot) -> Result<f32> {
    let mut weight = 1.0;
    for key in ["loss", "loss_weight", "loss_scale", "weight", "train"] {
        let Some(value) = object.shift_remove(key) else { continue };
        let factor = match value {
            Value::Null | Value::Bool(true) => Some(1.0),
            Value::Bool(false) => Some(0.0),
            Value::Number(ref number) => {
                number.as_f64().filter(|number| (0.0..=f64::from(f32::MAX)).contains(number))
            }
            _ => None,
        };
        let Some(factor) = factor else {
            let problem = format!(".{key} is {value}; expected true, false, or a weight of 0 or more");
            return Err(spot.error(&format!("/{key}"), problem));
        };
        #[expect(clippy::cast_possible_truncation, reason = "the loss is computed in 32 bits")]
        let factor = factor as f32;
        weight *= factor;
    }
    Ok(weight)
}
