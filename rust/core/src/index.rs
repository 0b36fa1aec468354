//! What is known of each row before training: where it is, how long, how much of it is trained.
//!
//! Rows are parsed and encoded once to learn their lengths; the tokens are not kept. Rows that the
//! truncation policy deletes get no record, but are counted in the [`Report`].

use std::str::FromStr;

use crate::conversation::{Row, Shape, line_and_column};
use crate::encode::{Encoder, Example, Outcome};
use crate::locate::offset_of;
use crate::source::{FilePool, Layout, RowSpan, Source};
use crate::{Error, ErrorKind, Result};

/// What happens to a row that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnBadRow {
    /// It is an error.
    Raise,
    /// It is left out, and counted with its place and reason.
    Skip,
}

impl FromStr for OnBadRow {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raise" => Ok(Self::Raise),
            "skip" => Ok(Self::Skip),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("on_bad_row \"{name}\" is unknown; expected raise or skip"),
            )),
        }
    }
}

/// One row that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Which source it is from.
    pub file: u32,
    /// Where it stands there.
    pub span: RowSpan,
    /// Its tokens, after truncation.
    pub tokens: u32,
    /// Its trained tokens, after truncation.
    pub trained_tokens: u32,
    /// A hash of its bytes.
    pub hash: u64,
}

/// What the rows of a data set came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Files read.
    pub files: u64,
    /// Rows found.
    pub rows: u64,
    /// Rows that are trained.
    pub examples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their trained tokens.
    pub trained_tokens: u64,
    /// Tokens of the longest.
    pub longest: u64,
    /// Rows deleted for being over `max_length`.
    pub deleted: u64,
    /// The first of them, as `file:line`.
    pub first_deleted: Option<String>,
    /// Rows cut to `max_length`.
    pub truncated: u64,
    /// The first of them.
    pub first_truncated: Option<String>,
    /// Rows whose tools the chat template does not render.
    pub tools_not_rendered: u64,
    /// Control tokens inside the contents of messages, over all examples.
    pub control_tokens_in_content: u64,
    /// Rows left out because they are wrong.
    pub skipped: u64,
    /// The first few of them, each as the error it would have been.
    pub first_skipped: Vec<String>,
    /// Rows not drawn by a `#N` suffix.
    pub not_sampled: u64,
}

/// A source and the shape of its rows.
#[derive(Debug)]
pub struct ShapedSource {
    /// The file.
    pub source: Source,
    /// The shape of its first row.
    pub shape: Shape,
}

/// What one row came to, before it is counted.
#[derive(Debug)]
pub struct IndexedRow {
    /// The record, unless the row is deleted.
    pub record: Option<Record>,
    /// Whether it was cut.
    pub truncated: bool,
    /// Whether it has tools that are not rendered.
    pub tools_not_rendered: bool,
    /// Control tokens in its contents.
    pub control_tokens: usize,
    /// Why it is left out, where it is wrong.
    pub error: Option<Error>,
    /// Its place, as `file:line`.
    pub line: u64,
}

/// How many skipped rows a report quotes.
const FIRST_SKIPPED: usize = 5;

impl ShapedSource {
    /// Opens a source and fixes its shape by its first row.
    pub fn open(path: &std::path::Path) -> Result<Self> {
        Self::open_in(path, &FilePool::default())
    }

    /// The same, with open files shared with other sources.
    pub fn open_in(path: &std::path::Path, pool: &FilePool) -> Result<Self> {
        let source = Source::open(path, pool, None, &mut |_, _| Ok(()))?;
        if let Some(damage) = source.damage() {
            return Err(damage.clone());
        }
        let Some(first) = source.rows()?.next() else {
            let message = "the file has no rows; check that it was written whole";
            return Err(Error::new(ErrorKind::Row, message).in_file(path));
        };
        let first = first?;
        if source.layout() == Layout::TextLines {
            return Ok(Self { source, shape: Shape::Text });
        }
        let bytes = source.read(first)?;
        let value = source.parse(&bytes, first)?;
        let shape = Shape::detect(&value).map_err(|error| placed(error, &source, first, &bytes))?;
        Ok(Self { source, shape })
    }

    /// Reads and parses one row.
    pub fn row(&self, span: RowSpan) -> Result<(Row, Vec<u8>)> {
        let bytes = self.source.read(span)?;
        let value = self.source.parse(&bytes, span)?;
        match Row::parse(value, self.shape) {
            Ok(row) => Ok((row, bytes)),
            Err(error) => Err(placed(error, &self.source, span, &bytes)),
        }
    }

    /// The record of the row at `span`.
    pub fn index_row(&self, encoder: &Encoder, file: u32, span: RowSpan) -> Result<IndexedRow> {
        let (row, bytes) = self.row(span)?;
        let outcome = encoder.encode(&row).map_err(|error| placed(error, &self.source, span, &bytes))?;
        let tools_not_rendered = match &row {
            Row::Chat(conversation) => {
                conversation.tools.is_some() && !encoder.template_for(conversation)?.renders_tools()
            }
            Row::Text(_) => false,
        };
        let mut control_tokens = 0;
        let (record, truncated) = match outcome {
            Outcome::Deleted(_) => (None, false),
            Outcome::Example(example) => {
                control_tokens = example.control_tokens;
                let trained = example.loss_mask.iter().filter(|&&trained| trained).count();
                let record = Record {
                    file,
                    span,
                    tokens: count(example.input_ids.len()),
                    trained_tokens: count(trained),
                    hash: xxhash_rust::xxh3::xxh3_64(&bytes),
                };
                (Some(record), example.full_length > example.input_ids.len())
            }
        };
        Ok(IndexedRow { record, truncated, tools_not_rendered, control_tokens, error: None, line: span.line })
    }

    /// The same, with a wrong row as `on_bad_row` says.
    pub fn try_index_row(
        &self,
        encoder: &Encoder,
        file: u32,
        span: RowSpan,
        on_bad_row: OnBadRow,
    ) -> Result<IndexedRow> {
        match self.index_row(encoder, file, span) {
            Err(error)
                if on_bad_row == OnBadRow::Skip
                    && matches!(error.kind, ErrorKind::Row | ErrorKind::Template) =>
            {
                Ok(IndexedRow {
                    record: None,
                    truncated: false,
                    tools_not_rendered: false,
                    control_tokens: 0,
                    error: Some(error),
                    line: span.line,
                })
            }
            other => other,
        }
    }

    /// The example of a row that was indexed; an error where its bytes have changed since.
    pub fn example(&self, encoder: &Encoder, record: &Record) -> Result<Example> {
        let changed = || {
            let message = "the file changed while it was in use; start the run again";
            Error::new(ErrorKind::Row, message).in_file(self.source.path()).on_line(record.span.line)
        };
        let bytes = self.source.read(record.span).map_err(|_| changed())?;
        if xxhash_rust::xxh3::xxh3_64(&bytes) != record.hash {
            return Err(changed());
        }
        let (row, bytes) = self.row(record.span)?;
        match encoder.encode(&row).map_err(|error| placed(error, &self.source, record.span, &bytes))? {
            Outcome::Example(example) => Ok(example),
            Outcome::Deleted(_) => Err(changed()),
        }
    }
}

impl Report {
    /// Counts one row of the file `path`.
    pub fn add(&mut self, path: &std::path::Path, row: &IndexedRow) {
        let place = || Some(format!("{}:{}", path.display(), row.line));
        self.rows += 1;
        self.tools_not_rendered += u64::from(row.tools_not_rendered);
        self.control_tokens_in_content += row.control_tokens as u64;
        if let Some(error) = &row.error {
            self.skipped += 1;
            if self.first_skipped.len() < FIRST_SKIPPED {
                self.first_skipped.push(error.to_string());
            }
        } else if row.record.is_none() {
            self.deleted += 1;
            self.first_deleted = self.first_deleted.take().or_else(place);
        }
        if row.truncated {
            self.truncated += 1;
            self.first_truncated = self.first_truncated.take().or_else(place);
        }
    }

    /// Counts the rows that are left.
    pub fn add_records(&mut self, records: &[Record]) {
        for record in records {
            self.examples += 1;
            self.tokens += u64::from(record.tokens);
            self.trained_tokens += u64::from(record.trained_tokens);
            self.longest = self.longest.max(u64::from(record.tokens));
        }
    }
}

/// `error` with its file, line and column.
pub(crate) fn placed(error: Error, source: &Source, span: RowSpan, bytes: &[u8]) -> Error {
    let mut error = error.in_file(source.path());
    match (error.place.line, error.place.pointer.as_deref()) {
        (Some(line), _) => error.place.line = Some(span.line + line - 1),
        (None, Some(pointer)) if error.kind == ErrorKind::Row => {
            let (line, column) = line_and_column(bytes, offset_of(bytes, pointer));
            error.place.line = Some(span.line + line - 1);
            // the row as a whole is named by its line alone
            error.place.column = (!pointer.is_empty()).then_some(column);
        }
        (None, _) => error.place.line = Some(span.line),
    }
    error
}

/// A number of tokens; a row is bounded well below 2^32 of them.
fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}
