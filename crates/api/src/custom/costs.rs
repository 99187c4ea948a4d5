//! Whether rules in CEL may cost too much, by their estimates, when a definition is written
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#resource-use-by-validation-functions>).

use serde_json::Value;

use crate::field::{Errors, Path};

/// What one expression may cost, as often as it may be evaluated for one object, in units.
const PER_EXPRESSION: u64 = 10_000_000;
/// What all expressions of a schema may cost together.
const PER_SCHEMA: u64 = 100_000_000;
/// How many of the most expensive ones are named when that is too much, if they take a hundredth of it at least.
const NAMED: usize = 4;

/// How often something can be in an object; `None` if lists or maps around it have no limit.
pub type Times = Option<u64>;

/// How often what is described within this schema can be there.
pub fn below(schema: &Value, times: Times) -> Times {
    let limit = |key: &str| schema[key].as_i64().map(|limit| u64::try_from(limit).unwrap_or(0));
    let own = match schema["type"].as_str() {
        Some("object") if !schema["additionalProperties"].is_null() => limit("maxProperties")?,
        Some("array") => limit("maxItems")?,
        _ => 1,
    };
    Some(times?.saturating_mul(own))
}

/// What the rules of one schema cost together.
pub struct Costs {
    /// Whether the schema is stored as it is: what was let in then stays.
    stored: bool,
    total: u64,
    expensive: Vec<(u64, String)>,
}

impl Costs {
    /// Of none so far.
    pub fn new(stored: bool) -> Costs {
        Costs { stored, total: 0, expensive: Vec::new() }
    }

    /// Takes in an expression, by upstream's name of its estimate.
    pub fn add(&mut self, name: &str, cost: u64, path: Path<'_>, errors: &mut Errors) {
        if cost > PER_EXPRESSION && !self.stored {
            errors.forbidden(path, message(name, cost, PER_EXPRESSION));
        }
        self.total = self.total.saturating_add(cost);
        if cost >= PER_SCHEMA / 100 {
            self.expensive.push((cost, path.to_string()));
            self.expensive.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
            self.expensive.truncate(NAMED);
        }
    }

    /// Says so if it is too much. `path` leads to the schema.
    pub fn judge(self, path: Path<'_>, errors: &mut Errors) {
        if self.total <= PER_SCHEMA || self.stored {
            return;
        }
        let why = "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema";
        for (_, expensive) in &self.expensive {
            errors.forbidden(Path::Root.at(expensive), why);
        }
        let name = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema";
        errors.forbidden(path, message(name, self.total, PER_SCHEMA));
    }
}

fn message(name: &str, cost: u64, limit: u64) -> String {
    let factor = match cost as f64 / limit as f64 {
        factor if factor > 100.0 => "more than 100x".to_owned(),
        // So that nobody reads 1.0.
        factor if factor < 1.5 => format!("{factor:.6}x"),
        factor => format!("{factor:.1}x"),
    };
    format!(
        "{name} exceeds budget by factor of {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(errors: &Errors) -> Vec<String> {
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn how_often() {
        let list = json!({"type": "array", "maxItems": 3});
        assert_eq!(below(&list, Some(5)), Some(15));
        assert_eq!(below(&list, None), None);
        assert_eq!(below(&json!({"type": "array"}), Some(5)), None);
        assert_eq!(below(&json!({"type": "object", "properties": {}}), Some(5)), Some(5));
        assert_eq!(
            below(&json!({"type": "object", "additionalProperties": {}, "maxProperties": 2}), Some(5)),
            Some(10)
        );
        assert_eq!(below(&json!({"type": "object", "additionalProperties": {}}), Some(5)), None);
    }

    #[test]
    fn how_much_too_much() {
        let (path, mut errors) = (Path::Root.at("rule"), Errors::default());
        let mut costs = Costs::new(false);
        for cost in [10_000_000, 10_000_001, 14_900_000, 15_000_000, 999_000_000, 1_000_000_001] {
            costs.add("estimated rule cost", cost, path, &mut errors);
        }
        let hint = "(try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)";
        let factors = ["1.000000x", "1.490000x", "1.5x", "99.9x", "more than 100x"];
        let expect = factors
            .map(|factor| format!("rule: Forbidden: estimated rule cost exceeds budget by factor of {factor} {hint}"));
        assert_eq!(shown(&errors), expect);
    }

    #[test]
    fn all_together() {
        let judge = |stored: bool, costs: &[u64]| {
            let (root, mut errors) = (Path::Root, Errors::default());
            let mut all = Costs::new(stored);
            for (index, cost) in costs.iter().enumerate() {
                all.add("estimated rule cost", *cost, root.index(index), &mut errors);
            }
            all.judge(root.at("schema"), &mut errors);
            shown(&errors)
        };
        assert_eq!(judge(false, &[10_000_000; 10]), [""; 0]);
        let costs = [
            9_000_000, 999_999, 10_000_000, 9_000_001, 9_500_000, 9_900_000, 9_000_000, 9_000_000, 9_000_000,
            9_000_000, 9_000_000, 9_000_000,
        ];
        let found = judge(false, &costs);
        let places: Vec<&str> = found.iter().map(|error| error.split(": ").next().unwrap_or_default()).collect();
        assert_eq!(places, ["[2]", "[5]", "[4]", "[3]", "schema"]);
        assert!(found[4].contains("entire OpenAPIv3 schema exceeds budget by factor of 1.024000x"), "{}", found[4]);
        assert_eq!(judge(true, &[u64::MAX, u64::MAX]), [""; 0]);
    }
}
