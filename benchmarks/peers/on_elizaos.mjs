// The original under Node: @elizaos/plugin-sql, on PostgreSQL or, with the option "pglite", on PGlite.
// The same protocol as worker.py: a JSON object a line in, a JSON object a line out.
import { openSync, readFileSync, readSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [, , modules, option] = process.argv;
const write = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr); // what the libraries print is not an answer

const COUNT = 10;
const TABLE = "messages";
const FILLER =
  "what was said here is of no account, only that it is about as long as what people say to each other. ".repeat(2);
const hex = (number, width) => number.toString(16).padStart(width, "0");
const dashed = (text) => text.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
const rowId = (row) => dashed(hex(row, 12) + "70008000" + hex(row, 12));
const rowOf = (id) => parseInt(id.slice(-12), 16);
const agentId = (number) => dashed(hex(number + 1, 8) + "a9e0400080000000" + hex(number + 1, 8));
const roomId = (number, room) =>
  dashed(hex(number + 1, 8) + (room ? "a9e0400080000003" : "a9e0400080000001") + hex(number + 1, 8));
const entityId = (number) => dashed(hex(number + 1, 8) + "a9e0400080000002" + hex(number + 1, 8));
const seconds = () => performance.now() / 1000;

let width, vectors, queries, agents, rooms, adapters, place, plugin;

// Out of a file, and not all at once: the memory of this process then is what the original takes.
function slice(file, row) {
  const numbers = new Float32Array(width);
  readSync(file, numbers, 0, numbers.byteLength, row * numbers.byteLength);
  return Array.from(numbers);
}

// As it stores them: rounded to six decimals.
const stored = (row) => `[${slice(vectors, row).map((x) => x.toFixed(6)).join(",")}]`;
const text = (row) => `Memory ${row}: ${FILLER.slice(row % 50, 90 + (row % 70))}`;

function numbers(path, kind) {
  const bytes = readFileSync(path);
  return new kind(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

async function connect() {
  const url = place.host.startsWith("/")
    ? `postgresql://${place.user}@localhost:${place.port}/${place.database}?host=${encodeURIComponent(place.host)}`
    : `postgresql://${place.user}:${encodeURIComponent(place.password)}@${place.host}:${place.port}/${place.database}`;
  const config = option === "pglite" ? { dataDir: place.folder } : { postgresUrl: url };
  const count = agents.reduce((most, agent) => Math.max(most, agent), 0) + 1;
  adapters = [];
  for (let number = 0; number < count; number++) {
    const adapter = plugin.createDatabaseAdapter(config, agentId(number));
    if (number === 0) {
      await adapter.init();
      await adapter.runPluginMigrations([{ name: plugin.plugin.name, schema: plugin.plugin.schema }]);
    }
    await adapter.ensureAgentExists({ name: `Agent ${number}` });
    await adapter.ensureEmbeddingDimension(width);
    const both = [roomId(number, 0), roomId(number, 1)];
    if ((await adapter.getRoomsByIds(both))?.length !== 2) {
      await adapter.createRooms(both.map((id) => ({ id, source: "benchmark", type: "GROUP", name: "A room" })));
      await adapter.createEntities([{ id: entityId(number), agentId: agentId(number), names: ["Somebody"], metadata: {} }]);
    }
    adapters.push(adapter);
  }
}

function memory(row, unique) {
  const number = agents[row];
  const made = {
    id: rowId(row),
    agentId: agentId(number),
    entityId: entityId(number),
    roomId: roomId(number, rooms[row]),
    content: { text: text(row) },
    metadata: { type: "message" },
    embedding: slice(vectors, row),
  };
  if (unique) made.unique = true;
  return [number, made];
}

const search = ([query, number]) => adapters[number].searchMemories({ tableName: TABLE, embedding: query, count: COUNT });
const searchRoom = ([query, number]) =>
  adapters[number].searchMemories({ tableName: TABLE, embedding: query, count: COUNT, roomId: roomId(number, 1) });
const insert = ([number, made]) => adapters[number].createMemory(made, TABLE);

const requests = {
  async open({ place: given, folder, width: wide }) {
    [place, width] = [given, wide];
    vectors = openSync(`${folder}/vectors.f32`);
    queries = openSync(`${folder}/queries.f32`);
    agents = numbers(`${folder}/agents.i32`, Int32Array);
    rooms = numbers(`${folder}/rooms.i32`, Int32Array);
    const require = createRequire(`${modules}/`);
    plugin = await import(pathToFileURL(require.resolve("@elizaos/plugin-sql")).href);
    await connect();
    const versions = {};
    for (const name of ["@elizaos/plugin-sql", "@electric-sql/pglite", "pg", "drizzle-orm"]) {
      versions[name] = JSON.parse(readFileSync(`${modules}/node_modules/${name}/package.json`)).version;
    }
    return { versions, python: `Node ${process.versions.node}` };
  },

  // It has no way to load many; so that this takes minutes and not hours, rows go past it into its tables.
  async load({ first, last }) {
    const begun = seconds();
    const client = await adapters[0].getConnection();
    if (option === "pglite") return loadPGlite(client, first, last, begun);
    for (let start = first; start < last; start += 500) {
      const rows = [];
      for (let row = start; row < Math.min(start + 500, last); row++) rows.push(row);
      await client.query(
        `INSERT INTO memories (id, type, content, entity_id, agent_id, room_id, metadata)
         SELECT r.id, '${TABLE}', r.content, r.entity, r.agent, r.room, '{"type": "message"}'
         FROM unnest($1::uuid[], $2::jsonb[], $3::uuid[], $4::uuid[], $5::uuid[]) AS r (id, content, entity, agent, room)`,
        [
          rows.map(rowId),
          rows.map((row) => JSON.stringify({ text: text(row) })),
          rows.map((row) => entityId(agents[row])),
          rows.map((row) => agentId(agents[row])),
          rows.map((row) => roomId(agents[row], rooms[row])),
        ],
      );
      await client.query(
        `INSERT INTO embeddings (memory_id, dim_${width})
         SELECT r.id, r.vector::vector FROM unnest($1::uuid[], $2::text[]) AS r (id, vector)`,
        [rows.map(rowId), rows.map(stored)],
      );
    }
    return { seconds: seconds() - begun, by_itself: false };
  },

  async index() {
    return { seconds: 0 };
  },

  async search({ asked, warmup, room }) {
    const ready = asked.map(([query, number]) => [slice(queries, query), number]);
    const [times, answers] = await timed(room ? searchRoom : search, ready);
    const found = answers.map((answer) => answer.map((hit) => rowOf(hit.id)));
    return { seconds: times.slice(warmup), found: found.slice(warmup) };
  },

  async insert_one({ rows }) {
    return { seconds: (await timed(insert, rows.map((row) => memory(row, option !== "check"))))[0] };
  },

  // It has no way to store many: one after the other, as its runtime does.
  async insert_many({ first, last }) {
    const ready = [];
    for (let row = first; row < last; row++) ready.push(memory(row, true));
    const begun = seconds();
    for (const each of ready) await insert(each);
    return { seconds: seconds() - begun };
  },

  async mixed({ asked, rows, callers }) {
    const work = asked.map(([query, number]) => [true, [slice(queries, query), number]]);
    for (const row of rows) work.push([false, memory(row, true)]);
    let state = 1;
    for (let i = work.length - 1; i > 0; i--) {
      state = (state * 48271) % 2147483647;
      const j = state % (i + 1);
      [work[i], work[j]] = [work[j], work[i]];
    }
    // Its pool has twenty connections.
    const before = asked.slice(0, Math.min(callers, 20)).map(([query, number]) => [true, [slice(queries, query), number]]);
    await atOnce(before, callers);
    const begun = seconds();
    const [searches, inserts, answers] = await atOnce(work, callers);
    const total = seconds() - begun;
    const fewest = answers.reduce((least, answer) => Math.min(least ?? Infinity, answer.length), null);
    return { total, searches, inserts, fewest };
  },

  async knob() {
    return {};
  },

  async close() {
    await adapters[0].close();
    return {};
  },
};

async function loadPGlite(client, first, last, begun) {
  const copies = {
    "memories (id, type, content, entity_id, agent_id, room_id, metadata)": (row) => [
      ...[rowId(row), TABLE, JSON.stringify({ text: text(row) }), entityId(agents[row])],
      ...[agentId(agents[row]), roomId(agents[row], rooms[row]), '{"type": "message"}'],
    ],
    [`embeddings (memory_id, dim_${width})`]: (row) => [rowId(row), stored(row)],
  };
  for (const [table, line] of Object.entries(copies)) {
    for (let start = first; start < last; start += 5000) {
      const lines = [];
      for (let row = start; row < Math.min(start + 5000, last); row++) lines.push(line(row).join("\t"));
      await client.query(`COPY ${table} FROM '/dev/blob'`, [], { blob: new Blob([lines.join("\n") + "\n"]) });
    }
  }
  await client.query("VACUUM ANALYZE");
  const taken = seconds() - begun;
  const size = await client.query("SELECT pg_database_size(current_database())::float8 AS bytes");
  return { seconds: taken, by_itself: false, bytes: size.rows[0].bytes };
}

async function atOnce(work, callers) {
  const [searches, inserts, answers] = [[], [], []];
  let next = 0;
  const caller = async () => {
    while (next < work.length) {
      const [isSearch, given] = work[next++];
      const started = seconds();
      const answer = await (isSearch ? search : insert)(given);
      (isSearch ? searches : inserts).push(seconds() - started);
      if (isSearch) answers.push(answer);
    }
  };
  await Promise.all(Array.from({ length: callers }, caller));
  return [searches, inserts, answers];
}

async function timed(call, ready) {
  const [times, answers] = [[], []];
  for (const given of ready) {
    const begun = seconds();
    const answer = await call(given);
    times.push(seconds() - begun);
    answers.push(answer);
  }
  return [times, answers];
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: name, ...given } = JSON.parse(line);
  let answer;
  try {
    answer = await requests[name](given);
  } catch (error) {
    console.error(error);
    answer = { error: String(error?.cause ? `${error}: ${error.cause}` : error).slice(0, 2000) };
  }
  write(`${JSON.stringify(answer)}\n`);
}
process.exit(0);
