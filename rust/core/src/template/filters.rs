//! Filters that minijinja has not, or has otherwise than Jinja2.
//!
//! A value and its arguments come in, by place or by name; a value, or what Python says against it, goes out.

use std::cmp::Ordering;
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::filters_of_numbers as numbers;
use super::filters_of_texts as texts;
use super::lazy::{Lazy, items_of};
use super::operators::{self, as_float, is_hashable};
use super::order::{compare, equal, integer, is_dict, kind, sort_by_key, type_name, wrong};

/// The most columns a text is moved by.
const MAX_WIDTH: i128 = 1 << 20;

/// The arguments of a filter.
pub(super) struct Options {
    given: Rest<Value>,
    named: Kwargs,
}

impl Options {
    pub(super) fn new(given: Rest<Value>, named: Kwargs) -> Self {
        Self { given, named }
    }

    /// The argument at a place, or of a name; none of both is no argument.
    pub(super) fn get(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        match (self.given.get(at), self.named.get::<Option<Value>>(name)?) {
            (Some(_), Some(_)) => Err(wrong(format!("got multiple values for argument '{name}'"))),
            (Some(value), None) => Ok(Some(value.clone())),
            (None, value) => Ok(value.clone()),
        }
    }

    /// An argument that counts as set where it is true.
    pub(super) fn is_set(&self, at: usize, name: &str) -> Result<bool, Error> {
        Ok(self.get(at, name)?.is_some_and(|value| value.is_true()))
    }

    /// A whole number that is not too large to do work by.
    pub(super) fn integer(&self, at: usize, name: &str, default: i128) -> Result<i128, Error> {
        let Some(value) = self.get(at, name)? else { return Ok(default) };
        match integer(&value) {
            Some(number) if number.abs() <= MAX_WIDTH => Ok(number),
            Some(_) => Err(ErrorKind::OutOfFuel.into()),
            None => Err(wrong(format!("the argument '{name}' is no integer"))),
        }
    }

    /// Refuses arguments that nobody asked for; there may be so many by place.
    pub(super) fn finish(&self, places: usize) -> Result<(), Error> {
        self.named.assert_all_used()?;
        if self.given.len() > places { Err(wrong("a filter has too many arguments")) } else { Ok(()) }
    }
}

type Filter = fn(&State, &Value, &Options) -> Result<Value, Error>;

const FILTERS: [(&str, Filter); 31] = [
    ("abs", numbers::abs),
    ("batch", batch),
    ("capitalize", texts::capitalize),
    ("center", texts::center),
    ("count", length),
    ("dictsort", dictsort),
    ("e", texts::escape),
    ("escape", texts::escape),
    ("first", first),
    ("float", numbers::to_float),
    ("forceescape", texts::force_escape),
    ("groupby", groupby),
    ("indent", texts::indent),
    ("int", numbers::to_int),
    ("items", items),
    ("last", last),
    ("length", length),
    ("list", list),
    ("max", max),
    ("min", min),
    ("replace", texts::replace),
    ("reverse", reverse),
    ("round", numbers::round),
    ("slice", slice),
    ("sort", sort),
    ("sum", sum),
    ("title", texts::title),
    ("trim", texts::trim),
    ("truncate", texts::truncate),
    ("unique", unique),
    ("wordcount", texts::wordcount),
];

/// Filters and tests of the engine that Jinja2 has not, or has with another result.
const FOREIGN_FILTERS: [&str; 7] = ["attr", "bool", "chain", "lines", "pprint", "split", "zip"];
const FOREIGN_TESTS: [&str; 4] = ["endingwith", "int", "safe", "startingwith"];

/// Gives the engine these filters, and takes away those that Jinja2 has not.
pub(super) fn add_to(environment: &mut Environment) {
    for (name, filter) in FILTERS {
        environment.add_filter(
            name,
            move |state: &State, value: Value, given: Rest<Value>, named: Kwargs| {
                filter(state, &value, &Options::new(given, named))
            },
        );
    }
    for name in FOREIGN_FILTERS {
        environment.remove_filter(name);
    }
    for name in FOREIGN_TESTS {
        environment.remove_test(name);
    }
}

/// A text in place of another, which is markup where the other is.
pub(super) fn like(value: &Value, text: String) -> Value {
    if value.is_safe() { Value::from_safe_string(text) } else { Value::from(text) }
}

fn length(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    operators::length(value).map(Value::from)
}

fn list(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    items_of(state, value).map(Value::from)
}

fn first(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    let found = match (value.downcast_object_ref::<Lazy>(), value.as_str(), kind(value)) {
        (Some(lazy), ..) => lazy.next(),
        (_, Some(text), _) => text.chars().next().map(|first| Value::from(first.to_string())),
        (_, _, ValueKind::Seq) => value.try_iter()?.next(),
        _ => items_of(state, value)?.into_iter().next(),
    };
    Ok(found.unwrap_or(Value::UNDEFINED))
}

fn last(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    if let Some(lazy) = value.downcast_object_ref::<Lazy>().filter(|lazy| lazy.is_once()) {
        return Err(wrong(format!("'{}' object is not reversible", lazy.kind())));
    }
    let found = match (value.as_str(), kind(value)) {
        (Some(text), _) => text.chars().next_back().map(|last| Value::from(last.to_string())),
        (_, ValueKind::Seq) => match value.len().unwrap_or_default().checked_sub(1) {
            Some(last) => Some(value.get_item_by_index(last)?),
            None => None,
        },
        _ => items_of(state, value)?.pop(),
    };
    Ok(found.unwrap_or(Value::UNDEFINED))
}

fn items(_: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    if value.is_undefined() {
        return Ok(Lazy::generator(Vec::new()));
    }
    if !is_dict(value) {
        return Err(wrong("can only get item pairs from a mapping"));
    }
    let pair = |key: Value| Ok(Value::from(Tuple::from([key.clone(), value.get_item(&key)?])));
    Ok(Lazy::generator(value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>()?))
}

fn reverse(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    options.finish(0)?;
    if let Some(text) = value.as_str() {
        return Ok(like(value, text.chars().rev().collect()));
    }
    let mut items = items_of(state, value)?;
    items.reverse();
    let is_generator = value.downcast_object_ref::<Lazy>().is_some_and(Lazy::is_once);
    if is_generator {
        return Ok(Value::from(items));
    }
    Ok(Lazy::once(if type_name(value) == "list" { "list_reverseiterator" } else { "reversed" }, items))
}

fn batch(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let size = usize::try_from(options.integer(0, "linecount", 0)?).unwrap_or(0);
    let fill = options.get(1, "fill_with")?.filter(|fill| !fill.is_none());
    options.finish(2)?;
    if size == 0 {
        return Err(wrong("batch needs a number of items"));
    }
    let items = items_of(state, value)?;
    state.consume_fuel(size as u64 / 16)?;
    let batches = items.chunks(size).map(|batch| {
        let mut batch = batch.to_vec();
        if let Some(fill) = &fill {
            batch.resize(size, fill.clone());
        }
        Value::from(batch)
    });
    Ok(Lazy::generator(batches.collect()))
}

fn slice(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let slices = usize::try_from(options.integer(0, "slices", 0)?).unwrap_or(0);
    let fill = options.get(1, "fill_with")?.filter(|fill| !fill.is_none());
    options.finish(2)?;
    if slices == 0 {
        return Err(wrong("slice needs a number of slices"));
    }
    state.consume_fuel(slices as u64)?;
    let items = items_of(state, value)?;
    let (size, longer) = (items.len() / slices, items.len() % slices);
    let mut rest = items.as_slice();
    let parts = (0..slices).map(|number| {
        let (part, after) = rest.split_at(size + usize::from(number < longer));
        rest = after;
        let mut part = part.to_vec();
        if number >= longer {
            part.extend(fill.clone());
        }
        Value::from(part)
    });
    Ok(Lazy::generator(parts.collect()))
}

/// What an attribute of a filter names in an item: `a.b`, or a place.
fn attribute_of(item: &Value, attribute: Option<&Value>) -> Result<Value, Error> {
    let Some(attribute) = attribute else { return Ok(item.clone()) };
    let Some(path) = attribute.as_str() else { return operators::item(item, attribute) };
    path.split('.').try_fold(item.clone(), |item, name| {
        let key = name
            .parse::<u32>()
            .ok()
            .filter(|_| !name.starts_with('+'))
            .map_or_else(|| Value::from(name), Value::from);
        operators::item(&item, &key)
    })
}

/// A text in small letters where case does not count, any other value as it is.
fn in_case(value: Value, is_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !is_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

/// The items of a value with what each is sorted or told by.
fn keyed(
    state: &State,
    value: &Value,
    attribute: Option<&Value>,
    is_sensitive: bool,
) -> Result<Vec<(Value, Value)>, Error> {
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let items = items_of(state, value)?;
    state.consume_fuel(items.len() as u64)?;
    let key = |item: Value| Ok((in_case(attribute_of(&item, attribute)?, is_sensitive), item));
    items.into_iter().map(key).collect()
}

fn values_of(items: Vec<(Value, Value)>) -> Vec<Value> {
    items.into_iter().map(|(_, item)| item).collect()
}

fn sort(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let (reverse, is_sensitive) = (options.is_set(0, "reverse")?, options.is_set(1, "case_sensitive")?);
    let attribute = options.get(2, "attribute")?;
    options.finish(3)?;
    if let Some(paths) = attribute.as_ref().and_then(Value::as_str).filter(|paths| paths.contains(',')) {
        let items = items_of(state, value)?;
        state.consume_fuel(items.len() as u64)?;
        let key = |item: Value| -> Result<(Value, Value), Error> {
            let part = |path| Ok(in_case(attribute_of(&item, Some(&Value::from(path)))?, is_sensitive));
            Ok((Value::from(paths.split(',').map(part).collect::<Result<Vec<_>, Error>>()?), item.clone()))
        };
        let mut items = items.into_iter().map(key).collect::<Result<Vec<_>, Error>>()?;
        sort_by_key(&mut items, reverse)?;
        return Ok(Value::from(values_of(items)));
    }
    let mut items = keyed(state, value, attribute.as_ref(), is_sensitive)?;
    sort_by_key(&mut items, reverse)?;
    Ok(Value::from(values_of(items)))
}

fn extreme(state: &State, value: &Value, options: &Options, wanted: Ordering) -> Result<Value, Error> {
    let (is_sensitive, attribute) = (options.is_set(0, "case_sensitive")?, options.get(1, "attribute")?);
    options.finish(2)?;
    let mut items = keyed(state, value, attribute.as_ref(), is_sensitive)?.into_iter();
    let Some((mut best, mut found)) = items.next() else { return Ok(Value::UNDEFINED) };
    for (key, item) in items {
        match compare(&key, &best)? {
            None => return Err(wrong("a list with nan in it has no order")),
            Some(order) if order == wanted => (best, found) = (key, item),
            Some(_) => {}
        }
    }
    Ok(found)
}

fn max(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    extreme(state, value, options, Ordering::Greater)
}

fn min(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    extreme(state, value, options, Ordering::Less)
}

fn sum(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let attribute = options.get(0, "attribute")?;
    let start = options.get(1, "start")?.unwrap_or_else(|| Value::from(0));
    options.finish(2)?;
    let mut items = vec![start];
    items.extend(keyed(state, value, attribute.as_ref(), true)?.into_iter().map(|(key, _)| key));
    if let Some(whole) = items.iter().map(integer).collect::<Option<Vec<i128>>>() {
        let total = whole.into_iter().try_fold(0_i128, i128::checked_add);
        let total = total.ok_or_else(|| wrong("a whole number too large for this renderer"))?;
        return Ok(i64::try_from(total).map_or_else(|_| Value::from(total), Value::from));
    }
    let numbers = items.iter().map(as_float).collect::<Option<Vec<f64>>>();
    let numbers = numbers.ok_or_else(|| wrong("a sum of what is no number"))?;
    let total: f64 = numbers.iter().fold(0.0, |total, number| total + number);
    // from Python 3.12 on, what is lost in each step is added at the end
    let (mut high, mut low) = (0.0_f64, 0.0_f64);
    for number in numbers {
        let next = high + number;
        low += if high.abs() >= number.abs() { (high - next) + number } else { (number - next) + high };
        high = next;
    }
    if total.is_finite() && (high + low).to_bits() != total.to_bits() {
        return Err(wrong("a sum whose last digits depend on the version of Python"));
    }
    Ok(Value::from(total))
}

fn unique(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let (is_sensitive, attribute) = (options.is_set(0, "case_sensitive")?, options.get(1, "attribute")?);
    options.finish(2)?;
    let mut found: Vec<(Value, Value)> = Vec::new();
    for (key, item) in keyed(state, value, attribute.as_ref(), is_sensitive)? {
        if !is_hashable(&key) {
            return Err(wrong(format!("unhashable type: '{}'", type_name(&key))));
        }
        state.consume_fuel(found.len() as u64 / 4)?;
        let mut is_known = false;
        for (known, _) in &found {
            is_known |= equal(known, &key)?;
        }
        if !is_known {
            found.push((key, item));
        }
    }
    Ok(Lazy::generator(values_of(found)))
}

fn dictsort(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let is_sensitive = options.is_set(0, "case_sensitive")?;
    let by = options.get(1, "by")?.unwrap_or_else(|| Value::from("key"));
    let reverse = options.is_set(2, "reverse")?;
    options.finish(3)?;
    let by_value = match by.as_str() {
        Some("key") => false,
        Some("value") => true,
        _ => return Err(wrong("You can only sort by either \"key\" or \"value\"")),
    };
    if !is_dict(value) {
        return Err(wrong(format!("dictsort of a value of the type {}", type_name(value))));
    }
    state.consume_fuel(value.len().unwrap_or_default() as u64)?;
    let pair = |key: Value| -> Result<(Value, Value), Error> {
        let item = value.get_item(&key)?;
        let sorted_by = in_case(if by_value { item.clone() } else { key.clone() }, is_sensitive);
        Ok((sorted_by, Value::from(Tuple::from([key, item]))))
    };
    let mut pairs = value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>()?;
    sort_by_key(&mut pairs, reverse)?;
    Ok(Value::from(values_of(pairs)))
}

/// What `groupby` gives: a tuple whose places have names.
#[derive(Debug)]
pub(super) struct Group(Value, Value);

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_str(), key.as_usize()) {
            (Some("grouper"), _) | (_, Some(0)) => Some(self.0.clone()),
            (Some("list"), _) | (_, Some(1)) => Some(self.1.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> minijinja::value::Enumerator {
        minijinja::value::Enumerator::Seq(2)
    }
}

fn groupby(state: &State, value: &Value, options: &Options) -> Result<Value, Error> {
    let attribute = options.get(0, "attribute")?.ok_or_else(|| wrong("groupby needs an attribute"))?;
    let default = options.get(1, "default")?.filter(|default| !default.is_none());
    let is_sensitive = options.is_set(2, "case_sensitive")?;
    options.finish(3)?;
    let items = items_of(state, value)?;
    state.consume_fuel(items.len() as u64)?;
    let name = |item: &Value| -> Result<Value, Error> {
        let found = attribute_of(item, Some(&attribute))?;
        Ok(if found.is_undefined() { default.clone().unwrap_or(found) } else { found })
    };
    let key = |item: Value| Ok((in_case(name(&item)?, is_sensitive), item));
    let mut items = items.into_iter().map(key).collect::<Result<Vec<_>, Error>>()?;
    sort_by_key(&mut items, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in items {
        match groups.last_mut() {
            Some((known, group)) if equal(known, &key)? => group.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let group = |(_, group): (Value, Vec<Value>)| -> Result<Value, Error> {
        let first = group.first().map_or(Ok(Value::UNDEFINED), name)?;
        Ok(Value::from_object(Group(first, Value::from(group))))
    };
    Ok(Value::from(groups.into_iter().map(group).collect::<Result<Vec<_>, Error>>()?))
}
