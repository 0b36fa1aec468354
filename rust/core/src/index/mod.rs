//! What is known of each row before training: where it is, how long, how much of it is trained.
//!
//! Rows are parsed and encoded once to learn their lengths; the tokens are not kept. Rows that the
//! truncation policy deletes and rows that are wrong get no record, but are counted in a [`SetReport`].

mod memo;
mod report;
mod row;
mod table;

pub use memo::{Index, remove_unused};
pub use report::{BadRow, SetReport, reason};
pub use row::{EncodedRow, IndexedRow, ShapedRows, ShapedSource, Verdict};
pub use table::{MAX_FILE_BYTES, Record, Table};
