//! The string literals in the source of a template.

/// Each string literal inside `{{ }}` and `{% %}`, without its quotes and escapes, once.
pub(super) fn string_literals(source: &str) -> Vec<String> {
    let mut literals: Vec<String> = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let kind = &rest[at..at + 2];
        rest = &rest[at + 2..];
        let close = match kind {
            "{{" => "}}",
            "{%" => "%}",
            _ => {
                rest = rest.find("#}").map_or("", |end| &rest[end + 2..]);
                continue;
            }
        };
        while !rest.is_empty() && !rest.starts_with(close) {
            let mut characters = rest.chars();
            let quote = characters.next().filter(|character| matches!(character, '\'' | '"'));
            rest = characters.as_str();
            if let Some(quote) = quote {
                let (literal, length) = read_literal(rest, quote);
                rest = &rest[length..];
                if !literal.is_empty() && !literals.contains(&literal) {
                    literals.push(literal);
                }
            }
        }
    }
    literals
}

/// A literal that begins at the start of `text` and ends at `quote`, and its length with the quote.
fn read_literal(text: &str, quote: char) -> (String, usize) {
    let mut literal = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => literal.extend(characters.next().and_then(|(_, escaped)| match escaped {
                'n' => Some('\n'),
                't' => Some('\t'),
                'r' => Some('\r'),
                'u' => {
                    let digits = characters.by_ref().take(4).map(|(_, digit)| digit);
                    char::from_u32(u32::from_str_radix(&digits.collect::<String>(), 16).ok()?)
                }
                other => Some(other),
            })),
            _ if character == quote => return (literal, at + quote.len_utf8()),
            _ => literal.push(character),
        }
    }
    (literal, text.len())
}

#[cfg(test)]
mod tests {
    use super::string_literals;

    #[test]
    fn finds_literals_in_code_alone() {
        let source = "it's {# 'no' #}{{ 'a' + \"b'c\" }} 'text' {% if x == '\\n\\u00e9' and 'a' in y %}{% endif %}{{ 'open";
        assert_eq!(string_literals(source), ["a", "b'c", "\né", "open"]);
    }
}
