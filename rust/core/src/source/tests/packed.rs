//! Files that are unpacked before they are read.

use std::time::{Duration, SystemTime};

use serde_json::json;

use super::*;

fn open_in(path: &Path, folder: &UnpackFolder) -> Result<Source> {
    Source::open(path, &FilePool::default(), Some(folder), &mut |_, _| Ok(()))
}

#[test]
fn every_text_kind_is_the_same_when_packed() {
    let folder = Folder::new();
    let cases = [
        ("a.jsonl", "{\"a\": 1}\r\n\n{\"a\": 2}".to_owned()),
        ("a.json", "[{\"a\": 1},\n{\"a\": 2}]".to_owned()),
        ("b.json", "{\n\"a\": 1}".to_owned()),
        ("a.csv", "q,r\n1,\"2\n3\"\n".to_owned()),
        ("a.tsv", "q\tr\n1\t2\n".to_owned()),
        ("a.txt", "one\n two\n".to_owned()),
        ("a.ndjson", lines(50_000)),
    ];
    for (name, text) in cases {
        let plain = open(&folder.write(name, &text)).unwrap();
        for (extension, packed) in [("gz", gzip(text.as_bytes())), ("zst", zstd(text.as_bytes()))] {
            let path = folder.write(&format!("{name}.{extension}"), &packed);
            // the bytes decide, so a name without the extension will do
            let renamed = folder.write(&format!("{extension}-{name}"), &packed);
            for source in [open(&path), open_in(&path, &folder.unpack()), open(&renamed)] {
                let source = source.unwrap();
                assert_eq!(source.layout(), plain.layout());
                assert_eq!(source.bytes(), plain.bytes());
                assert_eq!(source.damage(), None);
                assert_eq!(values(&source), values(&plain), "{}", source.path().display());
            }
        }
        let lying = folder.write(&format!("plain-{name}.gz"), &text);
        assert_eq!(values(&open(&lying).unwrap()), values(&plain));
    }
}

#[test]
fn streams_after_each_other_are_one_text() {
    let folder = Folder::new();
    let text = lines(3000);
    let (first, second) = text.as_bytes().split_at(text.len() / 2);
    let join = |parts: [Vec<u8>; 3]| parts.concat();
    let gzipped = folder.write("a.jsonl.gz", join([gzip(first), gzip(b""), gzip(second)]));
    let padded = folder.write("b.jsonl.gz", join([gzip(first), gzip(second), vec![0; 700_000]]));
    // a frame of 3 bytes that is to be skipped
    let skipped = b"\x5A\x2A\x4D\x18\x03\0\0\0abc".to_vec();
    let framed = folder.write("a.jsonl.zst", join([skipped, zstd(first), zstd(second)]));
    for path in [gzipped, padded, framed] {
        let source = open(&path).unwrap();
        assert_eq!((source.damage(), values(&source).len()), (None, 3000), "{}", path.display());
    }
}

#[test]
fn a_file_is_unpacked_once_and_again_when_it_changes() {
    let folder = Folder::new();
    let unpack = folder.unpack();
    let path = folder.write("a.jsonl.gz", gzip(lines(20).as_bytes()));
    let mut calls = Vec::new();
    let mut record = |done, all| {
        calls.push((done, all));
        Ok(())
    };
    Source::open(&path, &FilePool::default(), Some(&unpack), &mut record).unwrap();
    let packed_bytes = std::fs::metadata(&path).unwrap().len();
    assert_eq!(calls.last(), Some(&(packed_bytes, packed_bytes)));
    let names = folder.unpacked();
    assert_eq!(names.len(), 1);
    let unpacked = unpack.0.join(&names[0]);
    let long_ago = SystemTime::now() - Duration::from_secs(40 * 24 * 3600);
    std::fs::File::options().write(true).open(&unpacked).unwrap().set_modified(long_ago).unwrap();
    let again =
        Source::open(&path, &FilePool::default(), Some(&unpack), &mut |_, _| panic!("unpacked twice"));
    assert_eq!(values(&again.unwrap()).len(), 20);
    // it was used, so it is young again
    assert!(std::fs::metadata(&unpacked).unwrap().modified().unwrap() > long_ago);
    std::fs::write(&path, gzip(lines(21).as_bytes())).unwrap();
    assert_eq!(values(&open_in(&path, &unpack).unwrap()).len(), 21);
    assert_eq!(folder.unpacked().len(), 2);
    // one that is missing or broken is made again
    for name in folder.unpacked() {
        std::fs::write(unpack.0.join(name), "broken").unwrap();
    }
    assert_eq!(values(&open_in(&path, &unpack).unwrap()).len(), 21);
}

#[test]
fn what_was_not_used_for_long_is_removed_when_another_is_written() {
    let folder = Folder::new();
    let unpack = folder.unpack();
    std::fs::create_dir(&unpack.0).unwrap();
    for (name, days) in [("old.rows", 31), ("young.rows", 29), ("killed.unfinished", 2), ("other.txt", 99)] {
        let file = std::fs::File::create(unpack.0.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(days * 24 * 3600)).unwrap();
    }
    open_in(&folder.write("a.txt.zst", zstd(b"one")), &unpack).unwrap();
    let names = folder.unpacked();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(!names.iter().any(|name| name == "old.rows" || name == "killed.unfinished"), "{names:?}");
}

#[test]
fn an_error_of_the_progress_stops_the_unpacking_and_leaves_nothing() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl.gz", gzip(lines(20).as_bytes()));
    let stop = || Err(Error::new(ErrorKind::Config, "stopped"));
    let found = Source::open(&path, &FilePool::default(), Some(&folder.unpack()), &mut |_, _| stop());
    assert_eq!(found.unwrap_err().message, "stopped");
    assert_eq!(folder.unpacked(), [""; 0]);
}

#[test]
fn rows_before_the_damage_are_served() {
    let folder = Folder::new();
    let text = lines(30_000);
    let break_off = |packed: &[u8]| packed[..packed.len() / 2].to_vec();
    let spoil = |mut packed: Vec<u8>| {
        let middle = packed.len() / 2;
        packed[middle..middle + 64].fill(0xA5);
        packed
    };
    let (gz, zst) = (gzip(text.as_bytes()), zstd(text.as_bytes()));
    let cases = [
        ("a.jsonl.gz", break_off(&gz), "the gzip stream breaks off at byte"),
        ("b.jsonl.gz", spoil(gz.clone()), "gzip"),
        ("a.jsonl.zst", break_off(&zst), "the zstd stream breaks off at byte"),
        ("b.jsonl.zst", spoil(zst), "zstd"),
        ("c.jsonl.gz", [&gz[..], b"junk"].concat(), "is not gzip"),
    ];
    for (name, packed, expected) in cases {
        let path = folder.write(name, packed);
        // the second time the damage is read from the unpack folder
        for source in [open(&path), open_in(&path, &folder.unpack()), open_in(&path, &folder.unpack())]
            .map(|s| s.unwrap())
        {
            let damage = source.damage().unwrap().to_string();
            assert!(damage.contains(name) && damage.contains(expected), "{damage}");
            let good: Vec<_> =
                spans(&source).into_iter().map(|span| source.read(span.unwrap()).unwrap()).collect();
            assert!(damage.contains(&format!("; {} rows before it can be read", good.len())), "{damage}");
            if name.starts_with('b') {
                continue;
            }
            assert!(good.len() > 5_000, "{}", good.len());
            for (row, line) in good.iter().zip(text.lines()) {
                assert_eq!(row, line.as_bytes());
            }
        }
    }
}

#[test]
fn a_wrong_checksum_is_damage_of_all_its_rows() {
    let folder = Folder::new();
    let mut packed = gzip(lines(100).as_bytes());
    let crc = packed.len() - 8;
    packed[crc] ^= 1;
    let start = gzip(b"{}\n").len();
    let source = open(&folder.write("a.jsonl.gz", [gzip(b"{}\n"), packed].concat())).unwrap();
    let damage = source.damage().unwrap().to_string();
    assert!(damage.contains(&format!("the checksum of the gzip stream from byte {start} to")), "{damage}");
    assert!(damage.contains("; 101 rows"), "{damage}");
    assert_eq!(values(&source).len(), 101);
    let mut packed = zstd(lines(100).as_bytes());
    let last = packed.len() - 1;
    packed[last] ^= 1;
    let source = open(&folder.write("a.jsonl.zst", packed)).unwrap();
    assert!(source.damage().unwrap().message.contains("checksum"), "{:?}", source.damage());
}

#[test]
fn the_row_that_is_cut_is_not_served() {
    let folder = Folder::new();
    for (name, text, whole) in [
        ("a.jsonl.gz", "{\"a\": 1}\n{\"a\": 2}\n{\"a\": 3", 2),
        ("b.jsonl.gz", "{\"a\": 1}\n{\"a\": 2}\n", 2),
        ("a.json.gz", "[{\"a\": 1}, {\"a\": 2}, {\"a\": ", 2),
        ("b.json.gz", "{\n\"a\": 1,", 0),
        ("a.csv.gz", "a,b\n1,2\n3,\"4\n", 1),
        ("b.csv.gz", "a,b\n1,2\n3,4", 1),
        ("c.csv.gz", "a,\"b", 0),
        ("a.txt.gz", "one\ntwo\nthr", 2),
        ("b.txt.gz", "one\n  ", 1),
    ] {
        // all of the text is there, the end of the stream is not
        let mut packed = gzip(text.as_bytes());
        packed.truncate(packed.len() - 8);
        let source = open(&folder.write(name, packed)).unwrap();
        assert_eq!(values(&source).len(), whole, "{name}");
        assert!(source.damage().unwrap().message.contains(&format!("; {whole} rows")), "{name}");
    }
}

#[test]
fn a_stream_that_never_ends_is_unpacked_a_little_at_a_time() {
    use std::io::{Read, Write};
    let folder = Folder::new();
    // 512 MiB of one line in half a MiB
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::copy(&mut io::repeat(b'a').take(512 << 20), &mut encoder).unwrap();
    encoder.write_all(b"\nlast").unwrap();
    let path = folder.write("a.txt.gz", encoder.finish().unwrap());
    let (stream, layout) = open_stream(&path).unwrap();
    let mut reader = RowReader::new(stream, layout);
    assert!(reader.next().unwrap().unwrap_err().message.contains("a row of more than 256 MiB"));
    assert_eq!(reader.next().unwrap().unwrap().1, b"last");
}

#[test]
fn packed_twice_is_an_error() {
    let folder = Folder::new();
    let error = open(&folder.write("a.jsonl.gz", gzip(&gzip(b"{}")))).unwrap_err().to_string();
    assert!(error.contains("a.jsonl.gz: the file holds a gzip stream"), "{error}");
}

#[test]
fn parquet_is_read_by_position_as_rows() {
    let folder = Folder::new();
    for (name, text) in [("a.parquet", parquet(3)), ("a.json", parquet(3)), ("a.csv", parquet(3))] {
        let source = open_in(&folder.write(name, text), &folder.unpack()).unwrap();
        assert_eq!(source.layout(), Layout::JsonLines);
        let expected =
            [1, 2, 3].map(|row: u64| (row, json!({"row": row - 1, "text": format!("t{}", row - 1)})));
        assert_eq!(values(&source), expected, "{name}");
    }
    let whole = parquet(3);
    let cut = open(&folder.write("b.parquet", &whole[..whole.len() - 20])).unwrap_err().to_string();
    assert!(cut.contains("b.parquet: the parquet file has no end"), "{cut}");
    let other = open(&folder.write("c.parquet", "{\"a\": 1}\n")).unwrap_err().to_string();
    assert!(other.contains("c.parquet: the file is named .parquet but begins with"), "{other}");
}

#[test]
fn parquet_rows_before_the_damage_are_served() {
    let folder = Folder::new();
    let mut bytes = parquet(20_000);
    // the pages of the first group of rows stay whole
    let at = bytes.len() * 3 / 4;
    bytes[at..at + 2000].fill(0xFF);
    let source = open(&folder.write("a.parquet", bytes)).unwrap();
    let damage = source.damage().unwrap().to_string();
    assert!(damage.contains("of the parquet file cannot be read"), "{damage}");
    let num_rows = values(&source).len();
    assert!((10_000..20_000).contains(&num_rows), "{num_rows}");
    assert!(damage.contains(&format!("; {num_rows} rows before it can be read")), "{damage}");
}

/// A parquet file of two columns, in two groups of rows.
pub(super) fn parquet(num_rows: i64) -> Vec<u8> {
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;
    let schema = "message rows { required int64 row; required binary text (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties.into()).unwrap();
    for numbers in [0..num_rows / 2, num_rows / 2..num_rows] {
        let mut group = writer.next_row_group().unwrap();
        let numbers: Vec<i64> = numbers.collect();
        let texts: Vec<_> =
            numbers.iter().map(|number| ByteArray::from(format!("t{number}").into_bytes())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}
