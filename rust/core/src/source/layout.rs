//! How rows lie in a file: found by what its name promises and by its first bytes.
//!
//! At most the first row is read into memory. A list of messages on a line of its own is a row, a list of rows is a file; an object
//! over several lines is a document. The delimiter of a `.csv` is the comma, unless the header has none.

use std::io::{BufRead, Read};

use serde_json::Value;

use super::cursor::{Cursor, from_io};
use super::json::{self, Nesting};
use super::kind::{Format, refuse_binary};
use super::{MAX_ROW_BYTES, csv};
use crate::Result;

/// How rows lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One JSON value a line.
    JsonLines,
    /// The elements of one JSON array.
    JsonArray,
    /// The whole file is one JSON value.
    JsonDocument,
    /// One document a line.
    TextLines,
    /// A header and records, fields in quotes where they need it.
    Csv {
        /// What stands between two fields.
        delimiter: u8,
    },
}

/// Bytes that are looked at before anything is parsed.
const HEAD_BYTES: u64 = 64;

/// Finds the layout of what `reader` gives, which stands at the start.
pub(super) fn find<R: BufRead>(mut reader: R, format: Format) -> Result<Layout> {
    let mut head = Vec::new();
    // not past the first line: the rest of a pipe may come much later
    (&mut reader).take(HEAD_BYTES).read_until(b'\n', &mut head).map_err(from_io)?;
    refuse_binary(format, &head)?;
    let mut cursor = Cursor::new((&head[..]).chain(reader));
    match format {
        Format::Text => Ok(Layout::TextLines),
        Format::Tsv => Ok(Layout::Csv { delimiter: b'\t' }),
        Format::Csv => Ok(Layout::Csv { delimiter: delimiter(&mut cursor) }),
        // parquet is unpacked to lines
        Format::Parquet => Ok(Layout::JsonLines),
        Format::Json | Format::JsonLines => json_layout(&mut cursor, format == Format::JsonLines),
    }
}

fn json_layout<R: BufRead>(cursor: &mut Cursor<R>, is_lines: bool) -> Result<Layout> {
    let other = if is_lines { Layout::JsonLines } else { Layout::JsonDocument };
    match cursor.skip_blank()? {
        Some(b'{') if !is_lines => {
            Ok(match end_of_line(cursor, Nesting::default())? {
                // a line that breaks off inside a string is a bad row, not the first line of a document
                Some(nesting) if nesting.depth > 0 && !nesting.in_string => Layout::JsonDocument,
                _ => Layout::JsonLines,
            })
        }
        Some(b'[') => {
            let line = cursor.line;
            cursor.pass(1, 0);
            if cursor.skip_blank()? != Some(b'{') {
                return Ok(Layout::JsonArray);
            }
            let mut first = Vec::new();
            // an error will be found again, and reported, when rows are read
            if json::value(cursor, MAX_ROW_BYTES, &mut first).is_err() || !is_message(&first) {
                return Ok(Layout::JsonArray);
            }
            let is_line = cursor.line == line
                && end_of_line(cursor, Nesting::in_list())?.is_some_and(|end| end.depth == 0);
            Ok(if is_line { Layout::JsonLines } else { other })
        }
        _ => Ok(Layout::JsonLines),
    }
}

/// Whether an element of a list is a message, so that the list is a row.
fn is_message(element: &[u8]) -> bool {
    let is_row = |key: &str| {
        matches!(
            key,
            "messages"
                | "conversations"
                | "instruction"
                | "query"
                | "prompt"
                | "output"
                | "response"
                | "text"
        )
    };
    match serde_json::from_slice(element) {
        Ok(Value::Object(object)) => {
            (object.contains_key("role") || object.contains_key("from"))
                && !object.keys().any(|key| is_row(key))
        }
        _ => false,
    }
}

/// What is open at the end of this line; `None` where the line is longer than a row may be.
fn end_of_line<R: BufRead>(cursor: &mut Cursor<R>, mut nesting: Nesting) -> Result<Option<Nesting>> {
    let start = cursor.offset;
    loop {
        let buffer = cursor.fill()?;
        let newline = memchr::memchr(b'\n', buffer);
        let mut part = &buffer[..newline.unwrap_or(buffer.len())];
        let passed = part.len();
        while let Some(close) = nesting.pass(part) {
            let (json::Close::After(end) | json::Close::Before(end)) = close;
            // what follows a whole value is for the parser to refuse
            part = &part[part.len().min(end + usize::from(matches!(close, json::Close::Before(_))))..];
        }
        cursor.pass(passed, 0);
        if newline.is_some() || passed == 0 {
            return Ok(Some(nesting));
        }
        if cursor.offset - start > MAX_ROW_BYTES {
            return Ok(None);
        }
    }
}

fn delimiter<R: BufRead>(cursor: &mut Cursor<R>) -> u8 {
    let mut header = Vec::new();
    match csv::Records::new(b',').next_record(cursor, MAX_ROW_BYTES, &mut header) {
        Ok(Some(Ok(_))) => {}
        // found again, and reported, when the header is read
        _ => return b',',
    }
    let num_columns = |delimiter: u8| csv::fields(&header, delimiter).map_or(0, |fields| fields.len());
    if num_columns(b',') > 1 {
        return b',';
    }
    [b';', b'\t'].into_iter().find(|&delimiter| num_columns(delimiter) > 1).unwrap_or(b',')
}
