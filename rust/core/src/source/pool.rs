//! Open files, never too many at once.
//!
//! A [`FilePool`] keeps the files that were read last open and opens others again when they are needed, so a data
//! set of ten thousand files works under a limit of a thousand handles. What comes in is a path and a place, what
//! goes out are bytes. Reads are positioned: any number of threads may read one file. A path that leads to another
//! file than before is an error, and so is a file that has become shorter.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

/// Open handles shared by the sources of a data set.
///
/// At most `max_open` stay open, and one more for each thread that is reading at that moment.
#[derive(Debug, Clone)]
pub struct FilePool {
    handles: Arc<Mutex<Handles>>,
}

#[derive(Debug)]
struct Handles {
    /// The open files with the time of their last use, by the number of their [`Pooled`].
    open: FxHashMap<u64, (Arc<File>, u64)>,
    max_open: usize,
    /// Counts uses: a greater number is a later one.
    clock: u64,
    /// The number that the next file gets.
    next_number: u64,
}

impl Default for FilePool {
    fn default() -> Self {
        Self::new(64)
    }
}

impl FilePool {
    /// A pool that keeps at most `max_open` files open.
    pub fn new(max_open: usize) -> Self {
        let handles =
            Handles { open: FxHashMap::default(), max_open: max_open.max(1), clock: 0, next_number: 0 };
        Self { handles: Arc::new(Mutex::new(handles)) }
    }

    fn lock(&self) -> MutexGuard<'_, Handles> {
        // every change is a single insertion or removal, so a poisoned table is still whole
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handles {
    fn find(&mut self, number: u64) -> Option<Arc<File>> {
        self.clock += 1;
        let clock = self.clock;
        let (file, used) = self.open.get_mut(&number)?;
        *used = clock;
        Some(file.clone())
    }

    fn keep(&mut self, number: u64, file: &Arc<File>) {
        while self.open.len() >= self.max_open {
            let oldest = self.open.iter().min_by_key(|(_, (_, used))| *used).map(|(&number, _)| number);
            match oldest {
                Some(oldest) => self.open.remove(&oldest),
                None => break,
            };
        }
        self.clock += 1;
        self.open.insert(number, (file.clone(), self.clock));
    }
}

/// A file that can be read by position.
#[derive(Debug, Clone)]
pub(super) struct PooledFile(Arc<Handle>);

#[derive(Debug)]
enum Handle {
    /// Opened by its path whenever it is not open.
    Pooled(Pooled),
    /// A file without a name: closed once, it would be gone.
    Held(File),
}

#[derive(Debug)]
struct Pooled {
    pool: FilePool,
    number: u64,
    path: PathBuf,
    /// Device and inode of the file that was opened first.
    identity: (u64, u64),
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.lock().open.remove(&self.number);
    }
}

impl PooledFile {
    /// Opens `path`.
    pub(super) fn open(path: &Path, pool: &FilePool) -> io::Result<Self> {
        let file = Arc::new(File::open(path)?);
        let identity = identity(&file)?;
        let mut handles = pool.lock();
        let number = handles.next_number;
        handles.next_number += 1;
        handles.keep(number, &file);
        drop(handles);
        let path = path.to_path_buf();
        Ok(Self(Arc::new(Handle::Pooled(Pooled { pool: pool.clone(), number, path, identity }))))
    }

    /// A file that stays open as long as it is used.
    pub(super) fn held(file: File) -> Self {
        Self(Arc::new(Handle::Held(file)))
    }

    /// Its size now.
    pub(super) fn size(&self) -> io::Result<u64> {
        self.with(|file| Ok(file.metadata()?.len()))
    }

    /// Fills `bytes` from `offset` on.
    pub(super) fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|file| file.read_exact_at(bytes, offset))
    }

    /// The bytes before `end`, in order.
    pub(super) fn forward(&self, end: u64) -> Forward {
        Forward { file: self.clone(), at: 0, end }
    }

    fn with<T>(&self, read: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        match &*self.0 {
            Handle::Held(file) => read(file),
            Handle::Pooled(pooled) => read(&*pooled.get()?),
        }
    }
}

impl Pooled {
    fn get(&self) -> io::Result<Arc<File>> {
        // the guard is dropped here: a slow open must not stop readers of other files
        let found = self.pool.lock().find(self.number);
        if let Some(file) = found {
            return Ok(file);
        }
        let file = Arc::new(File::open(&self.path)?);
        if identity(&file)? != self.identity {
            return Err(io::Error::other("the file was replaced while it was in use; start the run again"));
        }
        self.pool.lock().keep(self.number, &file);
        Ok(file)
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Reads a pooled file in order, without holding a handle between two reads.
#[derive(Debug)]
pub(super) struct Forward {
    file: PooledFile,
    at: u64,
    end: u64,
}

impl Read for Forward {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(bytes.len());
        let Some(bytes) = bytes.get_mut(..left).filter(|bytes| !bytes.is_empty()) else {
            return Ok(0);
        };
        let read = self.file.with(|file| file.read_at(bytes, self.at))?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, super::SHRUNK));
        }
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_files_than_handles_can_be_read_from_many_threads() {
        let folder = tempfile::tempdir().unwrap();
        let pool = FilePool::new(3);
        let files: Vec<PooledFile> = (0..40_u8)
            .map(|number| {
                let path = folder.path().join(number.to_string());
                std::fs::write(&path, [number; 4]).unwrap();
                PooledFile::open(&path, &pool).unwrap()
            })
            .collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for (number, file) in files.iter().enumerate().chain(files.iter().enumerate().rev()) {
                        let mut bytes = [0; 2];
                        file.read_exact_at(&mut bytes, 1).unwrap();
                        assert_eq!(usize::from(bytes[1]), number);
                        assert!(pool.lock().open.len() <= 3);
                    }
                });
            }
        });
        drop(files);
        assert!(pool.lock().open.is_empty());
    }

    #[test]
    fn a_file_that_was_replaced_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        std::fs::write(&first, "old").unwrap();
        std::fs::write(&second, "new").unwrap();
        let pool = FilePool::new(1);
        let file = PooledFile::open(&first, &pool).unwrap();
        let other = PooledFile::open(&second, &pool).unwrap();
        std::fs::rename(&second, &first).unwrap();
        let error = file.read_exact_at(&mut [0; 3], 0).unwrap_err();
        assert!(error.to_string().contains("replaced"), "{error}");
        // the file itself is still open
        let mut bytes = [0; 3];
        other.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"new");
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_read_in_order_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        std::fs::write(&path, "0123456789").unwrap();
        let file = PooledFile::open(&path, &FilePool::default()).unwrap();
        let mut reader = file.forward(10);
        assert_eq!(reader.read(&mut [0; 4]).unwrap(), 4);
        std::fs::write(&path, "012").unwrap();
        assert_eq!(reader.read(&mut [0; 4]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
