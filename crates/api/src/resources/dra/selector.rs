//! Expressions that say which devices are meant
//! (<https://kubernetes.io/docs/reference/kubernetes-api/resource/device-class-v1/>, `selectors.cel`).

use std::sync::{Arc, LazyLock};

use serde_json::Value;

use super::parts::{each, text};
use crate::{
    cel::{Program, Sizes, Type},
    field::{Errors, Path},
};

const MAX_SELECTORS: usize = 32;
/// How many bytes an expression may have.
const LONGEST: usize = 10 * 1024;
/// What evaluating an expression may cost at most, in units (upstream's `CELSelectorExpressionMaxCost`).
const MOST: u64 = 1_000_000;

/// `device`: its driver, and its attributes and capacities by domain and name.
static DEVICE: LazyLock<Type> = LazyLock::new(|| {
    let by_name = |of: Type| Type::map(Type::String, Type::map(Type::String, of));
    let fields = [
        ("driver", Type::String),
        ("allowMultipleAllocations", Type::Bool),
        ("attributes", by_name(Type::Dyn)),
        ("capacity", by_name(Type::Named("Quantity"))),
    ];
    Type::Object(Arc::new(fields.map(|(name, ty)| (name.into(), ty)).into()))
});

/// How large what is in it can be.
static SIZES: LazyLock<Sizes> = LazyLock::new(Sizes::of_device);

/// Validates `selectors`. Expressions that were stored before are not read again.
pub(super) fn selectors(object: &Value, stored: bool, path: Path<'_>, errors: &mut Errors) {
    each(object, "selectors", MAX_SELECTORS, path, errors, |selector, path, errors| {
        let (cel, at) = (&selector["cel"], path.at("cel"));
        if !cel.is_object() {
            errors.required(at, "");
        } else if !stored {
            let may_be = |ty: &Type| matches!(ty, Type::Bool | Type::Dyn);
            expression(text(cel, "expression"), may_be, "bool or the unknown type", at.at("expression"), errors);
        }
    });
}

/// Validates an expression about `device`.
pub(super) fn expression(
    text: &str,
    may_be: impl Fn(&Type) -> bool,
    wanted: &str,
    path: Path<'_>,
    errors: &mut Errors,
) {
    if text.len() > LONGEST {
        return errors.too_long(path, LONGEST);
    }
    match Program::estimate(text, &[("device", DEVICE.clone())], &SIZES) {
        Err(error) => errors.invalid(path, text, error),
        Ok((program, _)) if !may_be(program.ty()) => {
            errors.invalid(path, text, format!("must evaluate to {wanted}, not {}", program.ty()));
        }
        Ok((_, cost)) if cost > MOST => errors.forbidden(path, "too complex, exceeds cost limit"),
        Ok(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> String {
        let inner = "int('1'.find('[0-9]*')) < 100".to_owned();
        (0..depth).fold(inner, |inner, level| format!("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10].all(x{level}, {inner})"))
    }

    /// Estimates beside those of upstream
    /// (<https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/dynamic-resource-allocation/cel/compile_test.go>).
    #[test]
    fn what_expressions_cost_at_most() {
        let of = |kind: &str| format!("device.{kind}['dra.example.com']");
        let (attributes, capacity) = (of("attributes"), of("capacity"));
        let quantity = format!("{capacity}.name.isGreaterThan(quantity('1Ki'))");
        for (text, expect) in [
            ("true".to_owned(), 0),
            ("device.driver == ''".into(), 2),
            ("device.driver == 'dra.example.com'".into(), 4),
            ("'no-such-domain' in device.attributes".into(), 3),
            (format!("{attributes}.name"), 4),
            (format!("{attributes}['name']"), 4),
            ("cel.bind(dra, device.attributes['dra.example.com'], dra.name)".into(), 15),
            (format!("{attributes}.name > 0"), 5),
            (format!("{attributes}.name == 'fish'"), 5),
            (format!("{attributes}.name.isGreaterThan(semver('0.0.1'))"), 6),
            (format!("{attributes}.name.exists(x, x > 0)"), 5 + 6 * 64),
            (format!("{attributes}.names.all(x, x != '')"), 5 + 4 * 64),
            (format!("{attributes}.names.all(x, x.isGreaterThan(semver('0.0.1')))"), 5 + 6 * 64),
            (format!("{attributes}.names.size() == 2"), 6),
            (format!("{attributes}.name.includes('fish')"), 4 + 48),
            (format!("{attributes}.name.includes(semver('1.0.0'))"), 4 + 48 + 1),
            (format!("1 in {attributes}.names"), 4 + 64),
            (quantity.clone(), 6),
            (format!("'name' in {capacity} && {quantity}"), 10),
            (format!("!('name' in {capacity}) || {quantity}"), 11),
            ("device.attributes.exists_one(x, x == 'dra.example.com')".into(), 164),
            (format!("{attributes}.exists_one(x, x == 'services')"), 133),
            (format!("{attributes}.services.split('example').size() >= 2"), 19),
            (format!("{attributes}.services.matches('[^a]?sym')"), 18),
            ("device.capacity.exists_one(x, x == 'dra.example.com')".into(), 164),
            (format!("{capacity}.exists_one(x, x == 'memory')"), 133),
            ("device.allowMultipleAllocations == true".into(), 3),
            (nested(7), 85_555_551),
        ] {
            let (_, cost) = Program::estimate(&text, &[("device", DEVICE.clone())], &SIZES).expect(&text);
            assert_eq!(cost, expect, "{text}");
        }
    }

    #[test]
    fn what_costs_too_much_is_refused() {
        let refused = |depth: usize| {
            let mut errors = Errors::default();
            expression(&nested(depth), |ty| *ty == Type::Bool, "bool", Path::Root.at("expression"), &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(refused(5), [""; 0]);
        assert_eq!(refused(6), ["expression: Forbidden: too complex, exceeds cost limit"]);
    }
}
