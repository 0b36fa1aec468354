//! Which bytes of a rendered conversation are trained.
//!
//! The trained span of an assistant turn runs from the end of what the generation prompt renders to
//! the control token that closes the turn, included. Where the template has `{% generation %}`, the
//! tag decides. Elsewhere the content of each assistant message is put between marks
//! (noncharacters, which no text contains), the template renders once, and the marks show where
//! the content went, also when the template stripped or trimmed it. Where a template drops a mark, the
//! render of the messages before that turn says where it begins. Every answer is checked: the marked
//! render without its marks must be the plain render, and a turn that cannot be placed is an error.

use crate::conversation::{Conversation, Message};
use crate::{Error, ErrorKind, Result};

use super::{ChatTemplate, PLAIN, TAGGED};

/// A stretch of the rendered text; segments tile it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// Whether its tokens are trained.
    pub trained: bool,
    /// The message it belongs to, for trained segments that were placed by message.
    pub message: Option<usize>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rendered {
    /// What `apply_chat_template(tokenize=False)` gives.
    pub text: String,
    /// Segments in order, without gaps, from 0 to the end of the text.
    pub segments: Vec<Segment>,
}

// noncharacters of Unicode (Arabic Presentation Forms-A): valid in UTF-8, reserved for internal use
const CONTENT_START: char = '\u{FDD0}';
const CONTENT_END: char = '\u{FDD1}';
const INDEX_END: char = '\u{FDD2}';
const GENERATION_START: char = '\u{FDD3}';
const GENERATION_END: char = '\u{FDD4}';
const DIGIT_ZERO: u32 = 0xFDE0;

/// A mark found in a render, at a byte of the text without marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    ContentStart(usize),
    ContentEnd(usize),
    GenerationStart,
    GenerationEnd,
}

impl Rendered {
    /// A document: one trained segment.
    pub fn document(text: String) -> Self {
        let segments = vec![Segment { start: 0, end: text.len(), trained: true, message: None }];
        Self { text, segments }
    }
}

impl ChatTemplate {
    /// Renders `conversation` and says which bytes are trained.
    pub fn render_segments(&self, conversation: &Conversation) -> Result<Rendered> {
        let spans =
            if self.tagged { self.tagged_spans(conversation)? } else { self.followed_spans(conversation)? };
        let (text, spans) = spans;
        Ok(Rendered { segments: tile(&spans, text.len()), text })
    }

    fn tagged_spans(&self, conversation: &Conversation) -> Result<(String, Vec<Segment>)> {
        let messages =
            conversation.messages.iter().map(|message| self.message_value(message, None)).collect();
        let (text, marks) = take_marks(&self.render_values(TAGGED, messages, conversation, false)?);
        if text != self.render(conversation, false)? {
            return Err(unplaced("its {% generation %} marks change what it renders"));
        }
        let mut spans = Vec::new();
        let mut start = None;
        for (at, mark) in marks {
            match (mark, start) {
                (Mark::GenerationStart, None) => start = Some(at),
                (Mark::GenerationEnd, Some(from)) => {
                    spans.push(Segment { start: from, end: at, trained: true, message: None });
                    start = None;
                }
                _ => return Err(unplaced("its {% generation %} tags are nested or out of order")),
            }
        }
        let assistants: Vec<usize> = assistants(conversation).map(|(index, _)| index).collect();
        if assistants.iter().any(|&index| !conversation.messages[index].trained) {
            if assistants.len() != spans.len() {
                return Err(unplaced(
                    "a message has \"loss\": false, but turns and {% generation %} spans do not pair up",
                ));
            }
            for (span, &index) in spans.iter_mut().zip(&assistants) {
                span.message = Some(index);
                span.trained = conversation.messages[index].trained;
            }
        }
        Ok((text, spans))
    }

    fn followed_spans(&self, conversation: &Conversation) -> Result<(String, Vec<Segment>)> {
        let text = self.render(conversation, false)?;
        let marks = self.content_marks(conversation, &text);
        let mut spans: Vec<Segment> = Vec::new();
        // spans are found from the last turn to the first: a turn is bounded by the one after it
        let mut bound = text.len();
        for (index, message) in assistants(conversation).collect::<Vec<_>>().into_iter().rev() {
            let at = |wanted: Mark| marks.iter().find(|(_, mark)| *mark == wanted).map(|(at, _)| *at);
            let content_start = at(Mark::ContentStart(index));
            let content_end = at(Mark::ContentEnd(index));
            if content_end.is_some_and(|end| end > bound) {
                return Err(unplaced(&format!("it moves the content of messages[{index}]")));
            }
            let start = self.turn_start(conversation, index, &text, content_start, content_end)?;
            let end = match content_end {
                Some(content_end) => self.end_of_turn(&text, content_end.max(start), bound),
                None => self.end_without_content(conversation, index, &text, start, bound)?,
            };
            if start > end {
                return Err(unplaced(&format!("the turn of messages[{index}] ends before it begins")));
            }
            spans.push(Segment { start, end, trained: message.trained, message: Some(index) });
            bound = start;
        }
        spans.reverse();
        Ok((text, spans))
    }

    /// Marks round assistant contents, at their bytes in the plain render `text`.
    fn content_marks(&self, conversation: &Conversation, text: &str) -> Vec<(usize, Mark)> {
        if text.contains([CONTENT_START, CONTENT_END, INDEX_END]) {
            return Vec::new();
        }
        let values = conversation.messages.iter().enumerate().map(|(index, message)| {
            self.message_value(message, (message.role == "assistant").then_some(index))
        });
        let Ok(marked) = self.render_values(PLAIN, values.collect(), conversation, false) else {
            return Vec::new();
        };
        let (unmarked, marks) = take_marks(&marked);
        // a template that looks into the content may render marked content differently; then the
        // marks prove nothing and turns are placed by rendering what comes before them
        if unmarked == text { marks } else { Vec::new() }
    }

    fn turn_start(
        &self,
        conversation: &Conversation,
        index: usize,
        text: &str,
        content_start: Option<usize>,
        content_end: Option<usize>,
    ) -> Result<usize> {
        if let Some(content_start) = content_start {
            let content = conversation.messages[index].content.as_deref().unwrap_or_default();
            let leading = &content[..content.len() - content.trim_start().len()];
            let before = &text[..content_start];
            let header = before.strip_suffix(leading).unwrap_or(before);
            if !self.generation_prompt.is_empty() && header.ends_with(&self.generation_prompt) {
                return Ok(header.len());
            }
        }
        let earlier = &conversation.messages[..index];
        let prompted = self.render_messages(earlier, conversation, true);
        if let Ok(prompted) = &prompted
            && text.starts_with(prompted.as_str())
            && content_end.is_none_or(|end| prompted.len() <= end)
        {
            return Ok(prompted.len());
        }
        let limit = content_start.or(content_end);
        if let Some(at) = limit.and_then(|limit| rfind_end(&text[..limit], &self.generation_prompt)) {
            return Ok(at);
        }
        // the prompt opens more than earlier turns keep (a forced `<think>`): what both share is given
        if let (Ok(prompted), Ok(plain)) = (&prompted, self.render_messages(earlier, conversation, false))
            && text.starts_with(plain.as_str())
        {
            let shared = shared_prefix(text, prompted).max(plain.len());
            return Ok(limit.map_or(shared, |limit| shared.min(limit)));
        }
        match content_start {
            Some(content_start) if self.generation_prompt.is_empty() => Ok(content_start),
            _ => Err(unplaced(&format!("it is unclear where the turn of messages[{index}] begins"))),
        }
    }

    /// The end of a turn whose content ends at `content_end`: its closing token, else the content.
    fn end_of_turn(&self, text: &str, content_end: usize, bound: usize) -> usize {
        self.turn_end
            .as_deref()
            .and_then(|token| Some(content_end + text[content_end..bound].find(token)? + token.len()))
            .unwrap_or(content_end)
    }

    /// The end of a turn that shows no content mark: where the messages up to it stop rendering.
    fn end_without_content(
        &self,
        conversation: &Conversation,
        index: usize,
        text: &str,
        start: usize,
        bound: usize,
    ) -> Result<usize> {
        let rendered = self.render_messages(&conversation.messages[..=index], conversation, false);
        let end = match &rendered {
            Ok(rendered)
                if text.starts_with(rendered.as_str()) && (start..=bound).contains(&rendered.len()) =>
            {
                rendered.len()
            }
            _ if index + 1 == conversation.messages.len() => bound,
            _ => return Err(unplaced(&format!("it is unclear where the turn of messages[{index}] ends"))),
        };
        let turn = &text[start..end];
        Ok(self
            .turn_end
            .as_deref()
            .and_then(|token| rfind_end(turn, token))
            .map_or(end, |length| start + length))
    }
}

fn assistants(conversation: &Conversation) -> impl Iterator<Item = (usize, &Message)> {
    conversation.messages.iter().enumerate().filter(|(_, message)| message.role == "assistant")
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

/// Puts marks round `text`, inside its leading and trailing white space, so that a template that
/// trims sees the same white space as without marks.
pub(super) fn mark(text: &str, index: usize) -> String {
    let core = text.trim();
    if core.is_empty() {
        return text.to_owned();
    }
    let leading = text.len() - text.trim_start().len();
    let digits: String = format!("{index:x}")
        .chars()
        .filter_map(|digit| char::from_u32(DIGIT_ZERO + digit.to_digit(16)?))
        .collect();
    let (before, after) = (&text[..leading], &text[leading + core.len()..]);
    format!("{before}{CONTENT_START}{digits}{INDEX_END}{core}{CONTENT_END}{digits}{INDEX_END}{after}")
}

/// Removes all marks; each is returned with its byte in the text that remains.
fn take_marks(marked: &str) -> (String, Vec<(usize, Mark)>) {
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

fn tile(spans: &[Segment], length: usize) -> Vec<Segment> {
    let mut segments = Vec::with_capacity(2 * spans.len() + 1);
    let mut at = 0;
    for span in spans.iter().filter(|span| span.end > span.start) {
        if span.start > at {
            segments.push(Segment { start: at, end: span.start, trained: false, message: None });
        }
        segments.push(*span);
        at = span.end;
    }
    if at < length {
        segments.push(Segment { start: at, end: length, trained: false, message: None });
    }
    segments
}

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
        let end = start + source[start..].find("%}")? + 2;
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
