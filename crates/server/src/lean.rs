//! An object without what nobody is going to look at: rows of tables need little of it, and reading is what they cost.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Names of fields that nobody looks at who does not say what they look at, wherever they stand.
const UNSEEN: [&str; 1] = ["managedFields"];

/// Reads an object, but of it only what is at these paths: names with dots between them, by which the elements of a list are
/// led into like what is in them. Everything, if there are none, but for what is [`UNSEEN`].
///
/// # Errors
/// If it is not JSON.
pub fn read(bytes: &[u8], paths: &[&str]) -> serde_json::Result<Value> {
    debug_assert!(paths.len() <= 64, "a path is a bit");
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let all = u64::MAX.checked_shr(64 - paths.len() as u32).unwrap_or_default();
    let value = Part { paths, on: all, from: 0 }.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// A part of an object.
#[derive(Clone, Copy)]
struct Part<'a> {
    paths: &'a [&'a str],
    /// The paths that lead through here, a bit for each. They are the same up to here. None if all of it is read.
    on: u64,
    /// Where in them goes on what lies below.
    from: usize,
}

impl<'a> Part<'a> {
    /// A field of it; `None` if it is not read.
    fn field(self, name: &str) -> Option<Part<'a>> {
        if self.on == 0 {
            return (!UNSEEN.contains(&name)).then_some(self);
        }
        let (mut on, mut left) = (0, self.on);
        while left != 0 {
            let path = left.trailing_zeros() as usize;
            left &= left - 1;
            match self.paths[path][self.from..].strip_prefix(name).map(|rest| rest.as_bytes().first()) {
                Some(Some(b'.')) => on |= 1 << path,
                // It ends here, so all that is below belongs to it.
                Some(None) => return Some(Part { on: 0, ..self }),
                _ => {}
            }
        }
        (on != 0).then_some(Part { on, from: self.from + name.len() + 1, ..self })
    }
}

/// The name of a field of this part, if it is read.
struct Name<'a>(Part<'a>);

impl<'de, 'a> DeserializeSeed<'de> for Name<'a> {
    type Value = Option<(String, Part<'a>)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for Name<'a> {
    type Value = Option<(String, Part<'a>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.field(name).map(|part| (name.to_owned(), part)))
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = map.next_key_seed(Name(self))? {
            match name {
                Some((name, part)) => drop(object.insert(name, map.next_value_seed(part)?)),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(object.into())
    }
}

/// Just behind the brace that closes the object whose inside begins at `start`, in JSON that is well-formed.
pub fn end_of_object(bytes: &[u8], start: usize) -> usize {
    let (mut depth, mut at) = (1, start);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = end_of_string(bytes, at + 1),
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// The quote that closes the string whose inside begins at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => break,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_at_a_path_is_read() {
        let object = json!({"a": 1, "ab": 2, "managedFields": [3],
            "b": [{"c": {"x": "y", "managedFields": 4}, "d": -2.5, "e": null}, {"c": true}, 7], "e": {"c": {}}});
        let check = |paths: &[&str], expect: Value| {
            assert_eq!(read(object.to_string().as_bytes(), paths).unwrap(), expect, "{paths:?}");
        };
        check(&["a"], json!({"a": 1}));
        check(&["ab", "x.y", "a.b"], json!({"a": 1, "ab": 2}));
        check(&["b.c"], json!({"b": [{"c": {"x": "y"}}, {"c": true}, 7]}));
        check(&["b.c", "b"], json!({"b": object["b"].clone()}).without("/b/0/c/managedFields"));
        check(&["b.c.x", "b.d", "e.d"], json!({"b": [{"c": {"x": "y"}, "d": -2.5}, {"c": true}, 7], "e": {}}));
        check(&[], object.clone().without("/managedFields").without("/b/0/c/managedFields"));
        assert!(read(b"{\"a\":", &[]).is_err());
        assert!(read(b"{} x", &["a"]).is_err());
    }

    trait Without {
        fn without(self, pointer: &str) -> Value;
    }

    impl Without for Value {
        fn without(mut self, pointer: &str) -> Value {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            self.pointer_mut(parent).and_then(Value::as_object_mut).and_then(|parent| parent.remove(name)).unwrap();
            self
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            "[a-z\"\\\\{}\\[\\]\u{e9}\n]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-d\"{}\\\\]{0,3}", inner, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn nothing_else_is_lost(value in json_value()) {
            prop_assert_eq!(read(value.to_string().as_bytes(), &[]).unwrap(), value);
        }

        #[test]
        fn the_end_of_an_object_is_found(inner in json_value(), after in json_value()) {
            let text = json!([{"k": inner}, after]).to_string();
            let end = end_of_object(text.as_bytes(), 2);
            let first: Value = serde_json::from_str(&text[1..end]).unwrap();
            prop_assert_eq!(first, json!({"k": inner}));
        }
    }
}
