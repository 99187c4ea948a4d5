//! Nobody gives away permissions that they do not have
//! (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/#privilege-escalation-prevention-and-bootstrapping>).

use k8s_openapi::api::rbac::v1::{PolicyRule, RoleRef};
use serde_json::Value;

use crate::{
    Context, Server,
    auth::{
        MASTERS,
        authorize::Attributes,
        rbac::{GROUP, everything, not_held, role_key},
    },
    error::{ApiError, Result},
};

impl Server {
    pub(crate) async fn guard_roles(&self, context: &Context<'_>, new: &Value, old: Option<&Value>) -> Result<()> {
        if context.row.group != GROUP || context.user.is_in(MASTERS) {
            return Ok(());
        }
        let changed = |field: &str| old.is_none_or(|old| old[field] != new[field]);
        match context.row.plural {
            "roles" | "clusterroles" if changed("rules") || changed("aggregationRule") => {
                // What cannot be read cannot be compared with what somebody holds: then nobody gets it.
                let rules: Option<Vec<PolicyRule>> = serde_json::from_value(new["rules"].clone())
                    .map_err(|e| ApiError::bad_request(format!("rules: Invalid value: {e}")))?;
                let mut rules = rules.unwrap_or_default();
                if !new["aggregationRule"].is_null() && changed("aggregationRule") {
                    // It may come to hold anything.
                    rules.extend(everything());
                }
                match self.may(context, "escalate", context.row.plural, new["metadata"]["name"].as_str()).await {
                    true => Ok(()),
                    false => self.has_all(context, new, &rules),
                }
            }
            "rolebindings" | "clusterrolebindings" if changed("subjects") || changed("roleRef") => {
                let role: RoleRef = serde_json::from_value(new["roleRef"].clone())
                    .map_err(|e| ApiError::bad_request(format!("roleRef: Invalid value: {e}")))?;
                let plural = if role.kind == "Role" { "roles" } else { "clusterroles" };
                if self.may(context, "bind", plural, Some(&role.name)).await {
                    return Ok(());
                }
                let index = self.rbac();
                match index.role(&role_key(context.namespace(), &role)) {
                    Some(rules) => self.has_all(context, new, rules),
                    None => {
                        let mut error = ApiError::forbidden(&context.row, "", "");
                        error.message = format!("{plural}.{GROUP} {:?} not found", role.name);
                        error.code = http::StatusCode::NOT_FOUND;
                        error.reason = "NotFound".into();
                        Err(error)
                    }
                }
            }
            _ => Ok(()),
        }
    }

    async fn may(&self, context: &Context<'_>, verb: &str, resource: &str, name: Option<&str>) -> bool {
        let (namespace, name) = (context.namespace(), name.unwrap_or_default());
        let attributes = Attributes { verb, group: GROUP, resource, namespace, name, ..Default::default() };
        self.authorize(&context.user, &attributes).await.is_ok()
    }

    fn has_all(&self, context: &Context<'_>, object: &Value, wanted: &[PolicyRule]) -> Result<()> {
        let held = self.rbac().rules(&context.user, context.namespace());
        let missing = not_held(&held, wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let why = format!(
            "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
            context.user.username,
            context.user.groups,
            missing.join("\n")
        );
        Err(ApiError::forbidden(&context.row, name, why))
    }
}
