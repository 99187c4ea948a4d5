//! Functions of texts (<https://kubernetes.io/docs/reference/using-api/cel/#cel-extended-strings-library>).

use super::{
    EvalError, Program, Session, check,
    eval::no_overload,
    value::{List, Text, Val},
};

type Maybe<'a> = Result<Option<Val<'a>>, EvalError>;

fn joined(chars: &[char]) -> String {
    chars.iter().collect()
}

/// A place in a text of `len` characters.
fn place(index: i64, len: usize) -> Result<usize, EvalError> {
    let place = usize::try_from(index).ok().filter(|place| *place <= len);
    place.ok_or_else(|| EvalError::new(format!("index out of range: {index}")))
}

/// Where a text first occurs in another at or after `from`.
fn find(haystack: &[char], needle: &[char], from: usize) -> i64 {
    if needle.len() > haystack.len() {
        return -1;
    }
    let mut places = from..=haystack.len() - needle.len();
    places.find(|at| haystack[*at..*at + needle.len()] == *needle).map_or(-1, |at| at as i64)
}

fn find_last(haystack: &[char], needle: &[char], until: usize) -> i64 {
    if needle.len() > haystack.len() {
        return -1;
    }
    let mut places = 0..=(haystack.len() - needle.len()).min(until);
    places.rfind(|at| haystack[*at..*at + needle.len()] == *needle).map_or(-1, |at| at as i64)
}

impl<'a> Session<'a> {
    /// Calls a function of a text; `None` if there is none of that name for these arguments.
    pub(super) fn string_function(
        &self,
        program: &Program,
        name: &str,
        text: &Text<'a>,
        rest: &[Val<'a>],
    ) -> Maybe<'a> {
        self.spend_bytes(text.len())?;
        Ok(Some(match (name, rest) {
            ("contains", [Val::Str(part)]) => {
                // Looking for a text costs its length at every place, at worst.
                self.spend((text.len() as u64 / 10).saturating_mul(part.len() as u64 / 10))?;
                Val::Bool(text.contains(&**part))
            }
            ("startsWith", [Val::Str(part)]) => Val::Bool(text.starts_with(&**part)),
            ("endsWith", [Val::Str(part)]) => Val::Bool(text.ends_with(&**part)),
            ("matches", [Val::Str(pattern)]) => {
                self.with_pattern(program, pattern, text, |r| Val::Bool(r.is_match(text)))?
            }
            ("find", [Val::Str(pattern)]) => self.with_pattern(program, pattern, text, |r| {
                Val::text(r.find(text).map(|found| found.as_str()).unwrap_or_default())
            })?,
            ("findAll", [Val::Str(pattern), limit @ ..]) => {
                let limit = match limit {
                    [] => usize::MAX,
                    [Val::Int(limit)] => usize::try_from(*limit).unwrap_or(usize::MAX),
                    _ => return Err(no_overload(name)),
                };
                self.with_pattern(program, pattern, text, |r| {
                    Val::list(r.find_iter(text).take(limit).map(|found| Val::text(found.as_str())).collect())
                })?
            }
            ("lowerAscii", []) => Val::text(text.to_ascii_lowercase()),
            ("upperAscii", []) => Val::text(text.to_ascii_uppercase()),
            ("trim", []) => Val::text(text.trim()),
            ("reverse", []) => Val::text(text.chars().rev().collect::<String>()),
            ("charAt", [Val::Int(at)]) => {
                let chars: Vec<char> = text.chars().collect();
                let at = place(*at, chars.len())?;
                Val::text(chars.get(at).map(char::to_string).unwrap_or_default())
            }
            ("indexOf" | "lastIndexOf", [Val::Str(part), offset @ ..]) => {
                self.spend((text.len() as u64 / 10).saturating_mul(part.len() as u64 / 10))?;
                let (chars, part): (Vec<char>, Vec<char>) = (text.chars().collect(), part.chars().collect());
                let offset = match offset {
                    [] => None,
                    [Val::Int(offset)] => Some(place(*offset, chars.len())?),
                    _ => return Err(no_overload(name)),
                };
                Val::Int(match name {
                    "indexOf" => find(&chars, &part, offset.unwrap_or(0)),
                    _ => find_last(&chars, &part, offset.unwrap_or(chars.len())),
                })
            }
            ("substring", [Val::Int(start), end @ ..]) => {
                let chars: Vec<char> = text.chars().collect();
                let end = match end {
                    [] => chars.len(),
                    [Val::Int(end)] => place(*end, chars.len())?,
                    _ => return Err(no_overload(name)),
                };
                let start = place(*start, chars.len())?;
                if start > end {
                    return Err(EvalError::new(format!("invalid substring range. start: {start}, end: {end}")));
                }
                Val::text(joined(&chars[start..end]))
            }
            ("replace", [Val::Str(from), Val::Str(to), limit @ ..]) => {
                let limit = match limit {
                    [] => usize::MAX,
                    [Val::Int(limit)] => usize::try_from(*limit).unwrap_or(usize::MAX),
                    _ => return Err(no_overload(name)),
                };
                // It is paid for before it is made: a text can grow by the length of another.
                let times = text.matches(&**from).count().min(limit);
                self.spend_bytes(times.saturating_mul(to.len().saturating_add(1)))?;
                Val::text(text.replacen(&**from, to, limit))
            }
            ("split", [Val::Str(separator), limit @ ..]) => {
                let limit = match limit {
                    [] => -1,
                    [Val::Int(limit)] => *limit,
                    _ => return Err(no_overload(name)),
                };
                self.spend(text.len() as u64 / 4)?;
                Val::list(split(text, separator, limit).into_iter().map(Val::text).collect())
            }
            ("format", [Val::List(args)]) => Val::text(self.format(text, args)?),
            _ => return Ok(None),
        }))
    }

    fn with_pattern<T>(
        &self,
        program: &Program,
        pattern: &str,
        text: &str,
        work: impl FnOnce(&regex::Regex) -> T,
    ) -> Result<T, EvalError> {
        // The engine is linear in the text for each place of the pattern that it may be at.
        self.spend((text.len() as u64 / 10 + 1).saturating_mul(pattern.len() as u64 / 4 + 1))?;
        if let Some(known) = program.patterns.get(pattern) {
            return Ok(work(known));
        }
        self.spend(pattern.len() as u64 + 100)?;
        let compiled =
            check::pattern(pattern).map_err(|e| EvalError::new(format!("error parsing regexp {pattern:?}: {e}")))?;
        Ok(work(&compiled))
    }

    /// `['a', 'b'].join('-')`.
    pub(super) fn join(&self, list: &List<'a>, separator: &str) -> Result<Val<'a>, EvalError> {
        let mut out = String::new();
        for (index, item) in list.iter().enumerate() {
            let Val::Str(item) = item else { return Err(no_overload("join")) };
            if index > 0 {
                out.push_str(separator);
            }
            out.push_str(&item);
            self.spend_bytes(item.len() + separator.len() + 10)?;
        }
        Ok(Val::text(out))
    }
}

/// Splits as Go does: an empty separator gives characters, a limit of 0 nothing.
fn split(text: &str, separator: &str, limit: i64) -> Vec<String> {
    let Ok(limit) = usize::try_from(limit) else {
        return match separator {
            "" => text.chars().map(String::from).collect(),
            _ => text.split(separator).map(str::to_owned).collect(),
        };
    };
    match (limit, separator) {
        (0, _) => Vec::new(),
        (limit, "") => {
            let chars: Vec<char> = text.chars().collect();
            let cut = chars.len().min(limit - 1);
            let mut out: Vec<String> = chars[..cut].iter().map(char::to_string).collect();
            if cut < chars.len() {
                out.push(joined(&chars[cut..]));
            }
            out
        }
        (limit, separator) => text.splitn(limit, separator).map(str::to_owned).collect(),
    }
}
