-- Moving data in and out. export_X gives the rows of a table as JSON text; import_X takes them back.
--
-- An import leaves rows that are there already as they are, and refuses those that have nothing to point at or whose
-- place another row has: it gives how many were created, and of each that was refused its position, what is the matter
-- and the id that is missing. A second import of the same rows changes nothing and counts nothing as created; so each runs
-- in a transaction whose lost end is settled.
--
-- In a row of JSON a null may be no value or JSON's own null: where the column must have a value, it is the latter.

-- name: export_servers(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.servers AS t
WHERE :agent_id::uuid IS NULL OR t.id = (SELECT a.server_id FROM elizasql.agents AS a WHERE a.id = :agent_id)
ORDER BY t.id;

-- name: import_servers(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        NULL::text AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.servers, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.servers AS i (
        id, created_at, updated_at
    )
    SELECT
        g.id, g.created_at, g.updated_at
    FROM given AS g
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', NULL
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE
    NOT EXISTS (SELECT FROM created AS c WHERE c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.servers AS t WHERE t.id = g.id);

-- name: export_agents(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.agents AS t
WHERE t.id = :agent_id
ORDER BY t.id;

-- name: import_agents(rows)^
-- An agent that is there and has no width of embeddings gets the one of the archive.
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        NULL::text AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.agents, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.agents AS i (
        id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
        settings, style, enabled, server_id, embedding_dimension, created_at, updated_at
    )
    SELECT
        g.id, g.name, g.username, g.system, coalesce(g.bio, 'null'), coalesce(g.message_examples, 'null'),
        coalesce(g.post_examples, 'null'), coalesce(g.topics, 'null'), coalesce(g.adjectives, 'null'),
        coalesce(g.knowledge, 'null'), coalesce(g.plugins, 'null'), coalesce(g.settings, 'null'),
        coalesce(g.style, 'null'), g.enabled, g.server_id, g.embedding_dimension, g.created_at, g.updated_at
    FROM given AS g
    ORDER BY g.ordinality
    ON CONFLICT (id) DO UPDATE
        SET embedding_dimension = excluded.embedding_dimension
        WHERE i.embedding_dimension IS NULL AND excluded.embedding_dimension IS NOT NULL
    RETURNING i.id, i.xmax = 0 AS is_new
)

SELECT
    (SELECT count(*) FROM created WHERE is_new) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', NULL
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE
    NOT EXISTS (SELECT FROM created AS c WHERE c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.agents AS t WHERE t.id = g.id);

-- name: export_worlds(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.worlds AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_worlds(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.worlds, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.worlds AS i (
        agent_id, id, name, message_server_id, metadata, created_at
    )
    SELECT
        g.agent_id, g.id, g.name, g.message_server_id, coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.worlds AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_rooms(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.rooms AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_rooms(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
            WHEN
                g.world_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.worlds AS p WHERE p.agent_id = g.agent_id AND p.id = g.world_id)
                THEN 'world_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.rooms, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.rooms AS i (
        agent_id, id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
    )
    SELECT
        g.agent_id, g.id, g.name, g.source, g.type, g.channel_id, g.message_server_id, g.world_id,
        coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'agent_id' THEN g.agent_id
                WHEN 'world_id' THEN g.world_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.rooms AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_entities(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.entities AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_entities(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.entities, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.entities AS i (
        agent_id, id, names, metadata, created_at
    )
    SELECT
        g.agent_id, g.id, g.names, coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.entities AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_participants(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.participants AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_participants(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN g.agent_id IS NULL THEN 'agent_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.rooms AS p WHERE p.agent_id = g.agent_id AND p.id = g.room_id)
                THEN 'room_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.entity_id)
                THEN 'entity_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.participants, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.participants AS i (
        agent_id, room_id, entity_id, id, room_state, metadata, created_at
    )
    SELECT
        g.agent_id, g.room_id, g.entity_id, g.id, g.room_state, coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'room_id' THEN g.room_id
                WHEN 'entity_id' THEN g.entity_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.participants AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_components(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.components AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_components(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.entity_id)
                THEN 'entity_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.rooms AS p WHERE p.agent_id = g.agent_id AND p.id = g.room_id)
                THEN 'room_id'
            WHEN
                g.world_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.worlds AS p WHERE p.agent_id = g.agent_id AND p.id = g.world_id)
                THEN 'world_id'
            WHEN
                g.source_entity_id IS NOT NULL
                AND NOT EXISTS (
                    SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.source_entity_id
                )
                THEN 'source_entity_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.components, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.components AS i (
        agent_id, id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
    )
    SELECT
        g.agent_id, g.id, g.entity_id, g.room_id, g.world_id, g.source_entity_id, g.type, coalesce(g.data, 'null'),
        g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'entity_id' THEN g.entity_id
                WHEN 'room_id' THEN g.room_id
                WHEN 'world_id' THEN g.world_id
                WHEN 'source_entity_id' THEN g.source_entity_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.components AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_relationships(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.relationships AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_relationships(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN
                NOT EXISTS (
                    SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.source_entity_id
                )
                THEN 'source_entity_id'
            WHEN
                NOT EXISTS (
                    SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.target_entity_id
                )
                THEN 'target_entity_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.relationships, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.relationships AS i (
        agent_id, id, source_entity_id, target_entity_id, tags, metadata, created_at
    )
    SELECT
        g.agent_id, g.id, g.source_entity_id, g.target_entity_id, g.tags, coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'source_entity_id' THEN g.source_entity_id
                WHEN 'target_entity_id' THEN g.target_entity_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.relationships AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_memories(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.memories AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_memories(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
            WHEN
                g.entity_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.entity_id)
                THEN 'entity_id'
            WHEN
                g.room_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.rooms AS p WHERE p.agent_id = g.agent_id AND p.id = g.room_id)
                THEN 'room_id'
            WHEN
                g.world_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.worlds AS p WHERE p.agent_id = g.agent_id AND p.id = g.world_id)
                THEN 'world_id'
            WHEN NOT (g.metadata ->> 'type' <> 'fragment' OR (g.metadata ? 'documentId' AND g.metadata ? 'position'))
                THEN 'fragment'
            WHEN NOT (g.metadata ->> 'type' <> 'document' OR g.metadata ? 'timestamp') THEN 'document'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.memories, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.memories AS i (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    SELECT
        g.agent_id, g.id, g.type, g.created_at, coalesce(g.content, 'null'), g.entity_id, g.room_id, g.world_id,
        g."unique", coalesce(g.metadata, 'null')
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'agent_id' THEN g.agent_id
                WHEN 'entity_id' THEN g.entity_id
                WHEN 'room_id' THEN g.room_id
                WHEN 'world_id' THEN g.world_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.memories AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_cache(agent_id)
SELECT (to_jsonb(t) - 'key_hash')::text AS line
FROM elizasql.cache AS t
WHERE t.agent_id = :agent_id
ORDER BY t.key;

-- name: import_cache(rows)^
-- What has expired is not there, and stands in nobody's way, unless what comes has expired as well.
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.cache, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.cache AS i (
        agent_id, key, value, created_at, expires_at
    )
    SELECT
        g.agent_id, g.key, coalesce(g.value, 'null'), g.created_at, g.expires_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT (agent_id, key_hash) DO UPDATE
        SET
            value = excluded.value,
            created_at = excluded.created_at,
            expires_at = excluded.expires_at
        WHERE i.expires_at <= now() AND coalesce(excluded.expires_at, 'infinity') > now()
    RETURNING i.agent_id, i.key
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.key = g.key)
    AND NOT EXISTS (SELECT FROM elizasql.cache AS t WHERE t.agent_id = g.agent_id AND t.key = g.key)
);

-- name: export_tasks(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.tasks AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_tasks(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.tasks, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.tasks AS i (
        agent_id, id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at,
        due_at, ready_at, attempts, max_attempts, claim_token, claimed_by, error
    )
    SELECT
        g.agent_id, g.id, g.name, g.description, g.room_id, g.world_id, g.entity_id, g.tags,
        coalesce(g.metadata, 'null'), g.created_at, g.updated_at, g.due_at, g.ready_at, g.attempts, g.max_attempts,
        g.claim_token, g.claimed_by, g.error
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.tasks AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_goals(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.goals AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_goals(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
            WHEN
                g.room_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.rooms AS p WHERE p.agent_id = g.agent_id AND p.id = g.room_id)
                THEN 'room_id'
            WHEN
                g.entity_id IS NOT NULL
                AND NOT EXISTS (SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.entity_id)
                THEN 'entity_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.goals, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.goals AS i (
        agent_id, id, room_id, entity_id, name, status, objectives, created_at, updated_at
    )
    SELECT
        g.agent_id, g.id, g.room_id, g.entity_id, g.name, g.status, coalesce(g.objectives, 'null'), g.created_at,
        g.updated_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'agent_id' THEN g.agent_id
                WHEN 'room_id' THEN g.room_id
                WHEN 'entity_id' THEN g.entity_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.goals AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_logs(agent_id)
SELECT (to_jsonb(t) - 'run_id' - 'run_status')::text AS line
FROM elizasql.logs AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_logs(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN g.agent_id IS NULL THEN 'agent_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.entities AS p WHERE p.agent_id = g.agent_id AND p.id = g.entity_id)
                THEN 'entity_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.rooms AS p WHERE p.agent_id = g.agent_id AND p.id = g.room_id)
                THEN 'room_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.logs, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.logs AS i (
        agent_id, id, entity_id, room_id, type, body, created_at
    )
    SELECT
        g.agent_id, g.id, g.entity_id, g.room_id, g.type, coalesce(g.body, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'agent_id', g.agent_id,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'entity_id' THEN g.entity_id
                WHEN 'room_id' THEN g.room_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.logs AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_pairing_requests(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.pairing_requests AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_pairing_requests(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.pairing_requests, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.pairing_requests AS i (
        agent_id, id, channel, sender_id, code, metadata, created_at, last_seen_at
    )
    SELECT
        g.agent_id, g.id, g.channel, g.sender_id, g.code, coalesce(g.metadata, 'null'), g.created_at, g.last_seen_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.pairing_requests AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_pairing_allowlist(agent_id)
SELECT to_jsonb(t)::text AS line
FROM elizasql.pairing_allowlist AS t
WHERE t.agent_id = :agent_id
ORDER BY t.id;

-- name: import_pairing_allowlist(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.pairing_allowlist, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.pairing_allowlist AS i (
        agent_id, id, channel, sender_id, metadata, created_at
    )
    SELECT
        g.agent_id, g.id, g.channel, g.sender_id, coalesce(g.metadata, 'null'), g.created_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.agent_id, i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'agent_id' THEN g.agent_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.agent_id = g.agent_id AND c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.pairing_allowlist AS t WHERE t.agent_id = g.agent_id AND t.id = g.id)
);

-- name: export_message_servers(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.message_servers AS t
WHERE
    :agent_id::uuid IS NULL OR t.id IN (
        SELECT m.message_server_id FROM elizasql.message_server_agents AS m WHERE m.agent_id = :agent_id
    )
ORDER BY t.id;

-- name: import_message_servers(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        NULL::text AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.message_servers, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.message_servers AS i (
        id, name, source_type, source_id, metadata, created_at, updated_at
    )
    SELECT
        g.id, g.name, g.source_type, g.source_id, coalesce(g.metadata, 'null'), g.created_at, g.updated_at
    FROM given AS g
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', NULL
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE
    NOT EXISTS (SELECT FROM created AS c WHERE c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.message_servers AS t WHERE t.id = g.id);

-- name: export_message_server_agents(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.message_server_agents AS t
WHERE :agent_id::uuid IS NULL OR t.agent_id = :agent_id
ORDER BY t.message_server_id, t.agent_id;

-- name: import_message_server_agents(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.message_servers AS p WHERE p.id = g.message_server_id)
                THEN 'message_server_id'
            WHEN NOT EXISTS (SELECT FROM elizasql.agents AS p WHERE p.id = g.agent_id)
                THEN 'agent_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.message_server_agents, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.message_server_agents AS i (
        message_server_id, agent_id
    )
    SELECT
        g.message_server_id, g.agent_id
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.message_server_id, i.agent_id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem
                WHEN 'message_server_id' THEN g.message_server_id
                WHEN 'agent_id' THEN g.agent_id
            END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.message_server_id = g.message_server_id AND c.agent_id = g.agent_id)
    AND NOT EXISTS (
        SELECT
        FROM elizasql.message_server_agents AS t
        WHERE t.message_server_id = g.message_server_id AND t.agent_id = g.agent_id
    )
);

-- name: export_channels(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.channels AS t
WHERE
    :agent_id::uuid IS NULL OR t.message_server_id IN (
        SELECT m.message_server_id FROM elizasql.message_server_agents AS m WHERE m.agent_id = :agent_id
    )
ORDER BY t.id;

-- name: import_channels(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.message_servers AS p WHERE p.id = g.message_server_id)
                THEN 'message_server_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.channels, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.channels AS i (
        id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
    )
    SELECT
        g.id, g.message_server_id, g.name, g.type, g.source_type, g.source_id, g.topic,
        coalesce(g.metadata, 'null'), g.created_at, g.updated_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'message_server_id' THEN g.message_server_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.channels AS t WHERE t.id = g.id)
);

-- name: export_channel_participants(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.channel_participants AS t
WHERE
    :agent_id::uuid IS NULL OR t.channel_id IN (
        SELECT c.id
        FROM elizasql.channels AS c
        INNER JOIN elizasql.message_server_agents AS m ON c.message_server_id = m.message_server_id
        WHERE m.agent_id = :agent_id
    )
ORDER BY t.channel_id, t.entity_id;

-- name: import_channel_participants(rows)^
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.channels AS p WHERE p.id = g.channel_id)
                THEN 'channel_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.channel_participants, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.channel_participants AS i (
        channel_id, entity_id
    )
    SELECT
        g.channel_id, g.entity_id
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.channel_id, i.entity_id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'channel_id' THEN g.channel_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.channel_id = g.channel_id AND c.entity_id = g.entity_id)
    AND NOT EXISTS (
        SELECT FROM elizasql.channel_participants AS t WHERE t.channel_id = g.channel_id AND t.entity_id = g.entity_id
    )
);

-- name: export_central_messages(agent_id)
-- Those that concern an agent, or all.
SELECT to_jsonb(t)::text AS line
FROM elizasql.central_messages AS t
WHERE
    :agent_id::uuid IS NULL OR t.channel_id IN (
        SELECT c.id
        FROM elizasql.channels AS c
        INNER JOIN elizasql.message_server_agents AS m ON c.message_server_id = m.message_server_id
        WHERE m.agent_id = :agent_id
    )
ORDER BY t.id;

-- name: import_central_messages(rows)^
-- Without what they answer: that may come later, and import_replies adds it.
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        CASE
            WHEN NOT EXISTS (SELECT FROM elizasql.channels AS p WHERE p.id = g.channel_id)
                THEN 'channel_id'
        END AS problem
    FROM jsonb_populate_recordset(NULL::elizasql.central_messages, :rows::jsonb) WITH ORDINALITY AS g
),

created AS (
    INSERT INTO elizasql.central_messages AS i (
        id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id,
        metadata, created_at, updated_at
    )
    SELECT
        g.id, g.channel_id, g.author_id, g.content, g.raw_message, NULL, g.source_type,
        g.source_id, coalesce(g.metadata, 'null'), g.created_at, g.updated_at
    FROM given AS g
    WHERE g.problem IS NULL
    ORDER BY g.ordinality
    ON CONFLICT DO NOTHING
    RETURNING i.id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', coalesce(g.problem, 'place'),
            'missing', CASE g.problem WHEN 'channel_id' THEN g.channel_id END
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.problem IS NOT NULL OR (
    NOT EXISTS (SELECT FROM created AS c WHERE c.id = g.id)
    AND NOT EXISTS (SELECT FROM elizasql.central_messages AS t WHERE t.id = g.id)
);

-- name: import_replies(rows)^
-- Says of messages that were imported which message they answer, unless something else was said since; refused are those
-- whose answered message is not there.
WITH given AS MATERIALIZED (
    SELECT g.*
    FROM jsonb_populate_recordset(NULL::elizasql.central_messages, :rows::jsonb) WITH ORDINALITY AS g
    WHERE g.in_reply_to_root_message_id IS NOT NULL
),

answered AS (
    UPDATE elizasql.central_messages AS m
    SET in_reply_to_root_message_id = g.in_reply_to_root_message_id
    FROM given AS g
    WHERE
        m.id = g.id AND m.in_reply_to_root_message_id IS NULL AND m.content = g.content
        AND m.created_at = g.created_at AND m.updated_at = g.updated_at
        AND EXISTS (SELECT FROM elizasql.central_messages AS r WHERE r.id = g.in_reply_to_root_message_id)
    RETURNING m.id
)

SELECT
    (SELECT count(*) FROM answered) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object(
            'position', g.ordinality - 1,
            'problem', 'reply',
            'missing', g.in_reply_to_root_message_id
        )
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
INNER JOIN elizasql.central_messages AS m ON g.id = m.id
WHERE
    m.in_reply_to_root_message_id IS NULL AND m.content = g.content
    AND m.created_at = g.created_at AND m.updated_at = g.updated_at
    AND NOT EXISTS (SELECT FROM elizasql.central_messages AS r WHERE r.id = g.in_reply_to_root_message_id);

-- name: export_embeddings(agent_id)
-- Without the scope, which is the memory's, and without what the index and the resident tier note down.
SELECT
    e.memory_id,
    e.dim_384 AS embedding
FROM elizasql.embeddings AS e
WHERE e.agent_id = :agent_id AND e.dimension = 384
ORDER BY e.memory_id;

-- name: import_embeddings(agent_id, ids, embeddings)^
-- Each memory is looked up: joined without LIMIT 1, every chunk would read all memories of the agent.
-- The locks, in the order of the ids, see to it that a change of scope comes before this or finds what this has stored.
WITH given AS MATERIALIZED (
    SELECT
        g.*,
        m.agent_id,
        m.type,
        m.room_id,
        m.world_id,
        m.entity_id,
        m."unique"
    FROM (
        SELECT * FROM unnest(:ids::uuid[], :embeddings::vector[]) WITH ORDINALITY AS u (id, embedding, ordinality)
        ORDER BY u.id
    ) AS g
    LEFT JOIN
        LATERAL (
            SELECT * FROM elizasql.memories AS of_id
            WHERE of_id.agent_id = :agent_id AND of_id.id = g.id
            LIMIT 1
            FOR SHARE
        ) AS m
        ON TRUE
),

created AS (
    INSERT INTO elizasql.embeddings (
        agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, dim_384
    )
    SELECT g.agent_id, g.id, g.type, g.room_id, g.world_id, g.entity_id, g."unique", 384, g.embedding
    FROM given AS g
    WHERE g.agent_id IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING memory_id
)

SELECT
    (SELECT count(*) FROM created) AS created,
    coalesce(jsonb_agg(
        jsonb_build_object('position', g.ordinality - 1, 'problem', 'memory_id', 'missing', g.id)
        ORDER BY g.ordinality
    ), '[]') AS refused
FROM given AS g
WHERE g.agent_id IS NULL;

-- name: prepare_snapshot()
-- For a transaction that reads a whole database: no limit of the server's own ends it while somebody else is slow, and a
-- query whose rows a policy would hide is refused, where it would give the others. A time without a zone is UTC.
-- The extension is found wherever it is.
SELECT
    set_config('row_security', 'off', TRUE),
    set_config('statement_timeout', '0', TRUE),
    set_config('idle_in_transaction_session_timeout', '0', TRUE),
    CASE
        WHEN current_setting('transaction_timeout', TRUE) IS NOT NULL
            THEN set_config('transaction_timeout', '0', TRUE)
    END,
    set_config('TimeZone', 'UTC', TRUE),
    (
        SELECT set_config('search_path', found.path, TRUE)
        FROM (
            SELECT quote_ident(n.nspname) AS path
            FROM pg_extension AS x
            INNER JOIN pg_namespace AS n ON x.extnamespace = n.oid
            WHERE x.extname = 'vector'
        ) AS found
    );

-- name: list_agents_for_export(agent_ids)
-- These agents, or all, with what there is to move of each.
SELECT
    a.id,
    a.name,
    a.embedding_dimension AS dimension,
    (SELECT count(*) FROM elizasql.memories AS m WHERE m.agent_id = a.id) AS memories,
    (
        SELECT count(*) FROM elizasql.embeddings AS e WHERE e.agent_id = a.id AND e.dimension = a.embedding_dimension
    ) AS embeddings
FROM elizasql.agents AS a
WHERE :agent_ids::uuid[] IS NULL OR a.id = ANY(:agent_ids)
ORDER BY a.created_at, a.id;

-- name: get_dimensions_of(agent_ids)
SELECT
    id,
    embedding_dimension AS dimension
FROM elizasql.agents
WHERE id = ANY(:agent_ids::uuid[]);

-- name: delete_everything()!
-- Empties the database, for tests: whatever belongs to an agent goes with it.
WITH agents AS (DELETE FROM elizasql.agents),

message_servers AS (DELETE FROM elizasql.message_servers)

DELETE FROM elizasql.servers;
