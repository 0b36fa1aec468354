//! Rows of comma-separated values (RFC 4180), and of the same with another delimiter.
//!
//! The first record is the header. A row is a whole record, line breaks inside quotes included; its bytes go out without the
//! line break at its end. Records are cut and read by the same automaton (`csv-core`), so both always agree.

use std::io::BufRead;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::RowSpan;
use super::cursor::{Cursor, Keep, newlines, not_whole, too_long};
use super::lines::Found;
use super::parse::utf8;
use crate::{Error, Result};

/// Finds where records end.
pub(super) struct Records {
    reader: Reader,
    delimiter: u8,
}

impl Records {
    pub(super) fn new(delimiter: u8) -> Self {
        Self { reader: reader(delimiter), delimiter }
    }

    /// Reads the header; no names where the file has no record.
    pub(super) fn header<R: BufRead>(
        &mut self,
        cursor: &mut Cursor<R>,
        max_row_bytes: u64,
    ) -> Result<Vec<String>> {
        let mut bytes = Vec::new();
        let Some(span) = self.next_record(cursor, max_row_bytes, &mut bytes)?.transpose()? else {
            return Ok(Vec::new());
        };
        let placed = |error: Error| error.on_line(span.line);
        let names = fields(&bytes, self.delimiter).map_err(placed)?;
        // the first may have none: pandas writes its index there
        if let Some(column) =
            names.iter().rposition(|name| name.trim().is_empty()).filter(|&column| column > 0)
        {
            let message = format!(
                "column {} of the header has no name; name it, or leave the column out (pandas: index=False)",
                column + 1
            );
            return Err(placed(Error::row("", message)));
        }
        for (column, name) in names.iter().enumerate() {
            if let Some(first) = names.iter().take(column).position(|other| other == name) {
                let message = format!(
                    "columns {} and {} of the header are both named \"{name}\"; rename one",
                    first + 1,
                    column + 1
                );
                return Err(placed(Error::row("", message)));
            }
        }
        Ok(names)
    }

    /// Finds the next record.
    pub(super) fn next_record<R: BufRead>(
        &mut self,
        cursor: &mut Cursor<R>,
        max_row_bytes: u64,
        kept: &mut impl Keep,
    ) -> Found {
        kept.clear();
        // empty lines, and the \n of a \r\n after which the automaton stops early
        loop {
            let buffer = cursor.fill()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank =
                buffer.iter().position(|&byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(buffer.len());
            if blank == 0 {
                break;
            }
            let newlines = newlines(&buffer[..blank]);
            cursor.pass(blank, newlines);
        }
        let (offset, line) = (cursor.offset, cursor.line);
        let first = cursor.peek()?;
        // the fields themselves are not wanted
        let (mut output, mut ends) = ([0; 4096], [0; 64]);
        let mut bytes = 0;
        loop {
            let buffer = cursor.fill()?;
            if buffer.is_empty() {
                cursor.closed = false;
                if self.ends_in_quotes() {
                    let message =
                        "the file ends inside a quoted field of this record; a closing quote is missing";
                    return Err(Error::row("", message).on_line(line));
                }
                break;
            }
            let (result, read, _, _) = self.reader.read_record(buffer, &mut output, &mut ends);
            let closed = result == ReadRecordResult::Record;
            // the byte that ends a record is not part of it
            let part = &buffer[..read - usize::from(closed && read > 0)];
            bytes += part.len() as u64;
            if bytes <= max_row_bytes {
                kept.keep(part);
            } else {
                kept.clear();
            }
            let newlines = newlines(&buffer[..read]);
            cursor.pass(read, newlines);
            if closed {
                cursor.closed = true;
                break;
            }
        }
        if first == Some(0) {
            return Ok(Some(Err(not_whole(line))));
        }
        if bytes > max_row_bytes {
            return Ok(Some(Err(too_long(line, max_row_bytes, "is a closing quote missing?"))));
        }
        Ok(Some(Ok(RowSpan { offset, bytes, line })))
    }

    /// Whether a line break at the end of the file would be part of a field.
    fn ends_in_quotes(&mut self) -> bool {
        // the automaton itself is asked, which ends its record: a clone of it finds no ends (csv-core 0.1.13)
        let (result, ..) = self.reader.read_record(b"\n", &mut [0; 4], &mut [0; 4]);
        result != ReadRecordResult::Record
    }
}

fn reader(delimiter: u8) -> Reader {
    let mut reader = ReaderBuilder::new().delimiter(delimiter).build();
    // past the start of its input the automaton looks for no byte-order mark: the cursor has done so, and a record may begin like one
    let _ = reader.read_record(b"\n", &mut [0; 4], &mut [0; 4]);
    reader
}

/// The fields of one record.
pub(super) fn fields(record: &[u8], delimiter: u8) -> Result<Vec<String>> {
    let record = utf8(record)?;
    let mut reader = reader(delimiter);
    // a field is never longer than it is written, there is one more than there are delimiters, and the automaton wants room left
    let mut output = vec![0; record.len() + 1];
    let mut ends = vec![0; memchr::memchr_iter(delimiter, record.as_bytes()).count() + 2];
    let (mut input, mut written, mut num_fields) = (record.as_bytes(), 0, 0);
    loop {
        let (result, read, wrote, ended) =
            reader.read_record(input, &mut output[written..], &mut ends[num_fields..]);
        input = &input[read..];
        written += wrote;
        num_fields += ended;
        match result {
            // once more with nothing, which is the end
            ReadRecordResult::InputEmpty => {}
            ReadRecordResult::Record | ReadRecordResult::End => break,
            ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {
                return Err(Error::row("", "a record that cannot be cut into fields"));
            }
        }
    }
    if !input.is_empty() {
        return Err(Error::row("", "a line break outside quotes inside a record"));
    }
    let mut start = 0;
    ends.iter()
        .take(num_fields)
        .map(|&end| {
            let field = utf8(&output[start..end])?.to_owned();
            start = end;
            Ok(field)
        })
        .collect()
}

/// A record as an object of strings.
pub(super) fn object(record: &[u8], delimiter: u8, header: &[String]) -> Result<Value> {
    let fields = fields(record, delimiter)?;
    if fields.len() != header.len() {
        let names = header.iter().take(12).map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(Error::row(
            "",
            format!(
                "a record of {} fields; the header has {} ({names}): put a field that holds the delimiter, a quote or a \
                 line break in quotes",
                fields.len(),
                header.len()
            ),
        ));
    }
    let fields = fields.into_iter().map(Value::String);
    Ok(Value::Object(header.iter().cloned().zip(fields).collect::<Map<_, _>>()))
}
