//! One index for all processes of a node: one builds it, the others watch.
//!
//! Who builds is decided by a lock on a file beside the memo. The operating system gives the lock up when its holder dies,
//! so a builder that was killed is followed at once by one that watched. The builder writes how far it is into the
//! locked file; where that stands still (a builder that hangs, a file system without locks), watchers stop waiting and build
//! for themselves. Nothing waits inside a collective call.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Result;
use crate::index::{Index, remove_unused};

/// How far a task is, in bytes done and in all; may stop it with an error.
pub type Progress<'p> = dyn FnMut(u64, u64) -> Result<()> + 'p;

/// Where an index came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was made here.
    Built,
    /// It was there.
    Memo,
    /// Another process made it meanwhile.
    Shared,
}

/// A look at the builder.
const WATCH_EVERY: Duration = Duration::from_millis(50);
/// A word from the builder.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(200);
/// A builder that has said nothing for so long is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// Indexes that nothing used for so many days are removed.
const UNUSED_DAYS: u64 = 30;

/// The index called `key` of `folder`, or the one that `build` makes. The last value says why the index could not be
/// kept, where that is so.
pub(super) fn build_once(
    folder: Option<&Path>,
    key: &str,
    silence: Duration,
    progress: &mut Progress<'_>,
    build: &mut dyn FnMut(&mut Progress<'_>) -> Result<Index>,
) -> Result<(Index, Origin, Option<String>)> {
    let Some(folder) = folder else { return Ok((build(progress)?, Origin::Built, None)) };
    let unkept = |error: std::io::Error| {
        format!(
            "the index could not be kept in {}: {error}; it is made again at each start",
            folder.display()
        )
    };
    if let Err(error) = std::fs::create_dir_all(folder) {
        return Ok((build(progress)?, Origin::Built, Some(unkept(error))));
    }
    let memo = folder.join(format!("{key}.index"));
    if let Some(index) = read(&memo) {
        return Ok((index, Origin::Memo, None));
    }
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join(format!("{key}.lock")));
    let mut lock = match lock {
        Ok(lock) => lock,
        Err(error) => return Ok((build(progress)?, Origin::Built, Some(unkept(error)))),
    };
    match watch(&lock, &memo, silence, progress)? {
        Watched::Index(index) => return Ok((*index, Origin::Shared, None)),
        // the builder hangs, so its lock is left to it
        Watched::Silence => return Ok((build(progress)?, Origin::Built, None)),
        Watched::Lock => {}
    }
    // it may have been made between the first look and the lock
    if let Some(index) = read(&memo) {
        return Ok((index, Origin::Shared, None));
    }
    let index = {
        let mut beat = Heartbeat { lock: &mut lock, last: None, count: 0 };
        build(&mut |done, all| {
            beat.beat(done, all);
            progress(done, all)
        })?
    };
    remove_unused(folder, UNUSED_DAYS);
    let kept = index.write(&memo).map_err(unkept).err();
    Ok((index, Origin::Built, kept))
}

fn read(memo: &Path) -> Option<Index> {
    let index = Index::read(memo).ok()?;
    // marks it as used; a file system that cannot is no reason to build again
    if let Ok(file) = File::open(memo) {
        let _ = file.set_modified(std::time::SystemTime::now());
    }
    Some(index)
}

enum Watched {
    /// The lock is ours.
    Lock,
    /// The index is there.
    Index(Box<Index>),
    /// The builder says nothing any more.
    Silence,
}

fn watch(lock: &File, memo: &Path, silence: Duration, progress: &mut Progress<'_>) -> Result<Watched> {
    let mut last_word = (String::new(), Instant::now());
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Watched::Lock),
            Err(TryLockError::WouldBlock) => {}
            // no locks on this file system: building twice is harmless
            Err(TryLockError::Error(_)) => return Ok(Watched::Silence),
        }
        if memo.exists()
            && let Some(index) = read(memo)
        {
            return Ok(Watched::Index(Box::new(index)));
        }
        let word = std::fs::read_to_string(memo.with_extension("lock")).unwrap_or_default();
        let mut numbers = word.split_whitespace().map(|number| number.parse().unwrap_or(0));
        let (done, all) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if word != last_word.0 {
            last_word = (word, Instant::now());
        } else if last_word.1.elapsed() > silence {
            return Ok(Watched::Silence);
        }
        progress(done, all)?;
        std::thread::sleep(WATCH_EVERY);
    }
}

/// Says that the builder lives.
struct Heartbeat<'l> {
    lock: &'l mut File,
    last: Option<Instant>,
    count: u64,
}

impl Heartbeat<'_> {
    fn beat(&mut self, done: u64, all: u64) {
        if self.last.is_some_and(|last| last.elapsed() < HEARTBEAT_EVERY) {
            return;
        }
        self.last = Some(Instant::now());
        self.count += 1;
        // of one length, so that it is overwritten whole; a word that is lost is followed by the next
        let word = format!("{done:>20} {all:>20} {:>20}\n", self.count);
        let _ = self.lock.seek(SeekFrom::Start(0)).and_then(|_| self.lock.write_all(word.as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, ErrorKind};
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("sftcore-election-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn many_at_once_build_one_index() {
        let folder = folder("many");
        let builds = std::sync::atomic::AtomicUsize::new(0);
        let once = || {
            build_once(Some(&folder), "k", SILENCE, &mut |_, _| Ok(()), &mut |progress| {
                builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                for done in 0..20 {
                    progress(done, 20)?;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(Index::default())
            })
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|_| scope.spawn(once)).collect();
            let origins: Vec<Origin> =
                threads.into_iter().map(|thread| thread.join().unwrap().unwrap().1).collect();
            assert_eq!(origins.iter().filter(|&&origin| origin == Origin::Built).count(), 1);
        });
        assert_eq!(builds.into_inner(), 1);
        let again = build_once(Some(&folder), "k", SILENCE, &mut |_, _| Ok(()), &mut |_| unreachable!());
        assert_eq!(again.unwrap().1, Origin::Memo);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_builder_that_fails_is_followed_by_the_next() {
        let folder = folder("fails");
        let failed = build_once(Some(&folder), "k", SILENCE, &mut |_, _| Ok(()), &mut |_| {
            Err(Error::new(ErrorKind::Row, "no"))
        });
        assert!(failed.is_err());
        let built =
            build_once(Some(&folder), "k", SILENCE, &mut |_, _| Ok(()), &mut |_| Ok(Index::default()));
        assert_eq!(built.unwrap().1, Origin::Built);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_silent_builder_is_given_up() {
        let folder = folder("silent");
        std::fs::create_dir_all(&folder).unwrap();
        let lock = File::create(folder.join("k.lock")).unwrap();
        lock.lock().unwrap();
        let short = Duration::from_millis(200);
        let built = build_once(Some(&folder), "k", short, &mut |_, _| Ok(()), &mut |_| Ok(Index::default()));
        assert_eq!(built.unwrap().1, Origin::Built);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_costs_the_memo_and_is_said() {
        let nowhere = Path::new("/proc/nowhere");
        let built =
            build_once(Some(nowhere), "k", SILENCE, &mut |_, _| Ok(()), &mut |_| Ok(Index::default()));
        let (_, origin, unkept) = built.unwrap();
        assert_eq!(origin, Origin::Built);
        assert!(unkept.unwrap().contains("could not be kept in /proc/nowhere"));
    }
}
