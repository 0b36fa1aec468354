//! Where Jinja2 is Python, and a template depends on it.
//!
//! - `x.items` without a call is the method of the dict, which is true, and not its key `items`.
//! - A string can be looped over, and then `loop.last` is known.
//! - `strip` and its kin take away what Python calls white space.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat;

use super::marks;

/// The filter that [`rewrite`] puts on what is looped over.
pub(super) const EACH: &str = "each__";
/// The prefix of the methods that [`rewrite`] puts in place of uncalled ones.
const BOUND: &str = "bound__";
const DICT_METHODS: [&str; 4] = ["items", "keys", "values", "get"];

/// A method that is not called: true, and without attributes.
#[derive(Debug)]
struct BoundMethod;

impl Object for BoundMethod {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<built-in method of dict object>")
    }
}

/// Methods of Python that minijinja has not, or has otherwise.
pub(super) fn unknown_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(name) = method.strip_prefix(BOUND) {
        return if value.kind() == ValueKind::Map && !value.is_undefined() && value.as_object().is_some() {
            Ok(Value::from_object(BoundMethod))
        } else {
            value.get_attr(name)
        };
    }
    if let (Some(text), []) = (value.as_str(), arguments) {
        let stripped = match method {
            "strip" => Some(marks::trim(text)),
            "lstrip" => Some(text.trim_start_matches(marks::is_white_space)),
            "rstrip" => Some(text.trim_end_matches(marks::is_white_space)),
            _ => None,
        };
        if let Some(stripped) = stripped {
            return Ok(Value::from(stripped));
        }
    }
    pycompat::unknown_method_callback(state, value, method, arguments)
}

/// The filter `trim`, with or without the characters to take away.
pub(super) fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = value.to_string();
    match characters {
        None => marks::trim(&text).to_owned(),
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_owned(),
    }
}

/// The characters of a string, whose number is then known; anything else as it is.
pub(super) fn each(value: Value) -> Value {
    match value.as_str() {
        Some(text) => {
            Value::from(text.chars().map(|character| Value::from(character.to_string())).collect::<Vec<_>>())
        }
        None => value,
    }
}

/// `source` with what this module needs put in.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let (close, is_comment) = match &rest[..2] {
            "{%" => ("%}", false),
            "{{" => ("}}", false),
            _ => ("#}", true),
        };
        let end = if is_comment {
            rest.find(close).map_or(rest.len(), |at| at + close.len())
        } else {
            code_length(rest, close)
        };
        let code = &rest[..end];
        if is_comment {
            out.push_str(code);
        } else {
            out.push_str(&rewrite_code(code));
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// The length of a block that ends with `close`, which may also stand in its strings.
fn code_length(block: &str, close: &str) -> usize {
    let mut at = 2;
    while at < block.len() {
        if block[at..].starts_with(close) {
            return at + close.len();
        }
        at += string_length(&block[at..])
            .unwrap_or_else(|| block[at..].chars().next().map_or(1, char::len_utf8));
    }
    block.len()
}

/// The length of the string literal that `text` begins with.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|&(_, character)| {
        let ends = character == quote && !escaped;
        escaped = character == '\\' && !escaped;
        ends
    });
    Some(end.map_or(text.len(), |(at, _)| at + 1))
}

fn rewrite_code(code: &str) -> String {
    let code = loop_over_each(code);
    let mut out = String::with_capacity(code.len() + 16);
    let mut at = 0;
    while at < code.len() {
        let rest = &code[at..];
        let name = DICT_METHODS.into_iter().find(|name| {
            rest.strip_prefix('.').and_then(|rest| rest.strip_prefix(name)).is_some_and(|after| {
                !after.starts_with(|next: char| next.is_alphanumeric() || next == '_')
                    && !after.trim_start().starts_with('(')
            })
        });
        if let Some(name) = name {
            for part in [".", BOUND, name, "()"] {
                out.push_str(part);
            }
            at += 1 + name.len();
            continue;
        }
        let length = string_length(rest).unwrap_or_else(|| rest.chars().next().map_or(1, char::len_utf8));
        out.push_str(&rest[..length]);
        at += length;
    }
    out
}

/// `for x in a.b` with the filter [`EACH`] on `a.b`; other expressions give no strings to loop over.
fn loop_over_each(code: &str) -> String {
    let inner = code.trim_start_matches("{%").trim_start_matches(['-', '+']).trim_start();
    let path = inner
        .strip_prefix("for ")
        .and_then(|rest| rest.split_once(" in "))
        .map(|(_, rest)| rest.trim_start())
        .filter(|_| code.starts_with("{%"));
    let Some(path) = path else { return code.to_owned() };
    let length =
        path.find(|next: char| !(next.is_alphanumeric() || matches!(next, '_' | '.'))).unwrap_or(path.len());
    let after = path[length..].trim_start();
    let ends = ["%}", "-%}", "+%}", "if "].into_iter().any(|end| after.starts_with(end));
    if length == 0 || !ends || path[..length].ends_with('.') {
        return code.to_owned();
    }
    let at = code.len() - path.len() + length;
    format!("{}|{EACH}{}", &code[..at], &code[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_rewritten() {
        let same =
            "a.items {# x.items #}{{ 'x.items }}' }}{{ x.items() }}{{ x.items_of }}{% for a in f(x) %}";
        assert_eq!(rewrite(same), same);
        assert_eq!(rewrite("{{ x.items.y }}"), "{{ x.bound__items().y }}");
        assert_eq!(rewrite("{%- for a in b.c -%}"), "{%- for a in b.c|each__ -%}");
        assert_eq!(rewrite("{% for a in b if a %}"), "{% for a in b|each__ if a %}");
    }
}
