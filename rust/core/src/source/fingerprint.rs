//! What a file is, without reading all of it: its path, size and time, and parts of its bytes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use xxhash_rust::xxh3::Xxh3;

use crate::Result;

const NUM_BLOCKS: u64 = 16;
const BLOCK_BYTES: usize = 64 << 10;

/// A hash of the file at `path`; of all its bytes, where it `is_whole`.
pub fn fingerprint(path: &Path, is_whole: bool) -> Result<u128> {
    hash(path, is_whole).map_err(|error| super::missing(path, &error))
}

pub(super) fn hash(path: &Path, is_whole: bool) -> io::Result<u128> {
    let mut hasher = Xxh3::new();
    hasher.update(fs::canonicalize(path)?.as_os_str().as_encoded_bytes());
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let size = metadata.len();
    hasher.update(&size.to_le_bytes());
    if is_whole && metadata.is_file() {
        io::copy(&mut io::BufReader::with_capacity(1 << 20, file), &mut Hashing(&mut hasher))?;
        return Ok(hasher.digest128());
    }
    let since = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    hasher.update(&since.as_nanos().to_le_bytes());
    let last = size.saturating_sub(BLOCK_BYTES as u64);
    let mut block = vec![0; usize::try_from(size).map_or(BLOCK_BYTES, |size| size.min(BLOCK_BYTES))];
    for number in 0..NUM_BLOCKS {
        // spread over the file, the first and the last block among them
        let offset = u128::from(last) * u128::from(number) / u128::from(NUM_BLOCKS - 1);
        file.read_exact_at(&mut block, u64::try_from(offset).unwrap_or(last))?;
        hasher.update(&block);
    }
    Ok(hasher.digest128())
}

/// Hashes what is written to it.
struct Hashing<'h>(&'h mut Xxh3);

impl io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
