//! What a model folder says about its tokenizer: `tokenizer.json`, `tokenizer_config.json` and
//! `chat_template.jinja`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::template::SpecialTokens;
use crate::tokenizer::{EngineChoice, Opened, open};
use crate::{Error, ErrorKind, Result};

/// The tokenizer side of a model folder.
pub struct Pretrained {
    /// The engine on `tokenizer.json`.
    pub tokenizer: Opened,
    /// Special tokens by name, and all control tokens.
    pub special_tokens: SpecialTokens,
    /// The model's own chat template, where it has one.
    pub chat_template: Option<String>,
    /// The one named `tool_use`, which Transformers takes for conversations with tools.
    pub tool_use_template: Option<String>,
    /// A hash of the bytes of `tokenizer.json`.
    pub tokenizer_hash: u64,
}

impl Pretrained {
    /// Reads `folder`.
    pub fn from_folder(folder: &Path, choice: EngineChoice) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(missing(folder));
        }
        let bytes = read(&path)?;
        let tokenizer = open(&bytes, choice).map_err(|error| error.in_file(&path))?;
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let older = read_object(&folder.join("special_tokens_map.json"))?;
        let mut named = Vec::new();
        for (key, value) in older.iter().chain(&config) {
            let text = match value {
                Value::String(text) if key.ends_with("_token") => Some(text.as_str()),
                Value::Object(token) if key.ends_with("_token") => {
                    token.get("content").and_then(Value::as_str)
                }
                _ => None,
            };
            if let Some(text) = text {
                named.retain(|(name, _): &(String, String)| name != key);
                named.push((key.clone(), text.to_owned()));
            }
        }
        let mut texts: Vec<String> =
            tokenizer.engine.special_tokens().into_iter().map(|(_, text)| text).collect();
        let mut eos = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            let settings = read_object(&folder.join(file))?;
            let ids = match settings.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.clone(),
                Some(id) => vec![id.clone()],
                None => Vec::new(),
            };
            let ids = ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok());
            eos.extend(ids.filter_map(|id| tokenizer.engine.id_to_token(id)));
        }
        // control tokens that the tokenizer does not mark as such: those that a configuration names (Gemma 4's
        // `<|tool_response>`); a character may be the padding
        let is_token = |text: &str| text.len() > 2 && tokenizer.engine.token_to_id(text).is_some();
        texts.extend(named.iter().map(|(_, text)| text).filter(|text| is_token(text)).cloned());
        texts.extend(eos.iter().cloned());
        Ok(Self {
            tokenizer,
            special_tokens: SpecialTokens { named, texts, eos },
            chat_template: chat_template(folder, &config, "default")?,
            tool_use_template: chat_template(folder, &config, "tool_use")?,
            tokenizer_hash: xxhash_rust::xxh3::xxh3_64(&bytes),
        })
    }
}

/// What to do about a folder without `tokenizer.json`: there may be a slow tokenizer to convert.
fn missing(folder: &Path) -> Error {
    const SLOW: [(&str, &str); 5] = [
        ("tokenizer.model", "a SentencePiece model"),
        ("spiece.model", "a SentencePiece model"),
        ("vocab.json", "the vocabulary of a slow BPE tokenizer"),
        ("qwen.tiktoken", "a tiktoken vocabulary"),
        ("vocab.txt", "the vocabulary of a slow WordPiece tokenizer"),
    ];
    let found = SLOW.into_iter().find(|(file, _)| folder.join(file).is_file());
    let what = found.map_or(String::new(), |(file, kind)| format!(" but {file}, {kind}"));
    Error::new(
        ErrorKind::Tokenizer,
        format!(
            "{0} has no tokenizer.json{what}; convert it once with python -c \"from transformers import AutoTokenizer; \
             AutoTokenizer.from_pretrained('{0}', use_fast=True).save_pretrained('{0}')\" (for a SentencePiece model \
             this needs pip install sentencepiece protobuf)",
            folder.display()
        ),
    )
}

impl SpecialTokens {
    /// The text of a special token by its name (`eos_token`, …).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(key, _)| key == name).map(|(_, text)| text.as_str())
    }
}

/// The template called `name`: `chat_template.jinja` (the `default`) or `additional_chat_templates/NAME.jinja`,
/// else from the `chat_template` of the configuration, a text (the `default`) or named templates.
fn chat_template(folder: &Path, config: &Map<String, Value>, name: &str) -> Result<Option<String>> {
    let path = match name {
        "default" => folder.join("chat_template.jinja"),
        other => folder.join("additional_chat_templates").join(format!("{other}.jinja")),
    };
    if path.is_file() {
        let bytes = read(&path)?;
        return String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Error::new(ErrorKind::Template, "not UTF-8").in_file(&path));
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(source)) if name == "default" => Some(source.clone()),
        Some(Value::Object(named)) => named.get(name).and_then(Value::as_str).map(str::to_owned),
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(path, &error))
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    match serde_json::from_slice(&read(path)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::new(ErrorKind::Tokenizer, "not a JSON object").in_file(path)),
        Err(error) => Err(Error::new(ErrorKind::Tokenizer, format!("not JSON: {error}")).in_file(path)),
    }
}
