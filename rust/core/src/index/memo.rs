//! An index in one file, so that a later start or another process of the node need not make it.
//!
//! The file is written under another name, flushed to the disk and renamed, and ends in a hash of all of it, so it
//! is either whole or not there. Its name holds the key of all that decides it; nothing else is checked when it is read.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::report::{BadRow, SetReport};
use super::table::{Table, TableHeader};

const MAGIC: &[u8; 16] = b"sftcore index 2\n";
/// A longer header is not one of ours.
const MAX_HEADER_BYTES: u64 = 1 << 31;

/// What is known of the rows of all data sets before training.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Index {
    /// The records of all examples, in the order of the files.
    pub table: Table,
    /// What the rows of each data set came to.
    pub sets: Vec<SetReport>,
    /// The first file of each data set.
    pub first_files: Vec<u32>,
    /// Rows that are wrong and have no record.
    pub bad_rows: Vec<BadRow>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    table: TableHeader,
    sets: Vec<SetReport>,
    first_files: Vec<u32>,
    bad_rows: Vec<BadRow>,
}

/// Hashes what passes through.
struct Hashed<T> {
    inner: T,
    hasher: Xxh3,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..read]);
        Ok(read)
    }
}

impl Index {
    /// Writes the index to `path`; on an error nothing is left there.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = self.write_whole(&temporary).and_then(|()| std::fs::rename(&temporary, path));
        if written.is_err() {
            // what is half written is of no use to anyone
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    fn write_whole(&self, path: &Path) -> io::Result<()> {
        let header = Header {
            table: self.table.header(),
            sets: self.sets.clone(),
            first_files: self.first_files.clone(),
            bad_rows: self.bad_rows.clone(),
        };
        let header = serde_json::to_vec(&header)?;
        let mut file =
            Hashed { inner: BufWriter::with_capacity(1 << 20, File::create(path)?), hasher: Xxh3::new() };
        file.write_all(MAGIC)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        self.table.write(&mut file)?;
        let hash = file.hasher.digest();
        file.write_all(&hash.to_le_bytes())?;
        let file = file.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()
    }

    /// Reads the index at `path`; an error where there is none or it is not whole.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = BufReader::with_capacity(1 << 20, File::open(path)?);
        let mut file = Hashed { inner: file, hasher: Xxh3::new() };
        let mut magic = [0; MAGIC.len()];
        file.read_exact(&mut magic)?;
        let mut size = [0; 8];
        file.read_exact(&mut size)?;
        let size = u64::from_le_bytes(size);
        if &magic != MAGIC || size > MAX_HEADER_BYTES {
            return Err(invalid("not an index of this version"));
        }
        let mut header = Vec::new();
        if (&mut file).take(size).read_to_end(&mut header)? as u64 != size {
            return Err(invalid("the index is cut off"));
        }
        let header: Header = serde_json::from_slice(&header)?;
        let table = Table::read(header.table, &mut file)?;
        let expected = file.hasher.digest();
        let mut hash = [0; 8];
        file.read_exact(&mut hash)?;
        if u64::from_le_bytes(hash) != expected {
            return Err(invalid("the index is damaged"));
        }
        Ok(Self { table, sets: header.sets, first_files: header.first_files, bad_rows: header.bad_rows })
    }

    /// The data set of a file.
    pub fn set_of(&self, file: usize) -> usize {
        self.first_files.partition_point(|&first| first as usize <= file).saturating_sub(1)
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Removes index files of `folder` that were not used for `days`; what cannot be removed stays.
pub fn remove_unused(folder: &Path, days: u64) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let unused = |path: &PathBuf| {
        let used = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        used.and_then(|used| used.elapsed().ok()).is_some_and(|age| age.as_secs() > days * 86_400)
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_ours = path.extension().is_some_and(|extension| {
            ["index", "lock", "tmp"].iter().any(|known| extension.to_string_lossy().ends_with(known))
        });
        if is_ours && unused(&path) {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Record;

    fn index() -> Index {
        let mut index = Index::default();
        index.table.begin_file();
        for row in 0..500 {
            let record =
                Record { offset: row * 7, bytes: 7, tokens: 3, trained_tokens: 1, hash: row ^ 0xABCD };
            index.table.push(record, row + 1);
        }
        index.sets.push(SetReport { name: "a".to_owned(), rows: 501, bad: 1, ..SetReport::default() });
        index.first_files.push(0);
        index.bad_rows.push(BadRow {
            file: 0,
            offset: 3500,
            bytes: 2,
            line: 501,
            column: None,
            pointer: Some("/messages".to_owned()),
            message: "no".to_owned(),
            is_template: false,
        });
        index
    }

    #[test]
    fn an_index_is_read_as_it_was_written_and_not_where_it_is_damaged() {
        let folder = std::env::temp_dir().join(format!("sftcore-memo-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("x.index");
        index().write(&path).unwrap();
        assert_eq!(Index::read(&path).unwrap(), index());
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, 30, 700, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(Index::read(&path).is_err(), "{cut}");
        }
        for place in [3, 20, 100, 2000, whole.len() - 5] {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            assert!(Index::read(&path).is_err(), "{place}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing() {
        assert!(index().write(Path::new("/proc/nowhere/x.index")).is_err());
    }
}
