//! What selectors look at. There are many objects, and each has few labels: one piece of memory holds them all.

/// Two lists of texts: fields, and labels with their values. One text after the other, each with its length before it: a
/// byte, or 255 and four bytes.
#[derive(Debug, Default)]
pub struct Texts {
    all: Box<[u8]>,
    /// Where the labels begin.
    labels: u32,
}

impl Texts {
    /// These fields and labels.
    pub fn new<'a>(fields: impl Iterator<Item = &'a str>, labels: impl Iterator<Item = &'a str>) -> Texts {
        let mut all = Vec::new();
        fields.for_each(|text| Texts::add(&mut all, text));
        // An object has 3 MiB at most.
        let start = all.len() as u32;
        labels.for_each(|text| Texts::add(&mut all, text));
        Texts { all: all.into(), labels: start }
    }

    fn add(all: &mut Vec<u8>, text: &str) {
        match u8::try_from(text.len()) {
            Ok(length) if length < u8::MAX => all.push(length),
            _ => {
                all.push(u8::MAX);
                all.extend((text.len() as u32).to_le_bytes());
            }
        }
        all.extend(text.as_bytes());
    }

    /// The fields' bytes, in order.
    pub fn fields(&self) -> impl Iterator<Item = &[u8]> {
        texts(&self.all[..self.labels as usize])
    }

    /// The labels' bytes, in order, each before its value.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        texts(&self.all[self.labels as usize..])
    }
}

fn texts(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, behind) = rest.split_first()?;
        let (length, behind) = match *length {
            u8::MAX => behind.split_first_chunk().map(|(length, rest)| (u32::from_le_bytes(*length) as usize, rest))?,
            short => (usize::from(short), behind),
        };
        let (text, behind) = behind.split_at_checked(length)?;
        rest = behind;
        Some(text)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn texts_are_found_again(short in prop::collection::vec(".{0,9}", 0..9), length in 250usize..600) {
            let long = "x".repeat(length);
            let all: Vec<&str> = short.iter().map(String::as_str).chain([&*long, ""]).collect();
            for cut in 0..=all.len() {
                let (fields, labels) = all.split_at(cut);
                let texts = Texts::new(fields.iter().copied(), labels.iter().copied());
                let read = |bytes| std::str::from_utf8(bytes).unwrap();
                prop_assert_eq!(texts.fields().map(read).collect::<Vec<_>>(), fields);
                prop_assert_eq!(texts.labels().map(read).collect::<Vec<_>>(), labels);
            }
        }
    }
}
