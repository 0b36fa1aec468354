//! Rows found, whatever the kind of file and whatever is wrong with it.

mod packed;
mod plain;
mod streams;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A folder that is removed at the end of the test.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn unpack(&self) -> UnpackFolder {
        UnpackFolder(self.path("unpacked"))
    }

    /// Names in the unpack folder.
    fn unpacked(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("unpacked")).into_iter().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn open(path: &Path) -> Result<Source> {
    Source::open(path, &FilePool::default(), None, &mut |_, _| Ok(()))
}

fn spans(source: &Source) -> Vec<Result<RowSpan>> {
    source.rows().unwrap().collect()
}

/// Line and value of each row, or the error in its place.
fn rows(source: &Source) -> Vec<Result<(u64, Value), String>> {
    let row = |span: Result<RowSpan>| {
        let span = span?;
        Ok((span.line, source.parse(&source.read(span)?, span)?))
    };
    spans(source).into_iter().map(|span| row(span).map_err(|error: Error| error.to_string())).collect()
}

/// The same, where every row is right.
fn values(source: &Source) -> Vec<(u64, Value)> {
    rows(source).into_iter().map(|row| row.unwrap()).collect()
}

/// The row that is wrong, and what follows it.
fn only_error(source: &Source) -> String {
    let mut errors: Vec<_> = rows(source).into_iter().filter_map(Result::err).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors.remove(0)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut encoder = flate2::bufread::GzEncoder::new(bytes, flate2::Compression::default());
    io::Read::read_to_end(&mut encoder, &mut packed).unwrap();
    packed
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ::zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

/// `count` lines of JSON that do not shrink to nothing.
fn lines(count: u32) -> String {
    let line = |row: u32| json!({"row": row, "hash": row.wrapping_mul(2_654_435_761)}).to_string();
    (0..count).flat_map(|row| [line(row), "\n".to_owned()]).collect()
}
