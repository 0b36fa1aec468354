//! Packed bytes to plain bytes, in order and in bounded memory.
//!
//! A [`Decoder`] is a reader that also knows how much of the packed file went in. Gzip streams and zstd frames that follow each
//! other are one text. Where the packed bytes are damaged, everything before is given first; then comes an error
//! that says what is wrong at which byte.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::GzDecoder;

use super::cursor::from_io;
use super::kind::Packing;
use super::parquet::ParquetLines;
use crate::{Error, ErrorKind};

/// A reader of plain bytes.
pub(super) struct Decoder {
    reader: Box<dyn Read + Send>,
    consumed: Arc<AtomicU64>,
    /// Plain bytes that will come, where the file says so.
    pub(super) expected_bytes: Option<u64>,
    /// The error that was given: who reads on gets it again, never a quiet end.
    failed: Option<(io::ErrorKind, Error)>,
}

impl Decoder {
    /// Decodes a whole file that is packed so.
    pub(super) fn of_file(file: File, packing: Packing) -> Result<Self, Error> {
        if packing == Packing::Parquet {
            let consumed = Arc::new(AtomicU64::new(0));
            let lines = ParquetLines::new(file, consumed.clone())?;
            let expected_bytes = Some(lines.expected_bytes());
            return Ok(Self { reader: Box::new(lines), consumed, expected_bytes, failed: None });
        }
        Ok(Self::of_reader(BufReader::with_capacity(256 << 10, file), packing))
    }

    /// Decodes what can be decoded in order: everything but parquet, which is given as it is.
    pub(super) fn of_reader(reader: impl BufRead + Send + 'static, packing: Packing) -> Self {
        let consumed = Arc::new(AtomicU64::new(0));
        let counted = Counted { reader, consumed: consumed.clone() };
        let reader: Box<dyn Read + Send> = match packing {
            Packing::Gzip => {
                Box::new(Gunzip { stream: Some(GzDecoder::new(counted)), padding: None, start: 0 })
            }
            Packing::Zstd => Box::new(Unzstd::Packed(counted)),
            Packing::Plain | Packing::Parquet => Box::new(counted),
        };
        Self { reader, consumed, expected_bytes: None, failed: None }
    }

    /// Packed bytes that went in so far.
    pub(super) fn consumed(&self) -> u64 {
        self.consumed.load(Ordering::Relaxed)
    }
}

impl Read for Decoder {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some((kind, error)) = &self.failed {
            return Err(io::Error::new(*kind, error.clone()));
        }
        self.reader.read(bytes).map_err(|error| {
            let kind = error.kind();
            if kind == io::ErrorKind::Interrupted {
                return error;
            }
            let error = from_io(error);
            self.failed = Some((kind, error.clone()));
            io::Error::new(kind, error)
        })
    }
}

/// Counts the bytes that are taken.
struct Counted<R> {
    reader: R,
    consumed: Arc<AtomicU64>,
}

impl<R> Counted<R> {
    fn position(&self) -> u64 {
        self.consumed.load(Ordering::Relaxed)
    }
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(bytes)?;
        self.consumed.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.consumed.fetch_add(bytes as u64, Ordering::Relaxed);
        self.reader.consume(bytes);
    }
}

/// Gzip streams, one after the other.
struct Gunzip<R: BufRead> {
    stream: Option<GzDecoder<Counted<R>>>,
    /// What follows the last stream: only zeros may, which tapes and block devices leave.
    padding: Option<Counted<R>>,
    /// The packed byte where the stream begins.
    start: u64,
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        loop {
            let Some(stream) = &mut self.stream else {
                return self.padding.as_mut().map_or(Ok(0), pass_padding);
            };
            match stream.read(bytes) {
                Ok(0) => {}
                Ok(read) => return Ok(read),
                Err(error) => {
                    let at = stream.get_ref().position();
                    self.padding = None;
                    self.stream = None;
                    return Err(gzip_damage(error, at, self.start));
                }
            }
            let Some(mut rest) = self.stream.take().map(GzDecoder::into_inner) else { return Ok(0) };
            match rest.fill_buf()?.first() {
                None => return Ok(0),
                Some(0x1F) => {
                    self.start = rest.position();
                    self.stream = Some(GzDecoder::new(rest));
                }
                Some(_) => self.padding = Some(rest),
            }
        }
    }
}

fn pass_padding<R: BufRead>(rest: &mut Counted<R>) -> io::Result<usize> {
    loop {
        let buffer = rest.fill_buf()?;
        if buffer.is_empty() {
            return Ok(0);
        }
        if let Some(zeros) = buffer.iter().position(|&byte| byte != 0) {
            let at = rest.position() + zeros as u64;
            return Err(damage(&format!("what follows the gzip stream at byte {at} is not gzip")));
        }
        let zeros = buffer.len();
        rest.consume(zeros);
    }
}

fn gzip_damage(error: io::Error, at: u64, start: u64) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => damage(&format!("the gzip stream breaks off at byte {at}")),
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData
            if error.to_string().contains("checksum") =>
        {
            damage(&format!(
                "the checksum of the gzip stream from byte {start} to {at} is wrong: any of its rows may be damaged"
            ))
        }
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
            damage(&format!("the gzip stream is damaged at byte {at} ({error})"))
        }
        _ => error,
    }
}

/// Zstd frames, one after the other.
enum Unzstd<R: BufRead> {
    /// Nothing was read yet.
    Packed(Counted<R>),
    Frames(zstd::stream::read::Decoder<'static, Counted<R>>),
    /// An error was given.
    Broken,
}

impl<R: BufRead> Read for Unzstd<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Self::Packed(_) = self {
            let Self::Packed(reader) = std::mem::replace(self, Self::Broken) else { return Ok(0) };
            *self = Self::Frames(zstd::stream::read::Decoder::with_buffer(reader)?);
        }
        let Self::Frames(frames) = self else { return Ok(0) };
        let read = frames.read(bytes);
        let at = frames.get_ref().position();
        read.map_err(|error| {
            *self = Self::Broken;
            zstd_damage(error, at)
        })
    }
}

fn zstd_damage(error: io::Error, at: u64) -> io::Error {
    let reason = error.to_string();
    match error.kind() {
        io::ErrorKind::UnexpectedEof => damage(&format!("the zstd stream breaks off at byte {at}")),
        _ if reason.contains("too much memory") => {
            damage("the zstd stream needs more than 128 MiB of memory; pack it again without --long")
        }
        // errors of the library carry no number of the operating system
        _ if error.raw_os_error().is_none() => {
            damage(&format!("the zstd stream is damaged at byte {at} ({reason})"))
        }
        _ => error,
    }
}

/// An error of a packed file, as one of reading.
pub(super) fn damage(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Error::new(ErrorKind::Row, message))
}
