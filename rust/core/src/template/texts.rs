//! What Python does with a text alone: letter case, words, lines.

use super::marks::is_white_space;

fn is_cased(character: char) -> bool {
    character.is_uppercase() || character.is_lowercase() || is_title_letter(character)
}

/// The letters that are two in one, of which the first is large.
fn is_title_letter(character: char) -> bool {
    matches!(character, '\u{1c5}' | '\u{1c8}' | '\u{1cb}' | '\u{1f2}')
}

/// `str.isupper()` or `str.islower()`: some letters with a case, and none of the other.
pub(super) fn is_of_one_case(text: &str, is_upper: bool) -> bool {
    let (has_upper, has_lower) = (text.contains(char::is_uppercase), text.contains(char::is_lowercase));
    let (is_there, is_other) = if is_upper { (has_upper, has_lower) } else { (has_lower, has_upper) };
    is_there && !is_other && !text.contains(is_title_letter)
}

/// The title case of one character.
fn title_letter(character: char, out: &mut String) {
    match character {
        '\u{1c4}'..='\u{1c6}' => out.push('\u{1c5}'),
        '\u{1c7}'..='\u{1c9}' => out.push('\u{1c8}'),
        '\u{1ca}'..='\u{1cc}' => out.push('\u{1cb}'),
        '\u{1f1}'..='\u{1f3}' => out.push('\u{1f2}'),
        // Georgian has no title case of its own
        '\u{10d0}'..='\u{10ff}' => out.push(character),
        _ => {
            // what becomes several letters is large in the first alone
            let mut upper = character.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
    }
}

/// `str.title()`: the first letter of each run of letters is large.
pub(super) fn title(text: &str) -> String {
    by_words(text, |before| before.is_some_and(is_cased))
}

/// `str.capitalize()`.
pub(super) fn capitalize(text: &str) -> String {
    by_words(text, |before| before.is_some())
}

/// Letters, large or small by the character before each.
fn by_words(text: &str, is_small: impl Fn(Option<char>) -> bool) -> String {
    // a sigma at the end of a word is another letter, which only the whole text tells
    let lower: Vec<String> = if text.contains('\u{3a3}') {
        let lower: Vec<char> = text.to_lowercase().chars().collect();
        if lower.len() == text.chars().count() {
            lower.into_iter().map(String::from).collect()
        } else {
            text.chars().map(|each| each.to_lowercase().collect()).collect()
        }
    } else {
        text.chars().map(|each| each.to_lowercase().collect()).collect()
    };
    let mut out = String::with_capacity(text.len());
    let mut before = None;
    for (character, lower) in text.chars().zip(lower) {
        if is_small(before) {
            out.push_str(&lower);
        } else {
            title_letter(character, &mut out);
        }
        before = Some(character);
    }
    out
}

/// Words between white space; after so many splits the rest as it is.
pub(super) fn split_words(text: &str, most: usize, is_right: bool) -> Vec<&str> {
    let mut pieces = Vec::new();
    let trim = |text| {
        if is_right {
            str::trim_end_matches(text, is_white_space)
        } else {
            str::trim_start_matches(text, is_white_space)
        }
    };
    let mut rest: &str = trim(text);
    while !rest.is_empty() {
        let at = if is_right { rest.rfind(is_white_space) } else { rest.find(is_white_space) };
        let Some(at) = at.filter(|_| pieces.len() < most) else {
            pieces.push(rest);
            break;
        };
        let next = at + rest[at..].chars().next().map_or(1, char::len_utf8);
        if is_right {
            pieces.push(&rest[next..]);
            rest = trim(&rest[..at]);
        } else {
            pieces.push(&rest[..at]);
            rest = trim(&rest[next..]);
        }
    }
    if is_right {
        pieces.reverse();
    }
    pieces
}

/// `str.splitlines()`: at every end of a line that Unicode knows.
pub(super) fn lines(text: &str, keeps_ends: bool) -> Vec<&str> {
    let is_end =
        |each: char| matches!(each, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let length = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        found.push(if keeps_ends { &rest[..at + length] } else { &rest[..at] });
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}

/// `text.center(width, fill)`: what is odd stands at the left where the width is odd.
pub(super) fn center(text: &str, width: usize, fill: &str) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = missing / 2 + (missing & width & 1);
    format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_large_where_python_has_them_so() {
        assert_eq!(title("they're bill's x2y \u{df}a \u{1c6}x"), "They'Re Bill'S X2Y Ssa \u{1c5}x");
        assert_eq!(capitalize("\u{1c6}X \u{df}A"), "\u{1c5}x \u{df}a");
    }

    #[test]
    fn lines_and_words_are_those_of_python() {
        assert_eq!(lines("a\r\nb\u{b}c\u{85}\n", false), ["a", "b", "c", ""]);
        assert_eq!(lines("a\r\nb", true), ["a\r\n", "b"]);
        assert_eq!(split_words(" a  b c ", 1, false), ["a", "b c "]);
        assert_eq!(split_words(" a  b c ", 1, true), [" a  b", "c"]);
        assert_eq!(center("ab", 5, "*"), "**ab*");
    }
}
