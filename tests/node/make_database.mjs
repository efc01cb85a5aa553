// Fills a database through the real @elizaos/plugin-sql, as an ElizaOS application would, with what its users have: two
// agents, rows that are there twice, vectors of two widths, zero and lost vectors, ids that point at nothing.
//
// Run in a folder that has the package in node_modules:
//   node make_database.mjs URL-OR-FOLDER [MEMORIES]
// Prints what it made as one line of JSON.
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { randomUUID } from 'node:crypto';

const require = createRequire(path.join(process.cwd(), 'x.js'));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { createDatabaseAdapter, plugin, default: fallback } = await load('@elizaos/plugin-sql');

const [where, wanted = '40'] = process.argv.slice(2);
const target = where.includes('://') ? { postgresUrl: where } : { dataDir: where };

// Numbers that are the same in every run.
let state = 7;
const random = () => {
  state = (state * 1103515245 + 12345) % 2147483648;
  return state / 2147483648 - 0.5;
};
const vector = (width) => Array.from({ length: width }, random);

async function open(agentId, name) {
  const adapter = createDatabaseAdapter(target, agentId);
  await adapter.init();
  await adapter.runPluginMigrations([{ name: '@elizaos/plugin-sql', schema: (plugin ?? fallback).schema }]);
  await adapter.createAgent({ id: agentId, name, bio: ['One', 'two'], settings: { secrets: { KEY: 'value' } } });
  return adapter;
}

const ada = '00000000-0000-4000-8000-0000000000a1';
const bob = '00000000-0000-4000-8000-0000000000b1';
const one = await open(ada, 'Ada');
const two = await open(bob, 'Bob');

const world = randomUUID();
const gone = randomUUID();
const room = randomUUID();
const lost = randomUUID();
const server = '00000000-0000-0000-0000-000000000000';
await one.createWorld({ id: world, name: 'World', agentId: ada, metadata: { owner: 'x' } });
await one.createWorld({ id: gone, name: 'Gone', agentId: ada });
await one.createRooms([
  { id: room, name: 'Room', source: 'discord', type: 'GROUP', worldId: world, messageServerId: server, channelId: 'c1' },
  { id: lost, source: 'discord', type: 'DM', worldId: gone },
]);
await one.removeWorld(gone);
const people = [randomUUID(), randomUUID(), randomUUID()];
await one.createEntities([
  { id: ada, names: ['Ada'], agentId: ada },
  ...people.map((id, n) => ({ id, names: [`Person ${n}`, `P${n}`], agentId: ada, metadata: { n, deep: { 'ключ': ['é', null, 1e21] } } })),
]);
for (const id of [...people, people[0], people[0]]) await one.addParticipant(id, room);
await one.setParticipantUserState(room, people[1], 'FOLLOWED');
await one.setParticipantUserState(room, people[2], 'BANANA');
for (const n of [1, 2])
  await one.createComponent({ id: randomUUID(), entityId: people[0], agentId: ada, roomId: room, worldId: world, sourceEntityId: people[1], type: 'profile', data: { n } });
await one.createRelationship({ sourceEntityId: people[0], targetEntityId: people[1], tags: ['friend'], metadata: { since: 2020 } });

// The second agent talks in the first one's room and of the first one's people, as agents of one server do.
const own = randomUUID();
await two.createRooms([{ id: own, name: 'Own', source: 'telegram', type: 'DM' }]);
await two.createEntities([{ id: bob, names: ['Bob'], agentId: bob }, { id: people[0], names: ['again'], agentId: bob }]);
await two.addParticipant(people[0], own);
await two.addParticipant(bob, own);

const memories = { ada: 0, bob: 0 };
const remember = async (adapter, who, memory, table, count = true) => {
  await adapter.createMemory(memory, table, true);
  if (count) memories[who] += 1;
};
await one.ensureEmbeddingDimension(384);
for (let n = 0; n < Number(wanted); n++)
  await remember(one, 'ada', {
    id: randomUUID(), entityId: people[n % 3], roomId: room, worldId: world, agentId: ada, unique: n % 5 !== 0,
    content: { text: `message ${n}`, n, big: 2 ** 53 }, createdAt: Date.UTC(2024, 0, 1) + n * 1001, embedding: vector(384),
    metadata: { type: 'message', source: 'test' },
  }, n % 4 ? 'messages' : 'facts');
const documentId = randomUUID();
await remember(one, 'ada', { id: documentId, entityId: ada, roomId: room, agentId: ada, content: { text: 'doc' }, metadata: { type: 'document', timestamp: 5 } }, 'documents');
await remember(one, 'ada', { id: randomUUID(), entityId: ada, roomId: room, agentId: ada, content: { text: 'part' }, metadata: { type: 'fragment', documentId, position: 0 }, embedding: vector(384), unique: true }, 'documents');
const zero = randomUUID();
await remember(one, 'ada', { id: zero, entityId: people[0], roomId: room, agentId: ada, worldId: gone, content: { text: 'zero' }, embedding: Array(384).fill(0), unique: true }, 'messages');
const twice = randomUUID();
await remember(one, 'ada', { id: twice, entityId: people[0], roomId: room, agentId: ada, content: { text: 'twice' }, unique: true }, 'messages');
await Promise.all([1, 2, 3].map(() => one.updateMemory({ id: twice, embedding: vector(384) })));

// A width that no column is for: the vector is lost, an empty row stays.
await two.ensureEmbeddingDimension(1000);
const empty = randomUUID();
await remember(two, 'bob', { id: empty, entityId: bob, roomId: own, agentId: bob, content: { text: 'lost' }, embedding: vector(1000), unique: true }, 'messages');
// A model that was changed: one old vector, then the new ones.
await two.ensureEmbeddingDimension(384);
const old = randomUUID();
await remember(two, 'bob', { id: old, entityId: bob, roomId: own, agentId: bob, content: { text: 'old' }, embedding: vector(384), unique: true }, 'messages');
await two.ensureEmbeddingDimension(768);
const newest = [];
for (let n = 0; n < 4; n++) {
  newest.push(randomUUID());
  await remember(two, 'bob', { id: newest[n], entityId: n % 2 ? bob : people[0], roomId: n === 3 ? room : own, agentId: bob, content: { text: `new ${n}` }, embedding: vector(768), unique: true }, 'messages');
}

await one.log({ body: { runId: 'r1', status: 'started' }, entityId: people[0], roomId: room, type: 'run_event' });
await two.log({ body: { text: 'hi' }, entityId: bob, roomId: own, type: 'action' });
await one.setCache('key', { a: [1, 'two'] });
await two.setCache('key', false);
const task = await one.createTask({ name: 'TASK', description: 'd', roomId: room, worldId: gone, tags: ['queue', 'repeat'], metadata: { updateInterval: 5 } });

await one.createMessageServer({ id: server, name: 'Server', sourceType: 'discord', sourceId: 's', metadata: { m: 1 } });
await one.addAgentToMessageServer(server, ada);
await one.addAgentToMessageServer(server, bob);
const channel = randomUUID();
await one.createChannel({ id: channel, messageServerId: server, name: 'general', type: 'GROUP', topic: 't' }, [people[0], people[1]]);
await Promise.all([1, 2, 3].map(() => one.findOrCreateDmChannel(people[0], people[1], server)));
const first = randomUUID();
await one.createMessage({ messageId: first, channelId: channel, authorId: people[0], content: 'hello', rawMessage: { r: [1] }, metadata: {} });
await one.createMessage({ messageId: randomUUID(), channelId: channel, authorId: people[1], content: 'answer', inReplyToRootMessageId: first });

console.log(JSON.stringify({ ada, bob, world, gone, room, lost, own, people, zero, twice, empty, old, newest, task, server, channel, first, memories }));
await one.close();
process.exit(0);
