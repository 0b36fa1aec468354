//! A parquet file as JSON lines, a row a line.
//!
//! Columns keep the order and names of the file; lists, structs and maps are JSON, null stays null. What JSON has no word for
//! is a string that can be read: dates and times as ISO 8601, decimals with all digits, `NaN`, bytes as text where they are UTF-8
//! and else as `hex:…`. A small batch of rows is in memory at a time. The library panics on some broken files; a panic becomes an error.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::{SignedDuration, Timestamp, civil};
use parquet::basic::{LogicalType, TimeUnit};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Number, Value};

use super::decode::damage;
use crate::{Error, ErrorKind, Result};

/// Rows that the library decodes at a time.
const ROWS_PER_BATCH: usize = 64;
/// A message of the library may quote a whole value.
const MESSAGE_CHARACTERS: usize = 300;

/// Reads a parquet file as lines of JSON.
pub(super) struct ParquetLines {
    /// `None` after the last row and after an error.
    rows: Option<RowIter<'static>>,
    schema: TypePtr,
    /// Rows read.
    done: u64,
    num_rows: u64,
    file_bytes: u64,
    /// How much of the file was read, as the share of its rows.
    consumed: Arc<AtomicU64>,
    expected_bytes: u64,
    line: Vec<u8>,
    /// How much of the line was given.
    given: usize,
}

impl ParquetLines {
    pub(super) fn new(file: File, consumed: Arc<AtomicU64>) -> Result<Self> {
        let file_bytes = file
            .metadata()
            .map_err(|error| Error::new(ErrorKind::Io(error.kind()), error.to_string()))?
            .len();
        let open = |file| SerializedFileReader::new(file).map_err(|error| error.to_string());
        let reader = guarded(|| open(file)).map_err(|reason| {
            let message = format!(
                "not a whole parquet file ({reason}); it was cut off or is no parquet, fetch it again"
            );
            Error::new(ErrorKind::Row, message)
        })?;
        let metadata = reader.metadata();
        let schema = metadata.file_metadata().schema_descr().root_schema_ptr();
        let number = |number: i64| u64::try_from(number).unwrap_or_default();
        let num_rows = number(metadata.file_metadata().num_rows());
        let expected_bytes = metadata
            .row_groups()
            .iter()
            .fold(0_u64, |sum, group| sum.saturating_add(number(group.total_byte_size())));
        let rows = RowIter::from_file_into(Box::new(reader)).with_batch_size(ROWS_PER_BATCH);
        Ok(Self {
            rows: Some(rows),
            schema,
            done: 0,
            num_rows,
            file_bytes,
            consumed,
            expected_bytes,
            line: Vec::new(),
            given: 0,
        })
    }

    /// Bytes of the columns without compression, which is near what the lines take.
    pub(super) fn expected_bytes(&self) -> u64 {
        self.expected_bytes
    }

    /// The next row as a line; empty at the end.
    fn next_line(&mut self) -> io::Result<()> {
        self.line.clear();
        self.given = 0;
        let Some(rows) = &mut self.rows else { return Ok(()) };
        let next = guarded(|| rows.next().transpose().map_err(|error| error.to_string()));
        let row = match next {
            Ok(row) => row,
            Err(reason) => {
                self.rows = None;
                let message = format!("row {} of the parquet file cannot be read ({reason})", self.done + 1);
                return Err(damage(&message));
            }
        };
        let Some(row) = row else {
            self.rows = None;
            if self.done != self.num_rows {
                let (done, all) = (self.done, self.num_rows);
                return Err(damage(&format!("the parquet file promises {all} rows and has {done}")));
            }
            return Ok(());
        };
        self.done += 1;
        let written = object(&row, self.schema.get_fields())
            .and_then(|value| serde_json::to_vec(&value).map_err(|error| error.to_string()));
        match written {
            Ok(line) => self.line = line,
            Err(reason) => {
                self.rows = None;
                return Err(damage(&format!("row {} of the parquet file: {reason}", self.done)));
            }
        }
        self.line.push(b'\n');
        let share = u128::from(self.file_bytes) * u128::from(self.done) / u128::from(self.num_rows.max(1));
        self.consumed.store(u64::try_from(share).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }
}

impl Read for ParquetLines {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.given == self.line.len() {
            self.next_line()?;
        }
        let read = self.line.get(self.given..).unwrap_or_default().read(bytes)?;
        self.given += read;
        Ok(read)
    }
}

/// Runs `read` of the parquet library; its message, or that of its panic, is the error.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let result = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        Err(message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("the file is broken").to_owned())
    });
    result.map_err(|message| message.chars().take(MESSAGE_CHARACTERS).collect())
}

fn object(row: &Row, types: &[TypePtr]) -> Result<Value, String> {
    let mut object = Map::new();
    for (column, (name, field)) in row.get_column_iter().enumerate() {
        let value = value(field, types.get(column).map(AsRef::as_ref))?;
        if object.insert(name.clone(), value).is_some() {
            return Err(format!("there are two columns \"{name}\""));
        }
    }
    Ok(Value::Object(object))
}

/// The value of a field whose type in the schema is `schema`, where that is known.
fn value(field: &Field, schema: Option<&Type>) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => match timestamp_unit(schema) {
            Some(TimeUnit::NANOS) => instant(i128::from(*value), *value, schema),
            _ => (*value).into(),
        },
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        // the shortest decimal of the narrow float, not all digits of the wide one
        Field::Float16(value) => float(&value.to_f32().to_string()),
        Field::Float(value) => float(&value.to_string()),
        Field::Double(value) => float(&value.to_string()),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => hex(bytes.data()).into(),
        },
        Field::Decimal(_) => field.to_string().into(),
        Field::Date(days) => {
            let epoch = civil::date(1970, 1, 1);
            let date = epoch.checked_add(SignedDuration::from_hours(24 * i64::from(*days)));
            date.map_or_else(|_| (*days).into(), |date| date.to_string().into())
        }
        Field::TimeMillis(time) => time_of_day(i64::from(*time) * 1_000, i64::from(*time)),
        Field::TimeMicros(time) => time_of_day(*time, *time),
        Field::TimestampMillis(time) => instant(i128::from(*time) * 1_000_000, *time, schema),
        Field::TimestampMicros(time) => instant(i128::from(*time) * 1_000, *time, schema),
        Field::Group(row) => object(row, schema.map_or(&[], children))?,
        Field::ListInternal(list) => {
            let element = schema.map(element);
            list.elements().iter().map(|field| value(field, element)).collect::<Result<_, _>>()?
        }
        Field::MapInternal(map) => {
            let entry =
                schema.and_then(|schema| children(schema).first()).map_or(&[][..], |entry| children(entry));
            let mut object = Map::new();
            for (key, field) in map.entries() {
                let key = match value(key, entry.first().map(AsRef::as_ref))? {
                    Value::String(key) => key,
                    key => key.to_string(),
                };
                let value = value(field, entry.get(1).map(AsRef::as_ref))?;
                if object.insert(key.clone(), value).is_some() {
                    return Err(format!("a map has the key \"{key}\" twice"));
                }
            }
            Value::Object(object)
        }
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("hex:".to_owned(), |mut text, byte| {
        // writing to a string cannot fail
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn children(schema: &Type) -> &[TypePtr] {
    if schema.is_group() { schema.get_fields() } else { &[] }
}

/// The type of the elements of a list: below its repeated group, which has one child.
fn element(list: &Type) -> &Type {
    match children(list) {
        [repeated] => match children(repeated) {
            [element] => element,
            _ => repeated,
        },
        _ => list,
    }
}

fn float(text: &str) -> Value {
    text.parse().ok().and_then(Number::from_f64).map_or_else(|| text.into(), Value::Number)
}

fn timestamp_unit(schema: Option<&Type>) -> Option<TimeUnit> {
    match schema?.get_basic_info().logical_type_ref() {
        Some(LogicalType::Timestamp(timestamp)) => Some(timestamp.unit),
        _ => None,
    }
}

/// A time since 1970; the bare number where no calendar has it. Local times carry no `Z`.
fn instant(nanoseconds: i128, number: i64, schema: Option<&Type>) -> Value {
    let is_local = match schema.and_then(|schema| schema.get_basic_info().logical_type_ref()) {
        Some(LogicalType::Timestamp(timestamp)) => !timestamp.is_adjusted_to_u_t_c,
        _ => false,
    };
    let Ok(timestamp) = Timestamp::from_nanosecond(nanoseconds) else { return number.into() };
    let text = timestamp.to_string();
    if is_local { text.trim_end_matches('Z').into() } else { text.into() }
}

fn time_of_day(microseconds: i64, number: i64) -> Value {
    let time = civil::Time::midnight().checked_add(SignedDuration::from_micros(microseconds));
    time.map_or_else(|_| number.into(), |time| time.to_string().into())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int32Type, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    fn read(file: File) -> io::Result<String> {
        let mut text = String::new();
        let mut lines = ParquetLines::new(file, Arc::default()).map_err(|error| damage(&error.message))?;
        lines.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn rows_become_lines_with_readable_values() {
        let schema = "message rows {
            required binary text (UTF8); optional double score; required int32 day (DATE);
            required int64 at (TIMESTAMP(NANOS,false)); required int32 price (DECIMAL(5,2)); required binary raw;
            optional group turns (LIST) { repeated group list { optional binary element (UTF8); } }
        }";
        let mut file = tempfile::tempfile().unwrap();
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer =
            SerializedFileWriter::new(file.try_clone().unwrap(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut number = 0;
        while let Some(mut column) = group.next_column().unwrap() {
            let texts = |texts: &[&[u8]]| -> Vec<ByteArray> {
                texts.iter().map(|text| ByteArray::from(text.to_vec())).collect()
            };
            match number {
                0 => {
                    let values = texts(&[b"a\nb", "\u{e9}\"".as_bytes()]);
                    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap()
                }
                1 => column.typed::<DoubleType>().write_batch(&[f64::NAN], Some(&[1, 0]), None).unwrap(),
                2 => column.typed::<Int32Type>().write_batch(&[0, 19_723], None, None).unwrap(),
                3 => {
                    let values = [0, 1_704_067_200_000_000_001];
                    column.typed::<Int64Type>().write_batch(&values, None, None).unwrap()
                }
                4 => column.typed::<Int32Type>().write_batch(&[12_345, -5], None, None).unwrap(),
                5 => {
                    let values = texts(&[b"plain", &[0xFF, 0]]);
                    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap()
                }
                _ => column
                    .typed::<ByteArrayType>()
                    .write_batch(&texts(&[b"x"]), Some(&[3, 2, 0]), Some(&[0, 1, 0]))
                    .unwrap(),
            };
            column.close().unwrap();
            number += 1;
        }
        group.close().unwrap();
        writer.close().unwrap();
        file.rewind().unwrap();
        let expected = "{\"text\":\"a\\nb\",\"score\":\"NaN\",\"day\":\"1970-01-01\",\"at\":\"1970-01-01T00:00:00\",\
            \"price\":\"123.45\",\"raw\":\"plain\",\"turns\":[\"x\",null]}\n\
            {\"text\":\"\u{e9}\\\"\",\"score\":null,\"day\":\"2024-01-01\",\"at\":\"2024-01-01T00:00:00.000000001\",\
            \"price\":\"-0.05\",\"raw\":\"hex:ff00\",\"turns\":null}\n";
        assert_eq!(read(file.try_clone().unwrap()).unwrap(), expected);
        // any byte of the file may be wrong: rows or an error, never a panic
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            let mut broken = tempfile::tempfile().unwrap();
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            broken.write_all(&damaged).unwrap();
            let _ = read(broken);
        }
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"PAR1\x15\x04PAR1").unwrap();
        assert!(read(file).unwrap_err().to_string().contains("not a whole parquet file"));
    }
}
