-- Agents. The only table whose rows are not scoped to the adapter's agent: an adapter may look after others.

-- name: get_agents_by_ids(ids)
SELECT
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
FROM elizasql.agents
WHERE id = ANY(:ids::uuid []);

-- name: create_agents(agents)
-- Creates the agents whose id is not there yet and gives their ids. An agent that is there stays as it is.
INSERT INTO elizasql.agents (
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
)
SELECT
    id, name, username, system, coalesce(bio, '[]'), coalesce(message_examples, '[]'), coalesce(post_examples, '[]'),
    coalesce(topics, '[]'), coalesce(adjectives, '[]'), coalesce(knowledge, '[]'), coalesce(plugins, '[]'),
    coalesce(settings, '{}'), coalesce(style, '{}'), coalesce(enabled, TRUE), server_id, coalesce(created_at, now()),
    coalesce(updated_at, created_at, now())
FROM jsonb_populate_recordset(NULL::elizasql.agents, :agents::jsonb)
ORDER BY id
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: ensure_agent(agent)^
-- Creates the agent or finds it, in one statement: of concurrent calls all get the same row.
-- The update changes nothing; it makes the row that is there come back.
INSERT INTO elizasql.agents AS a (
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at
)
SELECT
    id, name, username, system, coalesce(bio, '["An AI agent"]'), coalesce(message_examples, '[]'),
    coalesce(post_examples, '[]'), coalesce(topics, '[]'), coalesce(adjectives, '[]'), coalesce(knowledge, '[]'),
    coalesce(plugins, '[]'), coalesce(settings, '{}'), coalesce(style, '{}'), coalesce(enabled, TRUE), server_id,
    coalesce(created_at, now()), coalesce(updated_at, created_at, now())
FROM jsonb_populate_record(NULL::elizasql.agents, :agent::jsonb)
ON CONFLICT (id) DO UPDATE SET id = a.id
RETURNING
    id, name, username, system, bio, message_examples, post_examples, topics, adjectives, knowledge, plugins, settings,
    style, enabled, server_id, created_at, updated_at;

-- name: delete_agents(ids)
-- Deletes agents and, by cascade, everything that is theirs; gives the ids that were there.
DELETE FROM elizasql.agents
WHERE id = ANY(:ids::uuid [])
RETURNING id;
