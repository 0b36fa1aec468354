//! Rows to examples, and the chat template by itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use sftcore::collate::IGNORED;
use sftcore::conversation::{Conversation, Row, Shape};
use sftcore::encode::Truncation;
use sftcore::pipeline::{Next, Ordered, PATIENCE, worker_panicked};
use sftcore::pretrained::Pretrained;
use sftcore::template::{ChatTemplate, Segment, SpecialTokens};
use sftcore::{Error, ErrorKind};

use crate::errors::{enter_core, to_python};

/// `(start, end, trained)` in bytes of the text.
type SegmentTuple = (usize, usize, bool);
/// Line, text, segments and, with a tokenizer, the number of tokens.
type RenderedRow = (u64, String, Vec<SegmentTuple>, Option<usize>);

#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Encoder {
    pub(crate) core: Arc<sftcore::encode::Encoder>,
    special_tokens: SpecialTokens,
    tokenizer_hash: u64,
    num_threads: usize,
}

#[pymethods]
impl Encoder {
    /// `template` is Jinja source and stands before the folder's own.
    #[new]
    #[pyo3(signature = (folder, *, template, max_length, truncation_strategy, system, num_threads))]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        template: Option<String>,
        max_length: usize,
        truncation_strategy: &str,
        system: Option<String>,
        num_threads: usize,
    ) -> PyResult<Self> {
        enter_core(py, || {
            let pretrained = Pretrained::from_folder(&folder)?;
            let template = template
                .or(pretrained.chat_template)
                .map(|source| ChatTemplate::new(&source, pretrained.special_tokens.clone()))
                .transpose()?;
            let core = sftcore::encode::Encoder {
                tokenizer: Box::new(pretrained.tokenizer),
                template,
                max_length,
                truncation: truncation_strategy.parse::<Truncation>()?,
                system,
                eos_token: pretrained.special_tokens.get("eos_token").map(str::to_owned),
            };
            Ok(Self {
                core: Arc::new(core),
                special_tokens: pretrained.special_tokens,
                tokenizer_hash: pretrained.tokenizer_hash,
                num_threads,
            })
        })
    }

    fn encode(&self, py: Python<'_>, row: &[u8]) -> PyResult<Example> {
        enter_core(py, || encode_row(&self.core, row))
    }

    fn encode_batch(&self, py: Python<'_>, rows: Vec<Vec<u8>>) -> PyResult<Vec<Example>> {
        let core = self.core.clone();
        let mut results = Vec::with_capacity(rows.len());
        let mut examples = Ordered::start(rows.into_iter(), self.num_threads, 64, move |row: Vec<u8>| {
            encode_row(&core, &row)
        });
        loop {
            py.check_signals()?;
            match py.detach(|| examples.next(PATIENCE)) {
                Next::Item(example) => results.push(example.map_err(|error| {
                    to_python(
                        py,
                        &Error { message: format!("rows[{}]: {}", results.len(), error.message), ..error },
                    )
                })?),
                Next::End => return Ok(results),
                Next::Pending => {}
                Next::Failed => return Err(to_python(py, &worker_panicked())),
            }
        }
    }

    /// The text of a JSON list of messages (or a whole row).
    fn render(&self, py: Python<'_>, row: &[u8], add_generation_prompt: bool) -> PyResult<String> {
        enter_core(py, || {
            let conversation = prompt(row)?;
            let conversation = self.core.with_system(&conversation).unwrap_or(conversation);
            self.core.template()?.render(&conversation, add_generation_prompt)
        })
    }

    /// Line, text, segments and number of tokens of the first `limit` rows of a file.
    fn render_file(&self, py: Python<'_>, path: PathBuf, limit: usize) -> PyResult<Vec<RenderedRow>> {
        enter_core(py, || render_file(&self.core, &path, limit, true))
    }

    fn tokenize<'py>(
        &self,
        py: Python<'py>,
        text: &str,
        add_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let tokens = enter_core(py, || self.core.tokenizer.encode(text, add_special_tokens))?;
        Ok(to_int64(&tokens.ids).into_pyarray(py))
    }

    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special_tokens: bool) -> PyResult<String> {
        enter_core(py, || self.core.tokenizer.decode(&ids, skip_special_tokens))
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.core.tokenizer.token_to_id(token)
    }

    fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name)
    }

    #[getter]
    fn chat_template(&self) -> Option<&str> {
        self.core.template.as_ref().map(ChatTemplate::source)
    }

    #[getter]
    fn turn_end(&self) -> Option<&str> {
        self.core.template.as_ref().and_then(ChatTemplate::turn_end)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.core.tokenizer.vocab_size()
    }

    #[getter]
    fn tokenizer_hash(&self) -> u64 {
        self.tokenizer_hash
    }
}

fn render_file(
    core: &sftcore::encode::Encoder,
    path: &Path,
    limit: usize,
    count: bool,
) -> sftcore::Result<Vec<RenderedRow>> {
    let source = sftcore::index::ShapedSource::open(path)?;
    let spans = source.source.rows()?.take(limit);
    spans
        .map(|span| {
            let span = span.map_err(|error| error.in_file(path))?;
            let (row, _) = source.row(span)?;
            let placed = |error: Error| error.in_file(path).on_line(span.line);
            let rendered = core.render(&row).map_err(placed)?;
            let tokens =
                count.then(|| core.tokenizer.encode(&rendered.text, false)).transpose().map_err(placed)?;
            let segments = segment_tuples(&rendered.segments);
            Ok((span.line, rendered.text, segments, tokens.map(|tokens| tokens.ids.len())))
        })
        .collect()
}

/// Messages to answer: a conversation that may end with the user's turn.
fn prompt(row: &[u8]) -> sftcore::Result<Conversation> {
    let mut value = sftcore::conversation::parse_json(row)?;
    // an answer that is never rendered lets the row pass the check for an assistant turn
    let messages = match &mut value {
        serde_json::Value::Array(messages) => Some(messages),
        serde_json::Value::Object(object) => {
            object.get_mut("messages").and_then(serde_json::Value::as_array_mut)
        }
        _ => None,
    };
    let messages = messages.ok_or_else(|| Error::new(ErrorKind::Row, "expected a list of messages"))?;
    messages.push(serde_json::json!({"role": "assistant", "content": "-"}));
    match Row::parse(value, Shape::Messages)? {
        Row::Chat(mut conversation) => {
            conversation.messages.pop();
            Ok(conversation)
        }
        Row::Text(_) => Err(Error::new(ErrorKind::Row, "expected a list of messages")),
    }
}

fn encode_row(core: &sftcore::encode::Encoder, row: &[u8]) -> sftcore::Result<Example> {
    let row = Row::from_json(row)?;
    let (rendered, example) = core.encode_full(&row)?;
    match core.truncate(example)? {
        sftcore::encode::Outcome::Example(example) => {
            Ok(Example { text: rendered.text, segments: rendered.segments, tokens: example })
        }
        sftcore::encode::Outcome::Deleted(length) => Err(Error::row(
            "",
            format!(
                "{length} tokens are over max_length {}, and truncation_strategy delete leaves such a row out",
                core.max_length
            ),
        )),
    }
}

#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Example {
    text: String,
    segments: Vec<Segment>,
    tokens: sftcore::encode::Example,
}

#[pymethods]
impl Example {
    #[getter]
    fn text(&self) -> &str {
        &self.text
    }

    #[getter]
    fn segments(&self) -> Vec<SegmentTuple> {
        segment_tuples(&self.segments)
    }

    #[getter]
    fn input_ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        to_int64(&self.tokens.input_ids).into_pyarray(py)
    }

    #[getter]
    fn loss_mask<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.tokens.loss_mask.clone().into_pyarray(py)
    }

    #[getter]
    fn labels<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let label = |(&id, &trained)| if trained { i64::from(id) } else { IGNORED };
        let labels: Vec<i64> = self.tokens.input_ids.iter().zip(&self.tokens.loss_mask).map(label).collect();
        labels.into_pyarray(py)
    }

    fn __len__(&self) -> usize {
        self.tokens.input_ids.len()
    }
}

/// A chat template without a tokenizer, for looking at data.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Template {
    core: sftcore::encode::Encoder,
}

#[pymethods]
impl Template {
    #[new]
    fn new(py: Python<'_>, source: &str, special_tokens: Vec<(String, String)>) -> PyResult<Self> {
        enter_core(py, || {
            let texts = special_tokens.iter().map(|(_, text)| text.clone()).collect();
            let eos_token =
                special_tokens.iter().find(|(name, _)| name == "eos_token").map(|(_, text)| text.clone());
            let template = ChatTemplate::new(source, SpecialTokens { named: special_tokens, texts })?;
            let core = sftcore::encode::Encoder {
                tokenizer: Box::new(NoTokenizer),
                template: Some(template),
                max_length: usize::MAX,
                truncation: Truncation::Raise,
                system: None,
                eos_token,
            };
            Ok(Self { core })
        })
    }

    /// Line, text, segments and no number of tokens of the first `limit` rows of a file.
    fn render_file(&self, py: Python<'_>, path: PathBuf, limit: usize) -> PyResult<Vec<RenderedRow>> {
        enter_core(py, || render_file(&self.core, &path, limit, false))
    }

    /// The shape of the rows of a file, by its first row.
    #[staticmethod]
    fn shape_of(py: Python<'_>, path: PathBuf) -> PyResult<String> {
        enter_core(py, || Ok(sftcore::index::ShapedSource::open(&path)?.shape.to_string()))
    }
}

/// Stands where text is looked at and never encoded.
struct NoTokenizer;

impl sftcore::tokenizer::TokenizerEngine for NoTokenizer {
    fn encode(&self, _: &str, _: bool) -> sftcore::Result<sftcore::tokenizer::Tokens> {
        Err(Error::new(ErrorKind::Tokenizer, "there is no tokenizer; pass --model"))
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

    fn special_tokens(&self) -> Vec<String> {
        Vec::new()
    }
}

fn segment_tuples(segments: &[Segment]) -> Vec<SegmentTuple> {
    segments.iter().map(|segment| (segment.start, segment.end, segment.trained)).collect()
}

fn to_int64(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}
