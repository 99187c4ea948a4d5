//! Conditions under which a webhook or policy is asked
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#matching-requests-matchconditions>),
//! and the authorizer as expressions see it.

use seawall_api::{
    cel::{Authorizer, EvalError, Program, Question},
    selector::parse_fields,
};

use super::registered::Named;
use crate::{
    Server,
    auth::{UserInfo, authorize::Attributes},
};

/// A list of conditions.
pub(super) struct Conditions<'a>(&'a [Named]);

impl<'a> Conditions<'a> {
    pub fn of(conditions: &'a [Named]) -> Conditions<'a> {
        Conditions(conditions)
    }

    /// Whether all of them hold. One that does not decides, even if another one fails.
    ///
    /// # Errors
    /// What failed, if none is false.
    pub fn hold(&self, eval: impl Fn(&'a Program) -> Result<bool, EvalError>) -> Result<bool, String> {
        let mut failures = Vec::new();
        for (name, program) in self.0 {
            let held = match program {
                Ok(program) => eval(program).map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match held {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(why) => failures.push(format!("failed to evaluate match condition {name:?}: {why}")),
            }
        }
        match failures.is_empty() {
            true => Ok(true),
            false => Err(failures.join(", ")),
        }
    }
}

/// Asks the authorizer for the user of a request.
pub(super) struct Asker<'a> {
    pub server: &'a Server,
    pub user: &'a UserInfo,
}

impl Authorizer for Asker<'_> {
    fn check(&self, question: &Question) -> (bool, String) {
        // Upstream's authorizer looks at the fields that are selected; of labels, none that is built in does.
        let fields = parse_fields(&question.fields).unwrap_or_default();
        let attributes = Attributes {
            verb: &question.verb,
            group: &question.group,
            resource: &question.resource,
            subresource: &question.subresource,
            namespace: &question.namespace,
            name: &question.name,
            fields: &fields,
            path: &question.path,
        };
        let account = question.service_account.as_ref().map(|(namespace, name)| {
            let all = format!("system:serviceaccounts:{namespace}");
            UserInfo::new(format!("system:serviceaccount:{namespace}:{name}"), &["system:serviceaccounts", &all])
        });
        match self.server.authorizer.authorize(account.as_ref().unwrap_or(self.user), &attributes) {
            Ok(why) => (true, why),
            Err(why) => (false, why),
        }
    }
}

#[cfg(test)]
mod tests {
    use seawall_api::cel::Type;

    use super::*;

    #[test]
    fn one_that_is_false_decides() {
        let named = |text: &str| (text.to_owned(), Program::compile(text, &[("object", Type::Dyn)]));
        let check = |texts: &[&str], expect: Result<bool, &str>| {
            let list: Vec<Named> = texts.iter().map(|text| named(text)).collect();
            let object = serde_json::json!({"a": 1});
            let eval = |program: &Program| match program.eval(&[("object", &object)])? {
                serde_json::Value::Bool(holds) => Ok(holds),
                _ => panic!("a condition"),
            };
            assert_eq!(Conditions::of(&list).hold(eval), expect.map_err(str::to_owned), "{texts:?}");
        };
        check(&[], Ok(true));
        check(&["object.a == 1", "true"], Ok(true));
        check(&["object.a == 1", "false"], Ok(false));
        check(&["object.b == 1", "false"], Ok(false));
        check(&["object.b == 1", "true"], Err("failed to evaluate match condition \"object.b == 1\": no such key: b"));
    }
}
