-- Tasks, and the claims of workers on them. Columns of a task, in the order of elizasql.models.Task:
-- id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at, ready_at,
-- attempts, max_attempts, claim_token, claimed_by, error.
-- tags @> '{queue}' AND attempts < max_attempts is what the indexes for workers hold; it must stand there as it is.
-- Times are the statement's, not the transaction's: tasks of one transaction stay in the order of their making.

-- name: create_tasks(agent_id, tasks, positions, begins)!
-- A task that is there already stays as it is. Tasks without a time get the batch's, as many microseconds later as their
-- position in the batch says: their order stays the input's. begins: this is the first chunk of the batch.
WITH given AS (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins))
        + (:positions::bigint[])[ordinality] * interval '1 microsecond' AS made_at
    FROM jsonb_populate_recordset(NULL::elizasql.tasks, :tasks::jsonb) WITH ORDINALITY
)

INSERT INTO elizasql.tasks (
    agent_id, id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, max_attempts
)
SELECT
    :agent_id, id, name, coalesce(description, ''), room_id, world_id, entity_id, coalesce(tags, '{}'),
    coalesce(metadata, '{}'), coalesce(created_at, made_at), coalesce(updated_at, created_at, made_at), due_at,
    coalesce(due_at, made_at), coalesce(max_attempts, 5)
FROM given
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: get_tasks_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id: as a join, or with = ANY, the plan for the average
-- agent reads all tasks of a large one.
SELECT t.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT
            id,
            agent_id,
            name,
            description,
            room_id,
            world_id,
            entity_id,
            tags,
            metadata,
            created_at,
            updated_at,
            due_at,
            ready_at, attempts, max_attempts, claim_token, claimed_by, error
        FROM elizasql.tasks
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS t
ORDER BY given.position;

-- name: get_tasks(agent_id, skip, count)
-- Oldest first, as every list of tasks.
SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM elizasql.tasks
WHERE agent_id = :agent_id
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_tasks_by_tags(agent_id, tags, skip, count)
-- Those that have all the tags. Where the oldest tasks fill the page with them, they are common, and the page is theirs.
-- Otherwise they are found by the keys of the tags, which are the agent's own, and by nothing else: an index that begins
-- with agent_id, or is in order, would be walked to the end for a rare tag; all that have a common one are read to sort.
-- Policies keep a scan from the index of keys: under them all tasks are read, and no keys are made: 0.04 s in place of 0.46
-- for 50,000.
WITH walk AS MATERIALIZED (
    SELECT
        id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
        ready_at, attempts, max_attempts, claim_token, claimed_by, error
    FROM (
        SELECT * FROM elizasql.tasks
        WHERE agent_id = :agent_id AND :count::bigint IS NOT NULL
        ORDER BY created_at, id
        LIMIT 10 * (least(100, :count::bigint) + least(100, coalesce(:skip::bigint, 0)))
    ) AS oldest
    WHERE tags @> :tags::text[]
    ORDER BY created_at, id
    LIMIT
        :count::bigint
        OFFSET :skip::bigint
),

found AS MATERIALIZED (
    SELECT
        id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
        ready_at, attempts, max_attempts, claim_token, claimed_by, error
    FROM elizasql.tasks
    WHERE
        NOT row_security_active('elizasql.tasks'::regclass)
        AND (SELECT count(*) FROM walk) IS DISTINCT FROM :count::bigint
        AND elizasql.tag_keys(agent_id, tags) @> elizasql.tag_keys(:agent_id, :tags::text[])
    UNION ALL
    SELECT
        id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
        ready_at, attempts, max_attempts, claim_token, claimed_by, error
    FROM elizasql.tasks
    WHERE
        row_security_active('elizasql.tasks'::regclass)
        AND (SELECT count(*) FROM walk) IS DISTINCT FROM :count::bigint
        AND agent_id = :agent_id AND tags @> :tags
)

(
    SELECT
        id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
        ready_at, attempts, max_attempts, claim_token, claimed_by, error
    FROM walk
    WHERE (SELECT count(*) FROM walk) = :count::bigint
)
UNION ALL
(
    SELECT
        id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
        ready_at, attempts, max_attempts, claim_token, claimed_by, error
    FROM found
    WHERE agent_id = :agent_id AND tags @> :tags
    ORDER BY created_at, id
    LIMIT
        :count::bigint
        OFFSET :skip::bigint
);

-- name: get_tasks_by_name(agent_id, name, skip, count)
SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM elizasql.tasks
WHERE agent_id = :agent_id AND name = :name
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_tasks_of_room(agent_id, room_id, entity_id, world_id, tags, skip, count)
SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM elizasql.tasks
WHERE
    agent_id = :agent_id AND room_id = :room_id
    AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
    AND (:world_id::uuid IS NULL OR world_id = :world_id)
    AND (:tags::text[] IS NULL OR tags @> :tags)
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_tasks_of_entity(agent_id, entity_id, world_id, tags, skip, count)
SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM elizasql.tasks
WHERE
    agent_id = :agent_id AND entity_id = :entity_id
    AND (:world_id::uuid IS NULL OR world_id = :world_id)
    AND (:tags::text[] IS NULL OR tags @> :tags)
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_tasks_of_world(agent_id, world_id, tags, skip, count)
SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM elizasql.tasks
WHERE
    agent_id = :agent_id AND world_id = :world_id
    AND (:tags::text[] IS NULL OR tags @> :tags)
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: update_tasks(agent_id, tasks, required)
-- Changes the keys that are given; gives the ids that were there. required: one that is not there undoes the whole.
-- A new due time reaches ready_at where no claim is left: otherwise that is the end of its lease. After one that has ended,
-- too: the task would count as a worker's until it is due. The due time that is there is not a new one, also cut to
-- milliseconds, as ElizaOS's JSON gives it back: the pause after a failure goes on.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        p.*,
        g.given
    FROM jsonb_array_elements(:tasks::jsonb) AS g (given)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.tasks, g.given) AS p
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.tasks AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.tasks AS t
    SET
        name = CASE WHEN g.given ? 'name' THEN g.name ELSE t.name END,
        description = CASE WHEN g.given ? 'description' THEN coalesce(g.description, '') ELSE t.description END,
        room_id = CASE WHEN g.given ? 'room_id' THEN g.room_id ELSE t.room_id END,
        world_id = CASE WHEN g.given ? 'world_id' THEN g.world_id ELSE t.world_id END,
        entity_id = CASE WHEN g.given ? 'entity_id' THEN g.entity_id ELSE t.entity_id END,
        tags = CASE WHEN g.given ? 'tags' THEN coalesce(g.tags, '{}') ELSE t.tags END,
        metadata = CASE WHEN g.given ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE t.metadata END,
        max_attempts = CASE WHEN g.given ? 'max_attempts' THEN g.max_attempts ELSE t.max_attempts END,
        (due_at, ready_at) = (
            SELECT
                CASE WHEN change.comes THEN g.due_at ELSE t.due_at END,
                CASE
                    WHEN change.comes AND t.claim_token IS NULL THEN coalesce(g.due_at, statement_timestamp())
                    ELSE t.ready_at
                END
            FROM (SELECT g.given ? 'due_at' AND NOT elizasql.is_same_time(t.due_at, g.due_at) AS comes) AS change
        ),
        updated_at = statement_timestamp()
    FROM locked AS g
    WHERE t.agent_id = g.agent AND t.id = g.id
    RETURNING t.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('tasks', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: update_pending_task(agent_id, id, task)$
-- As update_tasks, only while the task is tagged 'queue' and no worker has it. Of callers that take the tag away one wins:
-- the others wait for its row and find it changed. It has the task then, and a claim whose lease has ended is lost.
-- Not repeatable: a second run finds the tag taken away.
UPDATE elizasql.tasks AS t
SET
    name = CASE WHEN g.given ? 'name' THEN p.name ELSE t.name END,
    description = CASE WHEN g.given ? 'description' THEN coalesce(p.description, '') ELSE t.description END,
    room_id = CASE WHEN g.given ? 'room_id' THEN p.room_id ELSE t.room_id END,
    world_id = CASE WHEN g.given ? 'world_id' THEN p.world_id ELSE t.world_id END,
    entity_id = CASE WHEN g.given ? 'entity_id' THEN p.entity_id ELSE t.entity_id END,
    tags = CASE WHEN g.given ? 'tags' THEN coalesce(p.tags, '{}') ELSE t.tags END,
    metadata = CASE WHEN g.given ? 'metadata' THEN coalesce(p.metadata, '{}') ELSE t.metadata END,
    max_attempts = CASE WHEN g.given ? 'max_attempts' THEN p.max_attempts ELSE t.max_attempts END,
    (due_at, ready_at, claim_token) = (
        SELECT
            CASE WHEN change.comes THEN p.due_at ELSE t.due_at END,
            CASE
                WHEN change.comes AND change.claim_token IS NULL THEN coalesce(p.due_at, statement_timestamp())
                ELSE t.ready_at
            END,
            change.claim_token
        FROM (
            SELECT
                g.given ? 'due_at' AND NOT elizasql.is_same_time(t.due_at, p.due_at) AS comes,
                CASE WHEN NOT g.given ? 'tags' OR p.tags @> '{queue}' THEN t.claim_token END AS claim_token
        ) AS change
    ),
    updated_at = statement_timestamp()
FROM (SELECT :task::jsonb AS given) AS g
CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.tasks, g.given) AS p
WHERE
    t.agent_id = :agent_id AND t.id = :id AND t.tags @> '{queue}'
    AND (t.claim_token IS NULL OR t.ready_at <= statement_timestamp())
RETURNING TRUE AS done;

-- name: delete_tasks(agent_id, ids)$
-- Gives how many there were.
-- Locked as by update_tasks.
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
            FROM elizasql.tasks AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.tasks AS t
    USING locked AS g
    WHERE t.agent_id = g.agent AND t.id = g.id
    RETURNING t.id
)

SELECT count(*) FROM deleted;

-- name: claim_tasks(agent_id, tags, worker, lease, count)
-- Takes tasks that are tagged 'queue' and ready, those first that have been for longest. Locked rows are stepped over:
-- no two workers get the same task, and none waits for another. ready_at alone does not tell after a lease has ended: a
-- due time that was set during the claim may be later.
-- Not repeatable: a second run takes other tasks, and nobody works on the first ones.
WITH ready AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        id,
        ready_at
    FROM elizasql.tasks
    WHERE
        agent_id = :agent_id AND tags @> '{queue}' AND attempts < max_attempts AND ready_at <= statement_timestamp()
        AND (due_at IS NULL OR due_at <= statement_timestamp())
        AND (:tags::text[] IS NULL OR tags @> :tags)
    ORDER BY ready_at, id
    LIMIT :count::bigint
    FOR NO KEY UPDATE SKIP LOCKED
),

claimed AS (
    UPDATE elizasql.tasks AS t
    SET
        ready_at = statement_timestamp() + make_interval(secs => :lease),
        attempts = t.attempts + 1,
        claim_token = gen_random_uuid(),
        claimed_by = :worker
    FROM ready
    WHERE t.agent_id = ready.agent AND t.id = ready.id
    RETURNING
        t.id, t.agent_id, t.name, t.description, t.room_id, t.world_id, t.entity_id, t.tags, t.metadata, t.created_at,
        t.updated_at, t.due_at, t.ready_at, t.attempts, t.max_attempts, t.claim_token, t.claimed_by, t.error,
        ready.ready_at AS was_ready_at
)

SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM claimed
ORDER BY was_ready_at, id;

-- name: claim_tasks_by_names(agent_id, names, tags, worker, lease, count)
-- As claim_tasks, of some names. They are looked up name by name first, and then locked one by one until there are enough:
-- what is locked and not taken would be hidden from other workers. The 100 stand in for those that others lock meanwhile;
-- where these have locked more, as a transaction does that claims many, those behind are looked through, too.
-- What is taken is one list: where a task was changed just before it was locked, the server joins its new row with the
-- list again, and of a union in the FROM it would look for the tasks and lock them anew.
-- Not repeatable: a second run takes other tasks, and nobody works on the first ones.
WITH candidates AS MATERIALIZED (
    SELECT
        found.id,
        found.ready_at
    FROM (SELECT DISTINCT name FROM unnest(:names::text[]) AS given (name)) AS wanted
    CROSS JOIN
        LATERAL (
            SELECT
                t.id,
                t.ready_at
            FROM elizasql.tasks AS t
            WHERE
                t.agent_id = :agent_id AND t.name = wanted.name AND t.tags @> '{queue}' AND t.attempts < t.max_attempts
                AND t.ready_at <= statement_timestamp() AND (t.due_at IS NULL OR t.due_at <= statement_timestamp())
                AND (:tags::text[] IS NULL OR t.tags @> :tags)
            ORDER BY t.ready_at, t.id
            LIMIT :count::bigint + 100
        ) AS found
    ORDER BY found.ready_at, found.id
    LIMIT :count::bigint + 100
),

ready AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        locked.id,
        locked.ready_at
    FROM candidates
    CROSS JOIN
        LATERAL (
            SELECT
                t.id,
                t.ready_at
            FROM elizasql.tasks AS t
            WHERE
                t.agent_id = :agent_id AND t.id = candidates.id AND t.name = ANY(:names)
                AND t.tags @> '{queue}' AND t.attempts < t.max_attempts AND t.ready_at <= statement_timestamp()
                AND (t.due_at IS NULL OR t.due_at <= statement_timestamp())
                AND (:tags::text[] IS NULL OR t.tags @> :tags)
            LIMIT 1
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS locked
    LIMIT :count::bigint
),

behind AS MATERIALIZED (
    SELECT
        :agent_id::uuid AS agent,
        t.id,
        t.ready_at
    FROM elizasql.tasks AS t
    WHERE
        (SELECT count(*) FROM candidates) = :count::bigint + 100 AND (SELECT count(*) FROM ready) < :count::bigint
        AND t.agent_id = :agent_id AND t.name = ANY(:names) AND t.tags @> '{queue}' AND t.attempts < t.max_attempts
        AND t.ready_at <= statement_timestamp() AND (t.due_at IS NULL OR t.due_at <= statement_timestamp())
        AND (:tags::text[] IS NULL OR t.tags @> :tags)
        AND (t.ready_at, t.id) > (
            SELECT
                c.ready_at,
                c.id
            FROM candidates AS c
            ORDER BY c.ready_at DESC, c.id DESC
            LIMIT 1
        )
    ORDER BY t.ready_at, t.id
    LIMIT :count::bigint - (SELECT count(*) FROM ready)
    FOR NO KEY UPDATE SKIP LOCKED
),

taken AS MATERIALIZED (
    SELECT agent, id, ready_at FROM ready
    UNION ALL
    SELECT agent, id, ready_at FROM behind
),

claimed AS (
    UPDATE elizasql.tasks AS t
    SET
        ready_at = statement_timestamp() + make_interval(secs => :lease),
        attempts = t.attempts + 1,
        claim_token = gen_random_uuid(),
        claimed_by = :worker
    FROM taken
    WHERE t.agent_id = taken.agent AND t.id = taken.id
    RETURNING
        t.id, t.agent_id, t.name, t.description, t.room_id, t.world_id, t.entity_id, t.tags, t.metadata, t.created_at,
        t.updated_at, t.due_at, t.ready_at, t.attempts, t.max_attempts, t.claim_token, t.claimed_by, t.error,
        taken.ready_at AS was_ready_at
)

SELECT
    id, agent_id, name, description, room_id, world_id, entity_id, tags, metadata, created_at, updated_at, due_at,
    ready_at, attempts, max_attempts, claim_token, claimed_by, error
FROM claimed
ORDER BY was_ready_at, id;

-- name: get_seconds_to_next_task(agent_id, names, tags)$
-- Until the next task becomes ready, by the server's clock; NULL when none will. What became ready a moment ago counts, too:
-- it may have been between two statements. What has been ready for longer is locked, and whoever locks it takes it.
-- Tasks that are due later than the lease of their claim ends have an index of their own: they become ready when due.
SELECT extract(EPOCH FROM (min(next.at) - statement_timestamp()))::double precision AS seconds
FROM (
    (
        SELECT ready_at AS at
        FROM elizasql.tasks
        WHERE
            agent_id = :agent_id AND tags @> '{queue}' AND attempts < max_attempts
            AND ready_at > statement_timestamp() - interval '1 second'
            AND (due_at IS NULL OR due_at <= ready_at)
            AND (:names::text[] IS NULL OR name = ANY(:names))
            AND (:tags::text[] IS NULL OR tags @> :tags)
        ORDER BY ready_at, id
        LIMIT 1
    )
    UNION ALL
    (
        SELECT due_at AS at
        FROM elizasql.tasks
        WHERE
            agent_id = :agent_id AND tags @> '{queue}' AND attempts < max_attempts AND due_at > ready_at
            AND due_at > statement_timestamp() - interval '1 second'
            AND (:names::text[] IS NULL OR name = ANY(:names))
            AND (:tags::text[] IS NULL OR tags @> :tags)
        ORDER BY due_at, id
        LIMIT 1
    )
) AS next;

-- name: heartbeat_task(agent_id, id, claim_token, lease)$
UPDATE elizasql.tasks
SET ready_at = statement_timestamp() + make_interval(secs => :lease)
WHERE agent_id = :agent_id AND id = :id AND claim_token = :claim_token
RETURNING TRUE AS done;

-- name: complete_task(agent_id, id, claim_token)$
-- Not repeatable: a second run finds the claim ended.
DELETE FROM elizasql.tasks
WHERE agent_id = :agent_id AND id = :id AND claim_token = :claim_token
RETURNING TRUE AS done;

-- name: repeat_task(agent_id, id, claim_token, delay)$
-- Ends a claim with success, and the task is due again after the delay. What is claimed is due: a due time in the future
-- was set during the claim, and counts.
-- Not repeatable: a second run finds the claim ended.
UPDATE elizasql.tasks
SET
    (due_at, ready_at) = (
        SELECT
            next.at AS due_at,
            next.at AS ready_at
        FROM (
            SELECT
                CASE
                    WHEN due_at > statement_timestamp() THEN due_at
                    ELSE statement_timestamp() + make_interval(secs => :delay)
                END AS at
        ) AS next
    ),
    attempts = 0,
    claim_token = NULL,
    error = NULL,
    updated_at = statement_timestamp()
WHERE agent_id = :agent_id AND id = :id AND claim_token = :claim_token
RETURNING TRUE AS done;

-- name: release_task(agent_id, id, claim_token, delay)$
-- Ends a claim as if it had not been; the task is ready again after the delay, and not before it is due.
-- Not repeatable: a second run finds the claim ended.
UPDATE elizasql.tasks
SET
    ready_at = greatest(due_at, statement_timestamp() + make_interval(secs => :delay)),
    attempts = attempts - 1,
    claim_token = NULL
WHERE agent_id = :agent_id AND id = :id AND claim_token = :claim_token
RETURNING TRUE AS done;

-- name: fail_task(agent_id, id, claim_token, error, retry, base_delay, max_delay)$
-- Ends a claim with an error. The pause doubles with every attempt, and is up to a quarter longer by chance, so that what
-- failed together is not tried together again; and it lasts until the task is due, where that is later. Without retry the
-- attempts are used up at once.
-- Not repeatable: a second run finds the claim ended.
UPDATE elizasql.tasks
SET
    ready_at = greatest(due_at, statement_timestamp() + make_interval(
        secs => least(:max_delay, :base_delay * power(2, least(attempts - 1, 60))) * (1 + random() / 4)
    )),
    attempts = CASE WHEN :retry THEN attempts ELSE greatest(attempts, max_attempts) END,
    claim_token = NULL,
    error = :error
WHERE agent_id = :agent_id AND id = :id AND claim_token = :claim_token
RETURNING TRUE AS done;
