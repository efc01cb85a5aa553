-- Tasks and what workers need to share them, goals, and logs with the runs that they tell of.

-- migrate:up

-- The time of a batch, the same in all its chunks: that of the chunk which begins it, kept to the transaction's end. The
-- chunks go by ids, so that two batches cannot wait for each other, and the times of their rows by the order given; with
-- a time for each chunk, what was given first and has a great id would come last.
CREATE FUNCTION elizasql.batch_time(begins boolean) RETURNS timestamptz
LANGUAGE sql
RETURN to_timestamp((
    CASE
        WHEN begins
            THEN set_config('elizasql.batch_time', extract(EPOCH FROM statement_timestamp())::text, TRUE)
        ELSE current_setting('elizasql.batch_time')
    END
)::double precision);

-- A task points at no room, world or entity by foreign key: ElizaOS makes tasks for rooms that are not stored yet, and
-- a task outlives them.
CREATE TABLE elizasql.tasks (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    name text NOT NULL,
    description text NOT NULL DEFAULT '',
    room_id uuid,
    world_id uuid,
    entity_id uuid,
    tags text[] NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    due_at timestamptz,
    -- From when on a worker may take it: when it is due, when the lease of its claim ends, when the pause after a failure
    -- is over. One column, so that one index finds all three.
    ready_at timestamptz NOT NULL DEFAULT now(),
    -- Claims so far; with max_attempts of them the task is dead: no worker takes it any more.
    attempts integer NOT NULL DEFAULT 0,
    max_attempts integer NOT NULL DEFAULT 5,
    -- Made anew by every claim: who does not have the newest one cannot end the claim.
    claim_token uuid,
    claimed_by text,
    error text,
    CONSTRAINT tasks_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT tasks_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    CONSTRAINT tasks_attempts_check CHECK (attempts >= 0 AND max_attempts >= 1)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX tasks_created_at_idx ON elizasql.tasks (agent_id, created_at, id);
CREATE INDEX tasks_name_idx ON elizasql.tasks (agent_id, name, created_at, id);
CREATE INDEX tasks_room_idx ON elizasql.tasks (agent_id, room_id, created_at, id) WHERE room_id IS NOT NULL;
CREATE INDEX tasks_world_idx ON elizasql.tasks (agent_id, world_id, created_at, id) WHERE world_id IS NOT NULL;
CREATE INDEX tasks_entity_idx ON elizasql.tasks (agent_id, entity_id, created_at, id) WHERE entity_id IS NOT NULL;
CREATE INDEX tasks_ready_idx ON elizasql.tasks (agent_id, ready_at, id)
WHERE tags @> '{queue}' AND attempts < max_attempts;
CREATE INDEX tasks_ready_name_idx ON elizasql.tasks (agent_id, name, ready_at, id)
WHERE tags @> '{queue}' AND attempts < max_attempts;
-- The few that got a due time after the end of the lease of their claim: which of them is next.
CREATE INDEX tasks_due_idx ON elizasql.tasks (agent_id, due_at, id)
WHERE tags @> '{queue}' AND attempts < max_attempts AND due_at > ready_at;

-- The tags of an agent's task as numbers that are the agent's own. A GIN index cannot begin with agent_id, and one on
-- the bare tags would walk through every agent's tasks that are tagged 'queue'; tags may be of any length.
CREATE FUNCTION elizasql.tag_keys(agent_id uuid, tags text[]) RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN coalesce(
    (SELECT array_agg(hashtextextended(tag, uuid_hash_extended(agent_id, 0))) FROM unnest(tags) AS given (tag)), '{}'
);
CREATE INDEX tasks_tags_idx ON elizasql.tasks USING gin (elizasql.tag_keys(agent_id, tags)) WITH (fastupdate = off);

-- Wakes the workers that wait. The payload is empty: a worker asks the table, which knows better by then. Commits that
-- notify wait for each other, database-wide, for some microseconds: for tasks that is nothing, for memories it would be.
CREATE FUNCTION elizasql.notify_task() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('elizasql_tasks_' || replace(NEW.agent_id::text, '-', ''), '');
    RETURN NULL;
END
$$;

CREATE TRIGGER tasks_notify_created
AFTER INSERT ON elizasql.tasks
FOR EACH ROW
WHEN (new.tags @> '{queue}' AND new.attempts < new.max_attempts)
EXECUTE FUNCTION elizasql.notify_task();

-- Not when a worker claims a task or extends its lease, which makes nothing ready sooner. A name or a tag may be the one
-- that another worker waits for, a due time sooner than what it waits for; the claim may have been left behind.
CREATE TRIGGER tasks_notify_ready
AFTER UPDATE OF name, tags, due_at, ready_at, max_attempts, claim_token ON elizasql.tasks
FOR EACH ROW
WHEN (
    new.tags @> '{queue}' AND new.attempts < new.max_attempts
    AND (
        new.max_attempts > old.max_attempts
        OR (old.name, old.tags, old.due_at) IS DISTINCT FROM (new.name, new.tags, new.due_at)
        OR (
            new.claim_token IS NULL
            AND (old.ready_at, old.claim_token) IS DISTINCT FROM (new.ready_at, new.claim_token)
        )
    )
)
EXECUTE FUNCTION elizasql.notify_task();

-- A goal is of the agent alone, of a room, of an entity, or of both; what it belongs to takes it away with it.
CREATE TABLE elizasql.goals (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    room_id uuid,
    entity_id uuid,
    name text NOT NULL,
    status text NOT NULL DEFAULT 'IN_PROGRESS',
    objectives jsonb NOT NULL DEFAULT '[]',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT goals_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT goals_status_check CHECK (status IN ('IN_PROGRESS', 'DONE', 'FAILED')),
    CONSTRAINT goals_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    CONSTRAINT goals_room_fkey FOREIGN KEY (agent_id, room_id)
    REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT goals_entity_fkey FOREIGN KEY (agent_id, entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE
);
CREATE INDEX goals_status_idx ON elizasql.goals (agent_id, status, created_at, id);
CREATE INDEX goals_room_idx ON elizasql.goals (agent_id, room_id, status, created_at, id);
CREATE INDEX goals_entity_idx ON elizasql.goals (agent_id, entity_id, status, created_at, id);

CREATE TABLE elizasql.logs (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    entity_id uuid NOT NULL,
    room_id uuid NOT NULL,
    type text NOT NULL,
    body jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- The run that the log tells of. Longer than an id ever is: no run, so that no body is too much for the index.
    run_id text GENERATED ALWAYS AS (
        CASE WHEN length(body ->> 'runId') BETWEEN 1 AND 200 THEN body ->> 'runId' END
    ) STORED,
    -- What a run event says; anything else than these four says nothing.
    run_status text GENERATED ALWAYS AS (
        CASE
            WHEN type = 'run_event' AND body ->> 'status' IN ('started', 'completed', 'timeout', 'error')
                THEN body ->> 'status'
        END
    ) STORED,
    CONSTRAINT logs_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT logs_entity_fkey FOREIGN KEY (agent_id, entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT logs_room_fkey FOREIGN KEY (agent_id, room_id)
    REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX logs_created_at_idx ON elizasql.logs (agent_id, created_at DESC, id DESC);
CREATE INDEX logs_type_idx ON elizasql.logs (agent_id, type, created_at DESC, id DESC);
CREATE INDEX logs_room_idx ON elizasql.logs (agent_id, room_id, created_at DESC, id DESC);
CREATE INDEX logs_entity_idx ON elizasql.logs (agent_id, entity_id, created_at DESC, id DESC);
-- Everything that a run did.
CREATE INDEX logs_run_idx ON elizasql.logs (agent_id, run_id) WHERE run_id IS NOT NULL;
-- The events of each run, newest first: folding all runs reads this index alone.
CREATE INDEX logs_run_event_idx ON elizasql.logs (agent_id, run_id, created_at DESC, id DESC) INCLUDE (run_status)
WHERE type = 'run_event' AND run_id IS NOT NULL;
-- Which runs had an event in a time, a room, of an entity: reads this index alone.
CREATE INDEX logs_run_event_time_idx ON elizasql.logs (agent_id, created_at) INCLUDE (run_id, room_id, entity_id)
WHERE type = 'run_event' AND run_id IS NOT NULL;

-- Locks what goes with rooms and entities, and gives the ids of the one or the other back; whoever deletes them asks for it
-- first. Else the cascades would lock row after row in an order of their own, with the rooms or entities locked before: of
-- a batch that changes such rows, in the order of the ids, and the deletion each could have what the other waits for. As
-- it is, both lock in one order, and those who lock a row before what it belongs to, as when it moves to another room,
-- are let through. A function, so that each statement sees what was committed while the one before it waited.
CREATE FUNCTION elizasql.lock_dependents(agent uuid, rooms uuid[], entities uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql ROWS 10 AS $$
BEGIN
    PERFORM FROM (
        SELECT room_id, entity_id FROM (
            SELECT room_id, entity_id FROM elizasql.participants WHERE agent_id = agent AND room_id = ANY(rooms)
            UNION ALL
            SELECT room_id, entity_id FROM elizasql.participants WHERE agent_id = agent AND entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY room_id, entity_id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.participants AS p
        WHERE p.agent_id = agent AND p.room_id = found.room_id AND p.entity_id = found.entity_id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.components WHERE agent_id = agent AND room_id = ANY(rooms)
            UNION ALL
            SELECT id FROM elizasql.components WHERE agent_id = agent AND entity_id = ANY(entities)
            UNION ALL
            SELECT id FROM elizasql.components WHERE agent_id = agent AND source_entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.components AS c WHERE c.agent_id = agent AND c.id = found.id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.relationships WHERE agent_id = agent AND source_entity_id = ANY(entities)
            UNION ALL
            SELECT id FROM elizasql.relationships WHERE agent_id = agent AND target_entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.relationships AS r WHERE r.agent_id = agent AND r.id = found.id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.memories WHERE agent_id = agent AND room_id = ANY(rooms)
            UNION ALL
            SELECT id FROM elizasql.memories WHERE agent_id = agent AND entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.memories AS m WHERE m.agent_id = agent AND m.id = found.id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.goals WHERE agent_id = agent AND room_id = ANY(rooms)
            UNION ALL
            SELECT id FROM elizasql.goals WHERE agent_id = agent AND entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.goals AS g WHERE g.agent_id = agent AND g.id = found.id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.logs WHERE agent_id = agent AND room_id = ANY(rooms)
            UNION ALL
            SELECT id FROM elizasql.logs WHERE agent_id = agent AND entity_id = ANY(entities)
            OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.logs AS l WHERE l.agent_id = agent AND l.id = found.id FOR UPDATE
    ) AS locked;
    RETURN QUERY SELECT unnest(rooms || entities);
END
$$;

-- As lock_dependents, of worlds: the components go with them, memories and rooms stay and no longer point at them.
CREATE FUNCTION elizasql.lock_dependents_of_worlds(agent uuid, worlds uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql ROWS 10 AS $$
BEGIN
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.components WHERE agent_id = agent AND world_id = ANY(worlds) OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.components AS c WHERE c.agent_id = agent AND c.id = found.id FOR UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.memories WHERE agent_id = agent AND world_id = ANY(worlds) OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.memories AS m WHERE m.agent_id = agent AND m.id = found.id FOR NO KEY UPDATE
    ) AS locked;
    PERFORM FROM (
        SELECT id FROM (
            SELECT id FROM elizasql.rooms WHERE agent_id = agent AND world_id = ANY(worlds) OFFSET 0
        ) AS theirs ORDER BY id
    ) AS found CROSS JOIN LATERAL (
        SELECT FROM elizasql.rooms AS r WHERE r.agent_id = agent AND r.id = found.id FOR NO KEY UPDATE
    ) AS locked;
    RETURN QUERY SELECT unnest(worlds);
END
$$;

-- migrate:down
DROP FUNCTION elizasql.lock_dependents_of_worlds(uuid, uuid[]);
DROP FUNCTION elizasql.lock_dependents(uuid, uuid[], uuid[]);
DROP TABLE elizasql.logs;
DROP TABLE elizasql.goals;
DROP TABLE elizasql.tasks;
DROP FUNCTION elizasql.notify_task();
DROP FUNCTION elizasql.batch_time(boolean);
DROP FUNCTION elizasql.tag_keys(uuid, text[]);
