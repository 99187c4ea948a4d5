//! What is written down of which request: the audit policy
//! (<https://kubernetes.io/docs/reference/config-api/apiserver-audit.v1/#audit-k8s-io-v1-Policy>).

use seawall_api::names;
use serde::Deserialize;

use crate::auth::UserInfo;

/// How much is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing.
    None,
    /// Who asked for what, and what came of it.
    Metadata,
    /// And what was sent.
    Request,
    /// And what was answered.
    RequestResponse,
}

impl Level {
    /// All of them, from little to much.
    pub const ALL: [Level; 4] = [Level::None, Level::Metadata, Level::Request, Level::RequestResponse];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Level::None => "None",
            Level::Metadata => "Metadata",
            Level::Request => "Request",
            Level::RequestResponse => "RequestResponse",
        }
    }
}

/// When something is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The request is there, and who sends it is known.
    RequestReceived,
    /// The answer to a long request, as a watch is, begins.
    ResponseStarted,
    /// The answer has been sent.
    ResponseComplete,
    /// Something went wrong with the server itself.
    Panic,
}

impl Stage {
    const ALL: [Stage; 4] = [Stage::RequestReceived, Stage::ResponseStarted, Stage::ResponseComplete, Stage::Panic];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Stage::RequestReceived => "RequestReceived",
            Stage::ResponseStarted => "ResponseStarted",
            Stage::ResponseComplete => "ResponseComplete",
            Stage::Panic => "Panic",
        }
    }
}

/// A policy that cannot be used: which field, what stands there, and what could.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It is not of the form that it should have.
    #[error(transparent)]
    Form(#[from] serde_yaml_ng::Error),
    /// A field has a value that it cannot have.
    #[error("{field}: {value}: {why}")]
    Field {
        /// The field.
        field: String,
        /// What stands there.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// What a request is, as far as rules speak of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked<'a> {
    pub user: Option<&'a UserInfo>,
    pub verb: &'a str,
    /// The path, if no resource is asked for.
    pub path: Option<&'a str>,
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
}

/// What is to be done about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub level: Level,
    pub omit_stages: Vec<Stage>,
    pub omit_managed_fields: bool,
}

/// Rules, of which the first one that fits decides.
#[derive(Debug)]
pub struct Policy(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    decision: Decision,
    says: RuleText,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PolicyText {
    api_version: String,
    kind: String,
    #[serde(default, rename = "metadata")]
    _metadata: serde::de::IgnoredAny,
    #[serde(default)]
    rules: Vec<RuleText>,
    #[serde(default)]
    omit_stages: Vec<String>,
    #[serde(default)]
    omit_managed_fields: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RuleText {
    #[serde(default)]
    level: String,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    user_groups: Vec<String>,
    #[serde(default)]
    verbs: Vec<String>,
    #[serde(default)]
    resources: Vec<GroupResources>,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default, rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
    #[serde(default)]
    omit_stages: Vec<String>,
    #[serde(default)]
    omit_managed_fields: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GroupResources {
    #[serde(default)]
    group: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
}

fn wrong<T>(field: String, value: &str, why: &'static str) -> Result<T, PolicyError> {
    Err(PolicyError::Field { field, value: format!("{value:?}"), why })
}

fn stages(texts: &[String], at: &str) -> Result<Vec<Stage>, PolicyError> {
    let one = |(index, text): (usize, &String)| match Stage::ALL.into_iter().find(|stage| stage.name() == text) {
        Some(stage) => Ok(stage),
        None => wrong(
            format!("{at}[{index}]"),
            text,
            "no such stage: write RequestReceived, ResponseStarted, ResponseComplete or Panic",
        ),
    };
    texts.iter().enumerate().map(one).collect()
}

impl Policy {
    /// Reads a policy, in YAML or JSON.
    ///
    /// # Errors
    /// If there is anything in it that is not understood: what is not written down cannot be found out later.
    pub fn parse(text: &str) -> Result<Policy, PolicyError> {
        let policy: PolicyText = serde_yaml_ng::from_str(text)?;
        if policy.kind != "Policy" || policy.api_version != "audit.k8s.io/v1" {
            let found = format!("{}, {}", policy.api_version, policy.kind);
            return wrong("apiVersion and kind".into(), &found, "write audit.k8s.io/v1 and Policy");
        }
        if policy.rules.is_empty() {
            return Err(PolicyError::Field {
                field: "rules".into(),
                value: "[]".into(),
                why: "write at least one rule, for example {level: Metadata}",
            });
        }
        let everywhere = stages(&policy.omit_stages, "omitStages")?;
        let rule = |(index, says): (usize, RuleText)| {
            let at = format!("rules[{index}]");
            let Some(level) = Level::ALL.into_iter().find(|level| level.name() == says.level) else {
                return wrong(
                    format!("{at}.level"),
                    &says.level,
                    "no such level: write None, Metadata, Request or RequestResponse",
                );
            };
            let mut omit_stages = everywhere.clone();
            omit_stages.extend(stages(&says.omit_stages, &format!("{at}.omitStages"))?);
            says.check(&at)?;
            let omit_managed_fields = says.omit_managed_fields.unwrap_or(policy.omit_managed_fields);
            Ok(Rule { decision: Decision { level, omit_stages, omit_managed_fields }, says })
        };
        policy.rules.into_iter().enumerate().map(rule).collect::<Result<_, _>>().map(Policy)
    }

    /// What the first rule that fits says; nothing is written down of what none is about.
    pub(crate) fn decide(&self, asked: &Asked<'_>) -> Option<&Decision> {
        let found = self.0.iter().find(|rule| rule.says.fits(asked)).map(|rule| &rule.decision);
        found.filter(|decision| decision.level != Level::None)
    }
}

impl RuleText {
    fn check(&self, at: &str) -> Result<(), PolicyError> {
        for (index, url) in self.non_resource_urls.iter().enumerate() {
            let field = || format!("{at}.nonResourceURLs[{index}]");
            if url == "*" {
                continue;
            }
            if !url.starts_with('/') {
                return wrong(field(), url, "must begin with a slash, or be \"*\"");
            }
            if url.trim_end_matches('*').contains('*') || url.ends_with("**") {
                return wrong(field(), url, "a \"*\" can only stand at the end");
            }
        }
        if let Some(first) = self.non_resource_urls.first()
            && !(self.resources.is_empty() && self.namespaces.is_empty())
        {
            return wrong(
                format!("{at}.nonResourceURLs"),
                first,
                "a rule is about resources and namespaces or about nonResourceURLs, not about both: write two rules",
            );
        }
        for (index, of) in self.resources.iter().enumerate() {
            let at = format!("{at}.resources[{index}]");
            if !of.group.is_empty() && names::dns_subdomain(&of.group).is_err() {
                return wrong(format!("{at}.group"), &of.group, "must be the name of a group, without a version");
            }
            if let (true, Some(name)) = (of.resources.is_empty(), of.resource_names.first()) {
                return wrong(
                    format!("{at}.resourceNames"),
                    name,
                    "names are those of resources: write at least one resource beside them",
                );
            }
        }
        Ok(())
    }

    fn fits(&self, asked: &Asked<'_>) -> bool {
        let has = |list: &[String], text: &str| list.iter().any(|one| one == text);
        if !self.users.is_empty() && !asked.user.is_some_and(|user| has(&self.users, &user.username)) {
            return false;
        }
        if !self.user_groups.is_empty()
            && !asked.user.is_some_and(|user| self.user_groups.iter().any(|g| user.is_in(g)))
        {
            return false;
        }
        if !self.verbs.is_empty() && !has(&self.verbs, asked.verb) {
            return false;
        }
        if !self.namespaces.is_empty() || !self.resources.is_empty() {
            return asked.path.is_none()
                && (self.namespaces.is_empty() || has(&self.namespaces, asked.namespace))
                && (self.resources.is_empty() || self.resources.iter().any(|of| of.fits(asked)));
        }
        if !self.non_resource_urls.is_empty() {
            return asked.path.is_some_and(|path| {
                self.non_resource_urls.iter().any(|url| match url.strip_suffix('*') {
                    Some(start) => path.starts_with(start),
                    None => path == url,
                })
            });
        }
        true
    }
}

impl GroupResources {
    fn fits(&self, asked: &Asked<'_>) -> bool {
        if self.group != asked.group {
            return false;
        }
        let named = self.resource_names.is_empty() || self.resource_names.iter().any(|name| name == asked.name);
        let one = |text: &String| match text.split_once('/') {
            // Without a slash it is the resource, and not what is below it.
            None => text == "*" || (text == asked.resource && asked.subresource.is_empty()),
            Some((resource, sub)) => {
                (resource == "*" || resource == asked.resource)
                    // "pods/*" is about pods as well, as upstream has it; "*/status" is not about what has no status.
                    && ((sub == "*" && resource != "*") || (sub == asked.subresource && !sub.is_empty()))
            }
        };
        self.resources.is_empty() || (named && self.resources.iter().any(one))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &str) -> Result<Policy, PolicyError> {
        Policy::parse(&format!("{{apiVersion: audit.k8s.io/v1, kind: Policy, {rules}}}"))
    }

    /// `VERB GROUP/RESOURCE[/SUBRESOURCE] NAMESPACE NAME`, or `VERB PATH` with a leading slash; `-` for nothing.
    fn level(policy: &Policy, user: Option<&UserInfo>, request: &str) -> Level {
        let words: Vec<&str> = request.split(' ').map(|word| if word == "-" { "" } else { word }).collect();
        let mut asked = Asked { user, verb: words[0], ..Default::default() };
        if words.len() == 2 {
            asked.path = Some(words[1]);
        } else {
            let mut parts = words[1].split('/');
            (asked.group, asked.resource) = (parts.next().unwrap(), parts.next().unwrap());
            asked.subresource = parts.next().unwrap_or_default();
            (asked.namespace, asked.name) = (words[2], words[3]);
        }
        policy.decide(&asked).map_or(Level::None, |decision| decision.level)
    }

    #[test]
    fn which_rule_fits() {
        let jane = UserInfo::new("jane", &["devs"]);
        let check = |rule: &str, request: &str, expect: bool| {
            let policy = policy(&format!("rules: [{{level: Metadata, {rule}}}]")).unwrap();
            assert_eq!(level(&policy, Some(&jane), request) == Level::Metadata, expect, "{rule}: {request}");
        };
        check("users: [jane]", "get /pods n p", true);
        check("users: [joe]", "get /pods n p", false);
        check("userGroups: [ops, devs]", "get /healthz", true);
        check("userGroups: [ops]", "get /healthz", false);
        check("verbs: [get, list]", "list /pods n -", true);
        check("verbs: [get, list]", "watch /pods n -", false);
        check("namespaces: [n]", "get /pods n p", true);
        check("namespaces: [n]", "get /pods m p", false);
        check("namespaces: ['']", "get /nodes - a", true);
        check("namespaces: [n]", "get /healthz", false);
        let pods = "resources: [{group: '', resources: [pods]}]";
        check(pods, "get /pods n p", true);
        check(pods, "get /pods/log n p", false);
        check(pods, "get apps/pods n p", false);
        check("resources: [{group: apps}]", "get apps/deployments/scale n d", true);
        check("resources: [{group: ''}]", "get apps/deployments n d", false);
        check("resources: [{group: '', resources: ['*']}]", "get /pods/log n p", true);
        check("resources: [{group: '', resources: [pods/log]}]", "get /pods/log n p", true);
        check("resources: [{group: '', resources: [pods/log]}]", "get /pods n p", false);
        check("resources: [{group: '', resources: ['*/status']}]", "update /pods/status n p", true);
        check("resources: [{group: '', resources: ['*/status']}]", "update /pods n p", false);
        check("resources: [{group: '', resources: ['pods/*']}]", "get /pods/exec n p", true);
        check("resources: [{group: '', resources: ['pods/*']}]", "get /pods n p", true);
        check("resources: [{group: '', resources: ['pods/*']}]", "get /services/status n p", false);
        let named = "resources: [{group: '', resources: [configmaps], resourceNames: [a]}]";
        check(named, "get /configmaps n a", true);
        check(named, "get /configmaps n b", false);
        check(named, "list /configmaps n -", false);
        check("nonResourceURLs: ['/healthz*', /version]", "get /healthz/ping", true);
        check("nonResourceURLs: ['/healthz*', /version]", "get /version", true);
        check("nonResourceURLs: ['/healthz*', /version]", "get /version/x", false);
        check("nonResourceURLs: ['*']", "get /metrics", true);
        check("nonResourceURLs: ['*']", "get /pods n p", false);
        check("omitStages: [Panic]", "get /pods n p", true);
        let of_jane = policy("rules: [{level: Metadata, users: [jane]}]").unwrap();
        assert_eq!(level(&of_jane, None, "get /pods n p"), Level::None, "nobody is not jane");
    }

    #[test]
    fn the_first_one_decides() {
        let policy = policy(
            "omitStages: [RequestReceived], omitManagedFields: true, rules: [
                {level: None, users: [robot]},
                {level: Metadata, resources: [{group: '', resources: [secrets]}], omitStages: [Panic]},
                {level: RequestResponse, resources: [{group: ''}], omitManagedFields: false},
                {level: Request}]",
        )
        .unwrap();
        let robot = UserInfo::new("robot", &[]);
        assert_eq!(level(&policy, Some(&robot), "get /secrets n s"), Level::None);
        assert_eq!(level(&policy, None, "get /secrets n s"), Level::Metadata);
        assert_eq!(level(&policy, None, "get /pods n s"), Level::RequestResponse);
        assert_eq!(level(&policy, None, "get apps/deployments n s"), Level::Request);
        let secrets = Asked { resource: "secrets", ..Default::default() };
        let expect = Decision {
            level: Level::Metadata,
            omit_stages: vec![Stage::RequestReceived, Stage::Panic],
            omit_managed_fields: true,
        };
        assert_eq!(policy.decide(&secrets), Some(&expect));
        assert!(!policy.decide(&Asked { resource: "pods", ..Default::default() }).unwrap().omit_managed_fields);
    }

    #[test]
    fn what_is_wrong_with_a_policy() {
        let check = |text: &str, expect: &str| {
            let error = policy(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{text}: {error}");
        };
        check("rules: []", "rules: []: write at least one rule");
        check("rules: [{level: All}]", "rules[0].level: \"All\": no such level: write None");
        check("rules: [{users: [a]}]", "rules[0].level: \"\": no such level");
        check("rules: [{level: None, omitStages: [Begin]}]", "rules[0].omitStages[0]: \"Begin\": no such stage");
        check("omitStages: [End], rules: [{level: None}]", "omitStages[0]: \"End\": no such stage");
        check("rules: [{level: None, colour: red}]", "unknown field `colour`");
        check("rules: [{level: None, nonResourceURLs: [healthz]}]", "nonResourceURLs[0]: \"healthz\": must begin");
        check("rules: [{level: None, nonResourceURLs: ['/a/*/b']}]", "a \"*\" can only stand at the end");
        check("rules: [{level: None, nonResourceURLs: [/a], namespaces: [b]}]", "write two rules");
        check("rules: [{level: None, resources: [{group: Apps/v1}]}]", "resources[0].group: \"Apps/v1\"");
        check("rules: [{level: None, resources: [{resourceNames: [a]}]}]", "at least one resource beside them");
        let error = Policy::parse("{apiVersion: v1, kind: Policy, rules: [{level: None}]}").unwrap_err().to_string();
        assert_eq!(error, "apiVersion and kind: \"v1, Policy\": write audit.k8s.io/v1 and Policy");
    }
}
