//! The code of a block, rewritten so that the engine does what Jinja2 does.
//!
//! One block comes in with its delimiters, and goes out with filters in place of what the engine does otherwise: the
//! order of two values, `in`, `%`, places and slices of lists, `~`, what a loop runs over. What Jinja2 renders and nothing
//! here can is refused. All else stays where it stands, so that errors name the right lines.

use super::expression::{Kind, Operand, Parser};
use super::tokens::{self, Token};

/// Filters whose result is a text that Jinja2 escapes what is added to.
const MARKUP_FILTERS: [&str; 4] = ["e", "escape", "forceescape", "safe"];

/// A text to put in place of a stretch of code, which may be empty.
pub(super) struct Edit {
    start: usize,
    end: usize,
    text: String,
    opens: bool,
}

/// What the blocks of a template have in common.
#[derive(Debug, Default)]
pub(super) struct Rewriter {
    /// Whether texts may be such that Jinja2 escapes what is added to them.
    has_markup: bool,
    /// How many macros are open.
    macros: usize,
}

impl Rewriter {
    /// What there is to know of `blocks`, which are all those of the template.
    pub(super) fn new<'c>(blocks: impl Iterator<Item = &'c str>) -> Self {
        let mut rewriter = Self::default();
        for code in blocks {
            let tokens = tokens::tokens(code);
            let is_pipe = |token: &Token| token.text == "|" || token.text == "filter";
            rewriter.has_markup |=
                tokens.windows(2).any(|pair| is_pipe(&pair[0]) && MARKUP_FILTERS.contains(&pair[1].text))
                    || tokens.iter().any(|token| {
                        token.is_string() && MARKUP_FILTERS.contains(&token.text.trim_matches(['\'', '"']))
                    });
        }
        rewriter
    }

    /// One block, rewritten.
    pub(super) fn rewrite(&mut self, code: &str) -> Result<String, String> {
        let tokens = tokens::tokens(code);
        if code.starts_with("{%") {
            match tokens.first().map(|token| token.text) {
                Some("macro") => self.macros += 1,
                Some("endmacro") => self.macros = self.macros.saturating_sub(1),
                _ => {}
            }
        }
        let mut parser = Parser {
            code,
            tokens: &tokens,
            at: 0,
            edits: Vec::new(),
            has_markup: self.has_markup,
            in_macro: self.macros > 0,
        };
        if code.starts_with("{{") {
            let value = parser.tuple(true)?;
            if value.1 {
                parser.open(value.0.start, "(");
                parser.close(value.0.end, ")");
            }
            parser.expect_end()?;
        } else {
            parser.statement()?;
        }
        Ok(apply(code, parser.edits))
    }
}

/// `code` with `edits`: what closes comes before what opens at the same place, and the inner ones are nearer to the code.
fn apply(code: &str, edits: Vec<Edit>) -> String {
    let mut edits: Vec<(usize, Edit)> = edits.into_iter().enumerate().collect();
    edits.sort_by_key(|(number, edit)| {
        let is_replacement = edit.end > edit.start;
        let rank = if is_replacement { 2 } else { usize::from(edit.opens) };
        (edit.start, rank, if edit.opens { usize::MAX - number } else { *number })
    });
    let mut out = String::with_capacity(code.len() + 16 * edits.len());
    let mut from = 0;
    for (_, edit) in edits {
        out.push_str(&code[from..edit.start]);
        out.push_str(&edit.text);
        from = edit.end;
    }
    out.push_str(&code[from..]);
    out
}

/// Edits.
impl Parser<'_> {
    pub(super) fn open(&mut self, at: usize, text: &str) {
        self.edits.push(Edit { start: at, end: at, text: text.to_owned(), opens: true });
    }

    pub(super) fn close(&mut self, at: usize, text: &str) {
        self.edits.push(Edit { start: at, end: at, text: text.to_owned(), opens: false });
    }

    pub(super) fn replace(&mut self, start: usize, end: usize, text: impl Into<String>) {
        self.edits.push(Edit { start, end, text: text.into(), opens: false });
    }

    pub(super) fn replace_token(&mut self, token: Token, text: impl Into<String>) {
        self.replace(token.start, token.end(), text);
    }

    /// Puts a filter without arguments on an operand.
    pub(super) fn filter(&mut self, operand: Operand, name: &str) -> Operand {
        self.open(operand.start, "((");
        self.close(operand.end, &format!(")|{name})"));
        Operand { kind: Kind::Tight, ..operand }
    }

    /// `left OPERATOR right` as a filter of `left`; the operator stands in `start..end`.
    pub(super) fn binary(
        &mut self,
        left: Operand,
        (start, end): (usize, usize),
        right: Operand,
        name: &str,
    ) -> Operand {
        self.open(left.start, "((");
        self.replace(start, end, format!(")|{name}("));
        self.close(right.end, "))");
        Operand { start: left.start, end: right.end, kind: Kind::Tight }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(code: &str) -> String {
        Rewriter::default().rewrite(code).unwrap()
    }

    #[test]
    fn operands_of_a_tilde_become_text() {
        for (code, expected) in [
            ("{{ a + b }}", "{{ a + b }}"),
            ("{{ a ~ 'b' }}", "{{ a|text__ ~ 'b' }}"),
            ("{{- a.b ~ c|d(e) ~ f -}}", "{{- a.b|text__ ~ c|d(e)|text__ ~ f|text__ -}}"),
            ("{{ a + b ~ c * 2 }}", "{{ a + b|text__ ~ ((c * 2)|text__) }}"),
            ("{{ -a ~ -1e-05 }}", "{{ (-a)|text__ ~ ((-1e-05)|text__) }}"),
            ("{% if a ~ b == 'c' %}", "{% if a|text__ ~ b|text__ == 'c' %}"),
            ("{% set x = a ~ (b if c else d) %}", "{% set x = a|text__ ~ (b if c else d)|text__ %}"),
        ] {
            assert_eq!(rewritten(code), expected);
        }
    }

    #[test]
    fn operators_become_filters() {
        for (code, expected) in [
            ("{{ a<b }}", "{{ ((a)|less__(b)) }}"),
            ("{{ 'a' not in b.c }}", "{{ (('a' )|not_in__( b.c)) }}"),
            ("{{ a == 'b' and a != c }}", "{{ a == 'b' and ((a )|unequal__( c)) }}"),
            ("{{ a[1:][0] }}", "{{ ((((a)|slice__(1, none)))|item__(0)) }}"),
            ("{{ a['b'][c]['items'] }}", "{{ ((((a['b'])|item__(c)))|item__('items')) }}"),
            ("{{ m.content }}", "{{ m.content }}"),
            ("{{ messages[-1]['a'] }}", "{{ messages[-1]['a'] }}"),
            ("{{ a % 2 + -1|abs }}", "{{ a % 2 + (-1)|abs }}"),
            ("{{ '%s' % (a, b) }}", "{{ (('%s' )|remainder__( (a, b))) }}"),
            ("{{ a, b }}", "{{ (a, b) }}"),
            ("{{ '\\x41\\n' }}", "{{ 'A\\n' }}"),
            ("{% for a, b in f(x)|items recursive %}", "{% for a, b in ((f(x)|items)|each__) recursive %}"),
        ] {
            assert_eq!(rewritten(code), expected);
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (code, reason) in [
            ("{{ a < b < c }}", "chain of comparisons"),
            ("{{ 007 }}", "`007` is no number"),
            ("{{ '\\N{BULLET}' }}", "write the character itself"),
            ("{% macro m(a, b=a) %}", "uses the parameter `a`"),
            ("{% with a = 1, b = a %}", "uses the name `a`"),
            ("{% autoescape true %}", "`autoescape`"),
            ("{{ a b }}", "unexpected `b`"),
        ] {
            let error = Rewriter::default().rewrite(code).unwrap_err();
            assert!(error.contains(reason), "{code}: {error}");
        }
    }
}
