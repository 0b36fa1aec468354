//! Errors of the core as Python exceptions: one match, classes from `sftcore.errors`.

use pyo3::exceptions::{PyFileNotFoundError, PyKeyboardInterrupt, PyOSError, PyPermissionError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use sftcore::{Error, ErrorKind};

static ERRORS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error.kind {
        ErrorKind::Io(std::io::ErrorKind::NotFound) => {
            return PyFileNotFoundError::new_err(error.to_string());
        }
        ErrorKind::Io(std::io::ErrorKind::PermissionDenied) => {
            return PyPermissionError::new_err(error.to_string());
        }
        ErrorKind::Io(std::io::ErrorKind::Interrupted) => {
            return PyErr::take(py).unwrap_or_else(|| PyKeyboardInterrupt::new_err(()));
        }
        ErrorKind::Io(_) => return PyOSError::new_err(error.to_string()),
        ErrorKind::Row => "RowError",
        ErrorKind::Template => "TemplateError",
        ErrorKind::Tokenizer => "TokenizerError",
        ErrorKind::Config => "ConfigError",
    };
    build(py, class, error).unwrap_or_else(|failure| failure)
}

fn build(py: Python<'_>, class: &str, error: &Error) -> PyResult<PyErr> {
    let module = ERRORS.get_or_try_init(py, || py.import("sftcore.errors").map(Bound::unbind))?.bind(py);
    let place = PyDict::new(py);
    place.set_item("path", error.place.path.as_ref().map(|path| path.display().to_string()))?;
    place.set_item("line", error.place.line)?;
    place.set_item("column", error.place.column)?;
    place.set_item("pointer", error.place.pointer.as_deref())?;
    let exception = module.getattr(class)?.call((error.to_string(),), Some(&place))?;
    Ok(PyErr::from_value(exception))
}

/// Runs `work` without the GIL and converts its error.
pub(crate) fn enter_core<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> sftcore::Result<T> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|error| to_python(py, &error))
}
