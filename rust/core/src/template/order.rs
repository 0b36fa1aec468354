//! Whether two values are the same, and which is less, as Python has it.
//!
//! Numbers compare with numbers, texts with texts, lists with lists; what Python refuses to compare is an error here.

use std::cmp::Ordering;

use minijinja::tests::is_sameas;
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::lazy::Lazy;

/// What the comparison of two values gives; `None` where one of them is no number (`nan`).
type Compared = Result<Option<Ordering>, Error>;

/// An error of a template.
pub(super) fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The kind of a value. What the engine makes of `list + list` is a list, though it can be looped over alone there.
pub(super) fn kind(value: &Value) -> ValueKind {
    match value.kind() {
        ValueKind::Iterable if value.downcast_object_ref::<Lazy>().is_none() => ValueKind::Seq,
        kind => kind,
    }
}

/// Whether a value is a namespace, which is neither a dict nor a list.
pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Whether a value is a dict.
pub(super) fn is_dict(value: &Value) -> bool {
    value.kind() == ValueKind::Map && !is_namespace(value) && !is_engine_object(value)
}

/// Whether a value is the loop or a macro of the engine, which look like dicts there.
pub(super) fn is_engine_object(value: &Value) -> bool {
    value.as_object().is_some_and(|object| {
        let name = object.type_name();
        name.ends_with("::Loop") || name.ends_with("::Macro")
    })
}

/// What Python calls the type of a value.
pub(super) fn type_name(value: &Value) -> &'static str {
    match kind(value) {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Seq if value.is_tuple() => "tuple",
        ValueKind::Seq => "list",
        ValueKind::Map if is_dict(value) => "dict",
        ValueKind::Iterable => value.downcast_object_ref::<Lazy>().map_or("generator", Lazy::kind),
        _ => "object",
    }
}

/// A number or a truth as a whole number.
pub(super) fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// A number that has a fraction, or may have one.
pub(super) fn float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok())?
}

pub(super) fn is_numeric(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// Two numbers, without rounding one to compare it.
fn compare_numbers(left: &Value, right: &Value) -> Compared {
    match (integer(left), float(left), integer(right), float(right)) {
        (Some(left), _, Some(right), _) => Ok(Some(left.cmp(&right))),
        (_, Some(left), _, Some(right)) => Ok(left.partial_cmp(&right)),
        (Some(left), _, _, Some(right)) => Ok(compare_with_float(left, right)),
        (_, Some(left), Some(right), _) => Ok(compare_with_float(right, left).map(Ordering::reverse)),
        _ => Err(wrong("a whole number too large to compare")),
    }
}

fn compare_with_float(integer: i128, float: f64) -> Option<Ordering> {
    const LIMIT: f64 = 1.7e38;
    if float.is_nan() {
        None
    } else if float > LIMIT {
        Some(Ordering::Less)
    } else if float < -LIMIT {
        Some(Ordering::Greater)
    } else {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "within the limit, and the fraction is looked at below"
        )]
        let whole = float.trunc() as i128;
        let fraction = float - float.trunc();
        Some(integer.cmp(&whole).then(0.0.partial_cmp(&fraction)?))
    }
}

/// `left == right`.
pub(super) fn equal(left: &Value, right: &Value) -> Result<bool, Error> {
    if is_numeric(left) && is_numeric(right) {
        return Ok(compare_numbers(left, right)? == Some(Ordering::Equal));
    }
    match (kind(left), kind(right)) {
        (ValueKind::String, ValueKind::String) => Ok(left.as_str() == right.as_str()),
        (ValueKind::Seq, ValueKind::Seq) => {
            if left.is_tuple() != right.is_tuple() || left.len() != right.len() {
                return Ok(false);
            }
            for (one, two) in left.try_iter()?.zip(right.try_iter()?) {
                if !equal(&one, &two)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        (ValueKind::Map, ValueKind::Map) if is_dict(left) && is_dict(right) => {
            if left.len() != right.len() {
                return Ok(false);
            }
            for key in left.try_iter()? {
                let other = right.get_item(&key)?;
                if other.is_undefined() || !equal(&left.get_item(&key)?, &other)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        (ValueKind::Iterable, ValueKind::Iterable) => {
            Err(wrong("two generators, ranges or views of dicts are compared; put |list after both"))
        }
        (one, two) if one != two => Ok(false),
        (ValueKind::None | ValueKind::Undefined, _) => Ok(true),
        _ => Ok(is_same(left, right)),
    }
}

/// Whether two values are one object.
pub(super) fn is_same(left: &Value, right: &Value) -> bool {
    left.as_object().is_some() && right.as_object().is_some() && is_sameas(left, right)
}

/// Which of two values is less; an error where Python says that nothing is.
pub(super) fn compare(left: &Value, right: &Value) -> Compared {
    if is_numeric(left) && is_numeric(right) {
        return compare_numbers(left, right);
    }
    match (kind(left), kind(right)) {
        (ValueKind::String, ValueKind::String) => Ok(Some(left.as_str().cmp(&right.as_str()))),
        (ValueKind::Seq, ValueKind::Seq) if left.is_tuple() == right.is_tuple() => {
            for (one, two) in left.try_iter()?.zip(right.try_iter()?) {
                if !equal(&one, &two)? {
                    return compare(&one, &two);
                }
            }
            Ok(Some(left.len().cmp(&right.len())))
        }
        _ => {
            let (left, right) = (type_name(left), type_name(right));
            Err(wrong(format!("'<' not supported between instances of '{left}' and '{right}'")))
        }
    }
}

/// Sorts by keys, keeping the order of what is equal; what has no order is an error.
pub(super) fn sort_by_key<T>(items: &mut [(Value, T)], is_reversed: bool) -> Result<(), Error> {
    // Python compares all neighbours at least; so does this, and a pair without an order is found
    let mut failed = None;
    let mut order = |left: &Value, right: &Value| match compare(left, right) {
        Ok(Some(order)) => order,
        Ok(None) => {
            failed = Some(wrong("a list with nan in it has no order"));
            Ordering::Equal
        }
        Err(error) => {
            failed = Some(error);
            Ordering::Equal
        }
    };
    if is_reversed {
        items.sort_by(|(left, _), (right, _)| order(right, left));
    } else {
        items.sort_by(|(left, _), (right, _)| order(left, right));
    }
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_without_rounding() {
        let large = Value::from(9_007_199_254_740_993_i64);
        let float = Value::from(9_007_199_254_740_992.0);
        assert!(!equal(&large, &float).unwrap());
        assert_eq!(compare(&large, &float).unwrap(), Some(Ordering::Greater));
        assert_eq!(compare(&Value::from(-1), &Value::from(-0.5)).unwrap(), Some(Ordering::Less));
        assert!(equal(&Value::from(1), &Value::from(true)).unwrap());
        assert_eq!(compare(&Value::from(f64::NAN), &Value::from(1)).unwrap(), None);
        assert!(compare(&Value::from(1), &Value::from("a")).is_err());
    }
}
