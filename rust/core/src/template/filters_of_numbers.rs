//! Filters that make numbers, or change them.

use minijinja::{Error, State, Value};

use super::filters::Options;
use super::marks;
use super::operators::as_float;
use super::order::{float, integer, type_name, wrong};

pub(super) fn abs(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    match (integer(value), float(value)) {
        (Some(number), _) => Ok(number.checked_abs().map_or_else(
            || value.clone(),
            |number| i64::try_from(number).map_or_else(|_| Value::from(number), Value::from),
        )),
        (None, Some(number)) => Ok(Value::from(number.abs())),
        _ => Err(wrong(format!("bad operand type for abs(): '{}'", type_name(value)))),
    }
}

/// A text as Python's `float` reads it.
fn read_float(text: &str) -> Result<Option<f64>, Error> {
    let text = marks::trim(text);
    if text.chars().any(|each| !each.is_ascii() && each.is_numeric()) {
        return Err(wrong("a number in digits of another script"));
    }
    let is_between_digits = |at: usize| {
        at > 0 && [at - 1, at + 1].iter().all(|at| text.as_bytes().get(*at).is_some_and(u8::is_ascii_digit))
    };
    if text.match_indices('_').any(|(at, _)| !is_between_digits(at)) {
        return Ok(None);
    }
    Ok(text.replace('_', "").parse().ok())
}

/// A text as Python's `int` reads it.
fn read_int(text: &str, base: u32) -> Result<Option<i128>, Error> {
    let text = marks::trim(text);
    let (is_negative, digits) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let has_prefix =
        !prefix.is_empty() && digits.get(..2).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    let digits = if has_prefix { digits[2..].strip_prefix('_').unwrap_or(&digits[2..]) } else { digits };
    let is_number = !digits.is_empty()
        && digits.split('_').all(|part| !part.is_empty() && part.chars().all(|digit| digit.is_digit(base)));
    if !is_number {
        return Ok(None);
    }
    let sign = if is_negative { "-" } else { "" };
    let number = i128::from_str_radix(&format!("{sign}{}", digits.replace('_', "")), base);
    number.map(Some).map_err(|_| wrong("a whole number too large for this renderer"))
}

/// A number without its fraction; None for what is no number.
fn whole(number: f64) -> Result<Option<i128>, Error> {
    if number.is_nan() {
        Ok(None)
    } else if number.abs() < 1e38 {
        #[expect(clippy::cast_possible_truncation, reason = "the size is looked at")]
        let whole = number.trunc() as i128;
        Ok(Some(whole))
    } else {
        Err(wrong("a whole number too large for this renderer"))
    }
}

pub(super) fn to_int(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let default = options.get(0, "default")?.unwrap_or_else(|| Value::from(0));
    let base = u32::try_from(options.integer(1, "base", 10)?).ok().filter(|base| (2..=36).contains(base));
    options.finish(2)?;
    let base = base.ok_or_else(|| wrong("a base of int that is not known here"))?;
    let number = match (value.as_str(), integer(value), float(value)) {
        (Some(text), ..) => match read_int(text, base)? {
            Some(number) => Some(number),
            None => match read_float(text)? {
                Some(number) if number.is_finite() => whole(number)?,
                _ => None,
            },
        },
        (_, Some(number), _) => Some(number),
        (_, _, Some(number)) => whole(number)?,
        _ if value.is_undefined() => return Err(wrong("int of what is undefined")),
        _ => None,
    };
    Ok(number
        .map_or(default, |number| i64::try_from(number).map_or_else(|_| Value::from(number), Value::from)))
}

pub(super) fn to_float(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let default = options.get(0, "default")?.unwrap_or_else(|| Value::from(0.0));
    options.finish(1)?;
    let number = match value.as_str() {
        Some(text) => read_float(text)?,
        None if value.is_undefined() => return Err(wrong("float of what is undefined")),
        None if value.is_number() && as_float(value).is_none() => {
            return Err(wrong("a whole number too large for this renderer"));
        }
        None => as_float(value),
    };
    Ok(number.map_or(default, Value::from))
}

pub(super) fn round(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let precision =
        usize::try_from(options.integer(0, "precision", 0)?).ok().filter(|precision| *precision <= 15);
    let method = options.get(1, "method")?.unwrap_or_else(|| Value::from("common"));
    options.finish(2)?;
    let precision = precision.ok_or_else(|| wrong("round to so many digits is not known here"))?;
    let number = as_float(value).filter(|number| number.is_finite());
    let number = number.ok_or_else(|| wrong(format!("round of a value of the type {}", type_name(value))))?;
    match method.as_str() {
        Some("common") if integer(value).is_some() => Ok(integer(value)
            .and_then(|number| i64::try_from(number).ok())
            .map_or_else(|| value.clone(), Value::from)),
        // written with so many digits, a number is rounded as Python rounds it
        Some("common") => Ok(Value::from(format!("{number:.precision$}").parse::<f64>().unwrap_or(number))),
        Some(method @ ("ceil" | "floor")) => {
            let scale = 10_f64.powi(i32::try_from(precision).unwrap_or(0));
            let scaled = number * scale;
            let whole = if method == "ceil" { scaled.ceil() } else { scaled.floor() };
            // a whole number has no negative zero
            Ok(Value::from((whole + 0.0) / scale))
        }
        _ => Err(wrong("method must be common, ceil or floor")),
    }
}
