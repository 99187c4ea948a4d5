"""An operator written with kopf: a Vault keeps a ConfigMap for each of its keys, and says in its status how many."""

import kopf
from kubernetes import client, config

GROUP = ("example.org", "v1", "vaults")


@kopf.on.startup()
def begin(settings, **_):
    config.load_kube_config()
    settings.posting.enabled = True
    settings.persistence.finalizer = "example.org/vault"
    settings.watching.server_timeout = 20


@kopf.on.create(*GROUP)
@kopf.on.update(*GROUP, field="spec.keys")
def keep(body, name, namespace, spec, patch, **_):
    core, wanted = client.CoreV1Api(), set(spec.get("keys", []))
    kept = core.list_namespaced_config_map(namespace, label_selector=f"vault={name}").items
    for config_map in kept:
        if config_map.metadata.name.removeprefix(f"{name}-") not in wanted:
            core.delete_namespaced_config_map(config_map.metadata.name, namespace)
    have = {config_map.metadata.name for config_map in kept}
    for key in sorted(wanted):
        if f"{name}-{key}" not in have:
            child = {"metadata": {"name": f"{name}-{key}", "labels": {"vault": name}}, "data": {"key": key}}
            kopf.adopt(child)
            core.create_namespaced_config_map(namespace, child)
    patch.status["count"] = len(wanted)
    kopf.event(body, type="Normal", reason="Kept", message=f"{len(wanted)} keys")


@kopf.on.delete(*GROUP)
def empty(name, namespace, **_):
    client.CoreV1Api().create_namespaced_config_map(namespace, {"metadata": {"name": f"{name}-emptied"}})
