//! A list that a row holds as text: JSON, or as Python prints a list.
//!
//! Spreadsheets and older tools write `history` so. The Python form has lists, tuples, dictionaries
//! with keys of text, strings, `None`, `True` and `False`; anything else is no literal of a row.

use serde_json::{Map, Value};

use super::parse_json;

/// The value that `text` writes down; `Null` where it is blank.
pub(super) fn parse_literal(text: &str) -> Option<Value> {
    if text.trim().is_empty() {
        return Some(Value::Null);
    }
    if let Ok(value) = parse_json(text.as_bytes()) {
        return Some(value);
    }
    let mut reader = Reader { rest: text.trim() };
    let value = reader.value(MAX_DEPTH)?;
    reader.rest.is_empty().then_some(value)
}

/// Lists in lists; a history has two, or three with messages of parts.
const MAX_DEPTH: usize = 8;

struct Reader<'t> {
    rest: &'t str,
}

impl Reader<'_> {
    /// Passes over `token` and the white space after it, where it comes next.
    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            None => false,
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
        }
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        let depth = depth.checked_sub(1)?;
        if self.take("[") {
            return self.list(depth, "]");
        }
        if self.take("(") {
            return self.list(depth, ")");
        }
        if self.take("{") {
            return self.object(depth);
        }
        if self.rest.starts_with(['\'', '"']) {
            return self.string().map(Value::String);
        }
        let words = [("None", Value::Null), ("True", true.into()), ("False", false.into())];
        words.into_iter().find(|(word, _)| self.take(word)).map(|(_, value)| value)
    }

    fn list(&mut self, depth: usize, close: &str) -> Option<Value> {
        let mut values = Vec::new();
        while !self.take(close) {
            values.push(self.value(depth)?);
            if !self.take(",") && !self.rest.starts_with(close) {
                return None;
            }
        }
        Some(Value::Array(values))
    }

    fn object(&mut self, depth: usize) -> Option<Value> {
        let mut object = Map::new();
        while !self.take("}") {
            let key = self.string()?;
            let value = self.take(":").then(|| self.value(depth)).flatten()?;
            if object.insert(key, value).is_some() || (!self.take(",") && !self.rest.starts_with('}')) {
                return None;
            }
        }
        Some(Value::Object(object))
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next().filter(|letter| matches!(letter, '\'' | '"'))?;
        let mut letters = self.rest.chars();
        letters.next();
        let mut text = String::new();
        loop {
            match letters.next()? {
                letter if letter == quote => break,
                '\n' => return None,
                '\\' => {
                    let escaped = letters.next()?;
                    let digits = match escaped {
                        'x' => 2,
                        'u' => 4,
                        'U' => 8,
                        _ => 0,
                    };
                    match escaped {
                        '\n' => {}
                        'x' | 'u' | 'U' => {
                            let number = letters.as_str().get(..digits)?;
                            // a sign is no digit
                            let number = Some(number).filter(|number| !number.starts_with('+'))?;
                            text.push(char::from_u32(u32::from_str_radix(number, 16).ok()?)?);
                            letters = letters.as_str().get(digits..)?.chars();
                        }
                        'n' => text.push('\n'),
                        't' => text.push('\t'),
                        'r' => text.push('\r'),
                        '\\' | '\'' | '"' => text.push(escaped),
                        // what Python prints has no other escape; guessing would change the text
                        _ => return None,
                    }
                }
                letter => text.push(letter),
            }
        }
        self.rest = letters.as_str().trim_start();
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse_literal;

    #[test]
    fn lists_are_read_as_json_or_as_python_prints_them() {
        let expected = json!([["it's", "a \"b\"\n"], ["é\u{0}", "你😀"]]);
        for text in [
            expected.to_string(),
            r#"[["it's", 'a "b"\n'], ('é\x00', '\u4f60\U0001f600',)]"#.to_owned(),
            " [ ['it\\'s','a \"b\"\\n' ] , ['é\\x00', '你😀'] ] ".to_owned(),
        ] {
            assert_eq!(parse_literal(&text), Some(expected.clone()), "{text}");
        }
        assert_eq!(
            parse_literal("[{'role': 'user', 'content': None}]"),
            Some(json!([{"role": "user", "content": null}]))
        );
        assert_eq!(parse_literal("  "), Some(json!(null)));
        assert_eq!(parse_literal("[]"), Some(json!([])));
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for text in [
            "['a', 'b'",
            "['a' 'b']",
            "[1 + 1]",
            "f()",
            "['a\\q']",
            "['\\ud83d']",
            "['a'] x",
            "[{'a': 'b', 'a': 'c'}]",
        ] {
            assert_eq!(parse_literal(text), None, "{text}");
        }
        assert_eq!(parse_literal(&"[".repeat(100_000)), None);
        assert_eq!(parse_literal(&"('a', ".repeat(100_000)), None);
    }
}
