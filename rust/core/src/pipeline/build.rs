//! Files to an index: every row is read and encoded once, on all threads, and counted in the order of the files.

use std::collections::HashSet;
use std::sync::Arc;

use super::election::Progress;
use super::ordered::{Next, Ordered, PATIENCE, worker_panicked};
use crate::duplicates::{Sketch, SketchIndex, Sketcher};
use crate::encode::Encoder;
use crate::index::{BadRow, Index, IndexedRow, MAX_FILE_BYTES, Record, SetReport, ShapedSource, Verdict};
use crate::source::RowSpan;
use crate::{Error, ErrorKind, Result};

/// Which rows are left out because an earlier one is like them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dedup {
    /// None.
    Keep,
    /// Those whose ids, mask and weights are equal.
    Exact,
    /// Those, and texts whose sets of five-word shingles are alike in eight of ten.
    Near,
}

impl std::str::FromStr for Dedup {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "none" => Ok(Self::Keep),
            "exact" => Ok(Self::Exact),
            "near" => Ok(Self::Near),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("dedup \"{name}\" is unknown; expected none, exact or near"),
            )),
        }
    }
}

/// Texts that are this alike are near-duplicates.
pub(super) const NEAR: f64 = 0.8;

/// Rows of one task.
const ROWS_PER_TASK: usize = 64;
/// Bytes of one task, but for a row that is longer.
const BYTES_PER_TASK: u64 = 256 << 10;
/// More wrong rows than this are no data set.
const MAX_BAD_ROWS: usize = 1_000_000;

/// Files that unpack to less take no room that anybody misses.
const WORTH_SAYING: u64 = 256 << 20;

/// What a build is made from.
pub(super) struct Build<'b> {
    pub(super) sources: &'b Arc<Vec<ShapedSource>>,
    /// The first file of each data set.
    pub(super) first_files: &'b [u32],
    pub(super) names: Vec<String>,
    pub(super) encoder: &'b Arc<Encoder>,
    pub(super) num_threads: usize,
    /// Whether the first wrong row ends it.
    pub(super) is_strict: bool,
    pub(super) dedup: Dedup,
}

/// Neighbouring rows of one file.
struct Task {
    file: usize,
    spans: Vec<Result<RowSpan>>,
}

/// The rows of all files, a task at a time.
struct Tasks {
    sources: Arc<Vec<ShapedSource>>,
    file: usize,
    rows: Option<Box<dyn Iterator<Item = Result<RowSpan>> + Send>>,
}

impl Iterator for Tasks {
    type Item = Task;

    fn next(&mut self) -> Option<Task> {
        loop {
            let shaped = self.sources.get(self.file)?;
            let rows = match &mut self.rows {
                Some(rows) => rows,
                None => match shaped.source.rows() {
                    Ok(rows) => self.rows.insert(Box::new(rows)),
                    Err(error) => {
                        self.file += 1;
                        return Some(Task { file: self.file - 1, spans: vec![Err(error)] });
                    }
                },
            };
            let (mut spans, mut bytes) = (Vec::new(), 0);
            while spans.len() < ROWS_PER_TASK && bytes < BYTES_PER_TASK {
                let Some(span) = rows.next() else { break };
                bytes += span.as_ref().map_or(0, |span| span.bytes);
                spans.push(span);
            }
            if !spans.is_empty() {
                return Some(Task { file: self.file, spans });
            }
            self.rows = None;
            self.file += 1;
        }
    }
}

/// A row and, where near-duplicates are looked for, its sketch.
type Judged = (IndexedRow, Option<Sketch>);

fn work(
    shaped: &ShapedSource,
    encoder: &Encoder,
    sketcher: Option<&Sketcher>,
    task: Task,
) -> Result<Vec<Judged>> {
    let sound = |span: &Result<RowSpan>| span.as_ref().ok().copied();
    let first = task.spans.iter().find_map(sound);
    let last = task.spans.iter().rev().find_map(sound);
    // neighbours are read at once
    let block = match first.zip(last) {
        Some((first, last)) if last.offset + last.bytes - first.offset <= 2 * BYTES_PER_TASK => {
            let bytes = usize::try_from(last.offset + last.bytes - first.offset).unwrap_or(usize::MAX);
            Some((first.offset, shaped.source.read_range(first.offset, bytes)?))
        }
        _ => None,
    };
    let judge = |span: Result<RowSpan>| -> Result<Judged> {
        let span = match span {
            Ok(span) => span,
            Err(error) if error.kind == ErrorKind::Row => {
                let line = error.place.line.unwrap_or(1);
                let error = error.in_file(shaped.source.path());
                return Ok((IndexedRow::bad(RowSpan { offset: 0, bytes: 0, line }, error, false), None));
            }
            Err(error) => return Err(error.in_file(shaped.source.path())),
        };
        let in_block = block.as_ref().and_then(|(start, bytes)| {
            let from = usize::try_from(span.offset.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(usize::try_from(span.bytes).ok()?)?)
        });
        let read;
        let bytes = if let Some(bytes) = in_block {
            bytes
        } else {
            read = shaped.source.read(span)?;
            &read
        };
        let row = shaped.rows.encode(encoder, span, bytes)?.indexed;
        let sketch = match (sketcher, row.records()) {
            (Some(sketcher), [_, ..]) => {
                Some(sketcher.sketch(&encoder.render(&shaped.rows.parse(bytes, span)?)?.text))
            }
            _ => None,
        };
        Ok((row, sketch))
    };
    task.spans.into_iter().map(judge).collect()
}

impl Build<'_> {
    /// Indexes all rows.
    pub(super) fn run(&self, progress: &mut Progress<'_>) -> Result<Index> {
        let report = |name: &String| SetReport { name: name.clone(), ..SetReport::default() };
        let mut index = Index {
            sets: self.names.iter().map(report).collect(),
            first_files: self.first_files.to_vec(),
            ..Index::default()
        };
        let mut begun = 0;
        let mut starts = vec![0_u64];
        for shaped in self.sources.iter() {
            if shaped.source.bytes() >= MAX_FILE_BYTES {
                let message = "a file of one TiB or more; split it";
                return Err(Error::new(ErrorKind::Config, message).in_file(shaped.source.path()));
            }
            starts.push(starts.last().copied().unwrap_or(0) + shaped.source.bytes());
        }
        let all = starts.last().copied().unwrap_or(0);
        let sketcher = (self.dedup == Dedup::Near).then(|| Arc::new(Sketcher::new()));
        let tasks = Tasks { sources: self.sources.clone(), file: 0, rows: None };
        let work = {
            let (sources, encoder, sketcher) = (self.sources.clone(), self.encoder.clone(), sketcher.clone());
            move |task: Task| {
                let file = task.file;
                (file, work(&sources[file], &encoder, sketcher.as_deref(), task))
            }
        };
        let mut seen = Seen { hashes: HashSet::default(), sketches: SketchIndex::new(), sketcher };
        let mut results = Ordered::start(tasks, self.num_threads, 4 * self.num_threads, work);
        let mut done = 0;
        loop {
            match results.next(PATIENCE) {
                Next::Item((file, rows)) => {
                    while begun <= file {
                        self.begin_file(&mut index, begun)?;
                        begun += 1;
                    }
                    for (row, sketch) in rows? {
                        done = starts[file] + row.span.offset + row.span.bytes;
                        self.add(&mut index, &mut seen, file, &row, sketch)?;
                    }
                }
                Next::Pending => {}
                Next::Failed => return Err(worker_panicked()),
                Next::End => break,
            }
            progress(done.min(all), all)?;
        }
        while begun < self.sources.len() {
            self.begin_file(&mut index, begun)?;
            begun += 1;
        }
        index.table.shrink();
        Ok(index)
    }

    fn begin_file(&self, index: &mut Index, file: usize) -> Result<()> {
        index.table.begin_file();
        let shaped = &self.sources[file];
        let set = index.set_of(file);
        let report = &mut index.sets[set];
        report.files += 1;
        let path = shaped.source.path();
        if !shaped.rows.ignored_keys.is_empty() {
            let keys = shaped.rows.ignored_keys.join("\", \"");
            report.notes.push(format!("{}: \"{keys}\" is not read by SFT", path.display()));
        }
        let unpacked = shaped.source.unpacked_bytes();
        if unpacked >= WORTH_SAYING {
            let place = path.display();
            report.notes.push(format!("{place}: unpacked to {} MiB on disk", unpacked >> 20));
        }
        if let Some(damage) = shaped.source.damage() {
            let damage = damage.clone().in_file(path);
            let line = damage.place.line.unwrap_or(1);
            let row = IndexedRow::bad(RowSpan { offset: 0, bytes: 0, line }, damage, false);
            self.count(index, file, &row)?;
        }
        Ok(())
    }

    fn count(&self, index: &mut Index, file: usize, row: &IndexedRow) -> Result<()> {
        if let (true, Verdict::Bad(error, _)) = (self.is_strict, &row.verdict) {
            return Err(error.clone());
        }
        let path = self.sources[file].source.path();
        let set = index.set_of(file);
        let number = u32::try_from(file).unwrap_or(u32::MAX);
        let bad: Option<BadRow> = row.count(path, number, &mut index.sets[set]);
        index.bad_rows.extend(bad);
        if index.bad_rows.len() > MAX_BAD_ROWS {
            let message = format!("more than {MAX_BAD_ROWS} rows are wrong; is this the right file?");
            return Err(Error::new(ErrorKind::Row, message).in_file(path));
        }
        Ok(())
    }

    fn add(
        &self,
        index: &mut Index,
        seen: &mut Seen,
        file: usize,
        row: &IndexedRow,
        sketch: Option<Sketch>,
    ) -> Result<()> {
        self.count(index, file, row)?;
        let records = row.records();
        let set = index.set_of(file);
        if self.dedup != Dedup::Keep && !records.is_empty() {
            if !seen.is_new(records) {
                index.sets[set].duplicates += records.len() as u64;
                return Ok(());
            }
            if let Some(sketch) = sketch {
                if self.has_near(index, seen, file, row, &sketch)? {
                    index.sets[set].near_duplicates += records.len() as u64;
                    return Ok(());
                }
                seen.sketches.insert(index.table.len(), &sketch);
            }
        }
        for &record in records {
            if index.table.len() == u32::MAX {
                return Err(Error::new(ErrorKind::Config, "more than 4294967294 rows; split the data set"));
            }
            let report = &mut index.sets[set];
            report.examples += 1;
            report.tokens += u64::from(record.tokens);
            report.trained_tokens += u64::from(record.trained_tokens);
            report.longest = report.longest.max(u64::from(record.tokens));
            index.table.push(record, row.span.line);
        }
        Ok(())
    }

    /// Whether an earlier row is nearly equal to `row`.
    fn has_near(
        &self,
        index: &Index,
        seen: &Seen,
        file: usize,
        row: &IndexedRow,
        sketch: &Sketch,
    ) -> Result<bool> {
        let candidates = seen.sketches.candidates(sketch);
        let Some(sketcher) = seen.sketcher.as_deref().filter(|_| !candidates.is_empty()) else {
            return Ok(false);
        };
        let text = self.encoder.render(&self.sources[file].row(row.span)?)?.text;
        for candidate in candidates {
            let other = &self.sources[index.table.file(candidate)];
            let record = index.table.record(candidate);
            let span = RowSpan { offset: record.offset, bytes: u64::from(record.bytes), line: 0 };
            if sketcher.similarity(&text, &self.encoder.render(&other.row(span)?)?.text) >= NEAR {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What came before.
struct Seen {
    hashes: HashSet<u64, rustc_hash::FxBuildHasher>,
    sketches: SketchIndex,
    sketcher: Option<Arc<Sketcher>>,
}

impl Seen {
    fn is_new(&mut self, records: &[Record]) -> bool {
        let hash = records.iter().fold(0, |hash: u64, record| hash.rotate_left(17) ^ record.hash);
        self.hashes.insert(hash)
    }
}
