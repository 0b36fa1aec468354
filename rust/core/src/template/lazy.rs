//! What Python makes anew at each call and does not keep as a list: generators, views of a dict, ranges.
//!
//! They can be looped over, but not written as JSON. A generator gives its items once, has no length, and is true
//! even where nothing is in it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Enumerator, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value, filters};

use super::order::{integer, type_name, wrong};
use super::print::not_iterable;

/// The longest range, as Jinja2's sandbox has it.
const MAX_RANGE: i128 = 100_000;

/// Items that are no list.
#[derive(Debug)]
pub(super) struct Lazy {
    /// What Python calls its type.
    kind: &'static str,
    /// What is printed: for a view what stands before its items, for a range all of it; None for what has no text.
    text: Option<String>,
    /// The rest of the items, where they are gone when they have been looked at; else all of them.
    items: Mutex<VecDeque<Value>>,
}

impl Lazy {
    /// Items that are there once.
    pub(super) fn generator(items: Vec<Value>) -> Value {
        Self::once("generator", items)
    }

    /// Items that are there once, of some other type.
    pub(super) fn once(kind: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { kind, text: None, items: Mutex::new(items.into()) })
    }

    /// `dict.items()` and its kin.
    pub(super) fn view(kind: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { kind, text: Some(kind.to_owned()), items: Mutex::new(items.into()) })
    }

    /// The numbers of a range, which must not be too many.
    pub(super) fn range(state: &State, start: i128, stop: i128, stride: i128) -> Result<Value, Error> {
        let distance = if stride > 0 { stop - start } else { start - stop };
        let length = if distance > 0 { (distance - 1) / stride.abs() + 1 } else { 0 };
        if stride == 0 || length > MAX_RANGE {
            return Err(wrong(format!("a range of {length} numbers with the step {stride}")));
        }
        state.consume_fuel(u64::try_from(length).unwrap_or_default() / 16)?;
        let items = (0..length).map(|number| {
            let value = start + number * stride;
            i64::try_from(value).map_or_else(|_| Value::from(value), Value::from)
        });
        let last = if stride == 1 { String::new() } else { format!(", {stride}") };
        let text = Some(format!("range({start}, {stop}{last})"));
        Ok(Value::from_object(Self { kind: "range", text, items: Mutex::new(items.collect()) }))
    }

    /// What it is to print; a view needs its items after it.
    pub(super) fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// What Python calls its type.
    pub(super) fn kind(&self) -> &'static str {
        self.kind
    }

    /// Whether it can be indexed, and its text is complete.
    pub(super) fn is_range(&self) -> bool {
        self.kind == "range"
    }

    /// Whether its items are gone when they have been looked at.
    pub(super) fn is_once(&self) -> bool {
        self.text.is_none()
    }

    /// The next item of what is there once; the first of all else.
    pub(super) fn next(&self) -> Option<Value> {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_once() { items.pop_front() } else { items.front().cloned() }
    }
}

impl Object for Lazy {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = if self.is_once() { std::mem::take(&mut *items) } else { items.clone() };
        Enumerator::Values(taken.into())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        (!self.is_once()).then(|| self.items.lock().unwrap_or_else(PoisonError::into_inner).len())
    }
}

/// The items of what Python can loop over.
pub(super) fn items_of(state: &State, value: &Value) -> Result<Vec<Value>, Error> {
    let items: Vec<Value> = match value.kind() {
        ValueKind::Undefined => Vec::new(),
        ValueKind::String => {
            value.as_str().unwrap_or_default().chars().map(|each| Value::from(each.to_string())).collect()
        }
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.collect(),
        ValueKind::Map if super::order::is_dict(value) => value.try_iter()?.collect(),
        _ => return Err(not_iterable(type_name(value))),
    };
    state.consume_fuel(items.len() as u64 / 16)?;
    Ok(items)
}

/// What `map` and its kin go through: nothing for what is false, whatever it is.
fn filtered(state: &State, value: &Value) -> Result<Value, Error> {
    let is_lazy = value.downcast_object_ref::<Lazy>().is_some();
    if is_lazy || value.is_true() {
        items_of(state, value).map(Value::from)
    } else {
        Ok(Value::from(Vec::<Value>::new()))
    }
}

/// The function `range`.
fn range(state: &State, first: &Value, stop: Option<&Value>, stride: Option<&Value>) -> Result<Value, Error> {
    let whole = |value: &Value| {
        // far beyond what a range may hold
        integer(value).filter(|number| number.abs() < 1 << 100).ok_or_else(|| {
            wrong(format!("'{}' object cannot be interpreted as an integer", type_name(value)))
        })
    };
    let stride = stride.map_or(Ok(1), whole)?;
    match stop {
        None => Lazy::range(state, 0, whole(first)?, stride),
        Some(stop) => Lazy::range(state, whole(first)?, whole(stop)?, stride),
    }
}

/// Makes generators of what the filters give that are such in Jinja2.
pub(super) fn add_filters(environment: &mut Environment) {
    type Name<'a> = std::borrow::Cow<'a, str>;
    type Given = Rest<ValueOrKwargs>;
    environment.add_function("range", range);
    environment.add_filter("map", |state: &mut State, value: Value, given: Given| {
        let value = filtered(state, &value)?;
        filters::map(state, value, given).map(Lazy::generator)
    });
    environment.add_filter("select", |state: &mut State, value: Value, test: Option<Name>, given: Given| {
        let value = filtered(state, &value)?;
        filters::select(state, value, test, given).map(Lazy::generator)
    });
    environment.add_filter("reject", |state: &mut State, value: Value, test: Option<Name>, given: Given| {
        let value = filtered(state, &value)?;
        filters::reject(state, value, test, given).map(Lazy::generator)
    });
    environment.add_filter(
        "selectattr",
        |state: &mut State, value: Value, name: Name, test: Option<Name>, given: Given| {
            let value = filtered(state, &value)?;
            filters::selectattr(state, value, name, test, given).map(Lazy::generator)
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, name: Name, test: Option<Name>, given: Given| {
            let value = filtered(state, &value)?;
            filters::rejectattr(state, value, name, test, given).map(Lazy::generator)
        },
    );
}
