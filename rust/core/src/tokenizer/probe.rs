//! Texts on which two engines of one tokenizer must agree before the fast one is used.

use super::TokenizerEngine;

/// Scripts, punctuation, white space, digits and other texts on which tokenizers differ.
const TEXTS: &[&str] = &[
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "\n",
    " \n",
    "\n ",
    "\t\n\r\n  \n\n   x",
    "Hello, world! It's 3 o'clock; we'll see, they've gone, I'd say 'sure' I'M 'RE 'LL 'ſ 'Tis",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² Ⅷ ٣٤ ४५ 𝟙𝟚 𑷠𑷡",
    "def f(x):\n    return x**2  # square\n\n\tif (a && b) { c[i] += d->e; }\r\n",
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX. tHe QuIcK camelCase snake_case",
    "Ünïcödé naïve façade Straße ǅungla İstanbul ﬁn ﬀ ŉ",
    "e\u{301} a\u{30a} n\u{303} \u{1e9b}\u{323} \u{212b} \u{2126} \u{ac00}\u{11a8} \u{1100}\u{1161}\u{11a8}",
    "你好，世界！这是一个测试。第一，第二；中文与English混排。繁體字「」『』〈〉",
    "日本語のテスト、カタカナ ひらがな 漢字。㈱①Ⓐ",
    "한국어 시험입니다. 안녕하세요?",
    "Привет, мир! Ещё один тест. Ўзбек Ґ",
    "مرحبا بالعالم، هذا اختبار. שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "ელ ႠႡ Ελληνικά ἀρχή հայերեն አማርኛ தமிழ் తెలుగు ខ្មែរ မြန်မာ བོད",
    "😀😃 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷🇩🇪 ❤️ ☎︎ ⌚",
    "\u{0}\u{1}\u{7f}\u{85}\u{a0}\u{ad}\u{200b}\u{200d}\u{2028}\u{2029}\u{3000}\u{feff}\u{fffd}",
    "a\u{a0}b\u{3000}c\u{2003} d\u{85}e\u{1680}f \u{180e}g",
    "\u{2581}a \u{2581}\u{2581} b\u{2581}",
    "<s></s> <s> x<s>y</s>z <unk><pad> <0x0A> <0xE4>",
    "http://example.com/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt ~/.bashrc",
    "$x^2 + \\frac{a}{b}$ ≤ ∑∫√ ∀x∈ℝ → ← ⇒ £€¥₿ §¶†‡ …—–",
    "''''''''' \"\"\"\" ```` ---- ==== **** #### ____ ~~~~ ........ !!!!???? ,,,,",
    "\u{10ffff}\u{e000}\u{fdd0}\u{378}\u{1f9ff}\u{20000}\u{2fa1d}\u{31350}\u{323af}",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\\n\"}}",
    "'s't're've'm'll'd 'S'T'RE x's X'S ' s '  s",
];

/// The first text on which the two differ.
pub fn disagreement(one: &dyn TokenizerEngine, other: &dyn TokenizerEngine) -> Option<String> {
    texts(&other.special_tokens()).into_iter().find_map(|text| {
        let agree = match (one.encode(&text, false), other.encode(&text, false)) {
            (Ok(left), Ok(right)) => left.ids == right.ids && covers(&left.spans, &right.spans),
            (Err(_), Err(_)) => true,
            _ => false,
        };
        if agree {
            return None;
        }
        let start: String = text.chars().take(40).collect();
        Some(format!("it differs from the reference on a probe text that begins {start:?}"))
    })
}

/// Whether the spans of the one lie in those of the other, which may round out to whole characters
/// or leave white space out.
fn covers(fine: &[(u32, u32)], coarse: &[(u32, u32)]) -> bool {
    fine.len() == coarse.len()
        && fine.iter().zip(coarse).all(|(fine, coarse)| {
            let apart = fine.1 <= coarse.0 || coarse.1 <= fine.0;
            !apart || coarse.0 == coarse.1 || fine.0 == fine.1
        })
}

/// The probe texts of a tokenizer with these control tokens.
pub fn texts(special_tokens: &[(u32, String)]) -> Vec<String> {
    let mut texts: Vec<String> = TEXTS.iter().map(|&text| text.to_owned()).collect();
    texts.push(TEXTS.join("\n"));
    for text in ["a", " ", "\n", "é", "好", "1", "ab", "👍"] {
        texts.extend([2, 3, 7, 16, 33, 300].map(|times| text.repeat(times)));
        texts.push(format!("x{}y", text.repeat(5)));
    }
    let tokens: Vec<&str> = special_tokens.iter().take(64).map(|(_, token)| token.as_str()).collect();
    for token in &tokens {
        texts.push(format!("{token} a{token}\nb {token}{token}  c \u{a0}{token}\u{3000}\n\n{token} "));
        texts.push(format!("{}x{token}", &token[..token.chars().next().map_or(0, char::len_utf8)]));
    }
    texts.push(tokens.concat());
    texts.extend((0..64).map(|seed| random_text(seed, &tokens)));
    texts
}

const RANGES: [(u32, u32); 14] = [
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0x61, 0x7B),
    (0x61, 0x7B),
    (0x30, 0x3A),
    (0x9, 0x21),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x370, 0x600),
    (0x900, 0x1200),
    (0x2000, 0x2100),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0x1F300, 0x1FAFF),
];

/// Text of random length, script and spacing; the same for the same seed.
fn random_text(seed: u64, tokens: &[&str]) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap_or_default()
    };
    let mut text = String::new();
    for _ in 0..=next(40) {
        let (from, to) = if next(12) == 0 { (0, 0x0011_0000) } else { RANGES[next(RANGES.len())] };
        for _ in 0..=next(12) {
            let code = from + u32::try_from(next((to - from) as usize)).unwrap_or_default();
            text.push(char::from_u32(code).unwrap_or(' '));
        }
        match next(6) {
            0 => text.push(' '),
            1 => text.push('\n'),
            2 if !tokens.is_empty() => text.push_str(tokens[next(tokens.len())]),
            _ => {}
        }
    }
    text
}
