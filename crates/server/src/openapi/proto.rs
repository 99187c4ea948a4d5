//! A document of version 2 in protobuf, which kubectl reads where it does not know version 3
//! (`application/com.github.proto-openapi.spec.v2.v1.0+protobuf`:
//! <https://github.com/google/gnostic-models/blob/main/openapiv2/OpenAPIv2.proto>).
//!
//! Told are the definitions, and of paths what each does to which kind. Parameters and answers are left out: nobody who
//! reads this form looks at them.

use serde_json::{Map, Value};

/// The document.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let mut out = Message::default();
    out.text(1, &document["swagger"]);
    let info = &document["info"];
    let mut about = Message::default();
    about.text(1, &info["title"]);
    about.text(2, &info["version"]);
    out.message(2, &about);
    let mut paths = Message::default();
    for (path, item) in fields(&document["paths"]) {
        paths.named(2, path, &path_item(item));
    }
    out.message(8, &paths);
    let mut definitions = Message::default();
    for (name, content) in fields(&document["definitions"]) {
        definitions.named(1, name, &schema(content));
    }
    out.message(9, &definitions);
    out.0
}

fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn path_item(item: &Value) -> Message {
    const OPERATIONS: [(&str, u8); 7] =
        [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("options", 6), ("head", 7), ("patch", 8)];
    let mut out = Message::default();
    for (name, field) in OPERATIONS {
        let operation = &item[name];
        if operation.is_object() {
            let mut about = Message::default();
            about.text(3, &operation["description"]);
            about.text(5, &operation["operationId"]);
            about.extensions(13, operation);
            out.message(field, &about);
        }
    }
    out.extensions(10, item);
    out
}

fn schema(schema: &Value) -> Message {
    let mut out = Message::default();
    // A reference with a description beside it stands in a list of one in the other forms.
    let reference = match schema["allOf"].as_array().map(Vec::as_slice) {
        Some([only]) => &only["$ref"],
        _ => &schema["$ref"],
    };
    if reference.is_string() {
        out.text(1, reference);
        out.text(4, &schema["description"]);
        out.extensions(31, schema);
        return out;
    }
    for (key, field) in [("format", 2), ("title", 3), ("description", 4), ("pattern", 13)] {
        out.text(field, &schema[key]);
    }
    out.any(5, &schema["default"]);
    for (key, field) in [("multipleOf", 6), ("maximum", 7), ("minimum", 9)] {
        out.double(field, &schema[key]);
    }
    for (key, field) in [("exclusiveMaximum", 8), ("exclusiveMinimum", 10), ("uniqueItems", 16)] {
        out.boolean(field, &schema[key]);
    }
    let lengths = [("maxLength", 11), ("minLength", 12), ("maxItems", 14), ("minItems", 15), ("maxProperties", 17)];
    for (key, field) in lengths.into_iter().chain([("minProperties", 18)]) {
        out.integer(field, &schema[key]);
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        out.text(19, name);
    }
    for value in schema["enum"].as_array().into_iter().flatten() {
        out.any(20, value);
    }
    let more = &schema["additionalProperties"];
    if more.is_object() || more.is_boolean() {
        let mut item = Message::default();
        match more.is_object() {
            true => item.message(1, &self::schema(more)),
            false => item.boolean(2, more),
        }
        out.message(21, &item);
    }
    if schema["type"].is_string() {
        let mut kind = Message::default();
        kind.text(1, &schema["type"]);
        out.message(22, &kind);
    }
    if schema["items"].is_object() {
        let mut items = Message::default();
        items.message(1, &self::schema(&schema["items"]));
        out.message(23, &items);
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        out.message(24, &self::schema(part));
    }
    if schema["properties"].is_object() {
        let mut properties = Message::default();
        for (name, content) in fields(&schema["properties"]) {
            properties.named(1, name, &self::schema(content));
        }
        out.message(25, &properties);
    }
    out.boolean(28, &schema["readOnly"]);
    out.any(30, &schema["example"]);
    out.extensions(31, schema);
    out
}

const VARINT: u64 = 0;
const SIXTY_FOUR: u64 = 1;
const LENGTH: u64 = 2;

/// The bytes of a message. What is not of a field's type is left out.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    fn tag(&mut self, field: u8, kind: u64) {
        self.varint(u64::from(field) << 3 | kind);
    }

    fn bytes(&mut self, field: u8, bytes: &[u8]) {
        self.tag(field, LENGTH);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, field: u8, value: &Value) {
        if let Some(text) = value.as_str() {
            self.bytes(field, text.as_bytes());
        }
    }

    fn message(&mut self, field: u8, message: &Message) {
        self.bytes(field, &message.0);
    }

    fn boolean(&mut self, field: u8, value: &Value) {
        if let Some(value) = value.as_bool() {
            self.tag(field, VARINT);
            self.varint(u64::from(value));
        }
    }

    fn integer(&mut self, field: u8, value: &Value) {
        if let Some(value) = value.as_i64() {
            self.tag(field, VARINT);
            self.varint(value.cast_unsigned());
        }
    }

    fn double(&mut self, field: u8, value: &Value) {
        if let Some(value) = value.as_f64() {
            self.tag(field, SIXTY_FOUR);
            self.0.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// A name and what it means.
    fn named(&mut self, field: u8, name: &str, value: &Message) {
        let mut entry = Message::default();
        entry.bytes(1, name.as_bytes());
        entry.message(2, value);
        self.message(field, &entry);
    }

    /// Any value, as YAML; JSON is some.
    fn any(&mut self, field: u8, value: &Value) {
        if !value.is_null() {
            self.message(field, &any(value));
        }
    }

    /// What a part of a document says beyond the specification.
    fn extensions(&mut self, field: u8, part: &Value) {
        for (name, value) in fields(part).filter(|(name, _)| name.starts_with("x-")) {
            self.named(field, name, &any(value));
        }
    }
}

fn any(value: &Value) -> Message {
    let mut any = Message::default();
    any.bytes(2, value.to_string().as_bytes());
    any
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A message as text: `field:value` of each, those that are messages in brackets, by the numbers in `messages`.
    fn shown(mut bytes: &[u8], messages: &[&[u8]], path: &[u8]) -> String {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let (byte, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(byte & 0x7f) << shift;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            value
        }
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes);
            let field = u8::try_from(tag >> 3).unwrap();
            let below = [path, &[field]].concat();
            out.push(match tag & 7 {
                VARINT => format!("{field}:{}", varint(&mut bytes)),
                SIXTY_FOUR => {
                    let (number, rest) = bytes.split_first_chunk().unwrap();
                    bytes = rest;
                    format!("{field}:{}", f64::from_le_bytes(*number))
                }
                _ => {
                    let length = usize::try_from(varint(&mut bytes)).unwrap();
                    let (content, rest) = bytes.split_at(length);
                    bytes = rest;
                    match messages.contains(&&*below) {
                        true => format!("{field}:[{}]", shown(content, messages, &below)),
                        false => format!("{field}:{}", String::from_utf8_lossy(content)),
                    }
                }
            });
        }
        out.join(" ")
    }

    #[test]
    fn a_document() {
        let document = json!({"swagger": "2.0", "info": {"title": "T", "version": "1"},
            "paths": {"/x": {"get": {"operationId": "o", "x-kubernetes-action": "get", "responses": {"200": {}}}}},
            "definitions": {"X": {"type": "object", "x-k": [1]}}});
        let of_paths: [&[u8]; 6] = [&[8], &[8, 2], &[8, 2, 2], &[8, 2, 2, 2], &[8, 2, 2, 2, 13], &[8, 2, 2, 2, 13, 2]];
        let of_definitions: [&[u8]; 6] = [&[9], &[9, 1], &[9, 1, 2], &[9, 1, 2, 22], &[9, 1, 2, 31], &[9, 1, 2, 31, 2]];
        let messages = [&[&[2_u8][..]][..], &of_paths, &of_definitions].concat();
        assert_eq!(
            shown(&encode(&document), &messages, &[]),
            "1:2.0 2:[1:T 2:1] 8:[2:[1:/x 2:[2:[5:o 13:[1:x-kubernetes-action 2:[2:\"get\"]]]]]] \
             9:[1:[1:X 2:[22:[1:object] 31:[1:x-k 2:[2:[1]]]]]]"
        );
    }

    #[test]
    fn a_schema() {
        let check = |value: Value, expect: &str| {
            assert_eq!(
                shown(&schema(&value).0, &[&[21], &[21, 1], &[22], &[23], &[23, 1], &[25], &[25, 1]], &[]),
                expect
            );
        };
        check(
            json!({"type": "string", "format": "date", "maxLength": 300, "minimum": 0.5, "uniqueItems": true}),
            "2:date 9:0.5 16:1 11:300 22:[1:string]",
        );
        check(json!({"description": "d", "allOf": [{"$ref": "#/definitions/Y"}]}), "1:#/definitions/Y 4:d");
        check(json!({"$ref": "#/definitions/Y", "type": "object"}), "1:#/definitions/Y");
        check(json!({"type": "array", "items": {"$ref": "#/y"}}), "22:[1:array] 23:[1:[1:#/y]]");
        check(json!({"additionalProperties": {"format": "f"}}), "21:[1:[2:f]]");
        check(json!({"additionalProperties": false}), "21:[2:0]");
        check(json!({"required": ["a", "b"], "properties": {"a": {}}}), "19:a 19:b 25:[1:[1:a 2:]]");
        check(json!({"type": ["string", "null"], "maxLength": "x", "items": true}), "");
    }
}
