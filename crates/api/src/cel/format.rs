//! `'%s has %d'.format([name, count])` (<https://pkg.go.dev/github.com/google/cel-go/ext#Strings>).

use super::{
    EvalError, Session,
    value::{List, Map, Val, duration_text},
};

impl<'a> Session<'a> {
    pub(super) fn format(&self, pattern: &str, args: &List<'a>) -> Result<String, EvalError> {
        let mut out = String::new();
        let mut chars = pattern.chars().peekable();
        let mut next = 0;
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            if chars.peek() == Some(&'%') {
                chars.next();
                out.push('%');
                continue;
            }
            let mut precision = None;
            if chars.peek() == Some(&'.') {
                chars.next();
                let mut digits = String::new();
                while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                    digits.push(digit);
                }
                precision = digits.parse::<usize>().ok().filter(|p| *p <= 64);
            }
            let verb = chars.next().ok_or_else(|| EvalError::new("unexpected end of format string"))?;
            let arg = args.get(next).ok_or_else(|| EvalError::new(format!("index {next} out of range")))?;
            next += 1;
            let text = self.verb(verb, precision, &arg)?;
            self.spend_bytes(text.len() + 10)?;
            out.push_str(&text);
        }
        Ok(out)
    }

    fn verb(&self, verb: char, precision: Option<usize>, arg: &Val<'a>) -> Result<String, EvalError> {
        let number = match arg {
            Val::Double(value) => Some(*value),
            Val::Int(value) => Some(*value as f64),
            Val::Uint(value) => Some(*value as f64),
            _ => None,
        };
        match (verb, arg, number) {
            ('s', _, _) => self.shown(arg),
            ('d', Val::Int(value), _) => Ok(value.to_string()),
            ('d', Val::Uint(value), _) => Ok(value.to_string()),
            ('f', _, Some(value)) => Ok(format!("{value:.*}", precision.unwrap_or(6))),
            ('e', _, Some(value)) => Ok(format!("{value:.*e}", precision.unwrap_or(6))),
            ('b', Val::Int(value), _) => Ok(format!("{value:b}")),
            ('b', Val::Uint(value), _) => Ok(format!("{value:b}")),
            ('b', Val::Bool(value), _) => Ok(u8::from(*value).to_string()),
            ('o', Val::Int(value), _) => Ok(format!("{value:o}")),
            ('o', Val::Uint(value), _) => Ok(format!("{value:o}")),
            ('x', Val::Int(value), _) => Ok(format!("{value:x}")),
            ('x', Val::Uint(value), _) => Ok(format!("{value:x}")),
            ('x', Val::Str(value), _) => Ok(value.bytes().map(|b| format!("{b:02x}")).collect()),
            ('X', Val::Int(value), _) => Ok(format!("{value:X}")),
            ('X', Val::Uint(value), _) => Ok(format!("{value:X}")),
            ('X', Val::Str(value), _) => Ok(value.bytes().map(|b| format!("{b:02X}")).collect()),
            _ => {
                Err(EvalError::new(format!("error during formatting: no formatting clause %{verb} for a {}", arg.ty())))
            }
        }
    }

    /// A value as `%s` shows it.
    fn shown(&self, value: &Val<'a>) -> Result<String, EvalError> {
        self.spend(1)?;
        Ok(match value {
            Val::Null => "null".to_owned(),
            Val::Bool(value) => value.to_string(),
            Val::Int(value) => value.to_string(),
            Val::Uint(value) => value.to_string(),
            Val::Double(value) => value.to_string(),
            Val::Str(text) => {
                self.spend_bytes(text.len())?;
                (**text).to_owned()
            }
            Val::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Val::List(list) => {
                let items = list.iter().map(|item| self.shown(&item)).collect::<Result<Vec<_>, _>>()?;
                format!("[{}]", items.join(", "))
            }
            Val::Map(map) => self.shown_map(map)?,
            Val::Duration(value) => duration_text(*value),
            Val::Type(name) => (*name).to_owned(),
            other => match self.to_json(other)? {
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            },
        })
    }

    fn shown_map(&self, map: &Map<'a>) -> Result<String, EvalError> {
        let mut items = Vec::new();
        for (key, value) in map.entries() {
            items.push(format!("{}: {}", self.shown(&key)?, self.shown(&value)?));
        }
        items.sort();
        Ok(format!("{{{}}}", items.join(", ")))
    }
}
