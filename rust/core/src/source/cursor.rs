//! A place in a reader: bytes and lines passed so far.
//!
//! The three scanners (lines, JSON, CSV) share it. A UTF-8 byte-order mark at the very start is passed over, whatever
//! the size of the reader's buffer. Errors of the reader carry the line.

use std::io::BufRead;

use crate::{Error, ErrorKind, Result};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// What becomes of the bytes of a row while it is scanned.
pub(super) trait Keep {
    /// Takes the next bytes of the row.
    fn keep(&mut self, bytes: &[u8]);
    /// Forgets all bytes of the row.
    fn clear(&mut self);
}

/// Only the place of a row is wanted.
pub(super) struct PlaceOnly;

impl Keep for PlaceOnly {
    fn keep(&mut self, _: &[u8]) {}
    fn clear(&mut self) {}
}

impl Keep for Vec<u8> {
    fn keep(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn clear(&mut self) {
        // the memory of a very long row is given back
        if self.capacity() > 1 << 20 {
            *self = Self::new();
        }
        self.clear();
    }
}

/// A reader and how far it was read.
pub(super) struct Cursor<R> {
    reader: R,
    /// Bytes that were read to look for the mark and are not passed yet.
    lead: Vec<u8>,
    started: bool,
    /// Bytes passed.
    pub(super) offset: u64,
    /// Line of the next byte, from 1.
    pub(super) line: u64,
    /// Whether the end of the last row was seen: a line break or a bracket, not just the end of the file.
    pub(super) closed: bool,
}

impl<R: BufRead> Cursor<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, lead: Vec::new(), started: false, offset: 0, line: 1, closed: true }
    }

    /// The bytes that come next, at least one before the end.
    pub(super) fn fill(&mut self) -> Result<&[u8]> {
        if !self.started {
            self.started = true;
            self.pass_mark()?;
        }
        if !self.lead.is_empty() {
            return Ok(&self.lead);
        }
        // asked twice: a buffer cannot be both looked at and given back
        while let Err(error) = self.reader.fill_buf() {
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(from_io(error).on_line(self.line));
            }
        }
        self.reader.fill_buf().map_err(|error| from_io(error).on_line(self.line))
    }

    /// Passes over `bytes` of what [`fill`](Self::fill) gave, with `newlines` among them.
    pub(super) fn pass(&mut self, bytes: usize, newlines: usize) {
        if self.lead.is_empty() {
            self.reader.consume(bytes);
        } else {
            self.lead.drain(..bytes.min(self.lead.len()));
        }
        self.offset += bytes as u64;
        self.line += newlines as u64;
    }

    /// The next byte, not passed.
    pub(super) fn peek(&mut self) -> Result<Option<u8>> {
        Ok(self.fill()?.first().copied())
    }

    /// Passes white space; gives the byte after it.
    pub(super) fn skip_blank(&mut self) -> Result<Option<u8>> {
        loop {
            let buffer = self.fill()?;
            let found = buffer.iter().position(|byte| !byte.is_ascii_whitespace());
            let blank = found.unwrap_or(buffer.len());
            let next = found.and_then(|at| buffer.get(at)).copied();
            if blank == 0 {
                return Ok(next);
            }
            let newlines = newlines(&buffer[..blank]);
            self.pass(blank, newlines);
        }
    }

    fn pass_mark(&mut self) -> Result<()> {
        while self.lead.len() < BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(&self.lead) {
            match self.reader.fill_buf() {
                Ok(buffer) => match buffer.first() {
                    Some(&byte) => self.lead.push(byte),
                    None => break,
                },
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(from_io(error).on_line(self.line)),
            }
            self.reader.consume(1);
        }
        if self.lead == BYTE_ORDER_MARK {
            self.lead.clear();
            self.offset = BYTE_ORDER_MARK.len() as u64;
        }
        Ok(())
    }
}

/// Line breaks in `bytes`.
pub(super) fn newlines(bytes: &[u8]) -> usize {
    memchr::memchr_iter(b'\n', bytes).count()
}

/// The error that a reader of ours put into an I/O error, or else the I/O error.
pub(super) fn from_io(error: std::io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error,
        Err(error) => Error::new(ErrorKind::Io(error.kind()), error.to_string()),
    }
}

/// A row over the limit.
pub(super) fn too_long(line: u64, max_row_bytes: u64, hint: &str) -> Error {
    let limit = if max_row_bytes >= 1 << 20 {
        format!("{} MiB", max_row_bytes >> 20)
    } else {
        format!("{max_row_bytes} bytes")
    };
    Error::row("", format!("a row of more than {limit}; {hint}")).on_line(line)
}

/// NUL bytes where a row should be.
pub(super) fn not_whole(line: u64) -> Error {
    let message = "NUL bytes where a row should be: the file was not written whole (a crash or a full disk); write \
                   it again, or remove this line";
    Error::row("", message).on_line(line)
}
