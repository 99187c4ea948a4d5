//! Cells of tables, formatted as `kubectl get` users know them.

use jiff::Timestamp;
use serde_json::Value;

/// The age of an object.
pub fn age(object: &Value, now: Timestamp) -> Value {
    since(&object["metadata"]["creationTimestamp"], now)
}

/// The time since `time`, `<unknown>` if it is not set.
pub fn since(time: &Value, now: Timestamp) -> Value {
    match time.as_str().and_then(|t| t.parse::<Timestamp>().ok()) {
        Some(then) => Value::from(duration(now.as_second() - then.as_second())),
        None => Value::from("<unknown>"),
    }
}

/// A duration of whole seconds as kubectl writes it: `45s`, `5m2s`, `3h12m`, `2d3h`, `40d`, `2y3d`.
pub fn duration(seconds: i64) -> String {
    let part = |big: i64, big_unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit}{small}{small_unit}"),
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..=-2 => "<invalid>".into(),
        -1..=0 => "0s".into(),
        1..120 => format!("{seconds}s"),
        120..600 => part(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => part(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => part(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => part(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

/// A string, or `<none>`.
pub fn text(value: &Value) -> Value {
    match value.as_str() {
        Some(s) if !s.is_empty() => value.clone(),
        _ => Value::from("<none>"),
    }
}

/// A string, or the empty string.
pub fn plain(value: &Value) -> Value {
    Value::from(value.as_str().unwrap_or_default())
}

/// An integer, 0 if it is not set.
pub fn int(value: &Value) -> Value {
    Value::from(value.as_i64().unwrap_or_default())
}

/// The number of entries of a list or map.
pub fn count(value: &Value) -> Value {
    Value::from(value.as_array().map(Vec::len).or(value.as_object().map(|o| o.len())).unwrap_or_default())
}

/// `a=b,c=d` or `<none>`.
pub fn labels(value: &Value) -> Value {
    match value.as_object() {
        Some(map) if !map.is_empty() => {
            let parts: Vec<String> =
                map.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
            parts.join(",").into()
        }
        _ => "<none>".into(),
    }
}

/// A `metav1.LabelSelector` on one line.
pub fn selector(value: &Value) -> Value {
    let mut parts: Vec<String> = Vec::new();
    for (key, label) in value["matchLabels"].as_object().into_iter().flatten() {
        parts.push(format!("{key}={}", label.as_str().unwrap_or_default()));
    }
    for expression in value["matchExpressions"].as_array().into_iter().flatten() {
        let key = expression["key"].as_str().unwrap_or_default();
        let values: Vec<&str> =
            expression["values"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        parts.push(match expression["operator"].as_str() {
            Some("In") => format!("{key} in ({})", values.join(",")),
            Some("NotIn") => format!("{key} notin ({})", values.join(",")),
            Some("Exists") => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    if parts.is_empty() { "<none>".into() } else { parts.join(",").into() }
}

/// The names and the images of a list of containers, each joined by commas.
pub fn containers(spec: &Value) -> (Value, Value) {
    let list = |key: &str| -> Value {
        let items = spec["containers"].as_array().into_iter().flatten();
        items.filter_map(|c| c[key].as_str()).collect::<Vec<_>>().join(",").into()
    };
    (list("name"), list("image"))
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_read_as_in_kubectl() {
        for (seconds, expect) in [
            (0, "0s"),
            (45, "45s"),
            (119, "119s"),
            (120, "2m"),
            (302, "5m2s"),
            (3600, "60m"),
            (10_800, "3h"),
            (11_520, "3h12m"),
            (30_000, "8h"),
            (183_600, "2d3h"),
            (864_000, "10d"),
            (63_072_000, "2y"),
            (400_000_000, "12y"),
        ] {
            assert_eq!(duration(seconds), expect);
        }
    }
}
