//! Where what the messages say went in a render.
//!
//! All that a message says (its words, its reasoning, the names and arguments of its calls) is put between
//! [marks](super::marks), the template renders once more, and the marks show where each stretch went, also when
//! the template stripped, split or moved it. A template that looks into what it is given may render marked
//! text differently; then fewer stretches are marked at a time, until the render without its marks is the plain one.

use minijinja::Value;
use serde_json::{Map, Value as Json};

use crate::Result;
use crate::conversation::{Conversation, Message};

use super::marks::{self, Mark, take_marks};
use super::rendered::Part;
use super::{ChatTemplate, PLAIN, to_jinja};

/// Renders with marks that one conversation may take.
const MAX_RENDERS: usize = 24;

/// A stretch of what a message says, without the white space round it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stretch {
    pub(super) message: usize,
    pub(super) part: Part,
    pub(super) text: String,
    /// Tags before it with which the text that it is of begins, where it is the first; and after it, where it is the last.
    before: String,
    after: String,
}

/// A stretch in a render.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Piece {
    pub(super) start: usize,
    pub(super) end: usize,
    /// Its number among the stretches.
    pub(super) stretch: usize,
    /// Both its ends are known; else it is empty, and lies where one of them is.
    pub(super) is_whole: bool,
}

/// Where the stretches went.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// In order of the text.
    pub(super) list: Vec<Piece>,
    /// In order of the messages.
    pub(super) stretches: Vec<Stretch>,
    /// Of each stretch, whether its marks left the render as it was, so that one without a piece is not in the text.
    pub(super) is_followed: Vec<bool>,
}

impl Pieces {
    pub(super) fn message_of(&self, piece: &Piece) -> usize {
        self.stretches[piece.stretch].message
    }

    pub(super) fn part_of(&self, piece: &Piece) -> Part {
        self.stretches[piece.stretch].part
    }

    /// Whether `number` is in `text`, as far as can be told.
    pub(super) fn is_shown(&self, number: usize, text: &str) -> bool {
        if self.is_followed[number] {
            return self.list.iter().any(|piece| piece.stretch == number);
        }
        text.contains(self.stretches[number].text.as_str())
    }
}

/// Lists the stretches of messages, and marks those that are wanted.
pub(super) struct Marker<'m> {
    template: &'m ChatTemplate,
    is_wanted: &'m [bool],
    message: usize,
    stretches: Vec<Stretch>,
}

impl Marker<'_> {
    /// `text` with its stretches marked: what stands between the tags that the template may look for.
    pub(super) fn mark(&mut self, text: &str, part: Part) -> String {
        let first = self.stretches.len();
        let mut marked = String::with_capacity(text.len() + 32);
        let mut at = 0;
        let mut lead = 0;
        let template = self.template;
        for tag in template.tags.find_iter(text) {
            let is_thought = part == Part::Content && CLOSES_THOUGHT.contains(&&text[tag.range()]);
            let part = if is_thought { Part::Reasoning } else { part };
            self.mark_stretch(&mut marked, &text[at..tag.start()], part);
            marked.push_str(&text[tag.range()]);
            at = tag.end();
            if self.stretches.len() == first {
                lead = at;
            }
        }
        self.mark_stretch(&mut marked, &text[at..], part);
        if self.stretches.len() == first {
            // tags and nothing else are words too
            marked.clear();
            self.mark_stretch(&mut marked, text, part);
            return marked;
        }
        marks::trim(&text[..lead]).clone_into(&mut self.stretches[first].before);
        if let Some(last) = self.stretches.last_mut() {
            let end = text.rfind(last.text.as_str()).map_or(text.len(), |start| start + last.text.len());
            text[end..].trim_end_matches(marks::is_white_space).clone_into(&mut last.after);
        }
        marked
    }

    fn mark_stretch(&mut self, out: &mut String, text: &str, part: Part) {
        let core = marks::trim(text);
        let number = self.stretches.len();
        if !core.is_empty() {
            let (before, after) = (String::new(), String::new());
            let stretch = Stretch { message: self.message, part, text: core.to_owned(), before, after };
            self.stretches.push(stretch);
        }
        if core.is_empty() || !self.is_wanted.get(number).copied().unwrap_or(false) {
            out.push_str(text);
            return;
        }
        let leading = marks::leading_white_space(text).len();
        let (open, close) = marks::of(number);
        for piece in [&text[..leading], &open, core, &close, &text[leading + core.len()..]] {
            out.push_str(piece);
        }
    }

    /// Text parts, each marked.
    pub(super) fn mark_parts(&mut self, parts: &[Json]) -> Value {
        let parts = parts.iter().map(|part| {
            let Json::Object(object) = part else { return to_jinja(part) };
            Value::from_pairs(object.iter().map(|(key, value)| match value {
                Json::String(text) if key == "text" => (key.as_str(), self.mark(text, Part::Content).into()),
                other => (key.as_str(), to_jinja(other)),
            }))
        });
        parts.collect::<Vec<_>>().into()
    }

    /// Calls, with their names and arguments marked.
    pub(super) fn mark_calls(&mut self, calls: &Json) -> Value {
        let Json::Array(calls) = calls else { return to_jinja(calls) };
        let calls = calls.iter().enumerate().map(|(number, call)| self.mark_call(call, Part::Call(number)));
        calls.collect::<Vec<_>>().into()
    }

    fn mark_call(&mut self, call: &Json, part: Part) -> Value {
        let Json::Object(call) = call else { return to_jinja(call) };
        Value::from_pairs(call.iter().map(|(key, value)| {
            let value = match (key.as_str(), value) {
                ("function", function) => self.mark_call(function, part),
                ("name", Json::String(name)) => self.mark(name, part).into(),
                ("arguments" | "parameters", arguments) => self.mark_arguments(arguments, part),
                // what an id is made of may be checked
                (_, other) => to_jinja(other),
            };
            (key.as_str(), value)
        }))
    }

    /// The texts of an argument; of an object without any, its keys.
    fn mark_arguments(&mut self, value: &Json, part: Part) -> Value {
        match value {
            Json::String(text) => {
                let mut out = String::with_capacity(text.len() + 32);
                self.mark_stretch(&mut out, text, part);
                out.into()
            }
            Json::Array(items) => {
                items.iter().map(|item| self.mark_arguments(item, part)).collect::<Vec<_>>().into()
            }
            Json::Object(object) => self.mark_object(object, part),
            other => to_jinja(other),
        }
    }

    fn mark_object(&mut self, object: &Map<String, Json>, part: Part) -> Value {
        Value::from_pairs(object.iter().map(|(key, value)| {
            let before = self.stretches.len();
            let marked = self.mark_arguments(value, part);
            if self.stretches.len() > before {
                return (key.clone(), marked);
            }
            let mut name = String::with_capacity(key.len() + 32);
            self.mark_stretch(&mut name, key, part);
            (name, marked)
        }))
    }
}

/// What ends a thought that stands in the content of a message.
const CLOSES_THOUGHT: [&str; 3] = ["</think>", "[/THINK]", "\u{25c1}/think\u{25b7}"];
/// Tags that cut a content into stretches, beside those of the template.
pub(super) const THOUGHT_TAGS: [&str; 6] =
    ["<think>", "</think>", "[THINK]", "[/THINK]", "\u{25c1}think\u{25b7}", "\u{25c1}/think\u{25b7}"];

impl ChatTemplate {
    /// The values of `messages` for a template, with the wanted stretches marked, and all stretches.
    fn marked_values(&self, messages: &[Message], is_wanted: &[bool]) -> (Vec<Value>, Vec<Stretch>) {
        let mut marker = Marker { template: self, is_wanted, message: 0, stretches: Vec::new() };
        let values = messages.iter().enumerate().map(|(index, message)| {
            marker.message = index;
            self.message_value(message, Some(&mut marker))
        });
        (values.collect(), marker.stretches)
    }

    /// Where what `messages` say went in `text`, their plain render.
    pub(super) fn pieces(
        &self,
        messages: &[Message],
        conversation: &Conversation,
        add_generation_prompt: bool,
        text: &str,
    ) -> Pieces {
        let (_, stretches) = self.marked_values(messages, &[]);
        let mut found = Pieces { list: Vec::new(), is_followed: vec![false; stretches.len()], stretches };
        if marks::has_marks(text) {
            return found;
        }
        let kind = |stretch: &Stretch| {
            (messages[stretch.message].role == "assistant", std::mem::discriminant(&stretch.part))
        };
        let all: Vec<usize> = (0..found.stretches.len()).collect();
        let mut queue = vec![all];
        let mut renders = 0;
        while let Some(numbers) = queue.pop() {
            if numbers.is_empty() || renders == MAX_RENDERS {
                continue;
            }
            renders += 1;
            let mut is_wanted = vec![false; found.stretches.len()];
            for &number in &numbers {
                is_wanted[number] = true;
            }
            let marked = self.render_marked(messages, conversation, add_generation_prompt, &is_wanted);
            if let Some(marks) = marked.ok().filter(|(unmarked, _)| unmarked == text).map(|(_, marks)| marks)
            {
                for &number in &numbers {
                    found.is_followed[number] = true;
                }
                found.add(&marks);
                continue;
            }
            // first what is of one kind together, then by halves
            let first_kind = numbers.first().map(|&number| kind(&found.stretches[number]));
            let is_first = |number: &usize| Some(kind(&found.stretches[*number])) == first_kind;
            let (one, other): (Vec<usize>, Vec<usize>) = if numbers.iter().all(is_first) {
                let (one, other) = numbers.split_at(numbers.len() / 2);
                (one.to_vec(), other.to_vec())
            } else {
                numbers.into_iter().partition(is_first)
            };
            if !one.is_empty() {
                queue.extend([other, one]);
            }
        }
        found.take_tags(text);
        found.list.sort_by_key(|piece| (piece.start, piece.end, piece.stretch));
        // what is written once more (the name of a call before the answer of its tool) is not said there
        let mut is_known = vec![false; found.stretches.len()];
        found.list.retain(|piece| !std::mem::replace(&mut is_known[piece.stretch], true));
        found
    }

    fn render_marked(
        &self,
        messages: &[Message],
        conversation: &Conversation,
        add_generation_prompt: bool,
        is_wanted: &[bool],
    ) -> Result<(String, Vec<(usize, Mark)>)> {
        let (values, _) = self.marked_values(messages, is_wanted);
        let marked = self.render_values(PLAIN, values, conversation, add_generation_prompt)?;
        Ok(take_marks(&marked))
    }
}

impl Pieces {
    /// Makes pieces longer by the tags at the ends of what they are of, where these are in the text too.
    fn take_tags(&mut self, text: &str) {
        for piece in &mut self.list {
            let stretch = &self.stretches[piece.stretch];
            if text[piece.end..].starts_with(&stretch.after) {
                piece.end += stretch.after.len();
            }
            let header = text[..piece.start].trim_end_matches(marks::is_white_space);
            if !stretch.before.is_empty() && header.ends_with(&stretch.before) {
                piece.start = header.len() - stretch.before.len();
            }
        }
    }

    fn add(&mut self, marks: &[(usize, Mark)]) {
        let mut open: Vec<(usize, usize)> = Vec::new();
        for &(at, mark) in marks {
            match mark {
                Mark::ContentStart(stretch) if stretch < self.stretches.len() => open.push((stretch, at)),
                Mark::ContentEnd(stretch) if stretch < self.stretches.len() => {
                    let start = open
                        .iter()
                        .rposition(|(begun, _)| *begun == stretch)
                        .map(|place| open.remove(place).1);
                    self.list.push(Piece {
                        start: start.unwrap_or(at),
                        end: at,
                        stretch,
                        is_whole: start.is_some(),
                    });
                }
                _ => {}
            }
        }
        let cut =
            open.into_iter().map(|(stretch, at)| Piece { start: at, end: at, stretch, is_whole: false });
        self.list.extend(cut);
    }
}
