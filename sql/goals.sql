-- Goals. Columns of a goal, in the order of elizasql.models.Goal:
-- id, agent_id, room_id, entity_id, name, status, objectives, created_at, updated_at.
-- Lists are read status by status, each off the index in order: the goals that are done outnumber the others by far.

-- name: create_goals(agent_id, goals, positions, begins)!
-- A goal that is there already stays as it is. Goals without a time get the batch's, as many microseconds later as their
-- position in the batch says: their order stays the input's. begins: this is the first chunk of the batch.
WITH given AS (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins))
        + (:positions::bigint[])[ordinality] * interval '1 microsecond' AS made_at
    FROM jsonb_populate_recordset(NULL::elizasql.goals, :goals::jsonb) WITH ORDINALITY
)

INSERT INTO elizasql.goals (
    agent_id, id, room_id, entity_id, name, status, objectives, created_at, updated_at
)
SELECT
    :agent_id, id, room_id, entity_id, name, coalesce(status, 'IN_PROGRESS'), coalesce(objectives, '[]'),
    coalesce(created_at, made_at), coalesce(updated_at, created_at, made_at)
FROM given
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: get_goals_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id.
SELECT g.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, room_id, entity_id, name, status, objectives, created_at, updated_at
        FROM elizasql.goals
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS g
ORDER BY given.position;

-- name: get_goals(agent_id, statuses, reach, skip, count)
-- Oldest first, as every list of goals. reach = count + skip: no status need give more.
SELECT
    found.id, found.agent_id, found.room_id, found.entity_id, found.name, found.status, found.objectives,
    found.created_at, found.updated_at
FROM unnest(:statuses::text[]) AS wanted (status)
CROSS JOIN
    LATERAL (
        SELECT *
        FROM elizasql.goals AS g
        WHERE g.agent_id = :agent_id AND g.status = wanted.status
        ORDER BY g.created_at, g.id
        LIMIT :reach::bigint
    ) AS found
ORDER BY found.created_at, found.id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_goals_of_room(agent_id, room_id, entity_id, statuses, reach, skip, count)
SELECT
    found.id, found.agent_id, found.room_id, found.entity_id, found.name, found.status, found.objectives,
    found.created_at, found.updated_at
FROM unnest(:statuses::text[]) AS wanted (status)
CROSS JOIN
    LATERAL (
        SELECT *
        FROM elizasql.goals AS g
        WHERE
            g.agent_id = :agent_id AND g.room_id = :room_id AND g.status = wanted.status
            AND (:entity_id::uuid IS NULL OR g.entity_id = :entity_id)
        ORDER BY g.created_at, g.id
        LIMIT :reach::bigint
    ) AS found
ORDER BY found.created_at, found.id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_goals_of_entity(agent_id, entity_id, statuses, reach, skip, count)
SELECT
    found.id, found.agent_id, found.room_id, found.entity_id, found.name, found.status, found.objectives,
    found.created_at, found.updated_at
FROM unnest(:statuses::text[]) AS wanted (status)
CROSS JOIN
    LATERAL (
        SELECT *
        FROM elizasql.goals AS g
        WHERE g.agent_id = :agent_id AND g.entity_id = :entity_id AND g.status = wanted.status
        ORDER BY g.created_at, g.id
        LIMIT :reach::bigint
    ) AS found
ORDER BY found.created_at, found.id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: update_goals(agent_id, goals, required)
-- Changes the keys that are given; gives the ids that were there. required: one that is not there undoes the whole.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        p.*,
        g.given
    FROM jsonb_array_elements(:goals::jsonb) AS g (given)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.goals, g.given) AS p
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.goals AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.goals AS t
    SET
        room_id = CASE WHEN g.given ? 'room_id' THEN g.room_id ELSE t.room_id END,
        entity_id = CASE WHEN g.given ? 'entity_id' THEN g.entity_id ELSE t.entity_id END,
        name = coalesce(g.name, t.name),
        status = coalesce(g.status, t.status),
        objectives = CASE WHEN g.given ? 'objectives' THEN coalesce(g.objectives, '[]') ELSE t.objectives END,
        updated_at = statement_timestamp()
    FROM locked AS g
    WHERE t.agent_id = g.agent AND t.id = g.id
    RETURNING t.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('goals', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_goals(agent_id, ids)$
-- Gives how many there were.
-- Locked as by update_goals.
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
            FROM elizasql.goals AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.goals AS t
    USING locked AS g
    WHERE t.agent_id = g.agent AND t.id = g.id
    RETURNING t.id
)

SELECT count(*) FROM deleted;

-- name: delete_all_goals(agent_id, room_id)$
-- Rows are locked in the order of the ids, as by update_goals. The room is no condition that an index could serve: without
-- statistics the index of rooms would, and each goal be looked for among all of the room.
-- Not repeatable: a second run finds nothing left to delete.
WITH given AS MATERIALIZED (
    SELECT of_room.id
    FROM (
        SELECT id
        FROM elizasql.goals
        WHERE agent_id = :agent_id AND room_id = :room_id
        OFFSET 0
    ) AS of_room
    ORDER BY of_room.id
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.goals
            WHERE agent_id = :agent_id AND id = given.id AND room_id IS NOT DISTINCT FROM :room_id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.goals AS t
    USING locked
    WHERE t.agent_id = locked.agent_id AND t.id = locked.id
    RETURNING t.id
)

SELECT count(*) FROM deleted;
