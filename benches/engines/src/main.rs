//! Tokenizer engines beside each other: ids against the reference, then the rate of one thread.
//!
//! `cargo run --release -- TOKENIZER_FOLDERS TEXT_FILE...` takes a folder of tokenizer folders and files of
//! JSON or JSON lines, whose strings are the texts. A crate is timed on all texts, in a first pass
//! with an empty cache and the best of three later ones; beside each rate stands how many texts got
//! other ids. A rate with wrong ids is marked, since it is no rate of this task.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;
use sftcore::tokenizer::{EngineChoice, open, probe};

type Encode = Box<dyn Fn(&str) -> Option<Vec<u32>>>;
type Opened = Result<Encode, String>;

const CRATES: [(&str, fn(&Path) -> Opened); 6] = [
    ("tokenizers", open_reference),
    ("sftcore", open_ours),
    ("fastokens", open_fastokens),
    ("tokie", open_tokie),
    ("kitoken", open_kitoken),
    ("splintr", open_splintr),
];

fn open_with(path: &Path, choice: EngineChoice) -> Opened {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let opened = open(&bytes, choice).map_err(|error| error.to_string())?;
    Ok(Box::new(move |text| opened.engine.encode(text, false).ok().map(|tokens| tokens.ids)))
}

fn open_reference(path: &Path) -> Opened {
    open_with(path, EngineChoice::Reference)
}

fn open_ours(path: &Path) -> Opened {
    open_with(path, EngineChoice::Fast)
}

fn open_fastokens(path: &Path) -> Opened {
    let tokenizer = fastokens::Tokenizer::from_file(path).map_err(|error| error.to_string())?;
    Ok(Box::new(move |text| tokenizer.encode_with_special_tokens(text, false).ok()))
}

fn open_tokie(path: &Path) -> Opened {
    let tokenizer = tokie::Tokenizer::from_json(path).map_err(|error| format!("{error:?}"))?;
    Ok(Box::new(move |text| Some(tokenizer.encode_ids(text, false))))
}

fn open_kitoken(path: &Path) -> Opened {
    let tokenizer = kitoken::Kitoken::from_tokenizers_file(path).map_err(|error| format!("{error:?}"))?;
    Ok(Box::new(move |text| tokenizer.encode(text, true).ok()))
}

fn open_splintr(path: &Path) -> Opened {
    let tokenizer = splintr::from_json_path(path).map_err(|error| error.to_string())?;
    Ok(Box::new(move |text| Some(tokenizer.encode_raw(text))))
}

fn push_strings(value: Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) if !text.is_empty() => texts.push(text),
        Value::Array(items) => items.into_iter().for_each(|item| push_strings(item, texts)),
        Value::Object(object) => object.into_iter().for_each(|(_, item)| push_strings(item, texts)),
        _ => {}
    }
}

/// The result of `work`, and `None` where a crate panics.
fn unless_it_panics<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

/// MB/s of one pass.
fn pass(encode: &Encode, texts: &[String], bytes: usize) -> f64 {
    let start = Instant::now();
    for text in texts {
        std::hint::black_box(unless_it_panics(|| encode(text)));
    }
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

fn main() -> Result<(), Box<dyn Error>> {
    std::panic::set_hook(Box::new(|_| {}));
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: engines TOKENIZER_FOLDERS TEXT_FILE...")?);
    let mut texts = Vec::new();
    for file in arguments {
        let text = std::fs::read_to_string(file)?;
        match serde_json::from_str(&text) {
            Ok(value) => push_strings(value, &mut texts),
            Err(_) => {
                text.lines().try_for_each(|line| {
                    Ok::<_, serde_json::Error>(push_strings(serde_json::from_str(line)?, &mut texts))
                })?;
            }
        }
    }
    let bytes = texts.iter().map(String::len).sum::<usize>();
    println!(
        "{} texts, {:.1} MB; MB/s first pass | later, texts with other ids (probe texts)",
        texts.len(),
        bytes as f64 / 1e6
    );
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path().join("tokenizer.json")))
        .filter(|path| path.exists())
        .collect();
    paths.sort();
    for path in paths {
        let name = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let reference = open_reference(&path)?;
        let special: Vec<(u32, String)> =
            open(&std::fs::read(&path)?, EngineChoice::Reference)?.engine.special_tokens();
        let odd = probe::texts(&special);
        let want: Vec<_> = texts.iter().chain(&odd).map(|text| reference(text)).collect();
        for (engine, open_engine) in CRATES {
            let opened = unless_it_panics(|| open_engine(&path)).unwrap_or_else(|| Err("panics".to_owned()));
            let encode = match opened {
                Ok(encode) => encode,
                Err(reason) => {
                    println!(
                        "{name:<16}{engine:<12}does not open: {}",
                        reason.lines().next().unwrap_or_default()
                    );
                    continue;
                }
            };
            let first = pass(&encode, &texts, bytes);
            let later = (0..3).map(|_| pass(&encode, &texts, bytes)).fold(0.0, f64::max);
            let differs = |(text, want): (&String, &Option<Vec<u32>>)| {
                unless_it_panics(|| encode(text)).flatten() != *want
            };
            let wrong = texts.iter().zip(&want).filter(|&pair| differs(pair)).count();
            let odd_wrong = odd.iter().zip(&want[texts.len()..]).filter(|&pair| differs(pair)).count();
            let mark = if wrong + odd_wrong == 0 { "" } else { "  NOT EXACT" };
            println!("{name:<16}{engine:<12}{first:>7.1} |{later:>7.1}  {wrong} ({odd_wrong}){mark}");
        }
    }
    Ok(())
}
