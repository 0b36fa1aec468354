//! The layouts of a row, told apart by its keys.

use std::fmt;

use serde_json::{Map, Value};

use super::{is_given, key_list, kind_of};
use crate::{Error, Result};

/// The keys that name a question, in the order in which they are looked for.
pub const QUERY_KEYS: [&str; 6] = ["query", "prompt", "input", "instruction", "question", "problem"];
/// The keys that name an answer, in the order in which they are looked for.
pub const RESPONSE_KEYS: [&str; 11] = [
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "completion",
    "text",
    "content",
];
/// The keys that name a document where nothing names a question.
const DOCUMENT_KEYS: [&str; 3] = ["text", "response", "content"];
/// Keys beside a document that make it a question rather than a document.
const NOT_A_DOCUMENT: [&str; 3] = ["code", "label", "summary"];
/// What preference data carries beside the answer to train on.
const PREFERENCE_KEYS: [&str; 7] =
    ["chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag", "margin"];

/// The layout of a row; fixed for a file by its first row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `{"messages": [{"role", "content"}]}`, or the bare list.
    Messages,
    /// `{"conversations": [{"from", "value"}]}`.
    ShareGpt,
    /// `{"conversation": [{"human", "assistant"}]}`.
    Rounds,
    /// `{"prompt": [{"role", "content"}], "completion": [{"role", "content"}]}`: the completion is trained.
    PromptCompletion,
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
            Self::Rounds => "conversation rounds (human, assistant)",
            Self::PromptCompletion => "prompt and completion as messages",
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
        if object.get("conversation").is_some_and(Value::is_array) {
            return Ok(Self::Rounds);
        }
        let query = first_key(object, &QUERY_KEYS);
        if let Some(response) = first_key(object, &RESPONSE_KEYS) {
            if has("instruction") {
                return Ok(Self::Alpaca);
            }
            if let Some(query) = query {
                let is_list = object.get(query).is_some_and(Value::is_array);
                return Ok(if is_list { Self::PromptCompletion } else { Self::QueryResponse });
            }
            // a message that lies open in the file is no document
            let is_message = response == "content" && (has("role") || has("from"));
            if DOCUMENT_KEYS.contains(&response) && !is_message {
                return match NOT_A_DOCUMENT.iter().find(|key| has(key)) {
                    Some(other) if response != "response" => Err(Error::row(
                        "",
                        format!(
                            "a row has both \"{response}\" and \"{other}\", so it may be a document or a question and \
                             its answer; rename them to query and response, or remove \"{other}\""
                        ),
                    )),
                    _ => Ok(Self::Text),
                };
            }
        }
        let known = match preference_remedy(object) {
            Some(remedy) => format!("has preferences but no answer to train on; {remedy}"),
            None => "is in none of the known shapes; expected messages, conversations, instruction+output, \
                     query+response or text"
                .to_owned(),
        };
        Err(Error::row("", format!("a row with the keys {} {known}", key_list(object))))
    }

    /// What `row` carries and is not trained: preferences, and second names of its question or answer.
    ///
    /// Keys that no shape knows (`id`, `source`) are not among them.
    pub fn ignored_keys(row: &Value) -> Vec<&'static str> {
        let (Ok(shape), Value::Object(object)) = (Self::detect(row), row) else { return Vec::new() };
        let query = first_key(object, &QUERY_KEYS);
        let response = first_key(object, shape.response_keys());
        let is_read = |key: &str| match shape {
            Self::Messages | Self::ShareGpt | Self::Rounds => false,
            Self::Alpaca => Some(key) == response || matches!(key, "instruction" | "input" | "history"),
            Self::QueryResponse | Self::PromptCompletion => {
                Some(key) == response || Some(key) == query || key == "history"
            }
            Self::Text => Some(key) == response,
        };
        let mut ignored: Vec<&'static str> = PREFERENCE_KEYS
            .into_iter()
            .chain(QUERY_KEYS)
            .chain(RESPONSE_KEYS)
            .chain(["history"])
            .chain((shape == Self::Text).then_some(["system", "tools", "channel"]).into_iter().flatten())
            .filter(|key| is_given(object.get(*key)) && !is_read(key))
            .collect();
        let answers = response.filter(|key| is_read(key)).and_then(|key| object.get(key));
        let is_choice = |answers: &Vec<Value>| answers.len() > 1 && answers.iter().all(Value::is_string);
        if answers.and_then(Value::as_array).is_some_and(is_choice) {
            ignored.push("all answers but the first");
        }
        ignored
    }

    /// The keys that name the answer or the document, in order.
    pub(super) fn response_keys(self) -> &'static [&'static str] {
        if self == Self::Text { &DOCUMENT_KEYS } else { &RESPONSE_KEYS }
    }
}

/// The first of `keys` that `object` has.
pub(super) fn first_key(object: &Map<String, Value>, keys: &'static [&'static str]) -> Option<&'static str> {
    keys.iter().copied().find(|key| object.contains_key(*key))
}

/// How to train on a row that has preferences and no answer.
pub(super) fn preference_remedy(object: &Map<String, Value>) -> Option<String> {
    let chosen = object.get("chosen")?;
    let list = ["messages", "conversations", "conversation", "prompt", "query"]
        .into_iter()
        .find(|key| object.get(*key).is_some_and(Value::is_array));
    let columns = match (chosen, list) {
        (Value::Array(_) | Value::Object(_), Some("prompt" | "query")) => "chosen=completion".to_owned(),
        (_, Some(list)) => format!("{list}=prompt,chosen=completion"),
        (Value::Array(_), None) => "chosen=messages".to_owned(),
        _ => "chosen=response".to_owned(),
    };
    Some(format!("SFT needs one answer, so pass --columns {columns}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Shape;

    fn shape(row: &Value) -> String {
        Shape::detect(row).map_or_else(|error| error.to_string(), |shape| shape.to_string())
    }

    #[test]
    fn every_layout_is_told_by_its_keys() {
        let rounds = json!([{"human": "q", "assistant": "a"}]);
        let messages = json!([{"role": "user", "content": "q"}]);
        for (row, expected) in [
            (json!({"messages": messages, "response": "x"}), "messages"),
            (messages.clone(), "messages"),
            (json!({"conversations": [], "messages": []}), "messages"),
            (json!({"conversations": []}), "ShareGPT conversations"),
            (json!({"system": "s", "conversation": rounds}), "conversation rounds (human, assistant)"),
            (json!({"prompt": messages, "completion": messages}), "prompt and completion as messages"),
            (json!({"prompt": "q", "completion": "a"}), "query/response"),
            (json!({"question": "q", "answer": "a"}), "query/response"),
            (json!({"problem": "q", "content": "a"}), "query/response"),
            (json!({"prompt": "q", "text": "a"}), "query/response"),
            (json!({"instruction": "i", "input": "x", "output": "y"}), "Alpaca (instruction, input, output)"),
            (json!({"response": "a", "label": true}), "plain text"),
            (json!({"text": "a", "id": 1}), "plain text"),
            (json!({"content": "a", "title": "t"}), "plain text"),
        ] {
            assert_eq!(shape(&row), expected, "{row}");
        }
    }

    #[test]
    fn what_may_be_meant_otherwise_is_refused() {
        for (row, expected) in [
            (json!(3), "a row is a number; expected a JSON object"),
            (json!({"output": "a"}), "a row with the keys output is in none of the known shapes"),
            (json!({"role": "user", "content": "a"}), "a row with the keys role, content is in none"),
            (json!({"text": "a", "code": "b"}), "a row has both \"text\" and \"code\""),
        ] {
            assert!(shape(&row).contains(expected), "{row}: {}", shape(&row));
        }
    }

    #[test]
    fn a_preference_row_says_how_to_train_on_the_chosen_answer() {
        let list = json!([{"role": "user", "content": "q"}]);
        for (row, remedy) in [
            (json!({"prompt": "q", "chosen": "a", "rejected": "b"}), "--columns chosen=response"),
            (json!({"chosen": list, "rejected": list}), "--columns chosen=messages"),
            (json!({"prompt": list, "chosen": list, "rejected": list}), "--columns chosen=completion"),
        ] {
            let message = shape(&row);
            assert!(message.ends_with(&format!("SFT needs one answer, so pass {remedy}")), "{message}");
        }
    }

    #[test]
    fn what_is_not_trained_is_named() {
        for (row, expected) in [
            (
                json!({"query": "q", "response": "a", "rejected_response": "b", "id": 1}),
                vec!["rejected_response"],
            ),
            (json!({"messages": [], "label": false, "kto_tag": null}), vec!["label"]),
            (json!({"messages": [], "prompt": "q"}), vec!["prompt"]),
            (json!({"problem": "p", "solution": "s", "answer": "a"}), vec!["solution"]),
            (json!({"instruction": "i", "input": "x", "output": "y", "text": "t"}), vec!["text"]),
            (json!({"query": "q", "answers": ["a", "b"]}), vec!["all answers but the first"]),
            (json!({"query": "q", "response": "a", "history": [["q", "a"]]}), vec![]),
            (json!({"text": "t", "channel": "math"}), vec!["channel"]),
            (json!({"id": 1}), vec![]),
        ] {
            assert_eq!(Shape::ignored_keys(&row), expected, "{row}");
        }
    }
}
