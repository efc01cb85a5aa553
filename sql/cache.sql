-- The cache: JSON by key. What has expired is not there, for every statement; it is deleted some time later.
-- key_hash is sha256 of the key as UTF-8; a trigger makes it.

-- name: get_cache(agent_id, key_hash)^
SELECT value
FROM elizasql.cache
WHERE agent_id = :agent_id AND key_hash = :key_hash AND (expires_at IS NULL OR expires_at > statement_timestamp());

-- name: get_caches(agent_id, key_hashes)
SELECT
    key_hash,
    value
FROM elizasql.cache
WHERE
    agent_id = :agent_id
    AND key_hash = ANY(:key_hashes::bytea[])
    AND (expires_at IS NULL OR expires_at > statement_timestamp());

-- name: set_cache(agent_id, key, value, ttl)!
INSERT INTO elizasql.cache (agent_id, key, value, expires_at)
VALUES (:agent_id, :key, :value, statement_timestamp() + :ttl::interval)
ON CONFLICT (agent_id, key_hash) DO UPDATE
    SET
        value = excluded.value,
        expires_at = excluded.expires_at;

-- name: set_caches(agent_id, keys, key_hashes, values, ttls, swept)!
-- Deletes at most so many expired entries along the way, never one of the keys that are set. They are locked, and deleted
-- by the key alone: by their time, too, each would be looked for among all that has expired, while the server knows of few.
WITH expired AS MATERIALIZED (
    SELECT
        c.agent_id,
        c.key_hash
    FROM elizasql.cache AS c
    WHERE
        c.agent_id = :agent_id
        AND c.expires_at <= statement_timestamp()
        AND NOT EXISTS (
            SELECT FROM unnest(:key_hashes::bytea[]) AS given (key_hash) WHERE given.key_hash = c.key_hash
        )
    ORDER BY c.expires_at
    LIMIT :swept::bigint
    FOR UPDATE OF c SKIP LOCKED
),

deleted AS (
    DELETE FROM elizasql.cache AS c
    USING expired
    WHERE c.agent_id = expired.agent_id AND c.key_hash = expired.key_hash
)

INSERT INTO elizasql.cache (agent_id, key, value, expires_at)
SELECT
    :agent_id,
    g.key,
    g.value,
    statement_timestamp() + g.ttl
FROM unnest(:key_hashes::bytea[], :keys::text[], :values::jsonb[], :ttls::interval[]) AS g (key_hash, key, value, ttl)
ORDER BY g.key_hash
ON CONFLICT (agent_id, key_hash) DO UPDATE
    SET
        value = excluded.value,
        expires_at = excluded.expires_at;

-- name: compare_and_set_cache(agent_id, key_hash, expected, value, ttl)$
-- TRUE when the value was the expected one. Of concurrent calls, each compares with what the one before it has set.
-- Not repeatable: a second run finds the new value.
UPDATE elizasql.cache
SET
    value = :value,
    expires_at = statement_timestamp() + :ttl::interval
WHERE
    agent_id = :agent_id
    AND key_hash = :key_hash
    AND value = :expected::jsonb
    AND (expires_at IS NULL OR expires_at > statement_timestamp())
RETURNING TRUE AS done;

-- name: set_missing_cache(agent_id, key, value, ttl)$
-- TRUE when nothing was there, or only what has expired.
-- Not repeatable: a second run finds the new value.
INSERT INTO elizasql.cache AS c (agent_id, key, value, expires_at)
VALUES (:agent_id, :key, :value, statement_timestamp() + :ttl::interval)
ON CONFLICT (agent_id, key_hash) DO UPDATE
    SET
        value = excluded.value,
        expires_at = excluded.expires_at
    WHERE c.expires_at <= statement_timestamp()
RETURNING TRUE AS done;

-- name: delete_caches(agent_id, key_hashes)!
-- Entries are locked in the order in which set_caches writes them, so that two batches cannot wait for each other.
WITH locked AS MATERIALIZED (
    SELECT
        of_key.agent_id,
        of_key.key_hash
    FROM unnest(:key_hashes::bytea[]) AS given (key_hash)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, key_hash
            FROM elizasql.cache
            WHERE agent_id = :agent_id AND key_hash = given.key_hash
            FOR UPDATE
        ) AS of_key
)

DELETE FROM elizasql.cache AS c
USING locked
WHERE c.agent_id = locked.agent_id AND c.key_hash = locked.key_hash;

-- name: sweep_cache(agent_id, count)$
-- Deletes expired entries, the longest expired first, but none that is being set; gives how many went.
-- Not repeatable: a second run finds nothing left to delete.
WITH expired AS MATERIALIZED (
    SELECT
        agent_id,
        key_hash
    FROM elizasql.cache
    WHERE agent_id = :agent_id AND expires_at <= statement_timestamp()
    ORDER BY expires_at
    LIMIT :count::bigint
    FOR UPDATE SKIP LOCKED
),

deleted AS (
    DELETE FROM elizasql.cache AS c
    USING expired
    WHERE c.agent_id = expired.agent_id AND c.key_hash = expired.key_hash
    RETURNING c.key_hash
)

SELECT count(*) FROM deleted;
