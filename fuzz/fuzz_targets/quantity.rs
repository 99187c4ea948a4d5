//! Quantities, one on each line: written they are the same, and sums keep their order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::quantity::Quantity;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let all: Vec<Quantity> = text.lines().take(8).filter_map(|line| line.parse().ok()).collect();
    for quantity in &all {
        let written = quantity.to_string();
        let read: Quantity = written.parse().expect("what was written can be read");
        assert_eq!(read, *quantity, "{written}");
        assert_eq!(read.to_string(), written, "a canonical form stays");
        assert!(quantity.is_negative() || quantity.value() >= quantity.milli_value() / 1000);
        assert_eq!(quantity.is_negative(), quantity.as_f64() < 0.0);
    }
    for pair in all.windows(2) {
        let [a, b] = pair else { continue };
        assert_eq!(*a < *b, *b > *a);
        // Sums are no longer capped at what can be read.
        let _ = ((*a + *b).to_string(), (*a - *b).to_string());
        assert_eq!((*a + *b) - *b, *a);
    }
});
