-- Agents and what they live among: worlds, rooms, entities, participants, components, relationships.
-- agent_id leads every key, so that one agent can neither read, move nor collide with another's rows.

-- migrate:up
-- IF NOT EXISTS would ask for the right to create schemas all the same, which the owner of one that an administrator has
-- made may not have.
DO $$
BEGIN
    IF to_regnamespace('elizasql') IS NULL THEN
        CREATE SCHEMA elizasql;
    END IF;
END
$$;

-- Does nothing where an administrator has installed it; otherwise the role needs the right to create extensions.
CREATE EXTENSION IF NOT EXISTS vector;

-- What a server knows of itself, which migrations it has and which of its transactions did what, it does not take from
-- another by replication, whatever is published: versions would be there twice, or without what they stand for. Said as a
-- condition, too: a trigger that was off and on again fires for what is not replicated, and only for that.
CREATE FUNCTION elizasql.ignore_replicated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END
$$;

CREATE TRIGGER schema_migrations_own
BEFORE INSERT OR UPDATE OR DELETE ON elizasql.schema_migrations
FOR EACH ROW
WHEN (current_setting('session_replication_role') = 'replica')
EXECUTE FUNCTION elizasql.ignore_replicated();

ALTER TABLE elizasql.schema_migrations ENABLE ALWAYS TRIGGER schema_migrations_own;

-- Ends a statement that was to change rows which are not there; what it changed so far is undone with it.
CREATE FUNCTION elizasql.refuse_missing(kind text, missing uuid[]) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'no such %: %', kind, array_to_string(missing[1:10], ', ')
        || CASE WHEN cardinality(missing) > 10 THEN format(' and %s more', cardinality(missing) - 10) ELSE '' END
        USING ERRCODE = 'no_data_found', SCHEMA = 'elizasql', TABLE = kind;
END
$$;

-- Undoes a statement that met rows which must not be there yet; the error is that of their key.
CREATE FUNCTION elizasql.refuse_present(kind text, present uuid[]) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% are there already', kind
        USING ERRCODE = 'unique_violation', SCHEMA = 'elizasql', TABLE = kind, CONSTRAINT = kind || '_pkey',
            DETAIL = format('Key (id)=(%s) already exists.', present[1]);
END
$$;

-- Whether a time that is given is the one that is stored. ElizaOS's JSON cuts times to milliseconds: what was read as such
-- and comes back is no change, and must not move a row before those of the same millisecond.
CREATE FUNCTION elizasql.is_same_time(stored timestamptz, given timestamptz) RETURNS boolean
LANGUAGE sql STABLE
RETURN given IS NOT DISTINCT FROM stored OR given IS NOT DISTINCT FROM date_trunc('milliseconds', stored);

-- What becomes of a stored time when another one may be given.
CREATE FUNCTION elizasql.changed_time(stored timestamptz, given timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN CASE WHEN given IS NULL OR elizasql.is_same_time(stored, given) THEN stored ELSE given END;

-- The time of a row that comes with one as a parameter, or without. asyncpg sends the first and the last microsecond of
-- Python's calendar as infinities, and gives these back without a time zone.
CREATE FUNCTION elizasql.made_time(given timestamptz, otherwise timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN greatest(
    least(coalesce(given, otherwise), timestamptz '9999-12-31 23:59:59.999999+00'),
    timestamptz '0001-01-01 00:00:00+00'
);

-- Servers are deployments of agents (row isolation), not message servers.
CREATE TABLE elizasql.servers (
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT servers_pkey PRIMARY KEY (id)
);

CREATE TABLE elizasql.agents (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    name text NOT NULL,
    username text,
    system text,
    bio jsonb NOT NULL DEFAULT '[]',
    message_examples jsonb NOT NULL DEFAULT '[]',
    post_examples jsonb NOT NULL DEFAULT '[]',
    topics jsonb NOT NULL DEFAULT '[]',
    adjectives jsonb NOT NULL DEFAULT '[]',
    knowledge jsonb NOT NULL DEFAULT '[]',
    plugins jsonb NOT NULL DEFAULT '[]',
    settings jsonb NOT NULL DEFAULT '{}',
    style jsonb NOT NULL DEFAULT '{}',
    enabled boolean NOT NULL DEFAULT TRUE,
    server_id uuid,
    embedding_dimension smallint,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT agents_pkey PRIMARY KEY (id),
    CONSTRAINT agents_embedding_dimension_check
    CHECK (embedding_dimension IN (384, 512, 768, 1024, 1536, 3072)),
    -- What embeddings point at: an embedding of another width than its agent's has nothing to refer to.
    CONSTRAINT agents_embedding_dimension_key UNIQUE (id, embedding_dimension)
);
CREATE INDEX agents_created_at_idx ON elizasql.agents (created_at);
CREATE INDEX agents_updated_at_idx ON elizasql.agents (updated_at);

-- A dimension that is set stays: the first one to lock it wins.
CREATE FUNCTION elizasql.refuse_dimension_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'Cannot change embedding dimension for agent %: locked at %, given %',
        OLD.id, OLD.embedding_dimension, NEW.embedding_dimension
        USING ERRCODE = 'check_violation', SCHEMA = 'elizasql', TABLE = 'agents',
        CONSTRAINT = 'agents_embedding_dimension_locked';
END
$$;

CREATE TRIGGER agents_embedding_dimension_locked
BEFORE UPDATE OF embedding_dimension ON elizasql.agents
FOR EACH ROW
WHEN (old.embedding_dimension IS NOT NULL AND new.embedding_dimension IS DISTINCT FROM old.embedding_dimension)
EXECUTE FUNCTION elizasql.refuse_dimension_change();

CREATE TABLE elizasql.worlds (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    name text NOT NULL DEFAULT '',
    message_server_id uuid,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT worlds_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT worlds_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE
);
CREATE INDEX worlds_created_at_idx ON elizasql.worlds (agent_id, created_at, id);

CREATE TABLE elizasql.rooms (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    name text,
    source text NOT NULL,
    type text NOT NULL,
    channel_id text,
    message_server_id uuid,
    world_id uuid,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT rooms_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT rooms_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    CONSTRAINT rooms_world_fkey FOREIGN KEY (agent_id, world_id)
    REFERENCES elizasql.worlds (agent_id, id) ON DELETE SET NULL (world_id)
);
CREATE INDEX rooms_world_idx ON elizasql.rooms (agent_id, world_id, created_at, id);

CREATE TABLE elizasql.entities (
    agent_id uuid NOT NULL,
    id uuid NOT NULL,
    names text[] NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT entities_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT entities_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE
);

CREATE TABLE elizasql.participants (
    agent_id uuid NOT NULL,
    room_id uuid NOT NULL,
    entity_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    room_state text,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT participants_pkey PRIMARY KEY (agent_id, room_id, entity_id),
    CONSTRAINT participants_id_key UNIQUE (agent_id, id),
    CONSTRAINT participants_room_state_check CHECK (room_state IN ('FOLLOWED', 'MUTED')),
    CONSTRAINT participants_room_fkey FOREIGN KEY (agent_id, room_id)
    REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT participants_entity_fkey FOREIGN KEY (agent_id, entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE
);
CREATE INDEX participants_entity_idx ON elizasql.participants (agent_id, entity_id, room_id);

CREATE TABLE elizasql.components (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    entity_id uuid NOT NULL,
    room_id uuid NOT NULL,
    world_id uuid,
    source_entity_id uuid,
    type text NOT NULL,
    data jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT components_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT components_natural_key
    UNIQUE NULLS NOT DISTINCT (agent_id, entity_id, type, world_id, source_entity_id),
    CONSTRAINT components_entity_fkey FOREIGN KEY (agent_id, entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT components_room_fkey FOREIGN KEY (agent_id, room_id)
    REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT components_world_fkey FOREIGN KEY (agent_id, world_id)
    REFERENCES elizasql.worlds (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT components_source_entity_fkey FOREIGN KEY (agent_id, source_entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE
);
CREATE INDEX components_room_idx ON elizasql.components (agent_id, room_id);
-- The collation makes it the only index that serves a type in a world: query_entities asks for it by that.
CREATE INDEX components_world_idx ON elizasql.components (agent_id, world_id, type COLLATE "C", entity_id);
CREATE INDEX components_source_entity_idx ON elizasql.components (agent_id, source_entity_id);
CREATE INDEX components_type_idx ON elizasql.components (agent_id, type, entity_id);

CREATE TABLE elizasql.relationships (
    agent_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    source_entity_id uuid NOT NULL,
    target_entity_id uuid NOT NULL,
    tags text[] NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT relationships_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT relationships_pair_key UNIQUE (agent_id, source_entity_id, target_entity_id),
    CONSTRAINT relationships_source_fkey FOREIGN KEY (agent_id, source_entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT relationships_target_fkey FOREIGN KEY (agent_id, target_entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE
);
CREATE INDEX relationships_source_idx ON elizasql.relationships (agent_id, source_entity_id, created_at, id);
CREATE INDEX relationships_target_idx ON elizasql.relationships (agent_id, target_entity_id, created_at, id);

-- migrate:down
DROP TABLE elizasql.relationships;
DROP TABLE elizasql.components;
DROP TABLE elizasql.participants;
DROP TABLE elizasql.entities;
DROP TABLE elizasql.rooms;
DROP TABLE elizasql.worlds;
DROP TABLE elizasql.agents;
DROP FUNCTION elizasql.refuse_dimension_change();
DROP TABLE elizasql.servers;
DROP FUNCTION elizasql.made_time(timestamptz, timestamptz);
DROP FUNCTION elizasql.changed_time(timestamptz, timestamptz);
DROP FUNCTION elizasql.is_same_time(timestamptz, timestamptz);
DROP FUNCTION elizasql.refuse_present(text, uuid[]);
DROP FUNCTION elizasql.refuse_missing(text, uuid[]);
DROP TRIGGER schema_migrations_own ON elizasql.schema_migrations;
DROP FUNCTION elizasql.ignore_replicated();
