//! Rows of a JSON array, and a file that is one JSON document.
//!
//! Values are told apart by their brackets and strings alone; what is inside them is checked when a row is parsed.
//! Once the brackets are wrong nothing after can be trusted, so the first error is the last thing found.

use std::io::BufRead;

use super::RowSpan;
use super::cursor::{Cursor, Keep, newlines, not_whole, too_long};
use super::lines::Found;
use crate::{Error, Result};

/// Brackets and strings that are open.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nesting {
    pub(super) depth: u32,
    pub(super) in_string: bool,
    escaped: bool,
}

/// Where a value ends in a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Close {
    /// It ends with the bracket before this byte.
    After(usize),
    /// It is a string, number or word, and this byte is not part of it.
    Before(usize),
}

impl Nesting {
    /// Inside a list.
    pub(super) fn in_list() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Passes over `bytes` up to the end of the value.
    pub(super) fn pass(&mut self, bytes: &[u8]) -> Option<Close> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.escaped {
                self.escaped = false;
            } else if self.in_string {
                at += memchr::memchr2(b'"', b'\\', &bytes[at..])?;
                self.escaped = bytes.get(at) == Some(&b'\\');
                self.in_string = self.escaped;
            } else {
                match byte {
                    b'"' => self.in_string = true,
                    b'{' | b'[' => self.depth = self.depth.saturating_add(1),
                    b',' | b'}' | b']' if self.depth == 0 => return Some(Close::Before(at)),
                    b'}' | b']' => {
                        self.depth -= 1;
                        if self.depth == 0 {
                            return Some(Close::After(at + 1));
                        }
                    }
                    _ => {}
                }
            }
            at += 1;
        }
        None
    }
}

/// How far the file was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing but white space.
    #[default]
    Before,
    /// Inside the brackets of the array.
    Inside,
    /// Past the end of the array or document.
    After,
}

/// Finds the next element of the array.
pub(super) fn next_element<R: BufRead>(
    cursor: &mut Cursor<R>,
    progress: &mut Progress,
    max_row_bytes: u64,
    kept: &mut impl Keep,
) -> Found {
    kept.clear();
    let byte = cursor.skip_blank()?;
    let byte = match (*progress, byte) {
        (Progress::Before | Progress::After, None) => return Ok(None),
        (Progress::Inside, None) => return Err(cut_off(cursor.line)),
        (_, Some(0)) => return Err(not_whole(cursor.line)),
        (Progress::After, Some(_)) => {
            let message = "there is text after the end of the JSON array; a file holds one array";
            return Err(Error::row("", message).on_line(cursor.line));
        }
        (Progress::Before, Some(_)) => {
            cursor.pass(1, 0);
            *progress = Progress::Inside;
            match cursor.skip_blank()?.ok_or_else(|| cut_off(cursor.line))? {
                b']' => return after_array(cursor, progress, max_row_bytes, kept),
                byte => byte,
            }
        }
        (Progress::Inside, Some(b']')) => return after_array(cursor, progress, max_row_bytes, kept),
        (Progress::Inside, Some(b',')) => {
            cursor.pass(1, 0);
            cursor.skip_blank()?.ok_or_else(|| cut_off(cursor.line))?
        }
        (Progress::Inside, Some(_)) => {
            let message = "expected , or ] between the rows of the JSON array";
            return Err(Error::row("", message).on_line(cursor.line));
        }
    };
    match byte {
        0 => Err(not_whole(cursor.line)),
        b',' | b']' | b'}' => {
            let message = format!("expected a row of the JSON array, found {}; remove it", char::from(byte));
            Err(Error::row("", message).on_line(cursor.line))
        }
        _ => Ok(Some(Ok(value(cursor, max_row_bytes, kept)?))),
    }
}

fn after_array<R: BufRead>(
    cursor: &mut Cursor<R>,
    progress: &mut Progress,
    max_row_bytes: u64,
    kept: &mut impl Keep,
) -> Found {
    cursor.pass(1, 0);
    *progress = Progress::After;
    next_element(cursor, progress, max_row_bytes, kept)
}

/// Finds the one document of the file.
pub(super) fn document<R: BufRead>(
    cursor: &mut Cursor<R>,
    progress: &mut Progress,
    max_row_bytes: u64,
    kept: &mut impl Keep,
) -> Found {
    kept.clear();
    match cursor.skip_blank()? {
        None => Ok(None),
        Some(0) => Err(not_whole(cursor.line)),
        Some(_) if *progress == Progress::After => {
            let message = "there is text after the JSON object; write one object a line";
            Err(Error::row("", message).on_line(cursor.line))
        }
        Some(_) => {
            *progress = Progress::After;
            Ok(Some(Ok(value(cursor, max_row_bytes, kept)?)))
        }
    }
}

/// Passes over one value.
pub(super) fn value<R: BufRead>(
    cursor: &mut Cursor<R>,
    max_row_bytes: u64,
    kept: &mut impl Keep,
) -> Result<RowSpan> {
    let (offset, line) = (cursor.offset, cursor.line);
    let mut nesting = Nesting::default();
    loop {
        let buffer = cursor.fill()?;
        if buffer.is_empty() {
            let message = format!(
                "the file ends inside the row that begins on line {line}; it was cut off, write it again"
            );
            return Err(Error::row("", message).on_line(cursor.line));
        }
        let close = nesting.pass(buffer);
        let part = match close {
            Some(Close::After(end) | Close::Before(end)) => &buffer[..end],
            None => buffer,
        };
        kept.keep(part);
        let (passed, newlines) = (part.len(), newlines(part));
        cursor.pass(passed, newlines);
        if cursor.offset - offset > max_row_bytes {
            kept.clear();
            return Err(too_long(line, max_row_bytes, "is a bracket or a quote missing?"));
        }
        if close.is_some() {
            return Ok(RowSpan { offset, bytes: cursor.offset - offset, line });
        }
    }
}

fn cut_off(line: u64) -> Error {
    Error::row("", "the file ends inside the JSON array; it was cut off, write it again").on_line(line)
}
