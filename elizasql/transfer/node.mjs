// Serves the folder of a PGlite on a socket. Run by elizasql/transfer/node.py:
//   node node.mjs FOLDER SOCKET WHERE...
// WHERE are folders; the packages are taken from the first whose node_modules, or those above it, have them.
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [folder, socket, ...where] = process.argv.slice(2);

async function load(name) {
  for (const place of where) {
    try {
      const found = createRequire(path.join(place, 'x.js')).resolve(name);
      return await import(pathToFileURL(found).href);
    } catch (error) {
      if (!['MODULE_NOT_FOUND', 'ERR_PACKAGE_PATH_NOT_EXPORTED'].includes(error.code)) throw error;
    }
  }
  throw new Error(`the Node package ${name} is missing`);
}

try {
  const { PGlite } = await load('@electric-sql/pglite');
  const { PGLiteSocketServer } = await load('@electric-sql/pglite-socket');
  const extensions = {};
  for (const [name, place] of [['vector', '@electric-sql/pglite/vector'], ['vector', '@electric-sql/pglite-pgvector'], ['fuzzystrmatch', '@electric-sql/pglite/contrib/fuzzystrmatch']]) {
    if (extensions[name]) continue;
    try {
      extensions[name] = (await load(place))[name];
    } catch (error) {
      if (!error.message.includes('is missing')) throw error;
    }
  }
  const db = await PGlite.create({ dataDir: folder, extensions });
  const server = new PGLiteSocketServer({ db, path: socket });
  await server.start();
  console.log('ready');
  process.stdin.resume();
  process.stdin.on('end', async () => {
    await server.stop();
    await db.close();
    process.exit(0);
  });
} catch (error) {
  console.log(`error ${String(error.message ?? error).split('\n')[0]}`);
  process.exit(1);
}
