//! Patches. An input is a letter for the type, then an object and a patch, a line each.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::patch;
use seawall_fuzz::schemas;
use serde_json::Value;

/// The limit that the server sets.
const COPIED: usize = 3 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((ty, rest)) = seawall_fuzz::typed(data) else { return };
    let documents = seawall_fuzz::documents(rest, 2);
    let [object, change] = &documents[..] else { return };

    let merged = |mut target: Value| {
        json_patch::merge(&mut target, change);
        target
    };
    let once = merged(object.clone());
    assert_eq!(merged(once.clone()), once, "a merge patch does the same twice");

    let strategic = |mut target: Value| patch::strategic(schemas(), ty, &mut target, change.clone()).map(|()| target);
    if let Ok(once) = strategic(object.clone()) {
        assert_eq!(strategic(once.clone()), Ok(once), "a strategic merge patch does the same twice");
    }

    if !patch::is_deep(object, patch::DEEPEST)
        && let Ok(operations) = serde_json::from_value::<json_patch::Patch>(change.clone())
    {
        let mut target = object.clone();
        if patch::json(&mut target, &operations, COPIED).is_ok() {
            assert!(!patch::is_deep(&target, patch::DEEPEST), "nested without end");
            assert!(target.to_string().len() <= rest.len() * 8 + COPIED, "grown without end");
        }
    }
});
