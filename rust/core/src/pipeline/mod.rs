//! Threads and processes: files to an index, an index to batches in order.
//!
//! The data path run through [`Ordered`]: [`Dataset`] opens and indexes files (once a node, where several processes start
//! together), [`Batches`] makes the micro-batches of an epoch, [`Stream`] those of data that is too long or too fluid to
//! index. The output does not depend on the number of threads.

mod batches;
mod build;
mod dataset;
mod election;
mod ordered;
mod overlap;
mod quarantine;
mod stream;
mod window;

pub use batches::{BatchOptions, Batches, Batching, EpochPlans, NextBatch, Shape, StepBatch};
pub use build::Dedup;
pub use dataset::{Dataset, DatasetSpec, IndexOptions, MaxBadRows, OnBadRow, Origin};
pub use election::Progress;
pub use ordered::{Next, Ordered, PATIENCE, worker_panicked};
pub use overlap::Overlap;
pub use stream::SetPosition;
pub use window::{Stream, StreamOptions, StreamState};
