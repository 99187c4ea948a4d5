//! FlowSchema, PriorityLevelConfiguration
//! (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>).

use k8s_openapi::api::flowcontrol::v1::{FlowSchema, PriorityLevelConfiguration};
use serde_json::{Value, json};

use super::{default, items, with_status};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, col, row as base},
};

const EXEMPT: &str = "exempt";

pub(super) fn schema() -> Row {
    Row {
        columns: const {
            &[
                col("PriorityLevel", "string"),
                col("MatchingPrecedence", "string"),
                col("DistinguisherMethod", "string"),
                col("Age", "date"),
                col("MissingPL", "string"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            let dangling = items(&o["status"], "conditions").find(|c| c["type"] == "Dangling");
            vec![
                cell::plain(&spec["priorityLevelConfiguration"]["name"]),
                spec["matchingPrecedence"].to_string().into(),
                cell::text(&spec["distinguisherMethod"]["type"]),
                cell::age(o, now),
                dangling.and_then(|c| c["status"].as_str()).unwrap_or("?").into(),
            ]
        },
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                default(spec, "matchingPrecedence", 1000);
            }
        },
        validate: |v, errors| {
            let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
            let precedence = spec["matchingPrecedence"].as_i64().unwrap_or_default();
            let at = path.at("matchingPrecedence");
            match precedence {
                ..=0 => errors.invalid(at, precedence, "must be a positive value"),
                1 if v.new["metadata"]["name"] != EXEMPT => {
                    errors.invalid(at, precedence, "only the schema named 'exempt' may have matchingPrecedence 1");
                }
                10_001.. => errors.invalid(at, precedence, "must not be greater than 10000"),
                _ => {}
            }
            one_of(
                &spec["distinguisherMethod"]["type"],
                path.at("distinguisherMethod").at("type"),
                &["ByNamespace", "ByUser"],
                errors,
            );
            if spec["priorityLevelConfiguration"]["name"].as_str().is_none_or(str::is_empty) {
                errors.required(path.at("priorityLevelConfiguration").at("name"), "must reference a priority level");
            }
            let rules = path.at("rules");
            for (at, rule) in items(spec, "rules").enumerate() {
                let path = rules.index(at);
                if items(rule, "subjects").next().is_none() {
                    errors.required(path.at("subjects"), "subjects must contain at least one value");
                }
                if items(rule, "resourceRules").next().is_none() && items(rule, "nonResourceRules").next().is_none() {
                    let why = "at least one of resourceRules and nonResourceRules has to be non-empty";
                    errors.required(path, why);
                }
                let subjects = path.at("subjects");
                for (at, subject) in items(rule, "subjects").enumerate() {
                    let path = subjects.index(at);
                    let kinds = ["Group", "ServiceAccount", "User"];
                    one_of(&subject["kind"], path.at("kind"), &kinds, errors);
                    let field = match subject["kind"].as_str() {
                        Some("Group") => "group",
                        Some("User") => "user",
                        _ => "serviceAccount",
                    };
                    if subject[field]["name"].as_str().is_none_or(str::is_empty) {
                        errors.required(path.at(field).at("name"), "");
                    }
                }
            }
        },
        ..with_status(base::<FlowSchema>())
    }
}

fn one_of(value: &Value, path: Path<'_>, known: &[&str], errors: &mut Errors) {
    if let Some(text) = value.as_str()
        && !known.contains(&text)
    {
        errors.not_supported(path, text, known);
    }
}

pub(super) fn level() -> Row {
    Row {
        columns: const {
            &[
                col("Type", "string"),
                col("NominalConcurrencyShares", "string"),
                col("Queues", "string"),
                col("HandSize", "string"),
                col("QueueLengthLimit", "string"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            let limited = &o["spec"]["limited"];
            let queuing = &limited["limitResponse"]["queuing"];
            let number = |v: &Value| if v.is_null() { "<none>".to_owned() } else { v.to_string() };
            vec![
                cell::plain(&o["spec"]["type"]),
                number(&limited["nominalConcurrencyShares"]).into(),
                number(&queuing["queues"]).into(),
                number(&queuing["handSize"]).into(),
                number(&queuing["queueLengthLimit"]).into(),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            let Some(spec) = o.get_mut("spec") else { return };
            if spec["type"] == "Exempt" {
                default(spec, "exempt", json!({}));
                default(&mut spec["exempt"], "nominalConcurrencyShares", 0);
                default(&mut spec["exempt"], "lendablePercent", 0);
            }
            let Some(limited) = spec.get_mut("limited") else { return };
            default(limited, "nominalConcurrencyShares", 30);
            default(limited, "lendablePercent", 0);
            if let Some(queuing) = limited.get_mut("limitResponse").and_then(|r| r.get_mut("queuing")) {
                default(queuing, "queues", 64);
                default(queuing, "handSize", 8);
                default(queuing, "queueLengthLimit", 50);
            }
        },
        validate: |v, errors| {
            let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
            let exempt = v.new["metadata"]["name"] == EXEMPT;
            match spec["type"].as_str() {
                Some("Exempt") if !exempt => {
                    errors.invalid(path.at("type"), "Exempt", "must be 'Exempt' if and only if `name` is 'exempt'");
                }
                Some("Limited") if exempt => {
                    errors.invalid(path.at("type"), "Limited", "must be 'Exempt' if and only if `name` is 'exempt'");
                }
                Some("Exempt") => {
                    if !spec["limited"].is_null() {
                        errors.forbidden(path.at("limited"), "must be nil if the type is not Limited");
                    }
                    lending(&spec["exempt"], path.at("exempt"), errors);
                }
                Some("Limited") if spec["limited"].is_null() => {
                    errors.required(path.at("limited"), "must not be empty when type is Limited");
                }
                Some("Limited") => limited(&spec["limited"], path.at("limited"), errors),
                other => {
                    errors.not_supported(path.at("type"), other.unwrap_or_default(), &["Exempt", "Limited"]);
                }
            }
        },
        ..with_status(base::<PriorityLevelConfiguration>())
    }
}

fn lending(value: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(shares) = value["nominalConcurrencyShares"].as_i64().filter(|n| *n < 0) {
        errors.invalid(path.at("nominalConcurrencyShares"), shares, "must be a non-negative integer");
    }
    if let Some(percent) = value["lendablePercent"].as_i64().filter(|n| !(0..=100).contains(n)) {
        errors.invalid(path.at("lendablePercent"), percent, "must be between 0 and 100, inclusive");
    }
}

fn limited(value: &Value, path: Path<'_>, errors: &mut Errors) {
    lending(value, path, errors);
    if let Some(percent) = value["borrowingLimitPercent"].as_i64().filter(|n| *n < 0) {
        errors.invalid(path.at("borrowingLimitPercent"), percent, "if specified, must be a non-negative integer");
    }
    let (response, path) = (&value["limitResponse"], path.at("limitResponse"));
    let queuing = &response["queuing"];
    match response["type"].as_str() {
        Some("Reject") if queuing.is_null() => {}
        Some("Reject") => {
            errors.forbidden(path.at("queuing"), "must be nil if limited.limitResponse.type is not Queue");
        }
        Some("Queue") if queuing.is_null() => {
            errors.required(path.at("queuing"), "must not be empty if limited.limitResponse.type is Queue");
        }
        Some("Queue") => {
            let path = path.at("queuing");
            for field in ["queues", "handSize", "queueLengthLimit"] {
                if let Some(number) = queuing[field].as_i64().filter(|n| *n <= 0) {
                    errors.invalid(path.at(field), number, "must be positive");
                }
            }
            let (queues, hand) = (queuing["queues"].as_i64(), queuing["handSize"].as_i64());
            if let (Some(queues), Some(hand)) = (queues, hand)
                && hand > queues
            {
                errors.invalid(path.at("handSize"), hand, format!("should not be greater than queues ({queues})"));
            }
            if let Some(queues) = queues.filter(|n| *n > 10_000_000) {
                errors.invalid(path.at("queues"), queues, "must not be greater than 10000000");
            }
        }
        other => errors.not_supported(path.at("type"), other.unwrap_or_default(), &["Queue", "Reject"]),
    }
}
