//! Where a turn of the assistant begins: at the end of what a generation prompt gives.
//!
//! What the template writes between the piece before the turn and a generation prompt is known from [probes](super::probes)
//! after a question and after the answer of a tool; elsewhere the messages before are rendered with a prompt. What a turn
//! repeats of a prompt that opens more than it keeps (a forced `<think>`) is given too, in whole tags and lines.

use super::marks::{self, leading_white_space};
use super::rendered::Part;
use super::spans::{Run, Tracker};
use super::stops::shared_prefix;

impl Tracker<'_> {
    /// Where the turn of an assistant message begins: the end of what the generation prompt gives.
    pub(super) fn turn_start(&mut self, number: usize) -> usize {
        let run = self.runs[number];
        let previous = number.checked_sub(1).map(|number| self.runs[number]);
        let before = previous.map_or(0, |run| self.pieces.list[run.last].end);
        let first = self.pieces.list[run.first].start;
        let limit = self.pieces.list[run.last].end;
        let trailing = previous.map_or("", |run| self.trailing_white_space(run));
        let header = &self.text[before..first];
        let prompt = self.probes.generation_prompt.trim_start();
        // between two messages one may stand of which nothing is shown but a header
        if let Some(run) = previous.filter(|previous| previous.message + 1 == run.message) {
            let role = self.conversation.messages[run.message].role;
            let openings = self.probes.openings.iter().filter(|(before, _)| *before == role);
            let found = openings.flat_map(|(_, opening)| [(trailing, opening), ("", opening)]).find_map(
                |(kept, opening)| {
                    self.text[before..limit].strip_prefix(kept)?.strip_prefix(opening.as_str())?;
                    Some(before + kept.len() + opening.len())
                },
            );
            if let Some(at) = found {
                // what opens a turn is no part of it, even where the prompt would leave it out
                let whole =
                    header.rfind(prompt).filter(|_| !prompt.is_empty()).map(|at| before + at + prompt.len());
                return whole.map_or(at, |whole| whole.max(at));
            }
        }
        let key = format!("{} {header}", trailing.len());
        let given = self
            .given
            .get(&key)
            .copied()
            .unwrap_or_else(|| self.given_by_prompt(run, previous, &self.text[before..limit], header));
        self.given.insert(key, given);
        // the messages before cannot be rendered alone, or differ then: as much of the prompt as is in the header
        // white space before the prompt may be missing at the start of a text
        let tokens = &self.template.tokens;
        let by_prompt = tokens.openings_of(prompt).filter_map(|prompt| {
            prompt_borders(prompt).find_map(|length| {
                let at = before + header.rfind(&prompt[..length])? + length;
                let repeated = shared_prefix(&self.text[at..limit], &prompt[length..]);
                Some(at + prompt[length..length + repeated].rfind(['>', '\n']).map_or(0, |last| last + 1))
            })
        });
        let by_prompt = by_prompt.max();
        let given = given.map(|given| before + given);
        // nothing is given by a prompt that is not there
        given.max(by_prompt).unwrap_or_else(|| self.later_start(number))
    }

    /// White space that the last words of `run` end with, which the template may keep.
    fn trailing_white_space(&self, run: Run) -> &str {
        let content = self.conversation.messages[run.message].content.as_deref().unwrap_or_default();
        &content[content.trim_end_matches(marks::is_white_space).len()..]
    }

    /// How much of `said`, what comes after the piece before, a generation prompt writes there.
    fn given_by_prompt(&self, run: Run, previous: Option<Run>, said: &str, header: &str) -> Option<usize> {
        let messages = &self.conversation.messages[..run.message];
        let opening = match previous {
            Some(previous) => self.tail_of(run.message, self.pieces.list[previous.last].stretch, true)?,
            None => self.template.render_messages(messages, self.conversation, true).ok()?,
        };
        if said.starts_with(opening.as_str()) {
            return Some(opening.len());
        }
        // the prompt opens more than this turn has (a forced `<think>`), or other: what both share is given
        let prompt = self.probes.generation_prompt.trim_start();
        let own = self.template.tokens.openings_of(prompt).find(|prompt| opening.ends_with(prompt));
        let prompt_start = opening.len() - own.map_or(0, str::len);
        let shared = shared_prefix(said, &opening);
        // of its words, a turn repeats whole tags and lines
        let is_border = |text: &str| {
            if text.len() > header.len() { text.ends_with(['>', '\n']) } else { ends_at_border(text) }
        };
        let mut cuts = (prompt_start..=shared).rev().filter(|&cut| opening.is_char_boundary(cut));
        let cut = cuts.find(|&cut| is_border(&opening[..cut]))?;
        let given = &opening[prompt_start..cut];
        (!marks::trim(given).is_empty()).then_some(cut)
    }

    /// Where a message goes on after another one spoke: with what opens a call, or with its words.
    pub(super) fn later_start(&self, number: usize) -> usize {
        let run = self.runs[number];
        let first = self.pieces.list[run.first];
        let before = number.checked_sub(1).map_or(0, |number| self.pieces.list[self.runs[number].last].end);
        let header = &self.text[before..first.start];
        if !matches!(self.pieces.part_of(&first), Part::Call(_)) {
            // with the white space that its words begin with, where the template keeps it
            let content = self.conversation.messages[run.message].content.as_deref().unwrap_or_default();
            let leading = leading_white_space(content);
            return first.start - if header.ends_with(leading) { leading.len() } else { 0 };
        }
        // what the template writes before a call, or as much of that as is there
        let opening = self.probes.call_opening.as_deref().unwrap_or_default();
        let opened = shared_suffix(header, opening);
        if opened == 0 {
            return before + self.template.tokens.last_start(header).unwrap_or(header.len());
        }
        first.start - opened
    }
}

/// The lengths at which a prompt may be cut, the whole first.
fn prompt_borders(prompt: &str) -> impl Iterator<Item = usize> {
    let is_border = |&length: &usize| {
        length == prompt.len() || prompt.is_char_boundary(length) && ends_at_border(&prompt[..length])
    };
    (1..=prompt.len()).rev().filter(is_border).filter(|&length| !marks::trim(&prompt[..length]).is_empty())
}

pub(super) fn ends_at_border(text: &str) -> bool {
    text.ends_with(['>', '\n', ' ', ':', ']'])
}

/// What `prompt` writes after what `header` ends with; `None` where that is all of it, or nothing of it.
pub(super) fn rest_of_prompt<'p>(prompt: &'p str, header: &str) -> Option<&'p str> {
    let prompt = prompt.trim_start();
    let length = prompt_borders(prompt).find(|&length| header.ends_with(&prompt[..length]))?;
    Some(&prompt[length..]).filter(|rest| !rest.is_empty())
}

/// The bytes that two texts share at their end, in whole characters.
fn shared_suffix(left: &str, right: &str) -> usize {
    let shared = left.chars().rev().zip(right.chars().rev()).take_while(|(one, other)| one == other);
    shared.map(|(one, _)| one.len_utf8()).sum()
}
