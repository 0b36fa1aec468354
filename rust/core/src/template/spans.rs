//! Which bytes of a rendered conversation are trained.
//!
//! The trained span of an assistant turn runs from the end of what the generation prompt renders, with the arguments of
//! the row, to the [token that closes the turn](super::stops), included. Where the template has `{% generation %}`, the
//! tag decides. Elsewhere [pieces](super::pieces) say where in the text each message speaks. A message speaks in one
//! stretch of text or in several (its calls, the answer of the tool, then its words), in any order; what stands between
//! its pieces, unless another message speaks there, is its own. Where a turn begins is what the template writes between
//! the piece before and a generation prompt: known from [probes](super::probes) after a question and after the answer of
//! a tool, else found by rendering the messages before. What cannot be placed is an error, and what is not in the
//! text is named.

use std::collections::HashMap;
use std::sync::Arc;

use crate::conversation::{Conversation, Message};
use crate::{Error, ErrorKind, Result};

use super::controls::{Controls, TrainOn, TrainOnEos};
use super::marks::{self, Mark, take_marks};
use super::pieces::Pieces;
use super::probes::Probes;
use super::rendered::{Endless, Lost, Rendered, Segment};
use super::starts::ends_at_border;
use super::stops::shared_prefix;
use super::{ChatTemplate, TAGGED};

/// What a message says in one stretch of the text.
#[derive(Debug, Clone, Copy)]
struct Turn {
    start: usize,
    end: usize,
    /// Where what closes it begins; `end` where nothing does.
    stop: usize,
    message: usize,
    /// Whether the tokenizer knows what closes it.
    is_ended: bool,
}

/// Pieces of one message with none of another between them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) message: usize,
    pub(super) first: usize,
    pub(super) last: usize,
}

/// One conversation on its way through a template.
pub(super) struct Tracker<'a> {
    pub(super) template: &'a ChatTemplate,
    pub(super) conversation: &'a Conversation,
    pub(super) probes: Arc<Probes>,
    pub(super) text: &'a str,
    pub(super) pieces: &'a Pieces,
    pub(super) runs: Vec<Run>,
    /// What joins a turn to the piece before it → how much of it the prompt gives.
    pub(super) given: HashMap<String, Option<usize>>,
}

/// A conversation that went through the template, with what is trained of it.
#[derive(Debug, PartialEq)]
pub(super) struct Followed {
    pub(super) text: String,
    /// What is trained, in order.
    pub(super) spans: Vec<Segment>,
    /// Where the content of each message went, whole or in pieces, and whether it is all there.
    pub(super) contents: Vec<(Vec<(usize, usize)>, bool)>,
    pub(super) lost: Vec<Lost>,
    pub(super) endless: Endless,
}

impl Followed {
    /// Without what only the way here needed.
    pub(super) fn into_rendered(self, controls: &Controls) -> Rendered {
        let mut contents: Vec<(usize, usize)> =
            self.contents.iter().flat_map(|(places, _)| places).copied().collect();
        contents.sort_unstable();
        let has_lost_content = self.contents.iter().any(|(_, is_all)| !is_all);
        let rendered = Rendered {
            text: self.text,
            contents,
            has_lost_content,
            lost: self.lost,
            endless: self.endless,
            ..Rendered::default()
        };
        rendered.with_spans(self.spans, controls)
    }
}

impl ChatTemplate {
    /// Renders `conversation` by Jinja and finds which bytes are trained.
    pub(super) fn follow(&self, conversation: &Conversation, controls: &Controls) -> Result<Followed> {
        let text = self.render(conversation, false)?;
        let pieces = self.pieces(&conversation.messages, conversation, false, &text);
        let mut tracker = Tracker {
            template: self,
            conversation,
            probes: self.probes(&conversation.chat_template_kwargs),
            text: &text,
            runs: self.runs_of(&pieces, &text),
            pieces: &pieces,
            given: HashMap::new(),
        };
        let (spans, endless) = tracker.segments(controls)?;
        let contents = tracker.contents();
        let lost = tracker.lost();
        Ok(Followed { text, spans, contents, lost, endless })
    }

    /// A message goes on in one run until another speaks, or a token stops the model.
    fn runs_of(&self, pieces: &Pieces, text: &str) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (number, piece) in pieces.list.iter().enumerate() {
            let message = pieces.message_of(piece);
            let goes_on = |run: &Run| {
                let between = pieces.list[run.last].end..piece.start;
                let stops =
                    text.get(between).is_some_and(|between| self.tokens.first_eos(between, &[]).is_some());
                run.message == message && !stops
            };
            match runs.last_mut().filter(|run| goes_on(run)) {
                Some(run) => run.last = number,
                None => runs.push(Run { message, first: number, last: number }),
            }
        }
        runs
    }
}

impl Tracker<'_> {
    /// The trained spans in order, and which of them nothing ends that stops a model.
    fn segments(&mut self, controls: &Controls) -> Result<(Vec<Segment>, Endless)> {
        let messages = &self.conversation.messages;
        let is_weighted = messages.iter().any(|message| message.weight.to_bits() != 1f32.to_bits());
        if controls.train_on == TrainOn::All {
            let whole = Segment { start: 0, end: self.text.len(), weight: 1.0, message: None };
            if !is_weighted {
                return Ok((vec![whole], Endless::default()));
            }
            let turns = self.turns(|_| true)?;
            return Ok((self.cover(&turns), Endless::default()));
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
        let mut turns = if self.template.tagged && !matches!(controls.train_on, TrainOn::Roles(_)) {
            self.tagged_turns(needs_messages)?
        } else {
            self.turns(is_trained)?
        };
        turns.retain(|turn| !needs_messages || turn.message >= last_question);
        let weight = |turn: &Turn| if needs_messages { messages[turn.message].weight } else { 1.0 };
        let last = turns.iter().rposition(|turn| weight(turn) > 0.0);
        let is_endless = |turn: &&Turn| weight(turn) > 0.0 && !turn.is_ended;
        let is_last = turns
            .last()
            .filter(is_endless)
            .is_some_and(|turn| marks::trim(&self.text[turn.end..]).is_empty());
        let endless = Endless { turns: turns.iter().filter(is_endless).count(), is_last };
        let segments = turns.iter().enumerate().map(|(number, turn)| {
            let keeps_end = match controls.train_on_eos {
                TrainOnEos::Turn => true,
                TrainOnEos::Last => Some(number) == last,
                TrainOnEos::None => false,
            };
            let end = if keeps_end { turn.end } else { turn.stop };
            Segment { start: turn.start, end, weight: weight(turn), message: Some(turn.message) }
        });
        Ok((segments.collect(), endless))
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
                    let said = &text[from..at];
                    let token = self.template.tokens.last_token(marks::trim(said));
                    let stop = token.map_or(at, |token| from + said.rfind(token).unwrap_or(said.len()));
                    turns.push(Turn { start: from, end: at, stop, message: 0, is_ended: token.is_some() });
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

    /// The turns of the wanted messages, in order of the text.
    fn turns(&mut self, is_wanted: impl Fn(&Message) -> bool) -> Result<Vec<Turn>> {
        let messages = &self.conversation.messages;
        let mut turns: Vec<Turn> = Vec::with_capacity(self.runs.len());
        let mut keep = |turn: Result<Option<Turn>>, message: usize| {
            match turn {
                Ok(turn) => turns.extend(turn),
                // what is not trained need not be placed
                Err(_) if messages[message].weight <= 0.0 => {}
                Err(error) => return Err(error),
            }
            Ok(())
        };
        for number in 0..self.runs.len() {
            let message = self.runs[number].message;
            if is_wanted(&messages[message]) {
                keep(self.turn(number).map(Some), message)?;
            }
        }
        for (message, said) in messages.iter().enumerate() {
            if is_wanted(said) && self.runs.iter().all(|run| run.message != message) {
                keep(self.turn_without_pieces(message), message)?;
            }
        }
        turns.sort_by_key(|turn| (turn.start, turn.end));
        for number in 1..turns.len() {
            let before = turns[number - 1].end;
            let turn = &mut turns[number];
            if turn.stop < before {
                return Err(unplaced(&format!("the turn of messages[{}] lies within another", turn.message)));
            }
            turn.start = turn.start.max(before);
        }
        Ok(turns)
    }

    fn turn(&mut self, number: usize) -> Result<Turn> {
        let Run { message, first, last } = self.runs[number];
        let (first, last) = (self.pieces.list[first], self.pieces.list[last]);
        let is_assistant = self.conversation.messages[message].role == "assistant";
        let is_first = self.runs[..number].iter().all(|run| run.message != message);
        let start = match (is_assistant, is_first) {
            (true, true) => self.turn_start(number),
            (true, false) => self.later_start(number),
            (false, _) => first.start,
        };
        if start > last.end {
            return Err(unplaced(&format!("the turn of messages[{message}] ends before it begins")));
        }
        let after = self.runs.get(number + 1);
        let bound = after.map_or(self.text.len(), |run| self.pieces.list[run.first].start);
        let tail = &self.text[last.end..bound];
        // a message of which nothing is shown has a header all the same
        let messages = &self.conversation.messages;
        let unseen = Some(message + 1).filter(|next| self.runs.iter().all(|run| run.message != *next));
        let next = unseen.and_then(|next| messages.get(next));
        let next_role = next.or_else(|| Some(&messages[after?.message])).map(|next| next.role);
        let (end, closing) = if !is_assistant {
            (0, self.known_end(tail))
        } else if self.ends_within_markup(message, self.pieces.part_of(&last)) {
            let (end, closing) = self.call_end(number, tail, next_role)?;
            (end, closing.map(|closing| self.with_all_tokens(tail, closing)))
        } else if last.is_whole {
            (0, self.answer_end(tail, next_role))
        } else {
            return self.turn_by_rendering(message, Some(start));
        };
        let end = last.end + closing.map_or(end, |closing| closing.end);
        let stop = closing.map_or(end, |closing| last.end + closing.start);
        let is_ended = closing.is_some() && self.template.tokens.last_token(&self.text[stop..end]).is_some();
        Ok(Turn { start, end, stop, message, is_ended })
    }

    /// What the template writes after `stretch`, up to what comes next, where only the first `count` messages are there.
    pub(super) fn tail_of(
        &self,
        count: usize,
        stretch: usize,
        add_generation_prompt: bool,
    ) -> Option<String> {
        let messages = &self.conversation.messages[..count];
        let text = self.render_first(count, add_generation_prompt).ok()?;
        let pieces = self.template.pieces(messages, self.conversation, add_generation_prompt, &text);
        let number = pieces.list.iter().position(|piece| piece.stretch == stretch)?;
        let next = pieces.list.get(number + 1).map(|piece| piece.start);
        if add_generation_prompt && next.is_some() {
            // the prompt comes after something else
            return None;
        }
        text.get(pieces.list[number].end..next.unwrap_or(text.len())).map(str::to_owned)
    }

    /// The turn of a message none of whose words could be followed.
    fn turn_without_pieces(&self, message: usize) -> Result<Option<Turn>> {
        let numbers = (0..self.pieces.stretches.len())
            .filter(|&number| self.pieces.stretches[number].message == message);
        let mut numbers = numbers.peekable();
        if numbers.peek().is_none() {
            return Ok(None);
        }
        if numbers.any(|number| self.pieces.is_shown(number, self.text)) {
            if self.conversation.messages[message].role != "assistant" {
                return Err(lost(message, "begins"));
            }
            return self.turn_by_rendering(message, None).map(Some);
        }
        // a message that is not there at all has no turn; one that only its end is left of would teach to say nothing
        let others = self.conversation.messages.iter().enumerate().filter(|(index, _)| *index != message);
        let others: Vec<Message> = others.map(|(_, message)| message.clone()).collect();
        let without = self.template.render_messages(&others, self.conversation, false);
        if self.conversation.messages[message].role != "assistant"
            || without.is_ok_and(|without| without == self.text)
        {
            return Ok(None);
        }
        Err(Error::new(
            ErrorKind::Template,
            format!(
                "the chat template leaves out or changes all that messages[{message}] says, so that nothing but its end \
                 would be trained; it may want content as a list of parts ([{{\"type\": \"text\", \"text\": ...}}]), have \
                 no place for tool calls, or be made for another task; choose another --template, or set \"loss\": false on \
                 the message"
            ),
        ))
    }

    /// What the first `count` messages render to.
    fn render_first(&self, count: usize, add_generation_prompt: bool) -> Result<String> {
        let messages = &self.conversation.messages[..count];
        self.template.render_messages(messages, self.conversation, add_generation_prompt)
    }

    /// Where a turn begins as the messages before it render, where its words cannot be followed.
    fn start_by_rendering(&self, message: usize) -> Result<usize> {
        let prompted = self.render_first(message, true).map_err(|_| lost(message, "begins"))?;
        let shared = shared_prefix(self.text, &prompted);
        if shared == prompted.len() {
            return Ok(shared);
        }
        let plain = self.render_first(message, false).unwrap_or_default();
        if !prompted.starts_with(plain.as_str()) {
            return Err(lost(message, "begins"));
        }
        let is_given = |cut: &usize| {
            ends_at_border(&prompted[..*cut]) && !marks::trim(&prompted[plain.len()..*cut]).is_empty()
        };
        let mut cuts = (plain.len()..=shared).rev().filter(|&cut| prompted.is_char_boundary(cut));
        cuts.find(is_given).ok_or_else(|| lost(message, "begins"))
    }

    /// A turn as the messages before it and up to it render, where its words cannot be followed.
    fn turn_by_rendering(&self, message: usize, start: Option<usize>) -> Result<Turn> {
        let start = start.map_or_else(|| self.start_by_rendering(message), Ok)?;
        let is_last = message + 1 == self.conversation.messages.len();
        let end = match self.render_first(message + 1, false) {
            Ok(upto) if self.text.starts_with(&upto) && start <= upto.len() => upto.len(),
            _ if is_last => self.text.len(),
            _ => return Err(lost(message, "ends")),
        };
        let said = self.text[start..end].trim_end_matches(marks::is_white_space);
        let ends = [&self.probes.ends.inner, &self.probes.ends.last, &self.probes.ends.call];
        let known = ends.into_iter().flatten().find(|end| said.ends_with(end.text.as_str()));
        if let Some(known) = known {
            let end = start + said.len();
            return Ok(Turn { start, end, stop: end - known.text.len(), message, is_ended: known.is_token });
        }
        let bound = self.pieces.list.iter().map(|piece| piece.start).filter(|&at| at >= end).min();
        let tail = &self.text[start + said.len()..bound.unwrap_or(self.text.len())];
        let closing = if is_last { None } else { self.known_end(tail) };
        let at = start + said.len();
        Ok(match closing {
            Some(found) => {
                let (stop, end) = (at + found.start, at + found.end);
                let is_ended = self.template.tokens.last_token(&self.text[stop..end]).is_some();
                Turn { start, end, stop, message, is_ended }
            }
            None => Turn { start, end: at, stop: at, message, is_ended: false },
        })
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

pub(super) fn lost(index: usize, verb: &str) -> Error {
    unplaced(&format!("it is unclear where the turn of messages[{index}] {verb}"))
}
