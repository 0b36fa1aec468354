//! The names that a file gives its keys, brought to the names of the field.
//!
//! A row comes in and leaves with its keys renamed, in their order; the rest of the module `conversation`
//! then knows one vocabulary. A name that a row lacks is an error, so that a slip of the pen is not taken
//! for an empty column.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{QUERY_KEYS, RESPONSE_KEYS, SYSTEM_KEYS, key_list, parse_json};
use crate::{Error, ErrorKind, Result};

/// Keys that a column may be renamed to, beside the names of a question, an answer and a system message.
const OTHER_KEYS: [&str; 10] = [
    "messages",
    "conversations",
    "conversation",
    "history",
    "tools",
    "chat_template_kwargs",
    "channel",
    "chosen",
    "rejected",
    "label",
];
/// Keys whose value may be a list of messages.
const LIST_KEYS: [&str; 6] = ["messages", "conversations", "conversation", "prompt", "completion", "history"];

/// What the keys of a file's rows are called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Columns {
    /// The name in the file, and the name it stands for; both are there once.
    names: Vec<(String, String)>,
    tags: Tags,
}

/// What the keys and the roles of a file's messages are called, by the names of LLaMA-Factory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tags {
    /// The key of a message's role.
    pub role_tag: Option<String>,
    /// The key of a message's content.
    pub content_tag: Option<String>,
    /// The role of the user.
    pub user_tag: Option<String>,
    /// The role of the assistant.
    pub assistant_tag: Option<String>,
    /// The role of a tool's result.
    pub observation_tag: Option<String>,
    /// The role of a call of a tool.
    pub function_tag: Option<String>,
    /// The role of the system message.
    pub system_tag: Option<String>,
}

fn wrong(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Config, format!("columns: {message}"))
}

impl Columns {
    /// Reads `{"theirs": "query", "tags": {"role_tag": "speaker"}}`, or `theirs=query,other=response`.
    pub fn parse(text: &str) -> Result<Self> {
        let mut columns = Self::default();
        if text.trim_start().starts_with('{') {
            let object = match parse_json(text.as_bytes()) {
                Ok(Value::Object(object)) => object,
                Ok(_) => return Err(wrong("expected a JSON object, like {\"question\": \"query\"}")),
                Err(error) => return Err(wrong(error)),
            };
            for (theirs, ours) in object {
                match (theirs.as_str(), ours) {
                    ("tags", tags @ Value::Object(_)) => {
                        columns.tags =
                            serde_json::from_value(tags).map_err(|error| wrong(error.to_string()))?;
                    }
                    (_, Value::String(ours)) => columns.add(theirs, ours)?,
                    (_, other) => {
                        return Err(wrong(format!(
                            "\"{theirs}\" is {other}; expected the name that it stands for, like query or response"
                        )));
                    }
                }
            }
        } else {
            for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
                let Some((theirs, ours)) = pair.split_once('=') else {
                    return Err(wrong(format!("\"{pair}\" has no \"=\"; expected name_in_the_file=query")));
                };
                columns.add(theirs.trim().to_owned(), ours.trim().to_owned())?;
            }
        }
        if columns.is_empty() {
            return Err(wrong("no name is given; expected name_in_the_file=query or a JSON object"));
        }
        Ok(columns)
    }

    fn add(&mut self, theirs: String, ours: String) -> Result<()> {
        let mut known = QUERY_KEYS.iter().chain(&RESPONSE_KEYS).chain(&SYSTEM_KEYS).chain(&OTHER_KEYS);
        if !known.any(|key| *key == ours) {
            return Err(wrong(format!(
                "\"{theirs}\" stands for \"{ours}\", which no row has; expected one of query, response, system, \
                 instruction, input, output, {}, text",
                OTHER_KEYS.join(", ")
            )));
        }
        if let Some((other, _)) = self.names.iter().find(|(_, name)| *name == ours) {
            return Err(wrong(format!("both \"{other}\" and \"{theirs}\" stand for \"{ours}\"; keep one")));
        }
        if self.names.iter().any(|(name, _)| *name == theirs) {
            return Err(wrong(format!("\"{theirs}\" is named twice; keep one")));
        }
        self.names.push((theirs, ours));
        Ok(())
    }

    /// Whether nothing is renamed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.tags == Tags::default()
    }

    /// `row` under the names of the field.
    pub fn apply(&self, row: Value) -> Result<Value> {
        match row {
            Value::Object(object) => {
                let mut object = self.rename(object)?;
                for key in LIST_KEYS {
                    if let Some(Value::Array(list)) = object.get_mut(key) {
                        self.tags.apply(list, key, &format!("/{key}"))?;
                    }
                }
                Ok(Value::Object(object))
            }
            Value::Array(mut list) if self.names.is_empty() => {
                self.tags.apply(&mut list, "messages", "")?;
                Ok(Value::Array(list))
            }
            Value::Array(_) => Err(Error::row(
                "",
                "a row is a list of messages, which has no columns to rename; remove --columns",
            )),
            // no row at all; the shape says so
            other => Ok(other),
        }
    }

    fn rename(&self, object: Map<String, Value>) -> Result<Map<String, Value>> {
        if let Some((theirs, ours)) = self.names.iter().find(|(theirs, _)| !object.contains_key(theirs)) {
            return Err(Error::row(
                "",
                format!(
                    "a row has no \"{theirs}\", which --columns takes for \"{ours}\" (found keys: {}); columns \
                     are given as name_in_the_file={ours}",
                    key_list(&object)
                ),
            ));
        }
        if self.names.is_empty() {
            return Ok(object);
        }
        let mut renamed = Map::with_capacity(object.len());
        for (key, value) in object {
            let name = self.names.iter().find(|(theirs, _)| *theirs == key).map_or(&key, |(_, ours)| ours);
            if renamed.insert(name.clone(), value).is_some() {
                return Err(Error::row(
                    "",
                    format!(
                        "two keys of a row would be called \"{name}\" after --columns; rename \"{name}\" itself as \
                         well, or remove it"
                    ),
                ));
            }
        }
        Ok(renamed)
    }
}

impl Tags {
    fn apply(&self, list: &mut [Value], key: &str, pointer: &str) -> Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        let roles = [
            (&self.user_tag, "user"),
            (&self.assistant_tag, "assistant"),
            (&self.observation_tag, "tool"),
            (&self.function_tag, "function_call"),
            (&self.system_tag, "system"),
        ];
        for (index, message) in list.iter_mut().enumerate() {
            let Value::Object(object) = message else { continue };
            for (tag, ours) in [(&self.role_tag, "role"), (&self.content_tag, "content")] {
                let Some(theirs) = tag.as_deref().filter(|theirs| *theirs != ours) else { continue };
                let found = |problem: &str| {
                    let keys = key_list(object);
                    let message = format!("{key}[{index}] {problem} (found keys: {keys})");
                    Error::row(format!("{pointer}/{index}"), message)
                };
                if !object.contains_key(theirs) {
                    return Err(found(&format!(
                        "has no \"{theirs}\", which the tags of --columns name as its {ours}"
                    )));
                }
                if object.contains_key(ours) {
                    return Err(found(&format!(
                        "has both \"{theirs}\" and \"{ours}\" as its {ours}; remove one"
                    )));
                }
                *object = std::mem::take(object)
                    .into_iter()
                    .map(|(key, value)| (if key == theirs { ours.to_owned() } else { key }, value))
                    .collect();
            }
            let role_key = if object.contains_key("role") { "role" } else { "from" };
            if let Some(Value::String(role)) = object.get_mut(role_key)
                && let Some((_, ours)) = roles.iter().find(|(tag, _)| tag.as_ref() == Some(role))
            {
                *role = (*ours).to_owned();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Columns;

    fn parse_error(text: &str) -> String {
        Columns::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn keys_are_renamed_in_their_order() {
        let row = json!({"id": 1, "prompt": "p", "b": "a", "a": "q"});
        for text in ["a=query, b=response,prompt=system", r#"{"a":"query","b":"response","prompt":"system"}"#]
        {
            let renamed = Columns::parse(text).unwrap().apply(row.clone()).unwrap();
            assert_eq!(renamed.to_string(), r#"{"id":1,"system":"p","response":"a","query":"q"}"#);
        }
        let swapped = Columns::parse("prompt=response,response=prompt").unwrap();
        let row = json!({"prompt": "a", "response": "q"});
        assert_eq!(swapped.apply(row).unwrap(), json!({"response": "a", "prompt": "q"}));
    }

    #[test]
    fn a_column_that_a_row_lacks_is_named_with_the_keys_found() {
        let columns = Columns::parse("ask=query").unwrap();
        assert_eq!(
            columns.apply(json!({"asked": "q", "reply": "a"})).unwrap_err().to_string(),
            "a row has no \"ask\", which --columns takes for \"query\" (found keys: asked, reply); columns are given \
             as name_in_the_file=query"
        );
        let twice = columns.apply(json!({"ask": "q", "query": "a"})).unwrap_err().to_string();
        assert!(twice.starts_with("two keys of a row would be called \"query\""), "{twice}");
    }

    #[test]
    fn wrong_columns_are_refused() {
        for (text, expected) in [
            ("", "columns: no name is given"),
            ("a", "columns: \"a\" has no \"=\""),
            ("a=qeury", "columns: \"a\" stands for \"qeury\", which no row has; expected one of query"),
            ("a=query,b=query", "columns: both \"a\" and \"b\" stand for \"query\"; keep one"),
            ("a=query,a=response", "columns: \"a\" is named twice; keep one"),
            (r#"{"a": 1}"#, "columns: \"a\" is 1; expected the name"),
            (r#"{"a": "query""#, "columns: row:1:13: not JSON"),
            (r#"{"a": "query", "a": "system"}"#, "columns: row:1:16: a second key \"a\""),
            (r#"{"tags": {"rolle": "x"}}"#, "columns: unknown field `rolle`, expected one of `role_tag`"),
        ] {
            assert!(parse_error(text).starts_with(expected), "{text}: {}", parse_error(text));
        }
    }

    #[test]
    fn tags_bring_messages_to_the_names_of_the_field() {
        let columns = Columns::parse(
            r#"{"dialog": "conversations", "tags": {"role_tag": "speaker", "content_tag": "says", "user_tag": "client",
                "assistant_tag": "agent", "observation_tag": "data", "function_tag": "act", "system_tag": "rules"}}"#,
        )
        .unwrap();
        let roles = ["rules", "client", "act", "data", "agent"];
        let dialog: Vec<_> =
            roles.iter().map(|role| json!({"speaker": role, "says": "x", "loss": true})).collect();
        let row = columns.apply(json!({"dialog": dialog})).unwrap();
        let expected: Vec<_> = ["system", "user", "function_call", "tool", "assistant"]
            .iter()
            .map(|role| json!({"role": role, "content": "x", "loss": true}))
            .collect();
        assert_eq!(row.to_string(), json!({"conversations": expected}).to_string());
        let missing = columns.apply(json!({"dialog": [{"speaker": "client", "text": "x"}]})).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "conversations[0] has no \"says\", which the tags of --columns name as its content (found keys: role, text)"
        );
        assert_eq!(missing.place.pointer.as_deref(), Some("/conversations/0"));
    }
}
