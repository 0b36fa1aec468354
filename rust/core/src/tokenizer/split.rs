//! Cutting text into the words that a byte-pair encoding merges within.
//!
//! A `tokenizer.json` names its cuts as regular expressions for a backtracking engine. All of the
//! common ones are, but for one look-ahead, regular: they end in `\s+(?!\S)|\s+`, which says "white
//! space, but leave its last character to a word that follows". That tail is taken off and done
//! by hand; the rest is compiled to one dense automaton, which reads each byte about once.

use std::sync::OnceLock;

use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::util::primitives::StateID;
use regex_automata::{Anchored, MatchKind};

/// The expression of GPT-2, which `ByteLevel` applies where `use_regex` is on.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const TAIL: &str = r"|\s+(?!\S)|\s+";
const WHITE_SPACE: &str = r"\s+";

/// What becomes of the text between two matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gap {
    Keep,
    Drop,
}

/// One stage of cutting: each piece goes on to the next stage.
pub(super) enum Stage {
    Regex(Box<Splitter>),
    /// Each numeric character by itself, or runs of them.
    Digits {
        individual: bool,
    },
}

/// A compiled expression.
pub(super) struct Splitter {
    dfa: dense::DFA<Vec<u32>>,
    start: StateID,
    /// Whether a match can begin with this byte.
    begins: [bool; 256],
    /// The expression had the tail `\s+(?!\S)|\s+`.
    has_tail: bool,
    gap: Gap,
}

impl Splitter {
    /// Compiles `pattern`, or says what in it is not regular.
    pub(super) fn new(pattern: &str, gap: Gap) -> Result<Self, String> {
        let (head, has_tail) = match pattern.strip_suffix(TAIL) {
            Some(head) => (head, true),
            None => (pattern, false),
        };
        let patterns: &[&str] = if has_tail { &[head, WHITE_SPACE] } else { &[head] };
        let configuration =
            dense::Config::new().match_kind(MatchKind::LeftmostFirst).start_kind(StartKind::Anchored);
        let dfa = dense::Builder::new()
            .configure(configuration)
            .build_many(patterns)
            .map_err(|error| format!("the expression {pattern:?} is not regular: {error}"))?;
        let start = dfa
            .universal_start_state(Anchored::Yes)
            .ok_or_else(|| format!("the expression {pattern:?} looks behind its start"))?;
        if dfa.is_match_state(dfa.next_eoi_state(start)) {
            return Err(format!("the expression {pattern:?} matches the empty text"));
        }
        let mut begins = [false; 256];
        for (byte, begins) in (0..=u8::MAX).zip(&mut begins) {
            *begins = !dfa.is_dead_state(dfa.next_state(start, byte));
        }
        Ok(Self { dfa, start, begins, has_tail, gap })
    }

    /// The end of the match that begins at `from`.
    fn match_end(&self, text: &[u8], from: usize) -> Option<usize> {
        let mut state = self.start;
        let mut found = None;
        let mut at = from;
        // a match is known one byte after its end
        while let Some(&byte) = text.get(at) {
            state = self.dfa.next_state(state, byte);
            if self.dfa.is_special_state(state) {
                if self.dfa.is_match_state(state) {
                    found = Some((at, state));
                } else if self.dfa.is_dead_state(state) {
                    break;
                }
            }
            at += 1;
        }
        if at == text.len() {
            state = self.dfa.next_eoi_state(state);
            if self.dfa.is_match_state(state) {
                found = Some((at, state));
            }
        }
        let (end, state) = found?;
        if self.has_tail && end < text.len() && self.dfa.match_pattern(state, 0).as_usize() == 1 {
            return Some(leave_last(text, from, end));
        }
        Some(end)
    }

    /// Calls `each` with the pieces of `text[start..end]`.
    fn split(&self, text: &[u8], start: usize, end: usize, each: &mut impl FnMut(usize, usize)) {
        let text = &text[..end];
        let mut at = start;
        let mut kept = start;
        while at < end {
            let found = if self.begins[usize::from(text[at])] { self.match_end(text, at) } else { None };
            let Some(stop) = found else {
                at += 1;
                continue;
            };
            if kept < at && self.gap == Gap::Keep {
                each(kept, at);
            }
            each(at, stop);
            at = stop;
            kept = stop;
        }
        if kept < end && self.gap == Gap::Keep {
            each(kept, end);
        }
    }
}

/// White space `from..end` before other text: its last character goes to what follows, unless it is the
/// only one.
fn leave_last(text: &[u8], from: usize, end: usize) -> usize {
    let mut last = end - 1;
    while text[last] & 0xC0 == 0x80 {
        last -= 1;
    }
    if last > from { last } else { end }
}

impl Stage {
    /// The stage of `expression`.
    pub(super) fn regex(expression: &str, gap: Gap) -> Result<Self, String> {
        Ok(Self::Regex(Box::new(Splitter::new(expression, gap)?)))
    }

    /// Calls `each` with the pieces of `text[start..end]`, in order.
    pub(super) fn split(&self, text: &[u8], start: usize, end: usize, each: &mut impl FnMut(usize, usize)) {
        match self {
            Self::Regex(splitter) => splitter.split(text, start, end, each),
            Self::Digits { individual } => split_digits(text, start, end, *individual, each),
        }
    }
}

fn split_digits(
    text: &[u8],
    start: usize,
    end: usize,
    individual: bool,
    each: &mut impl FnMut(usize, usize),
) {
    let mut kept = start;
    let mut at = start;
    while at < end {
        let byte = text[at];
        let (numeric, length) = if byte < 0x80 {
            (byte.is_ascii_digit(), 1)
        } else {
            let length = char_length(byte);
            (is_numeric(&text[at..at + length]), length)
        };
        if !numeric {
            at += length;
            continue;
        }
        if kept < at {
            each(kept, at);
        }
        let mut stop = at + length;
        while !individual && stop < end {
            let length = char_length(text[stop]);
            if !is_numeric(&text[stop..stop + length]) {
                break;
            }
            stop += length;
        }
        each(at, stop);
        at = stop;
        kept = stop;
    }
    if kept < end {
        each(kept, end);
    }
}

/// The length of the UTF-8 character that begins with `byte`.
pub(super) fn char_length(byte: u8) -> usize {
    match byte {
        0..0x80 => 1,
        0x80..0xE0 => 2,
        0xE0..0xF0 => 3,
        _ => 4,
    }
}

fn is_numeric(character: &[u8]) -> bool {
    // two table look-ups decide most characters of the basic plane without decoding
    static LEADS: OnceLock<Vec<bool>> = OnceLock::new();
    if let [lead, second, _] = *character {
        let leads = LEADS.get_or_init(|| {
            let mut leads = vec![false; 1 << 16];
            for character in ('\u{800}'..='\u{FFFF}').filter(|character| character.is_numeric()) {
                let mut bytes = [0; 4];
                let bytes = character.encode_utf8(&mut bytes).as_bytes();
                leads[usize::from(bytes[0]) << 8 | usize::from(bytes[1])] = true;
            }
            leads
        });
        if !leads[usize::from(lead) << 8 | usize::from(second)] {
            return false;
        }
    }
    std::str::from_utf8(character).is_ok_and(|text| text.chars().all(char::is_numeric))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(pattern: &str, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        let splitter = Splitter::new(pattern, Gap::Keep).expect("regular");
        splitter.split(text.as_bytes(), 0, text.len(), &mut |start, end| {
            found.push(text[start..end].to_owned());
        });
        found
    }

    #[test]
    fn the_last_space_goes_to_the_word_after_it() {
        assert_eq!(pieces(GPT2, "a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces(GPT2, "a \n b  "), ["a", " \n", " b", "  "]);
        assert_eq!(pieces(GPT2, "a\u{3000}\u{3000}b"), ["a", "\u{3000}", "\u{3000}", "b"]);
        assert_eq!(pieces(GPT2, "it's 3\n"), ["it", "'s", " 3", "\n"]);
    }

    #[test]
    fn gaps_are_pieces_of_their_own() {
        assert_eq!(pieces(r"\p{N}{1,3}", "ab1234 c"), ["ab", "123", "4", " c"]);
    }
}
