//! `sftcore._core`: the Python face of the data path.
//!
//! No logic lives here: arguments are extracted, the core is called without the GIL, results are
//! converted. Arrays move into numpy without a copy.

#![expect(clippy::needless_pass_by_value, reason = "pyo3 hands over owned arguments")]

mod encoder;
mod errors;
mod loader;
mod stream;
mod template;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::encoder::{Encoder, Example};
    #[pymodule_export]
    use super::loader::{Batches, Dataset, RowSets};
    #[pymodule_export]
    use super::stream::Stream;
    #[pymodule_export]
    use super::template::Template;

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
