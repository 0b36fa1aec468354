//! The micro-batches of one rank, an epoch at a time, from any step on.

use std::sync::{Arc, Mutex, PoisonError};

use super::dataset::Dataset;
use super::ordered::{Next, Ordered};
use crate::Result;
use crate::collate::{Batch, Rectangle};
use crate::encode::Example;
use crate::order::{EpochOrder, Mixture, Rows};
use crate::plan::{GlobalBatch, Mode, Packing, Plan, PlanOptions, Sharing};

/// How examples become the micro-batches of a rank.
#[derive(Debug, Clone)]
pub struct Batching {
    /// Grouping.
    pub mode: Mode,
    /// Sharing among ranks and steps.
    pub sharing: Sharing,
    /// Tokens of a pack.
    pub capacity: u32,
    /// The cost of an example of L tokens is L + `quadratic_cost` · L².
    pub quadratic_cost: f64,
    /// How examples share rows.
    pub rectangle: Rectangle,
    /// Decides the order.
    pub seed: u64,
    /// Fills short rows.
    pub pad_token_id: u32,
    /// Worker threads.
    pub num_threads: usize,
}

impl Batching {
    /// What decides the plan of an epoch of the run, or of a window with a seed of its own.
    pub fn plan_options(&self, seed: u64, epoch: u64) -> PlanOptions {
        PlanOptions {
            mode: self.mode,
            batch_size: self.sharing.batch_size,
            micro_batches: self.sharing.micro_batches(),
            capacity: self.capacity,
            quadratic_cost: self.quadratic_cost,
            seed,
            epoch,
        }
    }
}

/// How the batches of a split are made.
#[derive(Debug, Clone)]
pub struct BatchOptions {
    /// The rows of each data set that belong to the split.
    pub sets: Arc<Vec<Rows>>,
    /// How the data sets share an epoch.
    pub mixture: Mixture,
    /// How their rows become batches.
    pub batching: Batching,
}

/// The plans of epochs; the last one made is kept.
pub struct EpochPlans {
    dataset: Arc<Dataset>,
    options: BatchOptions,
    last: Mutex<Option<(u64, Arc<Plan>)>>,
    /// Serves every epoch where all have the same rows.
    packing: Mutex<Option<Arc<Packing>>>,
}

impl EpochPlans {
    /// Plans for a split of `dataset`.
    pub fn new(dataset: Arc<Dataset>, options: BatchOptions) -> Self {
        Self { dataset, options, last: Mutex::new(None), packing: Mutex::new(None) }
    }

    /// The data set.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// How the batches are made.
    pub fn options(&self) -> &BatchOptions {
        &self.options
    }

    /// The plan of `epoch`.
    pub fn plan(&self, epoch: u64) -> Result<Arc<Plan>> {
        // both values are replaced whole, so a poisoned lock still guards a valid one
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plan)) = last.as_ref().filter(|(known, _)| *known == epoch) {
            return Ok(plan.clone());
        }
        let (options, batching) = (&self.options, &self.options.batching);
        let table = &self.dataset.index().table;
        let order = EpochOrder::new(
            &options.sets,
            &options.mixture,
            batching.mode != Mode::Sequential,
            batching.seed,
            epoch,
            &|row| table.trained_tokens(row),
        )?;
        let plan_options = batching.plan_options(batching.seed, epoch);
        let mut packing = self.packing.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = Arc::new(Plan::new(plan_options, order, table.lengths(), packing.clone()));
        *packing = plan.packing().cloned();
        *last = Some((epoch, plan.clone()));
        Ok(plan)
    }

    /// The global batch of a step.
    pub fn global_batch(&self, epoch: u64, step: usize) -> Result<Option<GlobalBatch>> {
        let plan = self.plan(epoch)?;
        if step >= plan.num_steps() {
            return Ok(None);
        }
        let (window, first) = plan.window_of(step);
        let mut batches = plan.window(window, self.dataset.index().table.lengths());
        Ok((step - first < batches.len()).then(|| batches.swap_remove(step - first)))
    }

    /// Optimizer steps of an epoch.
    pub fn num_steps(&self, epoch: u64) -> Result<usize> {
        Ok(self.plan(epoch)?.num_steps())
    }

    /// The size of every micro-batch of this rank in an epoch, in order; none is prepared for that.
    pub fn shapes(&self, epoch: u64) -> Result<Vec<Shape>> {
        let plan = self.plan(epoch)?;
        let table = &self.dataset.index().table;
        let Batching { sharing, rectangle, .. } = &self.options.batching;
        let mut shapes = Vec::with_capacity(plan.num_steps() * sharing.gradient_accumulation_steps);
        for (step, batch) in plan.global_batches(table.lengths()).enumerate() {
            for micro in 0..sharing.gradient_accumulation_steps {
                let packs = batch.micro_batch(sharing, micro);
                let lengths =
                    |pack: &Vec<u32>| pack.iter().map(|&row| table.lengths()[row as usize] as usize).sum();
                let tokens: Vec<usize> = packs.iter().map(lengths).collect();
                let (rows, width) = rectangle.shape(&tokens);
                let trained = packs.iter().flatten().map(|&row| table.trained_tokens(row) as usize).sum();
                shapes.push(Shape {
                    step,
                    rows,
                    width,
                    tokens: tokens.iter().sum(),
                    trained_tokens: trained,
                });
            }
        }
        Ok(shapes)
    }
}

/// How large a micro-batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The optimizer step of the epoch that it is of.
    pub step: usize,
    /// Rows of the rectangle.
    pub rows: usize,
    /// Width of the rectangle.
    pub width: usize,
    /// Tokens in it that are no padding.
    pub tokens: usize,
    /// Tokens in it that are trained.
    pub trained_tokens: usize,
}

/// A micro-batch and what it is of.
#[derive(Debug)]
pub struct StepBatch {
    /// The arrays.
    pub batch: Batch,
    /// The row of each example in it.
    pub rows: Vec<u32>,
    /// The sum of the hashes of all examples of the optimizer step, over all ranks, with its last micro-batch.
    pub step_hash: Option<u64>,
}

/// The micro-batches of this rank, in order.
pub type Batches = Ordered<Result<StepBatch>>;

struct Task {
    packs: Vec<Vec<u32>>,
    step_hash: Option<u64>,
}

/// Micro-batches of a plan, made a window at a time.
struct Tasks {
    plan: Arc<Plan>,
    dataset: Arc<Dataset>,
    sharing: Sharing,
    window: usize,
    batches: std::vec::IntoIter<GlobalBatch>,
    /// The step under way and its next micro-batch.
    current: Option<(GlobalBatch, usize)>,
    steps_left: usize,
}

impl Tasks {
    fn next_batch(&mut self) -> Option<GlobalBatch> {
        self.steps_left = self.steps_left.checked_sub(1)?;
        loop {
            if let Some(batch) = self.batches.next() {
                return Some(batch);
            }
            let batches = self.plan.window(self.window, self.dataset.index().table.lengths());
            if batches.is_empty() {
                return None;
            }
            self.window += 1;
            self.batches = batches.into_iter();
        }
    }
}

impl Iterator for Tasks {
    type Item = Task;

    fn next(&mut self) -> Option<Task> {
        let (batch, micro) = match self.current.take() {
            Some(current) => current,
            None => (self.next_batch()?, 0),
        };
        let packs = batch.micro_batch(&self.sharing, micro).to_vec();
        let is_last = micro + 1 == self.sharing.gradient_accumulation_steps;
        let table = &self.dataset.index().table;
        let step_hash =
            is_last.then(|| batch.rows().fold(0, |sum: u64, row| sum.wrapping_add(table.hash(row))));
        if !is_last {
            self.current = Some((batch, micro + 1));
        }
        Some(Task { packs, step_hash })
    }
}

impl EpochPlans {
    /// Starts making the micro-batches of `epoch` from optimizer step `step` on.
    pub fn start(&self, epoch: u64, step: usize) -> Result<Batches> {
        let plan = self.plan(epoch)?;
        let options = &self.options.batching;
        let (window, first) = plan.window_of(step);
        let mut batches = plan.window(window, self.dataset.index().table.lengths());
        batches.drain(..(step - first).min(batches.len()));
        let tasks = Tasks {
            steps_left: plan.num_steps().saturating_sub(step),
            plan,
            dataset: self.dataset.clone(),
            sharing: options.sharing,
            window: window + 1,
            batches: batches.into_iter(),
            current: None,
        };
        let dataset = self.dataset.clone();
        let (rectangle, pad_token_id) = (options.rectangle, options.pad_token_id);
        let work = move |task: Task| -> Result<StepBatch> {
            let encode = |pack: &Vec<u32>| -> Result<Vec<Example>> {
                pack.iter().map(|&row| dataset.example(row)).collect()
            };
            let examples = task.packs.iter().map(encode).collect::<Result<Vec<_>>>()?;
            Ok(StepBatch {
                batch: Batch::new(&examples, rectangle, pad_token_id),
                rows: task.packs.into_iter().flatten().collect(),
                step_hash: task.step_hash,
            })
        };
        Ok(Ordered::start(tasks, options.num_threads, 2 * options.num_threads + 2, work))
    }
}

/// What a reader of batches found.
pub type NextBatch = Next<Result<StepBatch>>;
