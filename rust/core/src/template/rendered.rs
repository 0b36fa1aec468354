//! A rendered conversation and the segments of its text.

use std::fmt;

use super::controls::Controls;

/// A part of what a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Its words.
    Content,
    /// Its reasoning, beside the content or in it.
    Reasoning,
    /// One of its calls, by number.
    Call(usize),
    /// A tool of the conversation, by number.
    Tool(usize),
}

/// Something that a row says and its text does not: the chat template leaves it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// The message; 0 for a tool.
    pub message: usize,
    /// Its role; empty for a tool.
    pub role: &'static str,
    /// What of it.
    pub part: Part,
}

impl Lost {
    /// What kind of thing it is, as a report counts it.
    pub fn kind(&self) -> String {
        match self.part {
            Part::Content => format!("words of {}", self.role),
            Part::Reasoning => format!("reasoning of {}", self.role),
            Part::Call(_) => format!("tool calls of {}", self.role),
            Part::Tool(_) => "the list of tools".to_owned(),
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message;
        match self.part {
            Part::Content => write!(f, "the content of messages[{message}] ({})", self.role),
            Part::Reasoning => write!(f, "the reasoning of messages[{message}] ({})", self.role),
            Part::Call(call) => write!(f, "messages[{message}].tool_calls[{call}]"),
            Part::Tool(tool) => write!(f, "tools[{tool}]"),
        }
    }
}

/// A stretch of the rendered text; segments tile it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// How much the loss of its tokens counts; 0 is not trained.
    pub weight: f32,
    /// The message it belongs to, for the turns of messages.
    pub message: Option<usize>,
}

impl Segment {
    /// Whether its tokens are trained.
    pub fn is_trained(&self) -> bool {
        self.weight > 0.0
    }
}

/// Trained turns after whose words nothing stands that the tokenizer knows as a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Endless {
    /// How many.
    pub turns: usize,
    /// Whether one of them is what the text ends with, but for white space.
    pub(super) is_last: bool,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rendered {
    /// What `apply_chat_template(tokenize=False)` gives.
    pub text: String,
    /// Segments in order, without gaps, from 0 to the end of the text.
    pub segments: Vec<Segment>,
    /// The bytes of message contents, in order, as far as they could be followed.
    pub contents: Vec<(usize, usize)>,
    /// Whether a content that is in the text could not be followed to its end.
    pub has_lost_content: bool,
    /// What the row says and the text does not.
    pub lost: Vec<Lost>,
    /// Trained turns that nothing ends.
    pub endless: Endless,
}

impl Rendered {
    /// Tiles the text with the trained `spans`, which are in order and do not overlap.
    pub(super) fn with_spans(mut self, mut spans: Vec<Segment>, controls: &Controls) -> Self {
        if controls.ignore_empty_think {
            spans = without_empty_think(&self.text, spans);
        }
        self.segments = tile(&spans, self.text.len());
        self
    }

    /// Adds `eos`, trained, where the text ends with an answer that nothing closes; white space between them is trained too,
    /// as the model has to write it to come to the end.
    pub(crate) fn append_eos(&mut self, eos: &str) {
        if !self.endless.is_last {
            return;
        }
        let Some(number) = self.segments.iter().rposition(Segment::is_trained) else { return };
        self.segments.truncate(number + 1);
        self.text.push_str(eos);
        self.segments[number].end = self.text.len();
        self.endless = Endless { turns: self.endless.turns - 1, is_last: false };
    }

    /// A document: one trained segment.
    pub fn document(text: String) -> Self {
        let segments = vec![Segment { start: 0, end: text.len(), weight: 1.0, message: None }];
        Self { text, segments, ..Self::default() }
    }
}

/// Takes `<think></think>` with nothing but white space inside, and the white space after it, out of
/// the trained segments.
fn without_empty_think(text: &str, segments: Vec<Segment>) -> Vec<Segment> {
    const OPEN: &str = "<think>";
    const CLOSE: &str = "</think>";
    let mut kept = Vec::with_capacity(segments.len());
    for mut segment in segments {
        let mut from = segment.start;
        while let Some(open) = text[from..segment.end].find(OPEN).map(|at| from + at) {
            from = open + OPEN.len();
            let inside = text[from..segment.end].trim_start();
            let Some(after) = inside.strip_prefix(CLOSE) else { continue };
            kept.push(Segment { end: open, ..segment });
            segment.start = segment.end - after.trim_start().len();
            from = segment.start;
        }
        kept.push(segment);
    }
    kept
}

fn tile(spans: &[Segment], length: usize) -> Vec<Segment> {
    let mut segments = Vec::with_capacity(2 * spans.len() + 1);
    let mut at = 0;
    for span in spans.iter().filter(|span| span.end > span.start) {
        if span.start > at {
            segments.push(Segment { start: at, end: span.start, weight: 0.0, message: None });
        }
        segments.push(*span);
        at = span.end;
    }
    if at < length {
        segments.push(Segment { start: at, end: length, weight: 0.0, message: None });
    }
    segments
}
