-- Messaging: message servers, channels, participants and messages. Shared by all agents, so nothing starts from agent_id.
-- Times are the statement's, not the transaction's: messages of one transaction stay in the order of their making.
-- "DO UPDATE SET name = ..." or "content = ..." changes nothing; it makes the row that is there come back, also one
-- committed meanwhile. Not "SET id": it would wait for every transaction that points at the row, and they for it.
-- Bounds are sub-selects for the sake of policies, see memories.sql.

-- name: create_message_servers(servers)
-- Creates servers and gives the rows that are stored now: a server that is there already stays as it is.
INSERT INTO elizasql.message_servers AS s (id, name, source_type, source_id, metadata, created_at, updated_at)
SELECT
    id, name, source_type, source_id, coalesce(metadata, '{}'), coalesce(created_at, statement_timestamp()),
    coalesce(updated_at, created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.message_servers, :servers::jsonb)
ORDER BY id
ON CONFLICT (id) DO UPDATE SET name = s.name
RETURNING id, name, source_type, source_id, metadata, created_at, updated_at;

-- name: get_message_servers()
SELECT id, name, source_type, source_id, metadata, created_at, updated_at
FROM elizasql.message_servers
ORDER BY created_at, id;

-- name: get_message_server_by_id(id)^
SELECT id, name, source_type, source_id, metadata, created_at, updated_at
FROM elizasql.message_servers
WHERE id = :id;

-- name: add_agent_to_message_server(message_server_id, agent_id)!
INSERT INTO elizasql.message_server_agents (message_server_id, agent_id)
VALUES (:message_server_id, :agent_id)
ON CONFLICT (message_server_id, agent_id) DO NOTHING;

-- name: get_agents_for_message_server(message_server_id)
SELECT agent_id
FROM elizasql.message_server_agents
WHERE message_server_id = :message_server_id
ORDER BY agent_id;

-- name: remove_agent_from_message_server(message_server_id, agent_id)$
-- Not repeatable: a second run finds nothing left to delete.
DELETE FROM elizasql.message_server_agents
WHERE message_server_id = :message_server_id AND agent_id = :agent_id
RETURNING TRUE AS deleted;

-- name: create_channel(channel, participant_ids)^
-- Creates a channel with its participants and gives the row that is stored now: one that is there stays as it is.
WITH channel AS (
    INSERT INTO elizasql.channels AS c (
        id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
    )
    SELECT
        id, message_server_id, name, type, source_type, source_id, topic, coalesce(metadata, '{}'),
        coalesce(created_at, statement_timestamp()), coalesce(updated_at, created_at, statement_timestamp())
    FROM jsonb_populate_record(NULL::elizasql.channels, :channel::jsonb)
    ON CONFLICT (id) DO UPDATE SET name = c.name
    RETURNING id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
),

joined AS (
    INSERT INTO elizasql.channel_participants (channel_id, entity_id)
    SELECT
        channel.id,
        given.entity_id
    FROM channel CROSS JOIN unnest(:participant_ids::uuid[]) AS given (entity_id)
    ORDER BY given.entity_id
    ON CONFLICT (channel_id, entity_id) DO NOTHING
)

SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
FROM channel;

-- name: find_or_create_dm_channel(id, message_server_id, name, user1, user2)^
-- Finds the direct channel of two users, or creates it; both take part in it afterwards.
-- What is there already is only read. Of concurrent calls that find nothing one creates, the others get its row.
WITH found AS (
    SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
    FROM elizasql.channels
    WHERE
        message_server_id = :message_server_id AND name = :name AND type = 'DM'
        AND name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$'
),

created AS (
    INSERT INTO elizasql.channels AS c (id, message_server_id, name, type, metadata, created_at, updated_at)
    SELECT
        :id, :message_server_id, :name, 'DM', jsonb_build_object('user1', :user1::uuid, 'user2', :user2::uuid),
        statement_timestamp(), statement_timestamp()
    WHERE NOT EXISTS (SELECT FROM found)
    ON CONFLICT (message_server_id, name) WHERE type = 'DM' AND name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$'
    DO UPDATE SET name = c.name
    RETURNING id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
),

channel AS (
    SELECT * FROM found
    UNION ALL
    SELECT * FROM created
),

joined AS (
    INSERT INTO elizasql.channel_participants (channel_id, entity_id)
    SELECT
        channel.id,
        given.entity_id
    FROM channel CROSS JOIN unnest(ARRAY[:user1::uuid, :user2::uuid]) AS given (entity_id)
    WHERE
        NOT EXISTS (
            SELECT FROM elizasql.channel_participants AS p
            WHERE p.channel_id = channel.id AND p.entity_id = given.entity_id
        )
    ON CONFLICT (channel_id, entity_id) DO NOTHING
)

SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
FROM channel;

-- name: get_channels_for_message_server(message_server_id)
SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
FROM elizasql.channels
WHERE message_server_id = :message_server_id
ORDER BY created_at, id;

-- name: get_channel_details(id)^
SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
FROM elizasql.channels
WHERE id = :id;

-- name: update_channel(id, updates, participant_ids)^
-- Changes the fields whose keys are given and, unless NULL, replaces the participants.
-- The function runs after the update has locked the channel, and then looks anew at who takes part.
WITH updated AS (
    UPDATE elizasql.channels AS c
    SET
        name = CASE WHEN given.u ? 'name' THEN given.u ->> 'name' ELSE c.name END,
        type = CASE WHEN given.u ? 'type' THEN given.u ->> 'type' ELSE c.type END,
        source_type = CASE WHEN given.u ? 'source_type' THEN given.u ->> 'source_type' ELSE c.source_type END,
        source_id = CASE WHEN given.u ? 'source_id' THEN given.u ->> 'source_id' ELSE c.source_id END,
        topic = CASE WHEN given.u ? 'topic' THEN given.u ->> 'topic' ELSE c.topic END,
        metadata = CASE
            WHEN given.u ? 'metadata' THEN coalesce(nullif(given.u -> 'metadata', 'null'), '{}')
            ELSE c.metadata
        END,
        updated_at = statement_timestamp()
    FROM (SELECT :updates::jsonb AS u) AS given
    WHERE c.id = :id
    RETURNING
        c.id, c.message_server_id, c.name, c.type, c.source_type, c.source_id, c.topic, c.metadata, c.created_at,
        c.updated_at
)

SELECT id, message_server_id, name, type, source_type, source_id, topic, metadata, created_at, updated_at
FROM updated
CROSS JOIN LATERAL elizasql.replace_channel_participants(updated.id, :participant_ids::uuid[]);

-- name: delete_channel(id)$
-- Deletes a channel and, by cascade, its participants and messages.
-- Not repeatable: a second run finds nothing left to delete.
DELETE FROM elizasql.channels
WHERE id = :id
RETURNING TRUE AS deleted;

-- name: add_channel_participants(channel_id, entity_ids)!
-- Locks the channel first, as update_channel does: what that one has deleted this one would wait for, and that one for
-- what this one has inserted. A channel that is not there is left to the foreign key.
WITH channel AS MATERIALIZED (
    SELECT id
    FROM elizasql.channels
    WHERE id = :channel_id
    FOR NO KEY UPDATE
)

INSERT INTO elizasql.channel_participants (channel_id, entity_id)
SELECT
    :channel_id::uuid,
    given.entity_id
FROM unnest(:entity_ids::uuid[]) AS given (entity_id)
LEFT JOIN channel ON TRUE
ORDER BY given.entity_id
ON CONFLICT (channel_id, entity_id) DO NOTHING;

-- name: remove_channel_participants(channel_id, entity_ids)$
-- Gives how many took part. The function locks the channel first, as above, and then looks anew at who takes part.
-- Not repeatable: a second run finds nothing left to delete.
SELECT elizasql.remove_channel_participants(:channel_id, :entity_ids::uuid[]) AS removed;

-- name: get_channel_participants(channel_id)
SELECT entity_id
FROM elizasql.channel_participants
WHERE channel_id = :channel_id
ORDER BY entity_id;

-- name: is_channel_participant(channel_id, entity_id)$
SELECT EXISTS(
    SELECT FROM elizasql.channel_participants
    WHERE channel_id = :channel_id AND entity_id = :entity_id
);

-- name: create_messages(messages, first, begins)
-- Creates messages, all or none, and gives the rows that are stored now: a message that is there stays as it is.
-- Messages without a time get the batch's, as many microseconds later as their position in the batch says, which is :first
-- for the first one of a chunk: their order stays the input's. Not the statement's time: with it the later chunks would
-- stand in the future, and what is made right after the batch before its end. begins: as of create_logs.
WITH given AS MATERIALIZED (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins)) + (:first::bigint + ordinality - 1) * interval '1 microsecond' AS made_at
    FROM jsonb_populate_recordset(NULL::elizasql.central_messages, :messages::jsonb) WITH ORDINALITY
)

INSERT INTO elizasql.central_messages AS m (
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at
)
SELECT
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id,
    coalesce(metadata, '{}'), coalesce(created_at, made_at), coalesce(updated_at, created_at, made_at)
FROM given
ORDER BY id
ON CONFLICT (id) DO UPDATE SET content = m.content
RETURNING
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at;

-- name: get_message_by_id(id)^
SELECT
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at
FROM elizasql.central_messages
WHERE id = :id;

-- name: update_message(id, updates)^
-- Changes the fields whose keys are given; a null clears.
UPDATE elizasql.central_messages AS m
SET
    content = CASE WHEN given.u ? 'content' THEN given.u ->> 'content' ELSE m.content END,
    raw_message = CASE
        WHEN given.u ? 'raw_message' THEN nullif(given.u -> 'raw_message', 'null') ELSE m.raw_message
    END,
    in_reply_to_root_message_id = CASE
        WHEN given.u ? 'in_reply_to_root_message_id'
            THEN (given.u ->> 'in_reply_to_root_message_id')::uuid
        ELSE m.in_reply_to_root_message_id
    END,
    source_type = CASE WHEN given.u ? 'source_type' THEN given.u ->> 'source_type' ELSE m.source_type END,
    source_id = CASE WHEN given.u ? 'source_id' THEN given.u ->> 'source_id' ELSE m.source_id END,
    metadata = CASE
        WHEN given.u ? 'metadata' THEN coalesce(nullif(given.u -> 'metadata', 'null'), '{}')
        ELSE m.metadata
    END,
    updated_at = statement_timestamp()
FROM (SELECT :updates::jsonb AS u) AS given
WHERE m.id = :id
RETURNING
    m.id, m.channel_id, m.author_id, m.content, m.raw_message, m.in_reply_to_root_message_id, m.source_type,
    m.source_id, m.metadata, m.created_at, m.updated_at;

-- name: get_messages_for_channel(channel_id, before_time, cursor_time, cursor_id, count)
-- Newest first; before_time and the cursor, the last row of the page before, are left out.
-- The cursor's time is read from its row, since JSON rounds to milliseconds; the given one counts when it is deleted.
-- Both are one bound, the earlier of the two: of two bounds a scan of the index begins at either, and reads all that is
-- newer than the other.
SELECT
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at
FROM elizasql.central_messages
WHERE
    channel_id = :channel_id
    AND (created_at, id) < (
        SELECT
            least(page.starts_at, :before_time::timestamptz),
            CASE
                WHEN page.starts_at >= :before_time THEN '00000000-0000-0000-0000-000000000000'
                ELSE coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
            END
        FROM (
            SELECT
                coalesce(
                    (SELECT c.created_at FROM elizasql.central_messages AS c WHERE c.id = :cursor_id),
                    :cursor_time::timestamptz,
                    'infinity'
                ) AS starts_at
        ) AS page
    )
ORDER BY created_at DESC, id DESC
LIMIT :count::bigint;

-- name: get_messages_for_channel_oldest_first(channel_id, before_time, cursor_time, cursor_id, count)
-- As get_messages_for_channel, the other way round: what comes after the cursor. Two bounds, since a page that begins at
-- the one ends at the other.
SELECT
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at
FROM elizasql.central_messages
WHERE
    channel_id = :channel_id
    AND created_at < (SELECT coalesce(:before_time::timestamptz, 'infinity'))
    AND (created_at, id) > (
        SELECT
            coalesce(
                (SELECT c.created_at FROM elizasql.central_messages AS c WHERE c.id = :cursor_id),
                :cursor_time::timestamptz,
                '-infinity'
            ),
            coalesce(:cursor_id::uuid, '00000000-0000-0000-0000-000000000000')
    )
ORDER BY created_at, id
LIMIT :count::bigint;

-- name: get_replies(message_id, cursor_time, cursor_id, count)
-- The messages that answer this one directly, oldest first; the cursor as above.
SELECT
    id, channel_id, author_id, content, raw_message, in_reply_to_root_message_id, source_type, source_id, metadata,
    created_at, updated_at
FROM elizasql.central_messages
WHERE
    in_reply_to_root_message_id = :message_id
    AND (created_at, id) > (
        SELECT
            coalesce(
                (SELECT c.created_at FROM elizasql.central_messages AS c WHERE c.id = :cursor_id),
                :cursor_time::timestamptz,
                '-infinity'
            ),
            coalesce(:cursor_id::uuid, '00000000-0000-0000-0000-000000000000')
    )
ORDER BY created_at, id
LIMIT :count::bigint;

-- name: delete_messages(ids)$
-- Gives how many there were; replies to them stay and no longer point at anything.
-- Not repeatable: a second run finds nothing left to delete.
WITH deleted AS (
    DELETE FROM elizasql.central_messages
    WHERE id = ANY(:ids::uuid[])
    RETURNING id
)

SELECT count(*) FROM deleted;
