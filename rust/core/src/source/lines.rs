//! Rows of a file that has one a line.
//!
//! Newlines are searched at the speed of memory and no byte is kept. Blank lines are skipped; `\r\n` ends a line as
//! `\n` does; a last line without newline counts. A line over the limit is passed over to its end, so what comes after it is still found.

use std::io::BufRead;

use super::RowSpan;
use super::cursor::{Cursor, Keep, not_whole, too_long};
use crate::Result;

/// The next row: `Err` inside for a row that is wrong by itself, outside for the end of all reading.
pub(super) type Found = Result<Option<Result<RowSpan>>>;

/// Which part of a line is the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trim {
    /// All but white space at both ends.
    Blanks,
    /// All but the line break.
    LineBreak,
}

/// A line, as far as it was read.
#[derive(Default)]
struct Line {
    bytes: u64,
    /// Where the part without white space at its ends begins.
    start: Option<u64>,
    /// Where it ends.
    end: u64,
    /// The first byte of that part.
    first: u8,
    /// The last byte before the line break.
    last: u8,
}

impl Line {
    fn add(&mut self, part: &[u8]) {
        if self.start.is_none()
            && let Some(at) = part.iter().position(|byte| !byte.is_ascii_whitespace())
        {
            self.start = Some(self.bytes + at as u64);
            self.first = part[at];
        }
        if let Some(at) = part.iter().rposition(|byte| !byte.is_ascii_whitespace()) {
            self.end = self.bytes + at as u64 + 1;
        }
        self.last = part.last().copied().unwrap_or(self.last);
        self.bytes += part.len() as u64;
    }
}

/// Finds the next row; `kept` gets the whole line, of which the row is a part.
pub(super) fn next_line<R: BufRead>(
    cursor: &mut Cursor<R>,
    trim: Trim,
    max_row_bytes: u64,
    kept: &mut impl Keep,
) -> Found {
    loop {
        // the first look passes a byte-order mark, which is no part of a line
        if cursor.peek()?.is_none() {
            return Ok(None);
        }
        let (offset, number) = (cursor.offset, cursor.line);
        let mut line = Line::default();
        kept.clear();
        loop {
            let buffer = cursor.fill()?;
            let newline = memchr::memchr(b'\n', buffer);
            let part = &buffer[..newline.unwrap_or(buffer.len())];
            line.add(part);
            if line.bytes <= max_row_bytes {
                kept.keep(part);
            } else {
                kept.clear();
            }
            let closed = newline.is_some();
            let passed = part.len() + usize::from(closed);
            cursor.pass(passed, usize::from(closed));
            if closed || passed == 0 {
                cursor.closed = closed;
                break;
            }
        }
        let Some(start) = line.start else { continue };
        if line.first == 0 {
            return Ok(Some(Err(not_whole(number))));
        }
        if line.bytes > max_row_bytes {
            return Ok(Some(Err(too_long(number, max_row_bytes, "is a newline missing?"))));
        }
        let (start, end) = match trim {
            Trim::Blanks => (start, line.end),
            Trim::LineBreak => (0, line.bytes - u64::from(line.last == b'\r')),
        };
        return Ok(Some(Ok(RowSpan { offset: offset + start, bytes: end - start, line: number })));
    }
}
