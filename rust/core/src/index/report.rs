//! What the rows of each data set came to, and the rows that are wrong.

use serde::{Deserialize, Serialize};

use crate::template::Lost;
use crate::{Error, ErrorKind, Place};

/// What the rows of one data set came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetReport {
    /// Its name, or the path it was given by.
    pub name: String,
    /// Files read.
    pub files: u64,
    /// Rows found.
    pub rows: u64,
    /// Examples that are trained: rows, or their pieces, after all that is left out.
    pub examples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their trained tokens.
    pub trained_tokens: u64,
    /// Tokens of the longest.
    pub longest: u64,
    /// Rows deleted for being over `max_length`.
    pub deleted: u64,
    /// The first of them, as `file:line`.
    pub first_deleted: Option<String>,
    /// Rows cut to `max_length`.
    pub truncated: u64,
    /// The first of them.
    pub first_truncated: Option<String>,
    /// Rows over `max_length` that became several examples.
    pub split: u64,
    /// The first of them.
    pub first_split: Option<String>,
    /// Pieces of these rows that had nothing to train and are left out.
    pub untrained_pieces: u64,
    /// Rows without a trained token.
    pub untrained: u64,
    /// Rows left out because the chat template leaves out some of what they say.
    pub lossy: u64,
    /// What the chat template leaves out of the rows, by kind.
    pub lost: Vec<LostCount>,
    /// Trained turns that no token ends.
    pub endless_turns: u64,
    /// The first row with one.
    pub first_endless: Option<String>,
    /// Rows that are wrong, those without a trained token among them.
    pub bad: u64,
    /// Rows whose tools the chat template does not render.
    pub tools_not_rendered: u64,
    /// Control tokens inside the contents of messages, over all examples.
    pub control_tokens_in_content: u64,
    /// Examples left out because an equal one comes before.
    pub duplicates: u64,
    /// Examples left out because one that is nearly equal comes before.
    pub near_duplicates: u64,
    /// Examples not drawn by a `#N` suffix.
    pub not_drawn: u64,
    /// What else a user should know, once a file.
    pub notes: Vec<String>,
}

/// One kind of what a chat template leaves out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostCount {
    /// What it is, as `reasoning of assistant`.
    pub kind: String,
    /// How many there are.
    pub count: u64,
    /// Rows that have one.
    pub rows: u64,
    /// The first row, as `file:line`.
    pub first: Option<String>,
}

impl SetReport {
    /// Counts what one row loses.
    pub fn count_lost(&mut self, lost: &[Lost], place: impl Fn() -> Option<String>) {
        let mut kinds: Vec<String> = Vec::new();
        for lost in lost {
            let kind = lost.kind();
            let is_new = !kinds.contains(&kind);
            let count = self.lost_count(&kind);
            count.count += 1;
            count.rows += u64::from(is_new);
            if count.first.is_none() {
                count.first = place();
            }
            kinds.push(kind);
        }
    }

    fn lost_count(&mut self, kind: &str) -> &mut LostCount {
        let known = self.lost.iter().position(|count| count.kind == kind);
        let place = known.unwrap_or_else(|| {
            self.lost.push(LostCount { kind: kind.to_owned(), ..LostCount::default() });
            self.lost.len() - 1
        });
        &mut self.lost[place]
    }

    /// Adds the counts of `other`; the name stays.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in [
            (&mut self.files, other.files),
            (&mut self.rows, other.rows),
            (&mut self.examples, other.examples),
            (&mut self.tokens, other.tokens),
            (&mut self.trained_tokens, other.trained_tokens),
            (&mut self.deleted, other.deleted),
            (&mut self.truncated, other.truncated),
            (&mut self.split, other.split),
            (&mut self.untrained_pieces, other.untrained_pieces),
            (&mut self.untrained, other.untrained),
            (&mut self.lossy, other.lossy),
            (&mut self.endless_turns, other.endless_turns),
            (&mut self.bad, other.bad),
            (&mut self.tools_not_rendered, other.tools_not_rendered),
            (&mut self.control_tokens_in_content, other.control_tokens_in_content),
            (&mut self.duplicates, other.duplicates),
            (&mut self.near_duplicates, other.near_duplicates),
            (&mut self.not_drawn, other.not_drawn),
        ] {
            *sum += count;
        }
        self.longest = self.longest.max(other.longest);
        for (first, found) in [
            (&mut self.first_deleted, &other.first_deleted),
            (&mut self.first_truncated, &other.first_truncated),
            (&mut self.first_split, &other.first_split),
            (&mut self.first_endless, &other.first_endless),
        ] {
            if first.is_none() {
                first.clone_from(found);
            }
        }
        for other in &other.lost {
            let count = self.lost_count(&other.kind);
            count.count += other.count;
            count.rows += other.rows;
            if count.first.is_none() {
                count.first.clone_from(&other.first);
            }
        }
        self.notes.extend(other.notes.iter().cloned());
    }
}

/// A row that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRow {
    /// Its file, by number.
    pub file: u32,
    /// Its first byte.
    pub offset: u64,
    /// Its bytes; 0 where the row cannot be told from what follows.
    pub bytes: u64,
    /// The place in the file.
    pub line: u64,
    /// The column, where one is known.
    pub column: Option<u64>,
    /// The JSON pointer into the row.
    pub pointer: Option<String>,
    /// What is wrong with it and what to do.
    pub message: String,
    /// The template refused it, rather than its form being wrong.
    pub is_template: bool,
}

impl BadRow {
    /// The error that the row is.
    pub fn error(&self, path: &std::path::Path) -> Error {
        Error {
            kind: if self.is_template { ErrorKind::Template } else { ErrorKind::Row },
            place: Place {
                path: Some(path.to_path_buf()),
                line: Some(self.line),
                column: self.column,
                pointer: self.pointer.clone(),
            },
            message: self.message.clone(),
        }
    }
}

/// What a message says, without its numbers, quotes and remedy: rows that are wrong in one way share it.
pub fn reason(message: &str) -> String {
    let finding = message.split("; ").next().unwrap_or(message);
    let mut reason = String::with_capacity(finding.len());
    let mut in_quotes = false;
    for character in finding.chars() {
        in_quotes ^= character == '"';
        if character.is_ascii_digit() && !in_quotes {
            if !reason.ends_with('N') {
                reason.push('N');
            }
        } else {
            reason.push(character);
        }
    }
    if reason.chars().count() > 120 {
        reason = reason.chars().take(119).collect();
        reason.push('…');
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_wrong_in_one_way_share_a_reason() {
        let one =
            reason("messages[3] has no \"content\" (found keys: role, value); rename the key to content");
        let other =
            reason("messages[12] has no \"content\" (found keys: role, value); rename the key to content");
        assert_eq!(one, "messages[N] has no \"content\" (found keys: role, value)");
        assert_eq!(one, other);
        assert_eq!(reason("cutting 913 tokens to max_length 512 leaves no trained token; x"), {
            "cutting N tokens to max_length N leaves no trained token"
        });
    }
}
