//! The part of JSONPath that columns, scale paths and selectable fields use
//! (<https://kubernetes.io/docs/reference/kubectl/jsonpath/>): fields, indexes, `[*]`, and filters by one comparison.

use serde_json::Value;

/// A path.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonPath(Vec<Step>);

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(Box<str>),
    Index(i64),
    All,
    /// `..name`: everywhere below.
    Below(Box<str>),
    Filter {
        path: JsonPath,
        /// Nothing: the path leads somewhere.
        compare: Option<(Compare, Value)>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl JsonPath {
    /// Reads a path such as `.spec.replicas` or `.status.conditions[?(@.type=="Ready")].status`.
    pub fn parse(text: &str) -> Result<JsonPath, String> {
        if !text.starts_with(['.', '[', '$']) {
            return Err("must be a simple json path starting with .".to_owned());
        }
        steps(text.strip_prefix('$').unwrap_or(text)).map(JsonPath)
    }

    /// The names, if it is made of nothing else: `.spec.replicas`.
    pub fn fields(&self) -> Option<Vec<&str>> {
        self.0.iter().map(|step| if let Step::Field(name) = step { Some(&**name) } else { None }).collect()
    }

    /// The names that it begins with, as far as none of them has a dot: all that it leads to is there.
    pub fn start(&self) -> Vec<&str> {
        let plain = |step: &'_ Step| matches!(step, Step::Field(name) if !name.contains('.'));
        let names = self.0.iter().take_while(|step| plain(step));
        names.filter_map(|step| if let Step::Field(name) = step { Some(&**name) } else { None }).collect()
    }

    /// Every value that it leads to.
    pub fn find<'v>(&self, value: &'v Value) -> Vec<&'v Value> {
        let mut at = vec![value];
        for step in &self.0 {
            let mut next = Vec::new();
            for value in at {
                step.apply(value, &mut next);
            }
            at = next;
        }
        at
    }
}

impl Step {
    fn apply<'v>(&self, value: &'v Value, found: &mut Vec<&'v Value>) {
        match self {
            Step::Field(name) => found.extend(value.get(&**name)),
            Step::Index(index) => {
                let Some(list) = value.as_array() else { return };
                let at = if *index < 0 { list.len() as i64 + index } else { *index };
                found.extend(usize::try_from(at).ok().and_then(|at| list.get(at)));
            }
            Step::All => match value {
                Value::Array(list) => found.extend(list),
                Value::Object(map) => found.extend(map.values()),
                _ => {}
            },
            Step::Below(name) => {
                found.extend(value.get(&**name));
                match value {
                    Value::Array(list) => list.iter().for_each(|value| self.apply(value, found)),
                    Value::Object(map) => map.values().for_each(|value| self.apply(value, found)),
                    _ => {}
                }
            }
            Step::Filter { path, compare } => {
                let holds = |item: &&Value| {
                    let left = path.find(item);
                    match compare {
                        None => !left.is_empty(),
                        Some((compare, right)) => left.first().is_some_and(|left| compare.holds(left, right)),
                    }
                };
                found.extend(value.as_array().into_iter().flatten().filter(holds));
            }
        }
    }
}

impl Compare {
    fn holds(self, left: &Value, right: &Value) -> bool {
        let order = match (left.as_f64(), right.as_f64()) {
            (Some(a), Some(b)) => a.partial_cmp(&b),
            _ => match (left.as_str(), right.as_str()) {
                (Some(a), Some(b)) => Some(a.cmp(b)),
                _ => (left == right).then_some(std::cmp::Ordering::Equal),
            },
        };
        match self {
            Compare::Equal => order.is_some_and(|o| o.is_eq()),
            Compare::NotEqual => !order.is_some_and(|o| o.is_eq()),
            Compare::Less => order.is_some_and(|o| o.is_lt()),
            Compare::LessOrEqual => order.is_some_and(|o| o.is_le()),
            Compare::Greater => order.is_some_and(|o| o.is_gt()),
            Compare::GreaterOrEqual => order.is_some_and(|o| o.is_ge()),
        }
    }
}

fn steps(mut rest: &str) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("..") {
            let (name, after) = name(after);
            steps.push(Step::Below(name.into()));
            rest = after;
        } else if let Some(after) = rest.strip_prefix('.') {
            // `.spec.[0]` is the same as `.spec[0]`.
            if after.starts_with('[') {
                rest = after;
                continue;
            }
            let (name, after) = name(after);
            match &*name {
                "" if after.is_empty() && steps.is_empty() => {}
                "" => return Err(format!("a name is missing before {after:?}")),
                "*" => steps.push(Step::All),
                _ => steps.push(Step::Field(name.into())),
            }
            rest = after;
        } else if let Some(after) = rest.strip_prefix('[') {
            let end = bracket(after).ok_or_else(|| format!("unterminated array in {rest:?}"))?;
            steps.push(inside(after[..end].trim())?);
            rest = &after[end + 1..];
        } else {
            return Err(format!("unexpected {rest:?}"));
        }
    }
    Ok(steps)
}

/// A name up to the next step; a backslash takes the next character as it is.
fn name(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => return (name, &text[at..]),
            _ => name.push(c),
        }
    }
    (name, "")
}

/// Where the bracket ends that has been opened; those in quotes and inner ones do not count.
fn bracket(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), c) if open == c => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(at),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn unquoted(text: &str) -> Option<&str> {
    ['\'', '"'].iter().find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote))
}

fn inside(text: &str) -> Result<Step, String> {
    if text == "*" {
        return Ok(Step::All);
    }
    if let Some(name) = unquoted(text) {
        return Ok(Step::Field(name.into()));
    }
    if let Some(filter) = text.strip_prefix("?(").and_then(|rest| rest.strip_suffix(')')) {
        let bad = || format!("the filter {filter:?} is no comparison");
        const SIGNS: [(&str, Compare); 6] = [
            ("==", Compare::Equal),
            ("!=", Compare::NotEqual),
            ("<=", Compare::LessOrEqual),
            (">=", Compare::GreaterOrEqual),
            ("<", Compare::Less),
            (">", Compare::Greater),
        ];
        let found = SIGNS.iter().filter_map(|(sign, compare)| Some((filter.find(sign)?, *sign, *compare)));
        let (left, compare) = match found.min_by_key(|(at, sign, _)| (*at, std::cmp::Reverse(sign.len()))) {
            None => (filter, None),
            Some((at, sign, compare)) => {
                let right = filter[at + sign.len()..].trim();
                let right = match unquoted(right) {
                    Some(text) => Value::from(text),
                    None => serde_json::from_str(right).map_err(|_| bad())?,
                };
                (&filter[..at], Some((compare, right)))
            }
        };
        let left = left.trim().strip_prefix('@').ok_or_else(bad)?;
        return Ok(Step::Filter { path: JsonPath(steps(left)?), compare });
    }
    text.parse().map(Step::Index).map_err(|_| format!("invalid array index {text}"))
}
