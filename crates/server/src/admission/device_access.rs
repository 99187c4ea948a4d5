//! Administrators' access to devices that others use is for namespaces with a label (KEP-5018).

use seawall_api::field::{Errors, Path};
use serde_json::Value;

use crate::{
    Context, Server,
    error::{ApiError, Result},
};

const LABEL: &str = "resource.kubernetes.io/admin-access";
const KEY: &str = "adminAccess";

/// The first of these that is for administrators.
fn first<'a>(list: &'a Value, of: impl Fn(&'a Value) -> &'a Value) -> Option<usize> {
    list.as_array()?.iter().position(|item| of(item)[KEY] == true)
}

impl Server {
    /// Refuses claims, templates of claims, and what claims got, where the namespace does not have the label. A spec stays as
    /// it is once it is there, and so does what was given.
    pub(super) async fn device_access(&self, context: &Context<'_>, object: &Value, old: Option<&Value>) -> Result<()> {
        let row = &context.row;
        let results = |claim: &Value| first(&claim["status"]["allocation"]["devices"]["results"], |result| result);
        let asked = |spec: &Value| first(&spec["devices"]["requests"], |request| &request["exactly"]);
        let (index, in_status) = match (row.group, row.plural, old) {
            ("resource.k8s.io", "resourceclaims", Some(old)) if results(old).is_none() => (results(object), true),
            ("resource.k8s.io", "resourceclaims", None) => (asked(&object["spec"]), false),
            ("resource.k8s.io", "resourceclaimtemplates", None) => (asked(&object["spec"]["spec"]), false),
            _ => return Ok(()),
        };
        let Some(index) = index else { return Ok(()) };
        let namespace = self.find("", "namespaces", "", context.namespace()).await?;
        if namespace.is_some_and(|namespace| namespace.value()["metadata"]["labels"][LABEL] == "true") {
            return Ok(());
        }
        let mut errors = Errors::default();
        let why = format!("admin access to devices requires the `{LABEL}: true` label on the containing namespace");
        let root = Path::Root.at(if in_status { "status" } else { "spec" });
        let allocation = root.at("allocation");
        let devices = if in_status { allocation.at("devices") } else { root.at("devices") };
        let list = devices.at(if in_status { "results" } else { "requests" });
        errors.forbidden(list.index(index).at(KEY), why);
        Err(ApiError::invalid(row, object["metadata"]["name"].as_str().unwrap_or_default(), &errors))
    }
}
