//! Conversations through chat templates.
//!
//! The first byte picks a template of the package, or `!` one that is written in the input; the second picks what is trained. The rest are
//! fields with a record separator (0x1E) between: the source, if it is written here, then one a message, whose first byte says what it is.
//! Segments must tile the text, marks must leave no trace, and the compiled form of a packaged template must give what Jinja gives.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sftcore::conversation::{Conversation, Message};
use sftcore::template::{ChatTemplate, Controls, Rendered, SpecialTokens, TrainOn, TrainOnEos};

const SOURCES: [&str; 15] = [
    include_str!("../../python/sftcore/templates/alpaca.jinja"),
    include_str!("../../python/sftcore/templates/chatml.jinja"),
    include_str!("../../python/sftcore/templates/deepseek.jinja"),
    include_str!("../../python/sftcore/templates/default-generation.jinja"),
    include_str!("../../python/sftcore/templates/default.jinja"),
    include_str!("../../python/sftcore/templates/gemma.jinja"),
    include_str!("../../python/sftcore/templates/glm.jinja"),
    include_str!("../../python/sftcore/templates/llama2.jinja"),
    include_str!("../../python/sftcore/templates/llama3.jinja"),
    include_str!("../../python/sftcore/templates/mistral.jinja"),
    include_str!("../../python/sftcore/templates/phi.jinja"),
    include_str!("../../python/sftcore/templates/qwen2.5.jinja"),
    include_str!("../../python/sftcore/templates/qwen3.jinja"),
    include_str!("../../python/sftcore/templates/vicuna.jinja"),
    include_str!("../../python/sftcore/templates/zephyr.jinja"),
];

static PACKAGED: [LazyLock<ChatTemplate>; 15] = packaged();

/// One that is not needed is not compiled.
const fn packaged() -> [LazyLock<ChatTemplate>; 15] {
    macro_rules! each {
        ($($index:literal)*) => {
            [$(LazyLock::new(|| template(SOURCES[$index]).expect("a packaged template is right"))),*]
        };
    }
    each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}

fn template(source: &str) -> sftcore::Result<ChatTemplate> {
    let named = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    let texts = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>"].map(str::to_owned).to_vec();
    ChatTemplate::new(source, SpecialTokens { named, texts, eos: Vec::new() })
}

fn controls(byte: u8) -> Controls {
    // a template compiles eight forms at most
    let train_on = match byte & 3 {
        0 => TrainOn::Assistant,
        1 => TrainOn::Last,
        2 => TrainOn::All,
        _ => TrainOn::Roles(vec!["user", "assistant"]),
    };
    let ends = byte & 4 != 0;
    let train_on_eos = match (byte & 3, ends) {
        (_, true) => TrainOnEos::Turn,
        (0, false) => TrainOnEos::Last,
        (_, false) => TrainOnEos::None,
    };
    Controls { train_on, train_on_eos, ignore_empty_think: ends, ..Controls::default() }
}

fn push(conversation: &mut Conversation, field: &str) {
    let Some(kind) = field.chars().next() else { return };
    let content = &field[kind.len_utf8()..];
    let role = match kind.to_ascii_lowercase() {
        's' => "system",
        'u' | 'p' => "user",
        'o' => "tool",
        'k' => {
            let schema = json!({"type": "function", "function": {"name": "look", "description": content}});
            conversation.tools = Some(json!([schema]));
            return;
        }
        _ => "assistant",
    };
    let mut message = Message::new(role, content);
    match kind.to_ascii_lowercase() {
        'c' => {
            let call =
                json!([{"type": "function", "function": {"name": "look", "arguments": {"at": content}}}]);
            message.extra.insert("tool_calls".to_owned(), call);
            message.content = None;
        }
        'r' => {
            let (reasoning, answer) = content.split_once('\u{1f}').unwrap_or((content, "yes"));
            message.extra.insert("reasoning_content".to_owned(), Value::from(reasoning));
            message.content = Some(answer.to_owned());
        }
        'p' => {
            let part = |text| json!({"type": "text", "text": text});
            let parts: Vec<&str> = content.split('\u{1f}').collect();
            message.content = Some(parts.concat());
            message.parts = Some(parts.into_iter().map(part).collect());
        }
        _ => {}
    }
    if kind.is_ascii_uppercase() {
        message.weight = 0.0;
    }
    conversation.messages.push(message);
}

fn check_rendered(rendered: &Rendered) {
    let mut at = 0;
    for segment in &rendered.segments {
        assert_eq!(segment.start, at, "segments tile the text");
        assert!(segment.end > at && rendered.text.is_char_boundary(segment.end), "{segment:?}");
        at = segment.end;
    }
    assert_eq!(at, rendered.text.len(), "segments tile the text");
    for &(start, end) in &rendered.contents {
        assert!(rendered.text.get(start..end).is_some(), "content at {start}..{end}");
    }
}

/// What Jinja alone gives: a conversation whose message has a key more is not for the compiled form, and no template sees a null.
fn by_jinja(
    template: &ChatTemplate,
    conversation: &Conversation,
    controls: &Controls,
) -> sftcore::Result<Rendered> {
    let mut conversation = conversation.clone();
    for message in &mut conversation.messages {
        message.extra.insert("nothing".to_owned(), Value::Null);
    }
    template.render_segments(&conversation, controls)
}

fuzz_target!(|bytes: &[u8]| {
    let &[kind, which, ref bytes @ ..] = bytes else { return };
    let text = String::from_utf8_lossy(bytes);
    let mut fields = text.split('\u{1e}');
    let written;
    let packaged = usize::from(kind.wrapping_sub(b'a'));
    let template = match PACKAGED.get(packaged) {
        Some(template) => &**template,
        None if kind == b'!' => match template(fields.next().unwrap_or_default()) {
            Ok(template) => {
                written = template;
                &written
            }
            Err(error) => return assert!(!error.message.is_empty()),
        },
        None => return,
    };
    let mut conversation = Conversation::default();
    fields.take(12).for_each(|field| push(&mut conversation, field));
    if conversation.messages.is_empty() {
        return;
    }
    let controls = controls(which);
    let expected = by_jinja(template, &conversation, &controls);
    match &expected {
        Ok(rendered) => {
            check_rendered(rendered);
            assert_eq!(template.render(&conversation, false).as_ref(), Ok(&rendered.text));
        }
        Err(error) => assert!(!error.message.is_empty() && !error.message.ends_with('.'), "{error:?}"),
    }
    // a shape is learned when it comes again
    for _ in 0..3 {
        let rendered = template.render_segments(&conversation, &controls);
        if packaged < PACKAGED.len() {
            assert_eq!(rendered, expected);
        } else if let Ok(rendered) = rendered {
            check_rendered(&rendered);
        }
    }
});
