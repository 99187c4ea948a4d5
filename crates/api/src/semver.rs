//! Semantic versions (<https://semver.org/spec/v2.0.0.html>).

use std::{cmp::Ordering, fmt, str::FromStr};

/// A version such as `1.2.3-rc.1+build.5`. What follows the `+` makes no difference between two.
#[derive(Clone, Debug)]
pub struct Version {
    text: String,
    numbers: [u64; 3],
    before: Vec<Part>,
}

/// A part of what comes before a release. Numbers come before texts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Number(u64),
    Text(String),
}

/// What is wrong with a text that is no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

impl Version {
    /// Reads a version that may begin with `v`, be short, or have zeros in front of its numbers.
    ///
    /// # Errors
    /// If it is none even so.
    pub fn normalized(text: &str) -> Result<Version, ParseError> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let mut parts: Vec<String> = text.splitn(3, '.').map(without_zeros).collect();
        let last = parts.last().map_or("", String::as_str);
        if parts.len() < 3 && last.contains(['+', '-']) {
            return Err(ParseError("short version cannot contain PreRelease/Build meta data".to_owned()));
        }
        parts.resize(3, "0".to_owned());
        parts.join(".").parse()
    }

    /// Major, minor and patch.
    pub fn numbers(&self) -> [u64; 3] {
        self.numbers
    }
}

impl FromStr for Version {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Version, ParseError> {
        read(text).map_err(ParseError)
    }
}

fn read(text: &str) -> Result<Version, String> {
    if text.is_empty() {
        return Err("Version string empty".to_owned());
    }
    let (rest, build) = text.split_once('+').map_or((text, None), |(rest, build)| (rest, Some(build)));
    let (rest, before) = rest.split_once('-').map_or((rest, None), |(rest, before)| (rest, Some(before)));
    let parts: Vec<&str> = rest.splitn(3, '.').collect();
    let &[major, minor, patch] = &parts[..] else {
        return Err("No Major.Minor.Patch elements found".to_owned());
    };
    let numbers = [number("major", major)?, number("minor", minor)?, number("patch", patch)?];
    if let Some(build) = build {
        parts_of(build, "Build meta data")?;
    }
    let before = before.map_or(Ok(Vec::new()), |before| {
        let part = |part: &str| match part.bytes().all(|c| c.is_ascii_digit()) {
            true => number("prerelease", part).map(Part::Number),
            false => Ok(Part::Text(part.to_owned())),
        };
        parts_of(before, "Prerelease")?.into_iter().map(part).collect()
    })?;
    Ok(Version { text: text.to_owned(), numbers, before })
}

impl Ord for Version {
    fn cmp(&self, other: &Version) -> Ordering {
        // A release comes after everything before it.
        let key = |version: &Version| (version.numbers, version.before.is_empty());
        key(self).cmp(&key(other)).then_with(|| self.before.cmp(&other.before))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Version) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Version) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Version {}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn without_zeros(part: &str) -> String {
    if part.len() < 2 {
        return part.to_owned();
    }
    let trimmed = part.trim_start_matches('0');
    if trimmed.starts_with(|c: char| c.is_ascii_digit()) { trimmed.to_owned() } else { format!("0{trimmed}") }
}

fn number(what: &str, text: &str) -> Result<u64, String> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return Err(format!("Invalid character(s) found in {what} number {text:?}"));
    }
    if text.len() > 1 && text.starts_with('0') {
        return Err(format!("the {what} number must not contain leading zeroes {text:?}"));
    }
    text.parse().map_err(|_| format!("the {what} number {text:?} is too large"))
}

fn parts_of<'t>(text: &'t str, what: &str) -> Result<Vec<&'t str>, String> {
    let parts: Vec<&str> = text.split('.').collect();
    for part in &parts {
        if part.is_empty() {
            return Err(format!("{what} is empty"));
        }
        if !part.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-') {
            return Err(format!("Invalid character(s) found in {what} {part:?}"));
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_version() {
        for text in ["1.2.3", "0.0.0-alpha.1", "1.0.0-0A.is.legal+build.01", "1.0.0+a-b", "1.0.0--"] {
            assert_eq!(text.parse::<Version>().map(|v| v.to_string()).as_deref(), Ok(text));
        }
        for text in [
            "",
            "1",
            "1.2",
            "1.2.3.4",
            "v1.2.3",
            " 1.2.3",
            "01.2.3",
            "1.2.3-",
            "1.2.3-01",
            "1.2.3+",
            "1.2.3-a_b",
            "1.+2.3",
        ] {
            assert!(text.parse::<Version>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn order() {
        // The example of the specification.
        let list = [
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "1.0.0",
            "1.0.1",
            "1.2.0",
            "10.0.0",
        ];
        let list: Vec<Version> = list.iter().map(|text| text.parse().unwrap()).collect();
        assert!(list.is_sorted_by(|a, b| a < b), "{list:?}");
        assert_eq!("1.0.0+a".parse::<Version>(), "1.0.0+b".parse());
    }

    #[test]
    fn lenient_forms() {
        for (text, expect) in [
            ("v1.0.0", Some("1.0.0")),
            ("1.0", Some("1.0.0")),
            ("01.01.01", Some("1.1.1")),
            ("v1.00.3-rc.1", Some("1.0.3-rc.1")),
            ("1", Some("1.0.0")),
            ("1.0-rc", None),
            ("vv1", None),
            (" 1.0.0", None),
        ] {
            assert_eq!(Version::normalized(text).ok().map(|v| v.to_string()).as_deref(), expect, "{text:?}");
        }
    }
}
