//! Functions of lists, and of lists as sets (<https://kubernetes.io/docs/reference/using-api/cel/#kubernetes-list-library>).

use std::cmp::Ordering;

use super::{
    EvalError, Session,
    eval::{Eval, no_overload},
    value::{List, Val, compare},
};

impl<'a> Session<'a> {
    /// Calls a function of a list; `None` if there is none of that name for these arguments.
    pub(super) fn list_function(
        &self,
        name: &str,
        list: &List<'a>,
        rest: &[Val<'a>],
    ) -> Result<Option<Val<'a>>, EvalError> {
        self.spend_bytes(list.len())?;
        let ordered = |a: &Val<'a>, b: &Val<'a>| compare(a, b).ok_or_else(|| no_overload(name));
        Ok(Some(match (name, rest) {
            ("isSorted", []) => {
                let items: Vec<Val<'a>> = list.iter().collect();
                self.spend(items.len() as u64)?;
                let mut sorted = true;
                for pair in items.windows(2) {
                    sorted &= ordered(&pair[0], &pair[1])?.is_le();
                }
                Val::Bool(sorted)
            }
            ("sum", []) => {
                let mut sum = None;
                for item in list.iter() {
                    self.spend(1)?;
                    sum = Some(match sum {
                        None => item,
                        Some(sum) => self.function_add(&sum, &item)?,
                    });
                }
                sum.unwrap_or(Val::Int(0))
            }
            ("min" | "max", []) => {
                let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
                let mut best: Option<Val<'a>> = None;
                for item in list.iter() {
                    self.spend(1)?;
                    match &best {
                        Some(best) if ordered(&item, best)? != wanted => {}
                        _ => best = Some(item),
                    }
                }
                best.ok_or_else(|| EvalError::new(format!("{name} called on empty list")))?
            }
            ("indexOf" | "lastIndexOf", [value]) => {
                let mut found = -1;
                for (index, item) in list.iter().enumerate() {
                    if self.equal(&item, value)? {
                        found = index as i64;
                        if name == "indexOf" {
                            break;
                        }
                    }
                }
                Val::Int(found)
            }
            ("join", []) => self.join(list, "")?,
            ("join", [Val::Str(separator)]) => self.join(list, separator)?,
            ("first", []) => Val::Optional(list.get(0).map(std::rc::Rc::new)),
            ("last", []) => Val::Optional(list.len().checked_sub(1).and_then(|at| list.get(at)).map(std::rc::Rc::new)),
            ("reverse", []) => Val::list(list.iter().collect::<Vec<_>>().into_iter().rev().collect()),
            ("slice", [Val::Int(from), Val::Int(to)]) => {
                let (from, to) = (usize::try_from(*from).ok(), usize::try_from(*to).ok());
                match (from, to) {
                    (Some(from), Some(to)) if from <= to && to <= list.len() => {
                        Val::list(list.iter().skip(from).take(to - from).collect())
                    }
                    _ => return Err(EvalError::new("cannot slice: the range is outside of the list")),
                }
            }
            ("distinct", []) => {
                let mut out: Vec<Val<'a>> = Vec::new();
                for item in list.iter() {
                    let mut known = false;
                    for other in &out {
                        if self.equal(&item, other)? {
                            known = true;
                            break;
                        }
                    }
                    if !known {
                        out.push(item);
                    }
                }
                Val::list(out)
            }
            ("flatten", []) => {
                let mut out = Vec::new();
                for item in list.iter() {
                    match item {
                        Val::List(inner) => {
                            self.spend(inner.len() as u64)?;
                            out.extend(inner.iter());
                        }
                        item => out.push(item),
                    }
                }
                Val::list(out)
            }
            ("sort", []) => {
                let mut items: Vec<Val<'a>> = list.iter().collect();
                self.spend(items.len() as u64 * 8)?;
                for pair in items.windows(2) {
                    ordered(&pair[0], &pair[1])?;
                }
                items.sort_by(|a, b| compare(a, b).unwrap_or(Ordering::Equal));
                Val::list(items)
            }
            _ => return Ok(None),
        }))
    }

    fn function_add(&self, a: &Val<'a>, b: &Val<'a>) -> Eval<'a> {
        match (a, b) {
            (Val::Int(a), Val::Int(b)) => {
                a.checked_add(*b).map(Val::Int).ok_or_else(|| EvalError::new("integer overflow"))
            }
            (Val::Uint(a), Val::Uint(b)) => {
                a.checked_add(*b).map(Val::Uint).ok_or_else(|| EvalError::new("unsigned integer overflow"))
            }
            (Val::Double(a), Val::Double(b)) => Ok(Val::Double(a + b)),
            (Val::Duration(a), Val::Duration(b)) => {
                a.checked_add(*b).map(Val::Duration).ok_or_else(|| EvalError::new("duration overflow"))
            }
            _ => Err(no_overload("sum")),
        }
    }

    fn has(&self, list: &List<'a>, value: &Val<'a>) -> Result<bool, EvalError> {
        for item in list.iter() {
            if self.equal(&item, value)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn has_all(&self, list: &List<'a>, values: &List<'a>) -> Result<bool, EvalError> {
        for value in values.iter() {
            if !self.has(list, &value)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `sets.contains` and its kind.
    pub(super) fn set_function(&self, name: &str, args: &[Val<'a>]) -> Eval<'a> {
        let [Val::List(a), Val::List(b)] = args else { return Err(no_overload(name)) };
        Ok(Val::Bool(match name {
            "contains" => self.has_all(a, b)?,
            "equivalent" => self.has_all(a, b)? && self.has_all(b, a)?,
            "intersects" => {
                let mut meet = false;
                for value in b.iter() {
                    meet = meet || self.has(a, &value)?;
                }
                meet
            }
            _ => return Err(no_overload(name)),
        }))
    }
}
