//! A data file as a sequence of rows, each known by where it stands.
//!
//! A [`Source`] is opened once and finds the byte range of each row without keeping its bytes. Rows
//! are read later by position, from any thread, so memory does not grow with the file. Four layouts are told apart
//! by the file's name and first bytes: JSON Lines, a JSON array, one JSON document, and text with a document a line.
//! Blank lines are skipped; a last line without a newline counts; a UTF-8 byte-order mark is passed over.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, ErrorKind, Result};

/// A longer row is an error, so that a file without newlines cannot take all memory.
pub const MAX_ROW_BYTES: u64 = 256 << 20;

/// How rows lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One JSON value a line.
    JsonLines,
    /// The elements of one JSON array.
    JsonArray,
    /// The whole file is one JSON object.
    JsonDocument,
    /// One document a line.
    TextLines,
}

/// The place of a row in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSpan {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, without the newline.
    pub bytes: u64,
    /// Line of the first byte, from 1.
    pub line: u64,
}

/// An open data file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
    layout: Layout,
    bytes: u64,
}

impl Source {
    /// Opens `path` and finds its layout.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| Error::io(path, &error);
        if !path.exists() {
            return Err(Error::new(
                ErrorKind::Io(std::io::ErrorKind::NotFound),
                "no such file; check the path, or name a bundled data set (self-cognition, everyday)",
            )
            .in_file(path));
        }
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !matches!(extension, "jsonl" | "json" | "txt") {
            return Err(Error::new(
                ErrorKind::Row,
                format!("a file of kind \".{extension}\"; expected .jsonl, .json or .txt"),
            )
            .in_file(path));
        }
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let mut source = Self { path: path.to_path_buf(), file, layout: Layout::JsonLines, bytes };
        source.layout = source.find_layout(extension)?;
        Ok(source)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How its rows lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Its size when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The rows of the file, in order.
    pub fn rows(&self) -> Result<RowSpans<impl BufRead + Send + use<>>> {
        Ok(RowSpans::new(self.reader()?, self.layout))
    }

    /// Reads the bytes of one row.
    pub fn read(&self, span: RowSpan) -> Result<Vec<u8>> {
        let size = usize::try_from(span.bytes).unwrap_or(usize::MAX);
        let mut bytes = vec![0; size];
        self.file
            .read_exact_at(&mut bytes, span.offset)
            .map_err(|error| Error::io(&self.path, &error).on_line(span.line))?;
        Ok(bytes)
    }

    fn reader(&self) -> Result<BufReader<File>> {
        let io = |error: std::io::Error| Error::io(&self.path, &error);
        // a second handle, because reading in order moves the position of the handle
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        Ok(BufReader::with_capacity(256 << 10, file))
    }

    fn find_layout(&self, extension: &str) -> Result<Layout> {
        if extension == "txt" {
            return Ok(Layout::TextLines);
        }
        let mut reader = self.reader()?;
        let mut line = Vec::new();
        let text = loop {
            line.clear();
            let read = (&mut reader).take(MAX_ROW_BYTES).read_until(b'\n', &mut line);
            if read.map_err(|error| Error::io(&self.path, &error))? == 0 {
                return Ok(Layout::JsonLines);
            }
            let text = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line).trim_ascii();
            if text.starts_with(&[0xFF, 0xFE]) || text.starts_with(&[0xFE, 0xFF]) {
                let message = "the file is UTF-16; convert it with iconv -f UTF-16 -t UTF-8";
                return Err(Error::row("", message).in_file(&self.path).on_line(1));
            }
            if !text.is_empty() {
                break text;
            }
        };
        let whole_line = serde_json::from_slice::<Value>(text).ok();
        Ok(match (text[0], whole_line) {
            // a line that is itself a list of messages is a row; a list of rows is a file
            (b'[', Some(Value::Array(items))) => {
                let message = |item: &Value| item.get("role").is_some() || item.get("from").is_some();
                if items.iter().any(message) { Layout::JsonLines } else { Layout::JsonArray }
            }
            (b'[', None) => Layout::JsonArray,
            (b'{', None) if extension == "json" => Layout::JsonDocument,
            _ => Layout::JsonLines,
        })
    }
}

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The rows of a reader, as spans. Works on any chunking of the bytes.
pub struct RowSpans<R> {
    reader: R,
    layout: Layout,
    offset: u64,
    line: u64,
    /// Inside the brackets of a JSON array; `None` before it.
    in_array: Option<bool>,
    finished: bool,
}

impl<R: BufRead> RowSpans<R> {
    /// Spans of `reader`, which stands at the start of a file of this layout.
    pub fn new(reader: R, layout: Layout) -> Self {
        Self { reader, layout, offset: 0, line: 1, in_array: None, finished: false }
    }

    /// Bytes passed so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        let buffer = self
            .reader
            .fill_buf()
            .map_err(|error| Error::new(ErrorKind::Io(error.kind()), error.to_string()).on_line(self.line))?;
        Ok(buffer.first().copied())
    }

    fn advance(&mut self, byte: u8) {
        self.reader.consume(1);
        self.offset += 1;
        self.line += u64::from(byte == b'\n');
    }

    fn skip_blank(&mut self) -> Result<Option<u8>> {
        while let Some(byte) = self.peek()? {
            let mark = usize::try_from(self.offset).is_ok_and(|at| BYTE_ORDER_MARK.get(at) == Some(&byte));
            if !byte.is_ascii_whitespace() && !mark {
                return Ok(Some(byte));
            }
            self.advance(byte);
        }
        Ok(None)
    }

    fn next_line(&mut self) -> Result<Option<RowSpan>> {
        if self.skip_blank()?.is_none() {
            return Ok(None);
        }
        let (offset, line) = (self.offset, self.line);
        let mut bytes = 0;
        // the end of the row without white space at its end (`\r` of CRLF files)
        let mut trimmed = 0;
        loop {
            let buffer = self
                .reader
                .fill_buf()
                .map_err(|error| Error::new(ErrorKind::Io(error.kind()), error.to_string()).on_line(line))?;
            if buffer.is_empty() {
                break;
            }
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let part = &buffer[..end.unwrap_or(buffer.len())];
            if let Some(last) = part.iter().rposition(|byte| !byte.is_ascii_whitespace()) {
                trimmed = bytes + last as u64 + 1;
            }
            bytes += part.len() as u64;
            if bytes > MAX_ROW_BYTES {
                return Err(too_long(line));
            }
            let consumed = part.len() + usize::from(end.is_some());
            self.reader.consume(consumed);
            self.offset += consumed as u64;
            if end.is_some() {
                self.line += 1;
                break;
            }
        }
        Ok(Some(RowSpan { offset, bytes: trimmed, line }))
    }

    fn next_element(&mut self) -> Result<Option<RowSpan>> {
        let Some(mut byte) = self.skip_blank()? else {
            if self.in_array == Some(false) {
                return Ok(None);
            }
            return Err(
                Error::row("", "the file ends inside the JSON array; it was cut off").on_line(self.line)
            );
        };
        let first = self.in_array.is_none();
        if first {
            self.advance(byte);
            self.in_array = Some(true);
            byte = self.after_blank()?;
        } else if self.in_array == Some(false) {
            return Err(Error::row("", "there is text after the end of the JSON array").on_line(self.line));
        }
        if byte == b']' {
            self.advance(byte);
            self.in_array = Some(false);
            return self.next_element();
        }
        if !first {
            if byte != b',' {
                return Err(
                    Error::row("", "expected , or ] between the rows of the JSON array").on_line(self.line)
                );
            }
            self.advance(byte);
            self.after_blank()?;
        }
        self.value().map(Some)
    }

    fn after_blank(&mut self) -> Result<u8> {
        self.skip_blank()?.ok_or_else(|| {
            Error::row("", "the file ends inside the JSON array; it was cut off").on_line(self.line)
        })
    }

    /// Passes over one JSON value by its brackets and strings; the value itself is checked when it is parsed.
    fn value(&mut self) -> Result<RowSpan> {
        let (offset, line) = (self.offset, self.line);
        let (mut depth, mut in_string, mut escaped) = (0_u32, false, false);
        loop {
            let Some(byte) = self.peek()? else {
                let message =
                    format!("the file ends inside the row that begins on line {line}; it was cut off");
                return Err(Error::row("", message).on_line(self.line));
            };
            if !in_string && depth == 0 && self.offset > offset && matches!(byte, b',' | b']' | b'}') {
                break;
            }
            self.advance(byte);
            if self.offset - offset > MAX_ROW_BYTES {
                return Err(too_long(line));
            }
            if in_string {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                if depth == 0 && matches!(byte, b'}' | b']') {
                    break;
                }
            }
        }
        Ok(RowSpan { offset, bytes: self.offset - offset, line })
    }

    fn document(&mut self) -> Result<Option<RowSpan>> {
        match self.skip_blank()? {
            None => Ok(None),
            Some(_) if self.in_array.is_some() => {
                Err(Error::row("", "there is text after the JSON object; write one object a line")
                    .on_line(self.line))
            }
            Some(_) => {
                self.in_array = Some(false);
                self.value().map(Some)
            }
        }
    }
}

impl<R: BufRead> Iterator for RowSpans<R> {
    type Item = Result<RowSpan>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let row = match self.layout {
            Layout::JsonLines | Layout::TextLines => self.next_line(),
            Layout::JsonArray => self.next_element(),
            Layout::JsonDocument => self.document(),
        };
        self.finished = !matches!(row, Ok(Some(_)));
        row.transpose()
    }
}

fn too_long(line: u64) -> Error {
    let message = format!("a row of more than {} MiB; is a newline missing?", MAX_ROW_BYTES >> 20);
    Error::row("", message).on_line(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, layout: Layout, buffer: usize) -> Vec<(String, u64)> {
        let reader = BufReader::with_capacity(buffer, text.as_bytes());
        let span_text = |span: RowSpan| {
            let start = usize::try_from(span.offset).unwrap();
            (text[start..start + usize::try_from(span.bytes).unwrap()].to_owned(), span.line)
        };
        RowSpans::new(reader, layout).map(|span| span_text(span.unwrap())).collect()
    }

    #[test]
    fn any_chunking_gives_the_same_lines() {
        let text = "\u{feff}{\"a\": 1}\r\n\n  {\"b\": \"é\"}  \n{\"c\": 3}";
        for buffer in 1..8 {
            let expected = [("{\"a\": 1}", 1), ("{\"b\": \"é\"}", 3), ("{\"c\": 3}", 4)];
            let found = rows(text, Layout::JsonLines, buffer);
            assert_eq!(found, expected.map(|(row, line)| (row.to_owned(), line)));
        }
    }

    #[test]
    fn any_chunking_gives_the_same_array_elements() {
        let text = " [\n {\"a\": \"x],{\\\"\"},\n\n[1, [2]] , 7, \"s\"]\n";
        for buffer in 1..8 {
            let expected = [("{\"a\": \"x],{\\\"\"}", 2), ("[1, [2]]", 4), ("7", 4), ("\"s\"", 4)];
            let found = rows(text, Layout::JsonArray, buffer);
            assert_eq!(found, expected.map(|(row, line)| (row.to_owned(), line)));
        }
    }

    #[test]
    fn an_array_that_is_cut_off_is_an_error() {
        for text in ["[{\"a\": 1}", "[{\"a\": \"b", "[", "[{\"a\": 1},"] {
            let last = RowSpans::new(text.as_bytes(), Layout::JsonArray).last().unwrap();
            assert!(last.is_err(), "{text}");
        }
    }
}
