//! The batches of an epoch: lengths to global batches to micro-batches for each rank.
//!
//! A global batch is decided by the seed, the epoch and its size alone; ranks and accumulation steps only share it
//! out. Each rank gets exactly `gradient_accumulation_steps` micro-batches of every global batch; where the last one of an
//! epoch is too small for all, the rest are empty. A plan is not a list: it is made a *window* of global batches at a
//! time, from the window's number, so it takes no memory and a run may go on at any step at once.

mod pack;

use std::str::FromStr;
use std::sync::Arc;

use crate::order::{self, EpochOrder, Permutation};
use crate::{Error, ErrorKind, Result};

pub use pack::Packing;

/// How examples are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Shuffled, and examples of like length together.
    Bucket,
    /// Shuffled, and several examples in one row of the batch, up to a number of tokens.
    Pack,
    /// In the order of the files.
    Sequential,
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "bucket" => Ok(Self::Bucket),
            "pack" => Ok(Self::Pack),
            "sequential" => Ok(Self::Sequential),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("mode \"{name}\" is unknown; expected bucket, pack or sequential"),
            )),
        }
    }
}

/// The size of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BatchSize {
    /// This many examples, or packs.
    Rows(usize),
    /// As many examples as give no more than this many tokens, padding included.
    Tokens(u32),
}

/// Global batches of one window: long enough that neighbours by length are alike, short enough to sort in no time.
const WINDOW_BATCHES: usize = 64;
/// A window has at least this many rows, so that small batches are sorted well too.
const WINDOW_ROWS: usize = 1 << 13;
/// Rows of a window where batches are cut by tokens.
const TOKEN_WINDOW_ROWS: usize = 1 << 16;

/// Purposes of keys.
const BATCHES: u64 = 2;
const PACKS: u64 = 6;

/// How a global batch is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sharing {
    /// The size of a micro-batch.
    pub batch_size: BatchSize,
    /// Micro-batches of an optimizer step on one rank.
    pub gradient_accumulation_steps: usize,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

impl Sharing {
    /// Micro-batches of a global batch, over all ranks.
    pub fn micro_batches(&self) -> usize {
        self.gradient_accumulation_steps * self.world_size
    }
}

/// The unit of an optimizer step. Its packs are shared out so that ranks have nearly equal work at each
/// micro-batch: costs fall from the first pack to the last, and neighbours go to different ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalBatch {
    /// Rows that share a row of the batch; one each, unless examples are packed.
    pub packs: Vec<Vec<u32>>,
    /// The end of each micro-batch in `packs`, where batches are cut by tokens.
    ends: Option<Vec<usize>>,
}

impl GlobalBatch {
    /// Micro-batch number `step` (from 0) of the rank.
    pub fn micro_batch(&self, sharing: &Sharing, step: usize) -> &[Vec<u32>] {
        let slot = step * sharing.world_size + sharing.rank;
        match (&self.ends, sharing.batch_size) {
            (None, BatchSize::Rows(rows)) => {
                let start = (slot * rows).min(self.packs.len());
                &self.packs[start..(start + rows).min(self.packs.len())]
            }
            (Some(ends), _) => {
                let end = |slot: usize| ends.get(slot).copied().unwrap_or(self.packs.len());
                let start = if slot == 0 { 0 } else { end(slot - 1) };
                &self.packs[start..end(slot)]
            }
            // cut by tokens, there are ends
            (None, BatchSize::Tokens(_)) => &[],
        }
    }

    /// All rows of the step.
    pub fn rows(&self) -> impl Iterator<Item = u32> + '_ {
        self.packs.iter().flatten().copied()
    }
}

/// What decides a plan beside the order of the rows.
#[derive(Debug, Clone, Copy)]
pub struct PlanOptions {
    /// How examples are grouped.
    pub mode: Mode,
    /// The size of a micro-batch.
    pub batch_size: BatchSize,
    /// Micro-batches of a global batch, over all ranks.
    pub micro_batches: usize,
    /// Tokens of a pack.
    pub capacity: u32,
    /// The cost of an example of L tokens is L + `quadratic_cost` · L².
    pub quadratic_cost: f64,
    /// The seed of the run.
    pub seed: u64,
    /// The epoch.
    pub epoch: u64,
}

/// The plan of one epoch.
pub struct Plan {
    options: PlanOptions,
    order: EpochOrder,
    packing: Option<Arc<Packing>>,
    /// The first step of each window, and the number of steps, where batches are cut by tokens.
    first_steps: Option<Vec<usize>>,
}

impl Plan {
    /// Plans an epoch whose rows have these `lengths`; `packing` is that of an earlier epoch with the same rows.
    pub fn new(
        options: PlanOptions,
        order: EpochOrder,
        lengths: &[u32],
        packing: Option<Arc<Packing>>,
    ) -> Self {
        let packing = (options.mode == Mode::Pack).then(|| {
            packing.unwrap_or_else(|| Arc::new(Packing::new(|| order.unordered(), lengths, options.capacity)))
        });
        let mut plan = Self { options, order, packing, first_steps: None };
        if let (BatchSize::Tokens(_), None) = (options.batch_size, &plan.packing) {
            let num_windows = plan.num_units().div_ceil(TOKEN_WINDOW_ROWS);
            let mut first_steps = vec![0];
            for window in 0..num_windows {
                let units = plan.sorted_units(window, lengths);
                let steps = plan.cut_by_tokens(&units, lengths).len();
                first_steps.push(first_steps.last().copied().unwrap_or(0) + steps);
            }
            plan.first_steps = Some(first_steps);
        }
        plan
    }

    /// The order of its rows.
    pub fn order(&self) -> &EpochOrder {
        &self.order
    }

    /// Its packing, which serves other epochs where they have the same rows.
    pub fn packing(&self) -> Option<&Arc<Packing>> {
        self.packing.as_ref().filter(|_| self.order.is_whole())
    }

    /// Packs, or rows where none are packed.
    pub fn num_units(&self) -> usize {
        self.packing.as_ref().map_or(self.order.len(), |packing| packing.num_packs()) as usize
    }

    /// Optimizer steps of the epoch.
    pub fn num_steps(&self) -> usize {
        match &self.first_steps {
            Some(first_steps) => first_steps.last().copied().unwrap_or(0),
            None => self.num_units().div_ceil(self.units_per_batch()),
        }
    }

    /// The window that holds `step`, and the first step of that window.
    pub fn window_of(&self, step: usize) -> (usize, usize) {
        if let Some(first_steps) = &self.first_steps {
            let window = first_steps.partition_point(|&first| first <= step).saturating_sub(1);
            return (window, first_steps.get(window).copied().unwrap_or(step));
        }
        let batches = self.window_units() / self.units_per_batch();
        (step / batches, step / batches * batches)
    }

    /// The global batches of a window, in the order of training.
    pub fn window(&self, window: usize, lengths: &[u32]) -> Vec<GlobalBatch> {
        let units = self.sorted_units(window, lengths);
        let mut batches = if self.first_steps.is_some() {
            self.cut_by_tokens(&units, lengths)
        } else {
            units
                .chunks(self.units_per_batch())
                .map(|units| GlobalBatch { packs: self.packs(units), ends: None })
                .collect()
        };
        if self.options.mode != Mode::Sequential {
            let key = order::key(self.options.seed, self.options.epoch, BATCHES ^ ((window as u64) << 8));
            order::shuffle(&mut batches, key);
        }
        batches
    }

    /// Every global batch of the epoch.
    pub fn global_batches<'p>(&'p self, lengths: &'p [u32]) -> impl Iterator<Item = GlobalBatch> + 'p {
        let num_windows = self.num_units().div_ceil(self.window_units());
        (0..num_windows).flat_map(|window| self.window(window, lengths))
    }

    fn units_per_batch(&self) -> usize {
        match self.options.batch_size {
            BatchSize::Rows(rows) => rows * self.options.micro_batches,
            BatchSize::Tokens(_) => self.options.micro_batches,
        }
    }

    fn window_units(&self) -> usize {
        if self.first_steps.is_some() {
            return TOKEN_WINDOW_ROWS;
        }
        let batch = self.units_per_batch();
        batch * WINDOW_BATCHES.max(WINDOW_ROWS.div_ceil(batch))
    }

    /// The packs or rows of a window, most costly first (in the order of the files where that is kept).
    fn sorted_units(&self, window: usize, lengths: &[u32]) -> Vec<u32> {
        // while windows of token batches are counted, there are no first steps yet
        let is_by_tokens = matches!(self.options.batch_size, BatchSize::Tokens(_)) && self.packing.is_none();
        let size = if is_by_tokens { TOKEN_WINDOW_ROWS } else { self.window_units() };
        let start = window * size;
        let end = (start + size).min(self.num_units());
        // positions are below 2^32 as there are fewer rows
        let positions = (start..end).map(|position| u32::try_from(position).unwrap_or(u32::MAX));
        let Some(packing) = &self.packing else {
            let mut rows: Vec<u32> = positions.map(|position| self.order.at(position)).collect();
            if self.options.mode != Mode::Sequential {
                rows.sort_by_key(|&row| std::cmp::Reverse(lengths[row as usize]));
            }
            return rows;
        };
        let key = order::key(self.options.seed, self.options.epoch, PACKS);
        let permutation = Permutation::new(packing.num_packs(), key);
        let mut packs: Vec<(f64, u32)> = positions
            .map(|position| {
                let pack = permutation.at(position);
                let (tokens, squares) = packing.size(pack);
                #[expect(clippy::cast_precision_loss, reason = "squares of lengths are far below 2^52")]
                let cost = f64::from(tokens) + self.options.quadratic_cost * squares as f64;
                (cost, pack)
            })
            .collect();
        packs.sort_by(|one, other| other.0.total_cmp(&one.0));
        packs.into_iter().map(|(_, pack)| pack).collect()
    }

    fn packs(&self, units: &[u32]) -> Vec<Vec<u32>> {
        let Some(packing) = &self.packing else {
            return units.iter().map(|&row| vec![row]).collect();
        };
        units.iter().map(|&pack| packing.rows(pack, self.options.seed, self.options.epoch)).collect()
    }

    /// Micro-batches of at most so many tokens with padding, and global batches of them.
    fn cut_by_tokens(&self, rows: &[u32], lengths: &[u32]) -> Vec<GlobalBatch> {
        let BatchSize::Tokens(limit) = self.options.batch_size else { return Vec::new() };
        let mut micro: Vec<std::ops::Range<usize>> = Vec::new();
        let (mut start, mut width) = (0, 0);
        for (at, &row) in rows.iter().enumerate() {
            width = width.max(u64::from(lengths[row as usize]));
            if at > start && width * (at + 1 - start) as u64 > u64::from(limit) {
                micro.push(start..at);
                start = at;
                width = u64::from(lengths[row as usize]);
            }
        }
        if start < rows.len() {
            micro.push(start..rows.len());
        }
        micro.chunks(self.options.micro_batches).map(|group| self.group(group, rows)).collect()
    }

    fn group(&self, micro: &[std::ops::Range<usize>], rows: &[u32]) -> GlobalBatch {
        let mut micro = micro.to_vec();
        // too few for all ranks and steps: the largest are halved, so that few stay empty
        while micro.len() < self.options.micro_batches {
            let largest =
                (0..micro.len()).max_by_key(|&at| micro[at].len()).filter(|&at| micro[at].len() > 1);
            let Some(largest) = largest else { break };
            let std::ops::Range { start, end } = micro[largest];
            let middle = usize::midpoint(start, end);
            micro[largest] = start..middle;
            micro.insert(largest + 1, middle..end);
        }
        let first = micro.first().map_or(0, |range| range.start);
        GlobalBatch {
            packs: rows[first..micro.last().map_or(first, |range| range.end)]
                .iter()
                .map(|&row| vec![row])
                .collect(),
            ends: Some(micro.iter().map(|range| range.end - first).collect()),
        }
    }
}

#[cfg(test)]
mod tests;
