//! Threads: many rows in flight, results in order, memory bounded.
//!
//! [`Ordered`] runs one function over a sequence of tasks on several threads and gives the results in
//! the order of the tasks, never more than `ahead` of the reader. [`Dataset`] and [`Batches`] are the
//! data path run through it. The output does not depend on the number of threads.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::collate::Batch;
use crate::encode::Encoder;
use crate::index::{IndexedRow, OnBadRow, Record, Report, ShapedSource};
use crate::order;
use crate::plan::{Mode, Plan, Sharing};
use crate::source::{FilePool, RowSpan};
use crate::{Error, ErrorKind, Result};

/// What [`Ordered::next`] found.
#[derive(Debug)]
pub enum Next<T> {
    /// The next result.
    Item(T),
    /// All tasks are done.
    End,
    /// Nothing yet; ask again.
    Pending,
    /// A worker panicked; nothing more will come.
    Failed,
}

struct State<T> {
    /// Results that are ready, by task number.
    ready: BTreeMap<usize, T>,
    /// The number of the task that is claimed next.
    next_task: usize,
    /// The number of the result that is read next.
    next_result: usize,
    /// The number of tasks, once their end was seen.
    num_tasks: Option<usize>,
    /// The reader has gone.
    stopped: bool,
    /// A worker panicked.
    failed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // no user code runs under the lock, so a poisoned state is still whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Results of tasks run on several threads, in the order of the tasks.
pub struct Ordered<T> {
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
    /// The process that started the workers; a forked child has the handles but not the threads.
    process: u32,
}

/// Tells the reader when its thread dies of a panic.
struct PanicGuard<T>(Arc<Shared<T>>);

impl<T> Drop for PanicGuard<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failed = true;
            self.0.changed.notify_all();
        }
    }
}

impl<T: Send + 'static> Ordered<T> {
    /// Starts `num_threads` workers that run `work` on each of `tasks`, at most `ahead` results before the reader.
    pub fn start<Task: Send + 'static>(
        tasks: impl Iterator<Item = Task> + Send + 'static,
        num_threads: usize,
        ahead: usize,
        work: impl Fn(Task) -> T + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            ready: BTreeMap::new(),
            next_task: 0,
            next_result: 0,
            num_tasks: None,
            stopped: false,
            failed: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let tasks = Arc::new(Mutex::new(tasks));
        let work = Arc::new(work);
        let workers = (0..num_threads.max(1))
            .map(|_| {
                let (shared, tasks, work) = (shared.clone(), tasks.clone(), work.clone());
                std::thread::spawn(move || {
                    let guard = PanicGuard(shared);
                    while let Some((number, task)) = claim(&guard.0, &tasks, ahead.max(1)) {
                        let result = work(task);
                        guard.0.lock().ready.insert(number, result);
                        guard.0.changed.notify_all();
                    }
                })
            })
            .collect();
        Self { shared, workers, process: std::process::id() }
    }

    /// The next result in order, waiting at most `timeout` for it.
    pub fn next(&mut self, timeout: Duration) -> Next<T> {
        let mut state = self.shared.lock();
        let mut waited = false;
        loop {
            let number = state.next_result;
            if let Some(result) = state.ready.remove(&number) {
                state.next_result += 1;
                self.shared.changed.notify_all();
                return Next::Item(result);
            }
            if state.failed {
                return Next::Failed;
            }
            if state.num_tasks == Some(number) {
                return Next::End;
            }
            if waited {
                return Next::Pending;
            }
            let (next, timed_out) =
                self.shared.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
            state = next;
            waited = timed_out.timed_out();
        }
    }
}

/// The next task and its number, once the reader is close enough; `None` when there is no more to do.
fn claim<T, Task>(
    shared: &Shared<T>,
    tasks: &Mutex<impl Iterator<Item = Task>>,
    ahead: usize,
) -> Option<(usize, Task)> {
    // tasks are drawn one at a time and numbered as they are drawn
    let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = shared.lock();
    while !state.stopped && state.num_tasks.is_none() && state.next_task >= state.next_result + ahead {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    if state.stopped || state.failed || state.num_tasks.is_some() {
        return None;
    }
    drop(state);
    let task = tasks.next();
    let mut state = shared.lock();
    let number = state.next_task;
    if let Some(task) = task {
        state.next_task += 1;
        return Some((number, task));
    }
    state.num_tasks = Some(number);
    drop(state);
    shared.changed.notify_all();
    None
}

impl<T> Drop for Ordered<T> {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // nothing to stop or to wait for, and the lock may have been held at the fork
            std::mem::forget(std::mem::take(&mut self.workers));
            return;
        }
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // a panic was already reported through `failed`
            let _ = worker.join();
        }
    }
}

/// A file and how many of its rows to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetPath {
    /// The file.
    pub path: PathBuf,
    /// The `N` of a `#N` suffix.
    pub sample: Option<usize>,
}

impl DatasetPath {
    /// Reads `path` or `path#N`.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some((path, number)) = text.rsplit_once('#')
            && let Ok(number) = number.parse::<usize>()
        {
            if number == 0 {
                return Err(Error::new(ErrorKind::Config, format!("dataset \"{text}\" draws no rows")));
            }
            return Ok(Self { path: path.into(), sample: Some(number) });
        }
        Ok(Self { path: text.into(), sample: None })
    }
}

/// How files are indexed.
#[derive(Debug, Clone, Copy)]
pub struct IndexOptions {
    /// Worker threads.
    pub num_threads: usize,
    /// Decides which rows a `#N` suffix draws.
    pub seed: u64,
    /// What happens to rows that are wrong.
    pub on_bad_row: OnBadRow,
}

/// Files, the records of their rows, and the encoder they are for.
pub struct Dataset {
    encoder: Arc<Encoder>,
    sources: Vec<ShapedSource>,
    records: Vec<Record>,
    report: Report,
}

/// Rows of one file that are indexed by one task.
const ROWS_PER_TASK: usize = 64;
/// How long a wait lasts before the caller may look round (for Ctrl-C).
pub const PATIENCE: Duration = Duration::from_millis(50);

impl Dataset {
    /// Opens and indexes `paths`. `progress` is told bytes done and bytes in all,
    /// several times a second, and may stop the work with an error.
    pub fn open(
        paths: &[DatasetPath],
        encoder: Arc<Encoder>,
        options: IndexOptions,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::new(ErrorKind::Config, "no dataset is given; pass at least one file"));
        }
        let pool = FilePool::default();
        let sources: Vec<ShapedSource> =
            paths.iter().map(|path| ShapedSource::open_in(&path.path, &pool)).collect::<Result<_>>()?;
        let mut dataset =
            Self { encoder, sources: Vec::new(), records: Vec::new(), report: Report::default() };
        let all: u64 = sources.iter().map(|shaped| shaped.source.bytes()).sum();
        let mut before = 0;
        for (file, (shaped, path)) in sources.into_iter().zip(paths).enumerate() {
            let file = u32::try_from(file).unwrap_or(u32::MAX);
            let bytes = shaped.source.bytes();
            let source =
                dataset.index_source(shaped, file, options, &mut |done| progress(before + done, all))?;
            let (source, mut records) = source;
            before += bytes;
            if let Some(wanted) = path.sample {
                dataset.sample(&mut records, wanted, options.seed ^ u64::from(file), source.source.path())?;
            }
            dataset.report.add_records(&records);
            dataset.records.append(&mut records);
            dataset.sources.push(source);
        }
        dataset.report.files = dataset.sources.len() as u64;
        if u32::try_from(dataset.records.len()).is_err() {
            return Err(Error::new(ErrorKind::Config, "more than 4294967295 rows; split the data set"));
        }
        if dataset.records.is_empty() {
            return Err(dataset.no_examples());
        }
        Ok(dataset)
    }

    fn no_examples(&self) -> Error {
        let report = &self.report;
        let mut message = format!("none of the {} rows is left to train on:", report.rows);
        if let Some(first) = &report.first_deleted {
            let max_length = self.encoder.max_length;
            let _ = write!(
                message,
                " {} are over max_length {max_length} (the first: {first}; raise --max_length or choose \
                 --truncation_strategy left or right)",
                report.deleted
            );
        }
        if let Some(first) = report.first_skipped.first() {
            let _ = write!(message, " {} are wrong (the first: {first})", report.skipped);
        }
        Error::new(ErrorKind::Row, message)
    }

    fn index_source(
        &mut self,
        shaped: ShapedSource,
        file: u32,
        options: IndexOptions,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<(ShapedSource, Vec<Record>)> {
        let shaped = Arc::new(shaped);
        let path = shaped.source.path().to_path_buf();
        let mut rows = shaped.source.rows()?.map({
            let path = path.clone();
            move |span| span.map_err(|error| error.in_file(&path))
        });
        let tasks = std::iter::from_fn(move || {
            let spans: Vec<Result<RowSpan>> = rows.by_ref().take(ROWS_PER_TASK).collect();
            (!spans.is_empty()).then_some(spans)
        });
        let work = {
            let (shaped, encoder) = (shaped.clone(), self.encoder.clone());
            move |spans: Vec<Result<RowSpan>>| -> Result<Vec<IndexedRow>> {
                spans
                    .into_iter()
                    .map(|span| shaped.try_index_row(&encoder, file, span?, options.on_bad_row))
                    .collect()
            }
        };
        let mut records = Vec::new();
        let mut indexed = Ordered::start(tasks, options.num_threads, 4 * options.num_threads, work);
        let mut done = 0;
        loop {
            match indexed.next(PATIENCE) {
                Next::Item(rows) => {
                    for row in rows? {
                        self.report.add(&path, &row);
                        done = row.record.map_or(done, |record| record.span.offset + record.span.bytes);
                        records.extend(row.record);
                    }
                }
                Next::Pending => {}
                Next::Failed => return Err(worker_panicked()),
                Next::End => break,
            }
            progress(done)?;
        }
        drop(indexed);
        let shaped = Arc::into_inner(shaped).ok_or_else(worker_panicked)?;
        Ok((shaped, records))
    }

    fn sample(&mut self, records: &mut Vec<Record>, wanted: usize, key: u64, path: &Path) -> Result<()> {
        if wanted > records.len() {
            return Err(Error::new(
                ErrorKind::Config,
                format!(
                    "#{wanted} asks for more rows than the {} there are; lower it or leave it out",
                    records.len()
                ),
            )
            .in_file(path));
        }
        self.report.not_sampled += (records.len() - wanted) as u64;
        let mut drawn =
            order::shuffled(u32::try_from(records.len()).unwrap_or(u32::MAX), order::key(key, 0, 3));
        drawn.truncate(wanted);
        drawn.sort_unstable();
        *records = drawn.into_iter().map(|row| records[row as usize]).collect();
        Ok(())
    }

    /// What the rows came to.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The records of all examples, in the order of the files.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The encoder.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The file and line of an example.
    pub fn place(&self, row: u32) -> Option<(&Path, u64)> {
        let record = self.records.get(row as usize)?;
        Some((self.sources.get(record.file as usize)?.source.path(), record.span.line))
    }

    /// The examples for training and the ones held out, as rows of [`records`](Self::records).
    pub fn split(&self, ratio: f64, seed: u64) -> (Vec<u32>, Vec<u32>) {
        let hashes: Vec<u64> = self.records.iter().map(|record| record.hash).collect();
        let held_out = order::held_out(&hashes, ratio, seed);
        (0_u32..).zip(&held_out).fold((Vec::new(), Vec::new()), |(mut train, mut held), (row, &out)| {
            (if out { &mut held } else { &mut train }).push(row);
            (train, held)
        })
    }

    /// A hash of all rows and their order.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for record in &self.records {
            hasher.update(&record.hash.to_le_bytes());
            hasher.update(&record.tokens.to_le_bytes());
        }
        hasher.digest()
    }

    fn batch(&self, rows: &[u32], pad_token_id: u32) -> Result<Batch> {
        let examples = rows
            .iter()
            .map(|&row| {
                let record = &self.records[row as usize];
                self.sources[record.file as usize].example(&self.encoder, record)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Batch::new(&examples, pad_token_id))
    }
}

/// How the batches of a split are made.
#[derive(Debug, Clone)]
pub struct BatchOptions {
    /// Rows of the data set that belong to the split, in order.
    pub rows: Arc<Vec<u32>>,
    /// Grouping.
    pub mode: Mode,
    /// Sharing among ranks and steps.
    pub sharing: Sharing,
    /// Decides the order.
    pub seed: u64,
    /// Fills short rows.
    pub pad_token_id: u32,
    /// Worker threads.
    pub num_threads: usize,
}

/// The plan of an epoch, as rows of the data set.
pub fn plan_epoch(dataset: &Dataset, options: &BatchOptions, epoch: u64) -> Vec<Vec<u32>> {
    let lengths: Vec<u32> = options.rows.iter().map(|&row| dataset.records[row as usize].tokens).collect();
    let plan = Plan::new(&lengths, options.mode, options.sharing.global_batch_size(), options.seed, epoch);
    let to_row = |&position: &u32| options.rows[position as usize];
    plan.global_batches.iter().map(|batch| batch.iter().map(to_row).collect()).collect()
}

/// The micro-batches of this rank for one epoch, from optimizer step `first_step` on.
pub type Batches = Ordered<Result<Batch>>;

/// Starts making the micro-batches of `epoch`, skipping the first `skip` of this rank.
pub fn start_epoch(dataset: Arc<Dataset>, options: &BatchOptions, epoch: u64, skip: usize) -> Batches {
    let plan = plan_epoch(&dataset, options, epoch);
    let sharing = options.sharing;
    let steps = sharing.gradient_accumulation_steps;
    let num_tasks = plan.len() * steps;
    let tasks = (skip..num_tasks)
        .map(move |number| sharing.micro_batch(&plan[number / steps], number % steps).to_vec());
    let pad_token_id = options.pad_token_id;
    Ordered::start(tasks, options.num_threads, 2 * options.num_threads + 2, move |rows: Vec<u32>| {
        dataset.batch(&rows, pad_token_id)
    })
}

/// The error for a worker that panicked: a defect of sftcore, not of the data.
pub fn worker_panicked() -> Error {
    Error::new(
        ErrorKind::Io(std::io::ErrorKind::Other),
        "a data thread panicked; please report this with its output",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain<T: Send + 'static>(mut ordered: Ordered<T>) -> Option<Vec<T>> {
        let mut results = Vec::new();
        loop {
            match ordered.next(PATIENCE) {
                Next::Item(result) => results.push(result),
                Next::End => return Some(results),
                Next::Pending => {}
                Next::Failed => return None,
            }
        }
    }

    #[test]
    fn results_come_in_order_for_any_number_of_threads() {
        for num_threads in [1, 2, 8] {
            for ahead in [1, 3, 100] {
                let ordered = Ordered::start(0..500, num_threads, ahead, |task: u32| task * 2);
                assert_eq!(drain(ordered), Some((0..500).map(|task| task * 2).collect()));
            }
        }
    }

    #[test]
    fn a_worker_that_panics_ends_the_sequence_instead_of_hanging_it() {
        let ordered = Ordered::start(0..50, 2, 4, |task: u32| assert_ne!(task, 20));
        assert_eq!(drain(ordered), None);
    }

    #[test]
    fn dropping_the_reader_stops_the_workers() {
        let mut ordered = Ordered::start(0_u64.., 3, 4, |task| task);
        assert!(matches!(ordered.next(Duration::from_secs(5)), Next::Item(0)));
        drop(ordered);
    }

    #[test]
    fn a_path_may_end_in_a_number_of_rows() {
        let parsed = DatasetPath::parse("a#b/c.jsonl#20").unwrap();
        assert_eq!((parsed.path, parsed.sample), (PathBuf::from("a#b/c.jsonl"), Some(20)));
        assert_eq!(DatasetPath::parse("c#.jsonl").unwrap().sample, None);
        assert!(DatasetPath::parse("c.jsonl#0").is_err());
    }
}
