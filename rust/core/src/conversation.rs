//! One row of a data file as a conversation.
//!
//! A row is JSON in one of five [`Shape`]s; [`Row::parse`] turns it into messages with the roles and
//! keys of the field (`system`, `user`, `assistant`, `tool`). Everything a chat template could want
//! stays as it was written: unknown keys of a message, key order, numbers. A row that does not fit is
//! an error that points at the offending value.

use std::fmt;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys that name a question, in the order in which they are looked for.
pub const QUERY_KEYS: [&str; 6] = ["query", "prompt", "input", "instruction", "question", "problem"];
/// The keys that name an answer, in the order in which they are looked for.
pub const RESPONSE_KEYS: [&str; 9] =
    ["response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "completion"];
const SYSTEM_KEYS: [&str; 2] = ["system", "system_prompt"];
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

fn push_messages(messages: &mut Vec<Message>, mut object: Map<String, Value>, key: &str) -> Result<()> {
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
