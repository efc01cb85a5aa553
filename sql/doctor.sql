-- What the command line asks of a server: the agents, their numbers, and everything that a check-up looks at.

-- name: get_first_agents(only_agent, count)
SELECT id, name FROM elizasql.agents
WHERE :only_agent::uuid IS NULL OR id = :only_agent
ORDER BY created_at, id
LIMIT :count;

-- name: look_at_database()^
-- The database as a whole.
SELECT
    current_setting('server_version') AS version,
    current_database() AS name,
    current_user::text AS role,
    pg_postmaster_start_time() AS started_at,
    now() AS now,
    pg_database_size(current_database()) AS bytes,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_activity
        WHERE datname = current_database() AND coalesce(backend_type = 'client backend', usesysid IS NOT NULL)
    ) AS connections,
    current_setting('max_connections')::integer AS max_connections;

-- name: count_rows_of_agents(only_agent)
-- What each agent has, or one of them; the agents in the order of their creation.
SELECT
    a.id,
    a.name,
    a.embedding_dimension AS dimension,
    (SELECT count(*) FROM elizasql.worlds AS w WHERE w.agent_id = a.id) AS worlds,
    (SELECT count(*) FROM elizasql.rooms AS r WHERE r.agent_id = a.id) AS rooms,
    (SELECT count(*) FROM elizasql.entities AS e WHERE e.agent_id = a.id) AS entities,
    (SELECT count(*) FROM elizasql.memories AS m WHERE m.agent_id = a.id) AS memories,
    (
        SELECT count(*) FROM elizasql.embeddings AS v WHERE v.agent_id = a.id AND v.dimension = a.embedding_dimension
    ) AS embeddings,
    (SELECT count(*) FROM elizasql.embeddings AS v WHERE v.agent_id = a.id AND NOT v.indexed) AS tail,
    (SELECT count(*) FROM elizasql.tasks AS t WHERE t.agent_id = a.id) AS tasks,
    (SELECT count(*) FROM elizasql.logs AS l WHERE l.agent_id = a.id) AS logs
FROM elizasql.agents AS a
WHERE :only_agent::uuid IS NULL OR a.id = :only_agent
ORDER BY a.created_at, a.id;

-- name: count_memories_by_type(agent_id)
SELECT
    m.type,
    count(*) AS memories,
    count(*) FILTER (WHERE NOT m."unique") AS duplicates,
    (
        SELECT count(*) FROM elizasql.embeddings AS v
        WHERE
            v.agent_id = :agent_id AND v.type = m.type
            AND v.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) AS embeddings,
    min(m.created_at) AS oldest,
    max(m.created_at) AS newest
FROM elizasql.memories AS m
WHERE m.agent_id = :agent_id
GROUP BY m.type
ORDER BY memories DESC, m.type ASC;

-- name: check_server()^
-- What the server is and how it is set, in plain numbers: sizes in bytes, times in seconds. Of sessions of other roles
-- an ordinary role learns little more than that there are any: not of which kind they are. Whether huge pages are in use
-- nobody can tell before PostgreSQL 17.
SELECT
    current_setting('server_version_num')::integer AS version,
    pg_is_in_recovery() AS in_recovery,
    current_setting('default_transaction_read_only') AS read_only,
    lower('É') = 'é' AS knows_case,
    current_setting('fsync') AS fsync,
    current_setting('full_page_writes') AS full_page_writes,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('data_checksums') AS data_checksums,
    current_setting('autovacuum') AS autovacuum,
    current_setting('track_counts') AS track_counts,
    pg_size_bytes(current_setting('shared_buffers')) AS shared_buffers,
    current_setting('huge_pages_status', TRUE) AS huge_pages,
    current_setting('shared_memory_size_in_huge_pages')::integer AS huge_pages_needed,
    pg_size_bytes(current_setting('effective_cache_size')) AS effective_cache_size,
    pg_size_bytes(current_setting('maintenance_work_mem')) AS maintenance_work_mem,
    current_setting('max_connections')::integer
    - current_setting('superuser_reserved_connections')::integer AS free_for_all,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_activity
        WHERE coalesce(backend_type = 'client backend', usesysid IS NOT NULL)
    ) AS connections,
    (
        SELECT count(*) FROM pg_catalog.pg_stat_activity
        WHERE datname = current_database() AND usesysid IS NOT NULL AND backend_type IS NULL
    ) AS hidden,
    extract(EPOCH FROM clock_timestamp())::double precision AS clock,
    pg_backend_pid() AS pid,
    pg_database_size(current_database()) AS bytes,
    (SELECT age(datfrozenxid) FROM pg_catalog.pg_database WHERE datname = current_database()) AS xid_age,
    (
        SELECT coalesce(datcollversion, '') <> coalesce(pg_database_collation_actual_version(oid), '')
        FROM pg_catalog.pg_database
        WHERE datname = current_database()
    ) AS collation_changed,
    (SELECT count(*) FROM pg_catalog.pg_replication_slots WHERE NOT active) AS idle_slots,
    (SELECT rolsuper OR rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user) AS is_above_policies,
    coalesce(
        has_schema_privilege(to_regnamespace('elizasql')::oid, 'CREATE'),
        has_database_privilege(current_database(), 'CREATE')
    ) AS may_migrate;

-- name: list_extensions(names)
-- Of these extensions, the version that is created here and the one that could be.
SELECT
    given.name,
    x.extversion AS created,
    a.default_version AS available
FROM unnest(:names::text[]) AS given (name)
LEFT JOIN pg_catalog.pg_extension AS x ON given.name = x.extname
LEFT JOIN pg_catalog.pg_available_extensions AS a ON given.name = a.name
ORDER BY given.name;

-- name: list_indexes()
-- Every index of the schema: whether it is valid, how often it was read, and whether a rule of the schema needs it.
SELECT
    n.nspname || '.' || i.relname AS name,
    n.nspname || '.' || t.relname AS table_name,
    x.indisvalid AND x.indisready AS is_valid,
    x.indisunique AS is_unique,
    m.amname AS method,
    coalesce(s.idx_scan, 0) AS scans,
    CASE WHEN i.relkind = 'i' THEN pg_relation_size(i.oid) ELSE 0 END AS bytes
FROM pg_catalog.pg_index AS x
INNER JOIN pg_catalog.pg_class AS i ON x.indexrelid = i.oid
INNER JOIN pg_catalog.pg_class AS t ON x.indrelid = t.oid
INNER JOIN pg_catalog.pg_namespace AS n ON t.relnamespace = n.oid
INNER JOIN pg_catalog.pg_am AS m ON i.relam = m.oid
LEFT JOIN pg_catalog.pg_stat_user_indexes AS s ON i.oid = s.indexrelid
WHERE n.nspname = 'elizasql'
ORDER BY i.relname;

-- name: list_objects()
-- What there is in the schema, by kind and name; the names of what belongs to a table begin with it.
SELECT
    CASE WHEN relkind IN ('r', 'p') THEN 'table' ELSE 'index' END AS kind,
    relname::text AS name
FROM pg_catalog.pg_class
WHERE relnamespace = 'elizasql'::regnamespace AND relkind IN ('r', 'p', 'i', 'I')
UNION ALL
SELECT
    'function' AS kind,
    proname::text AS name
FROM pg_catalog.pg_proc
WHERE pronamespace = 'elizasql'::regnamespace
UNION ALL
SELECT
    'column' AS kind,
    c.relname || '.' || a.attname AS name
FROM pg_catalog.pg_attribute AS a
INNER JOIN pg_catalog.pg_class AS c ON a.attrelid = c.oid
WHERE c.relnamespace = 'elizasql'::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT
    'constraint' AS kind,
    c.relname || '.' || o.conname AS name
FROM pg_catalog.pg_constraint AS o
INNER JOIN pg_catalog.pg_class AS c ON o.conrelid = c.oid
WHERE c.relnamespace = 'elizasql'::regnamespace AND o.convalidated
UNION ALL
SELECT
    'trigger' AS kind,
    c.relname || '.' || t.tgname AS name
FROM pg_catalog.pg_trigger AS t
INNER JOIN pg_catalog.pg_class AS c ON t.tgrelid = c.oid
WHERE c.relnamespace = 'elizasql'::regnamespace AND NOT t.tgisinternal;

-- name: list_tables()
-- Every table of the schema that holds rows, with what the statistics say of it. The counter of live rows is lost in a
-- crash, and too low for what sessions report after the table was analyzed; then what was found at that time counts.
SELECT
    'elizasql.' || t.relname AS name,
    greatest(s.n_live_tup, t.reltuples::bigint, 0) AS live,
    coalesce(s.n_dead_tup, 0) AS dead,
    coalesce(s.n_mod_since_analyze, 0) AS modified,
    greatest(s.last_analyze, s.last_autoanalyze) AS analyzed_at,
    pg_total_relation_size(t.oid) AS bytes
FROM pg_catalog.pg_class AS t
INNER JOIN pg_catalog.pg_namespace AS n ON t.relnamespace = n.oid
LEFT JOIN pg_catalog.pg_stat_user_tables AS s ON t.oid = s.relid
WHERE n.nspname = 'elizasql' AND t.relkind = 'r'
ORDER BY t.relname;

-- name: list_lacking_privileges()
-- What the role may not do with the tables and functions that it needs. Partitions are not among them: an adapter without
-- rights on its agent's goes through the partitioned tables. Of the migrations it reads which are applied.
SELECT
    'elizasql.' || t.relname AS name,
    array_agg(p.privilege ORDER BY p.position) AS lacking
FROM pg_catalog.pg_class AS t
INNER JOIN pg_catalog.pg_namespace AS n ON t.relnamespace = n.oid
CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) WITH ORDINALITY AS p (privilege, position)
WHERE
    n.nspname = 'elizasql' AND t.relkind IN ('r', 'p') AND NOT t.relispartition
    AND NOT has_table_privilege(t.oid, p.privilege)
    AND (t.relname <> 'schema_migrations' OR p.privilege = 'SELECT')
GROUP BY t.relname
UNION ALL
-- Those of triggers run for whoever writes.
SELECT
    'elizasql.' || f.proname AS name,
    '{EXECUTE}' AS lacking
FROM pg_catalog.pg_proc AS f
INNER JOIN pg_catalog.pg_namespace AS n ON f.pronamespace = n.oid
WHERE
    n.nspname = 'elizasql' AND f.prorettype <> 'trigger'::regtype AND NOT has_function_privilege(f.oid, 'EXECUTE')
ORDER BY name;

-- name: list_hidden_tables()
-- The tables of which the role sees no row: they are guarded by row level security, and no policy lets it read any. Not
-- the partitions, which nobody asks then.
SELECT 'elizasql.' || t.relname AS name
FROM pg_catalog.pg_class AS t
INNER JOIN pg_catalog.pg_namespace AS n ON t.relnamespace = n.oid
WHERE
    n.nspname = 'elizasql' AND t.relkind IN ('r', 'p') AND NOT t.relispartition AND row_security_active(t.oid)
    AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_policy AS p
        WHERE
            p.polrelid = t.oid AND p.polpermissive AND p.polcmd IN ('*', 'r')
            -- 0 stands for everybody.
            AND (0 = ANY(p.polroles) OR EXISTS (
                SELECT FROM unnest(p.polroles) AS named (oid)
                WHERE named.oid <> 0 AND pg_has_role(named.oid, 'USAGE')
            ))
    )
ORDER BY t.relname;

-- name: list_tails()
-- The vectors of each agent that are not in its HNSW index yet, the longest tail first.
SELECT
    a.id,
    a.name,
    (SELECT count(*) FROM elizasql.embeddings AS v WHERE v.agent_id = a.id AND NOT v.indexed) AS tail,
    (
        SELECT count(*) FROM elizasql.embeddings AS v WHERE v.agent_id = a.id AND v.dimension = a.embedding_dimension
    ) AS embeddings
FROM elizasql.agents AS a
WHERE a.embedding_dimension IS NOT NULL
ORDER BY tail DESC, a.id ASC;

-- name: list_agents_to_index(agent_ids)
-- These agents, or all: which HNSW index an agent's vectors are in, and whether it has any; agents share indexes.
SELECT
    a.id,
    a.name,
    format('%s_dim_%s_hnsw', elizasql.partition_of(a.id), a.embedding_dimension) AS index_name,
    exists(
        SELECT FROM elizasql.embeddings AS v WHERE v.agent_id = a.id AND v.dimension = a.embedding_dimension
    ) AS has_vectors
FROM elizasql.agents AS a
WHERE :agent_ids::uuid[] IS NULL OR a.id = ANY(:agent_ids)
ORDER BY a.created_at, a.id;

-- name: list_reembeddings()
-- The moves to another width that are under way; target NULL: only what is not in force any more is left to drop.
SELECT
    r.agent_id,
    r.source,
    r.target
FROM elizasql.reembeddings AS r
ORDER BY r.agent_id;

-- name: list_long_transactions(seconds)
-- Transactions that have been open for long, with their state, and those that were prepared for a second phase that did
-- not come, which no session has any more; vacuum removes nothing that they could still see.
SELECT
    pid,
    application_name,
    state,
    NULL AS prepared,
    extract(EPOCH FROM now() - xact_start)::double precision AS seconds
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND now() - xact_start > make_interval(secs => :seconds)
UNION ALL
SELECT
    NULL AS pid,
    NULL AS application_name,
    NULL AS state,
    quote_literal(gid) AS prepared,
    extract(EPOCH FROM now() - prepared)::double precision AS seconds
FROM pg_catalog.pg_prepared_xacts
WHERE database = current_database() AND now() - prepared > make_interval(secs => :seconds)
ORDER BY seconds DESC;

-- name: list_weak_triggers()
-- Tables with triggers that are off, or that do not fire any more, as they were made to, for what is replicated.
SELECT
    format('elizasql.%I', c.relname) AS table_name,
    bool_or(t.tgenabled = 'D') AS disabled,
    array_agg(DISTINCT t.tgname::text) FILTER (WHERE NOT t.tgisinternal) AS names
FROM pg_catalog.pg_trigger AS t
INNER JOIN pg_catalog.pg_class AS c ON t.tgrelid = c.oid
WHERE
    c.relnamespace = 'elizasql'::regnamespace
    AND (
        t.tgenabled = 'D'
        OR (
            t.tgenabled <> 'A'
            AND t.tgname IN (
                'agents_created', 'agents_rewrites_forgotten', 'memories_rewritten', 'memory_rewrites_own',
                'schema_migrations_own', 'embeddings_stamp_new', 'embeddings_stamp_changed', 'embeddings_removed',
                'embeddings_moved', 'embeddings_truncated'
            )
        )
    )
GROUP BY c.relname
ORDER BY disabled DESC, table_name ASC;

-- name: get_largest_type(agent_id)^
-- The type of which the agent has the most vectors, and how many these are.
SELECT
    type,
    count(*) AS vectors,
    count(*) FILTER (WHERE indexed) AS indexed
FROM elizasql.embeddings
WHERE
    agent_id = :agent_id
    AND dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
GROUP BY type
ORDER BY vectors DESC, type ASC
LIMIT 1;

-- name: count_vectors_of_type(agent_id, type)^
SELECT
    count(*) AS vectors,
    count(*) FILTER (WHERE indexed) AS indexed
FROM elizasql.embeddings
WHERE
    agent_id = :agent_id AND type = :type
    AND dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id);

-- name: sample_embeddings(agent_id, type, count)
-- Vectors of the agent, chosen by chance.
SELECT
    e.memory_id,
    e.dim_384 AS embedding
FROM (
    SELECT memory_id FROM elizasql.embeddings
    WHERE agent_id = :agent_id AND type = :type AND dimension = 384
    ORDER BY random()
    LIMIT :count
) AS chosen
INNER JOIN elizasql.embeddings AS e ON chosen.memory_id = e.memory_id
WHERE e.agent_id = :agent_id AND e.dimension = 384;

-- name: get_embedding(agent_id, memory_id)$
SELECT dim_384 FROM elizasql.embeddings
WHERE agent_id = :agent_id AND memory_id = :memory_id AND dimension = 384;

-- name: search_exactly(agent_id, type, embedding, count)
-- The cosine similarities of the nearest vectors. No index serves this order: HNSW holds halfvec.
SELECT (1 - (dim_384 <=> :embedding))::double precision AS similarity
FROM elizasql.embeddings
WHERE agent_id = :agent_id AND type = :type AND dimension = 384
ORDER BY dim_384 <=> :embedding
LIMIT :count;
