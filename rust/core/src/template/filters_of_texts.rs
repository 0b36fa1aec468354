//! Filters that change a text. What was markup stays markup.

use minijinja::{Error, State, Value};

use super::filters::{Options, like};
use super::order::{integer, type_name, wrong};
use super::print::text_of;
use super::{marks, methods, texts};

pub(super) fn capitalize(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    Ok(like(value, texts::capitalize(&text_of(state, value)?)))
}

/// The filter `title`: the first character of each word between white space and opening brackets.
pub(super) fn title(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    let text = text_of(state, value)?;
    let is_between = |each: char| "-({[<".contains(each) || marks::is_white_space(each);
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        if is_between(first) {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(is_between).unwrap_or(rest.len());
        out.extend(first.to_uppercase());
        out.push_str(&rest[first.len_utf8()..end].to_lowercase());
        rest = &rest[end..];
    }
    Ok(like(value, out))
}

pub(super) fn trim(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let characters = options.get(0, "chars")?.filter(|characters| !characters.is_none());
    options.finish(1)?;
    let text = text_of(state, value)?;
    let Some(characters) = characters else { return Ok(like(value, marks::trim(&text).to_owned())) };
    let characters = characters.as_str().ok_or_else(|| wrong("strip arg must be None or str"))?;
    Ok(like(value, text.trim_matches(|each| characters.contains(each)).to_owned()))
}

pub(super) fn center(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let width = usize::try_from(options.integer(0, "width", 80)?).unwrap_or(0);
    options.finish(1)?;
    state.consume_fuel(width as u64 / 64)?;
    Ok(like(value, texts::center(&text_of(state, value)?, width, " ")))
}

pub(super) fn replace(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let missing = || wrong("replace needs two texts");
    let old = text_of(state, &options.get(0, "old")?.ok_or_else(missing)?)?;
    let new = text_of(state, &options.get(1, "new")?.ok_or_else(missing)?)?;
    let count = options.get(2, "count")?.filter(|count| !count.is_none());
    options.finish(3)?;
    let count = count
        .as_ref()
        .map_or(Some(-1), integer)
        .ok_or_else(|| wrong("the count of replace is no integer"))?;
    methods::replace(state, &text_of(state, value)?, &old, &new, count).map(Value::from)
}

pub(super) fn escape(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    if value.is_safe() { Ok(value.clone()) } else { force_escape(state, value, options) }
}

pub(super) fn force_escape(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    let text = text_of(state, value)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    Ok(Value::from_safe_string(out))
}

pub(super) fn indent(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let text =
        value.as_str().ok_or_else(|| wrong(format!("indent of a value of the type {}", type_name(value))))?;
    let by = match options.get(0, "width")? {
        Some(by) if by.as_str().is_some() => by.as_str().unwrap_or_default().to_owned(),
        _ => " ".repeat(usize::try_from(options.integer(0, "width", 4)?).unwrap_or(0)),
    };
    let (first, blank) = (options.is_set(1, "first")?, options.is_set(2, "blank")?);
    options.finish(3)?;
    let text_with_end = format!("{text}\n");
    let lines = texts::lines(&text_with_end, false);
    state.consume_fuel(1 + (lines.len() * (by.len() + 1)) as u64 / 64)?;
    let mut out = String::with_capacity(text.len());
    for (number, line) in lines.iter().enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if (number == 0 && first) || (number > 0 && (blank || !line.is_empty())) {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(like(value, out))
}

pub(super) fn truncate(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let text = value.as_str().ok_or_else(|| wrong("truncate of what is no text"))?;
    let length = usize::try_from(options.integer(0, "length", 255)?).unwrap_or(0);
    let kills_words = options.is_set(1, "killwords")?;
    let end = options.get(2, "end")?.unwrap_or_else(|| Value::from("..."));
    let end =
        end.as_str().filter(|_| !value.is_safe()).ok_or_else(|| wrong("the end of truncate is no text"))?;
    let leeway = match options.get(3, "leeway")? {
        Some(leeway) if leeway.is_none() => 5,
        _ => options.integer(3, "leeway", 5)?,
    };
    options.finish(4)?;
    let kept = length.checked_sub(end.chars().count());
    let (Some(kept), Ok(leeway)) = (kept, usize::try_from(leeway)) else {
        return Err(wrong("truncate to less than its end"));
    };
    if text.chars().count() <= length + leeway {
        return Ok(value.clone());
    }
    let cut: String = text.chars().take(kept).collect();
    let cut =
        if kills_words { cut.as_str() } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(cut, _)| cut) };
    Ok(Value::from(format!("{cut}{end}")))
}

pub(super) fn wordcount(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    let text = text_of(state, value)?;
    let is_word = |each: char| {
        each == '_' || each.is_ascii_alphanumeric() || each.is_lowercase() || each.is_uppercase()
    };
    if text.chars().any(|each| !each.is_ascii() && !is_word(each)) {
        return Err(wrong("wordcount of a text beyond Latin letters is not known here"));
    }
    Ok(Value::from(text.split(|each| !is_word(each)).filter(|word| !word.is_empty()).count()))
}
