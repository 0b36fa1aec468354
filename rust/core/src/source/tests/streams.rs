//! Rows of what can be read only once.

use std::io::Write;

use super::packed::parquet;
use super::*;

type Streamed = Vec<Result<(u64, Value), String>>;

fn streamed(path: &Path) -> Streamed {
    let (stream, layout) = open_stream(path).unwrap();
    let mut reader = RowReader::new(stream, layout).of_file(path);
    let parser = reader.parser().unwrap();
    let row = |row: Result<(RowSpan, Vec<u8>)>| {
        let (span, bytes) = row?;
        Ok((span.line, parser.parse(&bytes, span)?))
    };
    reader.map(|found| row(found).map_err(|error: Error| error.to_string())).collect()
}

#[test]
fn a_stream_gives_the_rows_of_the_file() {
    let folder = Folder::new();
    let text = lines(3000);
    let message = "{\"role\": \"user\", \"content\": \"a\"}";
    for (name, bytes) in [
        ("a.jsonl", text.clone().into_bytes()),
        ("b.jsonl", format!("[{message}]\n[{message}]\n").into_bytes()),
        ("a.jsonl.gz", gzip(text.as_bytes())),
        ("a.jsonl.zst", zstd(text.as_bytes())),
        ("a.json.gz", gzip(b"[{\"a\": 1},\n {\"a\": 2}]")),
        ("a.csv.zst", zstd("\u{feff}q,r\n1,\"2\n3\"\n".as_bytes())),
        ("a.csv", b"q;r\n1;2\n".to_vec()),
        ("a.txt", b" one\n\ntwo".to_vec()),
        ("begins-like-parquet.txt", b"PAR1 is a name\n".to_vec()),
        ("a.parquet", parquet(300)),
        ("empty.json", Vec::new()),
    ] {
        let path = folder.write(name, bytes);
        let whole: Streamed = values(&open(&path).unwrap()).into_iter().map(Ok).collect();
        assert_eq!(streamed(&path), whole, "{name}");
    }
}

#[test]
fn a_stream_that_breaks_off_gives_its_rows_and_then_an_error() {
    let folder = Folder::new();
    let text = lines(30_000);
    let (gz, zst) = (gzip(text.as_bytes()), zstd(text.as_bytes()));
    for (name, packed) in [("a.jsonl.gz", gz), ("a.jsonl.zst", zst)] {
        let path = folder.write(name, &packed[..packed.len() / 2]);
        let mut rows = streamed(&path);
        let error = rows.pop().unwrap().unwrap_err();
        assert!(error.contains(name) && error.contains("breaks off at byte"), "{error}");
        let source = open(&path).unwrap();
        assert_eq!(rows.len(), values(&source).len());
        assert!(rows.len() > 5_000 && rows.iter().all(Result::is_ok));
    }
    // nothing can be read at all: not an empty file
    let short = folder.write("b.csv.gz", &gzip(b"a,b\n1,2\n")[..6]);
    let found = open_stream(&short).map(|_| ()).unwrap_err().to_string();
    assert!(found.contains("b.csv.gz: the gzip stream breaks off"), "{found}");
}

#[test]
fn rows_come_out_of_a_pipe() {
    let folder = Folder::new();
    for (name, bytes, count) in [
        ("rows", b"{\"a\": 1}\n{\"a\": 2}\n".to_vec(), 2),
        ("rows.csv", b"q,r\n1,2\n".to_vec(), 1),
        ("other", gzip(lines(30_000).as_bytes()), 30_000),
    ] {
        let fifo = folder.path(name);
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let writer = std::thread::spawn({
            let fifo = fifo.clone();
            move || {
                let mut file = std::fs::File::options().write(true).open(fifo).unwrap();
                bytes.chunks(5_000).for_each(|part| file.write_all(part).unwrap());
            }
        });
        assert_eq!(streamed(&fifo).len(), count, "{name}");
        writer.join().unwrap();
    }
}

#[test]
fn parquet_from_a_pipe_is_refused() {
    let folder = Folder::new();
    let fifo = folder.path("a.parquet");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || {
            let mut file = std::fs::File::options().write(true).open(fifo).unwrap();
            // the reader may be gone already
            let _ = file.write_all(&parquet(3));
        }
    });
    let error = open_stream(&fifo).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("parquet cannot be read from a pipe"), "{error}");
    writer.join().unwrap();
}
