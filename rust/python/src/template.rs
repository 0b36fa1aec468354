//! The chat template by itself, and the first rows of a file as it renders them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;
use sftcore::conversation::Row;
use sftcore::encode::{ControlTokenSet, ControlTokens, Truncation};
use sftcore::index::ShapedSource;
use sftcore::source::FilePool;
use sftcore::template::{ChatTemplate, Controls, Segment, SpecialTokens, TurnEnd, TurnEnds};
use sftcore::{Error, ErrorKind};

use crate::errors::enter_core;

/// `(start, end, trained)` in bytes of the text.
pub(crate) type SegmentTuple = (usize, usize, bool);
/// Line, text, segments and, with a tokenizer, the number of tokens.
pub(crate) type RenderedRow = (u64, String, Vec<SegmentTuple>, Option<usize>);

/// Where (`inner`, `last`, `call`), what closes a turn there, its last token, and whether the tokenizer knows it.
pub(crate) type TurnEndTuple = (&'static str, String, String, bool);

pub(crate) fn turn_end_tuples(ends: &TurnEnds) -> Vec<TurnEndTuple> {
    let ends = [("inner", &ends.inner), ("last", &ends.last), ("call", &ends.call)];
    let end = |(place, end): (&'static str, &Option<TurnEnd>)| {
        end.as_ref().map(|end| (place, end.text.clone(), end.token.clone(), end.is_token))
    };
    ends.into_iter().filter_map(end).collect()
}

/// A chat template without a tokenizer, for looking at data.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Template {
    pub(crate) core: sftcore::encode::Encoder,
}

#[pymethods]
impl Template {
    #[new]
    fn new(py: Python<'_>, source: &str, special_tokens: Vec<(String, String)>) -> PyResult<Self> {
        enter_core(py, || {
            let eos_token =
                special_tokens.iter().find(|(name, _)| name == "eos_token").map(|(_, text)| text.clone());
            let template = ChatTemplate::new(
                source,
                SpecialTokens { named: special_tokens, ..SpecialTokens::default() },
            )?;
            let core = sftcore::encode::Encoder {
                special_tokens: Arc::new(ControlTokenSet::new(&NoTokenizer)),
                tokenizer: Arc::new(NoTokenizer),
                template: Some(template),
                tool_use_template: None,
                controls: Controls::default(),
                control_tokens: ControlTokens::default(),
                chat_template_kwargs: serde_json::Map::new(),
                max_length: usize::MAX,
                truncation: Truncation::Raise,
                system: None,
                eos_token,
                appends_eos: false,
            };
            Ok(Self { core })
        })
    }

    /// Text and segments of one row.
    fn render_row(&self, py: Python<'_>, row: &[u8]) -> PyResult<(String, Vec<SegmentTuple>)> {
        enter_core(py, || {
            let rendered = self.core.render(&Row::from_json(row)?)?;
            Ok((rendered.text, segment_tuples(&rendered.segments)))
        })
    }

    #[getter]
    fn turn_ends(&self) -> Vec<TurnEndTuple> {
        self.core.template.as_ref().map_or_else(Vec::new, |template| {
            turn_end_tuples(&template.turn_ends(&self.core.chat_template_kwargs))
        })
    }

    #[getter]
    fn generation_prompt(&self) -> String {
        let template = self.core.template.as_ref();
        template
            .map_or_else(String::new, |template| template.generation_prompt(&self.core.chat_template_kwargs))
    }

    #[getter]
    fn is_tagged(&self) -> bool {
        self.core.template.as_ref().is_some_and(ChatTemplate::is_tagged)
    }

    /// Whether plain chats need no Jinja; what in a content and at its ends sends a row there all the same.
    fn compiled_form(&self, py: Python<'_>) -> PyResult<(bool, Vec<String>, Vec<char>)> {
        enter_core(py, || {
            let form =
                self.core.template.as_ref().map(|template| template.compiled_form(&self.core.controls));
            Ok(form.map_or_else(Default::default, |form| (form.is_plain, form.triggers, form.end_triggers)))
        })
    }

    /// Line, text, segments and no number of tokens of the first `limit` rows of a file.
    fn render_file(&self, py: Python<'_>, path: PathBuf, limit: usize) -> PyResult<Vec<RenderedRow>> {
        enter_core(py, || render_file(&self.core, &path, limit, false))
    }

    /// The shape of the rows of a file, by its first row.
    #[staticmethod]
    fn shape_of(py: Python<'_>, path: PathBuf) -> PyResult<String> {
        enter_core(py, || {
            let shape = open_file(&path)?.rows.shape();
            Ok(shape.map(|shape| shape.to_string()).unwrap_or_default())
        })
    }
}

/// Stands where text is looked at and never encoded.
struct NoTokenizer;

impl sftcore::tokenizer::TokenizerEngine for NoTokenizer {
    fn encode(&self, _: &str, _: bool) -> sftcore::Result<sftcore::tokenizer::Tokens> {
        Err(Error::new(ErrorKind::Tokenizer, "there is no tokenizer; pass --model"))
    }

    fn encode_plain(&self, text: &str, _: &[(usize, usize)]) -> sftcore::Result<sftcore::tokenizer::Tokens> {
        self.encode(text, false)
    }

    fn id_to_token(&self, _: u32) -> Option<String> {
        None
    }

    fn decode(&self, _: &[u32], _: bool) -> sftcore::Result<String> {
        Err(Error::new(ErrorKind::Tokenizer, "there is no tokenizer; pass --model"))
    }

    fn token_to_id(&self, _: &str) -> Option<u32> {
        None
    }

    fn vocab_size(&self) -> usize {
        0
    }

    fn special_tokens(&self) -> Vec<(u32, String)> {
        Vec::new()
    }
}

/// A file opened to be looked at: only its first rows are read.
fn open_file(path: &Path) -> sftcore::Result<ShapedSource> {
    ShapedSource::open(path, Arc::default(), &FilePool::default(), None, true, &mut |_, _| Ok(()))
}

pub(crate) fn render_file(
    core: &sftcore::encode::Encoder,
    path: &Path,
    limit: usize,
    count: bool,
) -> sftcore::Result<Vec<RenderedRow>> {
    let source = open_file(path)?;
    let spans = source.source.rows()?.take(limit);
    spans
        .map(|span| {
            let span = span.map_err(|error| error.in_file(path))?;
            let row = source.row(span)?;
            let placed = |error: Error| error.in_file(path).on_line(span.line);
            let rendered = core.render(&row).map_err(placed)?;
            let tokens =
                count.then(|| core.tokenizer.encode(&rendered.text, false)).transpose().map_err(placed)?;
            let segments = segment_tuples(&rendered.segments);
            Ok((span.line, rendered.text, segments, tokens.map(|tokens| tokens.ids.len())))
        })
        .collect()
}

pub(crate) fn segment_tuples(segments: &[Segment]) -> Vec<SegmentTuple> {
    segments.iter().map(|segment| (segment.start, segment.end, segment.is_trained())).collect()
}
