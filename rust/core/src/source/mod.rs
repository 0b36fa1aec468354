//! A data file of any kind as a sequence of rows, each known by where it stands.
//!
//! A [`Source`] is opened once and finds the byte range of each row without keeping its bytes; rows are read later by
//! position, from any thread, so memory does not grow with the file. JSON Lines, JSON arrays and documents, CSV, TSV and text are
//! read as they are; gzip, zstd and parquet are unpacked once and read from there. What cannot be read twice goes through [`RowReader`], which finds the same rows.
//! Nothing is passed over in silence: a wrong row is an error in its place, and a file that breaks off says so in [`Source::damage`].

mod csv;
mod cursor;
mod decode;
mod fingerprint;
mod json;
mod kind;
mod layout;
mod lines;
mod parquet;
mod parse;
mod pool;
mod spans;
mod stream;
#[cfg(test)]
mod tests;
mod unpack;

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::kind::{Format, MAGIC_BYTES, Packing};
use self::pool::PooledFile;
use crate::{Error, ErrorKind, Result};

pub use self::fingerprint::fingerprint;
pub use self::kind::known_extension;
pub use self::layout::Layout;
pub use self::parse::RowParser;
pub use self::pool::FilePool;
pub use self::spans::{RowReader, RowSpans};
pub use self::stream::open_stream;
pub use self::unpack::UnpackFolder;

/// A longer row is an error, so that a file without newlines cannot take all memory.
pub const MAX_ROW_BYTES: u64 = 256 << 20;

const SHRUNK: &str = "the file became shorter while it was in use; start the run again";
const BUFFER_BYTES: usize = 256 << 10;

/// The place of a row in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSpan {
    /// First byte; of a packed file, in what it unpacks to.
    pub offset: u64,
    /// Number of bytes, without the newline.
    pub bytes: u64,
    /// Line of the first byte, from 1; of a parquet file, the number of the row.
    pub line: u64,
}

/// An open data file.
#[derive(Debug)]
pub struct Source {
    /// The file the user named.
    path: PathBuf,
    /// The file that is read: the same one, or what it was unpacked to.
    file: PooledFile,
    bytes: u64,
    unpacked_bytes: u64,
    parser: RowParser,
    damage: Option<Error>,
    /// Rows that are whole; more than there are, where nothing is damaged.
    num_rows: u64,
}

impl Source {
    /// Opens `path` and finds its layout; a packed file is unpacked, and `progress` told how many of its bytes are done, of how many.
    ///
    /// Without an unpack folder it goes to a temporary file, which stays open and ends with the source.
    pub fn open(
        path: &Path,
        pool: &FilePool,
        unpack: Option<&UnpackFolder>,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|error| missing(path, &error))?;
        if !metadata.is_file() {
            let found = if metadata.is_dir() { "a folder" } else { "a pipe or a device" };
            return Err(no_file(path, found));
        }
        let io = |error: io::Error| Error::io(path, &error);
        let placed = |error: Error| error.in_file(path);
        let format = kind::format(path)?;
        let (head, tail) = {
            let file = File::open(path).map_err(io)?;
            ends(metadata.len(), |bytes, at| file.read_exact_at(bytes, at)).map_err(io)?
        };
        let packing = kind::packing(format, &head, &tail).map_err(placed)?;
        // parquet is unpacked to lines of JSON, whatever its name
        let format = if packing == Packing::Parquet { Format::Parquet } else { format };
        let (file, bytes, damage) = if packing == Packing::Plain {
            let file = PooledFile::open(path, pool).map_err(io)?;
            let bytes = file.size().map_err(io)?;
            (file, bytes, None)
        } else {
            let count = |file: &PooledFile, bytes: u64| count_whole_rows(file, bytes, format).map_err(placed);
            let unpacked = unpack::unpack(path, packing, pool, unpack, &count, progress)?;
            (unpacked.file, unpacked.bytes, unpacked.damage)
        };
        let layout = layout::find(reader(&file, bytes), format).map_err(placed)?;
        let num_rows = damage.as_ref().map_or(u64::MAX, |damage| damage.rows);
        let header = match layout {
            // of a header that is cut off nothing is asked
            Layout::Csv { .. } if num_rows > 0 => {
                RowSpans::new(reader(&file, bytes), layout).header().map_err(placed)?
            }
            _ => [].into(),
        };
        let damage = damage.map(|damage| {
            let unpack::Damage { rows, line, reason } = damage;
            let message =
                format!("{reason}; {rows} rows before it can be read: write or fetch the file again");
            placed(Error::new(ErrorKind::Row, message)).on_line(line)
        });
        let parser = RowParser { layout, header };
        let unpacked_bytes = if packing == Packing::Plain { 0 } else { bytes };
        Ok(Self { path: path.to_path_buf(), file, bytes, unpacked_bytes, parser, damage, num_rows })
    }

    /// The file the user named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How its rows lie.
    pub fn layout(&self) -> Layout {
        self.parser.layout
    }

    /// Bytes that [`rows`](Self::rows) goes over: the size when it was opened, of a packed file the size unpacked.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of disk that it was unpacked to; 0 for a plain file.
    pub fn unpacked_bytes(&self) -> u64 {
        self.unpacked_bytes
    }

    /// What is wrong with the file from some row on; the rows before it can be read.
    pub fn damage(&self) -> Option<&Error> {
        self.damage.as_ref()
    }

    /// The rows of the file, in order.
    pub fn rows(&self) -> Result<RowSpans<impl BufRead + Send + use<>>> {
        let spans = RowSpans::new(reader(&self.file, self.bytes), self.layout());
        Ok(spans.of_file(&self.path, self.num_rows))
    }

    /// Reads the bytes of one row.
    pub fn read(&self, span: RowSpan) -> Result<Vec<u8>> {
        let placed = |error: Error| error.on_line(span.line);
        if span.bytes > MAX_ROW_BYTES {
            return Err(placed(self.changed(span.offset, span.bytes)));
        }
        let bytes = usize::try_from(span.bytes).unwrap_or(usize::MAX);
        self.read_range(span.offset, bytes).map_err(placed)
    }

    /// Reads `bytes` bytes from `offset` on, so that many neighbouring rows take one read.
    pub fn read_range(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        if offset.checked_add(bytes as u64).is_none_or(|end| end > self.bytes) {
            return Err(self.changed(offset, bytes as u64));
        }
        let mut range = vec![0; bytes];
        match self.file.read_exact_at(&mut range, offset) {
            Ok(()) => Ok(range),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(Error::new(ErrorKind::Io(error.kind()), SHRUNK).in_file(&self.path))
            }
            Err(error) => Err(Error::io(&self.path, &error)),
        }
    }

    /// The value of a row, whose bytes are `bytes`: JSON as it is, a record of CSV as an object of strings, a line of
    /// text as `{"text": line}`.
    pub fn parse(&self, bytes: &[u8], span: RowSpan) -> Result<Value> {
        self.parser.parse(bytes, span).map_err(|error| error.in_file(&self.path))
    }

    /// What [`parse`](Self::parse) parses with.
    pub fn parser(&self) -> &RowParser {
        &self.parser
    }

    /// The line of the byte at `offset`, counted from a place before it whose line is known.
    pub fn line_of(&self, offset: u64, known: (u64, u64)) -> Result<u64> {
        let (mut at, mut line) = known;
        while at < offset {
            let bytes = usize::try_from(offset - at).unwrap_or(usize::MAX).min(1 << 20);
            line += cursor::newlines(&self.read_range(at, bytes)?) as u64;
            at += bytes as u64;
        }
        Ok(line)
    }

    fn changed(&self, offset: u64, bytes: u64) -> Error {
        let message = format!(
            "there is no row of {bytes} bytes at byte {offset} of {}; the file changed while it was in use, start the \
             run again",
            self.bytes
        );
        Error::new(ErrorKind::Row, message).in_file(&self.path)
    }
}

fn reader(file: &PooledFile, bytes: u64) -> BufReader<pool::Forward> {
    BufReader::with_capacity(BUFFER_BYTES, file.forward(bytes))
}

/// The rows of a file that breaks off, all but the one that is cut, and the line where they end.
fn count_whole_rows(file: &PooledFile, bytes: u64, format: Format) -> Result<(u64, u64)> {
    let layout = layout::find(reader(file, bytes), format)?;
    let mut spans = RowSpans::new(reader(file, bytes), layout);
    let (mut rows, mut line, mut is_whole) = (0, 1, true);
    while let Some(row) = spans.next() {
        rows += 1;
        is_whole = row.is_ok() && spans.is_closed();
        line = match row {
            Ok(row) if !is_whole => row.line,
            _ => spans.line(),
        };
    }
    Ok((rows - u64::from(!is_whole), line))
}

/// The first and the last bytes of a file of `size` bytes.
fn ends(
    size: u64,
    read_exact_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<(Vec<u8>, [u8; 4])> {
    let mut head = vec![0; usize::try_from(size).map_or(MAGIC_BYTES, |size| size.min(MAGIC_BYTES))];
    read_exact_at(&mut head, 0)?;
    let mut tail = [0; 4];
    if let Some(at) = size.checked_sub(4) {
        read_exact_at(&mut tail, at)?;
    }
    Ok((head, tail))
}

fn missing(path: &Path, error: &io::Error) -> Error {
    if error.kind() != io::ErrorKind::NotFound {
        return Error::io(path, error);
    }
    let message = "no such file; check the path, or name a bundled data set (self-cognition, everyday)";
    Error::new(ErrorKind::Io(error.kind()), message).in_file(path)
}

fn no_file(path: &Path, found: &str) -> Error {
    let message = format!("{found}; expected a file: name a file, or write the rows to one");
    Error::new(ErrorKind::Row, message).in_file(path)
}
