//! Rows and rounds that name a question and its answer.
//!
//! `query`, `response` and all their aliases, Alpaca's `instruction` and `input`, `history`, and the
//! rounds of a `conversation` list; each becomes a message of the user and one of the assistant.

use serde_json::{Map, Value};

use super::content::join_parts;
use super::literal::parse_literal;
use super::message::{Spot, check_content, missing_key, push_messages, take_list, take_weight};
use super::shape::first_key;
use super::{Message, QUERY_KEYS, RESPONSE_KEYS, Row, SYSTEM_KEYS, Shape, kind_of};
use crate::{Error, Result};

/// Keys of a round's question, beside those of a row.
const ROUND_QUERY_KEYS: [&str; 2] = ["human", "user"];
/// Keys of a round's answer, beside those of a row.
const ROUND_RESPONSE_KEYS: [&str; 3] = ["assistant", "gpt", "bot"];

/// The document of a row.
pub(super) fn parse_document(mut object: Map<String, Value>) -> Result<Row> {
    let key = first_key(&object, Shape::Text.response_keys()).unwrap_or("text");
    let text = string_at(object.shift_remove(key), key)?;
    if text.trim().is_empty() {
        return Err(Error::row(format!("/{key}"), format!("\"{key}\" is empty; remove the row")));
    }
    Ok(Row::Text(text))
}

/// Adds the messages of a question, its answer, and the rounds before.
pub(super) fn push_query(
    messages: &mut Vec<Message>,
    mut object: Map<String, Value>,
    shape: Shape,
) -> Result<()> {
    push_history(messages, object.shift_remove("history"))?;
    let response_key = first_key(&object, &RESPONSE_KEYS).unwrap_or("response");
    let response = object.shift_remove(response_key);
    let query = if shape == Shape::Alpaca {
        let instruction = string_at(object.shift_remove("instruction"), "instruction")?;
        match object.shift_remove("input") {
            None | Some(Value::Null) => instruction,
            Some(Value::String(input)) if input.is_empty() => instruction,
            Some(Value::String(input)) => format!("{instruction}\n{input}"),
            other => string_at(other, "input")?,
        }
    } else {
        let key = first_key(&object, &QUERY_KEYS).unwrap_or("query");
        string_at(object.shift_remove(key), key)?
    };
    messages.push(Message::new("user", query));
    messages.push(Message::new("assistant", answer_at(response, response_key)?));
    Ok(())
}

/// Adds a prompt, whose assistant turns are not trained, and its completion.
pub(super) fn push_prompt(messages: &mut Vec<Message>, mut object: Map<String, Value>) -> Result<()> {
    push_history(messages, object.shift_remove("history"))?;
    let prompt_key = first_key(&object, &QUERY_KEYS).unwrap_or("prompt");
    let prompt = take_list(&mut object, prompt_key)?;
    push_messages(messages, prompt, prompt_key)?;
    for message in messages.iter_mut().filter(|message| message.role == "assistant") {
        message.weight = 0.0;
    }
    let key = first_key(&object, &RESPONSE_KEYS).unwrap_or("completion");
    let completion = match object.shift_remove(key) {
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_object) => list,
        Some(message @ Value::Object(_)) => vec![message],
        other => {
            messages.push(Message::new("assistant", answer_at(other, key)?));
            return Ok(());
        }
    };
    // on its own, so that a call cannot join a turn of the prompt, which is not trained
    let mut completed = Vec::new();
    push_messages(&mut completed, completion, key)?;
    if !completed.iter().any(|message| message.role == "assistant") {
        return Err(Error::row(
            format!("/{key}"),
            format!("\"{key}\" has no assistant turn to train on; a completion is what the assistant says"),
        ));
    }
    messages.append(&mut completed);
    Ok(())
}

/// The keys of a round's question and answer.
fn round_keys(object: &Map<String, Value>) -> Option<(&'static str, &'static str)> {
    let query = first_key(object, &ROUND_QUERY_KEYS).or_else(|| first_key(object, &QUERY_KEYS));
    // `text` and `content` belong to messages
    let response = || first_key(object, &RESPONSE_KEYS).filter(|key| !matches!(*key, "text" | "content"));
    query.zip(first_key(object, &ROUND_RESPONSE_KEYS).or_else(response))
}

/// Adds one round of a list: `{"human", "assistant"}`, its aliases, and a `system` of its own.
pub(super) fn push_round(
    messages: &mut Vec<Message>,
    mut object: Map<String, Value>,
    spot: Spot,
) -> Result<()> {
    let Some((query_key, response_key)) = round_keys(&object) else {
        return Err(missing_key(&object, spot, "role"));
    };
    let weight = take_weight(&mut object, spot)?;
    let mut take = |key: &str| match object.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        other => {
            let found = kind_of(&other.unwrap_or_default());
            Err(spot.error(&format!("/{key}"), format!(".{key} is {found}; expected a string")))
        }
    };
    let (query, response) = (take(query_key)?, take(response_key)?);
    if let Some(system) = SYSTEM_KEYS.into_iter().find_map(|key| object.shift_remove(key)) {
        match system {
            Value::Null => {}
            Value::String(text) if text.is_empty() => {}
            Value::String(text) => messages.push(Message::new("system", text)),
            other => {
                let problem = format!(".system is {}; expected a string", kind_of(&other));
                return Err(spot.error("/system", problem));
            }
        }
    }
    messages.push(Message::new("user", query));
    let answer = Message { weight, ..Message::new("assistant", response) };
    check_content(&answer, response_key, spot)?;
    messages.push(answer);
    Ok(())
}

fn push_history(messages: &mut Vec<Message>, history: Option<Value>) -> Result<()> {
    let wrong = |pointer: String| {
        Error::row(
            pointer,
            "\"history\" is not a list of [query, response] pairs or {query, response} objects",
        )
    };
    let history = match history {
        Some(Value::String(text)) => parse_literal(&text).ok_or_else(|| {
            let problem = "\"history\" is a string that is neither a JSON nor a Python list; expected a list of \
                           [query, response] pairs";
            Error::row("/history", problem)
        })?,
        history => history.unwrap_or_default(),
    };
    let rounds = match history {
        Value::Null => return Ok(()),
        Value::Array(rounds) => rounds,
        _ => return Err(wrong("/history".to_owned())),
    };
    let is_message = |round: &Value| round.get("role").or_else(|| round.get("from")).is_some();
    if rounds.first().is_some_and(is_message) {
        return push_messages(messages, rounds, "history");
    }
    for (index, round) in rounds.into_iter().enumerate() {
        let spot = Spot { list: "history", index };
        match round {
            Value::Array(pair) => match <[Value; 2]>::try_from(pair) {
                Ok([Value::String(query), Value::String(response)]) => {
                    messages.push(Message::new("user", query));
                    let answer = Message::new("assistant", response);
                    check_content(&answer, "1", spot)?;
                    messages.push(answer);
                }
                _ => return Err(wrong(format!("/history/{index}"))),
            },
            Value::Object(round) if round_keys(&round).is_some() => push_round(messages, round, spot)?,
            _ => return Err(wrong(format!("/history/{index}"))),
        }
    }
    Ok(())
}

/// The text of an answer; of several answers the first.
fn answer_at(response: Option<Value>, key: &str) -> Result<String> {
    let response = match response {
        Some(Value::Array(mut answers)) if !answers.is_empty() => Some(answers.swap_remove(0)),
        other => other,
    };
    let response = string_at(response, key)?;
    if response.trim().is_empty() {
        return Err(Error::row(
            format!("/{key}"),
            format!(
                "\"{key}\" is an empty assistant turn, which would teach the model to say nothing; fill it \
                 or remove the row"
            ),
        ));
    }
    Ok(response)
}

fn string_at(value: Option<Value>, key: &str) -> Result<String> {
    match value {
        Some(Value::String(text)) => Ok(text),
        None => Err(Error::row("", format!("a row has no \"{key}\""))),
        Some(other) => {
            Err(Error::row(format!("/{key}"), format!("\"{key}\" is {}; expected a string", kind_of(&other))))
        }
    }
}

/// The system message of a row: a string, or a list of text parts.
pub(super) fn take_system(object: &mut Map<String, Value>) -> Result<Option<String>> {
    for key in SYSTEM_KEYS {
        let text = match object.shift_remove(key) {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) => text,
            Some(Value::Array(parts)) => {
                join_parts(parts)
                    .map_err(|problem| {
                        Error::row(
                            format!("/{key}/{}", problem.index),
                            format!("\"{key}\" has a part of type \"{}\"; expected text parts", problem.kind),
                        )
                    })?
                    .0
            }
            Some(other) => return string_at(Some(other), key).map(Some),
        };
        if !text.is_empty() {
            return Ok(Some(text));
        }
    }
    Ok(None)
}
