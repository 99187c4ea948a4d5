use serde_json::json;

use super::*;
use crate::resources;

const NOW: &str = "2026-01-01T00:00:00Z";
const LATER: &str = "2026-01-01T00:01:00Z";

fn schemas() -> &'static Schemas {
    static SCHEMAS: std::sync::OnceLock<Schemas> = std::sync::OnceLock::new();
    SCHEMAS.get_or_init(|| Schemas::new(resources::all().iter().map(|row| row.schema)))
}

fn types(ty: &str) -> Types<'static> {
    Types { schemas: schemas(), ty: schemas().by_name(ty).unwrap(), without: &[], nulls: false }
}

fn deployment() -> Types<'static> {
    types("io.k8s.api.apps.v1.Deployment")
}

fn manager(name: &str, operation: Operation) -> Manager {
    Manager { name: name.into(), operation, api_version: "apps/v1".into(), subresource: String::new() }
}

/// An object and its records, and what is done to them one after the other.
struct Story {
    types: Types<'static>,
    object: Option<Value>,
    managed: Managed,
}

impl Story {
    fn of(ty: &str) -> Story {
        Story { types: types(ty), object: None, managed: Managed::default() }
    }

    fn try_apply(&mut self, who: &str, config: Value, force: bool) -> Result<(), ApplyError> {
        let manager = manager(who, Operation::Apply);
        let managed = self.managed.clone();
        let (object, managed) = apply(self.types, self.object.as_ref(), &config, managed, &manager, force, NOW)?;
        (self.object, self.managed) = (Some(object), managed);
        Ok(())
    }

    #[track_caller]
    fn apply(&mut self, who: &str, config: Value) -> &mut Story {
        self.try_apply(who, config, false).unwrap();
        self
    }

    #[track_caller]
    fn force(&mut self, who: &str, config: Value) -> &mut Story {
        self.try_apply(who, config, true).unwrap();
        self
    }

    fn update(&mut self, who: &str, new: Value) -> &mut Story {
        let old = self.object.clone().unwrap_or_else(|| json!({}));
        let managed = std::mem::take(&mut self.managed);
        self.managed = update(self.types, &old, &new, managed, &manager(who, Operation::Update), LATER);
        self.object = Some(new);
        self
    }

    #[track_caller]
    fn is(&mut self, object: Value) -> &mut Story {
        assert_eq!(self.object.clone().unwrap(), object);
        self
    }

    #[track_caller]
    fn owns(&mut self, who: &str, paths: &[&str]) -> &mut Story {
        let records = self.managed.0.iter().filter(|record| record.manager.name == who);
        let found: Vec<String> = records.flat_map(|record| record.fields.paths()).collect();
        assert_eq!(found, paths, "{who}");
        self
    }
}

fn labels(labels: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": labels}})
}

fn containers(containers: Value) -> Value {
    json!({"spec": {"template": {"spec": {"containers": containers}}}})
}

const DEPLOYMENT: &str = "io.k8s.api.apps.v1.Deployment";

#[test]
fn what_is_no_longer_applied_goes() {
    Story::of(DEPLOYMENT)
        .apply("a", labels(json!({"x": "1", "y": "1"})))
        .owns("a", &[".metadata.labels.x", ".metadata.labels.y"])
        .apply("a", labels(json!({"x": "1"})))
        .is(labels(json!({"x": "1"})))
        .owns("a", &[".metadata.labels.x"])
        .apply("a", labels(json!({})))
        .is(labels(json!({})))
        .owns("a", &[".metadata.labels"]);
}

#[test]
fn what_somebody_else_applies_too_stays() {
    Story::of(DEPLOYMENT)
        .apply("a", labels(json!({"x": "1", "y": "1"})))
        .apply("b", labels(json!({"x": "1"})))
        .apply("a", labels(json!({"y": "1"})))
        .is(labels(json!({"x": "1", "y": "1"})))
        .owns("b", &[".metadata.labels.x"])
        .apply("b", json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}}))
        .is(labels(json!({"y": "1"})))
        .owns("b", &[]);
}

#[test]
fn another_ones_value_is_a_conflict_until_it_is_forced() {
    let mut story = Story::of(DEPLOYMENT);
    story.apply("a", json!({"spec": {"replicas": 1, "paused": true}}));
    let error = story.try_apply("b", json!({"spec": {"replicas": 2}}), false).unwrap_err();
    assert_eq!(error.to_string(), "Apply failed with 1 conflict: conflict with \"a\": .spec.replicas");
    story.owns("b", &[]);
    story.force("b", json!({"spec": {"replicas": 2}})).is(json!({"spec": {"replicas": 2, "paused": true}}));
    story.owns("a", &[".spec.paused"]).owns("b", &[".spec.replicas"]);
    // An updater owns as well.
    story.update("scaler", json!({"spec": {"replicas": 5, "paused": false}}));
    story.owns("a", &[]).owns("b", &[]).owns("scaler", &[".spec.paused", ".spec.replicas"]);
    let error = story.try_apply("b", json!({"spec": {"replicas": 2, "paused": true}}), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 2 conflicts: conflicts with \"scaler\" using apps/v1:\n- .spec.paused\n- .spec.replicas"
    );
    // The same value is nobody's loss: both own it.
    story.apply("b", json!({"spec": {"replicas": 5}})).owns("b", &[".spec.replicas"]);
    story.owns("scaler", &[".spec.paused", ".spec.replicas"]);
}

#[test]
fn lists_are_merged_by_their_keys() {
    let image = |name: &str, image: &str| json!({"name": name, "image": image});
    Story::of(DEPLOYMENT)
        .apply("a", containers(json!([image("web", "1"), image("log", "1")])))
        .apply("b", containers(json!([{"name": "side", "image": "1"}, {"name": "web", "tty": true}])))
        .is(containers(json!([image("side", "1"), {"name": "web", "image": "1", "tty": true}, image("log", "1")])))
        // What is of several stays as long as one of them wants it.
        .apply("a", containers(json!([image("log", "2")])))
        .is(containers(json!([image("side", "1"), {"name": "web", "tty": true}, image("log", "2")])))
        .apply("b", containers(json!([image("side", "1")])))
        .is(containers(json!([image("side", "1"), image("log", "2")])))
        .owns(
            "a",
            &[
                ".spec.template.spec.containers[name=\"log\"]",
                ".spec.template.spec.containers[name=\"log\"].image",
                ".spec.template.spec.containers[name=\"log\"].name",
            ],
        );
}

#[test]
fn a_key_with_a_default_may_be_left_out() {
    let port = |port: Value| containers(json!([{"name": "web", "ports": [port]}]));
    Story::of(DEPLOYMENT)
        .apply("a", port(json!({"containerPort": 80})))
        .apply("b", port(json!({"containerPort": 80, "protocol": "TCP", "name": "http"})))
        .is(port(json!({"containerPort": 80, "protocol": "TCP", "name": "http"})));
    let check = |config: Value, expect: &str| {
        let error = Story::of(DEPLOYMENT).try_apply("a", config, false).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(
        containers(json!([{"image": "1"}])),
        ".spec.template.spec.containers: element 0: associative list with keys has an element that omits key field \"name\"",
    );
    check(containers(json!([{"name": "a"}, {"name": "a"}])), "duplicate entries for key [name=\"a\"]");
}

#[test]
fn sets_and_what_is_atomic() {
    let finalizers = |list: Value| json!({"metadata": {"name": "x", "finalizers": list}});
    Story::of(DEPLOYMENT)
        .apply("a", finalizers(json!(["x/a", "x/b"])))
        .apply("b", finalizers(json!(["x/c"])))
        .is(finalizers(json!(["x/a", "x/b", "x/c"])))
        .apply("a", finalizers(json!(["x/b"])))
        .is(finalizers(json!(["x/b", "x/c"])));
    let mut story = Story::of(DEPLOYMENT);
    let selector = |labels: Value| json!({"spec": {"selector": {"matchLabels": labels}}});
    story.apply("a", selector(json!({"app": "web"}))).owns("a", &[".spec.selector"]);
    let error = story.try_apply("b", selector(json!({"tier": "front"})), false).unwrap_err();
    assert!(error.to_string().contains("conflict with \"a\": .spec.selector"), "{error}");
    story.force("b", selector(json!({"tier": "front"}))).is(selector(json!({"tier": "front"})));
}

#[test]
fn what_was_there_before_is_somebodys() {
    let mut story = Story::of(DEPLOYMENT);
    story.object = Some(json!({"spec": {"replicas": 1, "paused": true}}));
    let error = story.try_apply("a", json!({"spec": {"replicas": 2}}), false).unwrap_err();
    assert!(error.to_string().contains("\"before-first-apply\" using apps/v1: .spec.replicas"), "{error}");
    story.force("a", json!({"spec": {"replicas": 2}}));
    story.owns("before-first-apply", &[".spec.paused"]).owns("a", &[".spec.replicas"]);
}

#[test]
fn updates_own_what_they_change() {
    let mut story = Story::of(DEPLOYMENT);
    let first = containers(json!([{"name": "web", "image": "1", "env": [{"name": "A", "value": "1"}]}]));
    story.update("kubectl-create", first);
    let web = ".spec.template.spec.containers[name=\"web\"]";
    let paths = story.managed.0[0].fields.paths();
    for suffix in ["", ".image", ".name", ".env", ".env[name=\"A\"]", ".env[name=\"A\"].value"] {
        assert!(paths.contains(&format!("{web}{suffix}")), "{suffix}: {paths:?}");
    }
    story.update("kubectl-set", containers(json!([{"name": "web", "image": "2"}])));
    story.owns("kubectl-set", &[&format!("{web}.image")]);
    let paths = story.managed.0[0].fields.paths();
    assert!(!paths.iter().any(|path| path.contains("env") || path.contains("image")), "{paths:?}");
    assert_eq!(story.managed.0[1].time, LATER);
}

#[test]
fn an_apply_that_says_the_same_changes_nothing() {
    let config = json!({"spec": {"replicas": 1}});
    let mut story = Story::of(DEPLOYMENT);
    story.apply("a", config.clone());
    let (object, managed) = (story.object.clone(), story.managed.clone());
    let again =
        apply(story.types, object.as_ref(), &config, managed.clone(), &manager("a", Operation::Apply), false, LATER);
    assert_eq!(again.unwrap(), (object.unwrap(), managed));
}

#[test]
fn many_updaters_become_one() {
    let mut story = Story::of(DEPLOYMENT);
    for at in 0..15 {
        let mut labels = Map::new();
        (0..=at).for_each(|n| {
            labels.insert(format!("l{n}"), "1".into());
        });
        story.update(&format!("updater-{at}"), json!({"metadata": {"labels": labels}}));
        story.managed.0.iter_mut().for_each(|record| {
            if record.manager.name == format!("updater-{at}") {
                record.time = format!("2026-01-01T00:00:{at:02}Z");
            }
        });
    }
    let names: Vec<&str> = story.managed.0.iter().map(|record| &*record.manager.name).collect();
    assert_eq!(names.len(), UPDATERS, "{names:?}");
    assert!(names.contains(&ANCIENT) && names.contains(&"updater-14") && !names.contains(&"updater-0"), "{names:?}");
    let all: usize = story.managed.0.iter().map(|record| record.fields.paths().len()).sum();
    assert_eq!(all, 16, "nothing is lost: fifteen labels and the map");
}

#[test]
fn whoever_applied_on_the_client_changes_over() {
    let last = json!({"spec": {"replicas": 1}}).to_string();
    let object = json!({"metadata": {"annotations": {LAST_APPLIED: last}}, "spec": {"replicas": 1, "paused": true}});
    let mut story = Story::of(DEPLOYMENT);
    story.update("kubectl-client-side-apply", object.clone());
    let check = |story: &mut Story, config: Value, expect: bool| {
        let Err(ApplyError::Conflicts(conflicts)) = story.try_apply("kubectl", config, false) else {
            panic!("no conflict")
        };
        assert_eq!(changes_over(story.types, &object, &conflicts), expect, "{conflicts:?}");
    };
    check(&mut story, json!({"spec": {"replicas": 3}}), true);
    // What the annotation does not name is somebody else's.
    check(&mut story, json!({"spec": {"replicas": 3, "paused": false}}), false);
}

#[test]
fn what_a_write_leaves_alone_is_not_its_own() {
    let mut story = Story::of(DEPLOYMENT);
    story.types.without = &[&["status"]];
    story
        .apply("a", json!({"metadata": {"name": "x", "uid": "1"}, "spec": {"replicas": 1}, "status": {"replicas": 1}}));
    story.owns("a", &[".spec.replicas"]);
}

#[test]
fn records_are_read_and_refused() {
    let mut story = Story::of(DEPLOYMENT);
    story.apply("a", json!({"spec": {"replicas": 1}}));
    story.update("b", json!({"spec": {"replicas": 1, "paused": true}}));
    let written = story.managed.write().unwrap();
    assert_eq!(written[0]["operation"], "Apply");
    assert_eq!(written[1]["fieldsV1"], json!({"f:spec": {"f:paused": {}}}));
    assert_eq!(Managed::read(&written).unwrap(), story.managed);
    assert_eq!(Managed::read(&json!([{}])).unwrap(), Managed::default());
    let check = |record: Value, expect: &str| {
        let error = Managed::read(&json!([record])).unwrap_err().to_string();
        assert!(error.starts_with(&format!("metadata.managedFields[0].{expect}")), "{error}");
    };
    check(json!({"operation": "Guess"}), "operation: Invalid value: \"Guess\"");
    check(json!({"operation": "Apply", "fieldsType": "V2"}), "fieldsType: Invalid value: \"V2\"");
    check(json!({"operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": {"x": {}}}), "fieldsV1");
}

#[test]
fn every_kind_s_own_object_can_be_applied_to_itself() {
    let pod = json!({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "a", "image": "b",
        "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}]}], "volumes": [{"name": "v", "emptyDir": {}}],
        "tolerations": [{"operator": "Exists"}], "imagePullSecrets": [{"name": "s"}]}});
    let types = types("io.k8s.api.core.v1.Pod");
    let managed = update(types, &json!({}), &pod, Managed::default(), &manager("a", Operation::Update), NOW);
    let (object, managed) =
        apply(types, Some(&pod), &pod, managed, &manager("b", Operation::Apply), false, NOW).unwrap();
    assert_eq!(object, pod);
    assert_eq!(managed.0.len(), 2);
    assert_eq!(deployment().changes(&pod, &pod), Changes::default());
}
