// grpc-js. usage: client.js TARGET PROTO_FOLDER, where TARGET is `unix:/path` or `unix:///path`.
'use strict';

const assert = require('node:assert');
const { once } = require('node:events');
const path = require('node:path');
const { promisify } = require('node:util');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const SERVICE = 'csrd.v1.CertificateService';
const DEADLINE_MS = 60_000;

const [target, protos] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const request = (name) => ({ request: { dns_names: [name] } });
const deadline = () => ({ deadline: Date.now() + DEADLINE_MS });
const passed = (check, seen) => console.log(`ok ${check}: ${seen}`);

// The protos of the standard services, as the npm packages of their servers ship them.
const shipped = (name, ...below) => path.join(path.dirname(require.resolve(`${name}/package.json`)), ...below);

function load(file, folder) {
  return grpc.loadPackageDefinition(loader.loadSync(file, { includeDirs: [folder], keepCase: true, enums: String }));
}

async function health() {
  const { grpc: { health: { v1 } } } = load('health.proto', shipped('grpc-health-check', 'proto', 'health', 'v1'));
  const client = new v1.Health(target, credentials);
  const { status } = await promisify(client.check.bind(client))({}, deadline());
  assert.strictEqual(status, 'SERVING');
  client.close();
  return status;
}

async function reflection() {
  const folder = shipped('@grpc/reflection', 'build', 'proto', 'grpc', 'reflection', 'v1');
  const { grpc: { reflection: { v1 } } } = load('reflection.proto', folder);
  const client = new v1.ServerReflection(target, credentials);
  const stream = client.serverReflectionInfo(deadline());
  stream.write({ list_services: '' });
  const [{ list_services_response: { service: services } }] = await once(stream, 'data');
  stream.end();
  stream.resume();
  await once(stream, 'end');
  assert(services.some(({ name }) => name === SERVICE), services);
  client.close();
  return `${services.length} services`;
}

async function issue(client) {
  const events = await client.issueCertificate(request('client.test'), deadline()).toArray();
  const { certificate } = events.at(-1);
  assert.match(certificate.certificate_chain.toString(), /^-----BEGIN CERTIFICATE-----/);
  assert.match(certificate.private_key.toString(), /^-----BEGIN PRIVATE KEY-----/);
  const stages = events.slice(0, -1).map(({ stage }) => stage.kind);
  assert(stages.includes('STAGE_KIND_ATTESTED'), stages);
  return `${stages.length} stages, then serial ${certificate.serial_number}`;
}

async function refused(client) {
  const asked = client.issueCertificate(request('somebody-else.test'), deadline()).toArray();
  const error = await asked.then(() => assert.fail('a name that no policy allows was granted'), (it) => it);
  assert.strictEqual(error.code, grpc.status.PERMISSION_DENIED, error);
  return error.details;
}

async function subscribe(client) {
  const stream = client.subscribe(request('client.test'), deadline());
  let first;
  for await (const event of stream) {
    if (!first) {
      assert(event.current, event);
      first = event;
      passed('subscribe', `current is ${first.sequence}, serial ${first.current.certificate.serial_number}`);
    } else if (event.renewed) {
      assert(BigInt(event.sequence) > BigInt(first.sequence), event);
      assert.notStrictEqual(event.renewed.certificate.serial_number, first.current.certificate.serial_number);
      stream.cancel();
      return `${event.sequence}, serial ${event.renewed.certificate.serial_number}`;
    }
  }
  return assert.fail('the stream ended with OK');
}

async function main() {
  passed('health', await health());
  passed('reflection', await reflection());
  const { csrd: { v1 } } = load('csrd/v1/certificate.proto', protos);
  const client = new v1.CertificateService(target, credentials);
  const { facts } = await promisify(client.whoAmI.bind(client))({}, deadline());
  passed('whoami', facts['unix.uid']);
  passed('issue', await issue(client));
  passed('refused', await refused(client));
  passed('renewed', await subscribe(client));
  client.close();
}

main();
