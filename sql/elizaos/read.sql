-- Reading a database that @elizaos/plugin-sql 1.6 to 2.0 wrote, in the form of this library's rows.
--
-- These run on that database and not on this library's: they stand in a folder of their own and are loaded apart. Columns
-- were named agentId until 1.6.5 and agent_id from 1.7 on, and some are missing in the older ones: rows are read as JSON,
-- by either name. Of what there may be millions, that costs 70 us a row instead of 7: there `absent` has a column of
-- each name, and a name that the table does not know is that of `absent`, NULL.
-- A time without a zone is UTC; it becomes one where the row is taken.
--
-- What rows are looked up by has at most 1,024 bytes here, since indexes hold it. The original has none on these names.
--
-- Each gives: line, the row as JSON; note, what the row had to lose; problem, why it cannot be taken; copies, how many
-- rows were folded into it, itself included.

-- name: list_source_tables()
-- The tables of the schema public, and about how many rows each has; NULL: some, but nobody has counted, as after a crash
-- or in a PGlite. is_hidden: whether row-level security keeps rows from this role.
SELECT
    c.relname AS name,
    row_security_active(c.oid) AS is_hidden,
    CASE
        WHEN greatest(c.reltuples, s.n_live_tup) > 0 THEN greatest(c.reltuples, s.n_live_tup)::bigint
        WHEN pg_relation_size(c.oid) = 0 THEN 0
    END AS estimate
FROM pg_catalog.pg_class AS c
INNER JOIN pg_catalog.pg_namespace AS n ON c.relnamespace = n.oid
LEFT JOIN pg_catalog.pg_stat_user_tables AS s ON c.oid = s.relid
WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p')
ORDER BY c.relname;

-- name: count_rows()^
SELECT
    (SELECT count(*) FROM public.memories) AS memories,
    (SELECT count(*) FROM public.embeddings) AS embeddings;

-- name: find_agents(agent_ids)
SELECT t.id
FROM public.agents AS t
WHERE t.id = ANY(:agent_ids::uuid[]);

-- name: find_dimensions(agent_ids)
-- The widths of each agent's vectors, that of the newest vector first.
SELECT
    owned.agent_id,
    width.dimension,
    count(*) AS vectors
FROM public.embeddings AS e
INNER JOIN (
    SELECT known.*
    FROM (SELECT NULL::uuid AS agent_id, NULL::uuid AS "agentId") AS absent
    CROSS JOIN LATERAL (SELECT id, coalesce(agent_id, "agentId") AS agent_id FROM public.memories) AS known
) AS owned ON e.memory_id = owned.id
CROSS JOIN
    LATERAL (
        VALUES
        (384, e.dim_384 IS NOT NULL),
        (512, e.dim_512 IS NOT NULL),
        (768, e.dim_768 IS NOT NULL),
        (1024, e.dim_1024 IS NOT NULL),
        (1536, e.dim_1536 IS NOT NULL),
        (3072, e.dim_3072 IS NOT NULL)
    ) AS width (dimension, is_filled)
WHERE width.is_filled AND (:agent_ids::uuid[] IS NULL OR owned.agent_id = ANY(:agent_ids))
GROUP BY owned.agent_id, width.dimension
ORDER BY owned.agent_id ASC, max(e.created_at) DESC, vectors DESC;

-- name: read_servers()
SELECT
    jsonb_build_object(
        'id', s.j -> 'id',
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', s.j -> 'updated_at'
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.servers AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s;

-- name: read_owners()
-- The name of servers in 1.6.4.
SELECT
    jsonb_build_object(
        'id', s.j -> 'id',
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', s.j -> 'updated_at'
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.owners AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s;

-- name: read_agents(agent_ids, agents, dimensions)
SELECT
    jsonb_build_object(
        'id', s.j -> 'id',
        'name', s.j -> 'name',
        'username', s.j -> 'username',
        'system', s.j -> 'system',
        'bio', coalesce(nullif(s.j -> 'bio', 'null'), '[]'),
        'message_examples', coalesce(nullif(s.j -> 'message_examples', 'null'), '[]'),
        'post_examples', coalesce(nullif(s.j -> 'post_examples', 'null'), '[]'),
        'topics', coalesce(nullif(s.j -> 'topics', 'null'), '[]'),
        'adjectives', coalesce(nullif(s.j -> 'adjectives', 'null'), '[]'),
        'knowledge', coalesce(nullif(s.j -> 'knowledge', 'null'), '[]'),
        'plugins', coalesce(nullif(s.j -> 'plugins', 'null'), '[]'),
        'settings', coalesce(nullif(s.j -> 'settings', 'null'), '{}'),
        'style', coalesce(nullif(s.j -> 'style', 'null'), '{}'),
        'enabled', s.j -> 'enabled',
        'server_id', coalesce(s.j -> 'server_id', s.j -> 'owner_id'),
        'embedding_dimension', (
            SELECT g.dimension
            FROM unnest(:agents::uuid[], :dimensions::smallint[]) AS g (id, dimension)
            WHERE g.id = t.id
        ),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', coalesce(s.j -> 'updated_at', s.j -> 'updatedAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.agents AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR t.id = ANY(:agent_ids)
ORDER BY t.created_at, t.id;

-- name: read_worlds(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'name', coalesce(nullif(s.j -> 'name', 'null'), '""'),
        'message_server_id', server.id,
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    CASE
        WHEN
            named.given !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
            THEN 'message server ' || named.given || ' got an id made of its name'
    END AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.worlds AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
CROSS JOIN
    LATERAL (SELECT coalesce(s.j ->> 'message_server_id', s.j ->> 'serverId', s.j ->> 'server_id') AS given) AS named
CROSS JOIN
    LATERAL (
        SELECT
            CASE
                WHEN named.given ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN named.given::uuid ELSE
                    md5(named.given)::uuid
            END AS id
    ) AS server
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_rooms(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'name', s.j -> 'name',
        'source', s.j -> 'source',
        'type', s.j -> 'type',
        'channel_id', coalesce(s.j -> 'channel_id', s.j -> 'channelId'),
        'message_server_id', server.id,
        'world_id', w.id,
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    nullif(concat_ws(
        '; ',
        CASE
            WHEN
                coalesce(s.j ->> 'world_id', s.j ->> 'worldId') IS NOT NULL AND w.id IS NULL
                THEN 'there is no world ' || (coalesce(s.j ->> 'world_id', s.j ->> 'worldId'))
        END,
        CASE
            WHEN
                named.given !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
                THEN 'message server ' || named.given || ' got an id made of its name'
        END
    ), '') AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.rooms AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
CROSS JOIN
    LATERAL (SELECT coalesce(s.j ->> 'message_server_id', s.j ->> 'serverId', s.j ->> 'server_id') AS given) AS named
CROSS JOIN
    LATERAL (
        SELECT
            CASE
                WHEN named.given ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN named.given::uuid ELSE
                    md5(named.given)::uuid
            END AS id
    ) AS server
LEFT JOIN public.worlds AS w ON w.id = (coalesce(s.j ->> 'world_id', s.j ->> 'worldId'))::uuid
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_entities(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'names', coalesce(nullif(s.j -> 'names', 'null'), '[]'),
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.entities AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: copy_worlds(agent_id, ids)
-- Those of another agent that this one's rows point at: they become its own, too.
SELECT
    jsonb_build_object(
        'agent_id', :agent_id::uuid,
        'id', s.j -> 'id',
        'name', coalesce(nullif(s.j -> 'name', 'null'), '""'),
        'message_server_id', server.id,
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.worlds AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
CROSS JOIN
    LATERAL (SELECT coalesce(s.j ->> 'message_server_id', s.j ->> 'serverId', s.j ->> 'server_id') AS given) AS named
CROSS JOIN
    LATERAL (
        SELECT
            CASE
                WHEN named.given ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN named.given::uuid ELSE
                    md5(named.given)::uuid
            END AS id
    ) AS server
WHERE t.id = ANY(:ids::uuid[]);

-- name: copy_rooms(agent_id, ids)
-- Those of another agent that this one's rows point at: they become its own, too.
SELECT
    jsonb_build_object(
        'agent_id', :agent_id::uuid,
        'id', s.j -> 'id',
        'name', s.j -> 'name',
        'source', s.j -> 'source',
        'type', s.j -> 'type',
        'channel_id', coalesce(s.j -> 'channel_id', s.j -> 'channelId'),
        'message_server_id', server.id,
        'world_id', w.id,
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.rooms AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
CROSS JOIN
    LATERAL (SELECT coalesce(s.j ->> 'message_server_id', s.j ->> 'serverId', s.j ->> 'server_id') AS given) AS named
CROSS JOIN
    LATERAL (
        SELECT
            CASE
                WHEN named.given ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN named.given::uuid ELSE
                    md5(named.given)::uuid
            END AS id
    ) AS server
LEFT JOIN public.worlds AS w ON w.id = (coalesce(s.j ->> 'world_id', s.j ->> 'worldId'))::uuid
WHERE t.id = ANY(:ids::uuid[]);

-- name: copy_entities(agent_id, ids)
-- Those of another agent that this one's rows point at: they become its own, too.
SELECT
    jsonb_build_object(
        'agent_id', :agent_id::uuid,
        'id', s.j -> 'id',
        'names', coalesce(nullif(s.j -> 'names', 'null'), '[]'),
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.entities AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE t.id = ANY(:ids::uuid[]);

-- name: read_participants(agent_ids)
-- Nothing keeps the original from adding a membership again: of several the first counts, or one that has a state.
SELECT DISTINCT ON (known.agent_id, known.room_id, known.entity_id)
    jsonb_build_object(
        'agent_id', known.agent_id,
        'room_id', known.room_id,
        'entity_id', known.entity_id,
        'id', known.j -> 'id',
        'room_state', CASE WHEN known.is_state THEN known.state END,
        'metadata', '{}'::jsonb,
        'created_at',
        coalesce(nullif(coalesce(known.j -> 'created_at', known.j -> 'createdAt'), 'null'), to_jsonb(now()))
    )::text AS line,
    CASE WHEN known.state IS NOT NULL AND NOT known.is_state THEN 'there is no state ' || known.state END AS note,
    NULL::text AS problem,
    count(*) OVER (PARTITION BY known.agent_id, known.room_id, known.entity_id) AS copies
FROM (
    SELECT
        s.j,
        coalesce(
            coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'), to_jsonb(r) ->> 'agent_id', to_jsonb(r) ->> 'agentId'
        )::uuid AS agent_id,
        coalesce(s.j ->> 'room_id', s.j ->> 'roomId') AS room_id,
        coalesce(s.j ->> 'entity_id', s.j ->> 'entityId') AS entity_id,
        coalesce(s.j ->> 'room_state', s.j ->> 'roomState') AS state,
        coalesce(coalesce(s.j ->> 'room_state', s.j ->> 'roomState') IN ('FOLLOWED', 'MUTED'), FALSE) AS is_state
    FROM public.participants AS t
    CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
    LEFT JOIN public.rooms AS r ON r.id = (coalesce(s.j ->> 'room_id', s.j ->> 'roomId'))::uuid
) AS known
WHERE :agent_ids::uuid[] IS NULL OR known.agent_id = ANY(:agent_ids)
ORDER BY
    known.agent_id ASC, known.room_id ASC, known.entity_id ASC, known.is_state DESC,
    coalesce(known.j ->> 'created_at', known.j ->> 'createdAt'), known.j ->> 'id';

-- name: read_components(agent_ids)
-- The newest first: of several that say of one entity what another says, too, the first is taken.
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'entity_id', coalesce(s.j -> 'entity_id', s.j -> 'entityId'),
        'room_id', coalesce(s.j -> 'room_id', s.j -> 'roomId'),
        'world_id', coalesce(s.j -> 'world_id', s.j -> 'worldId'),
        'source_entity_id', coalesce(s.j -> 'source_entity_id', s.j -> 'sourceEntityId'),
        'type', s.j -> 'type',
        'data', coalesce(nullif(s.j -> 'data', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    CASE WHEN octet_length(s.j ->> 'type') > 1024 THEN 'its type is too long for an index' END AS problem,
    1 AS copies
FROM public.components AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids)
ORDER BY coalesce(s.j ->> 'created_at', s.j ->> 'createdAt') DESC, t.id DESC;

-- name: read_relationships(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'source_entity_id', coalesce(s.j -> 'source_entity_id', s.j -> 'sourceEntityId'),
        'target_entity_id', coalesce(s.j -> 'target_entity_id', s.j -> 'targetEntityId'),
        'tags', coalesce(nullif(s.j -> 'tags', 'null'), '[]'),
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.relationships AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_memories(agent_ids)
-- A memory has the time that it was given, also one of microseconds for milliseconds: what lies outside of the calendar
-- that Python knows, and could not be read, is moved to its end.
SELECT
    jsonb_build_object(
        'agent_id', t.agent_id,
        'id', t.id,
        'type', t.type,
        'created_at',
        CASE
            WHEN t.created_at < '0001-01-01' THEN '0001-01-01'
            WHEN t.created_at > '9999-12-31 23:59:59.999999' THEN '9999-12-31 23:59:59.999999'
            ELSE t.created_at
        END,
        'content', t.content,
        'entity_id', t.entity_id,
        'room_id', t.room_id,
        'world_id', w.id,
        'unique', t."unique",
        'metadata', coalesce(nullif(t.metadata, 'null'), '{}')
    )::text AS line,
    nullif(concat_ws(
        '; ',
        CASE WHEN t.world_id IS NOT NULL AND w.id IS NULL THEN 'there is no world ' || t.world_id END,
        CASE
            WHEN
                t.created_at NOT BETWEEN '0001-01-01' AND '9999-12-31 23:59:59.999999'
                THEN 'its time lies outside the calendar: ' || t.created_at
        END
    ), '') AS note,
    NULL::text AS problem,
    1 AS copies
FROM (
    SELECT
        NULL::uuid AS agent_id,
        NULL::uuid AS "agentId",
        NULL::timestamp AS created_at,
        NULL::timestamp AS "createdAt",
        NULL::uuid AS entity_id,
        NULL::uuid AS "entityId",
        NULL::uuid AS room_id,
        NULL::uuid AS "roomId",
        NULL::uuid AS world_id,
        NULL::uuid AS "worldId",
        NULL::boolean AS "unique",
        NULL::jsonb AS metadata
) AS absent
CROSS JOIN
    LATERAL (
        SELECT
            id,
            type,
            content,
            "unique",
            metadata,
            coalesce(agent_id, "agentId") AS agent_id,
            coalesce(created_at, "createdAt") AS created_at,
            coalesce(entity_id, "entityId") AS entity_id,
            coalesce(room_id, "roomId") AS room_id,
            coalesce(world_id, "worldId") AS world_id
        FROM public.memories
    ) AS t
LEFT JOIN public.worlds AS w ON t.world_id = w.id
WHERE :agent_ids::uuid[] IS NULL OR t.agent_id = ANY(:agent_ids);

-- name: read_cache(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'key', s.j -> 'key',
        'value', s.j -> 'value',
        'created_at', coalesce(nullif(coalesce(s.j -> 'created_at', s.j -> 'createdAt'), 'null'), to_jsonb(now())),
        'expires_at', coalesce(s.j -> 'expires_at', s.j -> 'expiresAt')
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.cache AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_tasks(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'name', s.j -> 'name',
        'description', coalesce(nullif(s.j -> 'description', 'null'), '""'),
        'room_id', coalesce(s.j -> 'room_id', s.j -> 'roomId'),
        'world_id', coalesce(s.j -> 'world_id', s.j -> 'worldId'),
        'entity_id', coalesce(s.j -> 'entity_id', s.j -> 'entityId'),
        'tags', coalesce(nullif(s.j -> 'tags', 'null'), '[]'),
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(nullif(coalesce(s.j -> 'created_at', s.j -> 'createdAt'), 'null'), to_jsonb(now())),
        'updated_at', coalesce(nullif(coalesce(s.j -> 'updated_at', s.j -> 'updatedAt'), 'null'), to_jsonb(now())),
        'ready_at', coalesce(nullif(coalesce(s.j -> 'created_at', s.j -> 'createdAt'), 'null'), to_jsonb(now())),
        'attempts', 0,
        'max_attempts', 5
    )::text AS line,
    NULL::text AS note,
    CASE WHEN octet_length(s.j ->> 'name') > 1024 THEN 'its name is too long for an index' END AS problem,
    1 AS copies
FROM public.tasks AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_logs(agent_ids)
-- A log has no agent of its own: its room's is meant.
SELECT
    jsonb_build_object(
        'agent_id', r.agent_id,
        'id', t.id,
        'entity_id', t.entity_id,
        'room_id', t.room_id,
        'type', t.type,
        'body', t.body,
        'created_at', t.created_at
    )::text AS line,
    NULL::text AS note,
    CASE WHEN octet_length(t.type) > 1024 THEN 'its type is too long for an index' END AS problem,
    1 AS copies
FROM (
    SELECT
        NULL::uuid AS agent_id,
        NULL::uuid AS "agentId",
        NULL::uuid AS entity_id,
        NULL::uuid AS "entityId",
        NULL::uuid AS room_id,
        NULL::uuid AS "roomId",
        NULL::timestamptz AS created_at,
        NULL::timestamptz AS "createdAt"
) AS absent
CROSS JOIN
    LATERAL (
        SELECT
            id,
            type,
            body,
            coalesce(entity_id, "entityId") AS entity_id,
            coalesce(room_id, "roomId") AS room_id,
            coalesce(created_at, "createdAt") AS created_at
        FROM public.logs
    ) AS t
LEFT JOIN
    LATERAL (SELECT coalesce(agent_id, "agentId") AS agent_id FROM public.rooms WHERE id = t.room_id) AS r
    ON TRUE
WHERE :agent_ids::uuid[] IS NULL OR r.agent_id = ANY(:agent_ids);

-- name: read_pairing_requests(agent_ids)
-- From 2.0 on, as the next.
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'channel', s.j -> 'channel',
        'sender_id', s.j -> 'sender_id',
        'code', s.j -> 'code',
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(nullif(coalesce(s.j -> 'created_at', s.j -> 'createdAt'), 'null'), to_jsonb(now())),
        'last_seen_at', coalesce(nullif(s.j -> 'last_seen_at', 'null'), to_jsonb(now()))
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.pairing_requests AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_pairing_allowlist(agent_ids)
SELECT
    jsonb_build_object(
        'agent_id', coalesce(s.j -> 'agent_id', s.j -> 'agentId'),
        'id', s.j -> 'id',
        'channel', s.j -> 'channel',
        'sender_id', s.j -> 'sender_id',
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(nullif(coalesce(s.j -> 'created_at', s.j -> 'createdAt'), 'null'), to_jsonb(now()))
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.pairing_allowlist AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (coalesce(s.j ->> 'agent_id', s.j ->> 'agentId'))::uuid = ANY(:agent_ids);

-- name: read_message_servers()
SELECT
    jsonb_build_object(
        'id', s.j -> 'id',
        'name', s.j -> 'name',
        'source_type', s.j -> 'source_type',
        'source_id', s.j -> 'source_id',
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', s.j -> 'updated_at'
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.message_servers AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s;

-- name: read_message_server_agents(agent_ids)
SELECT
    jsonb_build_object(
        'message_server_id', coalesce(s.j -> 'message_server_id', s.j -> 'server_id'),
        'agent_id', s.j -> 'agent_id'
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.message_server_agents AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (s.j ->> 'agent_id')::uuid = ANY(:agent_ids);

-- name: read_server_agents(agent_ids)
-- The name of message_server_agents until 1.6.4.
SELECT
    jsonb_build_object(
        'message_server_id', coalesce(s.j -> 'message_server_id', s.j -> 'server_id'),
        'agent_id', s.j -> 'agent_id'
    )::text AS line,
    NULL::text AS note,
    NULL::text AS problem,
    1 AS copies
FROM public.server_agents AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
WHERE :agent_ids::uuid[] IS NULL OR (s.j ->> 'agent_id')::uuid = ANY(:agent_ids);

-- name: read_channels()
-- Ids are text in the original. Two users may have several direct channels there: of those that can be taken the oldest is
-- kept for all.
SELECT DISTINCT ON (canonical.kept_id)
    CASE WHEN problem.text IS NULL THEN jsonb_build_object(
        'id', s.j -> 'id',
        'message_server_id', coalesce(s.j -> 'message_server_id', s.j -> 'server_id'),
        'name', s.j -> 'name',
        'type', s.j -> 'type',
        'source_type', s.j -> 'source_type',
        'source_id', s.j -> 'source_id',
        'topic', s.j -> 'topic',
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', s.j -> 'updated_at'
    )::text ELSE s.j::text END AS line,
    NULL::text AS note,
    problem.text AS problem,
    count(*) OVER (PARTITION BY canonical.kept_id) AS copies
FROM public.channels AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
LEFT JOIN (
    SELECT
        c.id,
        CASE
            WHEN c.type = 'DM' AND c.name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$' AND known.is_id
                THEN first_value(c.id) OVER (
                    PARTITION BY
                        coalesce(to_jsonb(c) ->> 'message_server_id', to_jsonb(c) ->> 'server_id'), c.type, c.name,
                        known.is_id
                    ORDER BY c.created_at, c.id
                )
            ELSE c.id
        END AS kept_id
    FROM public.channels AS c
    CROSS JOIN LATERAL (SELECT c.id::text ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' AS is_id) AS known
) AS canonical ON t.id = canonical.id
CROSS JOIN
    LATERAL (SELECT CASE
        WHEN t.id::text !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN 'its id is no UUID'
    END AS text) AS problem
ORDER BY canonical.kept_id, t.created_at, t.id;

-- name: read_channel_participants()
SELECT DISTINCT ON (coalesce(canonical.kept_id, t.channel_id), coalesce(s.j ->> 'entity_id', s.j ->> 'user_id'))
    CASE WHEN problem.text IS NULL THEN jsonb_build_object(
        'channel_id', coalesce(canonical.kept_id, t.channel_id),
        'entity_id', coalesce(s.j -> 'entity_id', s.j -> 'user_id')
    )::text ELSE s.j::text END AS line,
    NULL::text AS note,
    problem.text AS problem,
    count(*)
        OVER (PARTITION BY coalesce(canonical.kept_id, t.channel_id), coalesce(s.j ->> 'entity_id', s.j ->> 'user_id'))
        AS copies
FROM public.channel_participants AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
LEFT JOIN (
    SELECT
        c.id,
        CASE
            WHEN c.type = 'DM' AND c.name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$' AND known.is_id
                THEN first_value(c.id) OVER (
                    PARTITION BY
                        coalesce(to_jsonb(c) ->> 'message_server_id', to_jsonb(c) ->> 'server_id'), c.type, c.name,
                        known.is_id
                    ORDER BY c.created_at, c.id
                )
            ELSE c.id
        END AS kept_id
    FROM public.channels AS c
    CROSS JOIN LATERAL (SELECT c.id::text ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' AS is_id) AS known
) AS canonical ON t.channel_id = canonical.id
CROSS JOIN
    LATERAL (SELECT CASE
        WHEN
            s.j ->> 'channel_id' !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
            THEN 'its channel is no UUID'
        WHEN
            coalesce(s.j ->> 'entity_id', s.j ->> 'user_id') !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
            THEN 'its entity is no UUID'
    END AS text) AS problem
ORDER BY coalesce(canonical.kept_id, t.channel_id), coalesce(s.j ->> 'entity_id', s.j ->> 'user_id');

-- name: read_central_messages()
SELECT
    CASE WHEN problem.text IS NULL THEN jsonb_build_object(
        'id', s.j -> 'id',
        'channel_id', coalesce(canonical.kept_id, t.channel_id),
        'author_id', s.j -> 'author_id',
        'content', s.j -> 'content',
        'raw_message', s.j -> 'raw_message',
        'in_reply_to_root_message_id',
        CASE
            WHEN
                s.j ->> 'in_reply_to_root_message_id' ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
                THEN s.j -> 'in_reply_to_root_message_id'
        END,
        'source_type', s.j -> 'source_type',
        'source_id', s.j -> 'source_id',
        'metadata', coalesce(nullif(s.j -> 'metadata', 'null'), '{}'),
        'created_at', coalesce(s.j -> 'created_at', s.j -> 'createdAt'),
        'updated_at', s.j -> 'updated_at'
    )::text ELSE s.j::text END AS line,
    nullif(concat_ws(
        '; ',
        CASE
            WHEN
                canonical.kept_id <> t.channel_id
                THEN 'its channel was ' || t.channel_id || ', one of several for two users'
        END,
        CASE
            WHEN
                s.j ->> 'in_reply_to_root_message_id' !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'
                THEN 'the id of the message that it answers is no UUID: ' || (s.j ->> 'in_reply_to_root_message_id')
        END
    ), '') AS note,
    problem.text AS problem,
    1 AS copies
FROM public.central_messages AS t
CROSS JOIN LATERAL (SELECT to_jsonb(t) AS j) AS s
LEFT JOIN (
    SELECT
        c.id,
        CASE
            WHEN c.type = 'DM' AND c.name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$' AND known.is_id
                THEN first_value(c.id) OVER (
                    PARTITION BY
                        coalesce(to_jsonb(c) ->> 'message_server_id', to_jsonb(c) ->> 'server_id'), c.type, c.name,
                        known.is_id
                    ORDER BY c.created_at, c.id
                )
            ELSE c.id
        END AS kept_id
    FROM public.channels AS c
    CROSS JOIN LATERAL (SELECT c.id::text ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' AS is_id) AS known
) AS canonical ON t.channel_id = canonical.id
CROSS JOIN LATERAL (SELECT CASE
    WHEN s.j ->> 'id' !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN 'its id is no UUID'
    WHEN s.j ->> 'channel_id' !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN 'its channel is no UUID'
    WHEN s.j ->> 'author_id' !~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$' THEN 'its author is no UUID'
END AS text) AS problem;

-- name: read_embeddings(agent_ids, agents, dimensions)
-- One vector for each memory, of its agent's width where there is one, and of several the newest. What is sorted are the
-- ids: with the vectors beside them 20,000 rows went through 30 MB on disk, twice.
SELECT
    chosen.memory_id,
    chosen.agent_id,
    chosen.dimension,
    CASE chosen.dimension
        WHEN 384 THEN e.dim_384
        WHEN 512 THEN e.dim_512
        WHEN 768 THEN e.dim_768
        WHEN 1024 THEN e.dim_1024
        WHEN 1536 THEN e.dim_1536
        WHEN 3072 THEN e.dim_3072
    END AS embedding,
    concat_ws(
        ', ',
        CASE WHEN e.dim_384 IS NOT NULL THEN '384' END,
        CASE WHEN e.dim_512 IS NOT NULL THEN '512' END,
        CASE WHEN e.dim_768 IS NOT NULL THEN '768' END,
        CASE WHEN e.dim_1024 IS NOT NULL THEN '1024' END,
        CASE WHEN e.dim_1536 IS NOT NULL THEN '1536' END,
        CASE WHEN e.dim_3072 IS NOT NULL THEN '3072' END
    ) AS widths,
    chosen.copies
FROM (
    SELECT DISTINCT ON (v.agent_id, v.memory_id)
        v.id,
        v.memory_id,
        v.agent_id,
        v.dimension,
        count(*) OVER (PARTITION BY v.agent_id, v.memory_id) AS copies
    FROM (
        SELECT
            w.id,
            w.memory_id,
            w.created_at,
            owned.agent_id,
            g.dimension,
            CASE g.dimension
                WHEN 384 THEN w.dim_384 IS NOT NULL
                WHEN 512 THEN w.dim_512 IS NOT NULL
                WHEN 768 THEN w.dim_768 IS NOT NULL
                WHEN 1024 THEN w.dim_1024 IS NOT NULL
                WHEN 1536 THEN w.dim_1536 IS NOT NULL
                WHEN 3072 THEN w.dim_3072 IS NOT NULL
            END AS fits
        FROM public.embeddings AS w
        LEFT JOIN (
            SELECT known.*
            FROM (SELECT NULL::uuid AS agent_id, NULL::uuid AS "agentId") AS absent
            CROSS JOIN LATERAL (SELECT id, coalesce(agent_id, "agentId") AS agent_id FROM public.memories) AS known
        ) AS owned ON w.memory_id = owned.id
        LEFT JOIN unnest(:agents::uuid[], :dimensions::smallint[]) AS g (agent_id, dimension)
            ON owned.agent_id = g.agent_id
        WHERE :agent_ids::uuid[] IS NULL OR owned.agent_id = ANY(:agent_ids)
        OFFSET 0
    ) AS v
    ORDER BY v.agent_id ASC, v.memory_id ASC, v.fits DESC NULLS LAST, v.created_at DESC, v.id DESC
) AS chosen
INNER JOIN public.embeddings AS e ON chosen.id = e.id;
