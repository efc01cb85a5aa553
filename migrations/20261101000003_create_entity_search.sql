-- Entities by name; the merge of an agent's settings; creating and patching components; creating relationships.
--
-- Names are found by an index of trigrams of our own: pg_trgm is not on every server, the embedded one included, does
-- not know the agent (its index would read the matches of all of them), and has nothing for one or two letters. A
-- trigram here is three bytes of the folded name, hashed together with the agent into one bigint: the trigrams of an
-- agent stand side by side in the index.

-- migrate:up
-- The trigrams of names: the bytes of each, lower-cased, between two bytes FE and one FF, which UTF-8 does not have.
-- The first two trigrams of a name hold its beginning, the last one its end. plpgsql: 15 us where SQL takes 440.
CREATE FUNCTION elizasql.name_grams(agent uuid, names text[]) RETURNS bigint[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    own CONSTANT bigint := uuid_hash_extended(agent, 0) << 24;
    name text;
    bytes bytea;
    gram bigint;
    grams bigint[] := '{}';
BEGIN
    FOREACH name IN ARRAY names LOOP
        CONTINUE WHEN name IS NULL;
        bytes := convert_to(lower(name), 'UTF8') || decode('ff', 'hex');
        gram := 65278;  -- FE FE
        FOR i IN 0..length(bytes) - 1 LOOP
            gram := (gram << 8 | get_byte(bytes, i)) & 16777215;
            grams := array_append(grams, own | gram);
        END LOOP;
    END LOOP;
    RETURN grams;
END
$$;

-- The trigrams that a name has if it is the query (best = 0), begins with it (1) or contains it (2). The last needs
-- three bytes; NULL for less.
CREATE FUNCTION elizasql.query_grams(agent uuid, query text, best int) RETURNS bigint[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    grams CONSTANT bigint[] := elizasql.name_grams(agent, ARRAY[query]);
    size CONSTANT int := cardinality(grams);
BEGIN
    RETURN CASE best WHEN 0 THEN grams WHEN 1 THEN grams[1:size - 1] ELSE nullif(grams[3:size - 1], '{}') END;
END
$$;

-- One of these 256 trigrams is in every name that contains the query, which has two bytes; NULL for other lengths.
CREATE FUNCTION elizasql.pair_grams(agent uuid, query text) RETURNS bigint[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    grams CONSTANT bigint[] := elizasql.name_grams(agent, ARRAY[query]);
BEGIN
    IF cardinality(grams) <> 3 THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT array_agg(grams[3] & ~255::bigint | third) FROM generate_series(0, 255) AS third);
END
$$;

-- How well names match: 0 one of them is the query, 1 begins with it, 2 contains it, NULL none does. Not parallel safe:
-- a plan that starts workers for it takes longer to start them than to answer.
CREATE FUNCTION elizasql.name_rank(names text[], query text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    folded CONSTANT text := lower(query);
    name text;
    place int;
    rank int;
BEGIN
    FOREACH name IN ARRAY names LOOP
        place := strpos(lower(name), folded);
        IF place = 1 AND length(lower(name)) = length(folded) THEN
            RETURN 0;
        ELSIF place > 0 THEN
            rank := least(rank, CASE place WHEN 1 THEN 1 ELSE 2 END);
        END IF;
    END LOOP;
    RETURN rank;
END
$$;

-- A short list of what is not in the index yet keeps both writes and searches short: it is read by every search.
CREATE INDEX entities_name_grams_idx ON elizasql.entities USING gin (elizasql.name_grams(agent_id, names))
WITH (gin_pending_list_limit = 256);

-- ElizaOS's rule: objects are merged key by key and a null removes the key; everything else replaces. An object that
-- the removals have emptied goes, too (NULL), one that was given as {} stays.
CREATE FUNCTION elizasql.merge_settings(target jsonb, source jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    -- Not the target itself: what is stored apart would be read anew for each key.
    merged jsonb := CASE jsonb_typeof(target) WHEN 'object' THEN target || '{}' ELSE '{}' END;
    given jsonb;
    removed text[];
BEGIN
    -- All at once: key by key, each one copies the whole. OFFSET 0 lets each value be made once.
    SELECT
        coalesce(jsonb_object_agg(key, value) FILTER (WHERE value IS NOT NULL), '{}'),
        coalesce(array_agg(key) FILTER (WHERE value IS NULL), '{}')
    INTO given, removed
    FROM (
        SELECT
            key,
            CASE jsonb_typeof(value)
                WHEN 'object' THEN elizasql.merge_settings(merged -> key, value) ELSE nullif(value, 'null')
            END AS value
        FROM jsonb_each(source)
        OFFSET 0
    ) AS field;
    merged := (merged - removed) || given;
    RETURN CASE WHEN merged <> '{}' OR source = '{}' THEN merged END;
END
$$;

-- Applies operations to a component's data, one after the other: {"op", "path", "value"}, the path in names and
-- indexes joined by dots. What does not fit ends the statement.
CREATE FUNCTION elizasql.patch_data(data jsonb, ops jsonb, component uuid) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    step record;
    op text;
    path text[];
    place jsonb;
    total numeric;
    problem text;
BEGIN
    FOR step IN SELECT * FROM jsonb_array_elements(ops) WITH ORDINALITY AS given (op, number) LOOP
        op := step.op ->> 'op';
        path := string_to_array(step.op ->> 'path', '.');
        place := data;
        problem := NULL;
        -- Down to the value at the path, NULL where there is none; set makes what is missing on the way.
        FOR i IN 1..cardinality(path) LOOP
            IF jsonb_typeof(place) = 'object' THEN
                place := place -> path[i];
            ELSIF jsonb_typeof(place) <> 'array' THEN
                problem := format('%s is in the way', jsonb_typeof(place));
            ELSIF path[i] !~ '^[0-9]+$' THEN
                problem := format('an array has no field %s', path[i]);
            ELSIF path[i]::numeric > jsonb_array_length(place) THEN
                problem := format('the array has %s elements', jsonb_array_length(place));
            ELSE
                place := place -> path[i]::int;
            END IF;
            EXIT WHEN problem IS NOT NULL;
            IF place IS NULL THEN
                EXIT WHEN op <> 'set' OR i = cardinality(path);
                place := CASE WHEN path[i + 1] ~ '^[0-9]+$' THEN '[]' ELSE '{}' END;
                data := jsonb_set(data, path[1:i], place);
            END IF;
        END LOOP;
        total := NULL;
        IF problem IS NULL AND op = 'increment' AND jsonb_typeof(place) = 'number' THEN
            total := (place #>> '{}')::numeric + (step.op ->> 'value')::numeric;
            -- No reader would take it: JSON's numbers are read as double.
            IF abs(total) > 1.7976931348623157e308 THEN
                problem := 'the sum is beyond the range of a double';
            END IF;
        END IF;
        IF op = 'remove' THEN
            IF problem IS NULL AND place IS NOT NULL THEN
                data := data #- path;
            END IF;
        ELSIF problem IS NULL AND op = 'set' THEN
            data := jsonb_set(data, path, step.op -> 'value');
        ELSIF problem IS NULL AND op = 'push' AND jsonb_typeof(place) = 'array' THEN
            data := jsonb_set(data, path, place || jsonb_build_array(step.op -> 'value'));
        ELSIF problem IS NULL AND total IS NOT NULL THEN
            data := jsonb_set(data, path, to_jsonb(total));
        ELSE
            RAISE EXCEPTION 'component %, operation % (% "%"): %', component, step.number, op, step.op ->> 'path',
                coalesce(
                    problem,
                    CASE op WHEN 'push' THEN 'an array is needed, ' WHEN 'increment' THEN 'a number is needed, ' END
                    || coalesce('not ' || jsonb_typeof(place), 'and nothing is there'))
                USING ERRCODE = 'invalid_parameter_value', SCHEMA = 'elizasql', TABLE = 'components';
        END IF;
    END LOOP;
    RETURN data;
END
$$;

-- Creates components and gives, in the order given, the id of each and whether it is new. One whose id or natural key
-- is there already stays as it is and its id is given. A function, because a statement does not see a row that was
-- committed while it waited for it, and the second statement of this one does.
CREATE FUNCTION elizasql.create_components(agent uuid, given jsonb, OUT ids uuid[], OUT created boolean[])
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    made uuid[];
BEGIN
    WITH inserted AS (
        INSERT INTO elizasql.components (
            agent_id, id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
        )
        SELECT agent, id, entity_id, room_id, world_id, source_entity_id, type, coalesce(data, '{}'),
            coalesce(created_at, statement_timestamp())
        FROM jsonb_populate_recordset(NULL::elizasql.components, given) WITH ORDINALITY AS g
        ORDER BY entity_id, type COLLATE "C", world_id, source_entity_id, g.ordinality
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    SELECT coalesce(array_agg(id), '{}') INTO made FROM inserted;
    SELECT
        array_agg(coalesce(by_id.id, by_key.id) ORDER BY g.ordinality),
        array_agg(g.id = ANY(made) ORDER BY g.ordinality)
    INTO ids, created
    FROM jsonb_populate_recordset(NULL::elizasql.components, given) WITH ORDINALITY AS g
    LEFT JOIN LATERAL (
        SELECT id FROM elizasql.components WHERE agent_id = agent AND id = g.id LIMIT 1
    ) AS by_id ON TRUE
    LEFT JOIN LATERAL (
        SELECT id FROM elizasql.components
        WHERE agent_id = agent AND entity_id = g.entity_id AND type = g.type
            AND world_id IS NOT DISTINCT FROM g.world_id AND source_entity_id IS NOT DISTINCT FROM g.source_entity_id
        LIMIT 1
    ) AS by_key ON TRUE;
    IF array_position(ids, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'a component was deleted while it was created' USING ERRCODE = 'serialization_failure';
    END IF;
END
$$;

-- Creates relationships as create_components does components; the pair of source and target is the natural key.
CREATE FUNCTION elizasql.create_relationships(agent uuid, given jsonb, OUT ids uuid[], OUT created boolean[])
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    made uuid[];
BEGIN
    WITH inserted AS (
        INSERT INTO elizasql.relationships (
            agent_id, id, source_entity_id, target_entity_id, tags, metadata, created_at
        )
        SELECT agent, id, source_entity_id, target_entity_id, coalesce(tags, '{}'), coalesce(metadata, '{}'),
            coalesce(created_at, statement_timestamp())
        FROM jsonb_populate_recordset(NULL::elizasql.relationships, given) WITH ORDINALITY AS g
        ORDER BY source_entity_id, target_entity_id, g.ordinality
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    SELECT coalesce(array_agg(id), '{}') INTO made FROM inserted;
    SELECT
        array_agg(coalesce(by_id.id, by_pair.id) ORDER BY g.ordinality),
        array_agg(g.id = ANY(made) ORDER BY g.ordinality)
    INTO ids, created
    FROM jsonb_populate_recordset(NULL::elizasql.relationships, given) WITH ORDINALITY AS g
    LEFT JOIN LATERAL (
        SELECT id FROM elizasql.relationships WHERE agent_id = agent AND id = g.id LIMIT 1
    ) AS by_id ON TRUE
    LEFT JOIN LATERAL (
        SELECT id FROM elizasql.relationships
        WHERE agent_id = agent AND source_entity_id = g.source_entity_id AND target_entity_id = g.target_entity_id
        LIMIT 1
    ) AS by_pair ON TRUE;
    IF array_position(ids, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'a relationship was deleted while it was created' USING ERRCODE = 'serialization_failure';
    END IF;
END
$$;

-- migrate:down
DROP FUNCTION elizasql.create_relationships(uuid, jsonb);
DROP FUNCTION elizasql.create_components(uuid, jsonb);
DROP FUNCTION elizasql.patch_data(jsonb, jsonb, uuid);
DROP FUNCTION elizasql.merge_settings(jsonb, jsonb);
DROP INDEX elizasql.entities_name_grams_idx;
DROP FUNCTION elizasql.name_rank(text[], text);
DROP FUNCTION elizasql.pair_grams(uuid, text);
DROP FUNCTION elizasql.query_grams(uuid, text, int);
DROP FUNCTION elizasql.name_grams(uuid, text[]);
