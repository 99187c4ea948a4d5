//! Server-side apply and the records of who owns what. An input is a letter for the type, then up to three configurations,
//! a line each: two are applied by different managers, and the third is what somebody writes over them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::managed::{self, Managed, Manager, Operation, Types};
use seawall_fuzz::schemas;
use serde_json::{Value, json};

fuzz_target!(|data: &[u8]| {
    let Some((ty, rest)) = seawall_fuzz::typed(data) else { return };
    let types = Types { schemas: schemas(), ty, without: &[], nulls: false };
    let (mut object, mut managed) = (None, Managed::default());
    for (index, config) in seawall_fuzz::objects(ty, rest, 3).into_iter().enumerate() {
        if index == 2 {
            let old = object.unwrap_or_else(|| json!({}));
            managed = managed::update(types, &old, &config, managed, &manager("c", Operation::Update), "3");
            object = Some(config);
        } else {
            let manager = manager(["a", "b"][index], Operation::Apply);
            let apply = |object: Option<&Value>, managed: &Managed, force, now| {
                managed::apply(types, object, &config, managed.clone(), &manager, force, now)
            };
            let Ok((new, owners)) = apply(object.as_ref(), &managed, true, "1") else { return };
            let again = apply(Some(&new), &owners, false, "2").expect("what was applied can be applied");
            assert_eq!(again.0, new, "to apply twice is to apply once");
            assert_eq!(again.1.write(), owners.write(), "who says the same again owns the same");
            (object, managed) = (Some(new), owners);
        }
        let written = managed.write().unwrap_or_default();
        let read = Managed::read(&written).expect("what was written can be read");
        assert_eq!(read.write().unwrap_or_default(), written, "records survive");
    }
});

fn manager(name: &str, operation: Operation) -> Manager {
    Manager { name: name.into(), operation, api_version: "v1".into(), subresource: String::new() }
}
