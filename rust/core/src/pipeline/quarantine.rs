//! Rows that are wrong, written to a file with what is wrong with them, for a person to mend.
//!
//! A line of the file is `{"path", "line", "column", "pointer", "reason", "row"}`; the row is the text as it stands in
//! its file. Where that is not UTF-8 it is `null`, and `"bytes"` has them in hexadecimal digits; where the row cannot be
//! told from what follows, it is `null` alone. The file is written whole or not at all.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::json;

use crate::index::{BadRow, ShapedSource};
use crate::source::RowSpan;
use crate::{Error, Result};

/// Appends one row of a stream, which cannot be read again.
pub(super) fn append(path: &Path, bad: &BadRow, source: &Path, bytes: Option<Vec<u8>>) -> Result<()> {
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let written = opened.and_then(|mut file| file.write_all(&line(bad, source, bytes)));
    written.map_err(|error| full(path, &error))
}

fn line(bad: &BadRow, source: &Path, bytes: Option<Vec<u8>>) -> Vec<u8> {
    let mut line = json!({
        "path": source, "line": bad.line, "column": bad.column, "pointer": bad.pointer, "reason": bad.message,
        "row": null,
    });
    match bytes.map(String::from_utf8) {
        Some(Ok(text)) => line["row"] = text.into(),
        Some(Err(error)) => line["bytes"] = hexadecimal(error.as_bytes()).into(),
        None => {}
    }
    format!("{line}\n").into_bytes()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut digits, byte| {
        // writing to a string cannot fail
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

fn full(path: &Path, error: &std::io::Error) -> Error {
    let message = format!(
        "the quarantine file cannot be written: {error}; free some room or choose another --quarantine"
    );
    Error::io(path, &std::io::Error::new(error.kind(), message))
}

/// Writes `bad_rows` to `path`; an empty list leaves no file of an earlier run there.
pub(super) fn write(path: &Path, bad_rows: &[BadRow], sources: &[ShapedSource]) -> Result<()> {
    let io = |error: std::io::Error| full(path, &error);
    if bad_rows.is_empty() {
        return match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(error)),
            _ => Ok(()),
        };
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = write_rows(&temporary, bad_rows, sources).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // what is half written would look like the whole
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(io)
}

fn write_rows(path: &Path, bad_rows: &[BadRow], sources: &[ShapedSource]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for bad in bad_rows {
        let source = &sources[bad.file as usize].source;
        let span = RowSpan { offset: bad.offset, bytes: bad.bytes, line: bad.line };
        let bytes = (bad.bytes > 0).then(|| source.read(span).ok()).flatten();
        file.write_all(&line(bad, source.path(), bytes))?;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}
