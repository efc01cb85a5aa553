-- Memories and their embeddings, hash-partitioned by agent; the near-duplicate check; the HNSW indexes.
--
-- Embeddings stand beside memories and not in them: every update of a row that has an HNSW index inserts into that
-- index again. They carry a copy of the memory's scope (type, room, world, entity, "unique"), because a filter on a
-- joined table turns a search of 0.4 ms into one of 1.8 ms and loses rows.

-- migrate:up
CREATE TABLE elizasql.memories (
    agent_id uuid NOT NULL,
    id uuid NOT NULL,
    type text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    content jsonb NOT NULL,
    entity_id uuid,
    room_id uuid,
    world_id uuid,
    "unique" boolean NOT NULL DEFAULT TRUE,
    metadata jsonb NOT NULL DEFAULT '{}',
    CONSTRAINT memories_pkey PRIMARY KEY (agent_id, id),
    CONSTRAINT memories_agent_fkey FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    CONSTRAINT memories_entity_fkey FOREIGN KEY (agent_id, entity_id)
    REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT memories_room_fkey FOREIGN KEY (agent_id, room_id)
    REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE,
    CONSTRAINT memories_world_fkey FOREIGN KEY (agent_id, world_id)
    REFERENCES elizasql.worlds (agent_id, id) ON DELETE SET NULL (world_id),
    CONSTRAINT memories_fragment_check
    CHECK (metadata ->> 'type' <> 'fragment' OR (metadata ? 'documentId' AND metadata ? 'position')),
    CONSTRAINT memories_document_check CHECK (metadata ->> 'type' <> 'document' OR metadata ? 'timestamp')
) PARTITION BY HASH (agent_id);
-- On an expression that only the agent-wide statements order by: a generic plan takes a range of times for half a
-- percent of the rows, under which the index of a type looks as good as that of a room, and would be walked in its place.
-- greatest() of one value is that value, and leakproof, so that policies do not keep a bound from the index.
CREATE INDEX memories_type_idx ON elizasql.memories (agent_id, type, (greatest(created_at)) DESC, id DESC);
CREATE INDEX memories_room_idx ON elizasql.memories (agent_id, room_id, type, created_at DESC, id DESC);
CREATE INDEX memories_entity_idx ON elizasql.memories (agent_id, entity_id, type, created_at DESC, id DESC);
CREATE INDEX memories_world_idx ON elizasql.memories (agent_id, world_id, type, created_at DESC, id DESC)
WHERE world_id IS NOT NULL;
-- The fragments of a document, found when the document is deleted, in whatever case they write its id. An id has 36
-- characters; of what is longer, and no id, the index holds enough to tell.
CREATE INDEX memories_document_idx ON elizasql.memories (agent_id, left(lower(metadata ->> 'documentId'), 37))
WHERE metadata ? 'documentId';
-- An edit distance of k bounds the difference of the lengths by k: the range of lengths is the exact prefilter.
CREATE INDEX memories_text_length_idx ON elizasql.memories (agent_id, type, length(content ->> 'text'))
WHERE content ? 'text';

CREATE TABLE elizasql.embeddings (
    agent_id uuid NOT NULL,
    memory_id uuid NOT NULL,
    type text NOT NULL,
    room_id uuid,
    world_id uuid,
    entity_id uuid,
    "unique" boolean NOT NULL,
    dimension smallint NOT NULL,
    -- False: in the tail, which searches scan exactly. The indexer makes it true, and only then HNSW holds the row.
    indexed boolean NOT NULL DEFAULT FALSE,
    -- The transaction that last changed the vector or its scope: how other processes find out that it has changed.
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    dim_384 vector(384),
    dim_512 vector(512),
    dim_768 vector(768),
    dim_1024 vector(1024),
    dim_1536 vector(1536),
    dim_3072 vector(3072),
    CONSTRAINT embeddings_pkey PRIMARY KEY (agent_id, memory_id),
    CONSTRAINT embeddings_dimension_fkey FOREIGN KEY (agent_id, dimension)
    REFERENCES elizasql.agents (id, embedding_dimension) ON DELETE CASCADE,
    CONSTRAINT embeddings_dimension_check CHECK (
        num_nonnulls(dim_384, dim_512, dim_768, dim_1024, dim_1536, dim_3072) = 1
        AND CASE dimension
            WHEN 384 THEN dim_384 IS NOT NULL
            WHEN 512 THEN dim_512 IS NOT NULL
            WHEN 768 THEN dim_768 IS NOT NULL
            WHEN 1024 THEN dim_1024 IS NOT NULL
            WHEN 1536 THEN dim_1536 IS NOT NULL
            WHEN 3072 THEN dim_3072 IS NOT NULL
            ELSE FALSE
        END
    ),
    -- What no search could find must not be here, not by raw SQL either: HNSW holds half precision, and one vector that
    -- is beyond it would keep it from being built. The cast refuses that; what it rounds to zero has no direction. To say
    -- so of each component took 85 us more for each single insert: the server reads a check anew for every statement.
    CONSTRAINT embeddings_range_check CHECK (
        l2_norm(coalesce(dim_384, dim_512, dim_768, dim_1024, dim_1536, dim_3072)::halfvec) > 0
    )
) PARTITION BY HASH (agent_id);
CREATE INDEX embeddings_room_idx ON elizasql.embeddings (agent_id, room_id, type);
CREATE INDEX embeddings_entity_idx ON elizasql.embeddings (agent_id, entity_id, type);
CREATE INDEX embeddings_world_idx ON elizasql.embeddings (agent_id, world_id, type) WHERE world_id IS NOT NULL;
CREATE INDEX embeddings_tail_idx ON elizasql.embeddings (agent_id, type) WHERE NOT indexed;
-- Also for a type's rows whenever they were written: an index of (agent_id, type) beside it took 2-4 % of each write.
CREATE INDEX embeddings_xid_idx ON elizasql.embeddings (agent_id, type, xid);

-- The foreign key to the memory stands on each partition and names the memories' partition of the same remainder: a key
-- that refers to the partitioned parent is checked in 73 us a row, this one in 5.
--
-- One HNSW index per partition and dimension, not attached to a partitioned index, so that a bulk load can rebuild
-- one of them alone. ef_construction = 128 instead of 64: with one agent's 100,000 vectors in one graph, recall@10 at
-- ef_search 100 is 0.990 instead of 0.987, and the index is off the write path. halfvec: half the size of a vector
-- index, faster at equal recall, and the only way to index 3072 dimensions. toast_tuple_target: vectors of 768 to 1536
-- dimensions stay in the row, exact scans are 4-6 times faster.
DO $$
DECLARE
    suffix text;
    dim int;
BEGIN
    FOR part IN 0..15 LOOP
        suffix := 'p' || lpad(part::text, 2, '0');
        EXECUTE format(
            'CREATE TABLE elizasql.memories_%s PARTITION OF elizasql.memories
             FOR VALUES WITH (MODULUS 16, REMAINDER %s)
             WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05)', suffix, part);
        EXECUTE format(
            'CREATE TABLE elizasql.embeddings_%s PARTITION OF elizasql.embeddings
             FOR VALUES WITH (MODULUS 16, REMAINDER %s)
             WITH (toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05,
                   autovacuum_analyze_scale_factor = 0.05)', suffix, part);
        EXECUTE format(
            'ALTER TABLE elizasql.embeddings_%1$s ADD CONSTRAINT embeddings_memory_fkey
             FOREIGN KEY (agent_id, memory_id) REFERENCES elizasql.memories_%1$s (agent_id, id)
             ON DELETE CASCADE', suffix);
        FOREACH dim IN ARRAY ARRAY[384, 512, 768, 1024, 1536, 3072] LOOP
            EXECUTE format(
                'CREATE INDEX embeddings_%1$s_dim_%2$s_hnsw ON elizasql.embeddings_%1$s
                 USING hnsw ((dim_%2$s::halfvec(%2$s)) halfvec_cosine_ops)
                 WITH (m = 16, ef_construction = 128) WHERE indexed', suffix, dim);
        END LOOP;
    END LOOP;
END
$$;

-- A memory's change of scope reaches its embedding in the same statement, whoever makes it: a method, the foreign key
-- that clears a deleted world, or raw SQL. By a custom plan: a generic one that updates the partitioned table locks all 16
-- partitions, and waits for the index that is built in any of them. It takes 0.1 ms a row more, where HNSW takes 2 and more.
--
-- Every index has a new entry for a row that changes its scope, HNSW too. So the row goes to the tail, as what is written
-- does: a world of 33,000 memories was removed in minutes. elizasql.inline: a transaction whose writes feed the index.
--
-- From PostgreSQL 18 on the triggers of a cascade run as the owner of the tables. Where policies that are forced on it hide
-- the rows from it, nothing would be copied, without a word.
CREATE FUNCTION elizasql.copy_scope_to_embedding() RETURNS trigger LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    UPDATE elizasql.embeddings
    SET type = NEW.type, room_id = NEW.room_id, world_id = NEW.world_id, entity_id = NEW.entity_id,
        "unique" = NEW."unique", xid = pg_current_xact_id(),
        indexed = indexed AND coalesce(current_setting('elizasql.inline', TRUE), '') = 'on'
    WHERE agent_id = NEW.agent_id AND memory_id = NEW.id;
    IF NOT FOUND AND row_security_active('elizasql.embeddings'::regclass)
        AND NOT EXISTS (SELECT FROM elizasql.memories WHERE agent_id = NEW.agent_id AND id = NEW.id) THEN
        RAISE EXCEPTION 'the policies of memories and embeddings hide the rows from %, who runs this trigger', current_user
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER memories_copy_scope
AFTER UPDATE OF type, room_id, world_id, entity_id, "unique" ON elizasql.memories
FOR EACH ROW
WHEN (
    (old.type, old.room_id, old.world_id, old.entity_id, old."unique")
    IS DISTINCT FROM (new.type, new.room_id, new.world_id, new.entity_id, new."unique")
)
EXECUTE FUNCTION elizasql.copy_scope_to_embedding();

-- A memory stays with its agent. Into another partition the server would move it by a deletion and an insertion, and its
-- embedding would be gone with the first, without a word. For the whole statement: of rows it would lock each that changes.
CREATE FUNCTION elizasql.refuse_agent_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a memory cannot go to another agent: create it there, and delete it here'
        USING ERRCODE = 'check_violation', SCHEMA = 'elizasql', TABLE = 'memories',
        CONSTRAINT = 'memories_agent_locked';
END
$$;

CREATE TRIGGER memories_agent_locked
BEFORE UPDATE OF agent_id ON elizasql.memories
FOR EACH STATEMENT
EXECUTE FUNCTION elizasql.refuse_agent_change();

-- What the statements of this library write carries its transaction already; these see to what does not: raw SQL, rows
-- that are copied in with the numbers of another server, replication. Moving a row into the index is no change.
CREATE FUNCTION elizasql.stamp_embedding() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.xid := pg_current_xact_id();
    RETURN NEW;
END
$$;

CREATE TRIGGER embeddings_stamp_new
BEFORE INSERT ON elizasql.embeddings
FOR EACH ROW
WHEN (new.xid IS DISTINCT FROM pg_current_xact_id())
EXECUTE FUNCTION elizasql.stamp_embedding();

CREATE TRIGGER embeddings_stamp_changed
BEFORE UPDATE OF
agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, xid,
dim_384, dim_512, dim_768, dim_1024, dim_1536, dim_3072
ON elizasql.embeddings
FOR EACH ROW
WHEN (new.xid IS DISTINCT FROM pg_current_xact_id())
EXECUTE FUNCTION elizasql.stamp_embedding();

-- The ids of an embedding as they travel to a process that holds them: memory, room, world, entity (nil for none), and
-- flags (1: unique, 2, 4, 8: has a room, a world, an entity). Written so that the planner puts it into the statement.
CREATE FUNCTION elizasql.send_scope(memory uuid, room uuid, world uuid, entity uuid, is_unique boolean)
RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT
        uuid_send(memory)
        || uuid_send(coalesce(room, '00000000-0000-0000-0000-000000000000'))
        || uuid_send(coalesce(world, '00000000-0000-0000-0000-000000000000'))
        || uuid_send(coalesce(entity, '00000000-0000-0000-0000-000000000000'))
        || int2send((
            is_unique::int + 2 * (room IS NOT NULL)::int + 4 * (world IS NOT NULL)::int + 8 * (entity IS NOT NULL)::int
        )::smallint)
$$;

-- What a process that holds memories cannot see by embeddings.xid: which transactions have last updated or removed
-- memories of an agent and type; type '' is that of all, whose row the creation of the agent leaves: with one that is
-- deleted all else is forgotten, and the next may have its id. A transaction takes over the row of one that has ended, and
-- adds a row only when all are taken, or when it may not look; one in a hundred removes what others have left.
CREATE TABLE elizasql.memory_rewrites (
    agent_id uuid NOT NULL,
    type text NOT NULL,
    xid xid8 NOT NULL
);
-- With xid: without it rows are overwritten in place, but while an old snapshot keeps them from it all that have been are
-- read by each change and each search.
CREATE INDEX memory_rewrites_idx ON elizasql.memory_rewrites (agent_id, type, xid);
ALTER TABLE elizasql.memory_rewrites REPLICA IDENTITY FULL;

-- Of what is replicated, the triggers below note the transactions of this server. The other one's numbers mean nothing
-- here, and one that happens to be the same would stand for what has been noted under it.
CREATE TRIGGER memory_rewrites_own
BEFORE INSERT OR UPDATE OR DELETE ON elizasql.memory_rewrites
FOR EACH ROW
WHEN (pg_trigger_depth() = 0 AND current_setting('session_replication_role') = 'replica')
EXECUTE FUNCTION elizasql.ignore_replicated();

ALTER TABLE elizasql.memory_rewrites ENABLE ALWAYS TRIGGER memory_rewrites_own;

-- A later transaction may stand in for one that has ended: whoever does not know of that one does not know of it either.
-- Under another isolation than READ COMMITTED to take over a row could fail, and of two SERIALIZABLE ones that only look
-- at this table one would, so that these add a row unread. That it has noted it a transaction remembers by a setting of its
-- own, which goes with it, with the savepoint, or, where another than the table's owner subscribes, with each row. The latest
-- row is taken first: behind it may lie one for each transaction that an old snapshot keeps from being vacuumed. A
-- statement of its own updates it, which sees it as it is when locked.
CREATE FUNCTION elizasql.note_rewrite(given_agent uuid, given_type text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    place tid;
    latest xid8;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        SELECT ctid, xid INTO place, latest FROM elizasql.memory_rewrites
        WHERE agent_id = given_agent AND type = given_type
        ORDER BY xid DESC LIMIT 1
        FOR UPDATE SKIP LOCKED;
    END IF;
    IF place IS NULL THEN
        INSERT INTO elizasql.memory_rewrites (agent_id, type, xid)
        SELECT id, given_type, pg_current_xact_id() FROM elizasql.agents WHERE id = given_agent;
    ELSIF latest <> pg_current_xact_id() THEN
        UPDATE elizasql.memory_rewrites SET xid = pg_current_xact_id() WHERE ctid = place;
        IF pg_current_xact_id()::text LIKE '%00' THEN
            DELETE FROM elizasql.memory_rewrites WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM elizasql.memory_rewrites
                WHERE agent_id = given_agent AND type = given_type AND xid <> pg_current_xact_id()
                FOR UPDATE SKIP LOCKED));
        END IF;
    END IF;
    PERFORM set_config('elizasql.noted', concat(
        format('%s %L;', given_agent, given_type), left(current_setting('elizasql.noted', TRUE), 4000)), TRUE);
END
$$;

-- Looked up here, since a call for each row would take four times as long.
CREATE FUNCTION elizasql.note_rewritten_row() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF position(
        format('%s %L;', OLD.agent_id, OLD.type) IN coalesce(current_setting('elizasql.noted', TRUE), '')
    ) = 0 THEN
        PERFORM elizasql.note_rewrite(OLD.agent_id, OLD.type);
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION elizasql.note_truncated_rows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format(
        'SELECT elizasql.note_rewrite(agent_id, type) FROM (SELECT DISTINCT agent_id, type FROM %I.%I) AS held',
        TG_TABLE_SCHEMA, TG_TABLE_NAME);
    RETURN NULL;
END
$$;

CREATE FUNCTION elizasql.note_agent() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO elizasql.memory_rewrites (agent_id, type, xid) VALUES (NEW.id, '', pg_current_xact_id());
    RETURN NULL;
END
$$;

CREATE FUNCTION elizasql.forget_rewrites() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM elizasql.memory_rewrites WHERE agent_id = OLD.id;
    RETURN NULL;
END
$$;

CREATE TRIGGER memories_rewritten
AFTER UPDATE ON elizasql.memories
FOR EACH ROW
EXECUTE FUNCTION elizasql.note_rewritten_row();

CREATE TRIGGER embeddings_removed
AFTER DELETE ON elizasql.embeddings
FOR EACH ROW
EXECUTE FUNCTION elizasql.note_rewritten_row();

CREATE TRIGGER embeddings_moved
AFTER UPDATE OF agent_id, memory_id, type, dimension ON elizasql.embeddings
FOR EACH ROW
WHEN (
    (old.agent_id, old.memory_id, old.type, old.dimension)
    IS DISTINCT FROM (new.agent_id, new.memory_id, new.type, new.dimension)
)
EXECUTE FUNCTION elizasql.note_rewritten_row();

CREATE TRIGGER agents_created
AFTER INSERT ON elizasql.agents
FOR EACH ROW
EXECUTE FUNCTION elizasql.note_agent();

-- After the cascades, by its name. What they remove is noted still later, and not where the agent is gone.
CREATE TRIGGER agents_rewrites_forgotten
AFTER DELETE ON elizasql.agents
FOR EACH ROW
EXECUTE FUNCTION elizasql.forget_rewrites();

ALTER TABLE elizasql.agents ENABLE ALWAYS TRIGGER agents_created;
ALTER TABLE elizasql.agents ENABLE ALWAYS TRIGGER agents_rewrites_forgotten;
ALTER TABLE elizasql.memories ENABLE ALWAYS TRIGGER memories_rewritten;
ALTER TABLE elizasql.embeddings ENABLE ALWAYS TRIGGER embeddings_removed;
ALTER TABLE elizasql.embeddings ENABLE ALWAYS TRIGGER embeddings_moved;

DO $$
BEGIN
    FOR part IN 0..15 LOOP
        EXECUTE format(
            'CREATE TRIGGER embeddings_truncated BEFORE TRUNCATE ON elizasql.embeddings_p%1$s
             FOR EACH STATEMENT EXECUTE FUNCTION elizasql.note_truncated_rows();
             ALTER TABLE elizasql.embeddings_p%1$s ENABLE ALWAYS TRIGGER embeddings_truncated',
            lpad(part::text, 2, '0'));
    END LOOP;
END
$$;

ALTER TABLE elizasql.embeddings ENABLE ALWAYS TRIGGER embeddings_stamp_new;
ALTER TABLE elizasql.embeddings ENABLE ALWAYS TRIGGER embeddings_stamp_changed;

-- near_duplicates_N(agent, ids, types, rooms, worlds, entities, embeddings, uniques, ...) -> boolean[]: for each memory
-- of a batch that is about to be created, whether one of cosine similarity >= 0.95 is there already, in the same scope
-- (agent, type, and room, world and entity where given); NULL where its id is there already, and keeps its row. Memories
-- without an embedding, or whose "unique" is given, are not looked up. Those of the batch itself the client compares.
-- The similarity is compared, as searches give it, and not the distance: 1 - 0.95 is more than 0.05.
--
-- A function, because a statement does not see rows that were committed while it waited for a lock, and the inner
-- statements of a volatile function do: of concurrent near-duplicates exactly one stays unique. The locks, one for
-- each type and room that is looked into, are held to the end of the transaction. A batch takes all of its own with its
-- first chunk, lock_types and lock_rooms, and in one order, so that two batches cannot wait for each other.
-- Before them comes what needs no lock: a connection's first look at the partitions takes as long as all else together.
--
-- A scope of up to 2,000 rows is compared exactly, through the index of the narrowest one that is given. For a larger one
-- HNSW gives the ten nearest of that type that the agent has, whatever their room, world and entity: where none of them
-- is that near, none is in the scope either, and the scan need not go on until the scope has answered. Only where all ten
-- are that near and elsewhere the scope itself is asked. A type that fills less than a tenth of the graph HNSW could not
-- answer for, nor one that stands in the tail: then up to 20,000 rows are compared exactly. In the server, for 6,000 rows of 10,000, real embeddings: 3 ms in
-- place of 6.7 row by row; for all 10,000 3 in place of 10; and each of 2,400 near-duplicates of similarity 0.951 and
-- more was found. A batch measures a scope once: to count it took as long again as to compare it. HNSW keeps 40 candidates
-- however many a search does, since what is that near stands apart: half the time, and of 7,000 near-duplicates in graphs
-- of 10,000 to 60,000 real embeddings none was missed, nor with 20; of 2,000 among 20,000 random vectors, three. They are
-- set in the body: a function that has them as its setting only a superuser can restore where vector is not loaded yet.
DO $create$
DECLARE
    dim int;
    measure text := '';
    exact text := '';
    scope text[];
BEGIN
    FOREACH scope SLICE 1 IN ARRAY ARRAY[
        ['rooms[i]', 'room_id'], ['entities[i]', 'entity_id'], ['worlds[i]', 'world_id'],
        ['(CASE WHEN coalesce(rooms[i], entities[i], worlds[i]) IS NULL THEN given_agent END)', 'agent_id']
    ] LOOP
        measure := measure || replace(replace($measure$
                IF way IS NULL AND given_id IS NOT NULL THEN
                    SELECT count(*) INTO size FROM (
                        SELECT FROM elizasql.embeddings
                        WHERE agent_id = given_agent AND id_column = given_id AND type = types[i] LIMIT few + 1) AS counted;
                    IF size <= few THEN
                        way := 'id_column';
                    END IF;
                END IF;$measure$, 'given_id', scope[1]), 'id_column', scope[2]);
        exact := exact || replace(replace($exact$
            WHEN 'id_column' THEN
                SELECT EXISTS (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = given_agent AND id_column = given_id AND type = types[i]
                        AND (rooms[i] IS NULL OR room_id = rooms[i])
                        AND (entities[i] IS NULL OR entity_id = entities[i])
                        AND (worlds[i] IS NULL OR world_id = worlds[i])
                        AND 1 - (dim_384 <=> vectors[i]) >= 0.95) INTO near;$exact$, 'given_id', scope[1]), 'id_column', scope[2]);
    END LOOP;
    FOREACH dim IN ARRAY ARRAY[384, 512, 768, 1024, 1536, 3072] LOOP
        EXECUTE replace(replace(replace($template$
CREATE FUNCTION elizasql.near_duplicates_384(
    given_agent uuid, ids uuid[], types text[], rooms uuid[], worlds uuid[], entities uuid[], vectors vector[],
    uniques boolean[], lock_types text[], lock_rooms uuid[]
) RETURNS boolean[] LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    duplicates boolean[];
    lock_key bigint;
    enough int;
    dense_kind text;
    dense boolean;
    few int;
    size int;
    asked text;
    measured text[] := '{}';
    way text;
    ways text[] := '{}';
    near boolean;
    seen boolean;
BEGIN
    PERFORM set_config('hnsw.ef_search', '40', TRUE);
    enough := coalesce((SELECT least(20000, reltuples / 10) FROM pg_class WHERE reltuples > 0 AND oid = (
        SELECT tableoid FROM elizasql.embeddings WHERE agent_id = given_agent ORDER BY type, xid LIMIT 1)), 20000);
    FOR lock_key IN
        SELECT DISTINCT hashtextextended(given_agent::text || ' ' || coalesce(room::text, '-') || ' ' || kind, 0) AS k
        FROM unnest(lock_types, lock_rooms) AS given (kind, room)
        ORDER BY k
    LOOP
        PERFORM pg_advisory_xact_lock(lock_key);
    END LOOP;
    duplicates := ARRAY(
        SELECT CASE WHEN present.id IS NULL THEN FALSE END
        FROM unnest(ids) WITH ORDINALITY AS given (id, position)
        LEFT JOIN LATERAL (
            SELECT m.id FROM elizasql.memories AS m WHERE m.agent_id = given_agent AND m.id = given.id LIMIT 1
        ) AS present ON TRUE
        ORDER BY given.position);
    FOR i IN 1..cardinality(types) LOOP
        CONTINUE WHEN duplicates[i] IS NULL OR vectors[i] IS NULL OR uniques[i] IS NOT NULL;
        asked := format('%s %s %s %s', rooms[i], entities[i], worlds[i], types[i]);
        way := ways[array_position(measured, asked)];
        IF way IS NULL THEN
            FOREACH few IN ARRAY ARRAY[2000, 20000] LOOP
                @measure@
                IF way IS NULL AND dense_kind IS DISTINCT FROM types[i] THEN
                    dense_kind := types[i];
                    dense := (SELECT count(*) = enough FROM (
                        SELECT FROM elizasql.embeddings
                        WHERE agent_id = given_agent AND type = types[i] AND indexed LIMIT enough) AS counted);
                END IF;
                EXIT WHEN way IS NOT NULL OR dense;
            END LOOP;
            way := coalesce(way, 'graph');
            measured := measured || asked;
            ways := ways || way;
        END IF;
        CASE way
            @exact@
            WHEN 'graph' THEN
                SELECT bool_or(similarity >= 0.95 AND in_scope), bool_or(similarity < 0.95) INTO near, seen FROM (
                    SELECT
                        1 - (dim_384 <=> vectors[i]) AS similarity,
                        (rooms[i] IS NULL OR room_id = rooms[i])
                        AND (worlds[i] IS NULL OR world_id = worlds[i])
                        AND (entities[i] IS NULL OR entity_id = entities[i]) AS in_scope
                    FROM elizasql.embeddings
                    WHERE agent_id = given_agent AND type = types[i] AND indexed
                    ORDER BY dim_384::halfvec(384) <=> vectors[i]::halfvec(384) LIMIT 10) AS nearest;
                IF near IS NOT TRUE THEN SELECT seen IS NOT TRUE AND EXISTS (
                    SELECT FROM (
                        SELECT dim_384 FROM elizasql.embeddings
                        WHERE agent_id = given_agent AND type = types[i] AND indexed
                            AND (rooms[i] IS NULL OR room_id = rooms[i])
                            AND (worlds[i] IS NULL OR world_id = worlds[i])
                            AND (entities[i] IS NULL OR entity_id = entities[i])
                        ORDER BY dim_384::halfvec(384) <=> vectors[i]::halfvec(384) LIMIT 3) AS nearest
                    WHERE 1 - (dim_384 <=> vectors[i]) >= 0.95
                ) OR EXISTS (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = given_agent AND type = types[i] AND NOT indexed
                        AND (rooms[i] IS NULL OR room_id = rooms[i])
                        AND (worlds[i] IS NULL OR world_id = worlds[i])
                        AND (entities[i] IS NULL OR entity_id = entities[i])
                        AND 1 - (dim_384 <=> vectors[i]) >= 0.95) INTO near;
                END IF;
        END CASE;
        duplicates[i] := near;
    END LOOP;
    RETURN duplicates;
END
$body$ $template$, '@measure@', measure), '@exact@', exact), '384', dim::text);
    END LOOP;
END
$create$;

-- The partition of embeddings that an agent's are in, whether there are any or not.
CREATE FUNCTION elizasql.partition_of(given_agent uuid) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT 'embeddings_p' || lpad(part::text, 2, '0') FROM generate_series(0, 15) AS part
    WHERE satisfies_hash_partition('elizasql.embeddings'::regclass, 16, part, given_agent)
$$;

-- Brings the planner's statistics of an agent's partitions up to date: plans are made anew after it. waits = FALSE: not of
-- one whose index is built, which ends with that, or which somebody else analyzes or vacuums.
CREATE FUNCTION elizasql.refresh_statistics(given_agent uuid, waits boolean DEFAULT TRUE) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format(
        'ANALYZE %2$s elizasql.embeddings%1$s, elizasql.memories%1$s',
        right(elizasql.partition_of(given_agent), 4), CASE WHEN NOT waits THEN '(SKIP_LOCKED)' END);
END
$$;

-- Locks an agent's partition as every write of a vector does, to the end of the transaction; gives FALSE where that is not
-- to be had at once. The partitioned table is locked first, as in every other statement.
CREATE FUNCTION elizasql.try_lock_partition(given_agent uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE ONLY elizasql.embeddings IN ROW EXCLUSIVE MODE;
    BEGIN
        EXECUTE format('LOCK TABLE elizasql.%s IN ROW EXCLUSIVE MODE NOWAIT', elizasql.partition_of(given_agent));
    EXCEPTION
        WHEN lock_not_available THEN
            RETURN FALSE;
        WHEN insufficient_privilege THEN
            NULL;  -- a role with rights on the partitioned table alone
    END;
    RETURN TRUE;
END
$$;

-- Waits for the build of an index of the agent's partition, if there is one, and keeps others from beginning it until the
-- transaction ends: they wait for the first lock that they take, where nobody who writes waits behind them, as everybody
-- does behind the next one. A role with rights on the partitioned table alone may not take it. It locks as a write does,
-- by a custom plan as in copy_scope_to_embedding(), and who writes to the partition then waits behind a build that waits.
CREATE FUNCTION elizasql.hold_partition(given_agent uuid) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    LOCK TABLE ONLY elizasql.embeddings IN ROW EXCLUSIVE MODE;
    EXECUTE format('LOCK TABLE elizasql.%s IN SHARE UPDATE EXCLUSIVE MODE', elizasql.partition_of(given_agent));
EXCEPTION WHEN insufficient_privilege THEN
    UPDATE elizasql.embeddings SET indexed = indexed
    WHERE agent_id = given_agent AND memory_id = '00000000-0000-0000-0000-000000000000';
END
$$;

-- Moves up to `most` vectors of an agent's tail into the HNSW index, of one width or, NULL, of any; gives how many. At least
-- one, and no more once 50 ms have passed: whoever changes or deletes one of them waits for the end of the transaction, which
-- 200 of 3072 dimensions put off by seconds. So the first alone tells how long one takes, and then as many are locked as the
-- time is enough for; one statement for each would take 0.5 ms a row more. Several may run at once.
--
-- While the partition is locked, as for minutes by the build of its index, it waits; or, waits = FALSE, it gives NULL at
-- once: each agent of the partition would hold a connection of the background's, which has two, and others' loads would
-- find none.
--
-- By custom plans, as in copy_scope_to_embedding().
CREATE FUNCTION elizasql.index_embeddings(
    given_agent uuid, given_dimension integer, most bigint, waits boolean DEFAULT TRUE
) RETURNS bigint
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    enough CONSTANT interval := '50 milliseconds';
    began CONSTANT timestamptz := clock_timestamp();
    took interval;
    size bigint := least(1, most);
    number bigint;
    moved bigint := 0;
BEGIN
    IF NOT waits AND NOT elizasql.try_lock_partition(given_agent) THEN
        RETURN NULL;
    END IF;
    LOOP
        WITH batch AS (
            SELECT memory_id, dimension FROM elizasql.embeddings
            WHERE agent_id = given_agent AND NOT indexed AND (given_dimension IS NULL OR dimension = given_dimension)
            LIMIT size
            FOR UPDATE SKIP LOCKED
        )
        UPDATE elizasql.embeddings SET indexed = TRUE
        WHERE
            agent_id = given_agent AND memory_id = ANY(ARRAY(SELECT memory_id FROM batch))
            AND (memory_id, dimension) IN (SELECT batch.memory_id, batch.dimension FROM batch);
        GET DIAGNOSTICS number = ROW_COUNT;
        moved := moved + number;
        took := clock_timestamp() - began;
        EXIT WHEN number < size OR moved >= most OR took >= enough;
        size := least(
            most - moved,
            greatest(1, moved * extract(epoch FROM enough - took) / nullif(extract(epoch FROM took), 0))
        );
    END LOOP;
    RETURN moved;
END
$$;

-- The widths of which the agent's partition lacks the HNSW index. Not of the agent's own alone: one that a load has dropped
-- is its neighbours', too, and by now the agent may have moved to another width, or be gone.
CREATE FUNCTION elizasql.lost_indexes(given_agent uuid) RETURNS integer[] LANGUAGE sql STABLE AS $$
    SELECT ARRAY(
        SELECT dim FROM unnest(ARRAY[384, 512, 768, 1024, 1536, 3072]) AS dim
        WHERE to_regclass(format('elizasql.%s_dim_%s_hnsw', elizasql.partition_of(given_agent), dim)) IS NULL
    )
$$;

-- Drops the HNSW index of the agent's partition, so that a bulk load need not feed it row by row; gives whether there is
-- none now. coming: how many vectors the load brings at least; NULL: drop it in any case. Built anew the index takes
-- 0.5-0.8 ms a row, filled row by row 4 ms: the new one is cheaper when a fifth of what is indexed comes, a quarter to
-- be safe. While there is none, searches scan exactly what is the agent's. A load by a role that could not build it
-- again is told to go on as if it were there, also where somebody else has dropped it.
--
-- It waits two seconds at most for those who read the partition: everybody else would wait behind it. Then a load goes on
-- with the index, and else it is an error.
CREATE FUNCTION elizasql.drop_index(given_agent uuid, coming bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    part text := 'elizasql.' || elizasql.partition_of(given_agent);
    index text;
    size real;
BEGIN
    IF coming IS NOT NULL
        AND NOT (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(part))
    THEN
        RETURN FALSE;
    END IF;
    SELECT format('%s_dim_%s_hnsw', part, embedding_dimension) INTO index
    FROM elizasql.agents WHERE id = given_agent;
    SELECT reltuples INTO size FROM pg_class WHERE oid = to_regclass(index);
    IF size IS NULL THEN
        RETURN TRUE;
    ELSIF coming * 4 < size THEN
        RETURN FALSE;
    END IF;
    PERFORM set_config('lock_timeout', '2s', TRUE);
    BEGIN
        EXECUTE 'DROP INDEX IF EXISTS ' || index;
    EXCEPTION WHEN lock_not_available THEN
        IF coming IS NULL THEN
            RAISE;
        END IF;
        RETURN FALSE;
    END;
    RETURN TRUE;
END
$$;

-- Builds the HNSW indexes that the agent's partition lacks, with all that is in the partition; gives how many vectors of
-- the agent left the tail. Searches go on meanwhile, exactly; writes of vectors to the partition wait.
--
-- It may be one that was there before: index_memories(rebuild) drops it first, in a transaction of its own, since what
-- dropping locks would be locked to the end of the build.
--
-- A graph that outgrows maintenance_work_mem is finished on the disk, and less than 32 MB a worker means no workers: 2.3
-- ms a row instead of 0.6. So the build gets what the table takes, more than the graph does, up to a quarter of what the
-- administrator says is there to cache the database. A parallel build takes that from the shared memory, of which
-- containers have little: where it is not to be had, one process builds alone, from memory of its own.
--
-- A build by all cores keeps callers from them: on two, the 95th percentile of a search of 0.8 ms rose to 5.7, and to 1.2
-- beside a build by one process, which took 1.3 times as long while the searches had the other core. So where somebody
-- asks, no more workers are taken than elizasql.build_workers_beside_callers says; the embedded server sets it, and who
-- has a server of his own may. Whoever asks is seen in a third of a second, before a writer has to wait.
--
-- waits = FALSE: NULL at once where somebody else builds, and soon where somebody vacuums by hand.
CREATE FUNCTION elizasql.build_index(given_agent uuid, waits boolean DEFAULT TRUE) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    part text := elizasql.partition_of(given_agent);
    lost int[] := elizasql.lost_indexes(given_agent);
    dim int;
    moved bigint;
    build text;
    workers text := nullif(current_setting('elizasql.build_workers_beside_callers', TRUE), '');
    patience CONSTANT text := current_setting('lock_timeout');
    began timestamptz;
BEGIN
    IF lost = '{}' THEN
        RETURN 0;
    END IF;
    IF NOT waits THEN
        PERFORM FROM pg_locks
        WHERE
            database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND relation = format('elizasql.%s', part)::regclass AND mode = 'ShareRowExclusiveLock';
        IF FOUND THEN
            RETURN NULL;
        END IF;
        -- An autovacuum, which may take minutes, gives way to who has waited for a second.
        PERFORM set_config('lock_timeout', '3s', TRUE);
        BEGIN
            EXECUTE format('LOCK TABLE elizasql.%s IN SHARE UPDATE EXCLUSIVE MODE', part);
        EXCEPTION WHEN lock_not_available THEN
            RETURN NULL;
        END;
        PERFORM set_config('lock_timeout', patience, TRUE);
    END IF;
    -- A smaller table gets no workers in any case.
    IF
        workers::int < current_setting('max_parallel_maintenance_workers')::int
        AND pg_relation_size(format('elizasql.%s', part)::regclass)
        >= pg_size_bytes(current_setting('min_parallel_table_scan_size'))
    THEN
        began := clock_timestamp();
        PERFORM pg_sleep(0.3);
        PERFORM pg_stat_clear_snapshot();
        PERFORM FROM pg_stat_activity
        WHERE
            backend_type = 'client backend' AND pid <> pg_backend_pid() AND (state = 'active' OR state_change >= began);
        IF FOUND THEN
            PERFORM set_config('max_parallel_maintenance_workers', workers, TRUE);
        END IF;
    END IF;
    -- Of two that build at once, the second waits here and finds the first one's index. For a vacuum, too, or an index
    -- that is rebuilt beside everybody, which may take minutes: nobody who writes waits behind this lock, as behind the
    -- next one.
    EXECUTE format('LOCK TABLE elizasql.%s IN SHARE UPDATE EXCLUSIVE MODE', part);
    EXECUTE format('LOCK TABLE elizasql.%s IN SHARE ROW EXCLUSIVE MODE', part);
    lost := elizasql.lost_indexes(given_agent);
    IF lost = '{}' THEN
        RETURN 0;
    END IF;
    SELECT count(*) INTO moved FROM elizasql.embeddings
    WHERE agent_id = given_agent AND NOT indexed AND dimension = ANY(lost);
    EXECUTE format('UPDATE elizasql.%s SET indexed = TRUE WHERE NOT indexed AND dimension = ANY($1)', part) USING lost;
    PERFORM set_config('maintenance_work_mem', greatest(
        pg_size_bytes(current_setting('maintenance_work_mem')),
        least(
            pg_table_size(format('elizasql.%s', part)::regclass),
            pg_size_bytes(current_setting('effective_cache_size')) / 4
        )
    ) / 1024 || 'kB', TRUE);
    FOREACH dim IN ARRAY lost LOOP
        build := format(
            'CREATE INDEX %1$s_dim_%2$s_hnsw ON elizasql.%1$s
             USING hnsw ((dim_%2$s::halfvec(%2$s)) halfvec_cosine_ops) WITH (m = 16, ef_construction = 128) WHERE indexed',
            part, dim);
        BEGIN
            EXECUTE build;
        EXCEPTION WHEN insufficient_resources OR system_error THEN
            PERFORM set_config('max_parallel_maintenance_workers', '0', TRUE);
            EXECUTE build;
        END;
    END LOOP;
    -- Not of memories that somebody vacuums: writers would wait for the end of it, behind this transaction.
    PERFORM elizasql.refresh_statistics(given_agent, FALSE);
    RETURN moved;
END
$$;

-- migrate:down
DROP FUNCTION elizasql.build_index(uuid, boolean);
DROP FUNCTION elizasql.drop_index(uuid, bigint);
DROP FUNCTION elizasql.lost_indexes(uuid);
DROP FUNCTION elizasql.index_embeddings(uuid, integer, bigint, boolean);
DROP FUNCTION elizasql.hold_partition(uuid);
DROP FUNCTION elizasql.try_lock_partition(uuid);
DROP FUNCTION elizasql.refresh_statistics(uuid, boolean);
DROP FUNCTION elizasql.partition_of(uuid);
DROP TABLE elizasql.embeddings;
DROP TABLE elizasql.memories;
DROP TRIGGER agents_rewrites_forgotten ON elizasql.agents;
DROP TRIGGER agents_created ON elizasql.agents;
DROP TABLE elizasql.memory_rewrites;
DROP FUNCTION elizasql.forget_rewrites();
DROP FUNCTION elizasql.note_agent();
DROP FUNCTION elizasql.note_truncated_rows();
DROP FUNCTION elizasql.note_rewritten_row();
DROP FUNCTION elizasql.note_rewrite(uuid, text);
DROP FUNCTION elizasql.send_scope(uuid, uuid, uuid, uuid, boolean);
DROP FUNCTION elizasql.stamp_embedding();
DROP FUNCTION elizasql.refuse_agent_change();
DROP FUNCTION elizasql.copy_scope_to_embedding();
DROP FUNCTION elizasql.near_duplicates_384;
DROP FUNCTION elizasql.near_duplicates_512;
DROP FUNCTION elizasql.near_duplicates_768;
DROP FUNCTION elizasql.near_duplicates_1024;
DROP FUNCTION elizasql.near_duplicates_1536;
DROP FUNCTION elizasql.near_duplicates_3072;
