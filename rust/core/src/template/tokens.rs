//! The code of one block of a template, word by word, as Jinja2 reads it.

/// A word, a literal or an operator.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'c> {
    /// Its first byte in the code.
    pub(super) start: usize,
    /// Its text, literals with their quotes.
    pub(super) text: &'c str,
}

impl Token<'_> {
    /// One past its last byte.
    pub(super) fn end(&self) -> usize {
        self.start + self.text.len()
    }

    /// Whether it is a string literal.
    pub(super) fn is_string(&self) -> bool {
        self.text.starts_with(['\'', '"'])
    }

    /// Whether it is a number.
    pub(super) fn is_number(&self) -> bool {
        self.text.starts_with(|first: char| first.is_ascii_digit())
    }

    /// Whether it is a name or a keyword.
    pub(super) fn is_word(&self) -> bool {
        self.text.starts_with(|first: char| first.is_alphabetic() || first == '_')
    }
}

/// The tokens between the delimiters of a block.
pub(super) fn tokens(code: &str) -> Vec<Token<'_>> {
    let end = ["-%}", "+%}", "%}", "-}}", "+}}", "}}"]
        .into_iter()
        .find(|close| code.len() >= 2 + close.len() && code.ends_with(close))
        .map_or(code.len(), |close| code.len() - close.len());
    let opening = code.get(2..).unwrap_or_default();
    let mut at = if opening.starts_with(['-', '+']) && code.starts_with("{%") || opening.starts_with('-') {
        3
    } else {
        2
    };
    let mut found: Vec<Token> = Vec::new();
    while at < end {
        let rest = &code[at..end];
        let Some(first) = rest.chars().next() else { break };
        let after_point = found.last().is_some_and(|token| token.text == "." && token.end() == at);
        let length = if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        } else if let Some(length) = string_length(rest) {
            length
        } else if first.is_ascii_digit() {
            number_length(rest, !after_point)
        } else if first.is_alphanumeric() || first == '_' {
            rest.find(|next: char| !(next.is_alphanumeric() || next == '_')).unwrap_or(rest.len())
        } else {
            let double = ["==", "!=", "<=", ">=", "//", "**"].into_iter().find(|two| rest.starts_with(two));
            double.map_or(first.len_utf8(), str::len)
        };
        found.push(Token { start: at, text: &code[at..at + length] });
        at += length;
    }
    found
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

/// The length of a number, with a sign in its exponent; `x.0.1` has no fractions.
fn number_length(text: &str, may_have_point: bool) -> usize {
    let mut length = 0;
    let bytes = text.as_bytes();
    let is_decimal = !text.starts_with("0x") && !text.starts_with("0X");
    while let Some(&byte) = bytes.get(length) {
        let follows_exponent = matches!(bytes.get(length.wrapping_sub(1)), Some(b'e' | b'E')) && is_decimal;
        let is_point =
            may_have_point && byte == b'.' && bytes.get(length + 1).is_some_and(u8::is_ascii_digit);
        if byte.is_ascii_alphanumeric()
            || byte == b'_'
            || is_point
            || (follows_exponent && b"+-".contains(&byte))
        {
            length += 1;
        } else {
            break;
        }
    }
    length
}

/// Whether Jinja2 reads a number so: `007` is none.
pub(super) fn is_number(text: &str) -> bool {
    let digits = |text: &str, base: u32| {
        !text.is_empty()
            && text.split('_').all(|part| !part.is_empty() && part.chars().all(|digit| digit.is_digit(base)))
    };
    let lower = text.to_ascii_lowercase();
    for (prefix, base) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(rest) = lower.strip_prefix(prefix) {
            return digits(rest.strip_prefix('_').unwrap_or(rest), base);
        }
    }
    let (mantissa, exponent) = lower.split_once('e').map_or((lower.as_str(), None), |(m, e)| (m, Some(e)));
    let (whole, fraction) = mantissa.split_once('.').map_or((mantissa, None), |(w, f)| (w, Some(f)));
    let is_integer = exponent.is_none() && fraction.is_none();
    digits(whole, 10)
        && fraction.is_none_or(|fraction| digits(fraction, 10))
        && exponent.is_none_or(|exponent| digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent), 10))
        && (!is_integer || !whole.starts_with('0') || whole.chars().all(|digit| matches!(digit, '0' | '_')))
}

/// What a string literal without its quotes says: escapes as in Python. An error says what cannot be read.
pub(super) fn unescape(inner: &str) -> Result<String, String> {
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(kind) = rest.chars().next() else {
            return Err("a string ends with a backslash".to_owned());
        };
        let mut taken = kind.len_utf8();
        let simple = match kind {
            '\n' => Some(""),
            '\\' => Some("\\"),
            '\'' => Some("'"),
            '"' => Some("\""),
            'a' => Some("\u{7}"),
            'b' => Some("\u{8}"),
            'f' => Some("\u{c}"),
            'n' => Some("\n"),
            'r' => Some("\r"),
            't' => Some("\t"),
            'v' => Some("\u{b}"),
            _ => None,
        };
        if let Some(text) = simple {
            out.push_str(text);
        } else if let Some((digits, base)) = match kind {
            'x' => Some((2, 16)),
            'u' => Some((4, 16)),
            'U' => Some((8, 16)),
            '0'..='7' => {
                Some((rest.bytes().take(3).take_while(|byte| (b'0'..=b'7').contains(byte)).count(), 8))
            }
            _ => None,
        } {
            let from = usize::from(base != 8);
            taken = from + digits;
            let number = rest.get(from..taken).filter(|text| text.chars().all(|digit| digit.is_digit(base)));
            let character = number
                .and_then(|text| u32::from_str_radix(text, base).ok())
                .and_then(char::from_u32)
                .ok_or_else(|| format!("a string holds the escape \\{kind}, which is no character"))?;
            out.push(character);
        } else if kind == 'N' {
            return Err("a string names a character by \\N{…}; write the character itself".to_owned());
        } else {
            out.push('\\');
            out.push(kind);
        }
        rest = &rest[taken..];
    }
    out.push_str(rest);
    Ok(out)
}

/// `text` as a literal on one line that the engine reads as such.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('\'');
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\'' => out.push_str("\\'"),
            '\r' => out.push_str("\\r"),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    out.push('\'');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_jinja() {
        for text in ["0", "00", "0_0", "12", "1_000", "1e3", "1.5e-3", "0x1F", "0b101", "0o17", "00.5"] {
            assert!(is_number(text), "{text}");
        }
        for text in ["007", "1__0", "1_", "0x", "12ab", "1e"] {
            assert!(!is_number(text), "{text}");
        }
    }

    #[test]
    fn escapes_are_those_of_python() {
        for (inner, text) in [
            (r"a\n\t\\\'\q", "a\n\t\\'\\q"),
            (r"\x41\u00e9\U0001F600\101\0", "A\u{e9}\u{1f600}A\0"),
            ("a\\\nb", "ab"),
        ] {
            assert_eq!(unescape(inner).as_deref(), Ok(text));
        }
        for inner in [r"\x4", r"\ud83d\ude00", r"\N{BULLET}", r"\u12"] {
            assert!(unescape(inner).is_err(), "{inner}");
        }
    }
}
