//! `{% generation %}` tags in the source of a template.

use super::marks::{GENERATION_END, GENERATION_START};

/// One `{% generation %}` or `{% endgeneration %}` tag of a template source.
struct GenerationTag<'s> {
    start: usize,
    end: usize,
    /// White-space control after `{%` and before `%}`: `-`, `+` or nothing.
    left: &'s str,
    right: &'s str,
    opens: bool,
}

fn next_generation_tag(source: &str, from: usize) -> Option<GenerationTag<'_>> {
    let mut from = from;
    loop {
        let start = from + source[from..].find("{%")?;
        let end = start + 2 + source[start + 2..].find("%}")? + 2;
        let inner = &source[start + 2..end - 2];
        let left_length = usize::from(inner.starts_with(['-', '+']));
        let right_length = usize::from(inner.len() > left_length && inner.ends_with(['-', '+']));
        let (left, rest) = inner.split_at(left_length);
        let (word, right) = rest.split_at(rest.len() - right_length);
        match word.trim() {
            "generation" => return Some(GenerationTag { start, end, left, right, opens: true }),
            "endgeneration" => return Some(GenerationTag { start, end, left, right, opens: false }),
            _ => from = start + 2,
        }
    }
}

pub(super) fn has_generation_tag(source: &str) -> bool {
    next_generation_tag(source, 0).is_some()
}

/// Replaces the tags, which Jinja does not know, by an `if` that keeps their white-space control; with
/// `marked`, it also writes a mark where the tag stood.
pub(super) fn replace_generation_tags(source: &str, marked: bool) -> String {
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while let Some(tag) = next_generation_tag(source, at) {
        out.push_str(&source[at..tag.start]);
        let (left, right) = (tag.left, tag.right);
        let mark = match (marked, tag.opens) {
            (false, _) => String::new(),
            (true, true) => format!("{{{{ '{GENERATION_START}' }}}}"),
            (true, false) => format!("{{{{ '{GENERATION_END}' }}}}"),
        };
        // the mark stands between two blocks on one line, so that trimming outside is not changed
        let word = if tag.opens { "if true" } else { "endif" };
        for piece in ["{%", left, " ", word, " %}", mark.as_str(), "{% ", word, " ", right, "%}"] {
            out.push_str(piece);
        }
        at = tag.end;
    }
    out.push_str(&source[at..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_become_blocks_and_all_else_stays() {
        let source = "{%}{% generation x %}a{%- generation -%}b{% endgeneration +%}{%";
        assert!(has_generation_tag(source) && !has_generation_tag("{%}{%-%}{% end generation %}"));
        let plain = "{%}{% generation x %}a{%- if true %}{% if true -%}b{% endif %}{% endif +%}{%";
        assert_eq!(replace_generation_tags(source, false), plain);
    }
}
