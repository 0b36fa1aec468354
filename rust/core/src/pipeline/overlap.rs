//! Rows that two data sets share: validation rows that would also be trained.

use std::collections::HashMap;
use std::sync::Arc;

use super::build::NEAR;
use super::dataset::Dataset;
use super::election::Progress;
use super::ordered::{Next, Ordered, PATIENCE, worker_panicked};
use crate::Result;
use crate::duplicates::{SketchIndex, Sketcher};
use crate::order::Rows;

/// A row of one data set that occurs in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// The row.
    pub row: u32,
    /// The row of the other.
    pub other: u32,
    /// Whether ids, mask and weights are equal; else the texts are nearly so.
    pub is_exact: bool,
}

/// Rows of one task.
const ROWS_PER_TASK: usize = 64;

impl Dataset {
    /// The rows of `sets` that occur in `other_sets` of `other`, in order; near-duplicates too where `is_near`.
    pub fn overlap(
        self: &Arc<Self>,
        sets: &[Rows],
        other: &Self,
        other_sets: &[Rows],
        is_near: bool,
        num_threads: usize,
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Overlap>> {
        let (table, other_table) = (&self.index().table, &other.index().table);
        let mut by_hash = HashMap::<u64, u32, rustc_hash::FxBuildHasher>::default();
        for row in other_sets.iter().flat_map(Rows::iter) {
            by_hash.entry(other_table.hash(row)).or_insert(row);
        }
        let mut found: Vec<Overlap> = sets
            .iter()
            .flat_map(Rows::iter)
            .filter_map(|row| {
                by_hash.get(&table.hash(row)).map(|&other| Overlap { row, other, is_exact: true })
            })
            .collect();
        if is_near {
            let exact: std::collections::HashSet<u32> = found.iter().map(|overlap| overlap.row).collect();
            let rows: Vec<u32> =
                sets.iter().flat_map(Rows::iter).filter(|row| !exact.contains(row)).collect();
            found.extend(self.near(&rows, other, other_sets, num_threads, progress)?);
            found.sort_by_key(|overlap| overlap.row);
        }
        Ok(found)
    }

    fn near(
        self: &Arc<Self>,
        rows: &[u32],
        other: &Self,
        other_sets: &[Rows],
        num_threads: usize,
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Overlap>> {
        let sketcher = Arc::new(Sketcher::new());
        let mut others = SketchIndex::new();
        for row in other_sets.iter().flat_map(Rows::iter) {
            others.insert(row, &sketcher.sketch(&other.text(row)?.1));
        }
        let all = rows.len() as u64;
        let tasks: Vec<Vec<u32>> = rows.chunks(ROWS_PER_TASK).map(<[u32]>::to_vec).collect();
        let work = {
            let (dataset, sketcher) = (self.clone(), sketcher.clone());
            move |rows: Vec<u32>| -> Result<Vec<_>> {
                let sketch = |row| Ok((row, sketcher.sketch(&dataset.text(row)?.1)));
                rows.into_iter().map(sketch).collect()
            }
        };
        let mut results = Ordered::start(tasks.into_iter(), num_threads, 4 * num_threads, work);
        let (mut found, mut done) = (Vec::new(), 0);
        loop {
            match results.next(PATIENCE) {
                Next::Item(rows) => {
                    for (row, sketch) in rows? {
                        done += 1;
                        let candidates = others.candidates(&sketch);
                        if candidates.is_empty() {
                            continue;
                        }
                        let text = self.text(row)?.1;
                        for candidate in candidates {
                            if sketcher.similarity(&text, &other.text(candidate)?.1) >= NEAR {
                                found.push(Overlap { row, other: candidate, is_exact: false });
                                break;
                            }
                        }
                    }
                }
                Next::Pending => {}
                Next::Failed => return Err(worker_panicked()),
                Next::End => return Ok(found),
            }
            progress(done, all)?;
        }
    }
}
