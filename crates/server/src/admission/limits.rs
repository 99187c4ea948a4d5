//! LimitRanges (<https://kubernetes.io/docs/concepts/policy/limit-range/>); what they come to is in `api/limit_range.rs`.

use seawall_api::limit_range;
use serde_json::Value;

use crate::{
    Context, Server,
    error::{ApiError, Result},
};

impl Server {
    fn limit_ranges(&self, context: &Context<'_>) -> Vec<Value> {
        let part = context.path.subresource.as_deref();
        let core = context.row.group.is_empty() && matches!(part, None | Some("resize"));
        let Some((id, row)) = self.registry.by_name("", "limitranges").filter(|_| core) else { return Vec::new() };
        let prefix = format!("{}{}/", row.prefix(), context.namespace());
        self.cache.snapshot().range(id, &prefix, None).map(|range| range.value()).collect()
    }

    /// Gives a pod what it does not say.
    pub(super) fn fill_limits(&self, context: &Context<'_>, pod: &mut Value) {
        for range in self.limit_ranges(context) {
            limit_range::fill(&range, pod);
        }
    }

    /// Refuses a pod or a claim that is out of range. Pods that are there are looked at again when they are resized.
    pub(super) fn check_limits(&self, context: &Context<'_>, object: &Value, is_new: bool) -> Result<()> {
        let check = match context.row.plural {
            "pods" if is_new || context.path.subresource.as_deref() == Some("resize") => limit_range::check_pod,
            "persistentvolumeclaims" => limit_range::check_claim,
            _ => return Ok(()),
        };
        let wrong: Vec<String> = self.limit_ranges(context).iter().flat_map(|range| check(range, object)).collect();
        let why = match &wrong[..] {
            [] => return Ok(()),
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        Err(ApiError::forbidden(&context.row, object["metadata"]["name"].as_str().unwrap_or_default(), why))
    }
}
