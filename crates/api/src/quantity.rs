//! Resource quantities (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>).

use std::{fmt, str::FromStr};

/// How a quantity was written, which is how it is written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Decimal,
    Binary,
    Exponent,
}

/// A fixed-point number with a precision of 10^-9, e.g. `100m` CPU or `2Gi` of memory.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nano: i128,
    format: Format,
}

const NANO: i128 = 1_000_000_000;
const DECIMAL: [(&str, i128); 10] = [
    ("E", NANO * 1_000_000_000_000_000_000),
    ("P", NANO * 1_000_000_000_000_000),
    ("T", NANO * 1_000_000_000_000),
    ("G", NANO * 1_000_000_000),
    ("M", NANO * 1_000_000),
    ("k", NANO * 1_000),
    ("", NANO),
    ("m", NANO / 1_000),
    ("u", 1_000),
    ("n", 1),
];
const BINARY: [(&str, i128); 6] = [
    ("Ei", NANO << 60),
    ("Pi", NANO << 50),
    ("Ti", NANO << 40),
    ("Gi", NANO << 30),
    ("Mi", NANO << 20),
    ("Ki", NANO << 10),
];

/// A text that is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity: expected a number with an optional suffix such as m, k, M, G, Ki, Mi, Gi or e3")]
pub struct ParseError(String);

impl Quantity {
    /// A whole number.
    pub fn new(value: i64) -> Quantity {
        Quantity { nano: value as i128 * NANO, format: Format::Decimal }
    }

    /// A number of bytes, written with binary suffixes.
    pub fn bytes(value: i64) -> Quantity {
        Quantity { nano: value as i128 * NANO, format: Format::Binary }
    }

    /// A number of thousandths, such as CPU millicores.
    pub fn millis(value: i64) -> Quantity {
        Quantity { nano: value as i128 * (NANO / 1_000), format: Format::Decimal }
    }

    /// The value in whole units, rounded up.
    pub fn value(&self) -> i64 {
        ceil(self.nano, NANO)
    }

    /// The value in thousandths, rounded up.
    pub fn milli_value(&self) -> i64 {
        ceil(self.nano, NANO / 1_000)
    }

    /// The value as a float, which may not be exact.
    pub fn as_f64(&self) -> f64 {
        self.nano as f64 / NANO as f64
    }

    /// Whether it is below zero.
    pub fn is_negative(&self) -> bool {
        self.nano < 0
    }
}

fn ceil(nano: i128, unit: i128) -> i64 {
    let up = nano.div_euclid(unit) + i128::from(nano.rem_euclid(unit) != 0);
    up.clamp(i64::MIN as i128, i64::MAX as i128) as i64
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nano.cmp(&other.nano)
    }
}

impl std::ops::Add for Quantity {
    type Output = Quantity;
    fn add(self, other: Quantity) -> Quantity {
        // Nothing has no form of its own.
        let format = if self.nano == 0 { other.format } else { self.format };
        Quantity { nano: self.nano.saturating_add(other.nano), format }
    }
}

impl std::ops::Sub for Quantity {
    type Output = Quantity;
    fn sub(self, other: Quantity) -> Quantity {
        Quantity { nano: self.nano.saturating_sub(other.nano), format: self.format }
    }
}

impl FromStr for Quantity {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Quantity, ParseError> {
        let error = || ParseError(text.to_owned());
        let digits_end = text
            .char_indices()
            .find(|(i, c)| !(c.is_ascii_digit() || *c == '.' || (*i == 0 && (*c == '+' || *c == '-'))))
            .map_or(text.len(), |(i, _)| i);
        let (number, suffix) = text.split_at(digits_end);
        let negative = number.starts_with('-');
        let number = number.trim_start_matches(['+', '-']);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() + fraction.len() > 30 {
            return Err(error());
        }
        let (scale, format) = match suffix {
            "" => (NANO, Format::Decimal),
            _ if BINARY.iter().any(|(s, _)| *s == suffix) => {
                (BINARY.iter().find(|(s, _)| *s == suffix).map_or(NANO, |(_, unit)| *unit), Format::Binary)
            }
            _ if DECIMAL.iter().any(|(s, _)| *s == suffix) => {
                (DECIMAL.iter().find(|(s, _)| *s == suffix).map_or(NANO, |(_, unit)| *unit), Format::Decimal)
            }
            _ => {
                let exponent: i32 = suffix
                    .strip_prefix(['e', 'E'])
                    .and_then(|e| e.parse().ok())
                    .filter(|e| (-9..=18).contains(e))
                    .ok_or_else(error)?;
                let unit = if exponent >= 0 {
                    NANO * 10i128.pow(exponent as u32)
                } else {
                    NANO / 10i128.pow(-exponent as u32)
                };
                (unit, Format::Exponent)
            }
        };
        // digits * scale / 10^len(fraction), rounded up (away from zero), capped at 2^63-1 units.
        let digits: i128 = format!("{whole}{fraction}").parse().map_err(|_| error())?;
        let divisor = 10i128.pow(fraction.len() as u32);
        let cap = i64::MAX as i128 * NANO;
        let nano = match digits.checked_mul(scale) {
            Some(product) => (product / divisor + i128::from(product % divisor != 0)).min(cap),
            None => (digits / divisor).checked_mul(scale).map_or(cap, |n| n.min(cap)),
        };
        Ok(Quantity { nano: if negative { -nano } else { nano }, format })
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        // A binary quantity below 1024 or with a fraction is written in decimal, as upstream does.
        if self.format == Format::Binary && self.nano.abs() >= 1024 * NANO && self.nano % NANO == 0 {
            for (suffix, unit) in BINARY {
                if self.nano % unit == 0 {
                    return write!(f, "{}{suffix}", self.nano / unit);
                }
            }
            return write!(f, "{}", self.nano / NANO);
        }
        for (index, (suffix, unit)) in DECIMAL.iter().enumerate() {
            if self.nano % unit == 0 {
                let value = self.nano / unit;
                return match self.format {
                    Format::Exponent if !suffix.is_empty() => write!(f, "{value}e{}", 18 - 3 * index as i32),
                    _ => write!(f, "{value}{suffix}"),
                };
            }
        }
        write!(f, "{}n", self.nano)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_form() {
        for (text, expect) in [
            ("100m", "100m"),
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("1.5Gi", "1536Mi"),
            ("1024Mi", "1Gi"),
            ("512", "512"),
            ("0.1m", "100u"),
            ("1e3", "1e3"),
            ("9E", "9E"),
            ("12E", "9223372036854775807"),
            ("-2Ki", "-2Ki"),
            ("0Gi", "0"),
            ("1000", "1k"),
            ("0.5Gi", "512Mi"),
            ("100Ki", "100Ki"),
            (".5", "500m"),
        ] {
            assert_eq!(text.parse::<Quantity>().unwrap().to_string(), expect, "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity() {
        for text in ["", "abc", "1.2.3", "1x", "1 Gi", "Gi", "--1", "1e99", "1KiB"] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_round_up() {
        assert_eq!("1500m".parse::<Quantity>().unwrap().value(), 2);
        assert_eq!("1u".parse::<Quantity>().unwrap().milli_value(), 1);
        assert_eq!("-1500m".parse::<Quantity>().unwrap().value(), -1);
    }

    proptest::proptest! {
        #[test]
        fn formatting_loses_nothing(n in -1_000_000_000i64..1_000_000_000, suffix in "(|m|k|M|G|Ki|Mi|Gi|u|n)") {
            let quantity: Quantity = format!("{n}{suffix}").parse().unwrap();
            let again: Quantity = quantity.to_string().parse().unwrap();
            proptest::prop_assert_eq!(quantity, again);
            proptest::prop_assert_eq!(quantity.to_string(), again.to_string());
        }
    }
}
