// What users of the JavaScript client do, against the cluster that KUBECONFIG leads to. Says `ok` at the end.

import assert from 'node:assert/strict';
import { setTimeout as pause } from 'node:timers/promises';
import * as k8s from '@kubernetes/client-node';

const config = new k8s.KubeConfig();
config.loadFromDefault();
const core = config.makeApiClient(k8s.CoreV1Api);
const apps = config.makeApiClient(k8s.AppsV1Api);
const crds = config.makeApiClient(k8s.ApiextensionsV1Api);
const custom = config.makeApiClient(k8s.CustomObjectsApi);
const objects = k8s.KubernetesObjectApi.makeApiClient(config);
const namespace = 'javascript';
const configMaps = `/api/v1/namespaces/${namespace}/configmaps`;

async function fails(code, reason, call) {
  const error = await call.then(
    () => assert.fail(`should have failed with ${code}`),
    (error) => error,
  );
  assert.equal(error.code, code, String(error));
  const status = typeof error.body === 'string' ? JSON.parse(error.body) : error.body;
  assert.equal(status.reason, reason);
}

// Waits until this holds; a wait has an end.
async function until(what, holds) {
  for (const end = Date.now() + 30_000; !(await holds()); await pause(20)) {
    assert.ok(Date.now() < end, `not within 30 s: ${what()}`);
  }
}

const as = (type) => k8s.setHeaderOptions('Content-Type', type);
const { JsonPatch, MergePatch, StrategicMergePatch, ServerSideApply } = k8s.PatchStrategy;

await core.createNamespace({ body: { metadata: { name: namespace } } });

// Objects with a life of their own; what was read in between may not be written over.
const make = (name, rest) => core.createNamespacedConfigMap({ namespace, body: { metadata: { name } }, ...rest });
const made = await core.createNamespacedConfigMap({ namespace, body: { metadata: { name: 'a' }, data: { k: '1' } } });
assert.ok(made.metadata.uid && made.metadata.creationTimestamp instanceof Date);
await fails(409, 'AlreadyExists', make('a'));
const old = await core.readNamespacedConfigMap({ name: 'a', namespace });
const replaced = await core.replaceNamespacedConfigMap({ name: 'a', namespace, body: { ...old, data: { k: '2' } } });
assert.deepEqual(replaced.data, { k: '2' });
await fails(409, 'Conflict', core.replaceNamespacedConfigMap({ name: 'a', namespace, body: old }));
await fails(404, 'NotFound', core.readNamespacedConfigMap({ name: 'nobody', namespace }));
await fails(422, 'Invalid', make('No Name'));
assert.ok((await make('dry', { dryRun: 'All' })).metadata.uid);
await fails(404, 'NotFound', core.readNamespacedConfigMap({ name: 'dry', namespace }));
const stale = { preconditions: { resourceVersion: old.metadata.resourceVersion } };
await fails(409, 'Conflict', core.deleteNamespacedConfigMap({ name: 'a', namespace, body: stale }));
await core.deleteNamespacedConfigMap({ name: 'a', namespace });
await fails(404, 'NotFound', core.readNamespacedConfigMap({ name: 'a', namespace }));

// Pages hold what was there when the first was made.
for (let number = 0; number < 7; number++) {
  const metadata = { name: `s${number}`, labels: { odd: String(number % 2) } };
  await core.createNamespacedSecret({ namespace, body: { metadata, stringData: { number: String(number) } } });
}
const names = (list) => list.items.map((item) => item.metadata.name);
let page = await core.listNamespacedSecret({ namespace, limit: 3 });
const seen = names(page);
await core.deleteNamespacedSecret({ name: 's6', namespace });
while (page.metadata._continue) {
  page = await core.listNamespacedSecret({ namespace, limit: 3, _continue: page.metadata._continue });
  seen.push(...names(page));
}
assert.deepEqual(seen, ['s0', 's1', 's2', 's3', 's4', 's5', 's6']);
const odd = await core.listNamespacedSecret({ namespace, labelSelector: 'odd=1,odd notin (3)' });
assert.deepEqual(names(odd), ['s1', 's3', 's5']);
assert.equal(atob(odd.items[0].data.number), '1');
const fieldSelector = `metadata.namespace=${namespace},metadata.name=s2`;
assert.deepEqual(names(await core.listSecretForAllNamespaces({ fieldSelector })), ['s2']);

// A watch that begins where a list was made, is broken off, and goes on where it was.
const listed = await core.listNamespacedConfigMap({ namespace });
const change = async () => {
  await make('b');
  const body = { metadata: { labels: { l: 'x' } } };
  await core.patchNamespacedConfigMap({ name: 'b', namespace, body }, as(MergePatch));
  await core.deleteNamespacedConfigMap({ name: 'b', namespace });
};
async function follow(resourceVersion, count) {
  const events = [];
  const each = (type, object) => events.push([type, object.metadata]);
  let ended = false;
  const connection = await new k8s.Watch(config).watch(configMaps, { resourceVersion }, each, () => (ended = true));
  await until(() => `${count} events: ${JSON.stringify(events)}`, () => events.length >= count || ended);
  connection.abort();
  return events.slice(0, count);
}
const [first] = await Promise.all([follow(listed.metadata.resourceVersion, 2), change()]);
assert.deepEqual(first.map(([type, { name }]) => [type, name]), [['ADDED', 'b'], ['MODIFIED', 'b']]);
const rest = await follow(first[0][1].resourceVersion, 2);
assert.deepEqual(rest.map(([type]) => type), ['MODIFIED', 'DELETED']);

// An informer holds what is there, tells what changes, and goes on after its watch has ended.
const listKept = () => core.listNamespacedConfigMap({ namespace, labelSelector: 'kept' });
const informer = k8s.makeInformer(config, configMaps, listKept, 'kept');
const told = [];
for (const verb of ['add', 'update', 'delete']) {
  informer.on(verb, (object) => told.push(`${verb} ${object.metadata.name}`));
}
const broken = [];
// Its own `stop` is told as an error, too.
informer.on('error', (error) => error.type === 'aborted' || broken.push(error));
async function tells(...wanted) {
  await until(() => `${wanted}, but ${told}`, () => told.length >= wanted.length);
  assert.deepEqual(told.splice(0), wanted);
}
const label = (name, labels) =>
  core.patchNamespacedConfigMap({ name, namespace, body: { metadata: { labels } } }, as(MergePatch));
await make('one');
await label('one', { kept: 'yes' });
await informer.start();
await tells('add one');
await make('two');
await label('two', { kept: 'yes' });
await tells('add two');
await label('one', { kept: 'well' });
await tells('update one');
// What the selector no longer chooses is gone for whoever asked by it.
await label('two', { kept: null });
await tells('delete two');
await informer.stop();
await label('two', { kept: 'again' });
await core.deleteNamespacedConfigMap({ name: 'one', namespace });
await informer.start();
await until(() => `add two and delete one, but ${told}`, () => told.length >= 2);
assert.deepEqual(told.splice(0).sort(), ['add two', 'delete one']);
assert.deepEqual(informer.list(namespace).map((object) => object.metadata.name), ['two']);
await informer.stop();
assert.deepEqual(broken, []);

// Every kind of patch.
const container = (name, tag) => ({ name, image: `${name}:${tag}` });
const deployment = {
  apiVersion: 'apps/v1',
  kind: 'Deployment',
  metadata: { name: 'web', namespace },
  spec: {
    replicas: 0,
    selector: { matchLabels: { app: 'web' } },
    template: {
      metadata: { labels: { app: 'web' } },
      spec: { containers: [container('web', 1), container('side', 1)] },
    },
  },
};
await apps.createNamespacedDeployment({ namespace, body: deployment });
const web = { name: 'web', namespace };
const containers = (list) => ({ spec: { template: { spec: { containers: list } } } });
const images = (object) => object.spec.template.spec.containers.map(({ image }) => image);
async function patch(type, body, rest) {
  return images(await apps.patchNamespacedDeployment({ ...web, ...rest, body }, as(type)));
}
assert.deepEqual(await patch(StrategicMergePatch, containers([container('side', 2)])), ['web:1', 'side:2']);
assert.deepEqual(await patch(MergePatch, containers([container('web', 2)])), ['web:2']);
const add = { op: 'add', path: '/spec/template/spec/containers/-', value: container('side', 3) };
assert.deepEqual(await patch(JsonPatch, [add]), ['web:2', 'side:3']);
await fails(422, 'Invalid', patch(JsonPatch, [{ op: 'test', path: '/spec/replicas', value: 5 }, add]));
const applied = { apiVersion: 'apps/v1', kind: 'Deployment', ...containers([container('web', 3)]) };
await fails(409, 'Conflict', patch(ServerSideApply, applied, { fieldManager: 'javascript' }));
const forced = { fieldManager: 'javascript', force: true };
assert.deepEqual(await patch(ServerSideApply, applied, forced), ['web:3', 'side:3']);
const scale = await apps.patchNamespacedDeploymentScale({ ...web, body: { spec: { replicas: 0 } } }, as(MergePatch));
assert.equal(scale.status.selector, 'app=web');

// A kind of others.
const group = 'example.org';
const version = 'v1';
const plural = 'kites';
const schema = {
  type: 'object',
  properties: {
    spec: {
      type: 'object',
      properties: { tails: { type: 'integer', minimum: 0 }, name: { type: 'string', _default: 'none' } },
    },
    status: { type: 'object', x_kubernetes_preserve_unknown_fields: true },
  },
};
const definition = {
  metadata: { name: `${plural}.${group}` },
  spec: {
    group,
    scope: 'Namespaced',
    names: { plural, singular: 'kite', kind: 'Kite' },
    versions: [{ name: version, served: true, storage: true, subresources: { status: {} }, schema: { openAPIV3Schema: schema } }],
  },
};
await crds.createCustomResourceDefinition({ body: definition });
await until(() => 'established', async () => {
  const { status } = await crds.readCustomResourceDefinition({ name: `${plural}.${group}` });
  return status?.conditions?.some(({ type, status }) => type === 'Established' && status === 'True');
});
const kites = { group, version, namespace, plural };
const kite = (tails) => ({ apiVersion: `${group}/${version}`, kind: 'Kite', metadata: { name: 'k' }, spec: { tails } });
const flown = await custom.createNamespacedCustomObject({ ...kites, body: kite(1) });
assert.deepEqual(flown.spec, { name: 'none', tails: 1 });
await fails(422, 'Invalid', custom.createNamespacedCustomObject({ ...kites, body: kite(-1) }));
const k = { ...kites, name: 'k' };
const longer = await custom.patchNamespacedCustomObject({ ...k, body: kite(2), ...forced }, as(ServerSideApply));
assert.equal(longer.spec.tails, 2);
assert.ok(longer.metadata.managedFields.some(({ manager, operation }) => manager === 'javascript' && operation === 'Apply'));
await custom.patchNamespacedCustomObjectStatus({ ...k, body: { status: { at: 'sky' } } }, as(MergePatch));
const up = await custom.getNamespacedCustomObject(k);
assert.deepEqual([up.status, up.metadata.generation], [{ at: 'sky' }, 2]);
assert.equal((await custom.listNamespacedCustomObject(kites)).items.length, 1);

// Objects of any kind, found by discovery.
const any = kite(3);
any.metadata = { name: 'any', namespace };
assert.equal((await objects.create(any)).spec.tails, 3);
assert.equal((await objects.read(any)).spec.name, 'none');
const merged = await objects.patch({ ...any, spec: { name: 'red' } }, undefined, undefined, undefined, undefined, MergePatch);
assert.deepEqual(merged.spec, { name: 'red', tails: 3 });
const reapplied = await objects.patch({ ...any, spec: { tails: 4 } }, undefined, undefined, 'javascript', true, ServerSideApply);
assert.deepEqual(reapplied.spec, { name: 'red', tails: 4 });
await objects.replace({ ...reapplied, spec: { tails: 5 } });
assert.deepEqual(names(await objects.list(any.apiVersion, any.kind, namespace)), ['any', 'k']);
await objects.delete(any);
await fails(404, 'NotFound', objects.read(any));

await crds.deleteCustomResourceDefinition({ name: `${plural}.${group}` });
await core.deleteNamespace({ name: namespace });
console.log('ok');
