//! The scores of a Unigram model, as the published wheel of `tokenizers` reads them.
//!
//! It parses a decimal number as its digits, as an integer, over a power of ten (`serde_json` without its feature
//! `float_roundtrip`), which is off by one unit in the last place for every fourth score of T5. Where two ways to cut a
//! text have sums that are that near, it decides; so ids are equal only with equal scores.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_json::value::RawValue;

#[derive(Deserialize)]
struct File<'f> {
    #[serde(borrow)]
    model: Model<'f>,
}

#[derive(Deserialize)]
struct Model<'f> {
    #[serde(borrow)]
    vocab: Vec<(IgnoredAny, &'f RawValue)>,
}

/// Sets the scores of `json`, which `bytes` were parsed to; whether there are any.
pub(super) fn set_scores(json: &mut Value, bytes: &[u8]) -> bool {
    let Ok(file) = serde_json::from_slice::<File>(bytes) else { return false };
    let vocabulary = json.pointer_mut("/model/vocab").and_then(Value::as_array_mut);
    for (entry, (_, score)) in vocabulary.into_iter().flatten().zip(&file.model.vocab) {
        if let (Some(place), Some(score)) = (entry.get_mut(1), read(score.get()))
            && place.is_f64()
        {
            *place = score.into();
        }
    }
    true
}

/// A decimal number as digits over a power of ten.
fn read(text: &str) -> Option<f64> {
    let (sign, digits) = text.strip_prefix('-').map_or((1.0, text), |digits| (-1.0, digits));
    let (mantissa, exponent) = match digits.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (digits, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut significand: u64 = 0;
    let mut power = exponent;
    let mut is_full = false;
    let digits = whole.bytes().map(|digit| (digit, false)).chain(fraction.bytes().map(|digit| (digit, true)));
    for (digit, is_fraction) in digits {
        let digit = u64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
        let longer = significand.checked_mul(10).and_then(|longer| longer.checked_add(digit));
        if let Some(longer) = longer.filter(|_| !is_full) {
            significand = longer;
            power -= i32::from(is_fraction);
        } else {
            // digits that do not fit are left out
            is_full = true;
            power += i32::from(!is_fraction);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "that is what is to be done alike")]
    let mut float = significand as f64;
    while power < -308 && float != 0.0 {
        float /= 1e308;
        power += 308;
    }
    let float = if power < 0 { float / ten_to(-power) } else { float * ten_to(power) };
    float.is_finite().then_some(sign * float)
}

/// The power of ten as it is written, which a product of tens is not.
fn ten_to(power: i32) -> f64 {
    format!("1e{power}").parse().unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_wheel() {
        // read by tokenizers 0.23 for Python, and written again
        for (text, score) in [
            ("-2.0122928619384766", "-2.012292861938477"),
            ("-3.9598512649536133", "-3.9598512649536137"),
            ("-7.4370903968811035", "-7.437090396881104"),
            ("0.0", "0.0"),
            ("-5", "-5.0"),
            ("1e-3", "0.001"),
            ("-12.5E+2", "-1250.0"),
        ] {
            let found = read(text).unwrap();
            assert_eq!(format!("{found:?}"), score, "{text}");
        }
        assert_eq!(read("1e999"), None);
        let bytes = br#"{"model": {"vocab": [["a", -2.0122928619384766], ["b", 0]]}}"#;
        let mut json: Value = serde_json::from_slice(bytes).unwrap();
        assert!(set_scores(&mut json, bytes));
        assert_eq!(json.to_string(), r#"{"model":{"vocab":[["a",-2.012292861938477],["b",0]]}}"#);
        assert!(!set_scores(&mut json, br#"{"model": {"vocab": {"a": 0}}}"#));
    }
}
