//! Where Jinja2 is Python, and a template depends on it.
//!
//! - `x.items` without a call is the method of the dict, which is true, and not its key `items`.
//! - A string can be looped over, and then `loop.last` is known.
//! - `strip` and its kin take away what Python calls white space.
//! - A list may hold lists without end, and is freed all the same; here it is refused in time (see [`keep`]).

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::lazy::{Lazy, items_of};
use super::methods;
use super::operators::method_of;
use super::order::{is_dict, is_engine_object, is_namespace, kind};
use super::rewriter::Rewriter;
use super::tokens::string_length;

/// The filter that [`rewrite`] puts on what is looped over.
pub(super) const EACH: &str = "each__";
/// The filter that [`rewrite`] puts on what a namespace is to keep.
pub(super) const KEEP: &str = "keep__";
/// Values nested deeper are refused.
pub(super) const MAX_DEPTH: usize = 512;
/// The prefix of the methods that [`rewrite`] puts in place of uncalled ones.
pub(super) const BOUND: &str = "bound__";
/// Methods of a dict, which come before its keys.
const DICT_METHODS: [&str; 6] = ["items", "keys", "values", "get", "copy", "fromkeys"];

/// A method that is not called: true, and without attributes.
#[derive(Debug)]
pub(super) struct BoundMethod;

impl Object for BoundMethod {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<built-in method of dict object>")
    }
}

/// A method of a value, called or not; a namespace has none.
pub(super) fn unknown_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let Some(name) = method.strip_prefix(BOUND) else {
        return methods::call(state, value, method, arguments);
    };
    let is_dict = is_dict(value);
    let found =
        if is_dict && !DICT_METHODS.contains(&name) { value.get_attr(name)? } else { Value::UNDEFINED };
    let bound = method_of(value, &Value::from(name));
    if !found.is_undefined() || bound.is_undefined() {
        return if found.is_undefined() { value.get_attr(name) } else { Ok(found) };
    }
    Ok(bound)
}

/// What a loop runs over: a string is its characters, whose number is then known, and `none` is refused.
pub(super) fn each(state: &State, value: Value) -> Result<Value, Error> {
    // what a generator gives is known in number too
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Undefined) || is_dict(&value) {
        Ok(value)
    } else {
        items_of(state, &value).map(Value::from)
    }
}

/// The test `sequence`: what has a length and takes an index, texts and dicts too.
pub(super) fn is_sequence(value: &Value) -> bool {
    is_dict(value) || matches!(kind(value), ValueKind::String | ValueKind::Seq | ValueKind::Undefined)
}

/// The test `iterable`: to Jinja2 `none` is not (templates get `tools=None` from Transformers), but what is undefined.
pub(super) fn is_iterable(value: &Value) -> bool {
    // looked at, a generator would be empty
    let is_lazy = value.downcast_object_ref::<Lazy>().is_some();
    is_lazy
        || is_dict(value)
        || matches!(kind(value), ValueKind::String | ValueKind::Seq | ValueKind::Undefined)
}

/// The test `callable`: functions, methods, macros and the loop, and what is undefined.
pub(super) fn is_callable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined) || is_engine_object(value)
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
    if is_namespace(value) {
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

/// `source` with what this module needs put in. An error says where it holds what is not known here.
pub(super) fn rewrite(source: &str) -> Result<String, String> {
    // Jinja2 reads every end of a line as this one
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let blocks = blocks(&source);
    let code = blocks.iter().filter(|block| block.is_code).map(|block| block.text);
    let mut rewriter = Rewriter::new(code);
    let mut out = String::with_capacity(source.len() + 64);
    let mut line = 1;
    for block in blocks {
        if block.is_code {
            out.push_str(&rewriter.rewrite(block.text).map_err(|error| format!("line {line}: {error}"))?);
        } else {
            out.push_str(block.text);
        }
        // Jinja2 keeps the line end after this one tag
        if block.is_raw && !block.text.ends_with("-%}") && source[block.end..].starts_with('\n') {
            out.push('\n');
        }
        line += block.text.matches('\n').count();
    }
    Ok(out)
}

/// A stretch of a template.
struct Block<'s> {
    text: &'s str,
    end: usize,
    /// Whether there are expressions in it.
    is_code: bool,
    /// Whether raw text comes after it.
    is_raw: bool,
}

/// Blocks and what is between them.
fn blocks(source: &str) -> Vec<Block<'_>> {
    let mut found = Vec::new();
    let mut at = 0;
    let mut push = |start: usize, end: usize, is_code: bool, is_raw: bool| {
        found.push(Block { text: &source[start..end], end, is_code, is_raw });
        end
    };
    while let Some(start) = ["{%", "{{", "{#"].iter().filter_map(|open| source[at..].find(open)).min() {
        at = push(at, at + start, false, false);
        let rest = &source[at..];
        let (close, is_comment) = match &rest[..2] {
            "{%" => ("%}", false),
            "{{" => ("}}", false),
            _ => ("#}", true),
        };
        let length = if is_comment {
            rest.find(close).map_or(rest.len(), |at| at + close.len())
        } else {
            code_length(rest, close)
        };
        let is_raw = !is_comment && word_of(&rest[..length]) == "raw";
        at = push(at, at + length, !is_comment && !is_raw, is_raw);
        if is_raw {
            at = push(at, at + raw_length(&source[at..]), false, false);
        }
    }
    push(at, source.len(), false, false);
    found
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

/// The length of a block that ends with `close`, which may also stand in its strings, and in brackets.
fn code_length(block: &str, close: &str) -> usize {
    let mut at = 2;
    let mut depth = 0usize;
    while at < block.len() {
        let rest = &block[at..];
        if rest.starts_with(close) && (depth == 0 || close == "%}") {
            return at + close.len();
        }
        match rest.as_bytes()[0] {
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += string_length(rest).unwrap_or_else(|| rest.chars().next().map_or(1, char::len_utf8));
    }
    block.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).unwrap()
    }

    #[test]
    fn only_code_is_rewritten() {
        let same = "a.items {# x.items #}{{ 'x.items }}' }}{{ x.items() }}{{ x.items_of }}{{ {'a': {}}}}";
        assert_eq!(rewritten(same), same);
        assert_eq!(rewritten("{{ x.items.y }}"), "{{ x.bound__items().y }}");
        assert_eq!(rewritten("{%- for a in b.c -%}"), "{%- for a in b.c|each__ -%}");
        assert_eq!(rewritten("{% for a in b if a %}"), "{% for a in b|each__ if a %}");
        assert_eq!(rewritten("{% raw %}\r\na{% endraw %}\n"), "{% raw %}\n\na{% endraw %}\n");
        let raw = "{% raw %}{% for a in b %}{{ ' {%- endraw %}";
        assert_eq!(rewritten(&format!("{raw}{{% for a in b %}}")), format!("{raw}{{% for a in b|each__ %}}"));
        assert_eq!(rewrite("\n{{ a +\n }}").unwrap_err(), "line 2: a block ends too early");
    }

    #[test]
    fn what_a_namespace_keeps_is_checked() {
        for same in ["{% set a = b.c %}", "{% set a.b %}", "{% settle.a = 1 %}", "{% set a | trim(b.c) %}"] {
            assert_eq!(rewritten(same), same);
        }
        assert_eq!(rewritten("{%- set a.b = 1, 2 -%}"), "{%- set a.b = ((1, 2)|keep__) -%}");
        let rest = "((d if e else f)|keep__)%}";
        assert_eq!(rewritten("{% set (a, b.c)=d if e else f%}"), format!("{{% set (a, b.c)={rest}"));
        assert_eq!(rewritten("{% set a.b | trim %}"), "{% set a.b | trim|keep__ %}");
    }
}
