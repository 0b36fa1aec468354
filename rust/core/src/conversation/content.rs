//! Content that is a list of parts.
//!
//! Text parts are joined, and stay as parts for templates that take a list. The parts of Anthropic become
//! what chat templates know: `tool_use` a call, `thinking` the reasoning, `tool_result` a message of a tool.

use serde_json::{Map, Value, json};

use super::message::Spot;
use super::{Message, kind_of};
use crate::{Error, Result};

/// The content of one message.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// The text; `None` is JSON `null`.
    pub(super) text: Option<String>,
    /// The text parts, where the row has them.
    pub(super) parts: Option<Vec<Value>>,
}

impl Content {
    /// Reads a string, `null`, or a list of text parts.
    pub(super) fn read(content: Value, content_key: &str, spot: Spot) -> Result<Self> {
        match content {
            Value::String(text) => Ok(Self { text: Some(text), parts: None }),
            Value::Null => Ok(Self::default()),
            Value::Array(parts) => {
                let (text, parts) =
                    join_parts(parts).map_err(|problem| at_part(&problem, content_key, spot))?;
                Ok(Self { text: Some(text), parts: Some(parts) })
            }
            other => {
                let problem = format!(" has content that is {}; expected a string", kind_of(&other));
                Err(spot.error(&format!("/{content_key}"), problem))
            }
        }
    }
}

/// A part that is not text: its place and its type.
pub(super) struct NotText {
    pub(super) index: usize,
    pub(super) kind: String,
}

fn at_part(problem: &NotText, content_key: &str, spot: Spot) -> Error {
    spot.error(
        &format!("/{content_key}/{}", problem.index),
        format!(" has a content part of type \"{}\"; sftcore trains on text parts only", problem.kind),
    )
}

/// The text of `parts`, and the parts as chat templates read them: their text under `text`, whatever the
/// row calls it.
pub(super) fn join_parts(parts: Vec<Value>) -> Result<(String, Vec<Value>), NotText> {
    let mut joined = String::new();
    let parts = parts.into_iter().enumerate().map(|(index, part)| {
        let (text, part) = read_part(part).map_err(|kind| NotText { index, kind })?;
        joined.push_str(&text);
        Ok(part)
    });
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    Ok((joined, parts))
}

/// The text of a text part and the part itself, or the type of another part.
fn read_part(part: Value) -> Result<(String, Value), String> {
    let mut object = match part {
        Value::String(text) => {
            let part = json!({"type": "text", "text": text});
            return Ok((text, part));
        }
        Value::Object(object) => object,
        other => return Err(kind_of(&other).to_owned()),
    };
    let kind = object.get("type").and_then(Value::as_str).unwrap_or("text");
    if !matches!(kind, "text" | "input_text" | "output_text") {
        return Err(kind.to_owned());
    }
    let text_of = |key: &str| object.get(key).and_then(Value::as_str).map(str::to_owned);
    let Some(text) = text_of("text").or_else(|| text_of("value")) else { return Err(kind.to_owned()) };
    if kind != "text" || object.contains_key("value") {
        object.shift_remove("value");
        object.insert("type".to_owned(), "text".into());
        object.insert("text".to_owned(), text.as_str().into());
    }
    Ok((text, Value::Object(object)))
}

/// Whether one of `parts` is of one of `kinds`.
pub(super) fn has_part(parts: &[Value], kinds: &[&str]) -> bool {
    parts.iter().any(|part| kinds.contains(&part_kind(part)))
}

fn part_kind(part: &Value) -> &str {
    part.get("type").and_then(Value::as_str).unwrap_or("text")
}

/// An assistant's `text`, `thinking` and `tool_use` parts: the text, with reasoning and calls in `object`.
pub(super) fn read_tool_use(
    parts: Vec<Value>,
    object: &mut Map<String, Value>,
    content_key: &str,
    spot: Spot,
) -> Result<Content> {
    let (mut text, mut reasoning, mut calls) = (String::new(), Vec::new(), Vec::new());
    for (index, mut part) in parts.into_iter().enumerate() {
        let path = format!("/{content_key}/{index}");
        match part_kind(&part) {
            "thinking" => match part.get("thinking").and_then(Value::as_str) {
                Some(thinking) => reasoning.push(thinking.to_owned()),
                None => return Err(spot.error(&path, " has a thinking part without \"thinking\"")),
            },
            "tool_use" => {
                let Some(name) = part.get("name").and_then(Value::as_str).map(str::to_owned) else {
                    let problem = " has a tool_use part without \"name\"; expected id, name and input";
                    return Err(spot.error(&path, problem));
                };
                let input = match part.get_mut("input").map(Value::take) {
                    None | Some(Value::Null) => Value::Object(Map::new()),
                    Some(input @ Value::Object(_)) => input,
                    Some(other) => {
                        let problem = format!(
                            " has a tool_use part whose input is {}; expected an object",
                            kind_of(&other)
                        );
                        return Err(spot.error(&path, problem));
                    }
                };
                let mut call = Map::new();
                if let Some(id) = part.get("id") {
                    call.insert("id".to_owned(), id.clone());
                }
                call.insert("type".to_owned(), "function".into());
                call.insert("function".to_owned(), json!({"name": name, "arguments": input}));
                calls.push(Value::Object(call));
            }
            _ => {
                let (piece, _) =
                    read_part(part).map_err(|kind| at_part(&NotText { index, kind }, content_key, spot))?;
                if !calls.is_empty() && !piece.trim().is_empty() {
                    let problem = " has text after a tool_use part, which no chat template can show; \
                                   put the text first or into a message of its own";
                    return Err(spot.error(&path, problem));
                }
                text.push_str(&piece);
            }
        }
    }
    for (key, value) in [
        ("reasoning_content", (!reasoning.is_empty()).then(|| reasoning.join("\n").into())),
        ("tool_calls", (!calls.is_empty()).then(|| Value::Array(calls))),
    ] {
        let Some(value) = value else { continue };
        if object.get(key).is_some_and(|given| !given.is_null()) {
            return Err(spot.error(
                &format!("/{key}"),
                format!(" has both \"{key}\" and content parts for it; keep one"),
            ));
        }
        object.insert(key.to_owned(), value);
    }
    let is_call_alone = text.is_empty() && object.contains_key("tool_calls");
    Ok(Content { text: (!is_call_alone).then_some(text), parts: None })
}

/// A user's `tool_result` and text parts: a message of the tool for each result, and one of the user for each
/// run of text, in the order in which they are written.
pub(super) fn push_tool_results(
    messages: &mut Vec<Message>,
    parts: Vec<Value>,
    object: &Map<String, Value>,
    weight: f32,
    content_key: &str,
    spot: Spot,
) -> Result<()> {
    let mut said: Option<String> = None;
    let user = |text: String| Message { weight, extra: object.clone(), ..Message::new("user", text) };
    for (index, part) in parts.into_iter().enumerate() {
        let at = |kind| at_part(&NotText { index, kind }, content_key, spot);
        match part {
            Value::Object(mut part) if part.get("type").is_some_and(|kind| kind == "tool_result") => {
                messages.extend(said.take().filter(|text| !text.trim().is_empty()).map(user));
                let text = match part.shift_remove("content").unwrap_or_default() {
                    Value::Null => String::new(),
                    Value::String(text) => text,
                    Value::Array(parts) => join_parts(parts).map_err(|problem| at(problem.kind))?.0,
                    other => return Err(at(format!("tool_result whose content is {}", kind_of(&other)))),
                };
                part.shift_remove("type");
                let mut result = Message::new("tool", text);
                result.weight = weight;
                let call_id = |key| if key == "tool_use_id" { "tool_call_id".to_owned() } else { key };
                result.extra = part.into_iter().map(|(key, value)| (call_id(key), value)).collect();
                messages.push(result);
            }
            part => {
                let (text, _) = read_part(part).map_err(at)?;
                said.get_or_insert_default().push_str(&text);
            }
        }
    }
    messages.extend(said.filter(|text| !text.trim().is_empty()).map(user));
    Ok(())
}
