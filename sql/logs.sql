-- Logs, and the runs that they tell of. Columns of a log, in the order of elizasql.models.Log:
-- id, agent_id, entity_id, room_id, type, body, created_at.
-- Bounds are sub-selects for the sake of policies, see memories.sql.

-- name: create_logs(agent_id, ids, entity_ids, room_ids, types, bodies, created_ats, positions, begins)!
-- Logs without a time get the batch's, as many microseconds later as their position in the batch says: their order stays
-- the input's, also in one transaction. begins: this is the first chunk of the batch, which keeps the batch's time for the
-- others; MATERIALIZED: also where its own logs all have a time, and none of them asks for it.
WITH given AS MATERIALIZED (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins)) + position * interval '1 microsecond' AS made_at
    FROM unnest(
        :ids::uuid[], :entity_ids::uuid[], :room_ids::uuid[], :types::text[], :bodies::jsonb[],
        :created_ats::timestamptz[], :positions::bigint[]
    ) AS g (id, entity_id, room_id, type, body, created_at, position)
)

INSERT INTO elizasql.logs (agent_id, id, entity_id, room_id, type, body, created_at)
SELECT
    :agent_id, id, entity_id, room_id, type, body, elizasql.made_time(created_at, made_at)
FROM given
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: get_logs(agent_id, cursor_time, cursor_id, skip, count)
-- All, newest first. The cursor is the last row of the page before, whose exact time is read by its id: ElizaOS's JSON
-- carries milliseconds only.
SELECT
    id, agent_id, entity_id, room_id, type, body, created_at
FROM elizasql.logs
WHERE
    agent_id = :agent_id
    AND (created_at, id) < (
        SELECT
            coalesce(
                (
                    SELECT exact.created_at FROM elizasql.logs AS exact
                    WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                ),
                :cursor_time::timestamptz, 'infinity'
            ),
            coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    )
ORDER BY created_at DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_logs_by_type(agent_id, type, cursor_time, cursor_id, skip, count)
-- As get_logs, of one type.
SELECT
    id, agent_id, entity_id, room_id, type, body, created_at
FROM elizasql.logs
WHERE
    agent_id = :agent_id AND type = :type
    AND (created_at, id) < (
        SELECT
            coalesce(
                (
                    SELECT exact.created_at FROM elizasql.logs AS exact
                    WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                ),
                :cursor_time::timestamptz, 'infinity'
            ),
            coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    )
ORDER BY created_at DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_logs_of_room(agent_id, room_id, type, cursor_time, cursor_id, skip, count)
-- As get_logs, of one room.
SELECT
    id, agent_id, entity_id, room_id, type, body, created_at
FROM elizasql.logs
WHERE
    agent_id = :agent_id AND room_id = :room_id
    AND (:type::text IS NULL OR type = :type)
    AND (created_at, id) < (
        SELECT
            coalesce(
                (
                    SELECT exact.created_at FROM elizasql.logs AS exact
                    WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                ),
                :cursor_time::timestamptz, 'infinity'
            ),
            coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    )
ORDER BY created_at DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_logs_of_entity(agent_id, entity_id, room_id, type, cursor_time, cursor_id, skip, count)
-- As get_logs, of one entity.
SELECT
    id, agent_id, entity_id, room_id, type, body, created_at
FROM elizasql.logs
WHERE
    agent_id = :agent_id AND entity_id = :entity_id
    AND (:room_id::uuid IS NULL OR room_id = :room_id)
    AND (:type::text IS NULL OR type = :type)
    AND (created_at, id) < (
        SELECT
            coalesce(
                (
                    SELECT exact.created_at FROM elizasql.logs AS exact
                    WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                ),
                :cursor_time::timestamptz, 'infinity'
            ),
            coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    )
ORDER BY created_at DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_logs_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id.
SELECT l.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, entity_id, room_id, type, body, created_at
        FROM elizasql.logs
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS l
ORDER BY given.position;

-- name: update_logs(agent_id, ids, types, bodies)
-- Replaces type and body, each where given; one that is not there undoes the whole statement.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        g.*
    FROM unnest(:ids::uuid[], :types::text[], :bodies::jsonb[]) AS g (id, type, body)
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.logs AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.logs AS l
    SET
        type = coalesce(g.type, l.type),
        body = coalesce(g.body, l.body)
    FROM locked AS g
    WHERE l.agent_id = g.agent AND l.id = g.id
    RETURNING l.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('logs', array_agg(g.id))
FROM given AS g
WHERE NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_logs(agent_id, ids)$
-- Gives how many there were.
-- Locked as by update_logs.
-- Not repeatable: a second run finds nothing left to delete.
WITH given AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        g.id
    FROM unnest(:ids::uuid[]) AS g (id)
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.logs AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.logs AS l
    USING locked AS g
    WHERE l.agent_id = g.agent AND l.id = g.id
    RETURNING l.id
)

SELECT count(*) FROM deleted;

-- name: get_oldest_kept_log(agent_id, keep)^
-- The oldest of the newest :keep logs; no row when there are fewer.
SELECT
    created_at,
    id
FROM elizasql.logs
WHERE agent_id = :agent_id
ORDER BY created_at DESC, id DESC
LIMIT
    1
    OFFSET :keep::bigint - 1;

-- name: prune_logs(agent_id, before, age, kept_time, kept_id, after_time, after_id, batch_size)^
-- Deletes the oldest logs that are before the time, or of the age, and before the oldest one to keep; gives how many, and
-- the last one, after which the next batch begins: what was deleted stays in the index for as long as anybody has an older
-- snapshot, and from the start a batch would go through all that those before it have deleted.
-- Locked rows are stepped over: two that prune take different ones, and fewer than a batch means that nothing is left.
-- made_time: the time of the one to keep may be the last of the calendar, and must not become infinite on its way.
-- Not repeatable: a second run finds nothing left to delete.
WITH doomed AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        id
    FROM elizasql.logs
    WHERE
        agent_id = :agent_id
        AND created_at < (SELECT coalesce(:before::timestamptz, statement_timestamp() - :age::interval, 'infinity'))
        AND (created_at, id) < (
            SELECT
                CASE WHEN :kept_id::uuid IS NULL THEN 'infinity' ELSE elizasql.made_time(:kept_time, 'infinity') END,
                coalesce(:kept_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
        )
        AND (created_at, id) > (
            SELECT
                coalesce(:after_time::timestamptz, '-infinity'),
                coalesce(:after_id::uuid, '00000000-0000-0000-0000-000000000000')
        )
    ORDER BY created_at, id
    LIMIT :batch_size::bigint
    FOR UPDATE SKIP LOCKED
),

deleted AS (
    DELETE FROM elizasql.logs AS l
    USING doomed
    WHERE l.agent_id = doomed.agent AND l.id = doomed.id
    RETURNING l.created_at, l.id
)

SELECT
    count(*) AS deleted,
    max(created_at) AS last_time,
    (array_agg(id ORDER BY created_at DESC, id DESC))[1] AS last_id
FROM deleted;

-- name: get_agent_run_summaries(agent_id, narrowed, room_id, entity_id, from_time, to_time, status, skip, count)
-- The runs, each folded over all its events; narrowed: those that had an event in the time, the room, of the entity.
-- One of the two branches of "runs" is run: all run events in one pass of an index, or the chosen runs one by one.
-- The latest terminal event decides the status. A promptCount that is no whole number up to 999,999,999 counts nothing.
-- There is always one row: it carries the total when the page is empty.
WITH chosen AS MATERIALIZED (
    SELECT DISTINCT run_id
    FROM elizasql.logs
    WHERE
        :narrowed AND agent_id = :agent_id AND type = 'run_event' AND run_id IS NOT NULL
        AND created_at >= (SELECT coalesce(:from_time::timestamptz, '-infinity'))
        AND created_at <= (SELECT coalesce(:to_time::timestamptz, 'infinity'))
        AND (:room_id::uuid IS NULL OR room_id = :room_id)
        AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
),

runs AS (
    SELECT
        run_id,
        min(created_at) FILTER (WHERE run_status = 'started') AS started_at,
        max(created_at) FILTER (WHERE run_status <> 'started') AS ended_at,
        (array_agg(run_status ORDER BY created_at DESC, id DESC) FILTER (WHERE run_status <> 'started'))[1] AS ending
    FROM elizasql.logs
    WHERE NOT :narrowed AND agent_id = :agent_id AND type = 'run_event' AND run_id IS NOT NULL
    GROUP BY run_id
    UNION ALL
    SELECT
        chosen.run_id, folded.started_at, folded.ended_at, folded.ending
    FROM chosen
    CROSS JOIN LATERAL (
        SELECT
            min(created_at) FILTER (WHERE run_status = 'started') AS started_at,
            max(created_at) FILTER (WHERE run_status <> 'started') AS ended_at,
            (array_agg(run_status ORDER BY created_at DESC, id DESC) FILTER (WHERE run_status <> 'started'))[1]
                AS ending
        FROM elizasql.logs
        WHERE agent_id = :agent_id AND run_id = chosen.run_id AND type = 'run_event' AND run_id IS NOT NULL
    ) AS folded
),

matching AS MATERIALIZED (
    SELECT
        run_id,
        coalesce(ending, 'started') AS status,
        started_at,
        ended_at
    FROM runs
    WHERE :status::text IS NULL OR coalesce(ending, 'started') = :status
),

page AS MATERIALIZED (
    SELECT * FROM matching
    ORDER BY started_at DESC NULLS LAST, run_id ASC
    LIMIT
        :count::bigint
        OFFSET :skip::bigint
)

SELECT
    whole.total,
    page.run_id,
    page.status,
    page.started_at,
    page.ended_at,
    CASE
        WHEN page.started_at IS NOT NULL AND page.ended_at IS NOT NULL
            THEN greatest(0, (extract(EPOCH FROM (
                date_trunc('milliseconds', page.ended_at) - date_trunc('milliseconds', page.started_at)
            )) * 1000)::bigint)
    END AS duration_ms,
    message.message_id,
    first.room_id,
    first.entity_id,
    coalesce(described.metadata, '{}') AS metadata,
    counted.actions,
    counted.model_calls,
    counted.errors,
    counted.evaluators
FROM (SELECT count(*) AS total FROM matching) AS whole
LEFT JOIN page ON TRUE
LEFT JOIN LATERAL (
    SELECT
        room_id,
        entity_id
    FROM elizasql.logs
    WHERE agent_id = :agent_id AND run_id = page.run_id AND type = 'run_event' AND run_id IS NOT NULL
    ORDER BY created_at, id
    LIMIT 1
) AS first ON TRUE
LEFT JOIN LATERAL (
    SELECT body ->> 'messageId' AS message_id
    FROM elizasql.logs
    WHERE
        agent_id = :agent_id AND run_id = page.run_id AND type = 'run_event' AND run_id IS NOT NULL
        AND jsonb_typeof(body -> 'messageId') = 'string' AND body ->> 'messageId' <> ''
    ORDER BY created_at, id
    LIMIT 1
) AS message ON TRUE
LEFT JOIN LATERAL (
    SELECT body -> 'metadata' AS metadata
    FROM elizasql.logs
    WHERE
        agent_id = :agent_id AND run_id = page.run_id AND type = 'run_event' AND run_id IS NOT NULL
        AND jsonb_typeof(body -> 'metadata') = 'object' AND body -> 'metadata' <> '{}'
    ORDER BY created_at, id
    LIMIT 1
) AS described ON TRUE
CROSS JOIN
    LATERAL (
        SELECT
            count(*) FILTER (WHERE type = 'action') AS actions,
            count(*) FILTER (WHERE starts_with(type, 'useModel:')) + coalesce(sum(
                CASE
                    WHEN body ->> 'promptCount' ~ '^[0-9]{1,9}([.]0+)?$' THEN (body ->> 'promptCount')::numeric
                END
            ) FILTER (WHERE type = 'action'), 0)::bigint AS model_calls,
            count(*) FILTER (
                WHERE (type = 'action' AND body -> 'result' ->> 'success' = 'false')
                OR (type = 'embedding_event' AND body ->> 'status' = 'failed')
            ) AS errors,
            count(*) FILTER (WHERE type = 'evaluator') AS evaluators
        FROM elizasql.logs
        WHERE agent_id = :agent_id AND run_id = page.run_id AND run_id IS NOT NULL
    ) AS counted
ORDER BY page.started_at DESC NULLS LAST, page.run_id ASC;
