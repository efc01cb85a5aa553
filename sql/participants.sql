-- Participants: which entities are in which rooms, and how the agent follows them there. Times are the statement's, as in
-- messaging.sql.

-- name: add_participants(agent_id, room_id, entity_ids)!
-- A membership that is there already stays as it is.
INSERT INTO elizasql.participants (agent_id, room_id, entity_id, created_at)
SELECT DISTINCT
    :agent_id::uuid, :room_id::uuid, entity_id, statement_timestamp()
FROM unnest(:entity_ids::uuid[]) AS given (entity_id)
ORDER BY entity_id
ON CONFLICT (agent_id, room_id, entity_id) DO NOTHING;

-- name: create_room_participants(agent_id, room_id, entity_ids)
-- Gives the membership's id of each entity, in the order given. The update changes nothing: it makes a membership come
-- back that was made since the statement began.
WITH given AS MATERIALIZED (
    SELECT
        g.entity_id,
        g.position,
        p.id
    FROM unnest(:entity_ids::uuid[]) WITH ORDINALITY AS g (entity_id, position)
    LEFT JOIN LATERAL (
        SELECT id
        FROM elizasql.participants
        WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = g.entity_id
        LIMIT 1
    ) AS p ON TRUE
),

created AS (
    INSERT INTO elizasql.participants AS p (agent_id, room_id, entity_id, created_at)
    SELECT DISTINCT
        :agent_id::uuid, :room_id::uuid, given.entity_id, statement_timestamp()
    FROM given
    WHERE given.id IS NULL
    ORDER BY given.entity_id
    ON CONFLICT (agent_id, room_id, entity_id) DO UPDATE SET room_state = p.room_state
    RETURNING p.entity_id, p.id
)

SELECT coalesce(given.id, created.id) AS id
FROM given
LEFT JOIN created ON given.entity_id = created.entity_id
ORDER BY given.position;

-- name: remove_participant(agent_id, room_id, entity_id)$
-- Not repeatable: a second run finds nothing left to delete.
DELETE FROM elizasql.participants
WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = :entity_id
RETURNING TRUE AS done;

-- name: delete_participants(agent_id, room_ids, entity_ids)$
-- Ends memberships; gives how many there were. Rows are locked in the order of the pairs, so that two batches cannot wait
-- for each other, and joined by the whole key, so that each is looked up.
-- Not repeatable: a second run finds nothing left to delete.
WITH locked AS MATERIALIZED (
    SELECT
        of_pair.agent_id,
        of_pair.room_id,
        of_pair.entity_id
    FROM unnest(:room_ids::uuid[], :entity_ids::uuid[]) AS given (room_id, entity_id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, room_id, entity_id
            FROM elizasql.participants
            WHERE agent_id = :agent_id AND room_id = given.room_id AND entity_id = given.entity_id
            FOR UPDATE
        ) AS of_pair
),

deleted AS (
    DELETE FROM elizasql.participants AS p
    USING locked
    WHERE p.agent_id = locked.agent_id AND p.room_id = locked.room_id AND p.entity_id = locked.entity_id
    RETURNING p.id
)

SELECT count(*) FROM deleted;

-- name: update_participants(agent_id, participants)
-- Changes the fields that are given; a membership that is not there undoes the statement. Locked as by
-- delete_participants.
WITH given AS MATERIALIZED (
    SELECT p.*, g.participant
    FROM jsonb_array_elements(:participants::jsonb) AS g (participant)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.participants, g.participant) AS p
),

locked AS MATERIALIZED (
    SELECT of_pair.agent_id AS agent, given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id
            FROM elizasql.participants
            WHERE agent_id = :agent_id AND room_id = given.room_id AND entity_id = given.entity_id
            FOR NO KEY UPDATE
        ) AS of_pair
),

updated AS (
    UPDATE elizasql.participants AS p
    SET
        room_state = CASE WHEN g.participant ? 'room_state' THEN g.room_state ELSE p.room_state END,
        metadata = CASE WHEN g.participant ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE p.metadata END
    FROM locked AS g
    WHERE p.agent_id = g.agent AND p.room_id = g.room_id AND p.entity_id = g.entity_id
    RETURNING p.room_id, p.entity_id
)

SELECT
    elizasql.refuse_missing(
        'participants', array_agg(format('entity %s in room %s', g.entity_id, g.room_id))
    ) AS refused
FROM given AS g
WHERE
    NOT EXISTS (
        SELECT FROM updated WHERE updated.room_id = g.room_id AND updated.entity_id = g.entity_id
    )
HAVING count(*) > 0;

-- name: get_participants_for_entities(agent_id, entity_ids)
-- The memberships of each entity, oldest first, in the order of the entities; beside each the entity itself.
SELECT
    p.*,
    e.names AS entity_names,
    e.metadata AS entity_metadata,
    e.created_at AS entity_created_at
FROM unnest(:entity_ids::uuid[]) WITH ORDINALITY AS given (entity_id, position)
CROSS JOIN
    LATERAL (
        SELECT names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = given.entity_id
        LIMIT 1
    ) AS e
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, room_id, entity_id, room_state, metadata, created_at
        FROM elizasql.participants
        WHERE agent_id = :agent_id AND entity_id = given.entity_id
        OFFSET 0
    ) AS p
ORDER BY given.position, p.created_at, p.room_id;

-- name: get_participants_for_room(agent_id, room_id)
SELECT entity_id
FROM elizasql.participants
WHERE agent_id = :agent_id AND room_id = :room_id
ORDER BY created_at, entity_id;

-- name: get_participants_for_rooms(agent_id, room_ids)
-- One array for each room, in the order given.
SELECT coalesce(p.entity_ids, '{}') AS entity_ids
FROM unnest(:room_ids::uuid[]) WITH ORDINALITY AS given (room_id, position)
CROSS JOIN
    LATERAL (
        SELECT array_agg(entity_id ORDER BY created_at, entity_id) AS entity_ids
        FROM elizasql.participants
        WHERE agent_id = :agent_id AND room_id = given.room_id
    ) AS p
ORDER BY given.position;

-- name: get_rooms_for_participants(agent_id, entity_ids)
SELECT DISTINCT p.room_id
FROM unnest(:entity_ids::uuid[]) AS given (entity_id)
CROSS JOIN
    LATERAL (
        SELECT room_id
        FROM elizasql.participants
        WHERE agent_id = :agent_id AND entity_id = given.entity_id
        OFFSET 0
    ) AS p
ORDER BY p.room_id;

-- name: is_room_participant(agent_id, room_id, entity_id)$
SELECT EXISTS(
    SELECT FROM elizasql.participants
    WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = :entity_id
);

-- name: are_room_participants(agent_id, room_ids, entity_ids)
-- One answer for each pair, in the order given. Not EXISTS: the server may answer that by reading all of the agent's.
SELECT
    coalesce((
        SELECT TRUE
        FROM elizasql.participants AS p
        WHERE p.agent_id = :agent_id AND p.room_id = given.room_id AND p.entity_id = given.entity_id
    ), FALSE) AS is_participant
FROM unnest(:room_ids::uuid[], :entity_ids::uuid[]) WITH ORDINALITY AS given (room_id, entity_id, position)
ORDER BY given.position;

-- name: get_participant_user_state(agent_id, room_id, entity_id)$
SELECT room_state
FROM elizasql.participants
WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = :entity_id;

-- name: get_participant_user_states(agent_id, room_ids, entity_ids)
-- One state for each pair, in the order given.
SELECT
    (
        SELECT p.room_state
        FROM elizasql.participants AS p
        WHERE p.agent_id = :agent_id AND p.room_id = given.room_id AND p.entity_id = given.entity_id
    ) AS room_state
FROM unnest(:room_ids::uuid[], :entity_ids::uuid[]) WITH ORDINALITY AS given (room_id, entity_id, position)
ORDER BY given.position;
