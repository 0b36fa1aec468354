//! Bytes as the JSON of a row.
//!
//! The strict parser must give what `serde_json` gives, or say why not; a row must not depend on white space between its values, and
//! what a conversation promises about itself must hold.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sftcore::conversation::{Columns, Row, Shape, parse_json};
use sftcore::{Error, Result};

static COLUMNS: LazyLock<Vec<Columns>> = LazyLock::new(|| {
    let maps = [
        "question=query,answer=response",
        "text=messages",
        r#"{"tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}}"#,
        r#"{"dialog": "conversations", "tags": {"role_tag": "speaker", "content_tag": "text", "function_tag": "call"}}"#,
    ];
    maps.iter().map(|map| Columns::parse(map).expect("a map that is right")).collect()
});

fn told(error: &Error) {
    assert!(!error.message.is_empty() && !error.message.ends_with('.'), "{error:?}");
}

fn check_json(bytes: &[u8]) -> Option<Value> {
    let expected: Result<Value, _> = serde_json::from_slice(bytes);
    match parse_json(bytes) {
        Ok(value) => {
            let expected = expected.expect("what is accepted is JSON");
            assert_eq!(value, expected);
            assert_eq!(value.to_string(), expected.to_string());
            Some(value)
        }
        Err(error) => {
            told(&error);
            assert!(error.place.line.is_some_and(|line| line > 0), "{error:?}");
            assert!(error.place.column.is_some_and(|column| column > 0), "{error:?}");
            if expected.is_ok() {
                let is_strict = ["a second key", "does not fit into 64 bits"];
                assert!(is_strict.iter().any(|reason| error.message.contains(reason)), "{error:?}");
            }
            None
        }
    }
}

fn check_row(row: &Row) {
    let Row::Chat(conversation) = row else { return };
    assert!(conversation.messages.iter().any(|message| message.role == "assistant"));
    for message in &conversation.messages {
        let roles = ["system", "developer", "user", "assistant", "tool"];
        assert!(roles.contains(&message.role), "{}", message.role);
        assert!(message.weight >= 0.0, "{}", message.weight);
        assert!(message.content.is_some() || message.parts.is_none(), "{message:?}");
        assert!(!message.extra.contains_key("role") && !message.extra.contains_key("content"), "{message:?}");
    }
    assert!(conversation.tools.as_ref().is_none_or(Value::is_array), "{:?}", conversation.tools);
}

fuzz_target!(|bytes: &[u8]| {
    let value = check_json(bytes);
    let row = Row::from_json(bytes);
    match (&row, &value) {
        (Ok(_), None) => panic!("a row of what is not JSON"),
        (Ok(row), Some(_)) => check_row(row),
        (Err(error), _) => told(error),
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(error) = Columns::parse(text)
    {
        told(&error);
    }
    let Some(value) = value else { return };
    let pretty = serde_json::to_vec_pretty(&value).expect("a value can be written");
    let reason = |row: Result<Row>| row.map_err(|error| (error.message, error.place.pointer));
    assert_eq!(reason(Row::from_json(&pretty)), reason(row));
    let _ = Shape::ignored_keys(&value);
    for columns in COLUMNS.iter() {
        let renamed = columns.apply(value.clone());
        match renamed.and_then(|row| Shape::detect(&row).and_then(|shape| Row::parse(row, shape))) {
            Ok(row) => check_row(&row),
            Err(error) => told(&error),
        }
    }
});
