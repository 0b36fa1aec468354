//! Files to batches.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use sftcore::collate::{Batch, Rectangle};
use sftcore::order::{self, MixBy, Mixture, Rows, Stopping};
use sftcore::pipeline::{
    self, BatchOptions, Batching, DatasetSpec, EpochPlans, IndexOptions, MaxBadRows, Next, OnBadRow, Origin,
    PATIENCE, StepBatch,
};
use sftcore::plan::{BatchSize, Mode, Sharing};
use sftcore::{Error, ErrorKind};

use crate::encoder::Encoder;
use crate::errors::{enter_core, to_python};

/// Calls `work` without the GIL; its progress goes to `report`, and what that or a signal raises ends it.
pub(crate) fn with_progress<T: Send>(
    py: Python<'_>,
    report: Option<&Py<PyAny>>,
    work: impl FnOnce(&mut pipeline::Progress<'_>) -> sftcore::Result<T> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let done = py.detach(|| {
        work(&mut |done, all| {
            Python::attach(|py| {
                py.check_signals()?;
                report.map_or(Ok(()), |report| report.call1(py, (done, all)).map(drop))
            })
            .map_err(|error| {
                raised = Some(error);
                Error::new(ErrorKind::Io(std::io::ErrorKind::Interrupted), "interrupted")
            })
        })
    });
    match (done, raised) {
        (_, Some(error)) => Err(error),
        (done, None) => done.map_err(|error| to_python(py, &error)),
    }
}

/// Indexed files.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Dataset {
    pub(crate) core: Arc<pipeline::Dataset>,
    num_threads: usize,
}

#[pymethods]
impl Dataset {
    /// `specs` is a JSON list of data sets.
    #[new]
    #[pyo3(signature = (specs, encoder, *, encoder_fingerprint, num_threads, seed, on_bad_row, quarantine,
        max_bad_rows, dedup, cache_folder, hash_whole_files, progress))]
    #[expect(clippy::too_many_arguments, reason = "the settings of an index, one to one")]
    fn new(
        py: Python<'_>,
        specs: &str,
        encoder: &Encoder,
        encoder_fingerprint: String,
        num_threads: usize,
        seed: u64,
        on_bad_row: &str,
        quarantine: Option<PathBuf>,
        max_bad_rows: Option<&str>,
        dedup: &str,
        cache_folder: Option<PathBuf>,
        hash_whole_files: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let core = encoder.core.clone();
        let opened = with_progress(py, progress.as_ref(), |progress| {
            let specs = parse_specs(specs)?;
            let options = IndexOptions {
                num_threads,
                seed,
                on_bad_row: parse_on_bad_row(on_bad_row, quarantine)?,
                max_bad_rows: max_bad_rows.map_or(Ok(MaxBadRows::Any), str::parse)?,
                dedup: dedup.parse()?,
                cache_folder,
                hash_whole_files,
                encoder_fingerprint,
            };
            pipeline::Dataset::open(&specs, core, &options, progress)
        })?;
        Ok(Self { core: Arc::new(opened), num_threads })
    }

    /// Rows of the split: all, train or validation.
    fn split(&self, py: Python<'_>, split: &str, ratio: f64, seed: u64) -> PyResult<RowSets> {
        let table = &self.core.index().table;
        let sets = self.core.sets();
        let sides = || order::split(sets, ratio, seed, |row| table.hash(row));
        let sets = enter_core(py, || match split {
            "all" => Ok(sets.to_vec()),
            "train" => Ok(sides().0),
            "validation" => Ok(sides().1),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("split \"{split}\" is unknown; expected all, train or validation"),
            )),
        })?;
        Ok(RowSets { sets: Arc::new(sets) })
    }

    /// Rows that occur in `other_sets` of `other`: each with its like there and whether they are equal.
    #[pyo3(signature = (sets, other, other_sets, *, near, progress))]
    fn overlap(
        &self,
        py: Python<'_>,
        sets: &RowSets,
        other: &Self,
        other_sets: &RowSets,
        near: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<(u32, u32, bool)>> {
        let found = with_progress(py, progress.as_ref(), |progress| {
            self.core.overlap(&sets.sets, &other.core, &other_sets.sets, near, self.num_threads, progress)
        })?;
        Ok(found.into_iter().map(|overlap| (overlap.row, overlap.other, overlap.is_exact)).collect())
    }

    #[pyo3(signature = (sets, *, mode, batch_size, tokens_per_batch, gradient_accumulation_steps, rank, world_size, seed,
        pad_token_id, shares, mix_by, stopping_strategy, pack_length, padding_free, quadratic_cost))]
    #[expect(clippy::too_many_arguments, reason = "the settings of a loader, one to one")]
    fn batches(
        &self,
        py: Python<'_>,
        sets: &RowSets,
        mode: &str,
        batch_size: usize,
        tokens_per_batch: Option<u32>,
        gradient_accumulation_steps: usize,
        rank: usize,
        world_size: usize,
        seed: u64,
        pad_token_id: u32,
        shares: Option<Vec<f64>>,
        mix_by: &str,
        stopping_strategy: &str,
        pack_length: Option<u32>,
        padding_free: bool,
        quadratic_cost: f64,
    ) -> PyResult<Batches> {
        enter_core(py, || {
            let mode = mode.parse::<Mode>()?;
            let batch_size = tokens_per_batch.map_or(BatchSize::Rows(batch_size), BatchSize::Tokens);
            let options = BatchOptions {
                sets: sets.sets.clone(),
                mixture: Mixture {
                    shares,
                    by: mix_by.parse::<MixBy>()?,
                    stopping: stopping_strategy.parse::<Stopping>()?,
                },
                batching: Batching {
                    mode,
                    sharing: Sharing { batch_size, gradient_accumulation_steps, rank, world_size },
                    capacity: pack_length.unwrap_or(u32::MAX),
                    quadratic_cost,
                    rectangle: rectangle(mode, padding_free),
                    seed,
                    pad_token_id,
                    num_threads: self.num_threads,
                },
            };
            Ok(Batches {
                plans: EpochPlans::new(self.core.clone(), options),
                running: Mutex::new(None),
                process: std::process::id(),
            })
        })
    }

    /// Rows, tokens, trained tokens and the longest of each data set of the given rows.
    fn count(&self, py: Python<'_>, sets: &RowSets) -> Vec<(u64, u64, u64, u64)> {
        let table = &self.core.index().table;
        py.detach(|| sets.sets.iter().map(|rows| count(table, rows.iter())).collect())
    }

    /// File and line of a row.
    fn place(&self, py: Python<'_>, row: u32) -> PyResult<Option<(PathBuf, u64)>> {
        enter_core(py, || Ok(self.core.place(row)?.map(|(path, line)| (path.to_path_buf(), line))))
    }

    /// The bytes of a row in its file, and its rendered text.
    fn text(&self, py: Python<'_>, row: u32) -> PyResult<(Vec<u8>, String)> {
        enter_core(py, || self.core.text(row))
    }

    /// Encodes a row again and returns the hash of what the model sees; an error where it changed.
    fn verify(&self, py: Python<'_>, row: u32) -> PyResult<u64> {
        enter_core(py, || Ok(self.core.example(row)?.hash()))
    }

    /// The data set of a row, by number.
    fn set_of(&self, row: u32) -> usize {
        let index = self.core.index();
        index.set_of(index.table.file(row))
    }

    fn fingerprint(&self, py: Python<'_>, sets: &RowSets) -> u64 {
        py.detach(|| self.core.fingerprint(&sets.sets))
    }

    /// `built`, `memo` or `shared` (another process made it meanwhile).
    #[getter]
    fn origin(&self) -> &'static str {
        match self.core.origin() {
            Origin::Built => "built",
            Origin::Memo => "memo",
            Origin::Shared => "shared",
        }
    }

    /// The counts of all data sets and of each, what is wrong with rows, and the first wrong ones, as JSON.
    fn report(&self, py: Python<'_>) -> String {
        py.detach(|| {
            let first: Vec<String> = self.core.first_bad_rows(5).iter().map(ToString::to_string).collect();
            serde_json::json!({
                "total": self.core.report(),
                "sets": self.core.set_reports(),
                "bad_reasons": self.core.bad_reasons(),
                "first_bad": first,
            })
            .to_string()
        })
    }
}

fn count(table: &sftcore::index::Table, rows: impl Iterator<Item = u32>) -> (u64, u64, u64, u64) {
    rows.fold((0, 0, 0, 0), |(count, tokens, trained, longest), row| {
        let record = table.record(row);
        (
            count + 1,
            tokens + u64::from(record.tokens),
            trained + u64::from(record.trained_tokens),
            longest.max(u64::from(record.tokens)),
        )
    })
}

pub(crate) fn parse_specs(specs: &str) -> sftcore::Result<Vec<DatasetSpec>> {
    serde_json::from_str(specs)
        .map_err(|error| Error::new(ErrorKind::Config, format!("the data sets are not as expected: {error}")))
}

pub(crate) fn parse_on_bad_row(name: &str, quarantine: Option<PathBuf>) -> sftcore::Result<OnBadRow> {
    match (name, quarantine) {
        ("raise", None) => Ok(OnBadRow::Raise),
        ("skip", None) => Ok(OnBadRow::Skip),
        ("quarantine", Some(path)) => Ok(OnBadRow::Quarantine(path)),
        ("quarantine", None) => {
            Err(Error::new(ErrorKind::Config, "on_bad_row quarantine needs a file to write to"))
        }
        ("raise" | "skip", Some(_)) => Err(Error::new(
            ErrorKind::Config,
            format!("a quarantine file has no effect with on_bad_row {name}; choose on_bad_row quarantine"),
        )),
        _ => Err(Error::new(
            ErrorKind::Config,
            format!("on_bad_row \"{name}\" is unknown; expected raise, skip or quarantine"),
        )),
    }
}

pub(crate) fn rectangle(mode: Mode, padding_free: bool) -> Rectangle {
    match (mode, padding_free) {
        (_, true) => Rectangle::Flat,
        (Mode::Pack, false) => Rectangle::Packed,
        (Mode::Bucket | Mode::Sequential, false) => Rectangle::Padded,
    }
}

/// Rows of each data set.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct RowSets {
    sets: Arc<Vec<Rows>>,
}

#[pymethods]
impl RowSets {
    /// The same without some rows.
    fn without(&self, py: Python<'_>, rows: Vec<u32>) -> Self {
        let sets = py.detach(|| {
            let rows: std::collections::HashSet<u32> = rows.into_iter().collect();
            self.sets.iter().map(|set| set.filter(|row| !rows.contains(&row))).collect()
        });
        Self { sets: Arc::new(sets) }
    }

    fn __len__(&self) -> usize {
        self.sets.iter().map(|rows| rows.len() as usize).sum()
    }
}

/// The micro-batches of one rank.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Batches {
    plans: EpochPlans,
    /// The epoch under way.
    running: Mutex<Option<pipeline::Batches>>,
    /// The process that made this object; its threads do not exist in a forked child.
    process: u32,
}

/// `input_ids, labels`, then each where there is one: `attention_mask`, `position_ids`, `loss_weights` (all
/// `[rows, width]`), `cu_seqlens`.
type BatchArrays<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i64>>,
    Option<Bound<'py, PyArray2<i64>>>,
    Option<Bound<'py, PyArray2<i64>>>,
    Option<Bound<'py, PyArray2<f32>>>,
    Option<Bound<'py, PyArray1<i32>>>,
);
/// The arrays, the rows of the examples, and the hash of the step with its last micro-batch.
pub(crate) type NextBatch<'py> = (BatchArrays<'py>, Bound<'py, PyArray1<i64>>, Option<u64>);

#[pymethods]
impl Batches {
    /// Starts an epoch from optimizer step `step` on.
    fn start(&self, py: Python<'_>, epoch: u64, step: usize) -> PyResult<()> {
        self.check_process()?;
        enter_core(py, || {
            let started = self.plans.start(epoch, step)?;
            // the threads of an epoch that was left early end here, outside the GIL
            drop(self.lock().replace(started));
            Ok(())
        })
    }

    /// Ends the epoch under way and its threads.
    fn stop(&self, py: Python<'_>) {
        // in a forked child there is nothing to end
        if self.check_process().is_ok() {
            py.detach(|| drop(self.lock().take()));
        }
    }

    /// The next micro-batch, or `None` at the end of the epoch.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<NextBatch<'py>>> {
        self.check_process()?;
        wait(py, || self.lock().as_mut().map_or(Next::End, |running| running.next(PATIENCE)))?
            .map(|batch| to_arrays(py, batch))
            .transpose()
    }

    /// The global batch of a step as rows of the data set, those that share a row together.
    fn global_batch(&self, py: Python<'_>, epoch: u64, step: usize) -> PyResult<Option<Vec<Vec<u32>>>> {
        enter_core(py, || Ok(self.plans.global_batch(epoch, step)?.map(|batch| batch.packs)))
    }

    /// Optimizer steps of an epoch.
    fn num_steps(&self, py: Python<'_>, epoch: u64) -> PyResult<usize> {
        enter_core(py, || self.plans.num_steps(epoch))
    }

    /// Step, rows, width, tokens and trained tokens of every micro-batch of this rank, `[micro-batches, 5]`.
    fn shapes<'py>(&self, py: Python<'py>, epoch: u64) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let shapes = enter_core(py, || self.plans.shapes(epoch))?;
        let num_batches = shapes.len();
        let values = shapes
            .iter()
            .flat_map(|shape| [shape.step, shape.rows, shape.width, shape.tokens, shape.trained_tokens]);
        // counts of tokens in memory are far below 2^63
        let values: Vec<i64> = values.map(|value| i64::try_from(value).unwrap_or(i64::MAX)).collect();
        values.into_pyarray(py).reshape([num_batches, 5])
    }

    /// The tokens of each example of an epoch, each as often as it comes, data set by data set.
    fn lengths<'py>(&self, py: Python<'py>, epoch: u64) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let lengths: Vec<i64> = enter_core(py, || {
            let plan = self.plans.plan(epoch)?;
            let lengths = self.plans.dataset().index().table.lengths();
            Ok(plan.order().unordered().map(|row| i64::from(lengths[row as usize])).collect())
        })?;
        Ok(lengths.into_pyarray(py))
    }

    /// Rows, tokens, trained tokens and the longest of each data set in an epoch.
    fn count(&self, py: Python<'_>, epoch: u64) -> PyResult<Vec<(u64, u64, u64, u64)>> {
        enter_core(py, || {
            let plan = self.plans.plan(epoch)?;
            let table = &self.plans.dataset().index().table;
            Ok((0..self.plans.options().sets.len())
                .map(|set| count(table, plan.order().of_set(set)))
                .collect())
        })
    }
}

/// Waits for what `next` gives, with an eye on signals.
pub(crate) fn wait(
    py: Python<'_>,
    next: impl Fn() -> pipeline::NextBatch + Send + Sync,
) -> PyResult<Option<StepBatch>> {
    loop {
        match py.detach(&next) {
            Next::Item(Ok(batch)) => return Ok(Some(batch)),
            Next::Item(Err(error)) => return Err(to_python(py, &error)),
            Next::End => return Ok(None),
            Next::Failed => return Err(to_python(py, &pipeline::worker_panicked())),
            Next::Pending => py.check_signals()?,
        }
    }
}

impl Batches {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<pipeline::Batches>> {
        // the option is replaced whole, so a poisoned lock still guards a valid value
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_process(&self) -> PyResult<()> {
        check_process(self.process)
    }
}

/// An error in a process that was forked from `process`.
pub(crate) fn check_process(process: u32) -> PyResult<()> {
    if std::process::id() == process {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "a BatchLoader was carried into a forked process, where its threads do not exist; make it in the child, \
         or use DataLoader(num_workers=0): sftcore prefetches with threads of its own",
    ))
}

pub(crate) fn to_arrays(py: Python<'_>, step: StepBatch) -> PyResult<NextBatch<'_>> {
    let Batch { rows, width, input_ids, labels, attention_mask, position_ids, cu_seqlens, loss_weights } =
        step.batch;
    let shape = [rows, width];
    let array = |values: Vec<i64>| values.into_pyarray(py).reshape(shape);
    let optional = |values: Vec<i64>| (!values.is_empty()).then(|| array(values)).transpose();
    let weights = (!loss_weights.is_empty()).then(|| loss_weights.into_pyarray(py).reshape(shape));
    let arrays = (
        array(input_ids)?,
        array(labels)?,
        optional(attention_mask)?,
        optional(position_ids)?,
        weights.transpose()?,
        (!cu_seqlens.is_empty()).then(|| cu_seqlens.into_pyarray(py)),
    );
    let rows: Vec<i64> = step.rows.into_iter().map(i64::from).collect();
    Ok((arrays, rows.into_pyarray(py), step.step_hash))
}
