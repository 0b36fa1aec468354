//! Rows to examples.

use std::path::PathBuf;
use std::sync::Arc;

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use sftcore::collate::IGNORED;
use sftcore::conversation::{Conversation, Row, Shape};
use sftcore::encode::{ControlTokenSet, ControlTokens, Outcome, Truncation};
use sftcore::pipeline::{Next, Ordered, PATIENCE, worker_panicked};
use sftcore::pretrained::Pretrained;
use sftcore::template::{ChatTemplate, Controls, Segment, SpecialTokens};
use sftcore::tokenizer::EngineChoice;
use sftcore::{Error, ErrorKind};

use crate::errors::{enter_core, to_python};
use crate::template::{
    RenderedRow, SegmentTuple, Template, TurnEndTuple, render_file, segment_tuples, turn_end_tuples,
};

/// Id, token as the vocabulary has it, start and end in bytes of the text, weight, segment, message.
type TokenTuple = (u32, Option<String>, usize, usize, f32, Option<usize>, Option<usize>);
/// Rows of a batch that one thread takes at a time.
const ROWS_PER_TASK: usize = 32;

#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Encoder {
    pub(crate) core: Arc<sftcore::encode::Encoder>,
    special_tokens: SpecialTokens,
    tokenizer_hash: u64,
    is_fast: bool,
    engine_reason: Option<String>,
    num_threads: usize,
}

#[pymethods]
impl Encoder {
    /// `template` is Jinja source and stands before the folder's own; `chat_template_kwargs` is JSON.
    #[new]
    #[pyo3(signature = (folder, *, template, max_length, truncation_strategy, system, num_threads, tokenizer_engine,
        train_on, train_on_eos, ignore_empty_think, reasoning, control_tokens_in_content, on_lost_content, append_eos,
        chat_template_kwargs))]
    #[expect(clippy::too_many_arguments, reason = "the settings of an encoder, one to one")]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        template: Option<String>,
        max_length: usize,
        truncation_strategy: &str,
        system: Option<String>,
        num_threads: usize,
        tokenizer_engine: &str,
        train_on: &str,
        train_on_eos: &str,
        ignore_empty_think: bool,
        reasoning: &str,
        control_tokens_in_content: &str,
        on_lost_content: &str,
        append_eos: bool,
        chat_template_kwargs: &str,
    ) -> PyResult<Self> {
        // else the first array does it, and a Ctrl-C in the middle of that is a panic (rust-numpy 0.30)
        py.import("numpy")?;
        enter_core(py, || {
            let pretrained = Pretrained::from_folder(&folder, tokenizer_engine.parse::<EngineChoice>()?)?;
            let compile = |source: &String| ChatTemplate::new(source, pretrained.special_tokens.clone());
            // a template that was chosen stands for all of the folder's
            let own = if template.is_some() { None } else { pretrained.tool_use_template.as_ref() };
            let template =
                template.as_ref().or(pretrained.chat_template.as_ref()).map(compile).transpose()?;
            let core = sftcore::encode::Encoder {
                special_tokens: Arc::new(ControlTokenSet::new(&*pretrained.tokenizer.engine)),
                template,
                tool_use_template: own.map(compile).transpose()?,
                max_length,
                truncation: truncation_strategy.parse::<Truncation>()?,
                system,
                eos_token: pretrained.special_tokens.get("eos_token").map(str::to_owned),
                controls: Controls {
                    train_on: train_on.parse()?,
                    train_on_eos: train_on_eos.parse()?,
                    ignore_empty_think,
                    reasoning: reasoning.parse()?,
                    on_lost_content: on_lost_content.parse()?,
                },
                appends_eos: append_eos,
                control_tokens: control_tokens_in_content.parse::<ControlTokens>()?,
                chat_template_kwargs: parse_kwargs(chat_template_kwargs)?,
                tokenizer: pretrained.tokenizer.engine,
            };
            Ok(Self {
                core: Arc::new(core),
                special_tokens: pretrained.special_tokens,
                tokenizer_hash: pretrained.tokenizer_hash,
                is_fast: pretrained.tokenizer.is_fast,
                engine_reason: pretrained.tokenizer.reason,
                num_threads,
            })
        })
    }

    /// The same with another chat template, given as Jinja source.
    fn with_template(&self, py: Python<'_>, template: &str) -> PyResult<Self> {
        enter_core(py, || {
            let template = ChatTemplate::new(template, self.special_tokens.clone())?;
            Ok(Self {
                core: Arc::new(self.core.with_template(template)),
                special_tokens: self.special_tokens.clone(),
                tokenizer_hash: self.tokenizer_hash,
                is_fast: self.is_fast,
                engine_reason: self.engine_reason.clone(),
                num_threads: self.num_threads,
            })
        })
    }

    fn encode(&self, py: Python<'_>, row: &[u8]) -> PyResult<Example> {
        enter_core(py, || encode_row(&self.core, row))
    }

    fn encode_batch(&self, py: Python<'_>, rows: Vec<PyBackedBytes>) -> PyResult<Vec<Example>> {
        let core = self.core.clone();
        let rows = Arc::new(rows);
        let num_rows = rows.len();
        let mut results = Vec::with_capacity(num_rows);
        // rows are short, so a thread takes many at a time
        let starts = (0..num_rows).step_by(ROWS_PER_TASK);
        let encode = move |start: usize| -> Result<Vec<Example>, (usize, Error)> {
            let end = num_rows.min(start + ROWS_PER_TASK);
            (start..end).map(|row| encode_row(&core, &rows[row]).map_err(|error| (row, error))).collect()
        };
        let mut tasks = Ordered::start(starts, self.num_threads, 4 * self.num_threads, encode);
        loop {
            py.check_signals()?;
            match py.detach(|| tasks.next(PATIENCE)) {
                Next::Item(Ok(examples)) => results.extend(examples),
                Next::Item(Err((row, error))) => {
                    let message = format!("rows[{row}]: {}", error.message);
                    return Err(to_python(py, &Error { message, ..error }));
                }
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
            let conversation = self.core.prepare(&conversation);
            self.core.template_for(&conversation)?.render(&conversation, add_generation_prompt)
        })
    }

    /// The tokens of a row, whatever their number, each with where it comes from.
    fn explain(&self, py: Python<'_>, row: &[u8]) -> PyResult<(String, Vec<TokenTuple>)> {
        enter_core(py, || {
            let row = Row::from_json(row)?;
            let (rendered, example) = self.core.encode_full(&row)?;
            let tokens = self.core.tokenize(&row, &rendered)?;
            let weights = (0..tokens.ids.len()).map(|at| {
                let trained = f32::from(u8::from(example.loss_mask[at]));
                example.loss_weights.get(at).copied().unwrap_or(trained)
            });
            let spans = tokens.covering_spans(rendered.text.len());
            let explained = tokens.ids.iter().zip(spans).zip(weights).map(|((&id, span), weight)| {
                let (start, end) = whole_characters(&rendered.text, span);
                let segment = rendered.segments.iter().position(|segment| {
                    if start == end {
                        start <= segment.end
                    } else {
                        segment.start < end && start < segment.end
                    }
                });
                let message = segment.and_then(|segment| rendered.segments[segment].message);
                (id, self.core.tokenizer.id_to_token(id), start, end, weight, segment, message)
            });
            let explained = explained.collect();
            Ok((rendered.text, explained))
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

    /// The chat template by itself, to be looked at; without one, a template that renders nothing.
    fn template(&self, py: Python<'_>) -> PyResult<Template> {
        enter_core(py, || {
            let source = self.core.template.as_ref().map_or("", ChatTemplate::source);
            let template = ChatTemplate::new(source, self.special_tokens.clone())?;
            Ok(Template { core: self.core.with_template(template) })
        })
    }

    /// Where an answer ends (inside a chat, at its end, after a call) → what closes it, the token, whether it is one.
    #[getter]
    fn turn_ends(&self) -> Vec<TurnEndTuple> {
        self.core.template.as_ref().map_or_else(Vec::new, |template| {
            turn_end_tuples(&template.turn_ends(&self.core.chat_template_kwargs))
        })
    }

    /// `fast` or `reference`.
    #[getter]
    fn tokenizer_engine(&self) -> &'static str {
        if self.is_fast { "fast" } else { "reference" }
    }

    /// Why the fast engine does not run, where it was asked for.
    #[getter]
    fn tokenizer_engine_reason(&self) -> Option<&str> {
        self.engine_reason.as_deref()
    }

    #[getter]
    fn tool_use_template(&self) -> Option<&str> {
        self.core.tool_use_template.as_ref().map(ChatTemplate::source)
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
    let length = example.input_ids.len();
    let message = match core.truncate(example)? {
        Outcome::Example(example) => {
            return Ok(Example { text: rendered.text, segments: rendered.segments, tokens: example });
        }
        Outcome::Untrained(error) => return Err(error),
        Outcome::Lossy(lost) => {
            let lost = lost.first().map_or_else(String::new, ToString::to_string);
            return Err(Error::row(
                "",
                format!(
                    "the chat template leaves out {lost}, and on_lost_content skip leaves such a row out"
                ),
            ));
        }
        Outcome::Deleted(_) => "truncation_strategy delete leaves such a row out",
        Outcome::Pieces(..) => {
            "truncation_strategy split makes several examples of it; a BatchLoader gives them"
        }
    };
    Err(Error::row("", format!("{length} tokens are over max_length {}, and {message}", core.max_length)))
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

    /// What the row says and the text does not, for people.
    #[getter]
    fn lost(&self) -> Vec<String> {
        self.tokens.lost.iter().map(ToString::to_string).collect()
    }

    /// Trained turns that no token ends.
    #[getter]
    fn endless_turns(&self) -> usize {
        self.tokens.endless_turns
    }

    #[getter]
    fn input_ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        to_int64(&self.tokens.input_ids).into_pyarray(py)
    }

    #[getter]
    fn loss_mask<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.tokens.loss_mask.clone().into_pyarray(py)
    }

    /// How much the loss of each token counts: the mask, unless a message has a weight of its own.
    #[getter]
    fn loss_weights<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        let weights = &self.tokens.loss_weights;
        if weights.is_empty() {
            let plain = self.tokens.loss_mask.iter().map(|&trained| f32::from(u8::from(trained)));
            return plain.collect::<Vec<_>>().into_pyarray(py);
        }
        weights.clone().into_pyarray(py)
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

/// A span, made wider to whole characters.
fn whole_characters(text: &str, (mut start, mut end): (usize, usize)) -> (usize, usize) {
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    while !text.is_char_boundary(end) {
        end += 1;
    }
    (start, end)
}

fn parse_kwargs(json: &str) -> sftcore::Result<serde_json::Map<String, serde_json::Value>> {
    match serde_json::from_str(json) {
        Ok(serde_json::Value::Object(kwargs)) => Ok(kwargs),
        _ => Err(Error::new(
            ErrorKind::Config,
            format!(
                "chat_template_kwargs {json} is wrong; expected a JSON object, like {{\"enable_thinking\": false}}"
            ),
        )),
    }
}

fn to_int64(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}
