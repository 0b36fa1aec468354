//! Files that cannot be read by position, unpacked once.
//!
//! What comes in is a packed file, what goes out is a plain one whose rows can be read by position: `<key>.rows` in the unpack folder, or a file without a name.
//! The key is a hash of what the packed file is (path, size, time, sampled bytes), so a changed file is unpacked again. A
//! `.rows` file is there whole or not at all: it is written under another name, synced and renamed. Behind the rows it holds what is wrong with the packed file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::cursor::from_io;
use super::decode::Decoder;
use super::fingerprint;
use super::kind::Packing;
use super::pool::{FilePool, PooledFile};
use crate::{Error, ErrorKind, Result};

/// Where files that cannot be read by position (compressed, parquet) are unpacked, once, beside the index memo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackFolder(pub PathBuf);

/// A plain file and what it came from.
#[derive(Debug)]
pub(super) struct Unpacked {
    pub(super) file: PooledFile,
    /// Bytes of rows in it.
    pub(super) bytes: u64,
    pub(super) damage: Option<Damage>,
}

/// Where a packed file breaks off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Damage {
    /// Whole rows before it.
    pub(super) rows: u64,
    /// The line where they end.
    pub(super) line: u64,
    /// What is wrong, at which byte.
    pub(super) reason: String,
}

/// What stands behind the rows of a `.rows` file.
#[derive(Serialize, Deserialize)]
struct Trailer {
    bytes: u64,
    damage: Option<Damage>,
}

/// The last bytes of a `.rows` file; the number is that of its format.
const MAGIC: &[u8; 8] = b"sftrows2";
/// A trailer is a few numbers and a sentence.
const MAX_TRAILER_BYTES: u64 = 64 << 10;
const UNFINISHED: &str = ".unfinished";
/// A file that was not used for so long is removed when another is written.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);
/// A file that is being written is touched all the time; this one was left behind by a process that was killed.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Counts the whole rows of the first `bytes` bytes of a file, and says on which line they end.
pub(super) type CountRows<'c> = &'c dyn Fn(&PooledFile, u64) -> Result<(u64, u64)>;
/// Told how far it is, in packed bytes; an error stops it.
pub(super) type Progress<'p> = &'p mut dyn FnMut(u64, u64) -> Result<()>;

/// The packed file `path`, unpacked now or before.
pub(super) fn unpack(
    path: &Path,
    packing: Packing,
    pool: &FilePool,
    folder: Option<&UnpackFolder>,
    count_rows: CountRows<'_>,
    progress: Progress<'_>,
) -> Result<Unpacked> {
    let io = |error: io::Error| Error::io(path, &error);
    let Some(UnpackFolder(folder)) = folder else {
        let mut job = Job::new(path, packing, progress)?;
        let file = tempfile::tempfile().map_err(|error| job.no_room(&std::env::temp_dir(), 0, &error))?;
        let (bytes, reason) = job.run(&file, &std::env::temp_dir())?;
        let file = PooledFile::held(file);
        let damage = reason.map(|reason| damage(&file, bytes, reason, count_rows)).transpose()?;
        return Ok(Unpacked { file, bytes, damage });
    };
    let target = folder.join(format!("{:032x}.rows", fingerprint::hash(path, false).map_err(io)?));
    if let Some(unpacked) = find(&target, pool) {
        return Ok(unpacked);
    }
    let mut job = Job::new(path, packing, progress)?;
    fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
    remove_unused(folder, SystemTime::now());
    // removed when it is dropped, so no error below leaves half a file
    let unfinished = tempfile::Builder::new()
        .suffix(UNFINISHED)
        .tempfile_in(folder)
        .map_err(|error| job.no_room(folder, 0, &error))?;
    let (bytes, reason) = job.run(unfinished.as_file(), folder)?;
    let damage = match reason {
        None => None,
        Some(reason) => {
            let written = unfinished.reopen().map_err(|error| Error::io(folder, &error))?;
            Some(damage(&PooledFile::held(written), bytes, reason, count_rows)?)
        }
    };
    let finish = |mut file: &File| {
        let trailer = serde_json::to_vec(&Trailer { bytes, damage: damage.clone() })?;
        file.write_all(&trailer)?;
        file.write_all(&(trailer.len() as u64).to_le_bytes())?;
        file.write_all(MAGIC)?;
        file.sync_all()
    };
    finish(unfinished.as_file()).map_err(|error| job.no_room(folder, bytes, &error))?;
    unfinished.persist(&target).map_err(|error| Error::io(folder, &error.error))?;
    // the name is safe only with its folder; not every file system can sync one, and then the file is made again
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    let file = PooledFile::open(&target, pool).map_err(|error| Error::io(&target, &error))?;
    Ok(Unpacked { file, bytes, damage })
}

/// One file being unpacked.
struct Job<'p> {
    path: PathBuf,
    decoder: Decoder,
    packed_bytes: u64,
    progress: Progress<'p>,
}

impl<'p> Job<'p> {
    fn new(path: &Path, packing: Packing, progress: Progress<'p>) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        let packed_bytes = file.metadata().map_err(|error| Error::io(path, &error))?.len();
        let decoder = Decoder::of_file(file, packing).map_err(|error| error.in_file(path))?;
        Ok(Self { path: path.to_path_buf(), decoder, packed_bytes, progress })
    }

    /// Writes all rows to `file`, which is in `folder`; gives their bytes and why there are no more, where there should be.
    fn run(&mut self, file: impl Write, folder: &Path) -> Result<(u64, Option<String>)> {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let mut block = vec![0; 256 << 10];
        let mut written = 0;
        let reason = loop {
            let read = match self.decoder.read(&mut block) {
                Ok(0) => break None,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    break Some(from_io(error).message);
                }
                // a disk that cannot be read says nothing about the file
                Err(error) => return Err(Error::io(&self.path, &error)),
            };
            file.write_all(&block[..read]).map_err(|error| self.no_room(folder, written, &error))?;
            written += read as u64;
            (self.progress)(self.decoder.consumed().min(self.packed_bytes), self.packed_bytes)?;
        };
        file.flush().map_err(|error| self.no_room(folder, written, &error))?;
        // the end of a stream gives no bytes but takes some
        (self.progress)(self.decoder.consumed().min(self.packed_bytes), self.packed_bytes)?;
        Ok((written, reason))
    }

    /// The error of writing to `folder`, with the room it takes where that is what is missing.
    fn no_room(&self, folder: &Path, written: u64, error: &io::Error) -> Error {
        if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Error::io(folder, error);
        }
        let consumed = self.decoder.consumed();
        let expected = self.decoder.expected_bytes.unwrap_or_else(|| {
            // the rest unpacks to about as much a byte as what went before
            let expected = u128::from(written) * u128::from(self.packed_bytes) / u128::from(consumed.max(1));
            u64::try_from(expected).unwrap_or(u64::MAX)
        });
        let needed = expected.max(written).max(self.packed_bytes);
        let message = format!(
            "no room to unpack {} ({error}): it takes about {} MiB there, {} MiB were written; free some space, or \
             choose another cache folder",
            self.path.display(),
            needed.div_ceil(1 << 20),
            written >> 20
        );
        Error::new(ErrorKind::Io(error.kind()), message).in_file(folder)
    }
}

fn damage(file: &PooledFile, bytes: u64, reason: String, count_rows: CountRows<'_>) -> Result<Damage> {
    let (rows, line) = count_rows(file, bytes)?;
    Ok(Damage { rows, line, reason })
}

/// The unpacked file at `target`, if it is there and whole.
fn find(target: &Path, pool: &FilePool) -> Option<Unpacked> {
    let file = PooledFile::open(target, pool).ok()?;
    let size = file.size().ok()?;
    let mut end = [0; 16];
    file.read_exact_at(&mut end, size.checked_sub(16)?).ok()?;
    let (length, magic) = end.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(*length);
    if magic != MAGIC || length > MAX_TRAILER_BYTES {
        return None;
    }
    let mut trailer = vec![0; usize::try_from(length).ok()?];
    let bytes = size.checked_sub(16 + length)?;
    file.read_exact_at(&mut trailer, bytes).ok()?;
    let trailer: Trailer = serde_json::from_slice(&trailer).ok()?;
    if trailer.bytes != bytes {
        return None;
    }
    // says that it is in use; in a folder that cannot be written nobody removes files either
    let _ = File::open(target).and_then(|file| file.set_modified(SystemTime::now()));
    Some(Unpacked { file, bytes, damage: trailer.damage })
}

/// Removes what nobody has used for long; what cannot be removed is left.
fn remove_unused(folder: &Path, now: SystemTime) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let limit = if name.ends_with(".rows") {
            UNUSED
        } else if name.ends_with(UNFINISHED) {
            ABANDONED
        } else {
            continue;
        };
        let used = entry.metadata().and_then(|metadata| metadata.modified());
        if used.is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > limit)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for so many bytes.
    struct SmallDisk(usize);

    impl Write for SmallDisk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_that_says_how_much_room_it_takes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl.gz");
        let rows: Vec<u8> =
            (0..4_000_000_u32).flat_map(|row| row.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let mut encoder =
            flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        encoder.write_all(&rows).unwrap();
        encoder.finish().unwrap();
        let mut progress = |_, _| Ok(());
        let mut job = Job::new(&path, Packing::Gzip, &mut progress).unwrap();
        let error = job.run(SmallDisk(5 << 20), Path::new("/cache/unpacked")).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Io(io::ErrorKind::StorageFull));
        let text = error.to_string();
        assert!(
            text.starts_with("/cache/unpacked: no room to unpack ") && text.contains("rows.jsonl.gz"),
            "{text}"
        );
        // 16 million bytes are 15.3 MiB; the packed bytes before are as dense as those after, or nearly
        let estimate = text.split("takes about ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!((13..=18).contains(&estimate.parse::<u32>().unwrap()), "{text}");
        assert!(text.contains("MiB there, 5 MiB were written; free some space"), "{text}");
    }
}
