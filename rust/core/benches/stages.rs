//! Nanoseconds a byte of each stage from a file to its index, on one thread.
//!
//! `cargo bench --bench stages -- FILE TOKENIZER_FOLDER`; without them nothing is timed.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use sftcore::conversation::parse_json;
use sftcore::encode::{ControlTokenSet, ControlTokens, Encoder, Truncation};
use sftcore::index::ShapedSource;
use sftcore::pretrained::Pretrained;
use sftcore::source::{FilePool, RowSpan};
use sftcore::template::{ChatTemplate, Controls};
use sftcore::tokenizer::EngineChoice;

fn encoder(folder: &Path) -> sftcore::Result<Encoder> {
    let pretrained = Pretrained::from_folder(folder, EngineChoice::Auto)?;
    let template = pretrained.chat_template.as_deref().unwrap_or_default();
    Ok(Encoder {
        appends_eos: false,
        special_tokens: Arc::new(ControlTokenSet::new(&*pretrained.tokenizer.engine)),
        template: Some(ChatTemplate::new(template, pretrained.special_tokens.clone())?),
        tool_use_template: None,
        max_length: 2048,
        truncation: Truncation::Delete,
        system: None,
        eos_token: pretrained.special_tokens.get("eos_token").map(str::to_owned),
        controls: Controls::default(),
        control_tokens: ControlTokens::default(),
        chat_template_kwargs: serde_json::Map::new(),
        tokenizer: pretrained.tokenizer.engine,
    })
}

fn main() -> sftcore::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let [file, folder] = arguments.as_slice() else {
        println!("usage: cargo bench --bench stages -- FILE TOKENIZER_FOLDER");
        return Ok(());
    };
    let encoder = encoder(Path::new(folder))?;
    let pool = FilePool::default();
    let shaped = ShapedSource::open(Path::new(file), Arc::default(), &pool, None, true, &mut |_, _| Ok(()))?;
    let bytes = shaped.source.bytes();
    let mut last = Instant::now();
    let mut lap = |stage: &str| {
        #[expect(clippy::cast_precision_loss, reason = "a rate is read to two digits")]
        let each = last.elapsed().as_nanos() as f64 / bytes as f64;
        println!("{stage:<28}{each:>8.2} ns/byte");
        last = Instant::now();
    };
    let spans = shaped.source.rows()?.collect::<sftcore::Result<Vec<RowSpan>>>()?;
    lap("find the rows");
    let rows = spans.iter().map(|span| shaped.source.read(*span)).collect::<sftcore::Result<Vec<_>>>()?;
    lap("read them");
    for row in &rows {
        parse_json(row)?;
    }
    lap("parse JSON");
    let parse = |(row, span): (&Vec<u8>, &RowSpan)| shaped.rows.parse(row, *span);
    let conversations = rows.iter().zip(&spans).map(parse).collect::<sftcore::Result<Vec<_>>>()?;
    lap("JSON and conversation");
    let rendered =
        conversations.iter().map(|row| encoder.render(row)).collect::<sftcore::Result<Vec<_>>>()?;
    lap("render");
    for (row, rendered) in conversations.iter().zip(&rendered) {
        encoder.tokenize(row, rendered)?;
    }
    lap("tokenize");
    let mut tokens = 0;
    for row in &conversations {
        tokens += encoder.encode_full(row)?.1.input_ids.len();
    }
    lap("render, tokenize, mask");
    for (row, span) in rows.iter().zip(&spans) {
        shaped.rows.encode(&encoder, *span, row)?;
    }
    lap("all but reading");
    println!("{} rows, {bytes} bytes, {tokens} tokens", rows.len());
    Ok(())
}
