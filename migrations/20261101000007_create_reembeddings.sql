-- The way to another width: while an agent is on it, its memories may have vectors of two widths, and one is in force.
--
-- agents.embedding_dimension says which, and searches see no other. A vector of the coming width stands in its final
-- place from the beginning, in a row of its own and in its own HNSW index. So the switch changes one row, and takes what
-- the look takes whether a vector is missing: 0.25 s for 50,000. Only to write 50,000 rows of 1536 dimensions took 11 s,
-- without an index of any kind for searches: that is what it would take to move them out of a staging table.
--
-- What a foreign key to agents cannot say, a trigger does: a vector is of the width in force, or of the coming one and
-- made by the move. It takes the lock that the key took, and the time: 97 us a row with it, 103 with the key.

-- migrate:up
-- target: the coming width. NULL: the vectors of width `source` are on their way out, whichever end the move had.
-- created_at: tells a move from another of the same widths, which was begun after it was abandoned.
CREATE TABLE elizasql.reembeddings (
    agent_id uuid NOT NULL,
    source smallint NOT NULL,
    target smallint,
    skip_missing boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT reembeddings_pkey PRIMARY KEY (agent_id),
    CONSTRAINT reembeddings_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    CONSTRAINT reembeddings_target_check CHECK (target <> source AND target IN (384, 512, 768, 1024, 1536, 3072))
);

-- Whoever begins a move, switches, gives up or cleans up sees every memory and every vector: what a policy hides would not
-- be missed at the switch, have no vector of the new width, and lose that of the old one. The server itself refuses to read
-- what policies guard; the locks keep policies away to the end of the transaction.
CREATE FUNCTION elizasql.refuse_policies() RETURNS trigger LANGUAGE plpgsql SET row_security = off AS $$
BEGIN
    PERFORM FROM ONLY elizasql.memories;
    PERFORM FROM ONLY elizasql.embeddings;
    RETURN coalesce(NEW, OLD);
END
$$;

CREATE TRIGGER reembeddings_see_all
BEFORE INSERT OR UPDATE OR DELETE ON elizasql.reembeddings
FOR EACH ROW
EXECUTE FUNCTION elizasql.refuse_policies();

-- Of the text that a move made the vector of; counts as long as the vector is of the coming width.
ALTER TABLE elizasql.embeddings ADD COLUMN text_hash bigint;
ALTER TABLE elizasql.embeddings DROP CONSTRAINT embeddings_pkey;
ALTER TABLE elizasql.embeddings ADD CONSTRAINT embeddings_pkey PRIMARY KEY (agent_id, memory_id, dimension);

-- Ends a statement that reads or writes vectors of a width that is not in force; the detail is for the library. Where
-- there is no agent, what a foreign key would say is said instead.
CREATE FUNCTION elizasql.refuse_dimension(given_agent uuid, locked integer, given integer) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM elizasql.agents WHERE id = given_agent) THEN
        RAISE EXCEPTION 'agent % does not exist', given_agent
            USING ERRCODE = 'foreign_key_violation', SCHEMA = 'elizasql', TABLE = 'memories',
            CONSTRAINT = 'memories_agent_fkey',
            DETAIL = format('Key (agent_id)=(%s) is not present in table "agents".', given_agent);
    END IF;
    RAISE EXCEPTION 'agent % has vectors of width %, not %', given_agent, coalesce(locked::text, 'none'), given
        USING ERRCODE = 'foreign_key_violation', SCHEMA = 'elizasql', TABLE = 'embeddings',
        CONSTRAINT = 'embeddings_dimension_fkey',
        DETAIL = jsonb_build_object('agent_id', given_agent, 'locked', locked, 'given', given);
END
$$;

-- The lock on the agent's row is that of a foreign key: the switch, which changes a part of a unique key of the agents,
-- waits for whoever has it, and who comes later sees the new width.
CREATE FUNCTION elizasql.check_dimension() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM elizasql.agents
    WHERE id = NEW.agent_id AND embedding_dimension = NEW.dimension
    FOR KEY SHARE;
    IF FOUND THEN
        RETURN NEW;
    END IF;
    IF NEW.text_hash IS NOT NULL THEN
        PERFORM FROM elizasql.reembeddings WHERE agent_id = NEW.agent_id AND target = NEW.dimension FOR SHARE;
        IF FOUND THEN
            RETURN NEW;
        END IF;
    END IF;
    PERFORM elizasql.refuse_dimension(
        NEW.agent_id, (SELECT embedding_dimension FROM elizasql.agents WHERE id = NEW.agent_id), NEW.dimension
    );
    RETURN NULL;
END
$$;

ALTER TABLE elizasql.embeddings DROP CONSTRAINT embeddings_dimension_fkey;

CREATE TRIGGER embeddings_check_new
BEFORE INSERT ON elizasql.embeddings
FOR EACH ROW
EXECUTE FUNCTION elizasql.check_dimension();

CREATE TRIGGER embeddings_check_changed
BEFORE UPDATE OF agent_id, dimension ON elizasql.embeddings
FOR EACH ROW
WHEN ((old.agent_id, old.dimension) IS DISTINCT FROM (new.agent_id, new.dimension))
EXECUTE FUNCTION elizasql.check_dimension();

-- A dimension that is set stays, unless a move is under way and has come to its end: every memory that has a vector of
-- the old width has one of the new, made of the text that it has now. A memory without text has none in the new width,
-- and stands in the way unless it may be skipped.
--
-- Whoever writes vectors for the agent has ended when this runs, since the update has the agent's row; so has whoever
-- adds vectors of the new width, once the move's row is ours. What is looked at is what they left: each statement of
-- this function sees what is committed by then, which it would not under another isolation level.
CREATE OR REPLACE FUNCTION elizasql.refuse_dimension_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    skips boolean;
BEGIN
    UPDATE elizasql.reembeddings SET target = NULL
    WHERE agent_id = OLD.id AND source = OLD.embedding_dimension AND target = NEW.embedding_dimension
    RETURNING skip_missing INTO skips;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'Cannot change embedding dimension for agent %: locked at %, given %',
            OLD.id, OLD.embedding_dimension, NEW.embedding_dimension
            USING ERRCODE = 'check_violation', SCHEMA = 'elizasql', TABLE = 'agents',
            CONSTRAINT = 'agents_embedding_dimension_locked';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the switch to another width needs read committed, not %', current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF EXISTS (
        SELECT FROM elizasql.embeddings AS leaving
        INNER JOIN elizasql.memories AS m ON m.agent_id = OLD.id AND m.id = leaving.memory_id
        LEFT JOIN elizasql.embeddings AS coming
            ON coming.agent_id = OLD.id AND coming.memory_id = leaving.memory_id
            AND coming.dimension = NEW.embedding_dimension
        WHERE leaving.agent_id = OLD.id AND leaving.dimension = OLD.embedding_dimension
            AND CASE
                WHEN coalesce(m.content ->> 'text', '') = '' THEN NOT skips OR coming.memory_id IS NOT NULL
                ELSE coming.text_hash IS DISTINCT FROM hashtextextended(m.content ->> 'text', 0)
            END
    ) THEN
        RAISE EXCEPTION 'agent % cannot change to width % yet: memories lack a vector of it', OLD.id,
            NEW.embedding_dimension
            USING ERRCODE = 'check_violation', SCHEMA = 'elizasql', TABLE = 'reembeddings',
            CONSTRAINT = 'reembeddings_complete';
    END IF;
    RETURN NEW;
END
$$;

-- Drops vectors of the coming width whose memories have lost their text since. By a custom plan, as what follows and as in
-- copy_scope_to_embedding().
CREATE FUNCTION elizasql.drop_textless_reembeddings(given_agent uuid, coming_dimension integer) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    DELETE FROM elizasql.embeddings AS coming
    WHERE
        coming.agent_id = given_agent AND coming.dimension = coming_dimension
        AND EXISTS (
            SELECT FROM elizasql.reembeddings AS r WHERE r.agent_id = given_agent AND r.target = coming_dimension
        )
        AND EXISTS (
            SELECT FROM elizasql.memories AS m
            WHERE m.agent_id = given_agent AND m.id = coming.memory_id AND coalesce(m.content ->> 'text', '') = ''
        );
END
$$;

-- Drops the next vectors of the width that goes, in the order of their memories' ids; gives how many, and the last id that
-- was looked at, NULL behind the end: one that somebody else deletes meanwhile is not among those that were dropped.
CREATE FUNCTION elizasql.drop_leaving_embeddings(
    given_agent uuid, first uuid, most bigint, OUT dropped bigint, OUT last uuid
)
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    WITH leaving AS (
        SELECT r.source
        FROM elizasql.reembeddings AS r
        INNER JOIN elizasql.agents AS a ON r.agent_id = a.id
        WHERE r.agent_id = given_agent AND r.target IS NULL AND a.embedding_dimension <> r.source
    ), batch AS (
        SELECT memory_id
        FROM elizasql.embeddings
        WHERE agent_id = given_agent AND memory_id >= first AND dimension = (SELECT source FROM leaving)
        ORDER BY memory_id
        LIMIT most
    ), deleted AS (
        DELETE FROM elizasql.embeddings
        WHERE
            agent_id = given_agent AND memory_id = ANY(ARRAY(SELECT memory_id FROM batch))
            AND dimension = (SELECT source FROM leaving)
        RETURNING memory_id
    )
    SELECT (SELECT count(*) FROM deleted), (SELECT memory_id FROM batch ORDER BY memory_id DESC LIMIT 1)
    INTO dropped, last;
END
$$;

-- migrate:down
-- What is not in force goes; a move that was under way has to begin anew.
DELETE FROM elizasql.embeddings AS e
USING elizasql.agents AS a
WHERE e.agent_id = a.id AND e.dimension <> a.embedding_dimension;

DROP FUNCTION elizasql.drop_leaving_embeddings(uuid, uuid, bigint);
DROP FUNCTION elizasql.drop_textless_reembeddings(uuid, integer);
DROP TRIGGER embeddings_check_new ON elizasql.embeddings;
DROP TRIGGER embeddings_check_changed ON elizasql.embeddings;
DROP FUNCTION elizasql.check_dimension();
DROP FUNCTION elizasql.refuse_dimension(uuid, integer, integer);
DROP TABLE elizasql.reembeddings;
DROP FUNCTION elizasql.refuse_policies();
ALTER TABLE elizasql.embeddings DROP CONSTRAINT embeddings_pkey;
ALTER TABLE elizasql.embeddings ADD CONSTRAINT embeddings_pkey PRIMARY KEY (agent_id, memory_id);
ALTER TABLE elizasql.embeddings DROP COLUMN text_hash;
ALTER TABLE elizasql.embeddings ADD CONSTRAINT embeddings_dimension_fkey FOREIGN KEY (agent_id, dimension)
REFERENCES elizasql.agents (id, embedding_dimension) ON DELETE CASCADE;

CREATE OR REPLACE FUNCTION elizasql.refuse_dimension_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'Cannot change embedding dimension for agent %: locked at %, given %',
        OLD.id, OLD.embedding_dimension, NEW.embedding_dimension
        USING ERRCODE = 'check_violation', SCHEMA = 'elizasql', TABLE = 'agents',
        CONSTRAINT = 'agents_embedding_dimension_locked';
END
$$;
