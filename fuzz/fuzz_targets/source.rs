//! Bytes as a data file of any kind.
//!
//! The first byte picks the name of the file, the second says how it is cut. What a packed kind in lower case holds is packed here first,
//! with some of its last bytes missing; in upper case the bytes are the packed file. The rows must be the same whether the file is read by
//! position, as a stream, whole, or in buffers of any size.
#![no_main]

use std::cell::RefCell;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sftcore::source::{FilePool, Layout, MAX_ROW_BYTES, RowReader, RowSpan, Source, open_stream};
use sftcore::{Error, Result};
use tempfile::TempDir;

/// A row as it was read: where it stands, its bytes and its value; or the error in its place, without the name of the file.
type Row = Result<(RowSpan, Vec<u8>, Result<Value>)>;

thread_local! {
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

fn name(kind: u8) -> Option<&'static str> {
    Some(match kind.to_ascii_lowercase() {
        b'l' => "rows.jsonl",
        b'j' => "rows.json",
        b'c' => "rows.csv",
        b't' => "rows.tsv",
        b'x' => "rows.txt",
        b'g' => "rows.jsonl.gz",
        b'h' => "rows.csv.gz",
        b'z' => "rows.json.zst",
        b'y' => "rows.txt.zst",
        b'p' => "rows.parquet",
        _ => return None,
    })
}

fn pack(kind: u8, bytes: &[u8], cut: u8) -> Vec<u8> {
    let mut packed = match kind {
        b'g' | b'h' => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory takes all bytes")
        }
        b'z' | b'y' => zstd::encode_all(bytes, 1).expect("memory takes all bytes"),
        _ => return bytes.to_vec(),
    };
    packed.truncate(packed.len().saturating_sub(usize::from(cut >> 3)));
    packed
}

fn told(error: Error) -> Error {
    assert!(!error.message.is_empty() && !error.message.ends_with('.'), "{error:?}");
    let mut error = error;
    error.place.path = None;
    error
}

fn streamed(reader: impl std::io::BufRead, layout: Layout, most: usize) -> Vec<Row> {
    let mut rows = RowReader::new(reader, layout);
    // an error of the header is the first row as well
    let parser = rows.parser();
    let mut found = Vec::new();
    for row in rows {
        assert!(found.len() <= most, "more rows than bytes");
        let row = row.map_err(told).map(|(span, bytes)| {
            assert_eq!(span.bytes, bytes.len() as u64);
            assert!(span.bytes <= MAX_ROW_BYTES && span.line > 0);
            let value = parser.as_ref().map_err(Clone::clone).and_then(|parser| parser.parse(&bytes, span));
            (span, bytes, value.map_err(told))
        });
        found.push(row);
    }
    found
}

fn by_position(source: &Source) -> Result<Vec<Row>> {
    let row = |span: Result<RowSpan>| {
        let span = span?;
        let bytes = source.read(span)?;
        let value = source.parse(&bytes, span).map_err(told);
        Ok((span, bytes, value))
    };
    Ok(source.rows()?.map(|span| row(span).map_err(told)).collect())
}

fn check(path: &Path, chunk: usize) {
    let opened = Source::open(path, &FilePool::new(1), None, &mut |_, _| Ok(())).map_err(told);
    let (mut reader, layout) = match open_stream(path) {
        Ok(stream) => stream,
        Err(error) => {
            told(error);
            // a file that is damaged before its first row is opened all the same
            assert!(opened.map_or(true, |source| source.damage().is_some()), "only a stream is refused");
            return;
        }
    };
    let mut plain = Vec::new();
    let end = reader.read_to_end(&mut plain);
    let whole = streamed(&plain[..], layout, plain.len());
    assert_eq!(whole, streamed(BufReader::with_capacity(chunk, &plain[..]), layout, plain.len()));
    for (span, bytes, _) in whole.iter().flatten() {
        let start = usize::try_from(span.offset).expect("a place in memory");
        assert_eq!(plain.get(start..start + bytes.len()), Some(&bytes[..]));
    }
    let Ok(source) = opened else { return };
    let rows = by_position(&source).expect("what was opened has rows");
    // of a damaged file without rows nothing is asked
    assert!(source.layout() == layout || rows.is_empty() && source.damage().is_some());
    match source.damage() {
        None => {
            assert!(end.is_ok(), "only the stream is damaged: {end:?}");
            assert_eq!(rows, whole);
        }
        Some(damage) => {
            told(damage.clone());
            assert!(end.is_err(), "only the file is damaged: {damage}");
            assert_eq!(Some(&rows[..]), whole.get(..rows.len()));
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let &[kind, cut, ref bytes @ ..] = bytes else { return };
    let Some(name) = name(kind) else { return };
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| TempDir::new().expect("a folder for files"));
        let path = folder.path().join(name);
        std::fs::write(&path, pack(kind, bytes, cut)).expect("room for a small file");
        check(&path, 1 + usize::from(cut % 64));
    });
});
