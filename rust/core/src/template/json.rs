//! `tojson` as Transformers defines it for chat templates: Python's `json.dumps` with
//! `ensure_ascii=False`, keys in the order in which they were written, no HTML escaping.
//!
//! Source: `transformers.utils.chat_template_utils._compile_jinja_template`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::filters::Options;
use super::order::{integer, is_dict, kind, sort_by_key, type_name, wrong};
use super::python::MAX_DEPTH;

/// The widest indent.
const MAX_INDENT: i128 = 256;

struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// The filter: `value | tojson(ensure_ascii, indent, separators, sort_keys)`.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    given: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let options = Options::new(given, named);
    let indent = options.get(1, "indent")?.filter(|indent| !indent.is_none());
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => {
            let spaces = integer(&width).ok_or_else(|| wrong("tojson with an indent that is no integer"))?;
            if spaces > MAX_INDENT {
                return Err(wrong(format!(
                    "tojson with an indent of {width}; expected at most {MAX_INDENT}"
                )));
            }
            Some(" ".repeat(usize::try_from(spaces).unwrap_or(0)))
        }
    };
    let separators = options.get(2, "separators")?.filter(|pair| !pair.is_none());
    let (item_separator, key_separator) = match separators {
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            let (Some(item), Some(key), 2) =
                (pair.first().and_then(Value::as_str), pair.get(1).and_then(Value::as_str), pair.len())
            else {
                return Err(wrong("tojson with separators that are not two texts"));
            };
            (item.to_owned(), key.to_owned())
        }
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: options.is_set(0, "ensure_ascii")?,
        sort_keys: options.is_set(3, "sort_keys")?,
        indent,
        item_separator,
        key_separator,
    };
    options.finish(4)?;
    let mut out = String::new();
    write_value(&mut out, value, &style, 0, state)?;
    Ok(out)
}

fn write_value(
    out: &mut String,
    value: &Value,
    style: &Style,
    depth: usize,
    state: &State,
) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(wrong(format!("tojson of a value nested deeper than {MAX_DEPTH} levels")));
    }
    // what a list within lists repeats may be far longer than what the template made
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / 64)?;
    match kind(value) {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Iterable => {
            let kind = type_name(value);
            return Err(wrong(format!(
                "Object of type {kind} is not JSON serializable; put |list before |tojson"
            )));
        }
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(out, style, depth, ('[', ']'), &items, |out, item| {
                write_value(out, item, style, depth + 1, state)
            })?;
        }
        ValueKind::Map if is_dict(value) => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                let mut sorted: Vec<(Value, ())> = keys.into_iter().map(|key| (key, ())).collect();
                sort_by_key(&mut sorted, false)?;
                keys = sorted.into_iter().map(|(key, ())| key).collect();
            }
            write_items(out, style, depth, ('{', '}'), &keys, |out, key| {
                match key.kind() {
                    ValueKind::String => {
                        write_string(out, key.as_str().unwrap_or_default(), style.ensure_ascii);
                    }
                    ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                        out.push('"');
                        write_value(out, key, style, depth, state)?;
                        out.push('"');
                    }
                    _ => {
                        let kind = type_name(key);
                        return Err(wrong(format!("keys must be str, int, float, bool or None, not {kind}")));
                    }
                }
                out.push_str(&style.key_separator);
                write_value(out, &value.get_item(key)?, style, depth + 1, state)
            })?;
        }
        _ => {
            return Err(wrong(format!("Object of type {} is not JSON serializable", type_name(value))));
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    style: &Style,
    depth: usize,
    (open, close): (char, char),
    items: &[Value],
    mut write_item: impl FnMut(&mut String, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let break_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    };
    out.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        break_line(out, depth + 1);
        write_item(out, item)?;
    }
    if !items.is_empty() {
        break_line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if u32::from(control) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(control));
            }
            other if ensure_ascii && !(' '..='~').contains(&other) => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

fn write_number(out: &mut String, value: &Value) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
        return;
    }
    match f64::try_from(value.clone()) {
        Ok(float) => out.push_str(&python_float(float)),
        Err(_) => {
            let _ = write!(out, "{value}");
        }
    }
}

/// `repr(float)` of Python: shortest round-trip digits, exponent form outside `1e-4 ..< 1e16`.
pub(super) fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return (if float > 0.0 { "Infinity" } else { "-Infinity" }).to_owned();
    }
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = format!("{float}");
    if text.contains('.') { text } else { format!("{text}.0") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        for (float, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (123_456.0, "123456.0"),
            (1e100, "1e+100"),
        ] {
            assert_eq!(python_float(float), text);
        }
    }
}
