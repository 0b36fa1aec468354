//! Streams to batches.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use sftcore::pipeline::{self, Batching, MaxBadRows, PATIENCE, StreamOptions, StreamState};
use sftcore::plan::{BatchSize, Mode, Sharing};
use sftcore::{Error, ErrorKind};

use crate::encoder::Encoder;
use crate::errors::enter_core;
use crate::loader::{NextBatch, check_process, parse_on_bad_row, parse_specs, rectangle, to_arrays, wait};

/// Data sets that are read in order and once an epoch.
#[pyclass(frozen, module = "sftcore._core")]
pub(crate) struct Stream {
    core: Mutex<pipeline::Stream>,
    process: u32,
}

#[pymethods]
impl Stream {
    /// `specs` is a JSON list of data sets.
    #[new]
    #[pyo3(signature = (specs, encoder, *, buffer, mode, batch_size, tokens_per_batch, gradient_accumulation_steps, rank,
        world_size, seed, pad_token_id, shares, stopping_strategy, pack_length, padding_free, quadratic_cost,
        num_threads, on_bad_row, quarantine, max_bad_rows))]
    #[expect(clippy::too_many_arguments, reason = "the settings of a stream, one to one")]
    fn new(
        py: Python<'_>,
        specs: &str,
        encoder: &Encoder,
        buffer: usize,
        mode: &str,
        batch_size: usize,
        tokens_per_batch: Option<u32>,
        gradient_accumulation_steps: usize,
        rank: usize,
        world_size: usize,
        seed: u64,
        pad_token_id: u32,
        shares: Option<Vec<f64>>,
        stopping_strategy: &str,
        pack_length: Option<u32>,
        padding_free: bool,
        quadratic_cost: f64,
        num_threads: usize,
        on_bad_row: &str,
        quarantine: Option<PathBuf>,
        max_bad_rows: Option<&str>,
    ) -> PyResult<Self> {
        let encoder = encoder.core.clone();
        enter_core(py, || {
            let mode = mode.parse::<Mode>()?;
            let options = StreamOptions {
                shares,
                stopping: stopping_strategy.parse()?,
                buffer,
                batching: Batching {
                    mode,
                    sharing: Sharing {
                        batch_size: tokens_per_batch.map_or(BatchSize::Rows(batch_size), BatchSize::Tokens),
                        gradient_accumulation_steps,
                        rank,
                        world_size,
                    },
                    capacity: pack_length.unwrap_or(u32::MAX),
                    quadratic_cost,
                    rectangle: rectangle(mode, padding_free),
                    seed,
                    pad_token_id,
                    num_threads,
                },
                on_bad_row: parse_on_bad_row(on_bad_row, quarantine)?,
                max_bad_rows: max_bad_rows.map_or(Ok(MaxBadRows::Any), str::parse)?,
            };
            let core = pipeline::Stream::open(&parse_specs(specs)?, encoder, options)?;
            Ok(Self { core: Mutex::new(core), process: std::process::id() })
        })
    }

    /// Goes on from a state, which is JSON.
    fn restart(&self, py: Python<'_>, state: &str) -> PyResult<()> {
        check_process(self.process)?;
        enter_core(py, || {
            let state: StreamState = serde_json::from_str(state).map_err(|error| {
                Error::new(ErrorKind::Config, format!("not the state of a stream: {error}"))
            })?;
            self.lock().restart(state);
            Ok(())
        })
    }

    /// The next micro-batch, or `None` at the end of the epoch.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<NextBatch<'py>>> {
        check_process(self.process)?;
        wait(py, || self.lock().next(PATIENCE))?.map(|batch| to_arrays(py, batch)).transpose()
    }

    /// Where the stream stands, as JSON.
    fn state(&self, py: Python<'_>) -> PyResult<String> {
        check_process(self.process)?;
        Ok(py.detach(|| serde_json::json!(self.lock().state()).to_string()))
    }

    /// What the rows of each data set came to so far, as JSON.
    fn report(&self, py: Python<'_>) -> PyResult<String> {
        check_process(self.process)?;
        Ok(py.detach(|| serde_json::json!(self.lock().reports()).to_string()))
    }
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, pipeline::Stream> {
        // a panic inside ends the run; what is left is only looked at
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
