//! Conversations of all roles and parts.

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::json;
use sftcore::conversation::Message;

/// Words that a careless search would find in the wrong place, or cut.
const WORDS: [&str; 14] = [
    "ok",
    "4",
    "user",
    "assistant",
    "tool",
    "two\n\nlines",
    "née 🤔",
    "a <b>bold</b> word",
    "{\"a\": [1, 2]}",
    "# Title\n\n- one",
    "### user: hi",
    " padded ",
    "ends with a line\n",
    "name",
];

fn words() -> impl Strategy<Value = String> {
    prop_oneof![3 => select(WORDS.to_vec()).prop_map(str::to_owned), 2 => "[a-z]{1,8}( [a-z]{1,8}){0,4}"]
}

fn call() -> impl Strategy<Value = serde_json::Value> {
    let arguments = prop::collection::vec((select(vec!["place", "day", "name"]), words()), 0..3);
    (select(vec!["weather", "look_up", "ok"]), arguments).prop_map(|(name, arguments)| {
        let arguments: serde_json::Map<_, _> =
            arguments.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
        json!({"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}})
    })
}

fn answer() -> impl Strategy<Value = Message> {
    let plain = words().prop_map(|words| Message::new("assistant", words));
    let thought = (words(), words()).prop_map(|(reasoning, words)| {
        let mut message = Message::new("assistant", words);
        message.extra.insert("reasoning_content".to_owned(), reasoning.trim().into());
        message
    });
    let calls = prop::collection::vec(call(), 1..3);
    let calling = (prop::option::of(words()), prop::option::of(words()), calls).prop_map(
        |(words, reasoning, calls)| {
            let mut message = Message::new("assistant", words.unwrap_or_default());
            if let Some(reasoning) = reasoning {
                message.extra.insert("reasoning_content".to_owned(), reasoning.trim().into());
            }
            message.extra.insert("tool_calls".to_owned(), calls.into());
            message
        },
    );
    let any = prop_oneof![4 => plain, 2 => thought, 3 => calling];
    (any, prop::bool::weighted(0.1)).prop_map(|(message, is_left_out)| {
        let weight = if is_left_out { 0.0 } else { 1.0 };
        Message { weight, ..message }
    })
}

/// One to three messages: a question and its answer, an agent's step, or what real rows hold beside.
fn step() -> impl Strategy<Value = Vec<Message>> {
    let of = |role: &'static str| words().prop_map(move |words| Message::new(role, words));
    prop_oneof![
        5 => (of("user"), answer()).prop_map(|(question, answer)| vec![question, answer]),
        3 => (answer(), of("tool"), answer()).prop_map(|(call, result, answer)| vec![call, result, answer]),
        1 => (of("tool"), of("tool")).prop_map(|(one, other)| vec![one, other]),
        1 => answer().prop_map(|answer| vec![answer]),
        1 => of("system").prop_map(|system| vec![system]),
        1 => of("user").prop_map(|question| vec![question]),
    ]
}

/// Messages, at least one of the assistant.
pub(crate) fn conversations() -> impl Strategy<Value = Vec<Message>> {
    let system = prop::option::of(words().prop_map(|words| Message::new("system", words)));
    (system, prop::collection::vec(step(), 1..4), answer()).prop_map(|(system, steps, answer)| {
        let mut messages: Vec<Message> = system.into_iter().chain(steps.into_iter().flatten()).collect();
        if messages.iter().all(|message| message.role != "assistant") {
            messages.push(answer);
        }
        messages
    })
}
