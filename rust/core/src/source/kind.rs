//! What kind of file a name promises, and what its first bytes say.
//!
//! The name tells the format of the rows, the bytes tell the packing: a `.jsonl` that is gzip is unpacked, a `.gz`
//! that is plain is read as it is. Where name and bytes cannot both be right, the error names both.

use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// The format of rows that a name promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `.jsonl` and `.ndjson`.
    JsonLines,
    /// `.json`, or no name at all.
    Json,
    /// `.csv`.
    Csv,
    /// `.tsv`.
    Tsv,
    /// `.txt`.
    Text,
    /// `.parquet`.
    Parquet,
}

/// How the bytes of a file are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// Not at all.
    Plain,
    /// Gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878).
    Zstd,
    /// Apache Parquet.
    Parquet,
}

/// Bytes of a file that [`packing`] needs to see.
pub(super) const MAGIC_BYTES: usize = 8;

const EXPECTED: &str =
    ".jsonl, .ndjson, .json, .csv, .tsv or .txt (each also with .gz or .zst after it), or .parquet";

/// Whether a file of a folder is read: its name has one of the extensions of a data file.
pub fn known_extension(path: &Path) -> bool {
    format(path).is_ok()
}

/// The format that the name of `path` promises.
pub(super) fn format(path: &Path) -> Result<Format> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let packed = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
    let stem = packed.unwrap_or(&name);
    let extension = match stem.rsplit_once('.') {
        // a name like ".json" is a hidden file without extension
        Some((before, extension)) if !before.is_empty() => extension,
        _ => "",
    };
    match (extension, packed) {
        ("jsonl" | "ndjson", _) => Ok(Format::JsonLines),
        ("json", _) => Ok(Format::Json),
        ("csv", _) => Ok(Format::Csv),
        ("tsv", _) => Ok(Format::Tsv),
        ("txt", _) => Ok(Format::Text),
        ("parquet", None) => Ok(Format::Parquet),
        (extension, None) => Err(unknown(&format!("of kind \".{extension}\""), path)),
        ("", Some(_)) => Err(unknown("whose name does not say what is packed in it", path)),
        (extension, Some(_)) => Err(unknown(&format!("of packed kind \".{extension}\""), path)),
    }
}

fn unknown(found: &str, path: &Path) -> Error {
    Error::new(ErrorKind::Row, format!("a file {found}; expected {EXPECTED}")).in_file(path)
}

/// How a file is packed that begins with `head` and ends with `tail` (nothing where the end is not known).
pub(super) fn packing(format: Format, head: &[u8], tail: &[u8]) -> Result<Packing> {
    let is_parquet = head.starts_with(b"PAR1");
    match head {
        [0x1F, 0x8B, ..] if format != Format::Parquet => Ok(Packing::Gzip),
        // the second is a frame that zstd skips
        [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] if format != Format::Parquet => {
            Ok(Packing::Zstd)
        }
        _ if is_parquet && tail == b"PAR1" => Ok(Packing::Parquet),
        _ if is_parquet && format == Format::Parquet => {
            Err(wrong("the parquet file has no end; it was cut off, write or fetch it again"))
        }
        _ if format == Format::Parquet => {
            let found = binary(head).map_or_else(|| format!("\"{}\"", head.escape_ascii()), str::to_owned);
            let found = if head.is_empty() { "nothing: it is empty".to_owned() } else { found };
            Err(wrong(&format!(
                "the file is named .parquet but begins with {found}; expected \"PAR1\": name it for what it is, or \
                 fetch it again"
            )))
        }
        _ => Ok(Packing::Plain),
    }
}

/// Refuses text that is no text: another packing, a placeholder, UTF-16 or UTF-32.
pub(super) fn refuse_binary(format: Format, head: &[u8]) -> Result<()> {
    if let Some(found) = binary(head) {
        return Err(wrong(&format!(
            "the file holds {found}, but its name says {}; unpack it first, or name it for what it is",
            format.name()
        )));
    }
    if head.starts_with(b"version https://git-lfs") {
        return Err(wrong("the file is a Git LFS pointer and not the data; fetch it with git lfs pull"));
    }
    let markup = head.iter().position(|byte| !byte.is_ascii_whitespace()).and_then(|at| head.get(at..));
    let is_page = |text: &[u8]| {
        let text = text.to_ascii_lowercase();
        text.starts_with(b"<!doctype") || text.starts_with(b"<html") || text.starts_with(b"<?xml")
    };
    if format != Format::Text && markup.is_some_and(is_page) {
        return Err(wrong(&format!(
            "the file is a web page, but its name says {}; the download went wrong, fetch it again",
            format.name()
        )));
    }
    let encoding = match head {
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => "UTF-32",
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => "UTF-16",
        // without a mark: one ASCII character in four or in two bytes
        [1..=255, 0, 0, 0, 1..=255, 0, 0, 0, ..] => "UTF-32LE",
        [0, 0, 0, 1..=255, 0, 0, 0, 1..=255, ..] => "UTF-32BE",
        [1..=255, 0, 1..=255, 0, ..] => "UTF-16LE",
        [0, 1..=255, 0, 1..=255, ..] => "UTF-16BE",
        _ => return Ok(()),
    };
    Err(wrong(&format!("the file is {encoding}; convert it with iconv -f {encoding} -t UTF-8")).on_line(1))
}

/// What a file that is not text holds, by its first bytes.
fn binary(head: &[u8]) -> Option<&'static str> {
    match head {
        [0x1F, 0x8B, ..] => Some("a gzip stream"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Some("a zstd stream"),
        [0xFD, b'7', b'z', b'X', b'Z', ..] => Some("an xz stream"),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, ..] => Some("a bzip2 stream"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive"),
        [b'7', b'z', 0xBC, 0xAF, ..] => Some("a 7z archive"),
        [b'P', b'A', b'R', b'1', 0x15, ..] => Some("parquet"),
        [b'A', b'R', b'R', b'O', b'W', b'1', 0, ..] => Some("an Arrow file"),
        _ => None,
    }
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::JsonLines => ".jsonl",
            Self::Json => ".json",
            Self::Csv => ".csv",
            Self::Tsv => ".tsv",
            Self::Text => ".txt",
            Self::Parquet => ".parquet",
        }
    }
}

fn wrong(message: &str) -> Error {
    Error::new(ErrorKind::Row, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_format() {
        let format = |name: &str| format(Path::new(name)).ok();
        assert_eq!(format("a/b.jsonl"), Some(Format::JsonLines));
        assert_eq!(format("b.NDJSON.gz"), Some(Format::JsonLines));
        assert_eq!(format("b.v1.csv.zst"), Some(Format::Csv));
        assert_eq!(format("b.parquet"), Some(Format::Parquet));
        for name in ["b", "b.gz", "b.parquet.gz", "b.jsonl.xz", ".json", "b.md", "json", "b.jsonl.gz.gz", ""]
        {
            assert_eq!(format(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_no_text_is_named() {
        let cases: [(&[u8], &str); 8] = [
            (b"PK\x03\x04....", "zip"),
            (b"\x1F\x8B\x08\x00", "gzip"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"\n <!DOCTYPE html>", "web page"),
            (b"\xFF\xFE{\0", "iconv -f UTF-16 "),
            (b"{\0\"\0a\0", "iconv -f UTF-16LE"),
            (b"\xFF\xFE\0\0{\0\0\0", "iconv -f UTF-32 "),
            (b"\0\0\0{\0\0\0\"", "iconv -f UTF-32BE"),
        ];
        for (head, expected) in cases {
            let error = refuse_binary(Format::JsonLines, head).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
        for head in [&b"{\"a\": 1}"[..], b"", b"\0\0\0\0\0\0\0\0", b"PAR10 points", b"BZh9 is a magic"] {
            refuse_binary(Format::Text, head).unwrap();
        }
    }

    #[test]
    fn bytes_tell_the_packing_and_a_parquet_name_must_be_true() {
        assert_eq!(packing(Format::Json, b"\x1F\x8B\x08", b"").unwrap(), Packing::Gzip);
        assert_eq!(packing(Format::Text, b"\x28\xB5\x2F\xFD", b"").unwrap(), Packing::Zstd);
        assert_eq!(packing(Format::Json, b"PAR1\x15", b"PAR1").unwrap(), Packing::Parquet);
        assert_eq!(packing(Format::Text, b"PAR1 is a name", b"e.\n").unwrap(), Packing::Plain);
        for (head, tail, expected) in [
            (&b"PAR1\x15\x04"[..], &b"abcd"[..], "cut off"),
            (b"", b"", "empty"),
            (b"{\"a\": 1", b"1}\n", "begins with \"{\\\"a\\\": 1\""),
            (b"\x1F\x8B\x08", b"....", "a gzip stream"),
        ] {
            let error = packing(Format::Parquet, head, tail).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
    }
}
