//! The workload's requests are untouched: whatever happens to the control plane, not one of them fails.

use crate::history::{Class, History};

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let requests = || history.requests.iter().filter(|r| r.class == Class::Workload);
    let failed = requests().filter_map(|request| {
        let error = request.error.as_ref()?;
        Some(format!("{}, {:.3} s after the start: {error}", request.client, request.start.as_secs_f64()))
    });
    (failed.collect(), requests().count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{expect, ms},
        history::Request,
    };

    #[test]
    fn one_failure_is_one_too_many() {
        let request = |class, error: Option<&str>| Request {
            client: "a1".into(),
            class,
            start: ms(1500),
            end: ms(1501),
            error: error.map(str::to_owned),
        };
        let verify = |requests: Vec<Request>, parts: &[&str]| {
            expect(&check(&History { requests, ..History::default() }).0, parts);
        };
        verify(vec![request(Class::Workload, None), request(Class::Read, Some("timeout"))], &[]);
        verify(vec![request(Class::Workload, Some("reset"))], &["a1, 1.500 s after the start: reset"]);
    }
}
