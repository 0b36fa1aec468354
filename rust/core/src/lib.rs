//! The data path of sftcore: bytes on disk to exact, masked, padded batches.
//!
//! Each module is one stage and depends only on the ones after it in this list:
//! `pipeline > collate > plan > order > index > encode > template, tokenizer > conversation > source > error`.
//! `duplicates` stands alone: texts in, near-equal rows out.
//! Nothing here knows Python, the clock, the environment or a global; only `pipeline` starts threads.

pub mod collate;
pub mod conversation;
pub mod duplicates;
pub mod encode;
pub mod error;
pub mod index;
mod locate;
pub mod order;
pub mod pipeline;
pub mod plan;
pub mod pretrained;
pub mod source;
pub mod template;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Place, Result};
