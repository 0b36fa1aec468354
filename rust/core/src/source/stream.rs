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
                (decoder(BufReader::with_capacity(BUFFER_BYTES, file), format, size.is_none()), format)
            }
            Err(error) => (Err(error), format),
        }
    };
    let placed = |error: Error| error.in_file(path);
    let mut reader = Recorder {
        reader: BufReader::with_capacity(BUFFER_BYTES, decoder.map_err(placed)?),
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
