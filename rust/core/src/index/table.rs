//! The records of all rows, in columns: 25 bytes a row.
//!
//! Rows stand in the order of the files. Which file a row is of follows from where each file's rows begin, and its
//! line is counted from a mark a few hundred rows before it, so neither is kept for each row.

use std::io::{Read, Write};

use xxhash_rust::xxh3::Xxh3;

/// One example: where its row stands and what it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// First byte of the row in its file; below 2^40.
    pub offset: u64,
    /// Bytes of the row.
    pub bytes: u32,
    /// Its tokens, after truncation.
    pub tokens: u32,
    /// Its trained tokens, after truncation.
    pub trained_tokens: u32,
    /// A hash of its ids, mask and weights.
    pub hash: u64,
}

/// A place from which lines can be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct LineMark {
    row: u32,
    offset: u64,
    line: u64,
}

/// Rows from one mark to the next.
const MARK_EVERY: u32 = 256;
/// A file has fewer bytes than this (one TiB).
pub const MAX_FILE_BYTES: u64 = 1 << 40;

/// The records of a data set.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Table {
    offsets_low: Vec<u32>,
    offsets_high: Vec<u8>,
    bytes: Vec<u32>,
    tokens: Vec<u32>,
    trained_tokens: Vec<u32>,
    hashes: Vec<u64>,
    /// The first row of each file; files without rows have that of the next one.
    first_rows: Vec<u32>,
    marks: Vec<LineMark>,
}

/// What is kept of a table beside its columns.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct TableHeader {
    rows: u32,
    first_rows: Vec<u32>,
    marks: Vec<LineMark>,
}

impl Table {
    /// Begins the rows of the next file.
    pub fn begin_file(&mut self) {
        self.first_rows.push(self.len());
    }

    /// Adds a row of the file begun last, whose first line is `line`.
    pub fn push(&mut self, record: Record, line: u64) {
        let row = self.len();
        let is_first = self.first_rows.last() == Some(&row);
        if is_first || row.is_multiple_of(MARK_EVERY) {
            self.marks.push(LineMark { row, offset: record.offset, line });
        }
        debug_assert!(record.offset < MAX_FILE_BYTES);
        let [b0, b1, b2, b3, b4, ..] = record.offset.to_le_bytes();
        self.offsets_low.push(u32::from_le_bytes([b0, b1, b2, b3]));
        self.offsets_high.push(b4);
        self.bytes.push(record.bytes);
        self.tokens.push(record.tokens);
        self.trained_tokens.push(record.trained_tokens);
        self.hashes.push(record.hash);
    }

    /// Gives back what the columns reserved for more rows.
    pub fn shrink(&mut self) {
        self.offsets_low.shrink_to_fit();
        self.offsets_high.shrink_to_fit();
        self.bytes.shrink_to_fit();
        self.tokens.shrink_to_fit();
        self.trained_tokens.shrink_to_fit();
        self.hashes.shrink_to_fit();
    }

    /// Number of rows; fewer than 2^32.
    pub fn len(&self) -> u32 {
        u32::try_from(self.tokens.len()).unwrap_or(u32::MAX)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The record of a row, which is below [`len`](Self::len).
    pub fn record(&self, row: u32) -> Record {
        let at = row as usize;
        Record {
            offset: u64::from(self.offsets_low[at]) | (u64::from(self.offsets_high[at]) << 32),
            bytes: self.bytes[at],
            tokens: self.tokens[at],
            trained_tokens: self.trained_tokens[at],
            hash: self.hashes[at],
        }
    }

    /// The tokens of each row.
    pub fn lengths(&self) -> &[u32] {
        &self.tokens
    }

    /// The trained tokens of a row.
    pub fn trained_tokens(&self, row: u32) -> u32 {
        self.trained_tokens[row as usize]
    }

    /// The hash of the example of a row.
    pub fn hash(&self, row: u32) -> u64 {
        self.hashes[row as usize]
    }

    /// The file of a row.
    pub fn file(&self, row: u32) -> usize {
        self.first_rows.partition_point(|&first| first <= row).saturating_sub(1)
    }

    /// The rows of a file.
    pub fn rows_of(&self, file: usize) -> std::ops::Range<u32> {
        let end = self.first_rows.get(file + 1).copied().unwrap_or(self.len());
        self.first_rows.get(file).copied().unwrap_or(end)..end
    }

    /// Which piece of its line in the file a row is; 0 unless rows are split.
    pub fn piece(&self, row: u32) -> usize {
        let (record, first) = (self.record(row), self.rows_of(self.file(row)).start);
        let same = (first..row).rev().take_while(|&before| self.record(before).offset == record.offset);
        same.count()
    }

    /// A place at or before a row of the same file, and its line.
    pub fn known_line(&self, row: u32) -> (u64, u64) {
        let after = self.marks.partition_point(|mark| mark.row <= row);
        // each file's first row has a mark
        self.marks.get(after.saturating_sub(1)).map_or((0, 1), |mark| (mark.offset, mark.line))
    }

    /// A hash of all examples and their order.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = Xxh3::new();
        for (hash, tokens) in self.hashes.iter().zip(&self.tokens) {
            hasher.update(&hash.to_le_bytes());
            hasher.update(&tokens.to_le_bytes());
        }
        hasher.digest()
    }

    pub(super) fn header(&self) -> TableHeader {
        TableHeader { rows: self.len(), first_rows: self.first_rows.clone(), marks: self.marks.clone() }
    }

    pub(super) fn write(&self, writer: &mut impl Write) -> std::io::Result<()> {
        for column in [&self.offsets_low, &self.bytes, &self.tokens, &self.trained_tokens] {
            for value in column {
                writer.write_all(&value.to_le_bytes())?;
            }
        }
        writer.write_all(&self.offsets_high)?;
        for hash in &self.hashes {
            writer.write_all(&hash.to_le_bytes())?;
        }
        Ok(())
    }

    pub(super) fn read(header: TableHeader, reader: &mut impl Read) -> std::io::Result<Self> {
        let rows = header.rows as usize;
        let offsets_low = read_column(reader, rows, u32::from_le_bytes)?;
        let bytes = read_column(reader, rows, u32::from_le_bytes)?;
        let tokens = read_column(reader, rows, u32::from_le_bytes)?;
        let trained_tokens = read_column(reader, rows, u32::from_le_bytes)?;
        let offsets_high = read_column(reader, rows, u8::from_le_bytes)?;
        let hashes = read_column(reader, rows, u64::from_le_bytes)?;
        let (first_rows, marks) = (header.first_rows, header.marks);
        Ok(Self { offsets_low, offsets_high, bytes, tokens, trained_tokens, hashes, first_rows, marks })
    }
}

/// Reads values a buffer at a time, so that a file that lies about its size takes no memory.
fn read_column<T, const N: usize>(
    reader: &mut impl Read,
    rows: usize,
    parse: impl Fn([u8; N]) -> T,
) -> std::io::Result<Vec<T>> {
    let mut values = Vec::new();
    let mut buffer = vec![0; N << 16];
    while values.len() < rows {
        let wanted = (rows - values.len()).min(1 << 16);
        let part = &mut buffer[..wanted * N];
        reader.read_exact(part)?;
        values.reserve_exact(if values.is_empty() { rows.min(1 << 28) } else { 0 });
        values.extend(part.as_chunks::<N>().0.iter().map(|bytes| parse(*bytes)));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(files: &[u32]) -> Table {
        let mut table = Table::default();
        let mut number = 0;
        for &rows in files {
            table.begin_file();
            for row in 0..rows {
                let offset = (1 << 39) + u64::from(row) * 100;
                number += 1;
                let record =
                    Record { offset, bytes: 90, tokens: number, trained_tokens: 1, hash: u64::from(number) };
                table.push(record, u64::from(row) + 1);
            }
        }
        table
    }

    #[test]
    fn a_row_is_found_in_its_file_with_a_line_before_it() {
        let table = table(&[3, 0, 1000, 2]);
        assert_eq!((table.file(2), table.file(3), table.file(1002), table.file(1003)), (0, 2, 2, 3));
        assert_eq!((table.rows_of(1), table.rows_of(2), table.rows_of(3)), (3..3, 3..1003, 1003..1005));
        assert_eq!(table.record(4).offset, (1 << 39) + 100);
        let (offset, line) = table.known_line(600);
        assert_eq!((offset - (1 << 39)) / 100 + 1, line);
        assert!(line <= 600 && line > 300);
        assert_eq!(table.known_line(1004), (1 << 39, 1));
    }

    #[test]
    fn pieces_of_one_line_are_numbered() {
        let mut table = Table::default();
        table.begin_file();
        for offset in [0, 50, 50, 50, 90] {
            table.push(Record { offset, bytes: 10, tokens: 1, trained_tokens: 1, hash: 1 }, 1);
        }
        assert_eq!((0..5).map(|row| table.piece(row)).collect::<Vec<_>>(), [0, 0, 1, 2, 0]);
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let table = table(&[70_000, 3]);
        let mut bytes = Vec::new();
        table.write(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 25 * 70_003);
        assert_eq!(Table::read(table.header(), &mut bytes.as_slice()).unwrap(), table);
        assert!(Table::read(table.header(), &mut &bytes[..1000]).is_err());
    }
}
