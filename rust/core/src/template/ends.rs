//! Where a turn of the assistant ends: what of the text after its last words or call is the model's to say.
//!
//! [Probes](super::probes) know what closes turns; where the text says else, [stops](super::stops) tell from what comes
//! after the same words at the end of a chat.

use crate::Result;

use super::marks::{self, leading_white_space};
use super::rendered::Part;
use super::spans::{Tracker, lost};
use super::stops::Closing;

impl Tracker<'_> {
    /// Whether words of the template's own come after what is last of a turn, a call or reasoning, before what closes it.
    pub(super) fn ends_within_markup(&self, message: usize, last: Part) -> bool {
        let unseen = self.pieces.stretches.iter().zip(&self.pieces.is_followed);
        let is_call = |part: Part| matches!(part, Part::Call(_));
        is_call(last)
            || last == Part::Reasoning
            || unseen
                .filter(|(stretch, _)| stretch.message == message && is_call(stretch.part))
                .any(|(_, is_followed)| !is_followed)
    }

    /// What closes an answer, where it is what probes found.
    pub(super) fn known_end(&self, tail: &str) -> Option<Closing> {
        let skipped = leading_white_space(tail).len();
        let ends = [&self.probes.ends.inner, &self.probes.ends.last];
        ends.into_iter().flatten().find_map(|end| {
            let after = tail[skipped..].strip_prefix(end.lead.as_str())?;
            let start = skipped + end.lead.len();
            after.starts_with(end.text.as_str()).then(|| Closing { start, end: start + end.text.len() })
        })
    }

    /// What closes an answer.
    pub(super) fn answer_end(&self, tail: &str, next_role: Option<&str>) -> Option<Closing> {
        let last = if next_role.is_some() { "" } else { tail };
        let may_be_marker = self.may_stop(tail, next_role);
        self.known_end(tail).or_else(|| self.template.tokens.after_answer(tail, last, may_be_marker))
    }

    /// Whether the first token of `text`, which may be the marker of the next role, may be what stops a turn. What opens
    /// another turn of the assistant is not, unless it stops all turns.
    fn may_stop(&self, text: &str, next_role: Option<&str>) -> bool {
        let tokens = &self.template.tokens;
        let stops_all = |token: &str| self.probes.ends.inner.as_ref().is_some_and(|end| end.text == token);
        match next_role {
            None => false,
            Some("assistant") => {
                let prompt = self.probes.generation_prompt.trim_start();
                let mut openings = tokens.openings_of(prompt);
                let mut opens = |token: &str| openings.any(|opening| opening.starts_with(token));
                !prompt.is_empty()
                    && tokens.first_token(text).is_some_and(|token| stops_all(token) || !opens(token))
            }
            Some(_) => true,
        }
    }

    /// Where a turn ends whose last is a call or reasoning, which words of the template close, and what stops it.
    pub(super) fn call_end(
        &self,
        number: usize,
        tail: &str,
        next_role: Option<&str>,
    ) -> Result<(usize, Option<Closing>)> {
        let tokens = &self.template.tokens;
        let core = |shared: usize| tail[..shared].trim_end_matches(marks::is_white_space).len();
        if next_role.is_none() {
            // a template may go on with a turn of its own
            let marker = self.probes.turn_marker.as_deref();
            let opening = marker.and_then(|marker| tokens.first_of(tail, marker));
            let tail = &tail[..opening.unwrap_or(tail.len())];
            return Ok((core(tail.len()), tokens.after_call(tail, tail, false)));
        }
        let ends = &self.probes.ends;
        let known: Vec<&str> = ends.call.iter().map(|end| end.token.as_str()).collect();
        if let Some(closing) = tokens.first_eos(tail, &known) {
            return Ok((0, Some(closing)));
        }
        let run = self.runs[number];
        let last = self.pieces.list[run.last];
        if let Some(at_end) = self.tail_of(run.message + 1, last.stretch, false) {
            let shared = core(tokens.shared(tail, &at_end));
            let may_be_marker = self.may_stop(&tail[shared..], next_role);
            if !self.calls_follow(run.message, &tail[shared..]) {
                return Ok((shared, tokens.after_call(tail, &at_end, may_be_marker)));
            }
        }
        match tokens.first_eos(tail, &ends.tokens()) {
            Some(closing) => Ok((0, Some(closing))),
            None => Err(lost(run.message, "ends")),
        }
    }

    /// What closes a call, with the tokens before it where an answer is closed by the same ones.
    pub(super) fn with_all_tokens(&self, tail: &str, closing: Closing) -> Closing {
        let ends = [&self.probes.ends.inner, &self.probes.ends.last].into_iter().flatten();
        let known = ends.filter(|end| tail[..closing.end].ends_with(end.text.as_str()));
        let start = known.map(|end| closing.end - end.text.len()).min();
        Closing { start: start.map_or(closing.start, |start| start.min(closing.start)), end: closing.end }
    }

    /// Whether calls that could not be followed stand in what should come after them.
    fn calls_follow(&self, message: usize, text: &str) -> bool {
        let stretches = self.pieces.stretches.iter().zip(&self.pieces.is_followed);
        stretches
            .filter(|(stretch, is_followed)| stretch.message == message && !**is_followed)
            .any(|(stretch, _)| matches!(stretch.part, Part::Call(_)) && text.contains(stretch.text.as_str()))
    }
}
