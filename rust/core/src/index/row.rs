//! One row of a file: read, parsed, encoded, and judged.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::report::{BadRow, SetReport};
use super::table::{Record, Table};
use crate::conversation::{Columns, Row, Shape, line_and_column};
use crate::encode::{Encoder, Example, Outcome};
use crate::locate::offset_of;
use crate::source::{FilePool, Layout, RowParser, RowSpan, Source, UnpackFolder};
use crate::template::Lost;
use crate::{Error, ErrorKind, Result};

/// How many rows are tried for the shape of a file whose first rows are wrong.
const ROWS_FOR_SHAPE: usize = 100;

/// How the rows of a file become conversations: the shape of all of them, and how their keys are renamed.
#[derive(Debug, Clone)]
pub struct ShapedRows {
    path: PathBuf,
    parser: RowParser,
    columns: Arc<Columns>,
    /// The shape of its rows; set once it is found.
    shape: Option<Shape>,
    /// Keys that the rows carry and that are not read.
    pub ignored_keys: Vec<&'static str>,
}

/// A source and how its rows are read.
#[derive(Debug)]
pub struct ShapedSource {
    /// The file.
    pub source: Source,
    /// How its rows are read.
    pub rows: ShapedRows,
}

/// A row and its examples.
#[derive(Debug)]
pub struct EncodedRow {
    /// What it came to.
    pub indexed: IndexedRow,
    /// Its examples, in the order of its records.
    pub examples: Vec<Example>,
}

/// What one row came to.
#[derive(Debug)]
pub struct IndexedRow {
    /// Where it stands.
    pub span: RowSpan,
    /// What became of it.
    pub verdict: Verdict,
    /// Whether it has tools that are not rendered.
    pub tools_not_rendered: bool,
    /// Control tokens in its contents.
    pub control_tokens: usize,
    /// What it says and its text does not.
    pub lost: Vec<Lost>,
    /// Trained turns that no token ends.
    pub endless_turns: usize,
}

/// What became of a row.
#[derive(Debug)]
pub enum Verdict {
    /// It is trained; whether it was cut.
    Trained(Record, bool),
    /// It is several examples, and this many pieces more had nothing to train.
    Split(Vec<Record>, usize),
    /// It is over `max_length`.
    Deleted,
    /// The chat template leaves out some of what it says.
    Lossy,
    /// It is wrong, or (`true`) nothing of it is trained.
    Bad(Error, bool),
}

impl ShapedRows {
    /// Rows of the file `path`, whose shape is yet to be found.
    pub fn new(path: &Path, parser: RowParser, columns: Arc<Columns>) -> Self {
        Self { path: path.to_path_buf(), parser, columns, shape: None, ignored_keys: Vec::new() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shape of its rows.
    pub fn shape(&self) -> Option<Shape> {
        self.shape
    }

    /// Takes the shape of all rows from one of them.
    pub fn find_shape(&mut self, bytes: &[u8], span: RowSpan) -> Result<()> {
        let value = self.parser.parse(bytes, span).map_err(|error| error.in_file(&self.path))?;
        let shape = self.columns.apply(value).and_then(|value| {
            self.ignored_keys = Shape::ignored_keys(&value);
            if self.parser.layout() == Layout::TextLines { Ok(Shape::Text) } else { Shape::detect(&value) }
        });
        self.shape = Some(shape.map_err(|error| self.placed(error, span, bytes))?);
        Ok(())
    }

    /// Parses the bytes of one row.
    pub fn parse(&self, bytes: &[u8], span: RowSpan) -> Result<Row> {
        let value = self.parser.parse(bytes, span).map_err(|error| error.in_file(&self.path))?;
        // a row before the first that has a shape is wrong, whatever its form
        let shape = self.shape.map_or_else(|| Shape::detect(&value), Ok);
        shape
            .and_then(|shape| Row::parse(self.columns.apply(value)?, shape))
            .map_err(|error| self.placed(error, span, bytes))
    }

    /// Encodes the row with these bytes; an error only where the operating system fails.
    pub fn encode(&self, encoder: &Encoder, span: RowSpan, bytes: &[u8]) -> Result<EncodedRow> {
        let judged = self.parse(bytes, span).and_then(|row| {
            let outcome = encoder.encode(&row).map_err(|error| self.placed(error, span, bytes))?;
            let tools_not_rendered = match &row {
                Row::Chat(conversation) => {
                    conversation.tools.is_some() && !encoder.template_for(conversation)?.renders_tools()
                }
                Row::Text(_) => false,
            };
            Ok((outcome, tools_not_rendered))
        });
        let (outcome, tools_not_rendered) = match judged {
            Ok(judged) => judged,
            Err(error) if matches!(error.kind, ErrorKind::Row | ErrorKind::Template) => {
                return Ok(IndexedRow::bad(span, error, false).into());
            }
            Err(error) => return Err(error),
        };
        let record = |example: &Example| Record {
            offset: span.offset,
            bytes: count(span.bytes),
            tokens: count(example.input_ids.len() as u64),
            trained_tokens: count(example.num_trained() as u64),
            hash: example.hash(),
        };
        let (verdict, examples) = match outcome {
            Outcome::Example(example) => {
                let is_cut = example.full_length > example.input_ids.len();
                (Verdict::Trained(record(&example), is_cut), vec![example])
            }
            Outcome::Pieces(examples, untrained) => {
                (Verdict::Split(examples.iter().map(record).collect(), untrained), examples)
            }
            Outcome::Deleted(_) => (Verdict::Deleted, Vec::new()),
            Outcome::Lossy(lost) => {
                let indexed = IndexedRow { lost, ..IndexedRow::new(span, Verdict::Lossy) };
                return Ok(indexed.into());
            }
            Outcome::Untrained(error) => {
                return Ok(IndexedRow::bad(span, self.placed(error, span, bytes), true).into());
            }
        };
        let mut indexed = IndexedRow { tools_not_rendered, ..IndexedRow::new(span, verdict) };
        if let Some(example) = examples.first() {
            indexed.control_tokens = example.control_tokens;
            indexed.lost.clone_from(&example.lost);
            indexed.endless_turns = example.endless_turns;
        }
        Ok(EncodedRow { indexed, examples })
    }

    /// `error` with its file, line and column.
    fn placed(&self, error: Error, span: RowSpan, bytes: &[u8]) -> Error {
        if error.place.path.is_some() {
            return error.on_line(span.line);
        }
        let mut error = error.in_file(&self.path);
        match (error.place.line, error.place.pointer.as_deref()) {
            (Some(line), _) => error.place.line = Some(span.line + line - 1),
            (None, Some(pointer)) if error.kind == ErrorKind::Row => {
                let is_json = !matches!(self.parser.layout(), Layout::Csv { .. } | Layout::TextLines)
                    && !pointer.is_empty();
                let (line, column) =
                    line_and_column(bytes, if is_json { offset_of(bytes, pointer) } else { 0 });
                error.place.line = Some(span.line + line - 1);
                // the row as a whole is named by its line alone
                error.place.column = is_json.then_some(column);
            }
            (None, _) => error.place.line = Some(span.line),
        }
        error
    }
}

impl From<IndexedRow> for EncodedRow {
    fn from(indexed: IndexedRow) -> Self {
        Self { indexed, examples: Vec::new() }
    }
}

impl ShapedSource {
    /// Opens a file and fixes the shape of its rows by the first one; where wrong rows are left out (not `is_strict`),
    /// by the first that is in any shape.
    pub fn open(
        path: &Path,
        columns: Arc<Columns>,
        pool: &FilePool,
        unpack: Option<&UnpackFolder>,
        is_strict: bool,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        let source = Source::open(path, pool, unpack, progress)?;
        let rows = ShapedRows::new(path, source.parser().clone(), columns);
        let mut shaped = Self { source, rows };
        let mut first_error = None;
        for span in shaped.source.rows()?.take(if is_strict { 1 } else { ROWS_FOR_SHAPE }) {
            let found = span.and_then(|span| shaped.rows.find_shape(&shaped.source.read(span)?, span));
            match found {
                Ok(()) => return Ok(shaped),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        if let Some(damage) = shaped.source.damage() {
            // of no row: the damage explains what was found, or why nothing was
            return Err(damage.clone());
        }
        let no_rows = || {
            let message = "the file has no rows; check that it was written whole";
            Error::new(ErrorKind::Row, message).in_file(path)
        };
        Err(first_error.unwrap_or_else(no_rows))
    }

    /// Reads and parses one row.
    pub fn row(&self, span: RowSpan) -> Result<Row> {
        self.rows.parse(&self.source.read(span)?, span)
    }

    /// The example of a row that was indexed; an error where what it says has changed since.
    pub fn example(&self, encoder: &Encoder, table: &Table, row: u32) -> Result<Example> {
        let record = table.record(row);
        let unplaced = RowSpan { offset: record.offset, bytes: u64::from(record.bytes), line: 0 };
        let found =
            self.source.read(unplaced).and_then(|bytes| encoder.encode(&self.rows.parse(&bytes, unplaced)?));
        let example = match found {
            Ok(Outcome::Example(example)) => Some(example),
            Ok(Outcome::Pieces(mut examples, _)) => {
                let piece = table.piece(row);
                (piece < examples.len()).then(|| examples.swap_remove(piece))
            }
            _ => None,
        };
        example.filter(|example| example.hash() == record.hash).ok_or_else(|| self.changed(table, row))
    }

    /// The line of a row in the file.
    pub fn line(&self, table: &Table, row: u32) -> Result<u64> {
        self.source.line_of(table.record(row).offset, table.known_line(row))
    }

    fn changed(&self, table: &Table, row: u32) -> Error {
        let error = |message: String| Error::new(ErrorKind::Row, message).in_file(self.source.path());
        match self.line(table, row) {
            Ok(line) => {
                error("the file changed while it was in use; start the run again".to_owned()).on_line(line)
            }
            // what is left of the file does not reach so far
            Err(_) => error(format!(
                "the file changed while it was in use: there is no byte {} any more, where a row was; start the run again",
                table.record(row).offset
            )),
        }
    }
}

impl IndexedRow {
    /// A row that is wrong.
    pub fn bad(span: RowSpan, error: Error, is_untrained: bool) -> Self {
        Self::new(span, Verdict::Bad(error, is_untrained))
    }

    fn new(span: RowSpan, verdict: Verdict) -> Self {
        Self {
            span,
            verdict,
            tools_not_rendered: false,
            control_tokens: 0,
            lost: Vec::new(),
            endless_turns: 0,
        }
    }

    /// Counts the row of `path` in `report`; what is wrong with it, where something is.
    pub fn count(&self, path: &Path, file: u32, report: &mut SetReport) -> Option<BadRow> {
        let place = || Some(format!("{}:{}", path.display(), self.span.line));
        report.rows += 1;
        report.tools_not_rendered += u64::from(self.tools_not_rendered);
        report.control_tokens_in_content += self.control_tokens as u64;
        report.count_lost(&self.lost, place);
        if self.endless_turns > 0 {
            report.endless_turns += self.endless_turns as u64;
            report.first_endless = report.first_endless.take().or_else(place);
        }
        match &self.verdict {
            Verdict::Trained(_, false) => {}
            Verdict::Trained(_, true) => {
                report.truncated += 1;
                report.first_truncated = report.first_truncated.take().or_else(place);
            }
            Verdict::Split(_, untrained) => {
                report.split += 1;
                report.untrained_pieces += *untrained as u64;
                report.first_split = report.first_split.take().or_else(place);
            }
            Verdict::Deleted => {
                report.deleted += 1;
                report.first_deleted = report.first_deleted.take().or_else(place);
            }
            Verdict::Lossy => report.lossy += 1,
            Verdict::Bad(error, is_untrained) => {
                report.bad += 1;
                report.untrained += u64::from(*is_untrained);
                return Some(BadRow {
                    file,
                    offset: self.span.offset,
                    bytes: self.span.bytes,
                    line: error.place.line.unwrap_or(self.span.line),
                    column: error.place.column,
                    pointer: error.place.pointer.clone(),
                    message: error.message.clone(),
                    is_template: error.kind == ErrorKind::Template,
                });
            }
        }
        None
    }

    /// Its records.
    pub fn records(&self) -> &[Record] {
        match &self.verdict {
            Verdict::Trained(record, _) => std::slice::from_ref(record),
            Verdict::Split(records, _) => records,
            Verdict::Deleted | Verdict::Lossy | Verdict::Bad(..) => &[],
        }
    }
}

/// A count that is bounded well below 2^32 by the size of a row.
fn count(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
