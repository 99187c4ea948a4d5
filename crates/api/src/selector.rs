//! Label and field selectors (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#api>).

use serde_json::Value;

use crate::names;

/// One condition on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// The label exists and has one of these values.
    In(String, Vec<String>),
    /// The label does not exist, or has none of these values.
    NotIn(String, Vec<String>),
    /// The label exists.
    Exists(String),
    /// The label does not exist.
    DoesNotExist(String),
    /// The label is an integer above this.
    Gt(String, i64),
    /// The label is an integer below this.
    Lt(String, i64),
}

/// Conditions of which all must hold. The empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(pub Vec<Requirement>);

impl LabelSelector {
    /// Parses `a=b,c!=d,e in (f,g),!h,i>1`. The error says what was expected.
    pub fn parse(text: &str) -> Result<LabelSelector, String> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            requirements.push(requirement(part).map_err(|e| format!("unable to parse requirement: {e}"))?);
        }
        Ok(LabelSelector(requirements))
    }

    /// Reads a `metav1.LabelSelector` (`matchLabels`, `matchExpressions`). `null` matches nothing and gives `None`.
    pub fn from_value(value: &Value) -> Option<LabelSelector> {
        let object = value.as_object()?;
        let mut requirements = Vec::new();
        for (key, label) in object.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            requirements.push(Requirement::In(key.clone(), vec![label.as_str().unwrap_or_default().to_owned()]));
        }
        for expression in object.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let key = expression["key"].as_str().unwrap_or_default().to_owned();
            let values = expression["values"].as_array().into_iter().flatten();
            let values: Vec<String> = values.filter_map(|v| v.as_str().map(str::to_owned)).collect();
            requirements.push(match expression["operator"].as_str() {
                Some("In") => Requirement::In(key, values),
                Some("NotIn") => Requirement::NotIn(key, values),
                Some("Exists") => Requirement::Exists(key),
                Some("DoesNotExist") => Requirement::DoesNotExist(key),
                _ => return None,
            });
        }
        Some(LabelSelector(requirements))
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object with these labels is selected.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => label(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Requirement::NotIn(key, values) => !label(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::DoesNotExist(key) => label(key).is_none(),
            Requirement::Gt(key, n) => label(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Requirement::Lt(key, n) => label(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        })
    }

    /// [`LabelSelector::matches`] on a JSON object of labels.
    pub fn matches_labels(&self, labels: &Value) -> bool {
        self.matches(|key| labels.get(key).and_then(Value::as_str))
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0i32, 0, Vec::new());
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(part: &str) -> Result<Requirement, String> {
    let key = |text: &str| -> Result<String, String> {
        let text = text.trim();
        names::qualified_name(text).map_err(|e| format!("key: Invalid value: {text:?}: {e}"))?;
        Ok(text.to_owned())
    };
    let value = |text: &str| -> Result<String, String> {
        let text = text.trim();
        names::label_value(text).map_err(|e| format!("values: Invalid value: {text:?}: {e}"))?;
        Ok(text.to_owned())
    };
    if let Some(open) = part.find('(') {
        let list =
            part[open + 1..].trim_end().strip_suffix(')').ok_or_else(|| format!("found '{part}', expected: ')'"))?;
        let values = list.split(',').map(value).collect::<Result<Vec<_>, _>>()?;
        let mut words = part[..open].split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(name), Some("in"), None) => Ok(Requirement::In(key(name)?, values)),
            (Some(name), Some("notin"), None) => Ok(Requirement::NotIn(key(name)?, values)),
            _ => Err(format!("found '{part}', expected: in, notin, =, ==, !=, gt, lt")),
        };
    }
    if let Some((name, text)) = part.split_once("!=") {
        return Ok(Requirement::NotIn(key(name)?, vec![value(text)?]));
    }
    if let Some((name, text)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Requirement::In(key(name)?, vec![value(text)?]));
    }
    let number = |text: &str| {
        text.trim().parse::<i64>().map_err(|_| {
            format!("values[0]: Invalid value: {text:?}: for 'Gt', 'Lt' operators, the value must be an integer")
        })
    };
    if let Some((name, text)) = part.split_once('>') {
        return Ok(Requirement::Gt(key(name)?, number(text)?));
    }
    if let Some((name, text)) = part.split_once('<') {
        return Ok(Requirement::Lt(key(name)?, number(text)?));
    }
    match part.strip_prefix('!') {
        Some(name) => Ok(Requirement::DoesNotExist(key(name)?)),
        None => Ok(Requirement::Exists(key(part)?)),
    }
}

/// One condition of a field selector: the field, whether it must be equal, and the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    /// e.g. `spec.nodeName`.
    pub field: String,
    /// `=` or `!=`.
    pub equal: bool,
    /// The value.
    pub value: String,
}

/// Parses `spec.nodeName=a,status.phase!=Running`. Which fields exist is the resource's business.
pub fn parse_fields(text: &str) -> Result<Vec<FieldRequirement>, String> {
    let mut requirements = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (field, equal, value) = match (part.split_once("!="), part.split_once("==")) {
            (Some((field, value)), _) => (field, false, value),
            (None, Some((field, value))) => (field, true, value),
            (None, None) => match part.split_once('=') {
                Some((field, value)) => (field, true, value),
                None => return Err(format!("invalid selector: '{part}'; can't understand '{part}'")),
            },
        };
        requirements.push(FieldRequirement { field: field.trim().into(), equal, value: value.trim().into() });
    }
    Ok(requirements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_match_as_documented() {
        let labels = serde_json::json!({"app": "web", "tier": "front", "n": "5"});
        for (text, expect) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=back", true),
            ("app!=web", false),
            ("missing!=x", true),
            ("app in (web, db),tier notin (back)", true),
            ("app in (db)", false),
            ("app,!missing", true),
            ("!app", false),
            ("n>4,n<6", true),
            ("n>5", false),
        ] {
            assert_eq!(LabelSelector::parse(text).unwrap().matches_labels(&labels), expect, "{text}");
        }
    }

    #[test]
    fn malformed_selectors_say_why() {
        for text in ["a b", "app in web", "app in (web", "=x", "a=b c", "n>x"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
        assert!(parse_fields("metadata.name").is_err());
    }
}
