//! Marks that show where text went through a render.
//!
//! They are noncharacters of Unicode (Arabic Presentation Forms-A): valid in UTF-8, reserved for internal
//! use, and absent from text (a text that has them is not marked).

pub(super) const CONTENT_START: char = '\u{FDD0}';
pub(super) const CONTENT_END: char = '\u{FDD1}';
const INDEX_END: char = '\u{FDD2}';
pub(super) const GENERATION_START: char = '\u{FDD3}';
pub(super) const GENERATION_END: char = '\u{FDD4}';
/// What all of them begin with in UTF-8, as do some Arabic ligatures.
pub(super) const LEAD: &[u8] = b"\xEF\xB7";
const DIGIT_ZERO: u32 = 0xFDE0;

/// A mark found in a render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    ContentStart(usize),
    ContentEnd(usize),
    GenerationStart,
    GenerationEnd,
}

/// Whether `text` holds characters that marks are made of.
pub(super) fn has_marks(text: &str) -> bool {
    text.contains(['\u{FDD0}', '\u{FDD1}', '\u{FDD2}', '\u{FDD3}', '\u{FDD4}'])
}

/// The marks of a stretch of text.
pub(super) fn of(index: usize) -> (String, String) {
    let digits: String = format!("{index:x}")
        .chars()
        .filter_map(|digit| char::from_u32(DIGIT_ZERO + digit.to_digit(16)?))
        .collect();
    (format!("{CONTENT_START}{digits}{INDEX_END}"), format!("{CONTENT_END}{digits}{INDEX_END}"))
}

/// Removes all marks; each is returned with its byte in the text that remains.
pub(super) fn take_marks(marked: &str) -> (String, Vec<(usize, Mark)>) {
    let mut text = String::with_capacity(marked.len());
    let mut marks = Vec::new();
    let mut rest = marked;
    while let Some(at) = rest.find(['\u{FDD0}', '\u{FDD1}', '\u{FDD3}', '\u{FDD4}']) {
        text.push_str(&rest[..at]);
        let mut characters = rest[at..].chars();
        let kind = characters.next();
        match kind {
            Some(GENERATION_START) => marks.push((text.len(), Mark::GenerationStart)),
            Some(GENERATION_END) => marks.push((text.len(), Mark::GenerationEnd)),
            _ => {
                let digits = characters.by_ref().take_while(|&digit| digit != INDEX_END);
                let index = digits.fold(0, |index, digit| index * 16 + (u32::from(digit) & 0xF) as usize);
                let mark = if kind == Some(CONTENT_START) { Mark::ContentStart } else { Mark::ContentEnd };
                marks.push((text.len(), mark(index)));
            }
        }
        rest = characters.as_str();
    }
    text.push_str(rest);
    (text, marks)
}

/// White space as Python's `str.strip` has it.
pub(super) fn is_white_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// `str.strip()`.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(is_white_space)
}

/// What `str.lstrip()` takes away.
pub(super) fn leading_white_space(text: &str) -> &str {
    &text[..text.len() - text.trim_start_matches(is_white_space).len()]
}
