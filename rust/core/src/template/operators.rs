//! What stands between two values in Python: comparisons, `in`, `%`, `/`, `**`, places and slices.
//!
//! The [rewriter](super::rewriter) puts these filters in place of the operators of the engine, which has them for fewer
//! values, or otherwise.

use std::cmp::Ordering;

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, State, Value};

use super::format;
use super::lazy::Lazy;
use super::methods::METHODS;
use super::order::{
    self, compare, equal, float, integer, is_dict, is_namespace, is_numeric, kind, type_name, wrong,
};
use super::print::{not_iterable, text_of};
use super::python::BoundMethod;
use super::texts::is_of_one_case;

pub(super) const EQUAL: &str = "equal__";
pub(super) const UNEQUAL: &str = "unequal__";
pub(super) const LESS: &str = "less__";
pub(super) const AT_MOST: &str = "at_most__";
pub(super) const MORE: &str = "more__";
pub(super) const AT_LEAST: &str = "at_least__";
pub(super) const IN: &str = "in__";
pub(super) const NOT_IN: &str = "not_in__";
pub(super) const REMAINDER: &str = "remainder__";
pub(super) const QUOTIENT: &str = "quotient__";
pub(super) const WHOLE_QUOTIENT: &str = "whole_quotient__";
pub(super) const POWER: &str = "power__";
pub(super) const PLUS: &str = "plus__";
pub(super) const PLAIN: &str = "plain__";
pub(super) const KEY: &str = "key__";
pub(super) const ITEM: &str = "item__";
pub(super) const SLICE: &str = "slice__";

/// Whether an order of two values is what an operator asks for.
type Holds = fn(Ordering) -> bool;

/// Gives the engine these filters, and the tests that are the same.
pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter(EQUAL, |left: &Value, right: &Value| equal(left, right));
    environment.add_filter(UNEQUAL, |left: &Value, right: &Value| equal(left, right).map(|same| !same));
    for name in ["eq", "equalto", "=="] {
        environment.add_test(name, |left: &Value, right: &Value| equal(left, right));
    }
    for name in ["ne", "!="] {
        environment.add_test(name, |left: &Value, right: &Value| equal(left, right).map(|same| !same));
    }
    let orders: [(&'static str, [&'static str; 3], Holds); 4] = [
        (LESS, ["lt", "lessthan", "<"], Ordering::is_lt),
        (AT_MOST, ["le", "le", "<="], Ordering::is_le),
        (MORE, ["gt", "greaterthan", ">"], Ordering::is_gt),
        (AT_LEAST, ["ge", "ge", ">="], Ordering::is_ge),
    ];
    for (filter, tests, holds) in orders {
        let test =
            move |left: &Value, right: &Value| Ok::<_, Error>(compare(left, right)?.is_some_and(holds));
        environment.add_filter(filter, test);
        for name in tests {
            environment.add_test(name, test);
        }
    }
    environment.add_filter(IN, is_in);
    environment
        .add_filter(NOT_IN, |state: &State, item: &Value, all: &Value| is_in(state, item, all).map(|is| !is));
    environment.add_test("in", is_in);
    environment.add_filter(REMAINDER, remainder);
    environment.add_filter(QUOTIENT, quotient);
    environment.add_filter(WHOLE_QUOTIENT, whole_quotient);
    environment.add_filter(POWER, power);
    environment.add_filter(PLUS, plus);
    environment.add_filter(PLAIN, plain);
    environment.add_filter(KEY, key);
    environment.add_filter(ITEM, item);
    environment.add_filter(SLICE, slice);
    for (name, is_upper) in [("upper", true), ("lower", false)] {
        environment.add_test(name, move |state: &State, value: &Value| {
            Ok::<_, Error>(is_of_one_case(&text_of(state, value)?, is_upper))
        });
    }
    environment.add_test("sameas", is_same_as);
    environment.add_test("odd", |value: &Value| {
        parity(value).map(|rest| rest > 0.0 && rest < 2.0 && rest.fract() == 0.0)
    });
    environment.add_test("even", |value: &Value| parity(value).map(|rest| rest == 0.0));
    environment.add_test("divisibleby", |value: &Value, by: &Value| {
        remainder_of_numbers(value, by).map(|rest| integer(&rest) == Some(0) || float(&rest) == Some(0.0))
    });
}

fn parity(value: &Value) -> Result<f64, Error> {
    let rest = remainder_of_numbers(value, &Value::from(2))?;
    Ok(f64::try_from(rest).unwrap_or(f64::NAN))
}

fn unsupported(operator: &str, left: &Value, right: &Value) -> Error {
    let (left, right) = (type_name(left), type_name(right));
    wrong(format!("unsupported operand type(s) for {operator}: '{left}' and '{right}'"))
}

/// A whole number as the engine has it.
fn whole(number: Option<i128>) -> Result<Value, Error> {
    let number = number.ok_or_else(|| wrong("a whole number too large for this renderer"))?;
    Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from))
}

/// Two numbers of which one has a fraction, as such.
fn floats(left: &Value, right: &Value) -> Option<(f64, f64)> {
    (is_numeric(left) && is_numeric(right)).then_some(())?;
    Some((as_float(left)?, as_float(right)?))
}

/// A number as one with a fraction; whole ones that cannot be told apart from others so are not taken.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    const EXACT: i128 = 1 << 53;
    #[expect(clippy::cast_precision_loss, reason = "up to 2^53, each is a float")]
    match integer(value) {
        Some(integer) => (integer.abs() <= EXACT).then_some(integer as f64),
        None => float(value),
    }
}

/// `left % right`, for numbers and for a text with places to fill.
fn remainder(state: &State, left: &Value, right: &Value) -> Result<Value, Error> {
    match left.as_str() {
        Some(_) if left.is_safe() => Err(markup()),
        Some(text) => format::percent(state, text, right).map(Value::from),
        None => remainder_of_numbers(left, right),
    }
}

fn remainder_of_numbers(left: &Value, right: &Value) -> Result<Value, Error> {
    let zero = || wrong("integer modulo by zero");
    if let (Some(left), Some(right)) = (integer(left), integer(right)) {
        let rest = left.checked_rem(right).ok_or_else(zero)?;
        return whole(Some(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }));
    }
    let (left, right) = floats(left, right).ok_or_else(|| unsupported("%", left, right))?;
    if right == 0.0 {
        return Err(zero());
    }
    Ok(Value::from(float_remainder(left, right)))
}

fn float_remainder(left: f64, right: f64) -> f64 {
    let rest = left % right;
    if rest == 0.0 {
        0.0_f64.copysign(right)
    } else if (rest < 0.0) != (right < 0.0) {
        rest + right
    } else {
        rest
    }
}

/// `left / right`.
fn quotient(left: &Value, right: &Value) -> Result<Value, Error> {
    let (left, right) = floats(left, right).ok_or_else(|| unsupported("/", left, right))?;
    if right == 0.0 { Err(wrong("division by zero")) } else { Ok(Value::from(left / right)) }
}

/// `left // right`.
fn whole_quotient(left: &Value, right: &Value) -> Result<Value, Error> {
    let zero = || wrong("integer division or modulo by zero");
    if let (Some(left), Some(right)) = (integer(left), integer(right)) {
        let down = left.checked_div(right).ok_or_else(zero)?;
        return whole(Some(if left % right != 0 && (left < 0) != (right < 0) { down - 1 } else { down }));
    }
    let (left, right) = floats(left, right).ok_or_else(|| unsupported("//", left, right))?;
    if right == 0.0 {
        return Err(zero());
    }
    // as Python does it, so that the digits are the same
    let rest = left % right;
    let mut down = (left - rest) / right;
    if rest != 0.0 && (right < 0.0) != (rest < 0.0) {
        down -= 1.0;
    }
    if down == 0.0 {
        return Ok(Value::from(0.0_f64.copysign(left / right)));
    }
    let floor = down.floor();
    Ok(Value::from(if down - floor > 0.5 { floor + 1.0 } else { floor }))
}

/// `left ** right`.
fn power(left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(base), Some(exponent)) = (integer(left), integer(right))
        && exponent >= 0
    {
        return whole(u32::try_from(exponent).ok().and_then(|exponent| base.checked_pow(exponent)));
    }
    let (base, exponent) = floats(left, right).ok_or_else(|| unsupported("**", left, right))?;
    if base == 0.0 && exponent < 0.0 {
        return Err(wrong("0.0 cannot be raised to a negative power"));
    }
    let result = base.powf(exponent);
    if (base < 0.0 && base.is_finite() && exponent.fract() != 0.0)
        || (result.is_infinite() && base.is_finite() && exponent.is_finite())
    {
        return Err(wrong("a power that is no number of this renderer"));
    }
    Ok(Value::from(result))
}

/// `+value`.
fn plus(value: &Value) -> Result<Value, Error> {
    match integer(value) {
        Some(number) => whole(Some(number)),
        None if value.is_number() => Ok(value.clone()),
        None => Err(wrong(format!("bad operand type for unary +: '{}'", type_name(value)))),
    }
}

fn markup() -> Error {
    wrong(
        "a text after |safe or |escape is joined or changed, which Transformers would render with HTML escapes (&lt; for \
         <); remove the filter, or use ~",
    )
}

/// A text that is no markup, or any other value.
fn plain(value: Value) -> Result<Value, Error> {
    if value.is_safe() { Err(markup()) } else { Ok(value) }
}

/// What can be the key of a dict.
fn key(value: Value) -> Result<Value, Error> {
    if is_hashable(&value) {
        Ok(value)
    } else {
        Err(wrong(format!("unhashable type: '{}'", type_name(&value))))
    }
}

/// Whether Python takes a value as a key.
pub(super) fn is_hashable(value: &Value) -> bool {
    match kind(value) {
        ValueKind::Seq => {
            value.is_tuple() && value.try_iter().is_ok_and(|mut items| items.all(|item| is_hashable(&item)))
        }
        ValueKind::Map => false,
        _ => true,
    }
}

/// `item in all`.
fn is_in(state: &State, item: &Value, all: &Value) -> Result<bool, Error> {
    match kind(all) {
        ValueKind::String => match item.as_str() {
            Some(text) => Ok(all.as_str().unwrap_or_default().contains(text)),
            None => {
                Err(wrong(format!("'in <string>' requires string as left operand, not {}", type_name(item))))
            }
        },
        ValueKind::Undefined => Ok(false),
        ValueKind::Map if is_dict(all) => {
            key(item.clone())?;
            Ok(all.as_object().is_some_and(|dict| dict.get_value(item).is_some()))
        }
        ValueKind::Seq => {
            state.consume_fuel(all.len().unwrap_or_default() as u64 / 16)?;
            for other in all.try_iter()? {
                if order::is_same(item, &other) || equal(item, &other)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        ValueKind::Iterable => match all.downcast_object_ref::<Lazy>() {
            Some(lazy) if lazy.is_once() => {
                while let Some(other) = lazy.next() {
                    if equal(item, &other)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            _ => {
                for other in all.try_iter()? {
                    if equal(item, &other)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        },
        _ => Err(wrong(format!("argument of type '{}' is not iterable", type_name(all)))),
    }
}

/// The test `sameas`. Which numbers and texts are one object in Python, nobody can say.
fn is_same_as(left: &Value, right: &Value) -> Result<bool, Error> {
    let (one, two) = (type_name(left), type_name(right));
    if one != two {
        return Ok(false);
    }
    match one {
        "NoneType" => Ok(true),
        "bool" => Ok(left.is_true() == right.is_true()),
        "int" if integer(left).is_some_and(|number| (-5..=256).contains(&number)) => equal(left, right),
        "int" | "float" | "str" | "tuple" | "Undefined" if equal(left, right)? => {
            Err(wrong("`is sameas` of two equal values; use =="))
        }
        _ => Ok(order::is_same(left, right)),
    }
}

/// A place in a list or a text of `length`: negative ones count from the end.
fn place(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 { index + i128::try_from(length).ok()? } else { index };
    usize::try_from(index).ok().filter(|index| *index < length)
}

/// A part of a text, which is markup where the text is.
fn part_of(text: &Value, part: String) -> Value {
    if text.is_safe() { Value::from_safe_string(part) } else { Value::from(part) }
}

/// `base[key]`.
pub(super) fn item(base: &Value, key: &Value) -> Result<Value, Error> {
    let undefined = || Ok(Value::UNDEFINED);
    let index = integer(key);
    match kind(base) {
        ValueKind::Undefined => base.get_item(key),
        ValueKind::String => {
            let text = base.as_str().unwrap_or_default();
            match index {
                Some(index) => {
                    let length = if index < 0 { text.chars().count() } else { usize::MAX };
                    let found = place(index, length).and_then(|index| text.chars().nth(index));
                    found.map_or_else(undefined, |found| Ok(part_of(base, found.to_string())))
                }
                None => Ok(method_of(base, key)),
            }
        }
        ValueKind::Seq => match index {
            Some(index) => match place(index, base.len().unwrap_or_default()) {
                Some(index) => base.get_item_by_index(index),
                None => undefined(),
            },
            None => Ok(method_of(base, key)),
        },
        ValueKind::Map if is_dict(base) => {
            let found = is_hashable(key).then(|| base.as_object().and_then(|dict| dict.get_value(key)));
            Ok(found.flatten().unwrap_or_else(|| method_of(base, key)))
        }
        ValueKind::Map => match key.as_str() {
            Some(name) => base.get_attr(name),
            None => undefined(),
        },
        ValueKind::Iterable => match (base.downcast_object_ref::<Lazy>(), index) {
            (Some(lazy), Some(index)) if lazy.is_range() => place(index, base.len().unwrap_or_default())
                .map_or_else(undefined, |at| base.get_item_by_index(at)),
            _ => undefined(),
        },
        _ => undefined(),
    }
}

/// The method `key` of `base` without a call, where it has it: Jinja2 looks for it when there is no such key.
pub(super) fn method_of(base: &Value, key: &Value) -> Value {
    let is_known = key.as_str().is_some_and(|name| {
        METHODS.contains(&name)
            && match kind(base) {
                ValueKind::String => !matches!(
                    name,
                    "items" | "keys" | "values" | "get" | "pop" | "clear" | "copy" | "fromkeys"
                ),
                ValueKind::Seq if base.is_tuple() => matches!(name, "count" | "index"),
                ValueKind::Seq => matches!(name, "count" | "index" | "copy"),
                _ if is_dict(base) => {
                    matches!(name, "items" | "keys" | "values" | "get" | "copy" | "fromkeys")
                }
                _ => false,
            }
    });
    if is_known { Value::from_object(BoundMethod) } else { Value::UNDEFINED }
}

/// `base[start:stop:step]`.
fn slice(
    state: &State,
    base: &Value,
    start: &Value,
    stop: &Value,
    stride: Option<&Value>,
) -> Result<Value, Error> {
    let bound = |value: &Value| match integer(value) {
        Some(number) => Ok(Some(number)),
        None if value.is_none() => Ok(None),
        None => Err(wrong("slice indices must be integers or None or have an __index__ method")),
    };
    let (start, stop) = (bound(start)?, bound(stop)?);
    let stride = stride.map_or(Ok(None), bound)?.unwrap_or(1);
    if stride == 0 {
        return Err(wrong("slice step cannot be zero"));
    }
    let is_range = base.downcast_object_ref::<Lazy>().is_some_and(Lazy::is_range);
    if is_range {
        return Err(wrong("a slice of a range; put |list after the range"));
    }
    if let Some(text) = base.as_str() {
        let characters: Vec<char> = text.chars().collect();
        let places = places(start, stop, stride, characters.len());
        return Ok(part_of(base, places.map(|at| characters[at]).collect()));
    }
    if kind(base) != ValueKind::Seq {
        return Err(if base.is_undefined() {
            wrong("a slice of what is undefined")
        } else {
            wrong(format!("'{}' object is not subscriptable", type_name(base)))
        });
    }
    let items: Vec<Value> = base.try_iter()?.collect();
    state.consume_fuel(items.len() as u64 / 16)?;
    let part: Vec<Value> = places(start, stop, stride, items.len()).map(|at| items[at].clone()).collect();
    Ok(if base.is_tuple() { Value::from(Tuple::from(part)) } else { Value::from(part) })
}

/// The places in a list of `length` that a slice takes, in its order.
fn places(
    start: Option<i128>,
    stop: Option<i128>,
    stride: i128,
    length: usize,
) -> impl Iterator<Item = usize> {
    let length = i128::try_from(length).unwrap_or(i128::MAX);
    let (lowest, highest) = if stride > 0 { (0, length) } else { (-1, length - 1) };
    let within = |bound: i128| {
        let bound = if bound < 0 { bound.saturating_add(length) } else { bound };
        bound.clamp(lowest, highest)
    };
    let (first, last) = if stride > 0 { (lowest, highest) } else { (highest, lowest) };
    let stop = stop.map_or(last, within);
    let first = start.map_or(first, within);
    let goes_on = move |at: &i128| if stride > 0 { *at < stop } else { *at > stop };
    std::iter::successors(Some(first).filter(goes_on), move |at| at.checked_add(stride).filter(goes_on))
        .filter_map(|at| usize::try_from(at).ok())
}

/// What Python says of a value that has no length.
pub(super) fn length(value: &Value) -> Result<usize, Error> {
    match kind(value) {
        ValueKind::Undefined => Ok(0),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().chars().count()),
        ValueKind::Seq => Ok(value.len().unwrap_or_default()),
        ValueKind::Map if is_dict(value) => Ok(value.len().unwrap_or_default()),
        ValueKind::Map if !is_namespace(value) => value.len().ok_or_else(|| not_iterable("object")),
        ValueKind::Iterable if value.downcast_object_ref::<Lazy>().is_some_and(|lazy| !lazy.is_once()) => {
            Ok(value.len().unwrap_or_default())
        }
        _ => Err(wrong(format!("object of type '{}' has no len()", type_name(value)))),
    }
}
