//! A rendered conversation and the segments of its text.

use super::controls::Controls;

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
}

impl Rendered {
    /// A text whose trained spans are found; they are in order and do not overlap.
    pub(super) fn new(
        text: String,
        mut spans: Vec<Segment>,
        contents: Vec<(usize, usize)>,
        has_lost_content: bool,
        controls: &Controls,
    ) -> Self {
        if controls.ignore_empty_think {
            spans = without_empty_think(&text, spans);
        }
        Self { segments: tile(&spans, text.len()), text, contents, has_lost_content }
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
