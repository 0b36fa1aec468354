//! Files that are read as they are.

use std::io::{BufReader, Read};

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Text and line of each row, with a buffer of so many bytes.
fn chunked(text: &str, layout: Layout, buffer: usize) -> Vec<(String, u64)> {
    let spans = RowSpans::new(BufReader::with_capacity(buffer, text.as_bytes()), layout);
    let text_of = |span: RowSpan| {
        let start = usize::try_from(span.offset).unwrap();
        text[start..start + usize::try_from(span.bytes).unwrap()].to_owned()
    };
    let found: Vec<_> = spans.map(|span| span.unwrap()).map(|span| (text_of(span), span.line)).collect();
    let reader = RowReader::new(BufReader::with_capacity(buffer, text.as_bytes()), layout);
    let read: Vec<_> = reader.map(|row| row.unwrap()).collect();
    let read: Vec<_> =
        read.into_iter().map(|(span, bytes)| (String::from_utf8(bytes).unwrap(), span.line)).collect();
    assert_eq!(found, read);
    found
}

fn assert_rows(text: &str, layout: Layout, expected: &[(&str, u64)]) {
    for buffer in [1, 2, 3, 4, 5, 6, 7, 4096] {
        let found = chunked(text, layout, buffer);
        let found: Vec<_> = found.iter().map(|(row, line)| (row.as_str(), *line)).collect();
        assert_eq!(found, expected, "buffer of {buffer}");
    }
}

const CSV: Layout = Layout::Csv { delimiter: b',' };

#[test]
fn any_chunking_gives_the_same_lines() {
    let text = "\u{feff}{\"a\": 1}\r\n\n  {\"b\": \"é\"}  \n{\"c\": 3}";
    assert_rows(text, Layout::JsonLines, &[("{\"a\": 1}", 1), ("{\"b\": \"é\"}", 3), ("{\"c\": 3}", 4)]);
}

#[test]
fn a_line_of_text_keeps_its_white_space_and_loses_its_line_break() {
    assert_rows("  a \r\n \r\n\n\tb\nc\r", Layout::TextLines, &[("  a ", 1), ("\tb", 4), ("c", 5)]);
}

#[test]
fn a_text_that_begins_like_a_byte_order_mark_keeps_its_first_letter() {
    // U+FEC1 is EF BB 81, the mark is EF BB BF
    assert_rows("\u{fec1}\nb", Layout::TextLines, &[("\u{fec1}", 1), ("b", 2)]);
    assert_rows("\u{feff}", Layout::TextLines, &[]);
}

#[test]
fn any_chunking_gives_the_same_array_elements() {
    let text = " [\n {\"a\": \"x],{\\\"\"},\n\n[1, [2]] , 7, \"s\\\\\"]\n";
    let expected = [("{\"a\": \"x],{\\\"\"}", 2), ("[1, [2]]", 4), ("7", 4), ("\"s\\\\\"", 4)];
    assert_rows(text, Layout::JsonArray, &expected);
    assert_rows("[]", Layout::JsonArray, &[]);
}

#[test]
fn any_chunking_gives_the_same_records() {
    let text =
        "\u{feff}a,b\r\n\r\n1,\"x\r\ny\"\r\n\n\"q\"\"uote\",\"\"\n5\" pipe,\u{feff}\"z\"\n\u{feff}\"m\",n";
    let expected = [
        ("1,\"x\r\ny\"", 3),
        ("\"q\"\"uote\",\"\"", 6),
        ("5\" pipe,\u{feff}\"z\"", 7),
        ("\u{feff}\"m\",n", 8),
    ];
    assert_rows(text, CSV, &expected);
    assert_rows("a,b\n", CSV, &[]);
}

proptest! {
    #[test]
    fn any_chunking_of_any_bytes_gives_the_same(
        bytes in proptest::collection::vec(prop_oneof![
            Just(b'\n'), Just(b'\r'), Just(b'"'), Just(b','), Just(b'['), Just(b']'), Just(b'{'), Just(b'}'), Just(b'\\'),
            Just(0), Just(b' '), Just(0xEF), Just(0xBB), Just(0xBF), Just(b'a'), any::<u8>(),
        ], 0..60),
        buffer in 1_usize..8,
    ) {
        for layout in [Layout::JsonLines, Layout::JsonArray, Layout::JsonDocument, Layout::TextLines, CSV] {
            let whole: Vec<_> = RowSpans::new(&bytes[..], layout).collect();
            let parts: Vec<_> = RowSpans::new(BufReader::with_capacity(buffer, &bytes[..]), layout).collect();
            prop_assert_eq!(&whole, &parts);
            let mut reader = RowReader::new(BufReader::with_capacity(buffer, &bytes[..]), layout);
            for span in whole {
                let row = reader.next().unwrap();
                prop_assert_eq!(row.clone().map(|(span, _)| span), span);
                if let Ok((span, row)) = row {
                    let start = usize::try_from(span.offset).unwrap();
                    prop_assert_eq!(&row[..], &bytes[start..start + row.len()]);
                    prop_assert_eq!(row.len() as u64, span.bytes);
                    if let Ok(parser) = reader.parser() {
                        let _ = parser.parse(&row, span);
                    }
                }
            }
            prop_assert!(reader.next().is_none());
        }
        // no bytes make the search for the layout panic
        for format in [Format::Json, Format::JsonLines, Format::Csv] {
            let _ = layout::find(BufReader::with_capacity(buffer, &bytes[..]), format);
        }
    }

    #[test]
    fn fields_of_a_record_are_what_was_written(
        fields in proptest::collection::vec("[a\",\r\né\u{feff}]{0,6}", 2..5),
        buffer in 1_usize..8,
    ) {
        let header: Vec<_> = (0..fields.len()).map(|column| format!("c{column}")).collect();
        let quoted: Vec<_> = fields.iter().map(|field| format!("\"{}\"", field.replace('"', "\"\""))).collect();
        let text = format!("{}\n{}\n", header.join(","), quoted.join(","));
        let mut reader = RowReader::new(BufReader::with_capacity(buffer, text.as_bytes()), CSV);
        let (span, bytes) = reader.next().unwrap().unwrap();
        let value = reader.parser().unwrap().parse(&bytes, span).unwrap();
        let found: Vec<_> = header.iter().map(|name| value[name].as_str().unwrap().to_owned()).collect();
        prop_assert_eq!(found, fields);
        prop_assert!(reader.next().is_none());
    }
}

#[test]
fn an_array_that_is_wrong_ends_with_an_error() {
    let cases = [
        ("[{\"a\": 1}", "cut off"),
        ("[{\"a\": \"b", "cut off"),
        ("[", "cut off"),
        ("[{\"a\": 1},", "cut off"),
        ("[1,]", "found ]"),
        ("[1 2]", "1"),
        ("[{} {}]", "expected , or ]"),
        ("[{}] {}", "text after"),
        ("[{},\0\0\0", "not written whole"),
    ];
    for (text, expected) in cases {
        let mut spans = RowSpans::new(text.as_bytes(), Layout::JsonArray);
        let last = spans.by_ref().last().unwrap();
        match last {
            Err(error) => assert!(error.message.contains(expected), "{text}: {error}"),
            // what is inside an element is for the parser to refuse
            Ok(span) => assert_eq!((text, span.bytes), ("[1 2]", 3)),
        }
        assert!(spans.next().is_none());
    }
}

#[test]
fn layouts_are_told_by_the_first_bytes() {
    let folder = Folder::new();
    let message = "{\"role\": \"user\", \"content\": \"a\"}";
    let cases = [
        ("a.json", "[{\"a\": 1}]".to_owned(), Layout::JsonArray),
        ("a.jsonl", "\n [\n{\"a\": 1}]".to_owned(), Layout::JsonArray),
        ("a.json", "[[1], [2]]".to_owned(), Layout::JsonArray),
        ("a.json", format!("[{message}]\n[{message}, {message}]\n"), Layout::JsonLines),
        ("a.json", format!("[{{\"from\": \"web\", \"messages\": [{message}]}}]"), Layout::JsonArray),
        ("a.json", format!("[\n{message},\n{message}\n]"), Layout::JsonDocument),
        ("a.json", "{\"a\": 1}\n{\"a\": 2}".to_owned(), Layout::JsonLines),
        ("a.json", "{\n\"a\": \"}\"\n}".to_owned(), Layout::JsonDocument),
        ("a.jsonl", "{\n\"a\": 1\n}".to_owned(), Layout::JsonLines),
        ("a.json", "{\"a\": \"b\n{}".to_owned(), Layout::JsonLines),
        ("a.csv", "a,b\n".to_owned(), Layout::Csv { delimiter: b',' }),
        ("a.csv", "a\n".to_owned(), Layout::Csv { delimiter: b',' }),
        ("a.csv", "a;b\n1,5;2\n".to_owned(), Layout::Csv { delimiter: b';' }),
        ("a.csv", "\"a;b\",c\n".to_owned(), Layout::Csv { delimiter: b',' }),
        ("a.tsv", "a,b\tc\n".to_owned(), Layout::Csv { delimiter: b'\t' }),
        ("a.txt", "[1]".to_owned(), Layout::TextLines),
        ("a.jsonl", String::new(), Layout::JsonLines),
    ];
    for (name, text, expected) in cases {
        assert_eq!(open(&folder.write(name, &text)).unwrap().layout(), expected, "{name}: {text}");
    }
}

#[test]
fn files_without_rows_have_none() {
    let folder = Folder::new();
    for name in ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.csv.zst"] {
        for text in ["", "\n\n\r\n\n", "\u{feff}"] {
            assert_eq!(values(&open(&folder.write(name, text)).unwrap()), [], "{name}: {text:?}");
        }
    }
    assert_eq!(values(&open(&folder.write("a.csv", "query,response\r\n")).unwrap()), []);
}

#[test]
fn values_carry_lines_and_errors_carry_file_and_line() {
    let folder = Folder::new();
    let source = open(&folder.write("a.jsonl", "{\"a\": 1}\n\n{\"a\": }\n{\"a\": 3}")).unwrap();
    let found = rows(&source);
    assert_eq!(found[0], Ok((1, json!({"a": 1}))));
    assert_eq!(found[2], Ok((4, json!({"a": 3}))));
    let error = found[1].clone().unwrap_err();
    assert!(error.contains("a.jsonl:3:7: not JSON"), "{error}");
    let source = open(&folder.write("a.txt", b"one\ntw\xFFo\nth\0ree\n")).unwrap();
    let found = rows(&source);
    assert_eq!(found[0], Ok((1, json!({"text": "one"}))));
    assert!(found[1].clone().unwrap_err().contains("a.txt:2:3: byte 0xff is not UTF-8"), "{found:?}");
    assert!(found[2].clone().unwrap_err().contains("a.txt:3: a NUL byte"), "{found:?}");
}

#[test]
fn a_line_of_nul_bytes_is_an_error_and_the_rows_around_it_are_not() {
    let folder = Folder::new();
    for (name, text) in
        [("a.jsonl", "{}\n\0\0\0\0\n{}\n"), ("a.txt", "a\n\0\0\nb"), ("a.csv", "a\n1\n\0\0\n2\n")]
    {
        let source = open(&folder.write(name, text)).unwrap();
        assert_eq!(rows(&source).len(), 3);
        let error = only_error(&source);
        assert!(error.contains(name) && error.contains("not written whole"), "{error}");
    }
    let error = only_error(&open(&folder.write("b.jsonl", [0; 5000])).unwrap());
    assert!(error.contains("b.jsonl:1: NUL bytes"), "{error}");
}

#[test]
fn utf16_is_an_error_with_a_remedy() {
    let folder = Folder::new();
    for (mark, name) in [(&b"\xFF\xFEa\0"[..], "UTF-16"), (b"\xFF\xFE\0\0a\0\0\0", "UTF-32")] {
        for kind in ["a.jsonl", "a.json", "a.csv", "a.txt"] {
            let error = open(&folder.write(kind, mark)).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(&format!("iconv -f {name} -t UTF-8")), "{error}");
        }
    }
}

#[test]
fn a_row_of_300_mb_is_an_error_and_the_next_row_is_found() {
    let before = || io::repeat(b'x').take(300 << 20);
    let mut spans =
        RowSpans::new(BufReader::with_capacity(1 << 20, before().chain(&b"\n{}\n"[..])), Layout::JsonLines);
    let error = spans.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("row:1: a row of more than 256 MiB"), "{error}");
    let row = spans.next().unwrap().unwrap();
    assert_eq!(row, RowSpan { offset: (300 << 20) + 1, bytes: 2, line: 2 });
    assert!(spans.next().is_none());
    let text = (&b"["[..]).chain(before());
    let mut spans = RowSpans::new(BufReader::with_capacity(1 << 20, text), Layout::JsonArray);
    assert!(spans.next().unwrap().unwrap_err().message.contains("a row of more than 256 MiB"));
    assert!(spans.next().is_none());
}

#[test]
fn records_become_objects_by_the_header() {
    let folder = Folder::new();
    let source = open(&folder.write("a.tsv", "query\tresponse\nw\u{e9}\t\"a\n\tb\"\n1,5\t\n")).unwrap();
    let expected = [
        (2, json!({"query": "w\u{e9}", "response": "a\n\tb"})),
        (4, json!({"query": "1,5", "response": ""})),
    ];
    assert_eq!(values(&source), expected);
    assert_eq!(source.parser().header(), ["query", "response"]);
}

#[test]
fn a_record_with_a_wrong_number_of_fields_says_both_numbers() {
    let folder = Folder::new();
    let source = open(&folder.write("a.csv", "q,r\n1,\"2\n3\"\n1,2,3\n4,5\n6\n")).unwrap();
    let found = rows(&source);
    assert_eq!(found.len(), 4);
    let [error, last] = [2, 3].map(|row: usize| found[[1, 3][row - 2]].clone().unwrap_err());
    assert!(error.contains("a.csv:4: a record of 3 fields; the header has 2 (q, r)"), "{error}");
    assert!(last.contains("a.csv:6: a record of 1 fields"), "{last}");
}

#[test]
fn a_header_that_cannot_name_columns_is_an_error() {
    let folder = Folder::new();
    for (text, expected) in [
        ("q,r,q\n1,2,3\n", "a.csv:1: columns 1 and 3 of the header are both named \"q\""),
        ("\nq,,r\n1,2,3\n", "a.csv:2: column 2 of the header has no name"),
        ("q,\"r\n1,2\n", "a.csv:1: the file ends inside a quoted field"),
    ] {
        let error = open(&folder.write("a.csv", text)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_quote_that_is_not_closed_is_an_error_at_its_record() {
    let folder = Folder::new();
    let source = open(&folder.write("a.csv", "q,r\n1,2\n3,\"4\n5,6\n7,8\n")).unwrap();
    let found = rows(&source);
    assert_eq!(found.len(), 2);
    let error = found[1].clone().unwrap_err();
    assert!(error.contains("a.csv:3: the file ends inside a quoted field"), "{error}");
}

#[test]
fn what_is_no_file_of_rows_is_refused() {
    let folder = Folder::new();
    let error = |path: &Path| open(path).unwrap_err();
    assert_eq!(error(&folder.path("a.jsonl")).kind, ErrorKind::Io(io::ErrorKind::NotFound));
    std::fs::create_dir(folder.path("b.jsonl")).unwrap();
    assert!(error(&folder.path("b.jsonl")).message.contains("a folder; expected a file"));
    let fifo = folder.path("c.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // must not wait for a writer
    assert!(error(&fifo).message.contains("a pipe or a device; expected a file"));
    assert!(error(&folder.write("a.md", "")).message.contains("of kind \".md\"; expected .jsonl"));
    assert!(error(&folder.write("d.jsonl", "PK\x03\x04zip")).message.contains("a zip archive"));
}

#[test]
fn a_file_without_permission_is_an_error_of_the_system() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "{}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o0)).unwrap();
    match open(&path) {
        Err(error) => {
            assert_eq!(error.kind, ErrorKind::Io(io::ErrorKind::PermissionDenied));
            assert!(error.to_string().contains("a.jsonl"));
        }
        // root may read everything
        Ok(source) => assert_eq!(values(&source).len(), 1),
    }
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "{\"a\": 1}\n{\"a\": 2}\n");
    let source = open(&path).unwrap();
    let found: Vec<_> = spans(&source).into_iter().map(|span| span.unwrap()).collect();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(12).unwrap();
    assert_eq!(source.read(found[0]).unwrap(), b"{\"a\": 1}");
    let error = source.read(found[1]).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:2: the file became shorter"), "{error}");
    assert!(source.rows().unwrap().any(|row| row.is_err()));
    // places that never were, of an index of another file
    for span in [(0, u64::MAX), (u64::MAX, 1), (17, 4)] {
        let span = RowSpan { offset: span.0, bytes: span.1, line: 9 };
        let error = source.read(span).unwrap_err().to_string();
        assert!(error.contains("a.jsonl:9: there is no row"), "{error}");
    }
    assert!(source.read_range(0, usize::MAX).is_err());
}

#[test]
fn lines_are_counted_from_a_known_place() {
    let folder = Folder::new();
    let text = lines(80_000);
    let source = open(&folder.write("a.jsonl", &text)).unwrap();
    let found: Vec<_> = spans(&source).into_iter().map(|span| span.unwrap()).collect();
    assert!(source.bytes() > 2 << 20);
    for row in [0, 1, 777, 79_999] {
        assert_eq!(source.line_of(found[row].offset, (0, 1)).unwrap(), found[row].line);
        let known = found[row / 2];
        assert_eq!(source.line_of(found[row].offset, (known.offset, known.line)).unwrap(), found[row].line);
    }
    assert!(source.line_of(source.bytes() + 1, (0, 1)).is_err());
}

#[test]
fn ten_thousand_files_stay_within_the_pool() {
    let folder = Folder::new();
    let pool = FilePool::new(4);
    let sources: Vec<Source> = (0..2_000)
        .map(|number| {
            let path = folder.write(&format!("{number}.jsonl"), format!("{{\"n\": {number}}}\n"));
            Source::open(&path, &pool, None, &mut |_, _| Ok(())).unwrap()
        })
        .collect();
    for (number, source) in sources.iter().enumerate().rev() {
        assert_eq!(values(source), [(1, json!({"n": number}))]);
    }
    let open_here = std::fs::read_dir("/proc/self/fd").map(|entries| {
        let links = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.filter(|link| link.starts_with(folder.0.path())).count()
    });
    assert!(open_here.is_ok_and(|open| open <= 4));
}
