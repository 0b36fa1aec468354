//! The batches of a stream: a window of examples at a time is shuffled, planned and handed out.
//!
//! The state is where each data set stood when the window began, and the steps handed out since; to go on, the window
//! is read again. Every rank reads and encodes the whole stream and takes its share of each global batch, so global
//! batches do not depend on the number of ranks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::batches::{Batching, NextBatch, StepBatch};
use super::dataset::{DatasetSpec, MaxBadRows, OnBadRow};
use super::ordered::{Next, Ordered, worker_panicked};
use super::quarantine;
use super::stream::{Reader, SetPosition, StreamRow, StreamSet};
use crate::collate::Batch;
use crate::conversation::Columns;
use crate::encode::{Encoder, Example};
use crate::index::{EncodedRow, IndexedRow, SetReport, Verdict};
use crate::order::{self, EpochOrder, MixBy, Mixture, Rows, Stopping};
use crate::plan::{BatchSize, GlobalBatch, Mode, Plan};
use crate::source::RowSpan;
use crate::{Error, ErrorKind, Result};

/// How a stream is read and batched.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// The share of rows of each data set; without shares one comes after the other.
    pub shares: Option<Vec<f64>>,
    /// When an epoch of shares ends.
    pub stopping: Stopping,
    /// Examples that are shuffled and batched together.
    pub buffer: usize,
    /// How they become batches.
    pub batching: Batching,
    /// What happens to rows that are wrong.
    pub on_bad_row: OnBadRow,
    /// How many there may be.
    pub max_bad_rows: MaxBadRows,
}

/// Where a stream stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// The epoch.
    pub epoch: u64,
    /// The window of the epoch.
    pub window: u64,
    /// Examples of the epoch before the window.
    pub examples: u64,
    /// Steps of the window that were handed out whole.
    pub step: usize,
    /// Where each data set stood when the window began.
    pub sets: Vec<SetPosition>,
}

/// Rows of one task.
const ROWS_PER_TASK: usize = 64;
/// Examples of the first window of an epoch; each window after it has twice as many, up to the buffer.
const FIRST_WINDOW: usize = 1 << 10;
/// Tokens of a window, so that long rows do not take all memory.
const WINDOW_TOKENS: usize = 1 << 25;
/// A share of wrong rows is judged from so many rows on.
const ROWS_FOR_SHARE: u64 = 1000;

/// A row that was encoded, with what the stream needs to go on after it.
struct Encoded {
    set: usize,
    path: Option<PathBuf>,
    row: Result<EncodedRow>,
    /// The bytes of a row that is wrong.
    bytes: Option<Vec<u8>>,
    position: SetPosition,
}

/// A stream of data sets, batched.
pub struct Stream {
    encoder: Arc<Encoder>,
    options: StreamOptions,
    sets: Vec<Arc<StreamSet>>,
    reports: Vec<SetReport>,
    /// The rows of the epoch under way.
    rows: Option<Ordered<Vec<Encoded>>>,
    /// Where the window under way began.
    state: StreamState,
    /// Where each data set stands.
    positions: Vec<SetPosition>,
    /// Examples of the window.
    window: Vec<Example>,
    window_tokens: usize,
    /// Results that belong to the next window.
    left: std::collections::VecDeque<Encoded>,
    /// The global batches of a window that is whole, last first, and the next micro-batch.
    batches: Vec<GlobalBatch>,
    micro: usize,
    is_ended: bool,
}

impl Stream {
    /// Opens a stream; nothing is read yet.
    pub fn open(specs: &[DatasetSpec], encoder: Arc<Encoder>, options: StreamOptions) -> Result<Self> {
        if let Some(spec) = specs.iter().find(|spec| spec.sample.is_some()) {
            let message = format!(
                "{}: #N draws among all rows, which a stream does not know; leave one out",
                spec.name
            );
            return Err(Error::new(ErrorKind::Config, message));
        }
        if let Some(shares) = options.shares.as_ref().filter(|shares| shares.len() != specs.len()) {
            let message =
                format!("mix: {} shares for {} data sets; expected one each", shares.len(), specs.len());
            return Err(Error::new(ErrorKind::Config, message));
        }
        let open = |spec: &DatasetSpec| -> Result<Arc<StreamSet>> {
            let columns = match &spec.columns {
                Some(columns) => Columns::parse(&columns.to_string())?,
                None => Columns::default(),
            };
            Ok(Arc::new(StreamSet {
                name: spec.name.clone(),
                files: spec.files.clone(),
                columns: Arc::new(columns),
            }))
        };
        let sets = specs.iter().map(open).collect::<Result<Vec<_>>>()?;
        let report = |set: &Arc<StreamSet>| SetReport {
            name: set.name.clone(),
            files: set.files.len() as u64,
            ..SetReport::default()
        };
        let positions = vec![SetPosition::default(); sets.len()];
        Ok(Self {
            reports: sets.iter().map(report).collect(),
            state: StreamState { sets: positions.clone(), ..StreamState::default() },
            positions,
            encoder,
            options,
            sets,
            rows: None,
            window: Vec::new(),
            window_tokens: 0,
            left: std::collections::VecDeque::new(),
            batches: Vec::new(),
            micro: 0,
            is_ended: false,
        })
    }

    /// Where the stream stands.
    pub fn state(&self) -> &StreamState {
        &self.state
    }

    /// What the rows of each data set came to so far.
    pub fn reports(&self) -> &[SetReport] {
        &self.reports
    }

    /// Goes on from `state` at the next call of [`next`](Self::next).
    pub fn restart(&mut self, state: StreamState) {
        self.rows = None;
        self.positions.clone_from(&state.sets);
        self.state = state;
        self.window.clear();
        self.window_tokens = 0;
        self.left.clear();
        self.batches.clear();
        self.micro = 0;
        self.is_ended = false;
    }

    /// The next micro-batch of this rank, waiting at most `timeout`; the end of the epoch comes once, then the next
    /// epoch begins.
    pub fn next(&mut self, timeout: Duration) -> NextBatch {
        loop {
            if let Some(batch) = self.batches.last() {
                let sharing = &self.options.batching.sharing;
                let packs = batch.micro_batch(sharing, self.micro).to_vec();
                self.micro += 1;
                let is_last = self.micro == sharing.gradient_accumulation_steps;
                let step_hash = is_last.then(|| {
                    batch.rows().fold(0, |sum: u64, at| sum.wrapping_add(self.window[at as usize].hash()))
                });
                let found = self.collate(&packs, step_hash);
                if is_last {
                    self.micro = 0;
                    self.batches.pop();
                    self.state.step += 1;
                    if self.batches.is_empty() {
                        self.begin_window();
                    }
                }
                return Next::Item(Ok(found));
            }
            if self.is_ended && self.left.is_empty() && self.window.is_empty() {
                self.restart(StreamState {
                    epoch: self.state.epoch + 1,
                    sets: vec![SetPosition::default(); self.sets.len()],
                    ..StreamState::default()
                });
                return Next::End;
            }
            match self.fill(timeout) {
                Ok(true) => self.plan(),
                Ok(false) => return Next::Pending,
                Err(error) => return Next::Item(Err(error)),
            }
        }
    }

    fn collate(&self, packs: &[Vec<u32>], step_hash: Option<u64>) -> StepBatch {
        let examples: Vec<Vec<Example>> = packs
            .iter()
            .map(|pack| pack.iter().map(|&at| self.window[at as usize].clone()).collect())
            .collect();
        let rows = packs.iter().flatten();
        let first = u32::try_from(self.state.examples).unwrap_or(u32::MAX);
        StepBatch {
            batch: Batch::new(&examples, self.options.batching.rectangle, self.options.batching.pad_token_id),
            rows: rows.map(|&at| first.saturating_add(at)).collect(),
            step_hash,
        }
    }

    fn begin_window(&mut self) {
        self.state.window += 1;
        self.state.examples += self.window.len() as u64;
        self.state.step = 0;
        self.state.sets.clone_from(&self.positions);
        self.window.clear();
        self.window_tokens = 0;
    }

    /// Plans the window, and passes over the steps that were handed out before.
    fn plan(&mut self) {
        let batching = &self.options.batching;
        let lengths: Vec<u32> = self
            .window
            .iter()
            .map(|example| u32::try_from(example.input_ids.len()).unwrap_or(u32::MAX))
            .collect();
        let seed = order::key(batching.seed, self.state.window, STREAM);
        let sets = [Rows::Range(0, u32::try_from(lengths.len()).unwrap_or(u32::MAX))];
        let mixture = Mixture { shares: None, by: MixBy::Rows, stopping: Stopping::FirstExhausted };
        let is_shuffled = batching.mode != Mode::Sequential;
        let order = EpochOrder::new(&sets, &mixture, is_shuffled, seed, self.state.epoch, &|_| 1);
        let Ok(order) = order else { return };
        let plan = Plan::new(batching.plan_options(seed, self.state.epoch), order, &lengths, None);
        self.batches = plan.global_batches(&lengths).skip(self.state.step).collect();
        self.batches.reverse();
        if self.batches.is_empty() {
            self.begin_window();
        }
    }

    /// How many examples a window has: whole global batches. The first windows of an epoch are smaller, so that the
    /// first batch comes at once.
    fn window_size(&self) -> usize {
        let batching = &self.options.batching;
        let batch = match batching.sharing.batch_size {
            BatchSize::Rows(rows) if batching.mode != Mode::Pack => rows * batching.sharing.micro_batches(),
            _ => 1,
        };
        let doublings = u32::try_from(self.state.window).unwrap_or(u32::MAX).min(20);
        self.options.buffer.min(FIRST_WINDOW << doublings).div_ceil(batch) * batch
    }

    /// Reads rows until the window is whole (`true`) or nothing came for `timeout`.
    fn fill(&mut self, timeout: Duration) -> Result<bool> {
        let size = self.window_size();
        loop {
            while let Some(encoded) = self.left.pop_front() {
                self.add(encoded)?;
                if self.window.len() >= size || self.window_tokens >= WINDOW_TOKENS {
                    return Ok(true);
                }
            }
            if self.is_ended {
                return Ok(true);
            }
            let rows = match &mut self.rows {
                Some(rows) => rows,
                None => self.rows.insert(start(&self.sets, &self.encoder, &self.options, &self.positions)),
            };
            match rows.next(timeout) {
                Next::Item(encoded) => self.left.extend(encoded),
                Next::Pending => return Ok(false),
                Next::Failed => return Err(worker_panicked()),
                Next::End => self.is_ended = true,
            }
        }
    }

    fn add(&mut self, encoded: Encoded) -> Result<()> {
        let Encoded { set, path, row, bytes, position } = encoded;
        let path = path.unwrap_or_default();
        self.positions[set] = position;
        let EncodedRow { indexed, examples } = row?;
        let report = &mut self.reports[set];
        if let Some(bad) = indexed.count(&path, 0, report) {
            match (&self.options.on_bad_row, indexed.verdict) {
                (OnBadRow::Raise, Verdict::Bad(error, _)) => return Err(error),
                (OnBadRow::Quarantine(file), _) => quarantine::append(file, &bad, &path, bytes)?,
                _ => {}
            }
            return self.check_bad_rows(&bad.error(&path));
        }
        for example in &examples {
            report.examples += 1;
            report.tokens += example.input_ids.len() as u64;
            report.trained_tokens += example.num_trained() as u64;
            report.longest = report.longest.max(example.input_ids.len() as u64);
            self.window_tokens += example.input_ids.len();
        }
        self.window.extend(examples);
        Ok(())
    }

    fn check_bad_rows(&self, last: &Error) -> Result<()> {
        let bad: u64 = self.reports.iter().map(|report| report.bad).sum();
        let rows: u64 = self.reports.iter().map(|report| report.rows).sum();
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let is_too_many = match self.options.max_bad_rows {
            MaxBadRows::Any => false,
            MaxBadRows::Rows(limit) => bad > limit,
            MaxBadRows::Share(share) => rows >= ROWS_FOR_SHARE && bad as f64 > share * rows as f64,
        };
        if !is_too_many {
            return Ok(());
        }
        let message = format!(
            "{bad} of the first {rows} rows are wrong, more than max_bad_rows allows (the last: {last}); fix them or \
             raise --max_bad_rows"
        );
        Err(Error::new(ErrorKind::Row, message))
    }
}

const STREAM: u64 = 7;

fn start(
    sets: &[Arc<StreamSet>],
    encoder: &Arc<Encoder>,
    options: &StreamOptions,
    positions: &[SetPosition],
) -> Ordered<Vec<Encoded>> {
    let mut reader = Reader::new(sets, options.shares.clone(), options.stopping, positions);
    let tasks = std::iter::from_fn(move || {
        let rows: Vec<StreamRow> = reader.by_ref().take(ROWS_PER_TASK).collect();
        (!rows.is_empty()).then_some(rows)
    });
    let encoder = encoder.clone();
    // a window is encoded while the one before it is trained
    let ahead = options.buffer / ROWS_PER_TASK + 4 * options.batching.num_threads;
    Ordered::start(tasks, options.batching.num_threads, ahead, move |rows: Vec<StreamRow>| {
        rows.into_iter().map(|row| encode(&encoder, row)).collect()
    })
}

fn encode(encoder: &Encoder, row: StreamRow) -> Encoded {
    let StreamRow { set, rows, row, position } = row;
    let path = rows.as_ref().map(|rows| rows.path().to_path_buf());
    let (row, bytes) = match (rows, row) {
        (Some(rows), Ok((span, bytes))) => {
            let judged = rows.encode(encoder, span, &bytes);
            let is_bad = judged.as_ref().is_ok_and(|row| matches!(row.indexed.verdict, Verdict::Bad(..)));
            (judged, is_bad.then_some(bytes))
        }
        (Some(_), Err(error)) if error.kind == ErrorKind::Row => {
            let span = RowSpan { offset: 0, bytes: 0, line: error.place.line.unwrap_or(1) };
            (Ok(IndexedRow::bad(span, error, false).into()), None)
        }
        (_, Err(error)) => (Err(error), None),
        // a file that cannot be read gives no rows
        (None, Ok(_)) => (Err(worker_panicked()), None),
    };
    Encoded { set, path, row, bytes, position }
}
