-- Who may write to the agent: pairing requests and allowlists, by channel. Times are the statement's, as in messaging.sql.

-- name: get_pairing_requests(agent_id, channels)
-- The requests of each channel, oldest first; position: which channel. OFFSET keeps the join a lookup for each channel.
SELECT
    r.*,
    given.position
FROM unnest(:channels::text[]) WITH ORDINALITY AS given (channel, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, channel, sender_id, code, metadata, created_at, last_seen_at
        FROM elizasql.pairing_requests
        WHERE agent_id = :agent_id AND channel = given.channel
        OFFSET 0
    ) AS r
ORDER BY given.position, r.created_at, r.id;

-- name: create_pairing_requests(agent_id, requests)!
-- A request that is there already stays as it is; another one of the same code or sender is an error.
INSERT INTO elizasql.pairing_requests (
    agent_id, id, channel, sender_id, code, metadata, created_at, last_seen_at
)
SELECT
    :agent_id, id, channel, sender_id, code, coalesce(metadata, '{}'), coalesce(created_at, statement_timestamp()),
    coalesce(last_seen_at, created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.pairing_requests, :requests::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: update_pairing_requests(agent_id, requests, required)
-- Changes the time and the metadata that are given; gives the ids that were there. required: one that is not undoes the
-- statement. Rows are locked in the order of the ids, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT r.*, g.request
    FROM jsonb_array_elements(:requests::jsonb) AS g (request)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.pairing_requests, g.request) AS r
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id AS agent, given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id
            FROM elizasql.pairing_requests
            WHERE agent_id = :agent_id AND id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.pairing_requests AS r
    SET
        last_seen_at = elizasql.changed_time(r.last_seen_at, g.last_seen_at),
        metadata = CASE WHEN g.request ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE r.metadata END
    FROM locked AS g
    WHERE r.agent_id = g.agent AND r.id = g.id
    RETURNING r.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('pairing_requests', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_pairing_requests(agent_id, ids)$
-- Gives how many went.
-- Not repeatable: a second run finds nothing left to delete.
WITH locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM unnest(:ids::uuid[]) AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.pairing_requests
            WHERE agent_id = :agent_id AND id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.pairing_requests AS r
    USING locked
    WHERE r.agent_id = locked.agent_id AND r.id = locked.id
    RETURNING r.id
)

SELECT count(*) FROM deleted;

-- name: get_pairing_allowlists(agent_id, channels)
-- The entries of each channel, oldest first; position: which channel. OFFSET keeps the join a lookup for each channel.
SELECT
    a.*,
    given.position
FROM unnest(:channels::text[]) WITH ORDINALITY AS given (channel, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, channel, sender_id, metadata, created_at
        FROM elizasql.pairing_allowlist
        WHERE agent_id = :agent_id AND channel = given.channel
        OFFSET 0
    ) AS a
ORDER BY given.position, a.created_at, a.id;

-- name: create_pairing_allowlist_entries(agent_id, entries)
-- Gives for each id the one that its sender is listed under: an entry that is there already stays as it is, and of two
-- for one sender the first counts. The update changes nothing: it makes an entry come back that was made since the
-- statement began.
WITH given AS MATERIALIZED (
    SELECT
        g.id,
        g.channel,
        g.sender_id,
        g.metadata,
        g.created_at,
        g.position,
        of_sender.id AS of_sender,
        of_id.id AS of_id
    FROM
        jsonb_populate_recordset(NULL::elizasql.pairing_allowlist, :entries::jsonb)
        WITH ORDINALITY AS g (agent_id, id, channel, sender_id, metadata, created_at, position)
    LEFT JOIN LATERAL (
        SELECT id
        FROM elizasql.pairing_allowlist
        WHERE agent_id = :agent_id AND channel = g.channel AND sender_id = g.sender_id
        LIMIT 1
    ) AS of_sender ON TRUE
    LEFT JOIN LATERAL (
        SELECT id
        FROM elizasql.pairing_allowlist
        WHERE agent_id = :agent_id AND id = g.id
        LIMIT 1
    ) AS of_id ON TRUE
),

created AS (
    INSERT INTO elizasql.pairing_allowlist AS a (agent_id, id, channel, sender_id, metadata, created_at)
    SELECT DISTINCT ON (given.channel, given.sender_id)
        :agent_id, given.id, given.channel, given.sender_id, coalesce(given.metadata, '{}'),
        coalesce(given.created_at, statement_timestamp())
    FROM given
    WHERE given.of_sender IS NULL AND given.of_id IS NULL
    ORDER BY given.channel, given.sender_id, given.position
    ON CONFLICT (agent_id, channel, sender_id) DO UPDATE SET metadata = a.metadata
    RETURNING a.id, a.channel, a.sender_id
)

SELECT
    given.id,
    coalesce(given.of_sender, created.id, given.of_id) AS listed
FROM given
LEFT JOIN created ON given.channel = created.channel AND given.sender_id = created.sender_id;

-- name: update_pairing_allowlist_entries(agent_id, entries, required)
-- Changes the metadata that are given; gives the ids that were there. required: one that is not undoes the statement.
-- Rows are locked in the order of the ids, so that two batches cannot wait for each other, and joined by the whole key,
-- so that each is looked up.
WITH given AS MATERIALIZED (
    SELECT a.*, g.entry
    FROM jsonb_array_elements(:entries::jsonb) AS g (entry)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.pairing_allowlist, g.entry) AS a
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id AS agent, given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id
            FROM elizasql.pairing_allowlist
            WHERE agent_id = :agent_id AND id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.pairing_allowlist AS a
    SET metadata = CASE WHEN g.entry ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE a.metadata END
    FROM locked AS g
    WHERE a.agent_id = g.agent AND a.id = g.id
    RETURNING a.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('pairing_allowlist', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_pairing_allowlist_entries(agent_id, ids)$
-- Gives how many went.
-- Not repeatable: a second run finds nothing left to delete.
WITH locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM unnest(:ids::uuid[]) AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.pairing_allowlist
            WHERE agent_id = :agent_id AND id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.pairing_allowlist AS a
    USING locked
    WHERE a.agent_id = locked.agent_id AND a.id = locked.id
    RETURNING a.id
)

SELECT count(*) FROM deleted;
