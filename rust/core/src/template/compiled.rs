//! The compiled form of a plain template: text between contents, instead of a program.
//!
//! Most templates put a prefix and a suffix round each content, and what these are follows from the roles of
//! the messages alone: which is first, which is last, whether there is a system message. So the first
//! conversations of a [shape](shape_key) go through Jinja, and what they render to is cut at the contents. The
//! next ones fill the pieces with their own contents, and take over where the trained spans lie between
//! the pieces.
//!
//! That holds as long as the template does not look into contents. Those it may look for are string literals
//! of its source: each is tried inside contents and at their ends, and one that changes anything sends the
//! rows that have it there to Jinja, as do all literals that look like markup, wherever they are. Each shape is checked with odd contents
//! (white space at the ends, quotes, braces, many scripts) before it is used: text, trained spans and places
//! of contents must be those that Jinja gives. Rows with tools, tool calls, reasoning or other keys, roles
//! beyond the three of a chat, or a blank content always go through Jinja.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use aho_corasick::AhoCorasick;
use serde_json::{Map, Value};

use crate::conversation::{Conversation, Message};

use super::controls::Controls;
use super::literals::string_literals;
use super::marks::{leading_white_space, trim};
use super::rendered::{Endless, Rendered, Segment};
use super::spans::Followed;
use super::starts::rest_of_prompt;
use super::{ChatTemplate, marks};

/// Settings that have a form of their own, at most; rows with further ones go through Jinja.
const MAX_FORMS: usize = 8;
/// Shapes that are remembered.
const MAX_SHAPES: usize = 4096;
/// Messages of a conversation, at most.
const MAX_MESSAGES: usize = 1024;
/// A shape of so many messages more must come once more before it is learned: long ones hardly come again.
const MESSAGES_PER_SIGHT: usize = 256;

/// White space that no template writes itself, round the contents a shape is learned from.
const LEADING: &str = "\u{2003}\t\u{2003}";
const TRAILING: &str = "\u{2003}\u{2003}\t";

/// Conversations on which literals are tried.
const PROBES: [&[&str]; 4] = [
    &["user", "assistant"],
    &["system", "user", "assistant"],
    &["user", "assistant", "user", "assistant"],
    &["system", "user", "assistant", "user", "assistant"],
];

const ODD_CONTENTS: [&str; 13] = [
    "Plain words, and 1 + 1 = 2.",
    " \n\t white space\n\nat both ends \u{3000}\n ",
    "{{ braces }} {% if x %} {# none #} }} %} #} {} [] () %s %(name)s",
    "<b>&amp;\"double\" 'single' `back` \\n \\ \\\\ </b> & < >",
    "\u{4e2d}\u{6587}\u{5185}\u{5bb9}\u{ff0c}\u{5f88}\u{597d}\u{3002}",
    "\u{e9}mo\u{301}ji \u{1f980} \u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467} \u{200b}x\u{ad}",
    "\r\nlines\r\nof Windows\rand Mac\u{85}\u{2028}\r\n",
    "a",
    "42",
    "None",
    "true",
    "UPPER lower Title iNVERSE 1st \u{df} \u{1c5} \u{130}",
    "- list\n- of: things\n\n| a | b |\n|---|---|\n\n```python\nprint(\"x\")\n```",
];

/// What the compiled form of a template is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompiledForm {
    /// Whether plain chats need no Jinja.
    pub is_plain: bool,
    /// Contents that hold one of these go through Jinja.
    pub triggers: Vec<String>,
    /// Contents that begin or end with one of these go through Jinja.
    pub end_triggers: Vec<char>,
}

/// The forms of a template, one for each set of controls and arguments.
#[derive(Default)]
pub(super) struct Forms {
    forms: RwLock<Vec<Arc<Form>>>,
}

impl Forms {
    /// The render of `conversation` by a compiled form; `None` where it must go through Jinja.
    pub(super) fn render(
        &self,
        template: &ChatTemplate,
        conversation: &Conversation,
        controls: &Controls,
    ) -> Option<Rendered> {
        let key = shape_key(conversation)?;
        let form = self.form(template, controls, &conversation.chat_template_kwargs)?;
        let contents = || conversation.messages.iter().filter_map(|message| message.content.as_deref());
        if !form.is_plain || contents().any(|content| form.looks_for(content)) {
            return None;
        }
        let shape = form.shape(key, template, conversation)?;
        let starts_forced = |message: &Message| {
            let content = message.content.as_deref().unwrap_or_default();
            content.starts_with(&*shape.forced) || trim(content).starts_with(&*shape.forced)
        };
        if conversation.messages.iter().any(|message| message.role == "assistant" && starts_forced(message)) {
            return None;
        }
        let contents: Vec<&str> = contents().collect();
        Some(shape.fill(&contents, controls))
    }

    pub(super) fn describe(&self, template: &ChatTemplate, controls: &Controls) -> CompiledForm {
        match self.form(template, controls, &Map::new()) {
            Some(form) => CompiledForm {
                is_plain: form.is_plain,
                triggers: form.triggers.clone(),
                end_triggers: form.end_triggers.clone(),
            },
            None => CompiledForm { is_plain: false, triggers: Vec::new(), end_triggers: Vec::new() },
        }
    }

    fn form(
        &self,
        template: &ChatTemplate,
        controls: &Controls,
        kwargs: &Map<String, Value>,
    ) -> Option<Arc<Form>> {
        let fits = |form: &&Arc<Form>| form.controls == *controls && form.kwargs == *kwargs;
        let known = self.forms.read().ok()?;
        if let Some(form) = known.iter().find(fits) {
            return Some(form.clone());
        }
        drop(known);
        let mut known = self.forms.write().ok()?;
        if let Some(form) = known.iter().find(fits) {
            return Some(form.clone());
        }
        if known.len() == MAX_FORMS {
            return None;
        }
        let form = Arc::new(Form::new(template, controls, kwargs));
        known.push(form.clone());
        Some(form)
    }
}

/// What is known of a shape.
enum Known {
    /// So many conversations had it.
    Seen(usize),
    Shape(Arc<Shape>),
    /// Its render depends on more than the shape.
    ByJinja,
}

/// The compiled form for one set of controls and arguments.
struct Form {
    controls: Controls,
    kwargs: Map<String, Value>,
    is_plain: bool,
    triggers: Vec<String>,
    finder: Option<AhoCorasick>,
    end_triggers: Vec<char>,
    shapes: RwLock<HashMap<Vec<u8>, Known>>,
}

impl Form {
    fn new(template: &ChatTemplate, controls: &Controls, kwargs: &Map<String, Value>) -> Self {
        let mut form = Self {
            controls: controls.clone(),
            kwargs: kwargs.clone(),
            is_plain: false,
            triggers: Vec::new(),
            finder: None,
            end_triggers: Vec::new(),
            shapes: RwLock::default(),
        };
        let probes: Vec<(Conversation, Shape)> = PROBES
            .iter()
            .map(|roles| form.conversation(roles.iter().copied().map(|role| (role, 1.0))))
            .filter(|probe| template.is_cheap(probe))
            .filter_map(|probe| Shape::learn(template, &probe, controls).map(|shape| (probe, shape)))
            .collect();
        let agrees = |contents: &dyn Fn(usize) -> String| {
            probes.iter().all(|(probe, shape)| shape.agrees(template, probe, contents, controls))
        };
        let mut literals = string_literals(&template.source);
        literals.extend(template.special_tokens.named.iter().map(|(_, token)| token.clone()));
        literals.extend(kwargs.values().filter_map(Value::as_str).map(str::to_owned));
        literals.retain(|literal| !literal.is_empty());
        let mut harmless = Vec::new();
        for literal in literals {
            if looks_like_markup(&literal) || !agrees(&|_| format!("before {literal} after")) {
                form.triggers.push(literal);
            } else if !(0..3).all(|turn| agrees(&|index| put_at_end(&literal, index + turn))) {
                form.end_triggers.extend(literal.chars());
            } else {
                harmless.push(literal);
            }
        }
        // some may matter only together
        let forwards = harmless.join(" ");
        let backwards = harmless.iter().rev().map(String::as_str).collect::<Vec<_>>().join(" ");
        if ![forwards, backwards].iter().all(|text| agrees(&|_| format!("before {text} after"))) {
            form.triggers.append(&mut harmless);
        }
        form.triggers = shortest(form.triggers);
        form.end_triggers.sort_unstable();
        form.end_triggers.dedup();
        // what marks are made of is not followed, which Jinja has to find out for each row alike
        let triggers = form.triggers.iter().map(String::as_bytes).chain([marks::LEAD]);
        form.finder = AhoCorasick::new(triggers).ok();
        let is_plain = probes.iter().any(|(probe, shape)| form.check(shape, template, probe));
        form.is_plain = is_plain;
        form
    }

    fn conversation<'r>(&self, turns: impl Iterator<Item = (&'r str, f32)>) -> Conversation {
        let message = |(index, (role, weight)): (usize, (&str, f32))| {
            let role = ["system", "user"].into_iter().find(|known| *known == role).unwrap_or("assistant");
            let content = format!("{LEADING}probe {index} words{TRAILING}");
            Message { weight, ..Message::new(role, content) }
        };
        Conversation {
            messages: turns.enumerate().map(message).collect(),
            chat_template_kwargs: self.kwargs.clone(),
            ..Conversation::default()
        }
    }

    /// Whether the template may look for something that is in `content`.
    fn looks_for(&self, content: &str) -> bool {
        content.starts_with(&*self.end_triggers)
            || content.ends_with(&*self.end_triggers)
            || self.finder.as_ref().is_none_or(|finder| finder.is_match(content))
    }

    /// The shape of `conversation`, learned when it comes again.
    fn shape(
        &self,
        key: Vec<u8>,
        template: &ChatTemplate,
        conversation: &Conversation,
    ) -> Option<Arc<Shape>> {
        let known = self.shapes.read().ok()?;
        let is_full = known.len() >= MAX_SHAPES;
        let seen = match known.get(&key) {
            Some(Known::Shape(shape)) => return Some(shape.clone()),
            Some(Known::ByJinja) => return None,
            None if is_full => return None,
            Some(Known::Seen(seen)) => *seen,
            None => 0,
        };
        drop(known);
        if seen <= conversation.messages.len() / MESSAGES_PER_SIGHT {
            self.shapes.write().ok()?.insert(key, Known::Seen(seen + 1));
            return None;
        }
        let turns = conversation.messages.iter().map(|message| (message.role, message.weight));
        let probe = self.conversation(turns);
        let shape = Shape::learn(template, &probe, &self.controls)
            .filter(|shape| self.check(shape, template, &probe))
            .map(Arc::new);
        let known = shape.clone().map_or(Known::ByJinja, Known::Shape);
        self.shapes.write().ok()?.insert(key, known);
        shape
    }

    /// Whether `shape` gives what Jinja gives, for odd contents.
    fn check(&self, shape: &Shape, template: &ChatTemplate, probe: &Conversation) -> bool {
        let long = "word ".repeat(2000);
        let odd: Vec<&str> = ODD_CONTENTS
            .into_iter()
            .chain([long.as_str()])
            .filter(|content| !self.looks_for(content))
            .collect();
        let agrees =
            |contents: &dyn Fn(usize) -> String| shape.agrees(template, probe, contents, &self.controls);
        let all_the_same = odd.first().is_some_and(|content| agrees(&|_| (*content).to_owned()));
        all_the_same && (0..odd.len()).all(|turn| agrees(&|index| odd[(index + turn) % odd.len()].to_owned()))
    }
}

/// `literals` without those that hold another one.
fn shortest(mut literals: Vec<String>) -> Vec<String> {
    literals.sort_by_key(String::len);
    let mut kept: Vec<String> = Vec::with_capacity(literals.len());
    for literal in literals {
        if !kept.iter().any(|shorter| literal.contains(shorter.as_str())) {
            kept.push(literal);
        }
    }
    kept
}

/// `literal` as the whole content, its start or its end.
fn put_at_end(literal: &str, place: usize) -> String {
    match place % 3 {
        // a blank content goes through Jinja anyway
        0 if !trim(literal).is_empty() => literal.to_owned(),
        1 => format!("before {literal}"),
        _ => format!("{literal} after"),
    }
}

/// Whether `literal` is like `<think>` or `[INST]`: what a template looks for in pairs.
fn looks_like_markup(literal: &str) -> bool {
    literal.chars().count() > 2 && literal.contains(['<', '>', '[', ']', '{', '}', '|'])
}

/// What decides how a plain template renders: roles and weights. `None` where more may.
fn shape_key(conversation: &Conversation) -> Option<Vec<u8>> {
    if conversation.tools.is_some() || conversation.messages.len() > MAX_MESSAGES {
        return None;
    }
    let mut key = Vec::with_capacity(conversation.messages.len());
    for message in &conversation.messages {
        let is_blank = message.content.as_deref().is_none_or(|content| trim(content).is_empty());
        if is_blank || message.parts.is_some() || !message.extra.is_empty() {
            return None;
        }
        let role = match message.role {
            "system" | "user" | "assistant" => message.role.as_bytes()[0],
            _ => return None,
        };
        if message.weight.to_bits() == 1f32.to_bits() {
            key.push(role);
        } else {
            // a capital says that four bytes follow, so that no two shapes share a key
            key.push(role.to_ascii_uppercase());
            key.extend(message.weight.to_bits().to_be_bytes());
        }
    }
    Some(key)
}

/// Where a content goes.
#[derive(Debug)]
struct Slot {
    message: usize,
    keeps_leading: bool,
    keeps_trailing: bool,
}

/// A place in the text of any conversation of a shape.
#[derive(Debug, Clone, Copy)]
enum Border {
    /// In a piece, this many bytes from its start.
    Piece(usize, usize),
    /// Where a content begins and ends, without white space.
    ContentStart(usize),
    ContentEnd(usize),
}

/// The text round the contents: piece, slot, piece, …, slot, piece.
#[derive(Debug)]
struct Shape {
    pieces: Vec<String>,
    slots: Vec<Slot>,
    /// Trained spans: from, to, weight, message.
    spans: Vec<(Border, Border, f32, Option<usize>)>,
    /// What the generation prompt writes after a header, where that is not its end: an answer that begins so may be
    /// given by the prompt in part, and goes through Jinja.
    forced: Vec<char>,
    endless: Endless,
}

/// Where pieces and contents lie in one text.
struct Layout {
    /// The start of each piece.
    pieces: Vec<usize>,
    /// The contents without white space, by slot.
    contents: Vec<(usize, usize)>,
}

impl Shape {
    /// What `probe` renders to, cut at its contents; `None` where these are not all there once.
    fn learn(template: &ChatTemplate, probe: &Conversation, controls: &Controls) -> Option<Self> {
        let Followed { text, spans, contents, lost, endless } = template.follow(probe, controls).ok()?;
        if !lost.is_empty() {
            return None;
        }
        let mut order: Vec<(usize, usize, usize)> = contents
            .iter()
            .enumerate()
            .map(|(message, (places, is_all))| match places[..] {
                [(start, end)] if *is_all => Some((start, end, message)),
                _ => None,
            })
            .collect::<Option<_>>()?;
        order.sort_unstable();
        let mut shape =
            Self { pieces: Vec::new(), slots: Vec::new(), spans: Vec::new(), forced: Vec::new(), endless };
        let mut layout = Layout { pieces: Vec::new(), contents: Vec::new() };
        let mut at = 0;
        for (start, end, message) in order {
            let content = probe.messages[message].content.as_deref()?;
            if text.get(start..end)? != trim(content) {
                return None;
            }
            let keeps_leading = text[..start].ends_with(LEADING);
            let keeps_trailing = text[end..].starts_with(TRAILING);
            let slot_start = start - if keeps_leading { LEADING.len() } else { 0 };
            shape.pieces.push(text.get(at..slot_start)?.to_owned());
            shape.slots.push(Slot { message, keeps_leading, keeps_trailing });
            layout.pieces.push(at);
            layout.contents.push((start, end));
            at = end + if keeps_trailing { TRAILING.len() } else { 0 };
        }
        shape.pieces.push(text.get(at..)?.to_owned());
        layout.pieces.push(at);
        let prompt = template.generation_prompt(&probe.chat_template_kwargs);
        let answers = shape.slots.iter().zip(&shape.pieces);
        let headers = answers.filter(|(slot, _)| probe.messages[slot.message].role == "assistant");
        shape.forced =
            headers.filter_map(|(_, header)| rest_of_prompt(&prompt, header)?.chars().next()).collect();
        for span in spans {
            let border = |at| shape.border(&layout, at);
            shape.spans.push((border(span.start)?, border(span.end)?, span.weight, span.message));
        }
        Some(shape)
    }

    fn border(&self, layout: &Layout, at: usize) -> Option<Border> {
        let piece = layout.pieces.partition_point(|start| *start <= at).checked_sub(1)?;
        let offset = at - layout.pieces[piece];
        if offset <= self.pieces[piece].len() {
            return Some(Border::Piece(piece, offset));
        }
        let (start, end) = *layout.contents.get(piece)?;
        match at {
            _ if at == start => Some(Border::ContentStart(piece)),
            _ if at == end => Some(Border::ContentEnd(piece)),
            _ => None,
        }
    }

    /// The text with `contents`, by message, and what is trained of it.
    fn fill(&self, contents: &[&str], controls: &Controls) -> Rendered {
        let length = self.pieces.iter().map(String::len).chain(contents.iter().map(|text| text.len())).sum();
        let mut text = String::with_capacity(length);
        let mut layout = Layout {
            pieces: Vec::with_capacity(self.pieces.len()),
            contents: Vec::with_capacity(self.slots.len()),
        };
        for (piece, slot) in self.pieces.iter().zip(&self.slots) {
            layout.pieces.push(text.len());
            text.push_str(piece);
            let content = contents[slot.message];
            let leading = leading_white_space(content).len();
            let core = content[leading..].trim_end_matches(marks::is_white_space);
            if slot.keeps_leading {
                text.push_str(&content[..leading]);
            }
            layout.contents.push((text.len(), text.len() + core.len()));
            text.push_str(core);
            if slot.keeps_trailing {
                text.push_str(&content[leading + core.len()..]);
            }
        }
        layout.pieces.push(text.len());
        text.extend(self.pieces.last().map(String::as_str));
        let place = |border| match border {
            Border::Piece(piece, offset) => layout.pieces[piece] + offset,
            Border::ContentStart(slot) => layout.contents[slot].0,
            Border::ContentEnd(slot) => layout.contents[slot].1,
        };
        let span = |&(start, end, weight, message): &(Border, Border, f32, Option<usize>)| Segment {
            start: place(start),
            end: place(end),
            weight,
            message,
        };
        let spans = self.spans.iter().map(span).collect();
        let mut contents = layout.contents;
        contents.sort_unstable();
        Rendered { text, contents, endless: self.endless, ..Rendered::default() }.with_spans(spans, controls)
    }

    /// Whether Jinja gives the same for `probe` with other contents.
    fn agrees(
        &self,
        template: &ChatTemplate,
        probe: &Conversation,
        contents: &dyn Fn(usize) -> String,
        controls: &Controls,
    ) -> bool {
        let mut probe = probe.clone();
        for (index, message) in probe.messages.iter_mut().enumerate() {
            message.content = Some(contents(index));
        }
        let contents: Vec<&str> =
            probe.messages.iter().filter_map(|message| message.content.as_deref()).collect();
        let ours = self.fill(&contents, controls);
        template.follow(&probe, controls).is_ok_and(|found| found.into_rendered(controls) == ours)
    }
}

#[cfg(test)]
mod tests;
