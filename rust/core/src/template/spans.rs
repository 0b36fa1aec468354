//! Which bytes of a rendered conversation are trained.
//!
//! The trained span of an assistant turn runs from the end of what the generation prompt renders to
//! the token that closes the turn, included. Where the template has `{% generation %}`, the tag decides.
//! Elsewhere the content of each message is put between [marks](super::marks), the template renders
//! once more, and the marks show where the content went, also when the template stripped or trimmed
//! it. Where a template drops a mark, or writes no generation prompt, the render of the messages
//! before a turn says where it begins; what was learned so about one turn holds for all turns that
//! are joined to the one before by the same text, so that the work stays linear in the chat. Every answer
//! is checked: the marked render without its marks is the plain render, and a turn that cannot be
//! placed is an error.

use std::collections::HashMap;

use crate::conversation::{Conversation, Message};
use crate::{Error, ErrorKind, Result};

use super::controls::{Controls, TrainOn, TrainOnEos};
use super::marks::{self, Mark, leading_white_space, take_marks};
use super::rendered::{Rendered, Segment};
use super::{ChatTemplate, PLAIN, TAGGED};

/// The marks of one message in the plain render.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Place {
    pub(super) start: Option<usize>,
    pub(super) end: Option<usize>,
}

/// What a message of the conversation says.
#[derive(Debug, Clone, Copy)]
struct Turn {
    start: usize,
    end: usize,
    message: usize,
}

/// One conversation on its way through a template.
struct Tracker<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
    text: String,
    places: Vec<Place>,
    /// What joins a turn to the content before it → how much of it the prompt gives.
    prompted: HashMap<Joint, usize>,
}

/// The text between two contents, and how much white space the first ends with and the second begins with: what the
/// template keeps of that is not its own.
type Joint = (String, usize, usize);

/// A conversation that went through the template, with what is trained of it.
#[derive(Debug, PartialEq)]
pub(super) struct Followed {
    pub(super) text: String,
    /// What is trained, in order.
    pub(super) spans: Vec<Segment>,
    /// Where the content of each message went.
    pub(super) places: Vec<Place>,
}

impl Followed {
    /// Without what only the way here needed.
    pub(super) fn into_rendered(self, conversation: &Conversation, controls: &Controls) -> Rendered {
        let mut contents = Vec::with_capacity(self.places.len());
        let mut lost = false;
        for (place, message) in self.places.iter().zip(&conversation.messages) {
            match (place.start, place.end) {
                (Some(start), Some(end)) if start <= end => contents.push((start, end)),
                _ => {
                    lost |= message.content.as_deref().is_some_and(|text| !marks::trim(text).is_empty());
                }
            }
        }
        contents.sort_unstable();
        Rendered::new(self.text, self.spans, contents, lost, controls)
    }
}

impl ChatTemplate {
    /// Renders `conversation` by Jinja and finds which bytes are trained.
    pub(super) fn follow(&self, conversation: &Conversation, controls: &Controls) -> Result<Followed> {
        let text = self.render(conversation, false)?;
        let places = self.places(conversation, &text);
        let mut tracker = Tracker { template: self, conversation, text, places, prompted: HashMap::new() };
        let spans = tracker.segments(controls)?;
        Ok(Followed { text: tracker.text, spans, places: tracker.places })
    }

    /// Where the contents went, by message; nothing where marks would change what is rendered.
    fn places(&self, conversation: &Conversation, text: &str) -> Vec<Place> {
        let messages = &conversation.messages;
        let nowhere = vec![Place::default(); messages.len()];
        if marks::has_marks(text) {
            return nowhere;
        }
        // a template that looks into the content may render marked content differently; where one
        // does so with the words of the user, those of the assistant may still be followed
        let all: fn(&Message) -> bool = |_| true;
        let marked = [all, |message| message.role == "assistant"].into_iter().find_map(|is_marked| {
            let values = messages
                .iter()
                .enumerate()
                .map(|(index, message)| self.message_value(message, is_marked(message).then_some(index)));
            let marked = self.render_values(PLAIN, values.collect(), conversation, false).ok()?;
            let (unmarked, marks) = take_marks(&marked);
            (unmarked == text).then_some(marks)
        });
        let mut places = nowhere;
        for (at, mark) in marked.unwrap_or_default() {
            match mark {
                Mark::ContentStart(index) if index < places.len() => {
                    places[index].start = places[index].start.or(Some(at));
                }
                Mark::ContentEnd(index) if index < places.len() => places[index].end = Some(at),
                _ => {}
            }
        }
        places
    }
}

impl Tracker<'_> {
    fn segments(&mut self, controls: &Controls) -> Result<Vec<Segment>> {
        let messages = &self.conversation.messages;
        let is_weighted = messages.iter().any(|message| message.weight.to_bits() != 1f32.to_bits());
        if controls.train_on == TrainOn::All {
            let whole = Segment { start: 0, end: self.text.len(), weight: 1.0, message: None };
            if !is_weighted {
                return Ok(vec![whole]);
            }
            let turns = self.turns(|_| true)?;
            return Ok(self.cover(&turns));
        }
        let is_trained = |message: &Message| match &controls.train_on {
            TrainOn::Roles(roles) => roles.contains(&message.role),
            _ => message.role == "assistant",
        };
        let last_question = match controls.train_on {
            TrainOn::Last => messages.iter().rposition(|message| message.role == "user").unwrap_or_default(),
            _ => 0,
        };
        let needs_messages = is_weighted || controls.train_on != TrainOn::Assistant;
        let turns = if self.template.tagged && !matches!(controls.train_on, TrainOn::Roles(_)) {
            self.tagged_turns(needs_messages)?
        } else {
            self.turns(is_trained)?
        };
        let last = turns.len().saturating_sub(1);
        let mut segments = Vec::with_capacity(turns.len());
        for (number, turn) in turns.into_iter().enumerate() {
            if needs_messages && turn.message < last_question {
                continue;
            }
            let keeps_eos = match controls.train_on_eos {
                TrainOnEos::Turn => true,
                TrainOnEos::Last => number == last,
                TrainOnEos::None => false,
            };
            let end = if keeps_eos { turn.end } else { self.before_turn_end(turn) };
            let weight = if needs_messages { messages[turn.message].weight } else { 1.0 };
            segments.push(Segment { start: turn.start, end, weight, message: Some(turn.message) });
        }
        Ok(segments)
    }

    /// The whole text at weight 1, but for the turns of messages that have their own.
    fn cover(&self, turns: &[Turn]) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut at = 0;
        for turn in turns {
            segments.push(Segment { start: at, end: turn.start, weight: 1.0, message: None });
            let weight = self.conversation.messages[turn.message].weight;
            segments.push(Segment { start: turn.start, end: turn.end, weight, message: Some(turn.message) });
            at = turn.end;
        }
        segments.push(Segment { start: at, end: self.text.len(), weight: 1.0, message: None });
        segments
    }

    fn tagged_turns(&self, needs_messages: bool) -> Result<Vec<Turn>> {
        let values =
            self.conversation.messages.iter().map(|message| self.template.message_value(message, None));
        let marked = self.template.render_values(TAGGED, values.collect(), self.conversation, false)?;
        let (text, marks) = take_marks(&marked);
        if text != self.text {
            return Err(unplaced("its {% generation %} marks change what it renders"));
        }
        let mut turns = Vec::new();
        let mut start = None;
        for (at, mark) in marks {
            match (mark, start) {
                (Mark::GenerationStart, None) => start = Some(at),
                (Mark::GenerationEnd, Some(from)) => {
                    turns.push(Turn { start: from, end: at, message: 0 });
                    start = None;
                }
                _ => return Err(unplaced("its {% generation %} tags are nested or out of order")),
            }
        }
        if needs_messages {
            let assistants: Vec<usize> = self.indices(|message| message.role == "assistant").collect();
            if assistants.len() != turns.len() {
                return Err(unplaced(
                    "the settings or a \"loss\" in the row ask for single turns, but turns and {% generation %} \
                     spans do not pair up",
                ));
            }
            for (turn, message) in turns.iter_mut().zip(assistants) {
                turn.message = message;
            }
        }
        Ok(turns)
    }

    fn indices(&self, is_wanted: impl Fn(&Message) -> bool) -> impl Iterator<Item = usize> {
        let wanted = move |(index, message)| is_wanted(message).then_some(index);
        self.conversation.messages.iter().enumerate().filter_map(wanted)
    }

    /// The turns of the wanted messages, in order.
    fn turns(&mut self, is_wanted: impl Fn(&Message) -> bool) -> Result<Vec<Turn>> {
        let wanted: Vec<usize> = self.indices(is_wanted).collect();
        let mut turns: Vec<Turn> = Vec::with_capacity(wanted.len());
        // from the last turn to the first: a turn is bounded by what comes after it
        let mut bound = self.text.len();
        let mut later = self.conversation.messages.len();
        for index in wanted.into_iter().rev() {
            let following = self.places[index + 1..later].iter().filter_map(|place| place.start).min();
            bound = following.map_or(bound, |start| start.min(bound));
            let place = self.places[index];
            if place.end.is_some_and(|end| end > bound) {
                return Err(unplaced(&format!("it moves the content of messages[{index}]")));
            }
            let start = if self.conversation.messages[index].role == "assistant" {
                self.turn_start(index, bound)?
            } else {
                place.start.ok_or_else(|| lost(index, "begins"))?
            };
            let end = self.turn_end(index, start, bound)?;
            if start > end {
                return Err(unplaced(&format!("the turn of messages[{index}] ends before it begins")));
            }
            self.check_said(index, start, end)?;
            turns.push(Turn { start, end, message: index });
            bound = start;
            later = index;
        }
        turns.reverse();
        Ok(turns)
    }

    /// A template may leave out what it does not know how to show; trained text must not get lost so.
    fn check_said(&self, index: usize, start: usize, end: usize) -> Result<()> {
        let message = &self.conversation.messages[index];
        let place = self.places[index];
        let content = marks::trim(message.content.as_deref().unwrap_or_default());
        let is_followed = place.start.or(place.end).is_some();
        if is_followed || content.is_empty() || !message.tool_calls().is_empty() || message.weight <= 0.0 {
            return Ok(());
        }
        let answer = content.rsplit("</think>").next().unwrap_or(content).trim();
        if self.text[start..end].contains(answer) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Template,
            format!(
                "the chat template leaves out or changes the content of messages[{index}], so it would not be \
                 trained; it may want content as a list of parts ([{{\"type\": \"text\", \"text\": ...}}]), or be \
                 made for another task; choose another --template, or set \"loss\": false on the message"
            ),
        ))
    }

    /// Where the turn of an assistant message begins: the end of what the generation prompt gives.
    fn turn_start(&mut self, index: usize, bound: usize) -> Result<usize> {
        let place = self.places[index];
        let before = self.places[..index].iter().rev().find_map(|place| place.end).unwrap_or_default();
        let is_next = index > 0 && self.places[index - 1].end == Some(before);
        let limit = place.end.unwrap_or(bound);
        if is_next && let Some(at) = self.start_after_question(index, before).filter(|&at| at <= limit) {
            return Ok(at);
        }
        let prompt = self.template.generation_prompt.as_str();
        if let Some(content_start) = place.start {
            let header = &self.text[before.min(content_start)..content_start];
            let content = self.conversation.messages[index].content.as_deref().unwrap_or_default();
            let header_end = header.strip_suffix(leading_white_space(content)).unwrap_or(header);
            let header_start = content_start - header.len();
            if let Some(at) = self.start_by_prompt(header_start, header_start + header_end.len()) {
                return Ok(at.min(limit));
            }
            if let Some(&given) = self.prompted.get(&self.joint(index, header_start, content_start)) {
                return Ok(header_start + given);
            }
        }
        if is_next {
            // there is more between header and content than the prompt gives (reasoning), or no content to
            // go by (only a tool call): the header is the first after the message before
            let found = prompt_borders(prompt).find_map(|length| {
                let at = self.text.get(before..limit)?.find(&prompt[..length])?;
                Some(self.repeat_of_prompt(before + at + length, &prompt[length..]))
            });
            if let Some(at) = found {
                return Ok(at);
            }
        }
        let (start, is_exact) = self.start_by_rendering(index, place)?;
        if let Some(content_start) =
            place.start.filter(|start_of_content| is_exact && start <= *start_of_content)
            && before <= start
        {
            self.prompted.insert(self.joint(index, before, content_start), start - before);
        }
        Ok(start)
    }

    fn joint(&self, index: usize, before: usize, content_start: usize) -> Joint {
        let content = |index: usize| self.conversation.messages[index].content.as_deref().unwrap_or_default();
        let trailing = index
            .checked_sub(1)
            .map(content)
            .map_or(0, |content| content.len() - content.trim_end_matches(marks::is_white_space).len());
        let leading = leading_white_space(content(index)).len();
        (self.text[before..content_start].to_owned(), trailing, leading)
    }

    /// The start of a turn after a question, where what stands between is what the template writes
    /// there with a generation prompt.
    fn start_after_question(&self, index: usize, question_end: usize) -> Option<usize> {
        let question = &self.conversation.messages[index - 1];
        let opening = self.template.opening.as_str();
        if question.role != "user" || opening.is_empty() {
            return None;
        }
        let content = question.content.as_deref().unwrap_or_default();
        let trailing = &content[content.trim_end_matches(marks::is_white_space).len()..];
        [trailing, ""].into_iter().find_map(|kept| {
            self.text[question_end..].strip_prefix(kept)?.strip_prefix(opening)?;
            Some(question_end + kept.len() + opening.len())
        })
    }

    /// The start of a turn whose header ends at `header_end`, by the generation prompt: as much of it as
    /// the header ends with, and what the turn itself repeats of the rest (a forced `<think>`).
    fn start_by_prompt(&self, header_start: usize, header_end: usize) -> Option<usize> {
        // white space before the header may differ between prompt and history
        let prompt = self.template.generation_prompt.trim_start();
        let header = &self.text[header_start..header_end];
        let length = prompt_borders(prompt).find(|&length| header.ends_with(&prompt[..length]))?;
        Some(self.repeat_of_prompt(header_end, &prompt[length..]))
    }

    /// The end of what the text from `at` on repeats of the rest of a prompt, in whole tags and lines.
    fn repeat_of_prompt(&self, at: usize, rest: &str) -> usize {
        let repeated = shared_prefix(&self.text[at..], rest);
        at + rest[..repeated].rfind(['>', '\n']).map_or(0, |last| last + 1)
    }

    /// The start of a turn by rendering the messages before it, and whether that is a prefix of the text.
    fn start_by_rendering(&self, index: usize, place: Place) -> Result<(usize, bool)> {
        let text = self.text.as_str();
        let earlier = &self.conversation.messages[..index];
        let prompted = self.template.render_messages(earlier, self.conversation, true);
        if let Ok(prompted) = &prompted
            && text.starts_with(prompted.as_str())
            && place.end.is_none_or(|end| prompted.len() <= end)
        {
            return Ok((prompted.len(), true));
        }
        let limit = place.start.or(place.end);
        // the prompt opens more than earlier turns keep (a forced `<think>`): what both share is given
        let plain = self.template.render_messages(earlier, self.conversation, false);
        if let (Ok(prompted), Ok(plain)) = (&prompted, plain)
            && text.starts_with(plain.as_str())
        {
            let shared = shared_prefix(&text[plain.len()..], prompted.get(plain.len()..).unwrap_or_default());
            let whole = text[plain.len()..plain.len() + shared].rfind(['>', '\n']).map_or(0, |last| last + 1);
            let shared = plain.len() + whole;
            return Ok((limit.map_or(shared, |limit| shared.min(limit)), false));
        }
        match place.start {
            Some(content_start) if self.template.generation_prompt.is_empty() => Ok((content_start, false)),
            _ => Err(lost(index, "begins")),
        }
    }

    /// Where the turn of a message ends: after the token that closes it, else after its content.
    fn turn_end(&self, index: usize, start: usize, bound: usize) -> Result<usize> {
        let message = &self.conversation.messages[index];
        let token = self.template.turn_end.as_deref();
        let close = |from: usize| {
            token.and_then(|token| Some(from + self.text.get(from..bound)?.find(token)? + token.len()))
        };
        let has_calls = !message.tool_calls().is_empty() && self.template.renders_tool_calls;
        match self.places[index].end {
            Some(content_end) => match close(content_end.max(start)) {
                Some(end) => Ok(end),
                None if has_calls => self.end_by_rendering(index, start, bound),
                None => Ok(content_end.max(start)),
            },
            None => match close(start) {
                // the first closing token closes this turn, unless the message itself may hold one
                Some(end) if token.is_some_and(|token| !says(message, token)) => Ok(end),
                _ => self.end_by_rendering(index, start, bound),
            },
        }
    }

    /// The end of a turn: where the messages up to it stop rendering.
    fn end_by_rendering(&self, index: usize, start: usize, bound: usize) -> Result<usize> {
        let upto = &self.conversation.messages[..=index];
        let rendered = self.template.render_messages(upto, self.conversation, false);
        let end = match &rendered {
            Ok(rendered)
                if self.text.starts_with(rendered.as_str()) && (start..=bound).contains(&rendered.len()) =>
            {
                rendered.len()
            }
            _ if index + 1 == self.conversation.messages.len() => bound,
            _ => return Err(lost(index, "ends")),
        };
        let turn = &self.text[start..end];
        let token = self.template.turn_end.as_deref();
        Ok(token.and_then(|token| rfind_end(turn, token)).map_or(end, |length| start + length))
    }

    /// The end of `turn` without the token that closes it.
    fn before_turn_end(&self, turn: Turn) -> usize {
        let said = &self.text[turn.start..turn.end];
        let token = self.template.turn_end.as_deref().unwrap_or_default();
        turn.start + said.strip_suffix(token).map_or(said.len(), str::len)
    }
}

/// The lengths at which a prompt may be cut, the whole first.
fn prompt_borders(prompt: &str) -> impl Iterator<Item = usize> {
    let is_border = |&length: &usize| {
        length == prompt.len()
            || prompt.is_char_boundary(length) && prompt[..length].ends_with(['>', '\n', ' ', ':', ']'])
    };
    (1..=prompt.len()).rev().filter(is_border).filter(|&length| !prompt[..length].trim().is_empty())
}

/// Whether `text` occurs in what the message says or calls.
fn says(message: &Message, text: &str) -> bool {
    message.content.as_deref().is_some_and(|content| content.contains(text))
        || message.extra.values().any(|value| holds(value, text))
}

fn holds(value: &serde_json::Value, text: &str) -> bool {
    match value {
        serde_json::Value::String(inner) => inner.contains(text),
        serde_json::Value::Array(list) => list.iter().any(|inner| holds(inner, text)),
        serde_json::Value::Object(object) => {
            object.iter().any(|(key, inner)| key.contains(text) || holds(inner, text))
        }
        _ => false,
    }
}

fn unplaced(reason: &str) -> Error {
    Error::new(
        ErrorKind::Template,
        format!(
            "cannot tell which text of this conversation the chat template lets the model say: {reason}; \
             mark the assistant's part of the template with {{% generation %}} and pass it as --template FILE.jinja"
        ),
    )
}

fn lost(index: usize, verb: &str) -> Error {
    unplaced(&format!("it is unclear where the turn of messages[{index}] {verb}"))
}

fn rfind_end(text: &str, pattern: &str) -> Option<usize> {
    if pattern.is_empty() { None } else { text.rfind(pattern).map(|at| at + pattern.len()) }
}

fn shared_prefix(left: &str, right: &str) -> usize {
    left.chars()
        .zip(right.chars())
        .take_while(|(one, other)| one == other)
        .map(|(one, _)| one.len_utf8())
        .sum()
}
