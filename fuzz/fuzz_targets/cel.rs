//! Expressions: the first line is one, the second what it finds as `self`. Evaluating stays within the budget.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::cel::{PER_EXPRESSION, Program, Session, untyped};

fuzz_target!(init: only_own_panics(), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (text, object) = text.split_once('\n').unwrap_or((text, "null"));
    let Ok(program) = Program::compile(text, &untyped(&["self", "oldSelf"])) else { return };
    let object = serde_json::from_str(object).unwrap_or_default();
    let run = || {
        let session = Session::new(vec![("self", &object), ("oldSelf", &object)]);
        (session.eval(&program), session.cost())
    };
    let (value, cost) = run();
    assert!(value.is_err() || cost <= PER_EXPRESSION, "{cost} was spent");
    assert_eq!((value, cost), run(), "the same gives the same");
});

/// The parser may panic on its own thread: that is taken for an expression that cannot be read.
fn only_own_panics() {
    let abort = std::panic::take_hook();
    let fuzzing = std::thread::current().id();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().id() == fuzzing {
            abort(panic);
        }
    }));
}
