-- Agents. Like messaging, and nothing else, not scoped to the adapter's agent: an adapter may look after others.
-- Times are the statement's, as in messaging.sql.

-- name: get_agents_by_ids(ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id.
SELECT a.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT
            id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
            settings, style, enabled, server_id, created_at, updated_at
        FROM elizasql.agents
        WHERE id = given.id
        LIMIT 1
    ) AS a
ORDER BY given.position;

-- name: look_at_agent(agent_id)^
-- What an adapter needs to know: which migrations are applied; and of its agent, there or not yet, the width that it is locked
-- to, and what the names of the partitions with its rows end in. Null where these must not be named: rows are guarded by
-- policies, which hold for the table that is named alone, or the role may not use every partition. Guarded: whether such
-- policies hold for the role.
SELECT
    (SELECT embedding_dimension FROM elizasql.agents WHERE id = :agent_id) AS dimension,
    row_security_active('elizasql.memories') OR row_security_active('elizasql.embeddings') AS guarded,
    ARRAY(SELECT version::text FROM elizasql.schema_migrations) AS versions,
    (
        SELECT part.name
        FROM (SELECT substring(elizasql.partition_of(:agent_id), '_p[0-9]+$') AS name) AS part
        WHERE
            NOT EXISTS (
                SELECT FROM pg_class
                WHERE
                    oid IN (
                        'elizasql.memories'::regclass, to_regclass(format('elizasql.memories%s', part.name)),
                        'elizasql.embeddings'::regclass, to_regclass(format('elizasql.embeddings%s', part.name))
                    )
                    AND relrowsecurity
            )
            AND (
                SELECT
                    bool_and(coalesce(has_table_privilege(
                        to_regclass(format('elizasql.%s%s', partitioned.name, part.name)), needed.privilege
                    ), FALSE))
                FROM (VALUES ('memories'), ('embeddings')) AS partitioned (name)
                CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE')) AS needed (privilege)
            )
    ) AS partition;

-- name: get_agents(count, skipped)
-- All agents, oldest first.
SELECT
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
FROM elizasql.agents
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skipped::bigint;

-- name: count_agents()$
SELECT count(*) FROM elizasql.agents;

-- name: create_agents(agents)
-- Creates the agents whose id is not there yet and gives their ids. An agent that is there stays as it is.
-- Not repeatable: a second run finds what the first one made, and says that it was there.
INSERT INTO elizasql.agents (
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
)
SELECT
    id, name, username, system, coalesce(bio, '[]'), coalesce(message_examples, '[]'), coalesce(post_examples, '[]'),
    coalesce(topics, '[]'), coalesce(adjectives, '[]'), coalesce(knowledge, '[]'), coalesce(plugins, '[]'),
    coalesce(settings, '{}'), coalesce(style, '{}'), coalesce(enabled, TRUE), server_id,
    coalesce(created_at, statement_timestamp()), coalesce(updated_at, created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.agents, :agents::jsonb)
ORDER BY id
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: ensure_agent(agent)^
-- Finds the agent or creates it, in one statement: of concurrent calls all get the same row. One that is there is only
-- read, and so waits for nobody. The update changes nothing: it makes an agent come back that was made since the statement
-- began.
WITH found AS MATERIALIZED (
    SELECT
        id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
        settings, style, enabled, server_id, created_at, updated_at
    FROM elizasql.agents
    WHERE id = (:agent::jsonb ->> 'id')::uuid
),

created AS (
    INSERT INTO elizasql.agents AS a (
        id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
        settings, style, enabled, server_id, created_at, updated_at
    )
    SELECT
        id, name, username, system, coalesce(bio, '["An AI agent"]'), coalesce(message_examples, '[]'),
        coalesce(post_examples, '[]'), coalesce(topics, '[]'), coalesce(adjectives, '[]'), coalesce(knowledge, '[]'),
        coalesce(plugins, '[]'), coalesce(settings, '{}'), coalesce(style, '{}'), coalesce(enabled, TRUE), server_id,
        coalesce(created_at, statement_timestamp()), coalesce(updated_at, created_at, statement_timestamp())
    FROM jsonb_populate_record(NULL::elizasql.agents, :agent::jsonb)
    WHERE NOT EXISTS (SELECT FROM found)
    ON CONFLICT (id) DO UPDATE SET name = a.name
    RETURNING
        id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
        settings, style, enabled, server_id, created_at, updated_at
)

SELECT * FROM found
UNION ALL
SELECT * FROM created;

-- name: upsert_agents(agents)!
-- Creates agents, or changes the fields that are given of those that are there, as update_agents does. agents: an
-- object by id. jsonb_populate_record keeps what the row has wherever a key is not given.
INSERT INTO elizasql.agents AS a (
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
)
SELECT
    g.id, g.name, g.username, g.system, coalesce(g.bio, '[]'), coalesce(g.message_examples, '[]'),
    coalesce(g.post_examples, '[]'), coalesce(g.topics, '[]'), coalesce(g.adjectives, '[]'),
    coalesce(g.knowledge, '[]'), coalesce(g.plugins, '[]'), coalesce(g.settings, '{}'), coalesce(g.style, '{}'),
    coalesce(g.enabled, TRUE), g.server_id, coalesce(g.created_at, statement_timestamp()),
    coalesce(g.updated_at, g.created_at, statement_timestamp())
FROM jsonb_each(:agents::jsonb) AS given (id, agent)
CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.agents, given.agent) AS g
ORDER BY g.id
ON CONFLICT (id) DO UPDATE
    SET
        (
            name,
            username,
            system,
            bio,
            message_examples,
            post_examples,
            topics,
            adjectives,
            knowledge,
            plugins,
            settings,
            style, enabled, server_id, created_at, updated_at
        ) = (
            SELECT
                n.name, n.username, n.system, coalesce(n.bio, '[]'), coalesce(n.message_examples, '[]'),
                coalesce(n.post_examples, '[]'), coalesce(n.topics, '[]'), coalesce(n.adjectives, '[]'),
                coalesce(n.knowledge, '[]'), coalesce(n.plugins, '[]'),
                coalesce(elizasql.merge_settings(a.settings, coalesce(g.agent -> 'settings', '{}')), '{}'),
                coalesce(n.style, '{}'), n.enabled, n.server_id, elizasql.changed_time(a.created_at, n.created_at),
                statement_timestamp()
            FROM (SELECT :agents::jsonb -> excluded.id::text AS agent) AS g
            CROSS JOIN LATERAL jsonb_populate_record(a, g.agent) AS n
        );

-- name: update_agents(agents, required)
-- Changes the fields that are given, settings by merging; gives the ids that were there. required: an agent that is not
-- there undoes the statement. A concurrent update is waited for and then built upon: no setting is lost. ANY keeps it
-- a lookup for each id, where a join of few agents would read them all.
WITH given AS MATERIALIZED (
    SELECT (g.agent ->> 'id')::uuid AS id, g.agent
    FROM jsonb_array_elements(:agents::jsonb) AS g (agent)
),

updated AS (
    UPDATE elizasql.agents AS a
    SET
        (
            name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins,
            settings, style, enabled, server_id, created_at, updated_at
        ) = (
            SELECT
                n.name, n.username, n.system, coalesce(n.bio, '[]'), coalesce(n.message_examples, '[]'),
                coalesce(n.post_examples, '[]'), coalesce(n.topics, '[]'), coalesce(n.adjectives, '[]'),
                coalesce(n.knowledge, '[]'), coalesce(n.plugins, '[]'),
                coalesce(elizasql.merge_settings(a.settings, coalesce(g.agent -> 'settings', '{}')), '{}'),
                coalesce(n.style, '{}'), n.enabled, n.server_id, elizasql.changed_time(a.created_at, n.created_at),
                statement_timestamp()
            FROM jsonb_populate_record(a, g.agent) AS n
        )
    FROM given AS g
    WHERE a.id = g.id AND a.id = ANY(ARRAY(SELECT id FROM given))
    RETURNING a.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('agents', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_agents(ids)$
-- Deletes agents and, by cascade, everything that is theirs; gives how many there were.
-- Not repeatable: a second run finds nothing left to delete.
WITH deleted AS (
    DELETE FROM elizasql.agents
    WHERE id = ANY(:ids::uuid[])
    RETURNING id
)

SELECT count(*) FROM deleted;

-- name: cleanup_agents(agent_id, older_than)$
-- Deletes the agents that were not updated for so long, except the adapter's own; gives how many.
-- Not repeatable: a second run finds nothing left to delete.
WITH deleted AS (
    DELETE FROM elizasql.agents
    WHERE updated_at < statement_timestamp() - :older_than::interval AND id <> :agent_id
    RETURNING id
)

SELECT count(*) FROM deleted;
