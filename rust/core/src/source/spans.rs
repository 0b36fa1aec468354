//! The rows of a reader, one after the other.
//!
//! [`RowSpans`] gives where each row stands and keeps no byte; [`RowReader`] gives the bytes too, for what can be
//! read only once. Both run the same scanner, so they find the same rows, whatever the size of the reader's buffer. A row that is wrong by
//! itself (too long, NUL bytes) is an error among the rows; after any other error nothing more comes.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::csv::Records;
use super::cursor::{Cursor, Keep, PlaceOnly};
use super::json::{self, Progress};
use super::lines::{self, Found, Trim};
use super::parse::RowParser;
use super::{Layout, MAX_ROW_BYTES, RowSpan};
use crate::Result;

struct Scanner<R> {
    cursor: Cursor<R>,
    layout: Layout,
    /// How far a JSON array or document was read.
    progress: Progress,
    /// For CSV.
    records: Option<Records>,
    /// The names of the columns, once they were read.
    header: Option<Arc<[String]>>,
    max_row_bytes: u64,
    /// Rows that may still be given; fewer than there are where the end of the file is damaged.
    left: u64,
    path: Option<PathBuf>,
}

impl<R: BufRead> Scanner<R> {
    fn new(reader: R, layout: Layout) -> Self {
        let records = match layout {
            Layout::Csv { delimiter } => Some(Records::new(delimiter)),
            _ => None,
        };
        Self {
            cursor: Cursor::new(reader),
            layout,
            progress: Progress::default(),
            records,
            header: None,
            max_row_bytes: MAX_ROW_BYTES,
            left: u64::MAX,
            path: None,
        }
    }

    fn next_row(&mut self, kept: &mut impl Keep) -> Option<Result<RowSpan>> {
        if self.left == 0 {
            return None;
        }
        let place = |error: crate::Error, path: &Option<PathBuf>| match path {
            Some(path) => error.in_file(path),
            None => error,
        };
        match self.find(kept) {
            Ok(Some(row)) => {
                self.left -= 1;
                Some(row.map_err(|error| place(error, &self.path)))
            }
            Ok(None) => {
                self.left = 0;
                None
            }
            Err(error) => {
                self.left = 0;
                Some(Err(place(error, &self.path)))
            }
        }
    }

    fn find(&mut self, kept: &mut impl Keep) -> Found {
        self.header()?;
        let (cursor, max) = (&mut self.cursor, self.max_row_bytes);
        match (self.layout, &mut self.records) {
            (Layout::JsonArray, _) => json::next_element(cursor, &mut self.progress, max, kept),
            (Layout::JsonDocument, _) => json::document(cursor, &mut self.progress, max, kept),
            (Layout::TextLines, _) => lines::next_line(cursor, Trim::LineBreak, max, kept),
            (_, Some(records)) => records.next_record(cursor, max, kept),
            (_, None) => lines::next_line(cursor, Trim::Blanks, max, kept),
        }
    }

    fn header(&mut self) -> Result<Arc<[String]>> {
        if let Some(header) = &self.header {
            return Ok(header.clone());
        }
        let header: Arc<[String]> = match &mut self.records {
            Some(records) => records.header(&mut self.cursor, self.max_row_bytes)?.into(),
            None => Arc::new([]),
        };
        self.header = Some(header.clone());
        Ok(header)
    }
}

/// The rows of a reader, as spans.
pub struct RowSpans<R>(Scanner<R>);

impl<R: BufRead> RowSpans<R> {
    /// Spans of `reader`, which stands at the start of a file of this layout.
    pub fn new(reader: R, layout: Layout) -> Self {
        Self(Scanner::new(reader, layout))
    }

    /// The same with errors that name the file, and no more than `rows` rows.
    pub(super) fn of_file(mut self, path: &Path, rows: u64) -> Self {
        self.0.path = Some(path.to_path_buf());
        self.0.left = rows;
        self
    }

    /// Bytes passed so far.
    pub fn offset(&self) -> u64 {
        self.0.cursor.offset
    }

    /// The line of the next byte.
    pub(super) fn line(&self) -> u64 {
        self.0.cursor.line
    }

    /// Whether the end of the last row was seen, and not just the end of the file.
    pub(super) fn is_closed(&self) -> bool {
        self.0.cursor.closed
    }

    pub(super) fn header(&mut self) -> Result<Arc<[String]>> {
        self.0.header()
    }
}

impl<R: BufRead> Iterator for RowSpans<R> {
    type Item = Result<RowSpan>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next_row(&mut PlaceOnly)
    }
}

/// The rows of a reader with their bytes; at most one row is in memory.
pub struct RowReader<R: BufRead> {
    scanner: Scanner<R>,
    kept: Vec<u8>,
}

impl<R: BufRead> RowReader<R> {
    /// Rows of `reader`, which stands at the start of a file of this layout.
    pub fn new(reader: R, layout: Layout) -> Self {
        Self { scanner: Scanner::new(reader, layout), kept: Vec::new() }
    }

    /// The same with errors that name the file.
    #[must_use]
    pub fn of_file(mut self, path: &Path) -> Self {
        self.scanner.path = Some(path.to_path_buf());
        self
    }

    /// What turns the bytes of the rows into values; reads the header of a CSV file.
    pub fn parser(&mut self) -> Result<RowParser> {
        Ok(RowParser { layout: self.scanner.layout, header: self.scanner.header()? })
    }
}

impl<R: BufRead> Iterator for RowReader<R> {
    type Item = Result<(RowSpan, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.scanner.next_row(&mut self.kept)?;
        Some(row.map(|span| {
            let mut bytes = std::mem::take(&mut self.kept);
            // a whole line was kept, and the row is its part without white space at the ends
            if self.scanner.layout == Layout::JsonLines {
                let blank = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
                bytes.drain(..blank);
            }
            bytes.truncate(usize::try_from(span.bytes).unwrap_or(usize::MAX));
            (span, bytes)
        }))
    }
}
