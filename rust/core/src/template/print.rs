//! A value as the text that Python's `str` gives it.
//!
//! What a template prints, joins or trims goes through here: numbers with Python's digits (`1e-05`, `1e+16`), lists
//! and dicts as their `repr`. A generator has no text: Python prints its address, which no two runs share.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter};

use super::filters::Group;
use super::json::python_float;
use super::lazy::{Lazy, items_of};
use super::order::{is_engine_object, is_namespace, kind};
use super::python::MAX_DEPTH;

/// The filter that makes text of what stands beside `~`.
pub(super) const TEXT: &str = "text__";

/// Writes what stands in `{{ }}`.
pub(super) fn formatter(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            let text = text_of(state, value)?;
            Ok(out.write_str(&text)?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// The filter `string`, and [`TEXT`]: a text stays what it is.
pub(super) fn text(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value);
    }
    text_of(state, &value).map(Value::from)
}

/// `str(value)`.
pub(super) fn text_of(state: &State, value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            repr_of(state, value)
        }
        _ => Ok(value.to_string()),
    }
}

/// A filter of text, on the text of any value.
pub(super) fn on_text(
    filter: impl Fn(&str) -> String + Send + Sync + 'static,
) -> impl Fn(&State, &Value) -> Result<Value, Error> + Send + Sync + 'static {
    move |state, value| {
        let text = filter(&text_of(state, value)?);
        Ok(if value.is_safe() { Value::from_safe_string(text) } else { Value::from(text) })
    }
}

/// `repr(value)`.
pub(super) fn repr_of(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(&mut out, value, 0, state)?;
    Ok(out)
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja hands over owned arguments")]
/// The filter `join(d, attribute)`.
pub(super) fn join(
    state: &State,
    value: &Value,
    given: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let named: Option<Value> = kwargs.get("d")?;
    let separator =
        given.first().cloned().or(named).map_or(Ok(String::new()), |text| text_of(state, &text))?;
    let named: Option<Value> = kwargs.get("attribute")?;
    let attribute = given.get(1).cloned().or(named).filter(|attribute| !attribute.is_none());
    kwargs.assert_all_used()?;
    let mut out = String::new();
    for (number, item) in items_of(state, value)?.into_iter().enumerate() {
        let item = match attribute.as_ref().map(|attribute| (attribute, attribute.as_str())) {
            None => item,
            Some((_, Some(path))) => {
                path.split('.').try_fold(item, |item, name| match name.parse::<usize>() {
                    Ok(index) => item.get_item_by_index(index),
                    Err(_) => item.get_attr(name),
                })?
            }
            Some((attribute, None)) => item.get_item(attribute)?,
        };
        if number > 0 {
            out.push_str(&separator);
        }
        let text = text_of(state, &item)?;
        state.consume_fuel(1 + ((text.len() + separator.len()) / 64) as u64)?;
        out.push_str(&text);
    }
    Ok(out)
}

/// What Python says of a loop over what has no items.
pub(super) fn not_iterable(kind: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("'{kind}' object is not iterable"))
}

fn write_repr(out: &mut String, value: &Value, depth: usize, state: &State) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        let message = format!("the text of a value nested deeper than {MAX_DEPTH} levels");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    // what a list within lists repeats may be far longer than what the template made
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / 64)?;
    match kind(value) {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String if value.is_safe() => {
            out.push_str("Markup(");
            write_text(out, value.as_str().unwrap_or_default());
            out.push(')');
        }
        ValueKind::String => write_text(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => out.push_str(&number(value)),
        ValueKind::Seq => {
            let is_group = value.downcast_object_ref::<Group>().is_some();
            let is_tuple = value.is_tuple() || is_group;
            let (open, close) = if is_tuple { ('(', ')') } else { ('[', ']') };
            write_items(out, value, (open, close), depth, state)?;
            if is_tuple && value.len() == Some(1) {
                out.insert(out.len() - 1, ',');
            }
        }
        ValueKind::Iterable => {
            let lazy = value.downcast_object_ref::<Lazy>();
            let text =
                lazy.and_then(Lazy::text).ok_or_else(|| no_text("a generator", "; put |list after it"))?;
            out.push_str(text);
            if !lazy.is_some_and(Lazy::is_range) {
                out.push('(');
                write_items(out, value, ('[', ']'), depth, state)?;
                out.push(')');
            }
        }
        ValueKind::Plain => return Err(no_text("a function or a method that is not called", "")),
        ValueKind::Map if is_engine_object(value) => return Err(no_text("a loop or a macro", "")),
        ValueKind::Map => {
            let is_namespace = is_namespace(value);
            out.push_str(if is_namespace { "<Namespace {" } else { "{" });
            for (number, key) in value.try_iter()?.enumerate() {
                if number > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &key, depth + 1, state)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1, state)?;
            }
            out.push_str(if is_namespace { "}>" } else { "}" });
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    value: &Value,
    (open, close): (char, char),
    depth: usize,
    state: &State,
) -> Result<(), Error> {
    out.push(open);
    for (number, item) in value.try_iter()?.enumerate() {
        if number > 0 {
            out.push_str(", ");
        }
        write_repr(out, &item, depth + 1, state)?;
    }
    out.push(close);
    Ok(())
}

fn no_text(what: &str, advice: &str) -> Error {
    let message = format!("{what} has no text but its address{advice}");
    Error::new(ErrorKind::InvalidOperation, message)
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if float.is_nan() => "nan".to_owned(),
        Ok(float) if float.is_infinite() => (if float > 0.0 { "inf" } else { "-inf" }).to_owned(),
        Ok(float) => python_float(float),
        Err(_) => value.to_string(),
    }
}

/// `repr(text)`.
fn write_text(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if character == quote => {
                out.push('\\');
                out.push(quote);
            }
            _ if is_printable(character) => out.push(character),
            _ => {
                let code = u32::from(character);
                let _ = match code {
                    0..=0xFF => write!(out, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable()`: both go by the categories of Unicode.
fn is_printable(character: char) -> bool {
    // what extends the character before it is escaped only at the start of a text
    character != '\'' && format!("a{character}").escape_debug().nth(1) != Some('\\')
        || matches!(character, '\'' | '"')
}
