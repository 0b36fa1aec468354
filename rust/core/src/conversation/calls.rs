//! Calls of tools, in the layouts of the field, as the `tool_calls` that chat templates read.
//!
//! Arguments stay as the row has them, a JSON text or an object: which of the two a template takes is the
//! template's matter.

use serde_json::{Map, Value, json};

use super::message::Spot;
use super::{Message, kind_of, parse_json};
use crate::Result;

/// Where a `function_call` message keeps the text of its call, for templates that cannot render one.
pub(crate) const VERBATIM_CALL: &str = "\u{0}function_call";

/// `ShareGPT`'s `function_call`: a JSON text with `name` and `arguments`, kept verbatim beside its parsed form.
pub(super) fn parse_function_call(
    mut object: Map<String, Value>,
    content: Value,
    weight: f32,
    content_key: &str,
    spot: Spot,
) -> Result<Message> {
    let path = format!("/{content_key}");
    let text = match content {
        Value::String(text) => text,
        call @ (Value::Object(_) | Value::Array(_)) => call.to_string(),
        other => {
            let problem = format!(" is a function call whose text is {}", kind_of(&other));
            return Err(spot.error(&path, problem));
        }
    };
    let calls = match parse_json(text.as_bytes()) {
        Ok(Value::Array(calls)) if !calls.is_empty() => calls,
        Ok(call) => vec![call],
        Err(error) => {
            let reason = error.message.trim_start_matches("not JSON: ").to_owned();
            return Err(spot.error(&path, format!(" is a function call that is not JSON: {reason}")));
        }
    };
    if let Some(call) = calls.iter().find(|call| !call.get("name").is_some_and(Value::is_string)) {
        let problem = format!(
            " is a function call without a \"name\": {}; expected name and arguments",
            excerpt(&call.to_string())
        );
        return Err(spot.error(&path, problem));
    }
    let calls = calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect();
    object.insert("tool_calls".to_owned(), Value::Array(calls));
    object.insert(VERBATIM_CALL.to_owned(), Value::String(text));
    Ok(Message { role: "assistant", content: None, parts: None, weight, extra: object })
}

/// Brings `tool_calls` and the older `function_call` of an assistant message into one list, and checks it.
pub(super) fn read_calls(object: &mut Map<String, Value>, spot: Spot) -> Result<()> {
    if let Some(call) = object.shift_remove("function_call").filter(|call| !call.is_null()) {
        if object.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
            return Err(
                spot.error("/function_call", " has both \"tool_calls\" and \"function_call\"; keep one")
            );
        }
        object.insert("tool_calls".to_owned(), json!([{"type": "function", "function": call}]));
    }
    if let Some(Value::String(text)) = object.get("tool_calls")
        && let Ok(calls @ Value::Array(_)) = parse_json(text.as_bytes())
    {
        object.insert("tool_calls".to_owned(), calls);
    }
    if object.get("tool_calls").is_some_and(Value::is_null) {
        // not in the text either, as in Transformers
        object.shift_remove("tool_calls");
    }
    let calls = match object.get("tool_calls") {
        None => return Ok(()),
        Some(Value::Array(calls)) => calls,
        Some(other) => {
            let problem = format!(".tool_calls is {}; expected a list of calls", kind_of(other));
            return Err(spot.error("/tool_calls", problem));
        }
    };
    for (index, call) in calls.iter().enumerate() {
        let function = call.get("function").unwrap_or(call);
        let path = format!("/tool_calls/{index}");
        if !function.get("name").is_some_and(Value::is_string) {
            let problem = format!(
                ".tool_calls[{index}] has no \"name\": {}; expected {{\"function\": {{\"name\", \"arguments\"}}}}",
                excerpt(&call.to_string())
            );
            return Err(spot.error(&path, problem));
        }
        match function.get("arguments") {
            None | Some(Value::Null | Value::String(_) | Value::Object(_)) => {}
            Some(other) => {
                let problem = format!(
                    ".tool_calls[{index}] has arguments that are {}; expected an object or its JSON text",
                    kind_of(other)
                );
                return Err(spot.error(&path, problem));
            }
        }
    }
    Ok(())
}

/// The tool schemas of a row, as a list; those of Anthropic (`input_schema`) as functions.
pub(super) fn parse_tools(tools: Option<Value>) -> Result<Option<Value>> {
    let wrong = |found: &str| {
        crate::Error::row("/tools", format!("\"tools\" is {found}; expected a list of tool schemas"))
    };
    let list = match tools {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => match parse_json(text.as_bytes()) {
            Ok(Value::Array(list)) => list,
            _ => return Err(wrong("a string that is not a JSON list")),
        },
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(kind_of(&other))),
    };
    let list = list.into_iter().map(|tool| match tool {
        Value::String(text) => {
            parse_json(text.as_bytes()).map_err(|_| wrong("a list with a string that is not JSON"))
        }
        Value::Object(tool) if tool.contains_key("input_schema") && !tool.contains_key("parameters") => {
            let parameters = |key| if key == "input_schema" { "parameters".to_owned() } else { key };
            let function: Map<String, Value> =
                tool.into_iter().map(|(key, value)| (parameters(key), value)).collect();
            Ok(json!({"type": "function", "function": function}))
        }
        tool => Ok(tool),
    });
    let list = list.collect::<Result<Vec<_>>>()?;
    Ok((!list.is_empty()).then_some(Value::Array(list)))
}

/// The start of a text that an error quotes.
fn excerpt(text: &str) -> String {
    let mut letters = text.chars();
    let start: String = letters.by_ref().take(120).collect();
    if letters.next().is_some() { format!("{start}…") } else { start }
}
