//! Rows of what can be read only once: standard input, a pipe, a packed file that is not to be unpacked.
//!
//! What comes in is a path, what goes out is a reader of plain bytes and the layout of its rows, for
//! [`RowReader`](super::RowReader). Nothing is written anywhere, and at most the first row is read ahead.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::decode::Decoder;
use super::kind::{self, Format, MAGIC_BYTES, Packing};
use super::layout::{self, Layout};
use crate::{Error, ErrorKind, Result};

const BUFFER_BYTES: usize = 256 << 10;

/// Opens `path` (`-` is standard input) to be read in order, unpacked on the way.
pub fn open_stream(path: &Path) -> Result<(Box<dyn BufRead + Send>, Layout)> {
    let (decoder, format) = if path.as_os_str() == "-" {
        (decoder(BufReader::with_capacity(BUFFER_BYTES, io::stdin()), Format::Json, true), Format::Json)
    } else {
        let metadata = std::fs::metadata(path).map_err(|error| super::missing(path, &error))?;
        if metadata.is_dir() {
            return Err(super::no_file(path, "a folder"));
        }
        // a pipe has any name: `/dev/fd/63`
        let format = kind::format(path)
            .or_else(|error| if metadata.is_file() { Err(error) } else { Ok(Format::Json) })?;
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        let size = metadata.is_file().then_some(metadata.len());
        match is_parquet(&file, size, format) {
            Ok(true) => (Decoder::of_file(file, Packing::Parquet), Format::Parquet),
            Ok(false) => {
                let file = Opened { file, left: size.unwrap_or(0) };
                (decoder(BufReader::with_capacity(BUFFER_BYTES, file), format, size.is_none()), format)
            }
            Err(error) => (Err(error), format),
        }
    };
    let placed = |error: Error| error.in_file(path);
    let mut reader = Recorder {
        reader: BufReader::with_capacity(BUFFER_BYTES, Unpacked(decoder.map_err(placed)?)),
        seen: Vec::new(),
    };
    let layout = layout::find(&mut reader, format).map_err(placed)?;
    Ok((Box::new(io::Cursor::new(reader.seen).chain(reader.reader)), layout))
}

/// Whether a file is parquet, which is read from its end; one without a size is a pipe.
fn is_parquet(file: &File, size: Option<u64>, format: Format) -> Result<bool> {
    let Some(size) = size else { return Ok(false) };
    let (head, tail) = super::ends(size, |bytes, at| file.read_exact_at(bytes, at))
        .map_err(|error| Error::new(ErrorKind::Io(error.kind()), error.to_string()))?;
    Ok(kind::packing(format, &head, &tail)? == Packing::Parquet)
}

/// A pipe has no end to look at, so that its first bytes alone say that it is parquet.
fn decoder(mut reader: impl BufRead + Send + 'static, format: Format, is_pipe: bool) -> Result<Decoder> {
    let mut head = Vec::new();
    (&mut reader)
        .take(MAGIC_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(|error| Error::new(ErrorKind::Io(error.kind()), error.to_string()))?;
    if is_pipe && head.starts_with(b"PAR1") {
        let message =
            "parquet cannot be read from a pipe, because it is read from its end; write it to a file";
        return Err(Error::new(ErrorKind::Row, message));
    }
    let packing = kind::packing(format, &head, &[])?;
    Ok(Decoder::of_reader(io::Cursor::new(head).chain(reader), packing))
}

/// A file that has at least the bytes that it had when it was opened.
struct Opened {
    file: File,
    /// Those of them that were not read yet; of a pipe none are known.
    left: u64,
}

impl Read for Opened {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(bytes)?;
        if read == 0 && self.left > 0 && !bytes.is_empty() {
            // a cut between two rows looks like an end
            let kind = io::ErrorKind::UnexpectedEof;
            return Err(io::Error::new(kind, Error::new(ErrorKind::Io(kind), super::SHRUNK)));
        }
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

/// Says what to do where a packed file is damaged.
struct Unpacked(Decoder);

impl Read for Unpacked {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes).map_err(|error| {
            let kind = error.kind();
            match error.downcast::<Error>() {
                Ok(mut error) => {
                    if error.kind == ErrorKind::Row {
                        error.message += "; the rows before it can be read: write or fetch the file again";
                    }
                    io::Error::new(kind, error)
                }
                Err(error) => error,
            }
        })
    }
}

/// Remembers what is taken, so that it can be read again.
struct Recorder<R> {
    reader: R,
    seen: Vec<u8>,
}

impl<R: BufRead> Read for Recorder<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes)?;
        self.seen.extend(bytes.iter().take(read));
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Recorder<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        // what was filled before is still there, so this reads nothing
        if let Ok(buffer) = self.reader.fill_buf() {
            self.seen.extend(buffer.iter().take(bytes));
        }
        self.reader.consume(bytes);
    }
}
