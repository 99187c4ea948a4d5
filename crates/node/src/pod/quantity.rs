//! Kubernetes' quantities (`100m`, `1.5Gi`, `2e3`), as exact numbers.
//!
//! <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A resource list, as requests and limits are.
pub type Resources = BTreeMap<String, Quantity>;

/// The quantity in thousandths, rounded up; `None` if it is not a quantity.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let (sign, body) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let digits = body.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(body.len());
    let (number, suffix) = body.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    // The value is mantissa * 10^-scale * numerator * 10^exponent, and we want it in thousandths.
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (numerator, exponent): (i128, i32) = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        other => (1, other.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    let power = exponent + 3 - i32::try_from(fraction.len()).ok()?;
    let value = mantissa.checked_mul(numerator)?;
    let value = if power >= 0 {
        value.checked_mul(10_i128.checked_pow(power.unsigned_abs())?)?
    } else {
        let divisor = 10_i128.checked_pow(power.unsigned_abs())?;
        value.checked_add(divisor - 1)? / divisor
    };
    Some(sign * value)
}

/// The quantity in units, rounded up.
pub fn units(text: &str) -> Option<i128> {
    milli(text).map(|m| m.div_euclid(1000) + i128::from(m.rem_euclid(1000) != 0))
}

/// A resource of a list in thousandths, `None` if absent or not a quantity.
pub fn get_milli(list: Option<&Resources>, name: &str) -> Option<i64> {
    milli(&list?.get(name)?.0).and_then(|m| i64::try_from(m).ok())
}

/// A resource of a list in units.
pub fn get_units(list: Option<&Resources>, name: &str) -> Option<i64> {
    units(&list?.get(name)?.0).and_then(|m| i64::try_from(m).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, expect) in [
            ("1", Some(1000)),
            ("100m", Some(100)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("2e3", Some(2_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("1n", Some(1)),
            ("0", Some(0)),
            ("-1", Some(-1000)),
            ("", None),
            ("x", None),
            ("1.2.3", None),
            ("1Qi", None),
        ] {
            assert_eq!(milli(text), expect, "{text}");
        }
        assert_eq!(units("1m"), Some(1));
        assert_eq!(units("1500m"), Some(2));
    }
}
