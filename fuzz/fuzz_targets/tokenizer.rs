//! Text through both tokenizer engines.
//!
//! The first byte picks a small tokenizer that is made here: one of bytes, or one of characters as `SentencePiece` has them. The rest is text;
//! every second field between record separators (0x1E) is content, in which control tokens are text like any other. Ids must be the same.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use sftcore::tokenizer::{EngineChoice, ReferenceTokenizer, TokenizerEngine, Tokens, open};

type Engines = (Arc<dyn TokenizerEngine>, ReferenceTokenizer);

static BYTES: LazyLock<Engines> = LazyLock::new(|| engines(&byte_level()));
static PIECES: LazyLock<Engines> = LazyLock::new(|| engines(&pieces()));

const MERGES: [(&str, &str); 14] = [
    ("h", "e"),
    ("t", "he"),
    ("i", "n"),
    ("in", "g"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("1", "2"),
    ("a", "a"),
    ("aa", "aa"),
    (" ", "the"),
    (" ", " "),
    ("  ", "  "),
    ("'", "s"),
];

fn engines(tokenizer: &Value) -> Engines {
    let bytes = tokenizer.to_string().into_bytes();
    let opened = open(&bytes, EngineChoice::Fast).expect("the fast engine reads it");
    (opened.engine, ReferenceTokenizer::from_bytes(&bytes).expect("the reference reads it"))
}

/// The vocabulary with what `MERGES` make, in which `space` stands for a space, and the merges.
fn merged(mut tokens: Vec<String>, space: &str) -> (Map<String, Value>, Vec<Value>) {
    let mut merges = Vec::new();
    for (left, right) in MERGES {
        let (left, right) = (left.replace(' ', space), right.replace(' ', space));
        tokens.push(format!("{left}{right}"));
        merges.push(json!([left, right]));
    }
    (tokens.into_iter().zip((0..).map(Value::from)).collect(), merges)
}

fn added(first: usize) -> Value {
    let tokens =
        [("<|im_end|>", true, false, false), ("<s>", true, false, true), ("[note]", false, true, false)];
    let token = |(id, (content, special, lstrip, rstrip)): (usize, (&str, bool, bool, bool))| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": rstrip,
            "normalized": false, "special": special,
        })
    };
    (first..).zip(tokens).map(token).collect()
}

fn byte_level() -> Value {
    let mut next = 0x100;
    let tokens = (0..=u8::MAX).map(|byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
        _ => {
            let character = char::from_u32(next).unwrap_or_default();
            next += 1;
            character.to_string()
        }
    });
    let (vocab, merges) = merged(tokens.collect(), "\u{120}");
    json!({
        "version": "1.0",
        "added_tokens": added(vocab.len()),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "byte_fallback": false, "vocab": vocab, "merges": merges},
    })
}

fn pieces() -> Value {
    let mut tokens = vec!["<unk>".to_owned()];
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(('!'..='~').map(String::from));
    tokens.extend(["\u{2581}", "\u{e9}", "\u{4e2d}", "\u{6587}"].map(str::to_owned));
    let (vocab, merges) = merged(tokens, "\u{2581}");
    json!({
        "version": "1.0",
        "added_tokens": added(vocab.len()),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": merges,
        },
    })
}

fn check(fast: &Tokens, reference: &Tokens, text: &str) {
    assert_eq!(fast.ids, reference.ids, "{text:?}");
    assert_eq!(fast.ids.len(), fast.spans.len());
    let mut before = 0;
    for &(start, end) in &fast.spans {
        assert!(
            start >= before && start <= end && end as usize <= text.len(),
            "{:?} of {text:?}",
            fast.spans
        );
        before = start;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let (fast, reference) = if kind & 1 == 0 { &*BYTES } else { &*PIECES };
    let text = String::from_utf8_lossy(bytes);
    let mut plain = Vec::new();
    let mut whole = String::new();
    for (number, field) in text.split('\u{1e}').enumerate() {
        let start = whole.len();
        whole.push_str(field);
        if number % 2 == 1 && whole.len() > start {
            plain.push((start, whole.len()));
        }
    }
    plain.dedup_by(|later, earlier| earlier.1 == later.0);
    for add_special_tokens in [false, true] {
        match (fast.encode(&whole, add_special_tokens), reference.encode(&whole, add_special_tokens)) {
            (Ok(fast), Ok(reference)) => check(&fast, &reference, &whole),
            (fast, reference) => assert_eq!(fast, reference),
        }
    }
    match (fast.encode_plain(&whole, &plain), reference.encode_plain(&whole, &plain)) {
        (Ok(fast), Ok(reference)) => check(&fast, &reference, &whole),
        (fast, reference) => assert_eq!(fast, reference),
    }
});
