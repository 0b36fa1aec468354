//! Data sets: their files, the index of their rows, and the rows that a run takes of them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::build::{Build, Dedup};
pub use super::election::Origin;
use super::election::{Progress, SILENCE, build_once};
use super::quarantine;
use crate::conversation::Columns;
use crate::encode::{Encoder, Example};
use crate::index::{Index, SetReport, ShapedSource};
use crate::order::{self, DRAW, Rows};
use crate::source::{FilePool, UnpackFolder, fingerprint};
use crate::{Error, ErrorKind, Result};

/// One data set: files whose rows are read alike.
#[derive(Debug, Clone, Deserialize)]
pub struct DatasetSpec {
    /// What reports call it.
    pub name: String,
    /// Its files, in order.
    pub files: Vec<PathBuf>,
    /// How many of its rows are drawn; all where not given.
    #[serde(default)]
    pub sample: Option<u32>,
    /// New names of keys, as [`Columns`] reads them.
    #[serde(default)]
    pub columns: Option<Value>,
}

/// What happens to rows that are wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnBadRow {
    /// The first is an error.
    Raise,
    /// They are left out, and counted with their places and reasons.
    Skip,
    /// The same, and they are written to this file with what is wrong with them.
    Quarantine(PathBuf),
}

/// How many rows may be wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxBadRows {
    /// Any number.
    Any,
    /// So many.
    Rows(u64),
    /// This share of all rows.
    Share(f64),
}

impl FromStr for MaxBadRows {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let message =
                format!("max_bad_rows \"{text}\" is wrong; expected a number of rows or a share like 0.1%");
            Error::new(ErrorKind::Config, message)
        };
        match text.strip_suffix('%') {
            None => text.parse().map(Self::Rows).map_err(|_| wrong()),
            Some(share) => match share.trim().parse::<f64>() {
                Ok(share) if (0.0..=100.0).contains(&share) => Ok(Self::Share(share / 100.0)),
                _ => Err(wrong()),
            },
        }
    }
}

/// How data sets are indexed.
#[derive(Debug, Clone)]
pub struct IndexOptions {
    /// Worker threads.
    pub num_threads: usize,
    /// Decides which rows a `#N` suffix draws.
    pub seed: u64,
    /// What happens to rows that are wrong.
    pub on_bad_row: OnBadRow,
    /// How many there may be.
    pub max_bad_rows: MaxBadRows,
    /// Which rows are left out because an earlier one is like them.
    pub dedup: Dedup,
    /// Where indexes and unpacked files are kept; nowhere where not given.
    pub cache_folder: Option<PathBuf>,
    /// Whether whole files are hashed to tell them apart, rather than their size, times and parts.
    pub hash_whole_files: bool,
    /// A hash of all that decides how rows are encoded.
    pub encoder_fingerprint: String,
}

/// Files, the records of their rows, and the encoder they are for.
pub struct Dataset {
    encoder: Arc<Encoder>,
    sources: Arc<Vec<ShapedSource>>,
    index: Index,
    /// The rows of each data set.
    sets: Vec<Rows>,
    origin: Origin,
    unkept: Option<String>,
}

impl Dataset {
    /// Opens and indexes `specs`. `progress` is told bytes done and bytes in all, several times a second, and may stop
    /// the work with an error.
    pub fn open(
        specs: &[DatasetSpec],
        encoder: Arc<Encoder>,
        options: &IndexOptions,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        if specs.iter().all(|spec| spec.files.is_empty()) {
            return Err(Error::new(ErrorKind::Config, "no dataset is given; pass at least one file"));
        }
        let key = key(specs, options)?;
        let is_strict = options.on_bad_row == OnBadRow::Raise;
        let mut opened = None;
        let mut first_files = Vec::new();
        let mut files = 0_u32;
        for spec in specs {
            first_files.push(files);
            files = files.saturating_add(u32::try_from(spec.files.len()).unwrap_or(u32::MAX));
        }
        let (index, origin, unkept) =
            build_once(options.index_folder().as_deref(), &key, SILENCE, progress, &mut |progress| {
                let sources = Arc::new(open_sources(specs, options, progress)?);
                opened = Some(sources.clone());
                Build {
                    sources: &sources,
                    first_files: &first_files,
                    names: specs.iter().map(|spec| spec.name.clone()).collect(),
                    encoder: &encoder,
                    num_threads: options.num_threads,
                    is_strict,
                    dedup: options.dedup,
                }
                .run(progress)
            })?;
        let sources = match opened {
            Some(sources) => sources,
            None => Arc::new(open_sources(specs, options, progress)?),
        };
        let sets = (0..specs.len()).map(|set| set_rows(&index, set)).collect();
        let mut dataset = Self { encoder, sources, index, sets, origin, unkept };
        dataset.judge_bad_rows(options)?;
        if dataset.index.table.is_empty() {
            return Err(dataset.no_examples());
        }
        dataset.draw(specs, options.seed)?;
        Ok(dataset)
    }

    fn judge_bad_rows(&self, options: &IndexOptions) -> Result<()> {
        if let OnBadRow::Quarantine(path) = &options.on_bad_row {
            quarantine::write(path, &self.index.bad_rows, &self.sources)?;
        }
        let Some(first) = self.index.bad_rows.first() else { return Ok(()) };
        if options.on_bad_row == OnBadRow::Raise {
            return Err(self.bad_row_error(first));
        }
        let report = self.report();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count"
        )]
        let limit = match options.max_bad_rows {
            MaxBadRows::Any => return Ok(()),
            MaxBadRows::Rows(rows) => rows,
            MaxBadRows::Share(share) => (report.rows as f64 * share) as u64,
        };
        if report.bad <= limit {
            return Ok(());
        }
        let reasons: Vec<String> = self
            .bad_reasons()
            .into_iter()
            .take(5)
            .map(|(reason, count)| format!("\n  {count} x {reason}"))
            .collect();
        let message = format!(
            "{} of {} rows are wrong, and max_bad_rows allows {limit} (the first: {}); fix them or raise \
             --max_bad_rows{}",
            report.bad,
            report.rows,
            self.bad_row_error(first),
            reasons.concat()
        );
        Err(Error::new(ErrorKind::Row, message))
    }

    fn bad_row_error(&self, bad: &crate::index::BadRow) -> Error {
        bad.error(self.sources[bad.file as usize].source.path())
    }

    fn no_examples(&self) -> Error {
        let report = self.report();
        let mut message = format!("none of the {} rows is left to train on:", report.rows);
        if let Some(first) = &report.first_deleted {
            let _ = write!(
                message,
                " {} are over max_length {} (the first: {first}; raise --max_length or choose \
                 --truncation_strategy left, right or split)",
                report.deleted, self.encoder.max_length
            );
        }
        if let Some(first) = self.index.bad_rows.first() {
            let _ = write!(message, " {} are wrong (the first: {})", report.bad, self.bad_row_error(first));
        }
        Error::new(ErrorKind::Row, message)
    }

    fn draw(&mut self, specs: &[DatasetSpec], seed: u64) -> Result<()> {
        for (set, (spec, rows)) in specs.iter().zip(&mut self.sets).enumerate() {
            let Some(wanted) = spec.sample else { continue };
            if wanted > rows.len() {
                return Err(Error::new(
                    ErrorKind::Config,
                    format!(
                        "{}: #{wanted} asks for more rows than the {} there are; lower it or leave it out",
                        spec.name,
                        rows.len()
                    ),
                ));
            }
            let report = &mut self.index.sets[set];
            report.not_drawn = u64::from(rows.len() - wanted);
            *rows = rows.draw(wanted, order::key(seed ^ set as u64, 0, DRAW));
            report.examples = u64::from(wanted);
            report.tokens = rows.iter().map(|row| u64::from(self.index.table.record(row).tokens)).sum();
            report.trained_tokens =
                rows.iter().map(|row| u64::from(self.index.table.trained_tokens(row))).sum();
        }
        Ok(())
    }

    /// What the rows of all data sets came to.
    pub fn report(&self) -> SetReport {
        let mut all = SetReport::default();
        for set in &self.index.sets {
            all.add(set);
        }
        all.notes.extend(self.unkept.clone());
        all
    }

    /// What the rows of each data set came to.
    pub fn set_reports(&self) -> &[SetReport] {
        &self.index.sets
    }

    /// What is wrong with rows, and with how many; the most frequent first.
    pub fn bad_reasons(&self) -> Vec<(String, u64)> {
        let mut counts = std::collections::BTreeMap::<String, u64>::new();
        for bad in &self.index.bad_rows {
            *counts.entry(crate::index::reason(&bad.message)).or_default() += 1;
        }
        let mut reasons: Vec<(String, u64)> = counts.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons
    }

    /// The first few rows that are wrong, each as the error it is.
    pub fn first_bad_rows(&self, count: usize) -> Vec<Error> {
        self.index.bad_rows.iter().take(count).map(|bad| self.bad_row_error(bad)).collect()
    }

    /// Where the index came from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The encoder.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The rows of each data set that a run may take.
    pub fn sets(&self) -> &[Rows] {
        &self.sets
    }

    /// The file and line of an example.
    pub fn place(&self, row: u32) -> Result<Option<(&Path, u64)>> {
        if row >= self.index.table.len() {
            return Ok(None);
        }
        let source = &self.sources[self.index.table.file(row)];
        Ok(Some((source.source.path(), source.line(&self.index.table, row)?)))
    }

    /// The example of a row.
    pub fn example(&self, row: u32) -> Result<Example> {
        self.sources[self.index.table.file(row)].example(&self.encoder, &self.index.table, row)
    }

    /// The bytes of a row as they stand in the file, and its rendered text.
    pub fn text(&self, row: u32) -> Result<(Vec<u8>, String)> {
        let source = &self.sources[self.index.table.file(row)];
        let record = self.index.table.record(row);
        let line = source.line(&self.index.table, row)?;
        let span = crate::source::RowSpan { offset: record.offset, bytes: u64::from(record.bytes), line };
        let bytes = source.source.read(span)?;
        let text = self.encoder.render(&source.rows.parse(&bytes, span)?)?.text;
        Ok((bytes, text))
    }

    /// A hash of the examples of the given rows and their order.
    pub fn fingerprint(&self, sets: &[Rows]) -> u64 {
        let is_all = |(set, rows): (usize, &Rows)| set_rows(&self.index, set).len() == rows.len();
        if sets.iter().enumerate().all(is_all) {
            return self.index.table.fingerprint();
        }
        let mut hasher = Xxh3::new();
        for row in sets.iter().flat_map(Rows::iter) {
            hasher.update(&self.index.table.hash(row).to_le_bytes());
        }
        hasher.digest()
    }
}

impl IndexOptions {
    fn index_folder(&self) -> Option<PathBuf> {
        self.cache_folder.as_ref().map(|folder| folder.join("index"))
    }
}

fn set_rows(index: &Index, set: usize) -> Rows {
    let first_row = |set: usize| {
        let file = index.first_files.get(set).map(|&file| file as usize);
        file.map_or(index.table.len(), |file| index.table.rows_of(file).start)
    };
    Rows::Range(first_row(set), first_row(set + 1))
}

fn open_sources(
    specs: &[DatasetSpec],
    options: &IndexOptions,
    progress: &mut Progress<'_>,
) -> Result<Vec<ShapedSource>> {
    let unpack = options.cache_folder.as_ref().map(|folder| UnpackFolder(folder.join("unpacked")));
    let pool = FilePool::default();
    let is_strict = options.on_bad_row == OnBadRow::Raise;
    let mut sources = Vec::new();
    for spec in specs {
        let columns = Arc::new(match &spec.columns {
            Some(columns) => Columns::parse(&columns.to_string())?,
            None => Columns::default(),
        });
        for path in &spec.files {
            sources.push(ShapedSource::open(
                path,
                columns.clone(),
                &pool,
                unpack.as_ref(),
                is_strict,
                progress,
            )?);
        }
    }
    Ok(sources)
}

/// The name of an index: a hash of all that decides it.
fn key(specs: &[DatasetSpec], options: &IndexOptions) -> Result<String> {
    let mut hasher = Xxh3::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(env!("CARGO_PKG_VERSION"));
    add(&options.encoder_fingerprint);
    add(&format!("{:?}", options.dedup));
    for spec in specs {
        add(&spec.name);
        add(&spec.columns.as_ref().map(Value::to_string).unwrap_or_default());
        add(&spec.files.len().to_string());
        for path in &spec.files {
            // the same file by another name of it is the same
            add(&std::path::absolute(path).unwrap_or_else(|_| path.clone()).to_string_lossy());
            add(&fingerprint(path, options.hash_whole_files)?.to_string());
        }
    }
    Ok(format!("{:032x}", hasher.digest128()))
}
