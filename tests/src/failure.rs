//! What a test failed of, said once more below everything that was printed about it: whoever reads only the end of a
//! long output needs that line most.

use std::sync::{Mutex, Once};

static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Remembers every panic from now on.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if let Ok(mut said) = SAID.lock() {
                said.push(panic.to_string());
            }
            usual(panic);
        }));
    });
}

/// Prints the panics so far.
pub fn repeat() {
    if let Ok(said) = SAID.lock() {
        for panic in said.iter() {
            eprintln!("=== {}", shortened(panic, 1500));
        }
    }
}

/// A text without its middle, if it has more than so many bytes.
pub fn shortened(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let (head, tail) = (text.floor_char_boundary(most / 2), text.ceil_char_boundary(text.len() - most / 2));
    format!("{} […] {}", &text[..head], &text[tail..])
}
