//! The bytes of a row as a JSON value.
//!
//! JSON stays as it is, a record of CSV becomes an object of strings by the header, a line of text becomes
//! `{"text": line}`. Errors name the line of the file.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Layout, RowSpan, csv};
use crate::conversation::{line_and_column, parse_json};
use crate::{Error, Result};

/// Turns the rows of one file into values; cheap to clone.
#[derive(Debug, Clone)]
pub struct RowParser {
    pub(super) layout: Layout,
    /// The names of the columns of a CSV file; else empty.
    pub(super) header: Arc<[String]>,
}

impl RowParser {
    /// The value of the row at `span`, whose bytes are `bytes`.
    pub fn parse(&self, bytes: &[u8], span: RowSpan) -> Result<Value> {
        let value = match self.layout {
            Layout::JsonLines | Layout::JsonArray | Layout::JsonDocument => parse_json(bytes),
            Layout::TextLines => text(bytes),
            Layout::Csv { delimiter } => csv::object(bytes, delimiter, &self.header),
        };
        value.map_err(|mut error| {
            // lines of the row to lines of the file
            error.place.line = Some(error.place.line.map_or(span.line, |line| span.line + line - 1));
            error
        })
    }

    /// How the rows of the file lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The names of the columns of a CSV file; empty for other layouts.
    pub fn header(&self) -> &[String] {
        &self.header
    }
}

fn text(bytes: &[u8]) -> Result<Value> {
    if memchr::memchr(0, bytes).is_some() {
        let message =
            "a NUL byte in a line of text: the file was not written whole, or is not text; write it again";
        return Err(Error::row("", message));
    }
    Ok(json!({"text": utf8(bytes)?}))
}

/// `bytes` as text; an error says where it is none.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let byte = bytes.get(at).copied().unwrap_or_default();
        let message =
            format!("byte 0x{byte:02x} is not UTF-8; convert the file, for example with iconv -t UTF-8");
        let mut error = Error::row("", message);
        let (line, column) = line_and_column(bytes, at);
        error.place.line = Some(line);
        error.place.column = Some(column);
        error
    })
}
