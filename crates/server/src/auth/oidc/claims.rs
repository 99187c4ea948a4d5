//! What the claims of a token become: who the user is, and whether the token counts at all
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#using-authentication-configuration>).

use std::collections::BTreeSet;

use seawall_api::{
    cel::{Program, untyped},
    names,
};
use serde_json::{Value, json};

use super::config::{ConfigError, JwtAuthenticator, Mapping, wrong};
use crate::auth::UserInfo;

/// Makes users of claims.
pub(super) struct Claims {
    rules: Vec<Rule>,
    username: Source,
    groups: Source,
    uid: Source,
    extra: Vec<(String, Program)>,
    user_rules: Vec<(Program, String)>,
}

/// Where a part of a user comes from.
enum Source {
    Nowhere,
    Claim { name: String, prefix: String },
    Expression(Program),
}

/// What has to hold of claims.
enum Rule {
    Required { claim: String, value: String },
    Holds(Program, String),
}

fn compile(field: &str, text: &str, variable: &str) -> Result<Program, ConfigError> {
    Program::compile(text, &untyped(&[variable])).map_err(|why| wrong(field, text, why.to_string()))
}

fn message(text: &str, expression: &str) -> String {
    match text {
        "" => format!("failed expression: {}", expression.trim()),
        text => text.to_owned(),
    }
}

impl Source {
    fn new(mapping: &Mapping, at: &str, prefixed: bool) -> Result<Source, ConfigError> {
        let prefix = mapping.prefix.clone();
        match (&*mapping.claim, &*mapping.expression) {
            ("", "") => match prefix {
                Some(prefix) if !prefix.is_empty() => {
                    Err(wrong(format!("{at}.prefix"), prefix, "prefix can only be set when claim is set"))
                }
                _ => Ok(Source::Nowhere),
            },
            (claim, "") => match (prefix, prefixed) {
                (Some(prefix), _) => Ok(Source::Claim { name: claim.to_owned(), prefix }),
                (None, false) => Ok(Source::Claim { name: claim.to_owned(), prefix: String::new() }),
                (None, true) => Err(wrong(
                    format!("{at}.prefix"),
                    "",
                    "Required value: prefix is required when claim is set. It can be set to an empty string to disable prefixing",
                )),
            },
            ("", expression) => match prefix.filter(|prefix| !prefix.is_empty()) {
                Some(prefix) => Err(wrong(format!("{at}.prefix"), prefix, "prefix can only be set when claim is set")),
                None => compile(&format!("{at}.expression"), expression, "claims").map(Source::Expression),
            },
            (claim, _) => Err(wrong(at, claim, "claim and expression can't both be set")),
        }
    }

    /// The texts that the claims have here.
    fn read(&self, what: &str, claims: &Value) -> Result<Vec<String>, String> {
        match self {
            Source::Nowhere => Ok(Vec::new()),
            Source::Claim { name, prefix } => {
                let found = texts(&claims[name]).map_err(|why| format!("parse {what} claim {name:?}: {why}"))?;
                Ok(found.into_iter().map(|text| format!("{prefix}{text}")).collect())
            }
            Source::Expression(program) => {
                let value = program.eval(&[("claims", claims)]);
                let value =
                    value.map_err(|why| format!("error evaluating claim mapping expression for {what}: {why}"))?;
                texts(&value).map_err(|why| format!("the expression for {what}: {why}"))
            }
        }
    }

    /// The one text that the claims have here; empty if there is none.
    fn read_one(&self, what: &str, claims: &Value) -> Result<String, String> {
        let list = match self {
            Source::Claim { name, .. } => claims[name].is_array(),
            _ => false,
        };
        match (&self.read(what, claims)?[..], list) {
            (_, true) => Err(format!("the claim for {what} is a list: a text is expected")),
            ([], _) => Ok(String::new()),
            ([one], _) => Ok(one.clone()),
            _ => Err(format!("the claims have several values for {what}")),
        }
    }
}

/// A text, or a list of them; nothing is none.
fn texts(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) if text.is_empty() => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => {
            let all: Option<Vec<String>> = list.iter().map(|item| item.as_str().map(str::to_owned)).collect();
            all.ok_or_else(|| "not all of the list are texts".to_owned())
        }
        _ => Err("neither a text nor a list of texts".to_owned()),
    }
}

impl Claims {
    pub fn new(jwt: &JwtAuthenticator, at: &str) -> Result<Claims, ConfigError> {
        let mappings = &jwt.claim_mappings;
        let field = |name: &str| format!("{at}.claimMappings.{name}");
        let username = Source::new(&mappings.username, &field("username"), true)?;
        if matches!(username, Source::Nowhere) {
            return Err(wrong(field("username"), "", "Required value: claim or expression is required"));
        }
        let mut rules = Vec::new();
        let mut seen = BTreeSet::new();
        for (index, rule) in jwt.claim_validation_rules.iter().enumerate() {
            let at = format!("{at}.claimValidationRules[{index}]");
            rules.push(match (&*rule.claim, &*rule.expression) {
                ("", "") => return Err(wrong(at, "", "Required value: claim or expression is required")),
                (claim, "") if !rule.message.is_empty() => {
                    let why = "message can't be set when claim is set";
                    return Err(wrong(format!("{at}.message"), claim, why));
                }
                (claim, "") => Rule::Required { claim: claim.to_owned(), value: rule.required_value.clone() },
                ("", _) if !rule.required_value.is_empty() => {
                    let why = "requiredValue can't be set when expression is set";
                    return Err(wrong(format!("{at}.requiredValue"), &rule.required_value, why));
                }
                ("", text) => {
                    let program = compile(&format!("{at}.expression"), text, "claims")?;
                    Rule::Holds(program, message(&rule.message, text))
                }
                (claim, _) => return Err(wrong(at, claim, "claim and expression can't both be set")),
            });
            if !seen.insert((&rule.claim, &rule.expression)) {
                let text = format!("{}{}", rule.claim, rule.expression);
                return Err(wrong(at, text, "must not stand there twice"));
            }
        }
        let mut extra = Vec::new();
        for (index, one) in mappings.extra.iter().enumerate() {
            let at = format!("{}[{index}]", field("extra"));
            check_key(&one.key).map_err(|why| wrong(format!("{at}.key"), &one.key, why))?;
            if extra.iter().any(|(key, _)| *key == one.key) {
                return Err(wrong(format!("{at}.key"), &one.key, "must not stand there twice"));
            }
            let program = compile(&format!("{at}.valueExpression"), &one.value_expression, "claims")?;
            extra.push((one.key.clone(), program));
        }
        let user_rules = jwt.user_validation_rules.iter().enumerate().map(|(index, rule)| {
            let field = format!("{at}.userValidationRules[{index}].expression");
            Ok((compile(&field, &rule.expression, "user")?, message(&rule.message, &rule.expression)))
        });
        let claims = Claims {
            rules,
            username,
            groups: Source::new(&mappings.groups, &field("groups"), true)?,
            uid: Source::new(&mappings.uid, &field("uid"), false)?,
            extra,
            user_rules: user_rules.collect::<Result<_, ConfigError>>()?,
        };
        claims.check_mail(&field("username.expression"))?;
        Ok(claims)
    }

    /// An address that its issuer has not verified can be anybody's, so who takes it for the name has to look at that.
    fn check_mail(&self, field: &str) -> Result<(), ConfigError> {
        let Source::Expression(username) = &self.username else { return Ok(()) };
        let mail = username.text().replace("claims.email_verified", "").contains("claims.email");
        let rules = self.rules.iter().filter_map(|rule| match rule {
            Rule::Holds(program, _) => Some(program),
            Rule::Required { .. } => None,
        });
        let mut all = rules.chain(self.extra.iter().map(|(_, program)| program)).chain([username]);
        match mail && !all.any(|program| program.text().contains("claims.email_verified")) {
            false => Ok(()),
            true => Err(wrong(
                field,
                username.text(),
                "claims.email_verified must be used in claimMappings.username.expression or \
                 claimMappings.extra[*].valueExpression or claimValidationRules[*].expression when claims.email is used \
                 in claimMappings.username.expression",
            )),
        }
    }

    /// The user that the claims of a verified token make.
    pub fn user(&self, claims: &Value) -> Result<UserInfo, String> {
        let mut name = self.username.read_one("username", claims)?;
        if let Source::Claim { name: claim, prefix } = &self.username {
            if name.is_empty() || name == *prefix {
                return Err(format!("parse username claims {claim:?}: claim not present"));
            }
            let verified = &claims["email_verified"];
            if claim == "email" && !verified.is_null() && *verified != true {
                return Err("email not verified".to_owned());
            }
        }
        if name.is_empty() {
            return Err("the expression for username has no value".to_owned());
        }
        for rule in &self.rules {
            match rule {
                Rule::Required { claim, value } => match claims[claim].as_str() {
                    Some(found) if found == value => {}
                    Some(found) => {
                        return Err(format!(
                            "required claim {claim} value does not match. Got = {found}, want = {value}"
                        ));
                    }
                    None => return Err(format!("required claim {claim} not present in ID token")),
                },
                Rule::Holds(program, message) => holds(program, ("claims", claims), message)?,
            }
        }
        let groups = self.groups.read("groups", claims)?;
        let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
        let mut user = UserInfo::new(std::mem::take(&mut name), &groups);
        user.uid = self.uid.read_one("uid", claims)?;
        if let (Source::Claim { name, .. }, true) = (&self.uid, user.uid.is_empty()) {
            return Err(format!("parse uid claim {name:?}: claim not present"));
        }
        for (key, program) in &self.extra {
            let value = program.eval(&[("claims", claims)]);
            let value = value.map_err(|why| format!("error evaluating the expression for extra {key:?}: {why}"))?;
            let found = texts(&value).map_err(|why| format!("the expression for extra {key:?}: {why}"))?;
            if !found.is_empty() {
                user.extra.insert(key.clone(), found);
            }
        }
        if !self.user_rules.is_empty() {
            // All that an expression can name is there.
            let shown = json!({"username": user.username, "uid": user.uid, "groups": groups, "extra": user.extra});
            for (program, message) in &self.user_rules {
                holds(program, ("user", &shown), message)?;
            }
        }
        Ok(user)
    }
}

fn holds(program: &Program, variable: (&str, &Value), message: &str) -> Result<(), String> {
    match program.eval(&[variable]) {
        Ok(Value::Bool(true)) => Ok(()),
        Ok(_) => Err(format!("validation expression '{}' failed: {message}", program.text().trim())),
        Err(why) => Err(format!("validation expression '{}' resulted in error: {why}", program.text().trim())),
    }
}

/// Whether something can be the key of an extra: what belongs to Kubernetes itself cannot.
fn check_key(key: &str) -> Result<(), &'static str> {
    let Some((domain, path)) = key.split_once('/') else {
        return Err("must be a domain-prefixed path (such as \"acme.io/foo\")");
    };
    if key.chars().any(char::is_uppercase) {
        return Err("must be lowercase");
    }
    if names::dns_subdomain(domain).is_err() || path.is_empty() {
        return Err("must be a domain-prefixed path (such as \"acme.io/foo\")");
    }
    let reserved = |root: &str| domain == root || domain.ends_with(&format!(".{root}"));
    match reserved("k8s.io") || reserved("kubernetes.io") {
        true => Err("k8s.io, kubernetes.io and their subdomains are reserved for Kubernetes use"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(text: &str) -> Result<Claims, ConfigError> {
        Claims::new(&serde_yaml_ng::from_str(&format!("{{issuer: {{}}, {text}}}")).unwrap(), "jwt[0]")
    }

    #[test]
    fn what_claims_become() {
        let check = |text: &str, claims: Value, expect: Result<Value, &str>| {
            let found = made(text).unwrap().user(&claims);
            match expect {
                Ok(user) => assert_eq!(serde_json::to_value(found.unwrap()).unwrap(), user, "{text}"),
                Err(part) => {
                    let why = found.unwrap_err();
                    assert!(why.contains(part), "{text}: {why}");
                }
            }
        };
        let named = |name: &str, groups: &[&str]| {
            let mut groups = groups.to_vec();
            groups.push("system:authenticated");
            Ok(json!({"username": name, "groups": groups}))
        };
        let plain = "claimMappings: {username: {claim: sub, prefix: 'o:'}, groups: {claim: roles, prefix: 'g:'}}";
        check(plain, json!({"sub": "jane"}), named("o:jane", &[]));
        check(plain, json!({"sub": "jane", "roles": "a"}), named("o:jane", &["g:a"]));
        check(plain, json!({"sub": "jane", "roles": ["a", "b"]}), named("o:jane", &["g:a", "g:b"]));
        check(plain, json!({"sub": "jane", "roles": {"a": 1}}), Err("neither a text nor a list"));
        check(plain, json!({"sub": "jane", "roles": [1]}), Err("not all of the list are texts"));
        check(plain, json!({"roles": "a"}), Err("parse username claims \"sub\": claim not present"));
        check(plain, json!({"sub": ""}), Err("claim not present"));
        check(plain, json!({"sub": ["jane"]}), Err("a list"));
        check(plain, json!({"sub": 5}), Err("neither a text"));
        let mail = "claimMappings: {username: {claim: email, prefix: ''}}";
        check(mail, json!({"email": "a@b.c"}), named("a@b.c", &[]));
        check(mail, json!({"email": "a@b.c", "email_verified": true}), named("a@b.c", &[]));
        check(mail, json!({"email": "a@b.c", "email_verified": false}), Err("email not verified"));
        check(mail, json!({"email": "a@b.c", "email_verified": "true"}), Err("email not verified"));
        let required = "claimMappings: {username: {claim: sub, prefix: ''}}, claimValidationRules: [{claim: hd, requiredValue: a}]";
        check(required, json!({"sub": "jane", "hd": "a"}), named("jane", &[]));
        check(required, json!({"sub": "jane", "hd": "b"}), Err("required claim hd value does not match"));
        check(required, json!({"sub": "jane"}), Err("required claim hd not present"));
        let cel = "claimMappings: {username: {expression: 'claims.sub + \"@x\"'}, groups: {expression: 'claims.roles.split(\",\")'},
            uid: {claim: id}, extra: [{key: 'acme.io/team', valueExpression: 'claims.?team.orValue(\"\")'}]},
            claimValidationRules: [{expression: 'claims.exp - claims.iat <= 60', message: 'too long'}],
            userValidationRules: [{expression: \"!user.username.startsWith('system:')\", message: 'reserved'}]";
        let claims =
            |sub: &str, exp: i64| json!({"sub": sub, "roles": "a,b", "id": "7", "exp": exp, "iat": 0, "team": "t"});
        let user = json!({"username": "jane@x", "uid": "7", "groups": ["a", "b", "system:authenticated"],
            "extra": {"acme.io/team": ["t"]}});
        check(cel, claims("jane", 60), Ok(user));
        check(cel, claims("jane", 61), Err("too long"));
        check(cel, claims("system:admin", 60), Err("reserved"));
        let mut without = claims("jane", 60);
        without["team"] = Value::Null;
        without["id"] = Value::Null;
        check(cel, without, Err("parse uid claim \"id\""));
        check(cel, json!({"sub": "jane"}), Err("resulted in error"));
    }

    #[test]
    fn what_cannot_be_mapped() {
        let check = |text: &str, expect: &str| {
            let error = made(text).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(expect), "{text}: {error}");
        };
        let sub = "username: {claim: sub, prefix: ''}";
        check("claimMappings: {}", "jwt[0].claimMappings.username: \"\": Required value: claim or expression");
        check("claimMappings: {username: {claim: sub}}", "username.prefix: \"\": Required value: prefix is required");
        check(
            "claimMappings: {username: {claim: a, expression: b}}",
            "username: \"a\": claim and expression can't both",
        );
        check(
            "claimMappings: {username: {expression: claims.a, prefix: b}}",
            "prefix can only be set when claim is set",
        );
        check(
            "claimMappings: {username: {expression: 'claims.'}}",
            "username.expression: \"claims.\": compilation failed",
        );
        check("claimMappings: {username: {expression: user.a}}", "username.expression: \"user.a\"");
        check(&format!("claimMappings: {{{sub}, groups: {{claim: g}}}}"), "groups.prefix");
        check("claimMappings: {username: {expression: claims.email}}", "claims.email_verified must be used");
        let ok = "claimMappings: {username: {expression: claims.email}}, claimValidationRules: [{expression: 'claims.email_verified == true'}]";
        assert!(made(ok).is_ok());
        for (key, why) in [
            ("a", "domain-prefixed"),
            ("acme.io/A", "lowercase"),
            ("acme.io/", "domain-prefixed"),
            ("x.k8s.io/a", "reserved"),
        ] {
            let text = format!("claimMappings: {{{sub}, extra: [{{key: {key}, valueExpression: claims.a}}]}}");
            check(&text, &format!("claimMappings.extra[0].key: {key:?}"));
            check(&text, why);
        }
        let rules = |rule: &str| format!("claimMappings: {{{sub}}}, claimValidationRules: [{rule}]");
        check(&rules("{}"), "claimValidationRules[0]: \"\": Required value");
        check(&rules("{claim: a, expression: 'true'}"), "can't both be set");
        check(&rules("{claim: a, message: b}"), "message can't be set");
        check(&rules("{expression: 'true', requiredValue: b}"), "requiredValue can't be set");
        check(&rules("{claim: a}, {claim: a}"), "[1]: \"a\": must not stand there twice");
        check(
            &format!("claimMappings: {{{sub}}}, userValidationRules: [{{expression: 'claims.a'}}]"),
            "userValidationRules[0]",
        );
    }
}
