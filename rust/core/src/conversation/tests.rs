//! Rows of every layout of the field, as they are written there, and the messages that they mean.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Columns, Conversation, Message, Row, Shape};

fn chat(row: &Value) -> Conversation {
    match Row::from_json(row.to_string().as_bytes()) {
        Ok(Row::Chat(conversation)) => conversation,
        Ok(Row::Text(text)) => panic!("{row} is the document {text:?}"),
        Err(error) => panic!("{row}: {error}"),
    }
}

fn error(row: &Value) -> String {
    Row::from_json(row.to_string().as_bytes()).map(|row| format!("{row:?}")).unwrap_err().to_string()
}

/// A message in short: role, content, then what else it has.
fn brief(message: &Message) -> Value {
    let mut brief = vec![json!(message.role), json!(message.content)];
    if message.weight.to_bits() != 1.0_f32.to_bits() {
        brief.push(json!(message.weight));
    }
    if !message.extra.is_empty() {
        brief.push(Value::Object(message.extra.clone()));
    }
    Value::Array(brief)
}

fn briefs(row: &Value) -> Value {
    chat(row).messages.iter().map(brief).collect()
}

#[test]
fn every_layout_of_one_exchange_means_the_same() {
    let expected = json!([["system", "S"], ["user", "q"], ["assistant", "a"]]);
    for row in [
        json!({"query": "q", "response": "a", "system": "S"}),
        json!({"prompt": "q", "completion": "a", "system_prompt": "S"}),
        json!({"question": "q", "answer": "a", "system": [{"type": "text", "text": "S"}]}),
        json!({"problem": "q", "solution": "a", "system": "S", "history": []}),
        json!({"query": "q", "text": "a", "system": "S", "history": "[]"}),
        json!({"query": "q", "answers": ["a", "b"], "system": "S", "history": ""}),
        json!({"instruction": "q", "input": "", "output": "a", "system": "S"}),
        json!({"system": "S", "conversation": [{"human": "q", "assistant": "a"}]}),
        json!({"conversation": [{"system": "S", "input": "q", "output": "a"}]}),
        json!({"system": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        json!({"conversations": [{"from": "system", "value": "S"}, {"from": "Human", "value": "q"},
               {"from": "chatgpt", "value": "a"}]}),
        json!([{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "model", "content": "a"}]),
        json!({"system": "S", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        json!({"messages": "[{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'q'}, \
               {'role': 'assistant', 'content': 'a'}]"}),
        json!({"system": "S", "prompt": [{"role": "user", "content": "q"}],
               "completion": [{"role": "assistant", "content": "a"}]}),
    ] {
        assert_eq!(briefs(&row), expected, "{row}");
    }
}

#[test]
fn history_comes_before_the_question_in_all_its_forms() {
    let expected = json!([["user", "1"], ["assistant", "2"], ["user", "q"], ["assistant", "a"]]);
    for history in [
        json!([["1", "2"]]),
        json!("[[\"1\", \"2\"]]"),
        json!("[['1', '2']]"),
        json!("[('1', '2')]"),
        json!([{"query": "1", "response": "2"}]),
        json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]),
    ] {
        assert_eq!(briefs(&json!({"query": "q", "response": "a", "history": history})), expected);
        assert_eq!(briefs(&json!({"instruction": "q", "output": "a", "history": history})), expected);
    }
}

#[test]
fn alpaca_joins_instruction_and_input() {
    let row = json!({"instruction": "i", "input": "x", "output": "y"});
    assert_eq!(briefs(&row), json!([["user", "i\nx"], ["assistant", "y"]]));
}

#[test]
fn documents_are_texts() {
    for row in [json!({"response": "d"}), json!({"text": "d", "id": 1}), json!({"content": "d"})] {
        assert_eq!(Row::from_json(row.to_string().as_bytes()).unwrap(), Row::Text("d".to_owned()));
    }
}

#[test]
fn only_the_completion_of_a_prompt_is_trained() {
    let prompt = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                        {"role": "user", "content": "q"}]);
    let expected = json!([["user", "1"], ["assistant", "2", 0.0], ["user", "q"], ["assistant", "a"]]);
    let answer = json!({"role": "assistant", "content": "a"});
    for completion in [json!([answer]), answer.clone(), json!("a")] {
        assert_eq!(briefs(&json!({"prompt": prompt, "completion": completion})), expected);
    }
    let row = json!({"prompt": prompt, "completion": [{"role": "user", "content": "a"}]});
    assert!(error(&row).starts_with("\"completion\" has no assistant turn to train on"));
}

#[test]
fn calls_of_openai_keep_their_arguments_as_written() {
    let text = json!({"name": "f", "arguments": "{\"a\": 1}"});
    let object = json!({"name": "f", "arguments": {"a": 1}});
    for function in [text, object] {
        let calls = json!([{"id": "c1", "type": "function", "function": function}]);
        for calls_as_written in [calls.clone(), json!(calls.to_string())] {
            let row = json!({"messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": null, "tool_calls": calls_as_written},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "assistant", "content": "a", "tool_calls": null},
            ]});
            let expected = json!([["user", "q"], ["assistant", null, {"tool_calls": calls}],
                                  ["tool", "1", {"tool_call_id": "c1"}], ["assistant", "a"]]);
            assert_eq!(briefs(&row), expected);
        }
    }
}

#[test]
fn the_older_function_call_of_openai_is_a_tool_call() {
    let call = json!({"name": "f", "arguments": "{}"});
    let row = json!({"messages": [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "function_call": call},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "a", "function_call": null},
    ]});
    let expected = json!([["developer", "d"], ["user", "q"],
        ["assistant", null, {"tool_calls": [{"type": "function", "function": call}]}],
        ["tool", "1", {"name": "f"}], ["assistant", "a"]]);
    assert_eq!(briefs(&row), expected);
}

#[test]
fn the_parts_of_anthropic_become_messages() {
    let row = json!({
        "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "let me see"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": true,
                 "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "3"}]},
                {"type": "text", "text": "and now?"},
            ]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
    });
    let expected = json!([
        ["system", "S"],
        ["user", "q"],
        ["assistant", "let me see", {"reasoning_content": "hm", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
            {"id": "t2", "type": "function", "function": {"name": "g", "arguments": {}}},
        ]}],
        ["tool", "1", {"tool_call_id": "t1"}],
        ["tool", "23", {"tool_call_id": "t2", "is_error": true}],
        ["user", "and now?"],
        ["assistant", "a"],
    ]);
    assert_eq!(briefs(&row), expected);
    let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
    assert_eq!(chat(&row).tools, Some(json!([{"type": "function", "function": function}])));
}

#[test]
fn text_after_a_call_is_refused_rather_than_moved() {
    let row = json!({"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "f", "input": {}}, {"type": "text", "text": "so"}]}]});
    assert!(error(&row).starts_with("messages[0] has text after a tool_use part"));
}

#[test]
fn calls_of_sharegpt_join_the_turn_that_they_end() {
    let (one, two) = (json!({"name": "f", "arguments": {"a": 1}}), json!({"name": "g", "arguments": {}}));
    let row = json!({"tools": "[{\"name\": \"f\"}]", "conversations": [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "let me see"},
        {"from": "function_call", "value": one.to_string()},
        {"from": "function_call", "value": two.to_string()},
        {"from": "observation", "value": "1"},
        {"from": "function_call", "value": two.to_string(), "loss": false},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]});
    let call = |function: &Value| json!({"type": "function", "function": function});
    let verbatim = format!("{one}\n{two}");
    let expected = json!([
        ["user", "q"],
        ["assistant", "let me see", {"tool_calls": [call(&one), call(&two)], "\u{0}function_call": verbatim}],
        ["tool", "1"],
        ["assistant", null, 0.0, {"tool_calls": [call(&two)], "\u{0}function_call": two.to_string()}],
        ["tool", "2"],
        ["assistant", "a"],
    ]);
    assert_eq!(briefs(&row), expected);
    assert_eq!(chat(&row).tools, Some(json!([{"name": "f"}])));
}

#[test]
fn content_parts_are_joined_and_kept() {
    let row = json!({"messages": [{"role": "user", "content": ["a", {"type": "input_text", "text": "b"},
        {"type": "text", "value": "c"}]}, {"role": "assistant", "content": "a"}]});
    let message = &chat(&row).messages[0];
    assert_eq!(message.content.as_deref(), Some("abc"));
    let text = |text: &str| json!({"type": "text", "text": text});
    assert_eq!(message.parts, Some(vec![text("a"), text("b"), text("c")]));
}

#[test]
fn weights_multiply() {
    let row = json!({"messages": [
        {"role": "assistant", "content": "a", "loss": false},
        {"role": "assistant", "content": "b", "loss_scale": 2.0, "weight": 0.25},
        {"role": "assistant", "content": "c", "train": true},
    ]});
    assert_eq!(briefs(&row), json!([["assistant", "a", 0.0], ["assistant", "b", 0.5], ["assistant", "c"]]));
    let row = json!({"conversation": [{"human": "q", "assistant": "a", "loss": false}, {"human": "q", "assistant": "a"}]});
    assert_eq!(briefs(&row)[1], json!(["assistant", "a", 0.0]));
}

#[test]
fn channel_and_template_arguments_stay_with_the_row() {
    let row = json!({"messages": [{"role": "assistant", "content": "a"}], "channel": "math",
                     "chat_template_kwargs": {"enable_thinking": false}});
    let conversation = chat(&row);
    assert_eq!(conversation.channel.as_deref(), Some("math"));
    assert_eq!(conversation.chat_template_kwargs.get("enable_thinking"), Some(&json!(false)));
}

#[test]
fn wrong_rows_say_what_was_found_and_what_to_do() {
    let user = json!({"role": "user", "content": "q"});
    let assistant = |extra: Value| {
        let mut message = json!({"role": "assistant", "content": "a"});
        message.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"messages": [message]})
    };
    for (row, expected) in [
        (json!({"messages": "hello"}), "\"messages\" is a string; expected a list of messages"),
        (json!({"conversation": [{"human": "q"}]}), "conversation[0] has no \"role\" (found keys: human)"),
        (
            json!({"conversation": [{"human": "q", "assistant": ""}]}),
            "conversation[0] is an empty assistant turn",
        ),
        (json!({"conversation": [{"human": 1, "assistant": "a"}]}), "conversation[0].human is a number"),
        (json!({"query": "q", "response": "a", "history": "f()"}), "\"history\" is a string that is neither"),
        (
            json!({"query": "q", "response": "a", "history": [["q"]]}),
            "\"history\" is not a list of [query, response]",
        ),
        (json!({"query": "q", "response": []}), "\"response\" is a list; expected a string"),
        (
            json!({"system": "s", "messages": [{"role": "system", "content": "t"}]}),
            "a row has both \"system\" and",
        ),
        (
            json!({"messages": [user], "chosen": {}}),
            "\"messages\" has no assistant turn to train on (roles: user); SFT needs one answer, so pass --columns \
          messages=prompt,chosen=completion",
        ),
        (assistant(json!({"tool_calls": 3})), "messages[0].tool_calls is a number; expected a list of calls"),
        (
            assistant(json!({"tool_calls": [{"id": 1}]})),
            "messages[0].tool_calls[0] has no \"name\": {\"id\":1}",
        ),
        (
            assistant(json!({"tool_calls": [{"name": "f", "arguments": [1]}]})),
            "messages[0].tool_calls[0] has arguments that are a list",
        ),
        (
            assistant(json!({"function_call": {"name": "f"}, "tool_calls": []})),
            "messages[0] has both \"tool_calls\"",
        ),
        (
            assistant(json!({"content": [{"type": "image_url"}]})),
            "messages[0] has a content part of type \"image_url\"",
        ),
        (assistant(json!({"channel": 1, "loss": "no"})), "messages[0].loss is \"no\"; expected true, false"),
        (json!({"messages": [user], "tools": 1}), "\"tools\" is a number; expected a list of tool schemas"),
        (json!({"messages": [user], "channel": 1}), "\"channel\" is a number; expected a string"),
    ] {
        assert!(error(&row).starts_with(expected), "{row}: {}", error(&row));
    }
}

#[test]
fn one_file_has_one_shape() {
    let problem = Row::parse(json!({"query": "q", "response": "a"}), Shape::Rounds).unwrap_err();
    assert_eq!(
        problem.message,
        "a row of shape query/response in a file whose first row is conversation rounds (human, assistant); one file \
         holds one shape, split it"
    );
}

#[test]
fn preferences_train_on_the_chosen_answer_by_columns() {
    let chosen = json!({"from": "gpt", "value": "a"});
    let row = json!({"conversations": [{"from": "human", "value": "q"}], "chosen": chosen, "rejected": {}});
    let renamed = Columns::parse("conversations=prompt,chosen=completion").unwrap().apply(row).unwrap();
    assert_eq!(Shape::ignored_keys(&renamed), ["rejected"]);
    assert_eq!(briefs(&renamed), json!([["user", "q"], ["assistant", "a"]]));
}

/// JSON made of the keys and values that rows are made of.
fn any_row() -> impl Strategy<Value = Value> {
    let keys = [
        "messages",
        "conversations",
        "conversation",
        "prompt",
        "completion",
        "query",
        "response",
        "text",
        "content",
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "tools",
        "tool_calls",
        "function_call",
        "function",
        "name",
        "arguments",
        "role",
        "from",
        "value",
        "human",
        "assistant",
        "type",
        "tool_use_id",
        "thinking",
        "loss",
        "weight",
        "channel",
        "chat_template_kwargs",
        "chosen",
        "input_schema",
        "images",
    ];
    let words = [
        "user",
        "assistant",
        "system",
        "tool",
        "function_call",
        "gpt",
        "text",
        "tool_use",
        "tool_result",
        "thinking",
        "",
        "hello",
        "[['a', 'b']]",
        "{\"name\": \"f\"}",
        "[{\"name\": \"f\"}]",
        "[[\"a\", \"b\"]]",
        "null",
        "🦀",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-2..3_i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        proptest::sample::select(words.to_vec()).prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 6, move |inner| {
        let pairs = proptest::collection::vec((proptest::sample::select(keys.to_vec()), inner.clone()), 0..6);
        prop_oneof![
            proptest::collection::vec(inner, 0..4).prop_map(Value::Array),
            pairs.prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

/// A list of messages with anything in their keys.
fn any_messages() -> impl Strategy<Value = Value> {
    let roles = ["user", "assistant", "tool", "function_call", "system", "gpt", "other"];
    let message =
        (proptest::sample::select(roles.to_vec()), any_row(), any_row()).prop_map(|(role, content, more)| {
            let mut message = json!({"role": role, "content": content});
            if let (Value::Object(more), Some(object)) = (more, message.as_object_mut()) {
                object.extend(more.into_iter().filter(|(key, _)| key != "role" && key != "content"));
            }
            message
        });
    proptest::collection::vec(message, 0..4).prop_map(Value::Array)
}

proptest! {
    #[test]
    fn no_value_makes_a_row_panic(row in any_row(), messages in any_messages(), key in 0_usize..6) {
        let _ = Row::from_json(row.to_string().as_bytes());
        let _ = Shape::ignored_keys(&row);
        let _ = Columns::parse(&row.to_string()).map(|columns| columns.apply(row.clone()));
        let tags = r#"{"tags": {"role_tag": "from", "content_tag": "value", "user_tag": "gpt"}}"#;
        let _ = Columns::parse(tags).unwrap().apply(row);
        let _ = Row::from_json(messages.to_string().as_bytes());
        let key = ["messages", "conversations", "conversation", "prompt", "history", "query"][key];
        let _ = Row::from_json(json!({key: messages, "response": "a"}).to_string().as_bytes());
    }

    #[test]
    fn every_message_says_something_or_calls(messages in any_messages()) {
        if let Ok(Row::Chat(conversation)) = Row::from_json(messages.to_string().as_bytes()) {
            prop_assert!(conversation.messages.iter().any(|message| message.role == "assistant"));
            for message in conversation.messages {
                prop_assert!(message.content.is_some() || !message.tool_calls().is_empty());
            }
        }
    }
}
