//! One error type for the whole data path.
//!
//! An error says where it happened (file, line, column, JSON pointer), what was found, what was
//! expected and what to do. The first three live in [`Place`], the rest in the message.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of every fallible function of the data path.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong; the binding maps each kind to one Python exception class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A row of a data file is wrong.
    Row,
    /// A chat template does not compile, refuses a conversation, or cannot be followed.
    Template,
    /// A tokenizer file cannot be read or does not fit.
    Tokenizer,
    /// A setting is out of range or contradicts another one.
    Config,
    /// The operating system said no.
    Io(std::io::ErrorKind),
}

/// Where an error happened. Lines and columns count from 1, columns in characters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The file, where there is one.
    pub path: Option<PathBuf>,
    /// Line in the file, or in the row where there is no file.
    pub line: Option<u64>,
    /// Column in that line.
    pub column: Option<u64>,
    /// JSON pointer into the row (RFC 6901).
    pub pointer: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        match (&self.path, self.line) {
            (Some(path), _) => parts.push(path.display().to_string()),
            (None, Some(_)) => parts.push("row".to_owned()),
            (None, None) => {}
        }
        parts.extend(self.line.map(|line| line.to_string()));
        parts.extend(self.column.map(|column| column.to_string()));
        f.write_str(&parts.join(":"))
    }
}

/// An error of the data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What kind of thing went wrong.
    pub kind: ErrorKind,
    /// Where.
    pub place: Place,
    /// What was found, what was expected, what to do; lower case, no full stop.
    pub message: String,
}

impl Error {
    /// An error of `kind` without a place.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, place: Place::default(), message: message.into() }
    }

    /// A row error at a JSON pointer.
    pub fn row(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(ErrorKind::Row, message);
        error.place.pointer = Some(pointer.into());
        error
    }

    /// An error of the operating system about `path`.
    pub fn io(path: &Path, source: &std::io::Error) -> Self {
        Self::new(ErrorKind::Io(source.kind()), source.to_string()).in_file(path)
    }

    /// The same error, in the file `path`, where no file is known yet.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Self {
        self.place.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// The same error, on `line`, where no line is known yet.
    #[must_use]
    pub fn on_line(mut self, line: u64) -> Self {
        self.place.line.get_or_insert(line);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place.to_string();
        if !place.is_empty() {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
