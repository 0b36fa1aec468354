//! The methods of Python's texts, lists and dicts, and the filters that are the same.
//!
//! They do what Python's do, or refuse: what changes a list or a dict is refused by Jinja2's sandbox too.

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::format;
use super::lazy::{Lazy, items_of};
use super::marks::is_white_space;
use super::operators::is_hashable;
use super::order::{equal, integer, is_dict, kind, type_name, wrong};
use super::texts::{self, capitalize, center, lines, split_words, title};

/// The methods of Python's values whose names may stand without a call.
pub(super) const METHODS: [&str; 54] = [
    "capitalize",
    "casefold",
    "center",
    "clear",
    "copy",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "fromkeys",
    "get",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "items",
    "join",
    "keys",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "pop",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "values",
    "zfill",
];

/// Arguments of a method, by place and by name.
struct Given<'a> {
    method: &'a str,
    values: &'a [Value],
    names: Kwargs,
}

impl<'a> Given<'a> {
    fn new(method: &'a str, arguments: &'a [Value]) -> Result<Self, Error> {
        match arguments.split_last() {
            Some((last, values)) if last.is_kwargs() => {
                Ok(Self { method, values, names: Kwargs::try_from(last.clone())? })
            }
            _ => Ok(Self {
                method,
                values: arguments,
                names: Kwargs::from_iter(Vec::<(String, Value)>::new()),
            }),
        }
    }

    /// What there are at most, none of them by name.
    fn at_most(&self, count: usize) -> Result<&'a [Value], Error> {
        if self.values.len() > count || self.names.args().next().is_some() {
            return Err(wrong(format!("{}() takes at most {count} arguments", self.method)));
        }
        Ok(self.values)
    }

    /// One of several arguments that may be given by name.
    fn named(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        match (self.values.get(at), self.names.get::<Option<Value>>(name)?) {
            (Some(_), Some(_)) => Err(wrong(format!("{}() has `{name}` twice", self.method))),
            (Some(value), None) => Ok(Some(value.clone())),
            (None, value) => Ok(value),
        }
    }

    fn none(&self) -> Result<(), Error> {
        self.at_most(0).map(|_| ())
    }

    /// The argument at a place, which must be a text.
    fn text(&self, at: usize) -> Result<&'a str, Error> {
        let value =
            self.values.get(at).ok_or_else(|| wrong(format!("{}() needs more arguments", self.method)))?;
        value
            .as_str()
            .ok_or_else(|| wrong(format!("{}() needs a text, not {}", self.method, type_name(value))))
    }

    fn integer(&self, at: usize) -> Result<i128, Error> {
        let value =
            self.values.get(at).ok_or_else(|| wrong(format!("{}() needs more arguments", self.method)))?;
        integer(value).ok_or_else(|| {
            wrong(format!("'{}' object cannot be interpreted as an integer", type_name(value)))
        })
    }
}

/// The method `method` of `value`.
pub(super) fn call(state: &State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let given = Given::new(method, arguments)?;
    match kind(value) {
        ValueKind::String if value.is_safe() => Err(wrong(format!(
            "{method}() of a text after |safe or |escape, which Transformers would render with HTML escapes; remove the \
             filter"
        ))),
        ValueKind::String => of_text(state, value.as_str().unwrap_or_default(), &given),
        ValueKind::Map if is_dict(value) => of_dict(value, &given),
        ValueKind::Seq => of_list(value, &given),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_dict(dict: &Value, given: &Given) -> Result<Value, Error> {
    let values =
        || -> Result<Vec<Value>, Error> { dict.try_iter()?.map(|key| dict.get_item(&key)).collect() };
    match given.method {
        "get" => {
            let [key, default @ ..] = given.at_most(2)? else { return Err(wrong("get() needs a key")) };
            if !is_hashable(key) {
                return Err(wrong(format!("unhashable type: '{}'", type_name(key))));
            }
            let found = dict.as_object().and_then(|object| object.get_value(key));
            Ok(found.unwrap_or_else(|| default.first().cloned().unwrap_or_else(|| Value::from(()))))
        }
        "items" => {
            given.none()?;
            let pairs =
                dict.try_iter()?.zip(values()?).map(|(key, value)| Value::from(Tuple::from([key, value])));
            Ok(Lazy::view("dict_items", pairs.collect()))
        }
        "keys" => {
            given.none()?;
            Ok(Lazy::view("dict_keys", dict.try_iter()?.collect()))
        }
        "values" => {
            given.none()?;
            Ok(Lazy::view("dict_values", values()?))
        }
        "copy" => {
            given.none()?;
            Ok(Value::from_pairs(dict.try_iter()?.zip(values()?)))
        }
        "pop" | "update" | "clear" | "setdefault" | "popitem" => Err(changes(given.method, "dict")),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn changes(method: &str, kind: &str) -> Error {
    wrong(format!("{method}() would change a {kind}, which Transformers lets no template do"))
}

fn of_list(list: &Value, given: &Given) -> Result<Value, Error> {
    match given.method {
        "count" => {
            let [what] = given.at_most(1)? else { return Err(wrong("count() needs a value")) };
            let mut count = 0;
            for item in list.try_iter()? {
                count += i64::from(equal(&item, what)?);
            }
            Ok(Value::from(count))
        }
        "index" => {
            let [what] = given.at_most(1)? else { return Err(wrong("index() needs a value")) };
            for (place, item) in list.try_iter()?.enumerate() {
                if equal(&item, what)? {
                    return Ok(Value::from(place));
                }
            }
            Err(wrong("a value is not in list"))
        }
        "copy" if !list.is_tuple() => {
            given.none()?;
            Ok(list.try_iter()?.collect())
        }
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "sort" | "reverse"
            if !list.is_tuple() =>
        {
            Err(changes(given.method, "list"))
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_text(state: &State, text: &str, given: &Given) -> Result<Value, Error> {
    let whole = |change: fn(&str) -> String| given.none().map(|()| Value::from(change(text)));
    let pieces = |pieces: [&str; 3]| Value::from(Tuple::from(pieces.map(Value::from)));
    match given.method {
        "upper" => whole(str::to_uppercase),
        "lower" => whole(str::to_lowercase),
        "title" => whole(title),
        "capitalize" => whole(capitalize),
        "swapcase" if text.is_ascii() => whole(|text| {
            text.chars()
                .map(|each| {
                    if each.is_ascii_uppercase() {
                        each.to_ascii_lowercase()
                    } else {
                        each.to_ascii_uppercase()
                    }
                })
                .collect()
        }),
        "casefold" if text.is_ascii() => whole(str::to_lowercase),
        "strip" | "lstrip" | "rstrip" => strip(text, given),
        "removeprefix" => {
            given.at_most(1)?;
            Ok(Value::from(text.strip_prefix(given.text(0)?).unwrap_or(text)))
        }
        "removesuffix" => {
            given.at_most(1)?;
            Ok(Value::from(text.strip_suffix(given.text(0)?).unwrap_or(text)))
        }
        "replace" => {
            given.at_most(3)?;
            let count = if given.values.len() > 2 { given.integer(2)? } else { -1 };
            replace(state, text, given.text(0)?, given.text(1)?, count).map(Value::from)
        }
        "split" | "rsplit" => split(text, given),
        "splitlines" => {
            if given.values.len() > 1 {
                return Err(wrong("splitlines() takes at most 1 argument"));
            }
            let keep = given.named(0, "keepends")?;
            given.names.assert_all_used()?;
            let keep =
                keep.as_ref().map_or(Some(0), integer).ok_or_else(|| wrong("splitlines() needs a truth"))?;
            Ok(lines(text, keep != 0).into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            given.at_most(1)?;
            let by = given.text(0)?;
            if by.is_empty() {
                return Err(wrong("empty separator"));
            }
            Ok(match given.method {
                "partition" => {
                    text.split_once(by).map_or(pieces([text, "", ""]), |(one, two)| pieces([one, by, two]))
                }
                _ => text.rsplit_once(by).map_or(pieces(["", "", text]), |(one, two)| pieces([one, by, two])),
            })
        }
        "center" | "ljust" | "rjust" | "zfill" => pad(state, text, given),
        "expandtabs" if !text.contains(['\n', '\r']) => {
            given.at_most(1)?;
            let size = if given.values.is_empty() { 8 } else { given.integer(0)? };
            let size = usize::try_from(size).ok().filter(|size| (1..=256).contains(size));
            expand_tabs(
                state,
                text,
                size.ok_or_else(|| wrong("expandtabs() with such a size is not known here"))?,
            )
        }
        "startswith" | "endswith" => starts_or_ends(text, given),
        "count" | "find" | "rfind" | "index" | "rindex" => find(text, given),
        "format" => format::braces(state, text, given.values, &given.names).map(Value::from),
        "join" => {
            let [items] = given.at_most(1)? else { return Err(wrong("join() needs a list")) };
            join(state, text, items)
        }
        name if name.starts_with("is") => test_of_text(text, given),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// The methods that say whether a text is of some kind. For letters they are told in every script with letter case; numbers
/// beyond ASCII are of several kinds.
fn test_of_text(text: &str, given: &Given) -> Result<Value, Error> {
    // beyond these, numbers and signs have letter case too
    let has_case =
        |each: char| each < '\u{2160}' && each != '\u{345}' && (each.is_lowercase() || each.is_uppercase());
    let is_told = match given.method {
        "isalpha" => text.chars().all(|each| each.is_ascii() || has_case(each)),
        "isalnum" | "isdigit" | "isdecimal" | "isnumeric" | "istitle" => text.is_ascii(),
        _ => true,
    };
    if !is_told {
        return Err(wrong(format!("{}() of {text:?} is not known here", given.method)));
    }
    let every = |test: fn(char) -> bool| {
        given.none().map(|()| Value::from(!text.is_empty() && text.chars().all(test)))
    };
    match given.method {
        "isascii" => given.none().map(|()| Value::from(text.is_ascii())),
        "isspace" => every(is_white_space),
        "isalpha" => every(char::is_alphabetic),
        "isalnum" => every(char::is_alphanumeric),
        "isdigit" | "isdecimal" | "isnumeric" => every(|each| each.is_ascii_digit()),
        "isupper" | "islower" => {
            given.none()?;
            Ok(Value::from(texts::is_of_one_case(text, given.method == "isupper")))
        }
        "istitle" => {
            given.none()?;
            Ok(Value::from(text.contains(|each: char| each.is_ascii_alphabetic()) && title(text) == text))
        }
        "isidentifier" if text.is_ascii() => {
            given.none()?;
            let is_name = text.chars().all(|each| each == '_' || each.is_ascii_alphanumeric());
            Ok(Value::from(
                is_name && !text.is_empty() && !text.starts_with(|each: char| each.is_ascii_digit()),
            ))
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn strip(text: &str, given: &Given) -> Result<Value, Error> {
    let characters = match given.at_most(1)? {
        [] => None,
        [value] if value.is_none() => None,
        _ => Some(given.text(0)?),
    };
    let is_stripped = |character: char| match characters {
        None => is_white_space(character),
        Some(characters) => characters.contains(character),
    };
    Ok(Value::from(match given.method {
        "strip" => text.trim_matches(is_stripped),
        "lstrip" => text.trim_start_matches(is_stripped),
        _ => text.trim_end_matches(is_stripped),
    }))
}

/// `text.replace(old, new, count)`; a negative count is all.
pub(super) fn replace(state: &State, text: &str, old: &str, new: &str, count: i128) -> Result<String, Error> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let matches = text.matches(old).take(most).count();
    state.consume_fuel((matches * new.len() / 64) as u64)?;
    Ok(text.replacen(old, new, matches))
}

/// `split` and `rsplit`.
fn split(text: &str, given: &Given) -> Result<Value, Error> {
    if given.values.len() > 2 {
        return Err(wrong(format!("{}() takes at most 2 arguments", given.method)));
    }
    let by = given.named(0, "sep")?.filter(|by| !by.is_none());
    let most = given.named(1, "maxsplit")?;
    given.names.assert_all_used()?;
    let most =
        most.as_ref().map_or(Some(-1), integer).ok_or_else(|| wrong("the number of splits is no integer"))?;
    let most = usize::try_from(most).unwrap_or(usize::MAX - 1);
    let is_right = given.method == "rsplit";
    let pieces: Vec<&str> = match &by {
        None => split_words(text, most, is_right),
        Some(by) => {
            let by =
                by.as_str().ok_or_else(|| wrong(format!("must be str or None, not {}", type_name(by))))?;
            if by.is_empty() {
                return Err(wrong("empty separator"));
            }
            if is_right {
                let mut pieces: Vec<&str> = text.rsplitn(most + 1, by).collect();
                pieces.reverse();
                pieces
            } else {
                text.splitn(most + 1, by).collect()
            }
        }
    };
    Ok(pieces.into_iter().map(Value::from).collect())
}

fn pad(state: &State, text: &str, given: &Given) -> Result<Value, Error> {
    given.at_most(if given.method == "zfill" { 1 } else { 2 })?;
    let width = usize::try_from(given.integer(0)?).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel(missing as u64 / 64)?;
    let fill = if given.values.len() > 1 { given.text(1)? } else { " " };
    if fill.chars().count() != 1 {
        return Err(wrong("The fill character must be exactly one character long"));
    }
    Ok(Value::from(match given.method {
        "ljust" => format!("{text}{}", fill.repeat(missing)),
        "rjust" => format!("{}{text}", fill.repeat(missing)),
        "zfill" => {
            let signs = usize::from(text.starts_with(['-', '+']));
            format!("{}{}{}", &text[..signs], "0".repeat(missing), &text[signs..])
        }
        _ => center(text, width, fill),
    }))
}

fn expand_tabs(state: &State, text: &str, size: usize) -> Result<Value, Error> {
    state.consume_fuel((text.matches('\t').count() * size) as u64 / 64)?;
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for character in text.chars() {
        if character == '\t' {
            let spaces = size - column % size;
            out.push_str(&" ".repeat(spaces));
            column += spaces;
        } else {
            out.push(character);
            column += 1;
        }
    }
    Ok(Value::from(out))
}

/// The bytes of `text` from `start` to `stop` (places of characters at two arguments); None where nothing is left.
fn range_of(text: &str, given: &Given, at: usize) -> Result<Option<(usize, usize)>, Error> {
    if given.values.len() <= at {
        return Ok(Some((0, text.len())));
    }
    let length = i128::try_from(text.chars().count()).unwrap_or(i128::MAX);
    let bound = |at: usize, default: i128| match given.values.get(at) {
        None => Ok(default),
        Some(value) if value.is_none() => Ok(default),
        Some(_) => given.integer(at).map(|bound| if bound < 0 { (bound + length).max(0) } else { bound }),
    };
    let (start, stop) = (bound(at, 0)?, bound(at + 1, length)?.min(length));
    if start > stop || start > length {
        return Ok(None);
    }
    let byte = |place: i128| {
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        text.char_indices().nth(place).map_or(text.len(), |(byte, _)| byte)
    };
    Ok(Some((byte(start), byte(stop))))
}

fn starts_or_ends(text: &str, given: &Given) -> Result<Value, Error> {
    let Some(what) = given.at_most(3)?.first() else { return Err(wrong("a text to look for is missing")) };
    let texts: Vec<Value> = if what.is_tuple() { what.try_iter()?.collect() } else { vec![what.clone()] };
    let within = range_of(text, given, 1)?.map(|(start, stop)| &text[start..stop]);
    let mut found = false;
    for each in &texts {
        let each = each.as_str().ok_or_else(|| {
            wrong(format!(
                "{} first arg must be str or a tuple of str, not {}",
                given.method,
                type_name(each)
            ))
        })?;
        found |= within.is_some_and(|text| {
            if given.method == "startswith" { text.starts_with(each) } else { text.ends_with(each) }
        });
    }
    Ok(Value::from(found))
}

fn find(text: &str, given: &Given) -> Result<Value, Error> {
    given.at_most(3)?;
    let what = given.text(0)?;
    let range = range_of(text, given, 1)?;
    if given.method == "count" {
        let count = range.map_or(0, |(start, stop)| text[start..stop].matches(what).count());
        return Ok(Value::from(count));
    }
    let found = range.and_then(|(start, stop)| {
        let within = &text[start..stop];
        let at = if given.method.starts_with('r') { within.rfind(what) } else { within.find(what) };
        at.map(|at| text[..start + at].chars().count())
    });
    match found {
        Some(place) => Ok(Value::from(place)),
        None if given.method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(wrong("substring not found")),
    }
}

fn join(state: &State, text: &str, items: &Value) -> Result<Value, Error> {
    if items.is_undefined() {
        return Ok(Value::from(""));
    }
    let mut out = String::new();
    for (number, item) in items_of(state, items)?.iter().enumerate() {
        let item = item.as_str().ok_or_else(|| {
            wrong(format!("sequence item {number}: expected str instance, {} found", type_name(item)))
        })?;
        state.consume_fuel(1 + ((item.len() + text.len()) / 64) as u64)?;
        if number > 0 {
            out.push_str(text);
        }
        out.push_str(item);
    }
    Ok(Value::from(out))
}
