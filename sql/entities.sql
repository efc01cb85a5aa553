-- Entities: the persons and things that the agent knows. Columns in the order of elizasql.models.Entity; behind them,
-- where components can come along, one array for each column of a component, NULL where there is none. Times are the
-- statement's, as in messaging.sql.

-- name: get_entities_by_ids(agent_id, ids, include_components)
-- In the order of the ids. LIMIT keeps the join a lookup for each id: as a join, or with = ANY, the plan for the average
-- agent reads all entities of a large one.
SELECT
    e.*,
    c.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS e
CROSS JOIN
    LATERAL (
        SELECT
            array_agg(id) AS ids, array_agg(agent_id) AS agent_ids, array_agg(entity_id) AS entity_ids,
            array_agg(room_id) AS room_ids, array_agg(world_id) AS world_ids,
            array_agg(source_entity_id) AS source_entity_ids, array_agg(type) AS types, array_agg(data) AS datas,
            array_agg(created_at) AS created_ats
        FROM (
            SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
            FROM elizasql.components
            WHERE :include_components AND agent_id = :agent_id AND entity_id = given.id
            ORDER BY created_at, id
        ) AS of_entity
    ) AS c
ORDER BY given.position;

-- name: get_entities_for_rooms(agent_id, room_ids, include_components)
-- The entities that take part in each room, oldest first; before each the room's position among those asked for.
-- OFFSET 0 keeps it from reading all entities in the order of their times, where an index has that order.
SELECT
    given.position,
    e.*,
    c.*
FROM unnest(:room_ids::uuid[]) WITH ORDINALITY AS given (room_id, position)
CROSS JOIN
    LATERAL (
        SELECT entity_id
        FROM elizasql.participants
        WHERE agent_id = :agent_id AND room_id = given.room_id
        OFFSET 0
    ) AS p
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = p.entity_id
        LIMIT 1
    ) AS e
CROSS JOIN
    LATERAL (
        SELECT
            array_agg(id) AS ids, array_agg(agent_id) AS agent_ids, array_agg(entity_id) AS entity_ids,
            array_agg(room_id) AS room_ids, array_agg(world_id) AS world_ids,
            array_agg(source_entity_id) AS source_entity_ids, array_agg(type) AS types, array_agg(data) AS datas,
            array_agg(created_at) AS created_ats
        FROM (
            SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
            FROM elizasql.components
            WHERE :include_components AND agent_id = :agent_id AND entity_id = p.entity_id
            ORDER BY created_at, id
        ) AS of_entity
    ) AS c
ORDER BY given.position, e.created_at, e.id;

-- name: get_entities_by_names(agent_id, names)
-- Those with one of the names, oldest first. The trigrams of a whole name find it, and those of its other spellings.
-- Policies keep a scan from the index of trigrams: under them all entities are read once, and no trigrams are made. 100
-- names among 50,000 entities, in processor time: 0.14 s in place of 44.
WITH found AS MATERIALIZED (
    SELECT e.id
    FROM unnest(:names::text[]) AS given (name)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id, names
            FROM elizasql.entities
            WHERE
                NOT row_security_active('elizasql.entities'::regclass)
                AND elizasql.name_grams(agent_id, names) @> elizasql.query_grams(:agent_id, given.name, 0)
            OFFSET 0
        ) AS e
    WHERE e.agent_id = :agent_id AND given.name = ANY(e.names)
    UNION
    SELECT id
    FROM elizasql.entities
    WHERE row_security_active('elizasql.entities'::regclass) AND agent_id = :agent_id AND names && :names::text[]
)

SELECT e.*
FROM found
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = found.id
        LIMIT 1
    ) AS e
ORDER BY e.created_at, e.id;

-- name: get_first_entities(agent_id, count)
SELECT id, agent_id, names, metadata, created_at
FROM elizasql.entities
WHERE agent_id = :agent_id
ORDER BY id
LIMIT :count::bigint;

-- name: search_entities_by_name(agent_id, query, count)
-- Those with a name that is the query, begins with it, or contains it, in this order and then by id; case is ignored.
-- What is common is found by walking the entities in the order of their ids, which soon has enough; what is rare by
-- its trigrams. Only the walk gives what is common in order, and it never ends for what is rare; so each step runs only
-- where those before it have not found enough. The trigrams' own reads must not see agent_id as a filter: an index of
-- it would serve, and the trigrams of all entities of the agent would be made anew.
-- Policies keep a scan from the index of trigrams: under them one read of all entities finds what the first hundred leave
-- to be found, 0.04 s in place of 0.4-3 for 50,000. It looks into the names of one as into one text, and ranks those that
-- have the query there.
WITH walk AS MATERIALIZED (
    SELECT
        id,
        elizasql.name_rank(names, :query) AS rank
    FROM (SELECT id, names FROM elizasql.entities WHERE agent_id = :agent_id ORDER BY id LIMIT 100) AS first_ones
),

seen AS MATERIALIZED (
    SELECT
        count(*) = 100 AND NOT row_security_active('elizasql.entities'::regclass) AS has_more,
        count(*) = 100 AND row_security_active('elizasql.entities'::regclass) AS has_more_by_policy,
        count(*) FILTER (WHERE rank = 0) AS equal,
        count(*) FILTER (WHERE rank = 1) AS beginning,
        count(*) FILTER (WHERE rank = 2) AS containing
    FROM walk
),

by_policy AS MATERIALIZED (
    SELECT
        id,
        elizasql.name_rank(names, :query) AS rank
    FROM elizasql.entities
    WHERE
        (SELECT has_more_by_policy AND equal < :count::bigint FROM seen)
        AND agent_id = :agent_id AND strpos(lower(array_to_string(names, chr(1))), lower(:query)) > 0
),

by_content AS MATERIALIZED (
    SELECT agent_id, id, names FROM (
        SELECT agent_id, id, names
        FROM elizasql.entities
        WHERE elizasql.name_grams(agent_id, names) @> elizasql.query_grams(:agent_id, :query, 2)
        UNION ALL
        SELECT agent_id, id, names
        FROM elizasql.entities
        WHERE elizasql.name_grams(agent_id, names) && elizasql.pair_grams(:agent_id, :query)
    ) AS found
    WHERE (SELECT has_more AND equal + beginning + containing < :count::bigint FROM seen)
    LIMIT 1001
),

-- A query of one byte has no trigrams: nothing found by them does not mean that there is nothing.
rare AS MATERIALIZED (
    SELECT
        count(*) <= 1000 AND octet_length(lower(:query)) > 1
        AND (SELECT has_more AND equal + beginning + containing < :count::bigint FROM seen) AS is_rare
    FROM by_content
),

by_equality AS MATERIALIZED (
    SELECT agent_id, id, names
    FROM elizasql.entities
    WHERE
        NOT (SELECT is_rare FROM rare)
        AND (SELECT has_more AND equal < :count::bigint FROM seen)
        AND elizasql.name_grams(agent_id, names) @> elizasql.query_grams(:agent_id, :query, 0)
    LIMIT 1001
),

equal AS MATERIALIZED (
    (
        SELECT id FROM by_equality
        WHERE
            (SELECT count(*) <= 1000 FROM by_equality)
            AND agent_id = :agent_id AND elizasql.name_rank(names, :query) = 0
        ORDER BY id
        LIMIT :count::bigint
    )
    UNION ALL
    (
        SELECT id FROM elizasql.entities
        WHERE
            (SELECT count(*) > 1000 FROM by_equality)
            AND agent_id = :agent_id AND elizasql.name_rank(names, :query) = 0
        ORDER BY id
        LIMIT :count::bigint
    )
),

by_beginning AS MATERIALIZED (
    SELECT agent_id, id, names
    FROM elizasql.entities
    WHERE
        NOT (SELECT is_rare FROM rare)
        AND (
            SELECT has_more AND greatest(equal, (SELECT count(*) FROM equal)) + beginning < :count::bigint FROM seen
        )
        AND elizasql.name_grams(agent_id, names) @> elizasql.query_grams(:agent_id, :query, 1)
    LIMIT 1001
),

beginning AS MATERIALIZED (
    (
        SELECT id FROM by_beginning
        WHERE
            (SELECT count(*) <= 1000 FROM by_beginning)
            AND agent_id = :agent_id AND elizasql.name_rank(names, :query) = 1
        ORDER BY id
        LIMIT :count::bigint
    )
    UNION ALL
    (
        SELECT id FROM elizasql.entities
        WHERE
            (SELECT count(*) > 1000 FROM by_beginning)
            AND agent_id = :agent_id AND elizasql.name_rank(names, :query) = 1
        ORDER BY id
        LIMIT :count::bigint
    )
),

containing AS MATERIALIZED (
    SELECT id FROM elizasql.entities
    WHERE
        NOT (SELECT is_rare FROM rare)
        AND (
            SELECT
                has_more
                AND greatest(equal, (SELECT count(*) FROM equal))
                + greatest(beginning, (SELECT count(*) FROM beginning)) + containing < :count::bigint
            FROM seen
        )
        AND agent_id = :agent_id AND elizasql.name_rank(names, :query) = 2
    ORDER BY id
    LIMIT :count::bigint
),

found AS MATERIALIZED (
    SELECT id, rank FROM (
        SELECT id, rank FROM walk
        UNION
        SELECT id, rank FROM by_policy
        UNION
        SELECT id, elizasql.name_rank(names, :query) FROM by_content
        WHERE (SELECT is_rare FROM rare) AND agent_id = :agent_id
        UNION
        SELECT id, 0 FROM equal
        UNION
        SELECT id, 1 FROM beginning
        UNION
        SELECT id, 2 FROM containing
    ) AS ranked
    WHERE rank IS NOT NULL
    ORDER BY rank, id
    LIMIT :count::bigint
)

SELECT e.*
FROM found
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = found.id
        LIMIT 1
    ) AS e
ORDER BY found.rank, e.id;

-- name: query_entities(agent_id, entity_ids, component_type, world_id, data, include_all_components, count, skipped)
-- The entities that are among the ids and have a component of the type, in the world and with the data, each where
-- given; ordered by id. Beside each its components: of the type, where one is given, or all.
-- One branch for each set of filters that has an index of its own; the others do not run. The collation leaves only
-- the index of worlds and types for both: by the average agent, that of types alone is as good.
WITH matched AS MATERIALIZED (
    (
        SELECT e.id
        FROM unnest(:entity_ids::uuid[]) AS given (id)
        CROSS JOIN
            LATERAL (
                SELECT id FROM elizasql.entities WHERE agent_id = :agent_id AND id = given.id LIMIT 1
            ) AS e
        LEFT JOIN LATERAL (
            SELECT id
            FROM elizasql.components
            WHERE
                agent_id = :agent_id AND entity_id = given.id
                AND (:component_type::text IS NULL OR type = :component_type)
                AND (:world_id::uuid IS NULL OR world_id = :world_id)
                AND (:data::jsonb IS NULL OR data @> :data)
            LIMIT 1
        ) AS c ON TRUE
        WHERE
            c.id IS NOT NULL
            OR (:component_type::text IS NULL AND :world_id::uuid IS NULL AND :data::jsonb IS NULL)
        ORDER BY e.id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
    UNION ALL
    (
        SELECT DISTINCT entity_id
        FROM elizasql.components
        WHERE
            :entity_ids::uuid[] IS NULL AND :world_id::uuid IS NOT NULL AND :component_type::text IS NOT NULL
            AND agent_id = :agent_id AND world_id = :world_id AND type = :component_type COLLATE "C"
            AND (:data::jsonb IS NULL OR data @> :data)
        ORDER BY entity_id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
    UNION ALL
    (
        SELECT DISTINCT entity_id
        FROM elizasql.components
        WHERE
            :entity_ids::uuid[] IS NULL AND :world_id::uuid IS NULL AND :component_type::text IS NOT NULL
            AND agent_id = :agent_id AND type = :component_type AND (:data::jsonb IS NULL OR data @> :data)
        ORDER BY entity_id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
    UNION ALL
    (
        SELECT DISTINCT entity_id
        FROM elizasql.components
        WHERE
            :entity_ids::uuid[] IS NULL AND :world_id::uuid IS NOT NULL AND :component_type::text IS NULL
            AND agent_id = :agent_id AND world_id = :world_id AND (:data::jsonb IS NULL OR data @> :data)
        ORDER BY entity_id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
    UNION ALL
    (
        SELECT DISTINCT entity_id
        FROM elizasql.components
        WHERE
            :entity_ids::uuid[] IS NULL AND :component_type::text IS NULL AND :world_id::uuid IS NULL
            AND :data::jsonb IS NOT NULL AND agent_id = :agent_id AND data @> :data
        ORDER BY entity_id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
    UNION ALL
    (
        SELECT id
        FROM elizasql.entities
        WHERE
            :entity_ids::uuid[] IS NULL AND :component_type::text IS NULL AND :world_id::uuid IS NULL
            AND :data::jsonb IS NULL AND agent_id = :agent_id
        ORDER BY id
        LIMIT
            :count::bigint
            OFFSET :skipped::bigint
    )
)

SELECT
    e.*,
    c.*
FROM matched
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, names, metadata, created_at
        FROM elizasql.entities
        WHERE agent_id = :agent_id AND id = matched.id
        LIMIT 1
    ) AS e
CROSS JOIN
    LATERAL (
        SELECT
            array_agg(id) AS ids, array_agg(agent_id) AS agent_ids, array_agg(entity_id) AS entity_ids,
            array_agg(room_id) AS room_ids, array_agg(world_id) AS world_ids,
            array_agg(source_entity_id) AS source_entity_ids, array_agg(type) AS types, array_agg(data) AS datas,
            array_agg(created_at) AS created_ats
        FROM (
            SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
            FROM elizasql.components
            WHERE
                agent_id = :agent_id AND entity_id = matched.id
                AND (:include_all_components OR :component_type::text IS NULL OR type = :component_type)
            ORDER BY created_at, id
        ) AS of_entity
    ) AS c
ORDER BY e.id;

-- name: create_entities(agent_id, entities)!
-- An entity that is there already stays as it is.
INSERT INTO elizasql.entities (agent_id, id, names, metadata, created_at)
SELECT
    :agent_id, id, coalesce(names, '{}'), coalesce(metadata, '{}'), coalesce(created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.entities, :entities::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: upsert_entities(agent_id, entities)!
-- Creates entities, or changes the fields that are given of those that are there. entities: an object by id.
INSERT INTO elizasql.entities AS e (agent_id, id, names, metadata, created_at)
SELECT
    :agent_id, g.id, coalesce(g.names, '{}'), coalesce(g.metadata, '{}'), coalesce(g.created_at, statement_timestamp())
FROM jsonb_each(:entities::jsonb) AS given (id, entity)
CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.entities, given.entity) AS g
ORDER BY g.id
ON CONFLICT (agent_id, id) DO UPDATE
    SET
        names = CASE WHEN (:entities::jsonb -> excluded.id::text) ? 'names' THEN excluded.names ELSE e.names END,
        metadata
        = CASE WHEN (:entities::jsonb -> excluded.id::text) ? 'metadata' THEN excluded.metadata ELSE e.metadata END;

-- name: update_entities(agent_id, entities, required)
-- Changes the fields that are given; gives the ids that were there. required: one that is not undoes the statement.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, e.*, g.entity
    FROM jsonb_array_elements(:entities::jsonb) AS g (entity)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.entities, g.entity) AS e
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.entities AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.entities AS e
    SET
        names = CASE WHEN g.entity ? 'names' THEN coalesce(g.names, '{}') ELSE e.names END,
        metadata = CASE WHEN g.entity ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE e.metadata END,
        created_at = elizasql.changed_time(e.created_at, g.created_at)
    FROM locked AS g
    WHERE e.agent_id = g.agent AND e.id = g.id
    RETURNING e.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('entities', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_entities(agent_id, ids)$
-- Deletes entities and, by cascade, their components, memberships, relationships, goals, logs and memories.
-- All that changes is locked first, in the order in which others lock it.
-- Locked as by update_entities.
-- Not repeatable: a second run finds nothing left to delete.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, g.id
    FROM elizasql.lock_dependents(:agent_id, '{}', :ids::uuid[]) AS g (id)
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.entities AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.entities AS e
    USING locked AS g
    WHERE e.agent_id = g.agent AND e.id = g.id
    RETURNING e.id
)

SELECT count(*) FROM deleted;
