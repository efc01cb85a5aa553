-- The cache, and who may write to the agent: pairing requests and allowlists. And what the planner shall think of agents:
--
-- Plans are generic, made for the average agent. Where most agents have a few rows, any index that begins with agent_id
-- seems as good as the one that a statement is written for, and a large agent pays for it: all that is its own is read.
-- With 60,000 rooms of one agent among 30,000 with one each, a lookup of one id took 8 to 20 ms instead of 0.15. Told that
-- there are 10 agents, the planner takes every agent for a large one; for small ones the plan is as good as another.

-- migrate:up

-- As refuse_missing(text, uuid[]), for rows that have another key than an id.
CREATE FUNCTION elizasql.refuse_missing(kind text, missing text[]) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'no such %: %', kind, array_to_string(missing[1:10], ', ')
        || CASE WHEN cardinality(missing) > 10 THEN format(' and %s more', cardinality(missing) - 10) ELSE '' END
        USING ERRCODE = 'no_data_found', SCHEMA = 'elizasql', TABLE = kind;
END
$$;

CREATE TABLE elizasql.cache (
    agent_id uuid NOT NULL,
    key_hash bytea NOT NULL,
    key text NOT NULL,
    value jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    CONSTRAINT cache_pkey PRIMARY KEY (agent_id, key_hash),
    CONSTRAINT cache_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE
);
CREATE INDEX cache_expires_at_idx ON elizasql.cache (agent_id, expires_at) WHERE expires_at IS NOT NULL;

-- What a key is found by: an index entry holds at most 2,700 bytes, a key may be of any length. No generated column,
-- since it is of the primary key, and replication finds rows by it: of a generated one a publisher does not tell.
CREATE FUNCTION elizasql.hash_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.key_hash := sha256(convert_to(NEW.key, 'UTF8'));
    RETURN NEW;
END
$$;

CREATE TRIGGER cache_hash_key
BEFORE INSERT OR UPDATE OF key, key_hash ON elizasql.cache
FOR EACH ROW
EXECUTE FUNCTION elizasql.hash_key();

CREATE TABLE elizasql.pairing_requests (
    agent_id uuid NOT NULL,
    id uuid NOT NULL,
    channel text NOT NULL,
    sender_id text NOT NULL,
    code text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pairing_requests_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT pairing_requests_code_key UNIQUE (agent_id, channel, code),
    CONSTRAINT pairing_requests_sender_key UNIQUE (agent_id, channel, sender_id),
    CONSTRAINT pairing_requests_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE
);

CREATE TABLE elizasql.pairing_allowlist (
    agent_id uuid NOT NULL,
    id uuid NOT NULL,
    channel text NOT NULL,
    sender_id text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pairing_allowlist_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT pairing_allowlist_sender_key UNIQUE (agent_id, channel, sender_id),
    CONSTRAINT pairing_allowlist_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE
);

ALTER TABLE elizasql.worlds ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.rooms ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.entities ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.participants ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.cache ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.pairing_requests ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.pairing_allowlist ALTER COLUMN agent_id SET (n_distinct = 10);

-- Likewise for entities that relationships come from or go to: most have a few, and by the average the index of all that
-- go to one is as good as that of the pair. To find one pair, all of a hub's were read, 30,000 of them in 35 ms.
ALTER TABLE elizasql.relationships ALTER COLUMN agent_id SET (n_distinct = 10);
ALTER TABLE elizasql.relationships ALTER COLUMN source_entity_id SET (n_distinct = 10);
ALTER TABLE elizasql.relationships ALTER COLUMN target_entity_id SET (n_distinct = 10);

-- migrate:down
ALTER TABLE elizasql.relationships ALTER COLUMN target_entity_id RESET (n_distinct);
ALTER TABLE elizasql.relationships ALTER COLUMN source_entity_id RESET (n_distinct);
ALTER TABLE elizasql.relationships ALTER COLUMN agent_id RESET (n_distinct);
ALTER TABLE elizasql.worlds ALTER COLUMN agent_id RESET (n_distinct);
ALTER TABLE elizasql.rooms ALTER COLUMN agent_id RESET (n_distinct);
ALTER TABLE elizasql.entities ALTER COLUMN agent_id RESET (n_distinct);
ALTER TABLE elizasql.participants ALTER COLUMN agent_id RESET (n_distinct);
DROP TABLE elizasql.pairing_allowlist;
DROP TABLE elizasql.pairing_requests;
DROP TABLE elizasql.cache;
DROP FUNCTION elizasql.hash_key();
DROP FUNCTION elizasql.refuse_missing(text, text[]);
