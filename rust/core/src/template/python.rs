//! Where Jinja2 is Python, and a template depends on it.
//!
//! - `x.items` without a call is the method of the dict, which is true, and not its key `items`.
//! - A string can be looped over, and then `loop.last` is known.
//! - `strip` and its kin take away what Python calls white space.
//! - A list may hold lists without end, and is freed all the same; here it is refused in time (see [`keep`]).

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

use super::expression::{filter_loop, print_operands};
use super::lazy::Lazy;
use super::marks;
use super::print::not_iterable;

/// The filter that [`rewrite`] puts on what is looped over.
pub(super) const EACH: &str = "each__";
/// The filter that [`rewrite`] puts on what a namespace is to keep.
pub(super) const KEEP: &str = "keep__";
/// Values nested deeper are refused.
pub(super) const MAX_DEPTH: usize = 512;
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
    if let (ValueKind::Map, []) = (value.kind(), arguments) {
        let name = match method {
            "items" => Some("dict_items"),
            "keys" => Some("dict_keys"),
            "values" => Some("dict_values"),
            _ => None,
        };
        if let Some(name) = name.filter(|_| !value.is_undefined()) {
            let found = pycompat::unknown_method_callback(state, value, method, arguments)?;
            return Ok(Lazy::view(name, found.try_iter()?.collect()));
        }
    }
    pycompat::unknown_method_callback(state, value, method, arguments)
}

/// What a loop runs over: a string is its characters, whose number is then known, and `none` is refused.
pub(super) fn each(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(not_iterable("NoneType"));
    }
    if let Some(text) = value.as_str() {
        return Ok(text.chars().map(|character| Value::from(character.to_string())).collect());
    }
    // so that the number of what a generator gives is known
    let is_lazy = value.downcast_object_ref::<Lazy>().is_some();
    if is_lazy { Ok(value.try_iter()?.collect()) } else { Ok(value) }
}

/// The filter `list`, which refuses `none` as Python does.
pub(super) fn list(state: &State, value: Value) -> Result<Value, Error> {
    if value.is_none() { Err(not_iterable("NoneType")) } else { filters::list(state, value) }
}

/// The test `sequence`: what has a length and takes an index, texts and dicts too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
}

/// The test `iterable`: to Jinja2 `none` is not (templates get `tools=None` from Transformers), but what is undefined.
pub(super) fn is_iterable(value: &Value) -> bool {
    // looked at, a generator would be empty
    let is_lazy = value.downcast_object_ref::<Lazy>().is_some();
    is_lazy || (!value.is_none() && value.try_iter().is_ok())
}

/// What a namespace is to keep, unchanged. Only there can a loop nest a value once more at each turn, and one that is nested
/// some ten thousand times takes the whole stack when it is freed.
pub(super) fn keep(state: &State, value: Value) -> Result<Value, Error> {
    check_depth(state, &value, 0)?;
    Ok(value)
}

fn check_depth(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    let wrong = |message: String| Err(Error::new(ErrorKind::InvalidOperation, message));
    if depth > MAX_DEPTH {
        return wrong(format!("a namespace holds a value nested deeper than {MAX_DEPTH} levels"));
    }
    state.consume_fuel(1)?;
    if value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        return wrong("a namespace holds a namespace; give it values, or use a dict".to_owned());
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| check_depth(state, &item, depth + 1)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            check_depth(state, &key, depth + 1)?;
            check_depth(state, &value.get_item(&key)?, depth + 1)
        }),
        _ => Ok(()),
    }
}

/// `source` with what this module needs put in.
pub(super) fn rewrite(source: &str) -> String {
    // Jinja2 reads every end of a line as this one
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source.as_str();
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
        if !is_comment && word_of(code) == "raw" {
            let raw = raw_length(rest);
            // Jinja2 keeps the line end after this one tag
            if rest.starts_with('\n') && !code.ends_with("-%}") {
                out.push('\n');
            }
            out.push_str(&rest[..raw]);
            rest = &rest[raw..];
        }
    }
    out.push_str(rest);
    out
}

/// What stands in a block of one word.
fn word_of(code: &str) -> &str {
    let inner = code.strip_prefix("{%").and_then(|code| code.strip_suffix("%}")).unwrap_or_default();
    inner.trim_matches(['-', '+']).trim()
}

/// The length of the text up to the end of a raw block.
fn raw_length(text: &str) -> usize {
    let mut at = 0;
    while let Some(start) = text[at..].find("{%").map(|found| at + found) {
        let end = text[start..].find("%}").map_or(text.len(), |found| start + found + 2);
        if word_of(&text[start..end]) == "endraw" {
            return start;
        }
        at = start + 2;
    }
    text.len()
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
pub(super) fn string_length(text: &str) -> Option<usize> {
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
    let code = keep_checked(&print_operands(&filter_loop(code, EACH)));
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

/// `set a.b = c` with the filter [`KEEP`] on `c`; a block that is set has it after its own filters.
fn keep_checked(code: &str) -> String {
    let start = code.len() - code.trim_start_matches("{%").trim_start_matches(['-', '+']).trim_start().len();
    let end = code.strip_suffix("%}").map_or(code.len(), |code| code.trim_end_matches(['-', '+']).len());
    let inner = code.get(start..end).unwrap_or_default();
    let after_target = inner.find(['=', '|']).unwrap_or(inner.len());
    let (target, value) = inner.split_at(after_target);
    let is_set = target
        .strip_prefix("set")
        .is_some_and(|rest| rest.starts_with(|next: char| next.is_whitespace() || next == '('));
    if !code.starts_with("{%") || !is_set || !target.contains('.') || value.is_empty() {
        return code.to_owned();
    }
    let checked = match value.strip_prefix('=') {
        Some(value) => format!("=({value})|{KEEP} "),
        None => format!("{value}|{KEEP} "),
    };
    format!("{}{target}{checked}{}", &code[..start], &code[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_rewritten() {
        let same = "a.items {# x.items #}{{ 'x.items }}' }}{{ x.items() }}{{ x.items_of }}";
        assert_eq!(rewrite(same), same);
        assert_eq!(rewrite("{{ x.items.y }}"), "{{ x.bound__items().y }}");
        assert_eq!(rewrite("{%- for a in b.c -%}"), "{%- for a in b.c|each__ -%}");
        assert_eq!(rewrite("{% for a in b if a %}"), "{% for a in b|each__ if a %}");
        assert_eq!(rewrite("{% raw %}\r\na{% endraw %}\n"), "{% raw %}\n\na{% endraw %}\n");
        let raw = "{% raw %}{% for a in b %}{{ ' {%- endraw %}";
        assert_eq!(rewrite(&format!("{raw}{{% for a in b %}}")), format!("{raw}{{% for a in b|each__ %}}"));
    }

    #[test]
    fn what_a_namespace_keeps_is_checked() {
        for same in ["{% set a = b.c %}", "{% set a.b %}", "{% settle.a = 1 %}", "{% set a | trim(b.c) %}"] {
            assert_eq!(rewrite(same), same);
        }
        assert_eq!(rewrite("{%- set a.b = 1, 2 -%}"), "{%- set a.b =( 1, 2 )|keep__ -%}");
        assert_eq!(rewrite("{% set (a, b.c)=d if e else f%}"), "{% set (a, b.c)=(d if e else f)|keep__ %}");
        assert_eq!(rewrite("{% set a.b | trim %}"), "{% set a.b | trim |keep__ %}");
    }
}
