//! Bodies in JSON and protobuf: what is read can be written, and is the same when it is read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::{
    proto,
    schema::{
        TypeId,
        check::{conform, parse},
    },
};
use seawall_fuzz::{same, schemas};
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Some((ty, body)) = seawall_fuzz::typed(data) else { return };
    let read = if body.starts_with(proto::MAGIC) {
        proto::decode(schemas(), ty, body).ok()
    } else {
        parse(body).ok().map(|(value, _)| value)
    };
    if let Some(object) = read.filter(Value::is_object) {
        check(ty, object);
    }
});

fn check(ty: TypeId, mut object: Value) {
    if conform(schemas(), ty, &mut object).is_err() {
        return;
    }
    let mut again = object.clone();
    assert_eq!(conform(schemas(), ty, &mut again), Ok(Vec::new()), "what conforms has nothing unknown");
    assert_eq!(object, again, "what conforms stays as it is");
    if let Ok((read, duplicates)) = parse(object.to_string().as_bytes()) {
        assert!(same(&read, &object) && duplicates.is_empty(), "{object} was read as {read}");
    }
    // What is zero and no pointer is gone after the first time.
    let through = |object: &Value| {
        let text = |key: &str| object[key].as_str().unwrap_or_default();
        let message = proto::encode::message(schemas(), ty, object);
        let body = proto::encode::envelope(text("apiVersion"), text("kind"), &message);
        proto::decode(schemas(), ty, &body)
    };
    if let Ok(once) = through(&object) {
        let twice = through(&once).expect("what was decoded can be encoded");
        assert!(same(&once, &twice), "{once} became {twice}");
    }
}
