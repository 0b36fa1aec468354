//! What a model folder says about its tokenizer: `tokenizer.json`, `tokenizer_config.json` and
//! `chat_template.jinja`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::template::SpecialTokens;
use crate::tokenizer::{ReferenceTokenizer, TokenizerEngine};
use crate::{Error, ErrorKind, Result};

/// The tokenizer side of a model folder.
pub struct Pretrained {
    /// The reference engine on `tokenizer.json`.
    pub tokenizer: ReferenceTokenizer,
    /// Special tokens by name, and all control tokens.
    pub special_tokens: SpecialTokens,
    /// The model's own chat template, where it has one.
    pub chat_template: Option<String>,
    /// A hash of the bytes of `tokenizer.json`.
    pub tokenizer_hash: u64,
}

impl Pretrained {
    /// Reads `folder`.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::new(
                ErrorKind::Tokenizer,
                format!(
                    "{} has no tokenizer.json; convert a slow tokenizer with \
                     AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
                    folder.display()
                ),
            ));
        }
        let bytes = read(&path)?;
        let tokenizer = ReferenceTokenizer::from_bytes(&bytes).map_err(|error| error.in_file(&path))?;
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
        let texts = tokenizer.special_tokens();
        Ok(Self {
            tokenizer,
            special_tokens: SpecialTokens { named, texts },
            chat_template: chat_template(folder, &config)?,
            tokenizer_hash: xxhash_rust::xxh3::xxh3_64(&bytes),
        })
    }
}

impl SpecialTokens {
    /// The text of a special token by its name (`eos_token`, …).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(key, _)| key == name).map(|(_, text)| text.as_str())
    }
}

/// `chat_template.jinja`, else the `chat_template` of the configuration: a text, or named templates of
/// which `default` is the one for chats.
fn chat_template(folder: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        let bytes = read(&path)?;
        return String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Error::new(ErrorKind::Template, "not UTF-8").in_file(&path));
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(source)) => Some(source.clone()),
        Some(Value::Object(named)) => named.get("default").and_then(Value::as_str).map(str::to_owned),
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
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
