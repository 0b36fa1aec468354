//! `'%s' % value`, the filter `format` and `'{}'.format(value)`, as Python has them.
//!
//! A text with places and the values for them come in, the filled text goes out. Places that are rarely written (a width
//! from an argument, attributes) are refused by name.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::json::python_float;
use super::operators::as_float;
use super::order::{float, integer, is_dict, type_name, wrong};
use super::print::{repr_of, text_of};

/// The widest field.
const MAX_WIDTH: usize = 1 << 20;

/// How a value is to be written.
#[derive(Debug, Default, Clone)]
struct Field {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    is_alternate: bool,
    is_zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Field {
    /// `text` in its width; `default` says where it stands without a word on that.
    fn pad(&self, state: &State, text: &str, default: char) -> Result<String, Error> {
        let length = text.chars().count();
        let missing = self.width.saturating_sub(length);
        state.consume_fuel(1 + (text.len() + missing) as u64 / 64)?;
        let fill = self.fill.unwrap_or(' ');
        let fills = |count: usize| fill.to_string().repeat(count);
        Ok(match self.align.unwrap_or(default) {
            '<' => format!("{text}{}", fills(missing)),
            '^' => format!("{}{text}{}", fills(missing / 2), fills(missing - missing / 2)),
            _ => format!("{}{text}", fills(missing)),
        })
    }

    /// A number from its sign, its prefix and its digits, in its width.
    fn pad_number(
        &self,
        state: &State,
        is_negative: bool,
        prefix: &str,
        digits: &str,
    ) -> Result<String, Error> {
        let sign = match (is_negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        let head = format!("{sign}{prefix}");
        if self.is_zero || self.align == Some('=') {
            let fill = if self.is_zero { '0' } else { self.fill.unwrap_or(' ') };
            let missing = self.width.saturating_sub(head.len() + digits.len());
            state.consume_fuel(1 + missing as u64 / 64)?;
            return Ok(format!("{head}{}{digits}", fill.to_string().repeat(missing)));
        }
        self.pad(state, &format!("{head}{digits}"), '>')
    }

    /// `value` with a letter for whole numbers.
    fn integer(&self, state: &State, number: i128, kind: char) -> Result<String, Error> {
        let magnitude = number.unsigned_abs();
        let (prefix, digits) = match kind {
            'x' => ("0x", format!("{magnitude:x}")),
            'X' => ("0X", format!("{magnitude:X}")),
            'o' => ("0o", format!("{magnitude:o}")),
            'b' => ("0b", format!("{magnitude:b}")),
            _ => ("", magnitude.to_string()),
        };
        let digits = match self.grouping {
            Some(separator) => group(&digits, separator, if matches!(kind, 'd') { 3 } else { 4 }),
            None => digits,
        };
        let missing = self.precision.unwrap_or(0).saturating_sub(digits.len());
        let digits = format!("{}{digits}", "0".repeat(missing));
        self.pad_number(state, number < 0, if self.is_alternate { prefix } else { "" }, &digits)
    }

    /// `value` with a letter for numbers with a fraction.
    fn float(&self, state: &State, number: f64, kind: char) -> Result<String, Error> {
        let magnitude = number.abs();
        let precision = self.precision.unwrap_or(6);
        let lower = kind.to_ascii_lowercase();
        let digits = if number.is_nan() || number.is_infinite() {
            (if number.is_nan() { "nan" } else { "inf" }).to_owned()
        } else {
            match lower {
                'e' => scientific(magnitude, precision),
                'g' => general(magnitude, precision),
                '%' => format!("{:.precision$}", magnitude * 100.0),
                _ => format!("{magnitude:.precision$}"),
            }
        };
        let digits = match self.grouping {
            Some(separator) => {
                let end = digits.find(['.', 'e']).unwrap_or(digits.len());
                group(&digits[..end], separator, 3) + &digits[end..]
            }
            None => digits,
        };
        let digits = if lower == '%' { digits + "%" } else { digits };
        let digits = if kind.is_ascii_uppercase() { digits.to_ascii_uppercase() } else { digits };
        self.pad_number(state, number.is_sign_negative() && !number.is_nan(), "", &digits)
    }
}

fn group(digits: &str, separator: char, size: usize) -> String {
    let mut out = String::with_capacity(digits.len() + digits.len() / size);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(size) && digit.is_ascii_alphanumeric() {
            out.push(separator);
        }
        out.push(digit);
    }
    out
}

/// `%e`.
fn scientific(magnitude: f64, precision: usize) -> String {
    let text = format!("{magnitude:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// `%g`: the shorter of the two, without zeros at the end.
fn general(magnitude: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let text = format!("{magnitude:.*e}", precision - 1);
    let exponent: i64 = text.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
    let most = i64::try_from(precision).unwrap_or(i64::MAX);
    let short = |text: &str| {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text.to_owned()
        }
    };
    if (-4..most).contains(&exponent) {
        let decimals = usize::try_from(most - 1 - exponent).unwrap_or(0);
        return short(&format!("{magnitude:.decimals$}"));
    }
    let text = scientific(magnitude, precision - 1);
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "+00"));
    format!("{}e{exponent}", short(digits))
}

/// The number that `text` begins with, and the rest.
fn leading_number(text: &str) -> Result<(Option<usize>, &str), Error> {
    let end = text.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(text.len());
    if end == 0 {
        return Ok((None, text));
    }
    match text[..end].parse::<usize>().ok().filter(|number| *number <= MAX_WIDTH) {
        Some(number) => Ok((Some(number), &text[end..])),
        None => Err(ErrorKind::OutOfFuel.into()),
    }
}

/// `text % given`.
pub(super) fn percent(state: &State, text: &str, given: &Value) -> Result<String, Error> {
    let values: Vec<Value> = if given.is_tuple() { given.try_iter()?.collect() } else { vec![given.clone()] };
    // Python lets lists and dicts pass without a place for them
    let may_be_left = is_dict(given) || matches!(given.kind(), ValueKind::Seq) && !given.is_tuple();
    let mut values = values.into_iter();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let mut named = None;
        if let Some(after) = rest.strip_prefix('(') {
            let end = after.find(')').ok_or_else(|| wrong("incomplete format key"))?;
            if after[..end].contains('(') || !is_dict(given) {
                return Err(wrong("format requires a mapping"));
            }
            let found = given.as_object().and_then(|dict| dict.get_value(&Value::from(&after[..end])));
            named = Some(found.ok_or_else(|| wrong(format!("no value for %({})", &after[..end])))?);
            rest = &after[end + 1..];
        }
        let mut field = Field::default();
        while let Some(flag) = rest.chars().next().filter(|flag| "-+ #0".contains(*flag)) {
            match flag {
                '-' => field.align = Some('<'),
                '#' => field.is_alternate = true,
                '0' => field.is_zero = true,
                '+' => field.sign = Some('+'),
                _ => field.sign = field.sign.or(Some(' ')),
            }
            rest = &rest[1..];
        }
        field.is_zero &= field.align.is_none();
        let (width, after) = leading_number(rest)?;
        (field.width, rest) = (width.unwrap_or(0), after);
        if let Some(after) = rest.strip_prefix('.') {
            let (precision, after) = leading_number(after)?;
            (field.precision, rest) = (Some(precision.unwrap_or(0)), after);
        }
        let kind = rest.chars().next().ok_or_else(|| wrong("incomplete format"))?;
        rest = &rest[kind.len_utf8()..];
        let value = match named {
            Some(value) => value,
            None => values.next().ok_or_else(|| wrong("not enough arguments for format string"))?,
        };
        out.push_str(&percent_field(state, &field, kind, &value)?);
    }
    if values.next().is_some() && !may_be_left && !text.contains("%(") {
        return Err(wrong("not all arguments converted during string formatting"));
    }
    out.push_str(rest);
    Ok(out)
}

fn percent_field(state: &State, field: &Field, kind: char, value: &Value) -> Result<String, Error> {
    let refuse = || wrong(format!("%{kind} of a value of the type {}", type_name(value)));
    match kind {
        's' | 'r' => {
            let text = if kind == 's' { text_of(state, value)? } else { repr_of(state, value)? };
            let cut = field.precision.map_or(usize::MAX, |precision| precision);
            field.pad(state, &text.chars().take(cut).collect::<String>(), '>')
        }
        'd' | 'i' | 'u' => {
            #[expect(clippy::cast_possible_truncation, reason = "the size is looked at")]
            let number = integer(value).or_else(|| {
                float(value).filter(|number| number.abs() < 1e38).map(|number| number.trunc() as i128)
            });
            field.integer(state, number.ok_or_else(refuse)?, 'd')
        }
        'x' | 'X' | 'o' => field.integer(state, integer(value).ok_or_else(refuse)?, kind),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' if !field.is_alternate => {
            field.float(state, as_float(value).ok_or_else(refuse)?, kind)
        }
        _ => Err(wrong(format!("the place %{kind} of a format is not known here"))),
    }
}

/// The filter `format`.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands over owned arguments")]
pub(super) fn filter(
    state: &State,
    text: &Value,
    given: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let keys: Vec<String> = named.args().map(str::to_owned).collect();
    if !keys.is_empty() {
        if !given.is_empty() {
            return Err(wrong("can't handle positional and keyword arguments at the same time"));
        }
        let pairs = keys.iter().map(|key| Ok((key.as_str(), named.get::<Value>(key)?)));
        let pairs = pairs.collect::<Result<Vec<_>, Error>>()?;
        return percent(state, &text_of(state, text)?, &Value::from_pairs(pairs));
    }
    let given = Value::from(minijinja::value::Tuple::from(given.0));
    percent(state, &text_of(state, text)?, &given)
}

/// `text.format(given)`, with `names` as its named arguments.
pub(super) fn braces(state: &State, text: &str, given: &[Value], names: &Kwargs) -> Result<String, Error> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut next = 0;
    let mut is_counted = None;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        let end = rest.find(['}', '{']).filter(|end| brace == "{" && rest[*end..].starts_with('}'));
        let end = end.ok_or_else(|| wrong("a single or nested brace in a format"))?;
        let inner = &rest[..end];
        rest = &rest[end + 1..];
        let (head, spec) = inner.split_once(':').unwrap_or((inner, ""));
        let (path, conversion) = head.split_once('!').map_or((head, None), |(path, kind)| (path, Some(kind)));
        let (name, index) = path.split_once('[').map_or((path, None), |(name, index)| (name, Some(index)));
        if name.contains('.') {
            return Err(wrong(format!(
                "the attribute in the place {{{path}}} of a format is not known here"
            )));
        }
        let is_number = name.bytes().all(|byte| byte.is_ascii_digit());
        let mut value = if is_number {
            if *is_counted.get_or_insert(name.is_empty()) != name.is_empty() {
                return Err(wrong("a format has numbered places and others"));
            }
            let number = if name.is_empty() { Some(next) } else { name.parse().ok() };
            next += 1;
            number
                .and_then(|number| given.get(number))
                .cloned()
                .ok_or_else(|| wrong("no value for a place of a format"))?
        } else {
            names.get::<Value>(name)?
        };
        if let Some(key) = index {
            let key = key.strip_suffix(']').filter(|key| !key.contains(['[', ']', '.']) && !key.is_empty());
            let key =
                key.ok_or_else(|| wrong(format!("the place {{{path}}} of a format is not known here")))?;
            let key = key
                .parse::<i64>()
                .ok()
                .filter(|_| !key.starts_with(['-', '+']))
                .map_or_else(|| Value::from(key), Value::from);
            value = value.get_item(&key)?;
            if value.is_undefined() {
                return Err(wrong(format!("no value for {{{path}}}")));
            }
        }
        let value = match conversion {
            None => value,
            Some("s") => Value::from(text_of(state, &value)?),
            Some("r") => Value::from(repr_of(state, &value)?),
            Some(other) => {
                return Err(wrong(format!("the conversion !{other} of a format is not known here")));
            }
        };
        out.push_str(&brace_field(state, &value, spec)?);
    }
    out.push_str(rest);
    Ok(out)
}

/// What stands after the colon of a place.
fn parse_spec(spec: &str) -> Result<Field, Error> {
    let refuse = || wrong(format!("the format `{spec}` is not known here"));
    let mut field = Field::default();
    let mut rest = spec;
    let is_align = |character: &char| "<>^=".contains(*character);
    let mut characters = spec.chars();
    match (characters.next(), characters.next()) {
        (Some(fill), Some(align)) if is_align(&align) => {
            (field.fill, field.align) = (Some(fill), Some(align));
            rest = characters.as_str();
        }
        (Some(align), _) if is_align(&align) => {
            field.align = Some(align);
            rest = &spec[1..];
        }
        _ => {}
    }
    let mut take = |choices: &str| {
        let found = rest.chars().next().filter(|next| choices.contains(*next));
        rest = &rest[usize::from(found.is_some())..];
        found
    };
    field.sign = take("+- ");
    field.is_alternate = take("#").is_some();
    field.is_zero = take("0").is_some();
    let (width, after) = leading_number(rest)?;
    (field.width, rest) = (width.unwrap_or(0), after);
    let mut take = |choices: &str| {
        let found = rest.chars().next().filter(|next| choices.contains(*next));
        rest = &rest[usize::from(found.is_some())..];
        found
    };
    field.grouping = take(",_");
    let has_point = take(".").is_some();
    if has_point {
        let (precision, after) = leading_number(rest)?;
        field.precision = Some(precision.ok_or_else(refuse)?);
        rest = after;
    }
    field.kind = rest.chars().next();
    if rest.chars().count() > 1 || (field.is_zero && (field.align.is_some() || field.grouping.is_some())) {
        return Err(refuse());
    }
    Ok(field)
}

fn brace_field(state: &State, value: &Value, spec: &str) -> Result<String, Error> {
    if spec.is_empty() {
        return text_of(state, value);
    }
    let field = parse_spec(spec)?;
    let refuse = || {
        wrong(format!("the format `{spec}` of a value of the type {} is not known here", type_name(value)))
    };
    if let Some(text) = value.as_str() {
        let is_plain =
            field.sign.is_none() && !field.is_alternate && !field.is_zero && field.grouping.is_none();
        if !is_plain || !matches!(field.kind, None | Some('s')) || field.align == Some('=') {
            return Err(refuse());
        }
        let cut = field.precision.map_or(usize::MAX, |precision| precision);
        return field.pad(state, &text.chars().take(cut).collect::<String>(), '<');
    }
    match (integer(value), field.kind) {
        (Some(number), None | Some('d' | 'x' | 'X' | 'o' | 'b')) if field.precision.is_none() => {
            let kind = field.kind.unwrap_or('d');
            if field.grouping == Some(',') && kind != 'd' {
                return Err(refuse());
            }
            field.integer(state, number, kind)
        }
        (_, Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%'))) if !field.is_alternate => {
            field.float(state, as_float(value).ok_or_else(refuse)?, kind)
        }
        (None, None) if field.precision.is_none() && !field.is_alternate && field.grouping.is_none() => {
            let number = float(value).filter(|number| number.is_finite()).ok_or_else(refuse)?;
            field.pad_number(state, number.is_sign_negative(), "", &python_float(number.abs()))
        }
        _ => Err(refuse()),
    }
}
