//! What Python makes anew at each call and does not keep as a list: generators, views of a dict, ranges.
//!
//! They can be looped over, but not written as JSON. A generator gives its items once, has no length, and is true
//! even where nothing is in it.

use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Enumerator, Object, ObjectRepr, Rest, ValueOrKwargs};
use minijinja::{Environment, State, Value, filters};

/// Items that are no list.
#[derive(Debug)]
pub(super) struct Lazy {
    /// Whether they are gone when they have been looked at.
    once: bool,
    /// What stands before them when they are printed; None for what has no text.
    name: Option<&'static str>,
    /// What Python calls its type.
    kind: &'static str,
    items: Mutex<Vec<Value>>,
}

impl Lazy {
    /// Items that are there once.
    pub(super) fn generator(items: Vec<Value>) -> Value {
        Self::value(true, None, "generator", items)
    }

    /// `dict.items()` and its kin.
    pub(super) fn view(name: &'static str, items: Vec<Value>) -> Value {
        Self::value(false, Some(name), name, items)
    }

    fn value(once: bool, name: Option<&'static str>, kind: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { once, name, kind, items: Mutex::new(items) })
    }

    /// What stands before the items when they are printed.
    pub(super) fn name(&self) -> Option<&'static str> {
        self.name
    }

    /// What Python calls its type.
    pub(super) fn kind(&self) -> &'static str {
        self.kind
    }
}

impl Object for Lazy {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        Enumerator::Values(if self.once { std::mem::take(&mut *items) } else { items.clone() })
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        (!self.once).then(|| self.items.lock().unwrap_or_else(PoisonError::into_inner).len())
    }
}

/// Makes generators of what the filters give that are such in Jinja2.
pub(super) fn add_filters(environment: &mut Environment) {
    type Name<'a> = std::borrow::Cow<'a, str>;
    type Given = Rest<ValueOrKwargs>;
    environment.add_filter("map", |state: &mut State, value: Value, given: Given| {
        filters::map(state, value, given).map(Lazy::generator)
    });
    environment.add_filter("select", |state: &mut State, value: Value, test: Option<Name>, given: Given| {
        filters::select(state, value, test, given).map(Lazy::generator)
    });
    environment.add_filter("reject", |state: &mut State, value: Value, test: Option<Name>, given: Given| {
        filters::reject(state, value, test, given).map(Lazy::generator)
    });
    environment.add_filter(
        "selectattr",
        |state: &mut State, value: Value, name: Name, test: Option<Name>, given: Given| {
            filters::selectattr(state, value, name, test, given).map(Lazy::generator)
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, name: Name, test: Option<Name>, given: Given| {
            filters::rejectattr(state, value, name, test, given).map(Lazy::generator)
        },
    );
}
