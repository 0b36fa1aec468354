//! One message of a row: its role, its content, its calls of tools and its weight.

use serde_json::{Map, Value};

use super::{Message, key_list, kind_of};
use crate::{Error, Result};

pub(super) fn push_messages(
    messages: &mut Vec<Message>,
    mut object: Map<String, Value>,
    key: &str,
) -> Result<()> {
    let list = match object.shift_remove(key) {
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(Error::row(
                format!("/{key}"),
                format!("\"{key}\" is {}; expected a list of messages", kind_of(&other)),
            ));
        }
        None => return Err(Error::row("", format!("a row has no \"{key}\""))),
    };
    if list.is_empty() {
        return Err(Error::row(format!("/{key}"), format!("\"{key}\" is an empty list; remove the row")));
    }
    let leading_system = messages.pop();
    for (index, message) in list.into_iter().enumerate() {
        let pointer = format!("/{key}/{index}");
        messages.push(parse_message(message, &format!("{key}[{index}]"), &pointer)?);
    }
    if let Some(system) = leading_system {
        if messages[0].role == "system" {
            return Err(Error::row(
                format!("/{key}/0"),
                format!("a row has both \"system\" and a system message in {key}[0]; keep one"),
            ));
        }
        messages.insert(0, system);
    }
    Ok(())
}

fn parse_message(message: Value, name: &str, pointer: &str) -> Result<Message> {
    let Value::Object(mut object) = message else {
        return Err(Error::row(
            pointer,
            format!("{name} is {}; expected an object with \"role\" and \"content\"", kind_of(&message)),
        ));
    };
    let Some(role_key) = ["role", "from"].into_iter().find(|key| object.contains_key(*key)) else {
        return Err(missing_key(&object, name, pointer, "role"));
    };
    let Some(content_key) = ["content", "value"].into_iter().find(|key| object.contains_key(*key)) else {
        if object.contains_key("tool_calls") {
            object.insert("content".to_owned(), Value::Null);
            return parse_message(Value::Object(object), name, pointer);
        }
        return Err(missing_key(&object, name, pointer, "content"));
    };
    let written = match object.shift_remove(role_key) {
        Some(Value::String(role)) => role,
        other => {
            let found = kind_of(&other.unwrap_or_default());
            return Err(Error::row(
                format!("{pointer}/{role_key}"),
                format!("{name}.{role_key} is {found}; expected a string"),
            ));
        }
    };
    let role = match written.as_str() {
        "system" => "system",
        "developer" => "developer",
        "user" | "human" => "user",
        "assistant" | "gpt" | "bot" => "assistant",
        "tool" | "tool_response" | "observation" => "tool",
        "function_call" | "tool_call" => return parse_function_call(object, content_key, name, pointer),
        _ => {
            return Err(Error::row(
                format!("{pointer}/{role_key}"),
                format!(
                    "{name}.{role_key} is \"{written}\"; expected system, user (human), assistant (gpt, bot), \
                     tool (observation, tool_response) or function_call"
                ),
            ));
        }
    };
    let written = object.shift_remove(content_key);
    let parts = written.as_ref().and_then(Value::as_array).map(|parts| parts.iter().map(text_part).collect());
    let content = parse_content(written, name, &format!("{pointer}/{content_key}"))?;
    let weight = take_weight(&mut object, name, pointer)?;
    let calls = object.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
    if content.as_deref().is_none_or(|text| text.trim().is_empty()) {
        if content.is_none() && !calls {
            return Err(Error::row(
                format!("{pointer}/{content_key}"),
                format!("{name}.{content_key} is null; expected a string, or tool_calls beside it"),
            ));
        }
        if role == "assistant" && !calls && weight > 0.0 {
            return Err(Error::row(
                format!("{pointer}/{content_key}"),
                format!(
                    "{name} is an empty assistant turn, which would teach the model to say nothing; fill it, \
                     remove it, or set \"loss\": false on it"
                ),
            ));
        }
    }
    Ok(Message { role, content, parts, weight, extra: object })
}

fn missing_key(object: &Map<String, Value>, name: &str, pointer: &str, key: &str) -> Error {
    let alias = if key == "role" { "from" } else { "value" };
    Error::row(
        pointer,
        format!(
            "{name} has no \"{key}\" (found keys: {}); rename the key to {key} or {alias}",
            key_list(object)
        ),
    )
}

/// `ShareGPT`'s `function_call`: a JSON text with `name` and `arguments`, kept verbatim beside its parsed form.
fn parse_function_call(
    mut object: Map<String, Value>,
    content_key: &str,
    name: &str,
    pointer: &str,
) -> Result<Message> {
    let pointer = format!("{pointer}/{content_key}");
    let text = match object.shift_remove(content_key) {
        Some(Value::String(text)) => text,
        Some(call @ Value::Object(_)) => call.to_string(),
        other => {
            let found = kind_of(&other.unwrap_or_default());
            return Err(Error::row(pointer, format!("{name} is a function call whose text is {found}")));
        }
    };
    let calls = match serde_json::from_str(&text) {
        Ok(Value::Array(calls)) => calls,
        Ok(call) => vec![call],
        Err(error) => {
            return Err(Error::row(pointer, format!("{name} is a function call that is not JSON: {error}")));
        }
    };
    if let Some(call) = calls.iter().find(|call| !call.get("name").is_some_and(Value::is_string)) {
        return Err(Error::row(
            pointer,
            format!("{name} is a function call without a \"name\": {call}; expected name and arguments"),
        ));
    }
    let calls =
        calls.into_iter().map(|call| serde_json::json!({"type": "function", "function": call})).collect();
    let weight = take_weight(&mut object, name, &pointer)?;
    object.insert("tool_calls".to_owned(), Value::Array(calls));
    object.insert(VERBATIM_CALL.to_owned(), Value::String(text));
    Ok(Message { role: "assistant", content: None, parts: None, weight, extra: object })
}

/// Where a `function_call` message keeps the text of its call, for templates that cannot render one.
pub(crate) const VERBATIM_CALL: &str = "\u{0}function_call";

fn parse_content(content: Option<Value>, name: &str, pointer: &str) -> Result<Option<String>> {
    match content {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
                let piece = ["text", "value"].iter().find_map(|key| part.get(*key).and_then(Value::as_str));
                match piece {
                    Some(piece) if kind == "text" => text.push_str(piece),
                    _ => {
                        return Err(Error::row(
                            format!("{pointer}/{index}"),
                            format!(
                                "{name} has a content part of type \"{kind}\"; sftcore trains on text parts only"
                            ),
                        ));
                    }
                }
            }
            Ok(Some(text))
        }
        Some(other) => Err(Error::row(
            pointer,
            format!("{name} has content that is {}; expected a string", kind_of(&other)),
        )),
    }
}

/// A text part as chat templates read it: its text under `text`, whatever the row calls it.
fn text_part(part: &Value) -> Value {
    let mut part = part.clone();
    if let Value::Object(object) = &mut part
        && let Some(value) = object.shift_remove("value")
    {
        object.insert("type".to_owned(), "text".into());
        object.insert("text".to_owned(), value);
    }
    part
}

/// Reads and removes the per-message weights of the field: `loss`, `loss_weight`, `loss_scale`, `weight`.
fn take_weight(object: &mut Map<String, Value>, name: &str, pointer: &str) -> Result<f32> {
    let mut weight = 1.0;
    for key in ["loss", "loss_weight", "loss_scale", "weight"] {
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
            return Err(Error::row(
                format!("{pointer}/{key}"),
                format!("{name}.{key} is {value}; expected true, false, or a weight of 0 or more"),
            ));
        };
        #[expect(clippy::cast_possible_truncation, reason = "the loss is computed in 32 bits")]
        let factor = factor as f32;
        weight *= factor;
    }
    Ok(weight)
}
