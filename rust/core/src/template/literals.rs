//! The string literals in the source of a template.

use super::tokens::{string_length, unescape};

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
            let Some(length) = string_length(rest) else {
                let mut characters = rest.chars();
                characters.next();
                rest = characters.as_str();
                continue;
            };
            let inner = rest[1..length].strip_suffix(&rest[..1]).unwrap_or(&rest[1..length]);
            let literal = unescape(inner).unwrap_or_else(|_| inner.to_owned());
            rest = &rest[length..];
            if !literal.is_empty() && !literals.contains(&literal) {
                literals.push(literal);
            }
        }
    }
    literals
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
