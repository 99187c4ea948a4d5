"""What users of the Python client do, against the cluster that KUBECONFIG leads to. Says `ok` at the end."""

import threading

from kubernetes import client, config, dynamic, utils, watch
from kubernetes.client.exceptions import ApiException

config.load_kube_config()
core, apps = client.CoreV1Api(), client.AppsV1Api()
NS = "python"


def fails(code, reason, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ApiException as error:
        assert error.status == code, error
        assert f'"reason":"{reason}"' in error.body.replace(" ", ""), error.body
        return
    raise AssertionError(f"{call} should have failed with {code}")


core.create_namespace({"metadata": {"name": NS}})

# Objects with a life of their own; what was read in between may not be written over.
made = core.create_namespaced_config_map(NS, client.V1ConfigMap(metadata={"name": "a"}, data={"k": "1"}))
assert made.metadata.uid and made.metadata.creation_timestamp.tzinfo
fails(409, "AlreadyExists", core.create_namespaced_config_map, NS, {"metadata": {"name": "a"}})
old = core.read_namespaced_config_map("a", NS)
core.patch_namespaced_config_map("a", NS, {"data": {"k": "2"}})
old.data["k"] = "3"
fails(409, "Conflict", core.replace_namespaced_config_map, "a", NS, old)
assert core.read_namespaced_config_map("a", NS).data == {"k": "2"}
fails(404, "NotFound", core.read_namespaced_config_map, "nobody", NS)
fails(422, "Invalid", core.create_namespaced_config_map, NS, {"metadata": {"name": "No Name"}})
dry = core.create_namespaced_config_map(NS, {"metadata": {"name": "dry"}}, dry_run="All")
assert dry.metadata.uid
fails(404, "NotFound", core.read_namespaced_config_map, "dry", NS)

# Pages hold what was there when the first was made.
for number in range(7):
    core.create_namespaced_secret(NS, {"metadata": {"name": f"s{number}", "labels": {"odd": str(number % 2)}}})
page = core.list_namespaced_secret(NS, limit=3)
names = [item.metadata.name for item in page.items]
core.delete_namespaced_secret("s6", NS)
while page.metadata._continue:
    page = core.list_namespaced_secret(NS, limit=3, _continue=page.metadata._continue)
    names += [item.metadata.name for item in page.items]
assert names == [f"s{number}" for number in range(7)], names
odd = core.list_namespaced_secret(NS, label_selector="odd=1,odd notin (3)")
assert [item.metadata.name for item in odd.items] == ["s1", "s3", "s5"]
one = core.list_secret_for_all_namespaces(field_selector=f"metadata.namespace={NS},metadata.name=s2")
assert [item.metadata.name for item in one.items] == ["s2"]

# A watch that begins where a list was made, is broken off, and goes on where it was.
listed = core.list_namespaced_config_map(NS)


def change():
    core.create_namespaced_config_map(NS, {"metadata": {"name": "b"}})
    core.patch_namespaced_config_map("b", NS, {"metadata": {"labels": {"l": "x"}}})
    core.delete_namespaced_config_map("b", NS)


def follow(version, count):
    seen, events = [], watch.Watch()
    for event in events.stream(core.list_namespaced_config_map, NS, resource_version=version, timeout_seconds=30):
        seen.append((event["type"], event["object"].metadata.name, event["object"].metadata.resource_version))
        if len(seen) == count:
            events.stop()
    return seen


changer = threading.Thread(target=change)
changer.start()
first = follow(listed.metadata.resource_version, 2)
changer.join()
assert [(kind, name) for kind, name, _ in first] == [("ADDED", "b"), ("MODIFIED", "b")], first
rest = follow(first[0][2], 2)
assert [kind for kind, _, _ in rest] == ["MODIFIED", "DELETED"], rest

# Workloads, by the helper that reads files, and by every kind of patch.
deployment = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "namespace": NS},
    "spec": {
        "replicas": 0,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": "web:1"}, {"name": "side", "image": "side:1"}]},
        },
    },
}
utils.create_from_dict(client.ApiClient(), deployment)
apps.patch_namespaced_deployment("web", NS, {"spec": {"template": {"spec": {"containers": [{"name": "web", "image": "web:2"}]}}}})
images = [c.image for c in apps.read_namespaced_deployment("web", NS).spec.template.spec.containers]
assert images == ["web:2", "side:1"], images
apps.patch_namespaced_deployment("web", NS, [{"op": "remove", "path": "/spec/template/spec/containers/1"}])
assert len(apps.read_namespaced_deployment("web", NS).spec.template.spec.containers) == 1
apps.patch_namespaced_deployment_scale("web", NS, {"spec": {"replicas": 0}})
assert apps.read_namespaced_deployment_scale("web", NS).status.selector == "app=web"
review = client.AuthorizationV1Api().create_self_subject_access_review(
    {"spec": {"resourceAttributes": {"verb": "delete", "resource": "nodes"}}}
)
assert review.status.allowed

# Kinds of others: the dynamic client finds them by discovery, and applies.
crds = client.ApiextensionsV1Api()
crds.create_custom_resource_definition(
    {
        "metadata": {"name": "boats.example.org"},
        "spec": {
            "group": "example.org",
            "scope": "Namespaced",
            "names": {"plural": "boats", "singular": "boat", "kind": "Boat"},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "properties": {
                                "spec": {
                                    "type": "object",
                                    "properties": {"sails": {"type": "integer", "minimum": 0}, "name": {"type": "string", "default": "none"}},
                                },
                                "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                            },
                        }
                    },
                }
            ],
        },
    }
)
for event in watch.Watch().stream(crds.list_custom_resource_definition, timeout_seconds=30):
    conditions = (event["object"].status and event["object"].status.conditions) or []
    if event["object"].metadata.name == "boats.example.org" and any(c.type == "Established" and c.status == "True" for c in conditions):
        break
else:
    raise AssertionError("the definition was never established")
boats = dynamic.DynamicClient(client.ApiClient()).resources.get(api_version="example.org/v1", kind="Boat")
boat = {"apiVersion": "example.org/v1", "kind": "Boat", "metadata": {"name": "b", "namespace": NS}, "spec": {"sails": 2}}
applied = boats.server_side_apply(body=boat, name="b", namespace=NS, field_manager="python")
assert applied.spec.name == "none" and applied.metadata.managedFields[0].operation == "Apply"
boat["spec"]["sails"] = -1
fails(422, "Invalid", boats.server_side_apply, body=boat, name="b", namespace=NS, field_manager="python")
custom = client.CustomObjectsApi()
custom.patch_namespaced_custom_object_status("example.org", "v1", NS, "boats", "b", {"status": {"at": "sea"}})
assert custom.get_namespaced_custom_object("example.org", "v1", NS, "boats", "b")["status"] == {"at": "sea"}
crds.delete_custom_resource_definition("boats.example.org")

core.delete_namespace(NS)
print("ok")
