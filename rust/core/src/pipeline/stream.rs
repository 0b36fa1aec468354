//! Rows that are read once and in order: of a pipe, or of files too long to index.
//!
//! [`Reader`] takes rows from data sets in turn by their shares and says after each where its data set stands, so that a stream
//! goes on from there. Nothing is known ahead: no number of rows, no lengths.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::conversation::Columns;
use crate::index::ShapedRows;
use crate::order::Stopping;
use crate::source::{RowReader, RowSpan, open_stream};
use crate::{Error, ErrorKind, Result};

/// Where a stream stands in one data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetPosition {
    /// The file under way.
    pub file: usize,
    /// Bytes of it that were read, unpacked.
    pub offset: u64,
    /// Rows taken of the data set in this epoch.
    pub rows: u64,
    /// How often the data set was used up in this epoch.
    pub passes: u64,
}

/// One data set of a stream.
pub(super) struct StreamSet {
    pub(super) name: String,
    pub(super) files: Vec<PathBuf>,
    pub(super) columns: Arc<Columns>,
}

/// A row of a stream.
pub(super) struct StreamRow {
    pub(super) set: usize,
    /// How its file is read; `None` where the file cannot be.
    pub(super) rows: Option<Arc<ShapedRows>>,
    /// Its place and bytes.
    pub(super) row: Result<(RowSpan, Vec<u8>)>,
    /// Where the data set stands after it.
    pub(super) position: SetPosition,
}

type Rows = RowReader<Box<dyn BufRead + Send>>;

/// The file of a data set that is being read.
struct OpenFile {
    rows: Rows,
    shaped: Arc<ShapedRows>,
    is_shaped: bool,
}

struct SetReader {
    set: Arc<StreamSet>,
    position: SetPosition,
    open: Option<OpenFile>,
    is_restartable: bool,
}

/// The rows of all data sets, in order.
pub(super) struct Reader {
    sets: Vec<SetReader>,
    shares: Option<Vec<f64>>,
    stopping: Stopping,
    is_done: bool,
}

impl Reader {
    /// Goes on from `positions`, one for each data set.
    pub(super) fn new(
        sets: &[Arc<StreamSet>],
        shares: Option<Vec<f64>>,
        stopping: Stopping,
        positions: &[SetPosition],
    ) -> Self {
        let sets = (0..)
            .zip(sets)
            .map(|(number, set)| SetReader {
                is_restartable: set.files.iter().all(|path| path.is_file()),
                set: set.clone(),
                position: positions.get(number).cloned().unwrap_or_default(),
                open: None,
            })
            .collect();
        Self { sets, shares, stopping, is_done: false }
    }

    fn next_row(&mut self) -> Option<StreamRow> {
        let Some(shares) = self.shares.clone() else {
            let next = |(number, set): (usize, &mut SetReader)| set.take(number);
            return self.sets.iter_mut().enumerate().find_map(next);
        };
        loop {
            let set = self.turn(&shares);
            if let Some(row) = self.sets[set].take(set) {
                return Some(row);
            }
            // the data set is used up
            let reader = &mut self.sets[set];
            if self.stopping == Stopping::FirstExhausted || reader.position.rows == 0 {
                return None;
            }
            reader.position.passes += 1;
            if self.sets.iter().all(|reader| reader.position.passes > 0) {
                return None;
            }
            let reader = &mut self.sets[set];
            if !reader.is_restartable {
                let error = Error::new(
                    ErrorKind::Config,
                    format!(
                        "{} can be read only once, and stopping_strategy all_exhausted needs it again; choose \
                         first_exhausted",
                        reader.set.name
                    ),
                );
                self.is_done = true;
                let position = reader.position.clone();
                return Some(StreamRow { set, rows: None, row: Err(error), position });
            }
            reader.position.file = 0;
            reader.position.offset = 0;
            reader.open = None;
        }
    }

    /// The data set that is furthest behind its share.
    fn turn(&self, shares: &[f64]) -> usize {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let behind = |set: usize| (self.sets[set].position.rows as f64 + 1.0) / shares[set];
        (0..self.sets.len()).min_by(|&one, &other| behind(one).total_cmp(&behind(other))).unwrap_or(0)
    }
}

impl Iterator for Reader {
    type Item = StreamRow;

    fn next(&mut self) -> Option<StreamRow> {
        if self.is_done {
            return None;
        }
        let row = self.next_row();
        self.is_done |= row.as_ref().is_none_or(|row| row.rows.is_none());
        row
    }
}

impl SetReader {
    fn take(&mut self, number: usize) -> Option<StreamRow> {
        let row = self.read(number)?;
        self.position = row.position.clone();
        Some(row)
    }

    fn failed(&self, set: usize, error: Error) -> StreamRow {
        StreamRow { set, rows: None, row: Err(error), position: self.position.clone() }
    }

    fn read(&mut self, number: usize) -> Option<StreamRow> {
        loop {
            if self.open.is_none() {
                let path = self.set.files.get(self.position.file)?.clone();
                match open(&path, &self.set.columns, self.position.offset) {
                    Ok(opened) => self.open = Some(opened),
                    Err(error) => return Some(self.failed(number, error.in_file(&path))),
                }
            }
            let open = self.open.as_mut()?;
            let Some(row) = open.rows.next() else {
                if self.position.offset == 0 {
                    let message = "the file has no rows; check that it was written whole";
                    let error = Error::new(ErrorKind::Row, message).in_file(open.shaped.path());
                    return Some(self.failed(number, error));
                }
                self.open = None;
                self.position.file += 1;
                self.position.offset = 0;
                continue;
            };
            if let (false, Ok((span, bytes))) = (open.is_shaped, &row) {
                // a row without a shape is judged as a wrong one, and the next is tried
                open.is_shaped = Arc::make_mut(&mut open.shaped).find_shape(bytes, *span).is_ok();
            }
            let mut position = self.position.clone();
            position.offset = match &row {
                Ok((span, _)) => span.offset + span.bytes,
                Err(_) => position.offset + 1,
            };
            position.rows += 1;
            return Some(StreamRow { set: number, rows: Some(open.shaped.clone()), row, position });
        }
    }
}

/// Opens a file and passes over what was read of it.
fn open(path: &std::path::Path, columns: &Arc<Columns>, offset: u64) -> Result<OpenFile> {
    let (reader, layout) = open_stream(path)?;
    let mut rows = RowReader::new(reader, layout).of_file(path);
    let parser = rows.parser()?;
    let mut shaped = ShapedRows::new(path, parser, columns.clone());
    let mut is_shaped = false;
    let mut passed = 0;
    while passed < offset {
        match rows.next() {
            Some(Ok((span, bytes))) => {
                is_shaped = is_shaped || shaped.find_shape(&bytes, span).is_ok();
                passed = span.offset + span.bytes;
            }
            // it was counted when it was read the first time
            Some(Err(_)) => passed += 1,
            None => {
                let message = "the file became shorter than when the state was taken; start anew";
                return Err(Error::new(ErrorKind::Config, message));
            }
        }
    }
    Ok(OpenFile { rows, shaped: Arc::new(shaped), is_shaped })
}
