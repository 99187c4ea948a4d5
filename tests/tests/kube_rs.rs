//! An operator as users of kube-rs write it: a kind that is derived from a type, `Controller`, `finalizer`, `Recorder`.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::{
    api::{core::v1::ConfigMap, events::v1::Event},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, CustomResource, CustomResourceExt as _, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        Controller,
        controller::Action,
        events::{self, EventType, Recorder, Reporter},
        finalizer::{self, finalizer},
        wait::{Condition, await_condition, conditions},
        watcher,
    },
};
use schemars::JsonSchema;
use seawall_tests::{Options, Server, within};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use tokio::task::JoinHandle;

/// The longest that one step may take.
const LIMIT: Duration = Duration::from_secs(30);
const FINALIZER: &str = "example.org/garden";
const MANAGER: &str = "gardener";

/// A garden, which has a ConfigMap for each of its beds.
#[derive(CustomResource, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[kube(group = "example.org", version = "v1", kind = "Garden", namespaced, status = "GardenStatus", shortname = "gd")]
#[kube(printcolumn = r#"{"name": "Beds", "type": "integer", "jsonPath": ".status.beds"}"#)]
struct GardenSpec {
    #[schemars(length(max = 4))]
    beds: Vec<String>,
    #[serde(default)]
    soil: Soil,
    water: Option<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
enum Soil {
    #[default]
    Loam,
    Sand,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct GardenStatus {
    beds: usize,
    observed_generation: i64,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error(transparent)]
    Finalizer(#[from] Box<finalizer::Error<Error>>),
}

struct Gardener {
    client: Client,
    recorder: Recorder,
    failures: Arc<Mutex<Vec<String>>>,
}

impl Gardener {
    fn children(&self, garden: &Garden) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &garden.namespace().unwrap())
    }

    async fn reconcile(garden: Arc<Garden>, this: Arc<Gardener>) -> Result<Action, Error> {
        let gardens: Api<Garden> = Api::namespaced(this.client.clone(), &garden.namespace().unwrap());
        let done = finalizer(&gardens, FINALIZER, garden, |event| async {
            match event {
                finalizer::Event::Apply(garden) => this.tend(&gardens, &garden).await,
                finalizer::Event::Cleanup(garden) => this.clear(&garden).await,
            }
        });
        done.await.map_err(|error| Error::Finalizer(Box::new(error)))
    }

    async fn tend(&self, gardens: &Api<Garden>, garden: &Garden) -> Result<Action, Error> {
        let (name, children) = (garden.name_any(), self.children(garden));
        let owner = garden.controller_owner_ref(&()).unwrap();
        let ours = PatchParams::apply(MANAGER).force();
        for bed in &garden.spec.beds {
            let child = json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": format!("{name}-{bed}"), "labels": {"garden": name}, "ownerReferences": [owner]},
                "data": {"bed": bed, "soil": garden.spec.soil},
            });
            children.patch(&format!("{name}-{bed}"), &ours, &Patch::Apply(child)).await?;
        }
        for child in children.list(&of(&name)).await? {
            let bed = child.name_any();
            if !garden.spec.beds.iter().any(|wanted| bed == format!("{name}-{wanted}")) {
                children.delete(&bed, &DeleteParams::default()).await?;
            }
        }
        let observed_generation = garden.metadata.generation.unwrap();
        let status = GardenStatus { beds: garden.spec.beds.len(), observed_generation };
        if garden.status.as_ref() != Some(&status) {
            self.say(garden, "Tended", &format!("{} beds", status.beds)).await?;
            gardens.patch_status(&name, &PatchParams::default(), &Patch::Merge(json!({"status": status}))).await?;
        }
        Ok(Action::await_change())
    }

    /// The last that is done for a garden: it leaves a trace that no owner takes along.
    async fn clear(&self, garden: &Garden) -> Result<Action, Error> {
        let trace = json!({"apiVersion": "v1", "kind": "ConfigMap"});
        let name = format!("{}-cleared", garden.name_any());
        self.children(garden).patch(&name, &PatchParams::apply(MANAGER), &Patch::Apply(trace)).await?;
        self.say(garden, "Cleared", "the garden goes").await?;
        Ok(Action::await_change())
    }

    async fn say(&self, garden: &Garden, reason: &str, note: &str) -> Result<(), kube::Error> {
        let (reason, note) = (reason.to_owned(), Some(note.to_owned()));
        let event = events::Event { type_: EventType::Normal, action: reason.clone(), reason, note, secondary: None };
        self.recorder.publish(&event, &garden.object_ref(&())).await
    }
}

/// Starts the operator. What its reconciler could not do is written down in `failures`.
fn operator(client: &Client, failures: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let recorder = Recorder::new(client.clone(), Reporter { controller: MANAGER.into(), instance: None });
    let context = Gardener { client: client.clone(), recorder, failures: failures.clone() };
    let all = watcher::Config::default();
    let controller = Controller::new(Api::<Garden>::all(client.clone()), all.clone())
        .owns(Api::<ConfigMap>::all(client.clone()), all)
        .run(
            Gardener::reconcile,
            |_, error: &Error, this: Arc<Gardener>| {
                this.failures.lock().unwrap().push(format!("{error:?}"));
                Action::requeue(Duration::from_millis(200))
            },
            Arc::new(context),
        );
    tokio::spawn(controller.for_each(|_| std::future::ready(())))
}

fn of(garden: &str) -> ListParams {
    ListParams::default().labels(&format!("garden={garden}"))
}

async fn names(children: &Api<ConfigMap>) -> Vec<String> {
    children.list(&of("g")).await.unwrap().iter().map(ResourceExt::name_any).collect()
}

/// Waits, by a watch, until an object is like that.
async fn meets<K>(api: &Api<K>, name: &str, what: &str, condition: impl Condition<K>) -> Option<K>
where
    K: Resource + Clone + std::fmt::Debug + Send + DeserializeOwned + 'static,
{
    match tokio::time::timeout(LIMIT, await_condition(api.clone(), name, condition)).await {
        Ok(met) => met.unwrap(),
        Err(_) => panic!("{name}: not within {LIMIT:?}: {what}; it is {:?}", api.get_opt(name).await),
    }
}

async fn tended(gardens: &Api<Garden>, status: GardenStatus) {
    let what = format!("{status:?}");
    meets(gardens, "g", &what, |garden: Option<&Garden>| garden.and_then(|g| g.status.as_ref()) == Some(&status)).await;
}

/// The client of a kubeconfig, with kube-rs' own TLS.
async fn client(server: &Server) -> Client {
    let kubeconfig = Kubeconfig::read_from(&server.kubectl.kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_made_with_kube_rs() {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    server.kubectl.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    let client = client(&server).await;

    // Its definition, as kube-rs derives it; applied again it changes nothing.
    let crds = Api::<CustomResourceDefinition>::all(client.clone());
    let apply = async || {
        let definition = Patch::Apply(Garden::crd());
        crds.patch(Garden::crd_name(), &PatchParams::apply(MANAGER).force(), &definition).await.unwrap()
    };
    apply().await;
    let crd = meets(&crds, Garden::crd_name(), "established", conditions::is_crd_established()).await.unwrap();
    assert_eq!(apply().await.resource_version(), crd.resource_version());

    let failures = Arc::new(Mutex::new(Vec::new()));
    let running = operator(&client, &failures);
    let gardens = Api::<Garden>::default_namespaced(client.clone());
    let children = Api::<ConfigMap>::default_namespaced(client.clone());

    // The schema says what a garden is.
    let garden = |beds: &[&str]| {
        let beds = beds.iter().map(ToString::to_string).collect();
        Garden::new("g", GardenSpec { beds, soil: Soil::Sand, water: None })
    };
    let refused = gardens.create(&PostParams::default(), &garden(&["a", "b", "c", "d", "e"])).await.unwrap_err();
    assert!(matches!(&refused, kube::Error::Api(status) if status.code == 422), "{refused:?}");

    // Children are made, and the status follows.
    let made = gardens.create(&PostParams::default(), &garden(&["a", "b"])).await.unwrap();
    tended(&gardens, GardenStatus { beds: 2, observed_generation: 1 }).await;
    assert_eq!(names(&children).await, ["g-a", "g-b"]);
    assert_eq!(gardens.get("g").await.unwrap().finalizers(), [FINALIZER]);
    let child = children.get("g-a").await.unwrap();
    assert_eq!(child.owner_references(), [made.controller_owner_ref(&()).unwrap()]);
    assert_eq!(child.data.as_ref().unwrap()["soil"], "Sand");

    // A child that somebody takes away comes back.
    children.delete("g-a", &DeleteParams::default()).await.unwrap();
    meets(&children, "g-a", "made anew", |found: Option<&ConfigMap>| found.is_some_and(|c| c.uid() != child.uid()))
        .await;

    // What somebody changes in one is put right, and what they add stays.
    let weeds = Patch::Merge(json!({"data": {"soil": "rubble", "by": "hand"}}));
    let changed = children.patch("g-b", &PatchParams::default(), &weeds).await.unwrap();
    assert_eq!(changed.data.unwrap()["soil"], "rubble");
    let right = |found: Option<&ConfigMap>| found.is_some_and(|c| c.data.as_ref().unwrap()["soil"] == "Sand");
    let mended = meets(&children, "g-b", "put right", right).await.unwrap();
    assert_eq!(mended.data.unwrap()["by"], "hand");

    // Another spec: one child goes, two come.
    let spec = Patch::Merge(json!({"spec": {"beds": ["b", "c", "d"]}}));
    gardens.patch("g", &PatchParams::default(), &spec).await.unwrap();
    tended(&gardens, GardenStatus { beds: 3, observed_generation: 2 }).await;
    assert_eq!(names(&children).await, ["g-b", "g-c", "g-d"]);

    // What it says of what it does: one Event, which counts.
    let said = Api::<Event>::default_namespaced(client.clone());
    let about = async |reason: &str| -> Vec<Event> {
        let all = said.list(&ListParams::default()).await.unwrap();
        all.into_iter().filter(|event| event.reason.as_deref() == Some(reason)).collect()
    };
    let tellings = about("Tended").await;
    assert_eq!(tellings.len(), 1, "{tellings:?}");
    assert_eq!(tellings[0].regarding.as_ref().unwrap().uid, made.uid());
    assert!(tellings[0].series.as_ref().is_some_and(|series| series.count >= 2), "{tellings:?}");

    // While the operator does not run, a garden that is deleted waits for it.
    running.abort();
    let _ = running.await;
    let left = gardens.delete("g", &DeleteParams::default()).await.unwrap().left().expect("it is still there");
    assert!(left.metadata.deletion_timestamp.is_some());
    assert_eq!(names(&children).await.len(), 3);
    assert!(children.get_opt("g-cleared").await.unwrap().is_none());

    // Its finalizer runs before the garden goes, and the children go with it.
    let running = operator(&client, &failures);
    meets(&gardens, "g", "gone", conditions::is_deleted(&made.uid().unwrap())).await;
    assert!(children.get_opt("g-cleared").await.unwrap().is_some());
    assert_eq!(about("Cleared").await.len(), 1);
    within(LIMIT, "no children", async || names(&children).await.is_empty().then_some(())).await;
    assert!(!running.is_finished(), "the operator still runs");
    running.abort();
    // A reconciler may run once more for what it has not yet seen going; nothing else went wrong.
    let failures = failures.lock().unwrap();
    assert!(failures.iter().all(|failure| failure.contains("code: 404")), "{failures:#?}");
}
