//! The code of one block of a template, word by word: enough to find the operands of `~` and what a loop runs over.

use super::print::TEXT;

/// Words that end an operand.
const KEYWORDS: [&str; 14] = [
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "for",
    "set",
    "with",
    "recursive",
    "print",
    "call",
];

/// A word, a literal or an operator.
#[derive(Debug, Clone, Copy)]
struct Token<'c> {
    start: usize,
    text: &'c str,
}

impl Token<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }

    fn opens(&self) -> bool {
        matches!(self.text, "(" | "[" | "{")
    }

    fn closes(&self) -> bool {
        matches!(self.text, ")" | "]" | "}")
    }

    fn is_literal(&self) -> bool {
        self.text.starts_with(['\'', '"'])
    }

    /// Whether it stands between two operands of the rank of `~`, or above them.
    fn ends_operand(&self) -> bool {
        matches!(self.text, "," | ":" | "=" | "~" | "+" | "-" | "==" | "!=" | "<" | ">" | "<=" | ">=")
            || KEYWORDS.contains(&self.text)
    }

    /// Whether an operand may end with it.
    fn is_value(&self) -> bool {
        self.closes()
            || self.is_literal()
            || (self.text.starts_with(|first: char| first.is_alphanumeric() || first == '_')
                && !KEYWORDS.contains(&self.text))
    }
}

/// The tokens between the delimiters of a block.
fn tokens(code: &str) -> Vec<Token<'_>> {
    let end = [&["-%}", "+%}", "%}", "-}}", "}}"][..]]
        .concat()
        .into_iter()
        .find(|close| code.len() >= 2 + close.len() && code.ends_with(close))
        .map_or(code.len(), |close| code.len() - close.len());
    let mut at = code.len() - code.get(2..).unwrap_or_default().trim_start_matches(['-', '+']).len();
    let mut found = Vec::new();
    while at < end {
        let rest = &code[at..end];
        let Some(first) = rest.chars().next() else { break };
        let length = if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        } else if let Some(length) = super::python::string_length(rest) {
            length
        } else if first.is_ascii_digit() {
            number_length(rest)
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

/// The length of a number, with a sign in its exponent.
fn number_length(text: &str) -> usize {
    let mut length = 0;
    let bytes = text.as_bytes();
    while let Some(&byte) = bytes.get(length) {
        let follows_exponent = matches!(bytes.get(length.wrapping_sub(1)), Some(b'e' | b'E'))
            && !text.starts_with("0x")
            && !text.starts_with("0X");
        let is_point = byte == b'.' && bytes.get(length + 1).is_some_and(u8::is_ascii_digit);
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

/// Puts the filter [`TEXT`] on what stands beside `~`: the engine would write numbers its own way there.
pub(super) fn print_operands(code: &str) -> String {
    if !code.contains('~') {
        return code.to_owned();
    }
    let tokens = tokens(code);
    let mut edits: Vec<(usize, String)> = Vec::new();
    for (at, _) in tokens.iter().enumerate().filter(|(_, token)| token.text == "~") {
        // an operand between two `~` is dealt with as the right one of the first
        let left = operand_before(&tokens, at);
        let is_chained = left.checked_sub(1).is_some_and(|before| tokens[before].text == "~");
        if !is_chained {
            print_operand(&tokens, left..at, &mut edits);
        }
        print_operand(&tokens, at + 1..operand_after(&tokens, at + 1), &mut edits);
    }
    // in the order of the text, and a closing one before an opening one at the same place
    edits.sort_by_key(|(place, text)| (*place, text == "("));
    let mut out = String::with_capacity(code.len() + 16 * edits.len());
    let mut from = 0;
    for (place, text) in edits {
        out.push_str(&code[from..place]);
        out.push_str(&text);
        from = place;
    }
    out.push_str(&code[from..]);
    out
}

fn print_operand(tokens: &[Token], range: std::ops::Range<usize>, edits: &mut Vec<(usize, String)>) {
    let Some([first, .., last] | [first @ last]) = tokens.get(range.clone()) else { return };
    // a test gives a truth, which is written alike
    let is_test = |at: usize| tokens.get(at).is_some_and(|token| token.text == "is");
    let before = range.start.checked_sub(1);
    let negated = before.is_some_and(|at| tokens[at].text == "not" && at.checked_sub(1).is_some_and(is_test));
    if before.is_some_and(is_test)
        || negated
        || is_test(range.end)
        || (range.len() == 1 && first.is_literal())
    {
        return;
    }
    let mut depth = 0usize;
    let is_joined = tokens[range].iter().any(|token| {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            depth = depth.saturating_sub(1);
        }
        depth == 0 && matches!(token.text, "*" | "/" | "//" | "%" | "**")
    });
    if is_joined || matches!(first.text, "-" | "+") {
        edits.push((first.start, "(".to_owned()));
        edits.push((last.end(), format!(")|{TEXT}")));
    } else {
        edits.push((last.end(), format!("|{TEXT}")));
    }
}

/// Whether the token at a place is a sign, and not what joins two values.
fn is_sign(tokens: &[Token], at: usize) -> bool {
    matches!(tokens[at].text, "-" | "+") && !at.checked_sub(1).is_some_and(|before| tokens[before].is_value())
}

fn operand_before(tokens: &[Token], end: usize) -> usize {
    let mut depth = 0usize;
    let mut at = end;
    while let Some(before) = at.checked_sub(1) {
        let token = &tokens[before];
        if token.closes() {
            depth += 1;
        } else if token.opens() {
            if depth == 0 {
                break;
            }
            depth -= 1;
        } else if depth == 0 && token.ends_operand() && !is_sign(tokens, before) {
            break;
        }
        at = before;
    }
    at
}

fn operand_after(tokens: &[Token], start: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(start) {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            if depth == 0 {
                return at;
            }
            depth -= 1;
        } else if depth == 0 && token.ends_operand() && !is_sign(tokens, at) {
            return at;
        }
    }
    tokens.len()
}

/// `for x in VALUES if …` with the filter `filter` on `VALUES`.
pub(super) fn filter_loop(code: &str, filter: &str) -> String {
    let tokens = tokens(code);
    let is_loop = code.starts_with("{%") && tokens.first().is_some_and(|token| token.text == "for");
    let Some(start) = tokens.iter().position(|token| token.text == "in").filter(|_| is_loop) else {
        return code.to_owned();
    };
    let mut depth = 0usize;
    let end = tokens.iter().skip(start + 1).position(|token| {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            depth = depth.saturating_sub(1);
        }
        depth == 0 && matches!(token.text, "if" | "recursive")
    });
    let values = &tokens[start + 1..end.map_or(tokens.len(), |end| start + 1 + end)];
    let Some([first, .., last] | [first @ last]) = Some(values) else { return code.to_owned() };
    let is_path = values.iter().all(|token| token.text == "." || token.is_value() && !token.closes());
    let (head, inside, tail) = (&code[..first.start], &code[first.start..last.end()], &code[last.end()..]);
    if is_path {
        format!("{head}{inside}|{filter}{tail}")
    } else {
        format!("{head}({inside})|{filter}{tail}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_become_text() {
        for (code, rewritten) in [
            ("{{ a + b }}", "{{ a + b }}"),
            ("{{ a ~ 'b' }}", "{{ a|text__ ~ 'b' }}"),
            ("{{- a.b[0] ~ c|d(e) ~ f -}}", "{{- a.b[0]|text__ ~ c|d(e)|text__ ~ f|text__ -}}"),
            ("{{ a + b ~ c * 2 }}", "{{ a + b|text__ ~ (c * 2)|text__ }}"),
            ("{{ -a ~ -1e-05 }}", "{{ (-a)|text__ ~ (-1e-05)|text__ }}"),
            ("{% if a ~ b == c %}", "{% if a|text__ ~ b|text__ == c %}"),
            ("{{ a is number ~ b }}", "{{ a is number ~ b|text__ }}"),
            ("{{ f(a ~ b, c={'~': d ~ '}}'}) }}", "{{ f(a|text__ ~ b|text__, c={'~': d|text__ ~ '}}'}) }}"),
            ("{% set x = a ~ (b if c else d) %}", "{% set x = a|text__ ~ (b if c else d)|text__ %}"),
        ] {
            assert_eq!(print_operands(code), rewritten);
        }
    }

    #[test]
    fn loops_have_their_filter() {
        for (code, rewritten) in [
            ("{%- for a in b.c -%}", "{%- for a in b.c|each -%}"),
            ("{% for a in b if a in c %}", "{% for a in b|each if a in c %}"),
            (
                "{% for a, b in f(x)[1:]|items recursive %}",
                "{% for a, b in (f(x)[1:]|items)|each recursive %}",
            ),
            ("{% if a in b %}", "{% if a in b %}"),
        ] {
            assert_eq!(filter_loop(code, "each"), rewritten);
        }
    }
}
