//! How much work one render may do.
//!
//! A template comes with a model from anywhere, and may loop for as good as ever or ask for all memory. A conversation
//! comes in, its fuel goes out: an instruction takes one, and so do 64 bytes that the template makes or reads. It grows
//! with the conversation, so that no length of a row is too much for a template that does its work in some hundred passes.

use serde_json::{Map, Value};

use crate::conversation::Conversation;

/// What each conversation has at least: some hundredths of a second, and 64 MiB of text.
pub(super) const FUEL: u64 = 1 << 20;
/// What a byte of a conversation brings.
const FUEL_PER_BYTE: u64 = 64;
/// What a message brings: a template may compare it with a thousand others.
const FUEL_PER_MESSAGE: u64 = 1 << 14;
/// What a template that is to be compiled takes on a probe, at most: hundreds of them are rendered.
pub(super) const PROBE_FUEL: u64 = 1 << 16;

/// The fuel to render `conversation` with.
pub(super) fn of(conversation: &Conversation) -> u64 {
    let messages = conversation.messages.iter().map(|message| {
        let content = message.content.as_ref().map_or(0, String::len) as u64;
        let parts = message.parts.iter().flatten().map(bytes_of).sum::<u64>();
        content + parts + bytes_of_object(&message.extra)
    });
    let tools = conversation.tools.as_ref().map_or(0, bytes_of);
    let bytes = messages.sum::<u64>() + tools + bytes_of_object(&conversation.chat_template_kwargs);
    let messages = conversation.messages.len() as u64;
    FUEL.max(bytes.saturating_mul(FUEL_PER_BYTE).saturating_add(messages.saturating_mul(FUEL_PER_MESSAGE)))
}

/// About how long a value is when it is written.
fn bytes_of(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(list) => list.iter().map(|value| 1 + bytes_of(value)).sum(),
        Value::Object(object) => bytes_of_object(object),
        _ => 4,
    }
}

fn bytes_of_object(object: &Map<String, Value>) -> u64 {
    object.iter().map(|(key, value)| key.len() as u64 + bytes_of(value)).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::conversation::Message;
    use crate::template::{ChatTemplate, SpecialTokens};

    fn render(source: &str, content: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, SpecialTokens::default()).map_err(|error| error.message)?;
        let messages = vec![Message::new("user", content), Message::new("assistant", "Hi")];
        let conversation = Conversation { messages, ..Conversation::default() };
        template.render(&conversation, false).map_err(|error| error.message)
    }

    #[test]
    fn hostile_templates_end_with_an_error() {
        let loops =
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}";
        let doubles = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        let tree = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}\
                    {{ ns.x | tojson }}";
        for source in [loops, doubles, tree, "{{ 'a' * 9999999999 }}", "{{ 'a' | indent(9999999999) }}"] {
            let message = render(source, "Hello").unwrap_err();
            assert!(message.contains("work"), "{source}: {message}");
            assert!(message.contains("choose another --template"), "{message}");
        }
        let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(render(recursion, "Hello").unwrap_err().contains("recursion limit"));
    }

    #[test]
    fn json_of_a_hostile_template_is_refused() {
        let nest = |rest: &str| {
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range(9999) %}}{{% for j in range(9999) %}}{rest}\
                 {{% endfor %}}{{% endfor %}}{{{{ ns.x | tojson }}}}"
            )
        };
        for rest in [
            "{% set ns.x = [ns.x] %}",
            "{% set ns.x, ns.y = [ns.x], {'a': ns.x} %}",
            "{% set ns.x | default([ns.x], true) %}{% endset %}",
            "{% raw %}{{ '{% endraw %}{% set ns.x = (ns.x, 1) %}",
        ] {
            let message = render(&nest(rest), "Hello").unwrap_err();
            assert!(message.contains("nested deeper than 512 levels"), "{rest}: {message}");
        }
        let chain = "{% set ns.y = namespace() %}{% set ns.y.x = ns.x %}{% set ns.x = ns.y %}";
        for rest in ["{% set ns.x = ns %}", chain] {
            let message = render(&nest(rest), "Hello").unwrap_err();
            assert!(message.contains("a namespace holds a namespace"), "{rest}: {message}");
        }
        for width in ["99999999999", "9223372036854775807"] {
            let message = render(&format!("{{{{ [1] | tojson(indent={width}) }}}}"), "Hello").unwrap_err();
            assert!(message.contains("an indent of"), "{message}");
        }
    }

    #[test]
    fn a_date_that_cannot_be_written_is_an_error() {
        for format in ["%", "%!", "%9999999999d"] {
            let message = render(&format!("{{{{ strftime_now('{format}') }}}}"), "Hello").unwrap_err();
            assert!(message.contains("the chat template fails on this conversation: strftime"), "{message}");
        }
        assert_eq!(render("{{ strftime_now('%Y') | length }}", "Hello").as_deref(), Ok("4"));
    }

    #[test]
    fn a_long_conversation_has_more_fuel() {
        let long = "word ".repeat(1 << 20);
        // each character takes several instructions
        let source =
            "{% for m in messages %}{% for c in m.content %}{% set d = c %}{% endfor %}{% endfor %}done";
        assert_eq!(render(source, &long).as_deref(), Ok("done"));
        let mut conversation =
            Conversation { messages: vec![Message::new("user", "a")], ..Conversation::default() };
        assert_eq!(of(&conversation), FUEL);
        conversation.tools = Some(json!([{"name": long}]));
        // "a", a place in a list, "name"
        assert_eq!(of(&conversation), FUEL_PER_MESSAGE + FUEL_PER_BYTE * (1 + 1 + 4 + long.len() as u64));
    }
}
