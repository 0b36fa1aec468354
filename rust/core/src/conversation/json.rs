//! JSON text to a value, strictly.
//!
//! What a lenient reader drops in silence is an error here: a key that an object has twice, an integer
//! whose digits do not fit into 64 bits. Every error carries line and column, in characters.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value, map::Entry};

use crate::{Error, Result};

/// Parses JSON; an error carries line and column within `text`.
pub fn parse_json(text: &[u8]) -> Result<Value> {
    let text = std::str::from_utf8(text).map_err(|error| {
        let at = error.valid_up_to();
        let byte = text.get(at).copied().unwrap_or_default();
        let message =
            format!("byte 0x{byte:02x} is not UTF-8; convert the file, for example with iconv -t UTF-8");
        problem_at(text, at, message)
    })?;
    let is_huge = Cell::new(false);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { is_huge: &is_huge }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| explain(text, &error))?;
    match is_huge.get().then(|| find_long_integer(text)).flatten() {
        None => Ok(value),
        Some((at, digits)) => Err(problem_at(
            text.as_bytes(),
            at,
            format!(
                "the integer {digits} does not fit into 64 bits and would lose digits; write it as a string"
            ),
        )),
    }
}

/// Line and column, both from 1, of a byte offset in UTF-8 text; columns are characters.
pub(crate) fn line_and_column(text: &[u8], offset: usize) -> (u64, u64) {
    let before = text.get(..offset).unwrap_or(text);
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let line = before.split(|&byte| byte == b'\n').count();
    // a continuation byte (0b10xxxxxx) does not start a character
    let column = before.iter().skip(start).filter(|&&byte| byte & 0xC0 != 0x80).count() + 1;
    (line as u64, column as u64)
}

fn problem_at(text: &[u8], offset: usize, message: String) -> Error {
    let (line, column) = line_and_column(text, offset);
    let mut problem = Error::row("", message);
    problem.place.line = Some(line);
    problem.place.column = Some(column);
    problem
}

/// The mark of the error that this module itself raises while it reads an object.
const SECOND_KEY: &str = "a second key ";

/// An error of the parser in our words, at its place.
fn explain(text: &str, error: &serde_json::Error) -> Error {
    let bytes = text.as_bytes();
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        let message = "a NUL byte in the text; the file was not written whole, write it again".to_owned();
        return problem_at(bytes, at, message);
    }
    let at = offset_of_error(bytes, error);
    let reason = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let reason = reason.strip_suffix(&place).unwrap_or(&reason);
    if reason.starts_with(SECOND_KEY) {
        let message = format!("{reason} in one object; keep one of them");
        return problem_at(bytes, start_of_string(bytes, at), message);
    }
    let rest = text.get(at..).unwrap_or_default();
    if let Some(word) = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| rest.starts_with(word)) {
        return problem_at(bytes, at, format!("not JSON: {word} is no value; write null or a number"));
    }
    if rest.starts_with('\u{FEFF}') {
        let message =
            "not JSON: a byte-order mark inside the file, where another begins; remove it".to_owned();
        return problem_at(bytes, at, message);
    }
    match reason {
        "number out of range" => {
            let message = "not JSON: a number that 64 bits cannot hold; write it as a string".to_owned();
            problem_at(bytes, at, message)
        }
        "trailing characters" => {
            let message = "not JSON: text after the end of the row; write one row a line".to_owned();
            problem_at(bytes, at, message)
        }
        reason if reason.starts_with("control character") => {
            let byte = bytes.get(at).copied().unwrap_or_default();
            let message = format!(
                "not JSON: the control character 0x{byte:02x} in a string; write it as \\u{byte:04x}"
            );
            problem_at(bytes, at, message)
        }
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" => {
            let (at, escape) = lone_surrogate(text).unwrap_or((at, ""));
            let message = format!(
                "not JSON: a lone surrogate {escape}, which is half a character; write the character itself or both halves"
            );
            problem_at(bytes, at, message)
        }
        "recursion limit exceeded" => {
            problem_at(bytes, at, "a value nested deeper than 127 levels; flatten it".to_owned())
        }
        reason => problem_at(bytes, at, format!("not JSON: {reason}")),
    }
}

/// The byte at which the parser stood; its columns count bytes, from 1.
fn offset_of_error(text: &[u8], error: &serde_json::Error) -> usize {
    let starts = text.iter().enumerate().filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| at + 1);
    let start = std::iter::once(0).chain(starts).nth(error.line().saturating_sub(1)).unwrap_or_default();
    (start + error.column().saturating_sub(1)).min(text.len())
}

/// Where the string literal begins whose closing quote is the last one up to `end`.
fn start_of_string(text: &[u8], end: usize) -> usize {
    let mut quotes = (0..=end.min(text.len().saturating_sub(1))).rev().filter(|&at| {
        let escapes = || text.iter().take(at).rev().take_while(|&&byte| byte == b'\\').count();
        text.get(at) == Some(&b'"') && escapes() % 2 == 0
    });
    quotes.nth(1).unwrap_or(end)
}

/// The first `\uXXXX` that is half a character, with its byte.
fn lone_surrogate(text: &str) -> Option<(usize, &str)> {
    let escape = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = 0;
    while let Some(found) = text.get(at..)?.find('\\') {
        at += found;
        match escape(at) {
            Some(0xD800..=0xDBFF) if matches!(escape(at + 6), Some(0xDC00..=0xDFFF)) => at += 12,
            Some(0xD800..=0xDFFF) => return Some((at, text.get(at..at + 6)?)),
            Some(_) => at += 6,
            // an escape of one character, which may take more than one byte in broken text
            None => at += 1 + text.get(at + 1..)?.chars().next()?.len_utf8(),
        }
    }
    None
}

/// The first integer in JSON `text` that 64 bits cannot hold, with its byte.
fn find_long_integer(text: &str) -> Option<(usize, &str)> {
    let bytes = text.as_bytes();
    if !has_digits_in_a_row(bytes) {
        return None;
    }
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at += 1;
                while *bytes.get(at)? != b'"' {
                    at += 1 + usize::from(bytes.get(at) == Some(&b'\\'));
                }
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let rest = text.get(at..)?;
                let end = rest
                    .find(|letter: char| !matches!(letter, '-' | '+' | '.' | 'e' | 'E' | '0'..='9'))
                    .unwrap_or(rest.len());
                let number = rest.get(..end)?;
                let is_integer = !number.contains(['.', 'e', 'E']);
                if is_integer && number.parse::<u64>().is_err() && number.parse::<i64>().is_err() {
                    return Some((at, number));
                }
                at += end;
            }
            _ => at += 1,
        }
    }
    None
}

/// Whether `text` has as many digits in a row as 2^63 has; mostly looks at one byte in 19.
fn has_digits_in_a_row(text: &[u8]) -> bool {
    const DIGITS: usize = 19;
    (0..text.len()).step_by(DIGITS).any(|at| {
        let (before, after) = text.split_at(at);
        let after = after.iter().take_while(|byte| byte.is_ascii_digit()).count();
        after > 0
            && after + before.iter().rev().take_while(|byte| byte.is_ascii_digit()).take(DIGITS).count()
                >= DIGITS
    })
}

/// Builds a value as `serde_json` does, but refuses a second key; `is_huge` is set where a number came as a
/// float that a long integer could have become.
#[derive(Clone, Copy)]
struct Strict<'c> {
    is_huge: &'c Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        // 2^63, below which every integer fits
        if value.abs() >= 9_223_372_036_854_775_808.0 {
            self.is_huge.set(true);
        }
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = pairs.next_key::<String>()? {
            match object.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(pairs.next_value_seed(self)?);
                }
                Entry::Occupied(entry) => {
                    return Err(A::Error::custom(format!("{SECOND_KEY}\"{}\"", entry.key())));
                }
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::parse_json;

    fn message(text: &str) -> String {
        parse_json(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn good_json_is_what_serde_makes_of_it() {
        for text in [
            r#" {"b": [1, -2, 0.1, 1e20, 1E-3, true, null, "\ud83d\ude00\n"], "a": {"x": {}}} "#,
            "18446744073709551615",
            "-9223372036854775808",
            "100000000000000000000.0",
        ] {
            let expected: serde_json::Value = serde_json::from_str(text).unwrap();
            let value = parse_json(text.as_bytes()).unwrap();
            assert_eq!(value, expected);
            assert_eq!(value.to_string(), expected.to_string());
        }
    }

    #[test]
    fn a_second_key_is_named_at_its_place() {
        assert_eq!(
            message("{\"é\": 1,\n \"k\\\"\": {\"你\": \"a\", \"x\": 2, \"x\": 3}}"),
            "row:2:28: a second key \"x\" in one object; keep one of them"
        );
        assert_eq!(
            message(r#"{"a\\": 1, "a\\": 2}"#),
            r#"row:1:12: a second key "a\" in one object; keep one of them"#
        );
    }

    #[test]
    fn an_integer_that_would_lose_digits_is_refused() {
        let text = r#"{"a": "123456789012345678901", "b": [1e30, 18446744073709551616]}"#;
        assert_eq!(
            message(text),
            "row:1:44: the integer 18446744073709551616 does not fit into 64 bits and would lose digits; write it \
             as a string"
        );
        assert!(message("-9223372036854775809").contains("-9223372036854775809"));
    }

    #[test]
    fn broken_text_is_explained_at_its_place() {
        for (text, expected) in [
            (
                r#"{"é": "\ud83d"}"#,
                "row:1:8: not JSON: a lone surrogate \\ud83d, which is half a character; ",
            ),
            (r#"{"a": "\\\ud83d\u0041"}"#, "row:1:10: not JSON: a lone surrogate \\ud83d"),
            (r#"["\ud83d\ude00", "\ude00"]"#, "row:1:19: not JSON: a lone surrogate \\ude00"),
            ("{\"a\": \"x\0\0", "row:1:9: a NUL byte in the text; the file was not written whole"),
            (r#"{"é": NaN}"#, "row:1:7: not JSON: NaN is no value; write null or a number"),
            (r#"{"é": [}"#, "row:1:8: not JSON: expected value"),
            (r#"{"a": 1} x"#, "row:1:10: not JSON: text after the end of the row; write one row a line"),
            (r#"{"a": 1"#, "not JSON: EOF while parsing an object"),
        ] {
            assert!(message(text).contains(expected), "{text}: {}", message(text));
        }
    }

    #[test]
    fn deep_nesting_is_refused_without_a_crash() {
        for open in ["[", "{\"a\":"] {
            assert!(message(&open.repeat(100_000)).contains("nested deeper than 127 levels"));
        }
        assert!(parse_json(format!("{}1{}", "[".repeat(127), "]".repeat(127)).as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"[\[\]{}:,"\\u0-9d8aeE.\-é\x00 \n]{0,40}"#) {
            let _ = parse_json(text.as_bytes());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse_json(&bytes);
        }
    }
}
