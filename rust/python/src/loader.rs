//! Files to batches.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{IntoPyArray, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use sftcore::collate::Batch;
use sftcore::pipeline::{self, BatchOptions, DatasetPath, IndexOptions, Next, PATIENCE};
use sftcore::plan::{Mode, Sharing};
use sftcore::{Error, ErrorKind};

use crate::encoder::Encoder;
use crate::errors::{enter_core, to_python};

/// Indexed files.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Dataset {
    core: Arc<pipeline::Dataset>,
    num_threads: usize,
}

#[pymethods]
impl Dataset {
    #[new]
    #[pyo3(signature = (paths, encoder, *, num_threads, seed, on_bad_row, progress))]
    fn new(
        py: Python<'_>,
        paths: Vec<String>,
        encoder: &Encoder,
        num_threads: usize,
        seed: u64,
        on_bad_row: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let encoder = encoder.core.clone();
        let mut raised = None;
        let opened = py.detach(|| {
            let paths =
                paths.iter().map(|path| DatasetPath::parse(path)).collect::<sftcore::Result<Vec<_>>>()?;
            let options = IndexOptions { num_threads, seed, on_bad_row: on_bad_row.parse()? };
            pipeline::Dataset::open(&paths, encoder, options, &mut |done, all| {
                Python::attach(|py| {
                    py.check_signals()?;
                    progress.as_ref().map_or(Ok(()), |report| report.call1(py, (done, all)).map(drop))
                })
                .map_err(|error| {
                    raised = Some(error);
                    Error::new(ErrorKind::Io(std::io::ErrorKind::Interrupted), "interrupted")
                })
            })
        });
        match (opened, raised) {
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(to_python(py, &error)),
            (Ok(core), None) => Ok(Self { core: Arc::new(core), num_threads }),
        }
    }

    /// Rows of the split: all, train or validation.
    fn split_rows(&self, py: Python<'_>, split: &str, ratio: f64, seed: u64) -> PyResult<Vec<u32>> {
        enter_core(py, || match split {
            "all" => Ok((0_u32..).take(self.core.records().len()).collect()),
            "train" => Ok(self.core.split(ratio, seed).0),
            "validation" => Ok(self.core.split(ratio, seed).1),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("split \"{split}\" is unknown; expected all, train or validation"),
            )),
        })
    }

    #[pyo3(signature = (rows, *, mode, batch_size, gradient_accumulation_steps, rank, world_size, seed, pad_token_id))]
    #[expect(clippy::too_many_arguments, reason = "the settings of a loader, one to one")]
    fn batches(
        &self,
        rows: Vec<u32>,
        mode: &str,
        batch_size: usize,
        gradient_accumulation_steps: usize,
        rank: usize,
        world_size: usize,
        seed: u64,
        pad_token_id: u32,
    ) -> Batches {
        let mode = if mode == "sequential" { Mode::Sequential } else { Mode::Bucket };
        let options = BatchOptions {
            rows: Arc::new(rows),
            mode,
            sharing: Sharing { batch_size, gradient_accumulation_steps, rank, world_size },
            seed,
            pad_token_id,
            num_threads: self.num_threads,
        };
        Batches {
            dataset: self.core.clone(),
            options,
            running: Mutex::new(None),
            process: std::process::id(),
        }
    }

    /// Tokens and trained tokens of the given rows.
    fn count_tokens(&self, rows: Vec<u32>) -> (u64, u64) {
        let records = rows.iter().filter_map(|&row| self.core.records().get(row as usize));
        records.fold((0, 0), |(tokens, trained), record| {
            (tokens + u64::from(record.tokens), trained + u64::from(record.trained_tokens))
        })
    }

    /// File and line of a row.
    fn place(&self, row: u32) -> Option<(PathBuf, u64)> {
        self.core.place(row).map(|(path, line)| (path.to_path_buf(), line))
    }

    #[getter]
    fn fingerprint(&self) -> u64 {
        self.core.fingerprint()
    }

    #[getter]
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = self.core.report();
        let dict = PyDict::new(py);
        for (name, count) in [
            ("files", report.files),
            ("rows", report.rows),
            ("examples", report.examples),
            ("tokens", report.tokens),
            ("trained_tokens", report.trained_tokens),
            ("longest", report.longest),
            ("deleted", report.deleted),
            ("truncated", report.truncated),
            ("tools_not_rendered", report.tools_not_rendered),
            ("control_tokens_in_content", report.control_tokens_in_content),
            ("skipped", report.skipped),
            ("not_sampled", report.not_sampled),
        ] {
            dict.set_item(name, count)?;
        }
        dict.set_item("first_deleted", report.first_deleted.as_deref())?;
        dict.set_item("first_skipped", &report.first_skipped)?;
        dict.set_item("first_truncated", report.first_truncated.as_deref())?;
        Ok(dict)
    }
}

/// The micro-batches of one rank.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Batches {
    dataset: Arc<pipeline::Dataset>,
    options: BatchOptions,
    /// The epoch under way.
    running: Mutex<Option<pipeline::Batches>>,
    /// The process that made this object; its threads do not exist in a forked child.
    process: u32,
}

/// `input_ids, labels, attention_mask`, and `loss_weights` where some are not 1; each `[rows, width]`.
type BatchArrays<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i64>>,
    Option<Bound<'py, PyArray2<f32>>>,
);

#[pymethods]
impl Batches {
    /// Starts an epoch, passing over the first `skip` micro-batches.
    fn start(&self, py: Python<'_>, epoch: u64, skip: usize) -> PyResult<()> {
        self.check_process()?;
        py.detach(|| {
            let started = pipeline::start_epoch(self.dataset.clone(), &self.options, epoch, skip);
            // the threads of an epoch that was left early end here, outside the GIL
            drop(self.lock().replace(started));
        });
        Ok(())
    }

    /// Ends the epoch under way and its threads.
    fn stop(&self, py: Python<'_>) {
        // in a forked child there is nothing to end
        if self.check_process().is_ok() {
            py.detach(|| drop(self.lock().take()));
        }
    }

    /// The next micro-batch, or `None` at the end of the epoch.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<BatchArrays<'py>>> {
        self.check_process()?;
        loop {
            let next = py.detach(|| self.lock().as_mut().map_or(Next::End, |running| running.next(PATIENCE)));
            match next {
                Next::Item(Ok(batch)) => return to_arrays(py, batch).map(Some),
                Next::Item(Err(error)) => return Err(to_python(py, &error)),
                Next::End => return Ok(None),
                Next::Failed => return Err(to_python(py, &pipeline::worker_panicked())),
                Next::Pending => py.check_signals()?,
            }
        }
    }

    /// The global batches of an epoch, as rows of the data set.
    fn plan(&self, py: Python<'_>, epoch: u64) -> Vec<Vec<u32>> {
        py.detach(|| pipeline::plan_epoch(&self.dataset, &self.options, epoch))
    }
}

impl Batches {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<pipeline::Batches>> {
        // the option is replaced whole, so a poisoned lock still guards a valid value
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_process(&self) -> PyResult<()> {
        if std::process::id() == self.process {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(
            "a BatchLoader was carried into a forked process, where its threads do not exist; make it in the child, \
             or use DataLoader(num_workers=0): sftcore prefetches with threads of its own",
        ))
    }
}

fn to_arrays(py: Python<'_>, batch: Batch) -> PyResult<BatchArrays<'_>> {
    let shape = [batch.rows, batch.width];
    let array = |values: Vec<i64>| values.into_pyarray(py).reshape(shape);
    let weights =
        (!batch.loss_weights.is_empty()).then(|| batch.loss_weights.into_pyarray(py).reshape(shape));
    Ok((array(batch.input_ids)?, array(batch.labels)?, array(batch.attention_mask)?, weights.transpose()?))
}
