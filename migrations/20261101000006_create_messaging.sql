-- Messaging: message servers, the agents on them, channels, who takes part in them, and messages.
--
-- Shared by all agents: a channel is the same for everybody in it, so no key starts with agent_id. Authors and
-- participants are users of the messaging platform, who need not be an entity of any agent: no foreign key.

-- migrate:up
CREATE TABLE elizasql.message_servers (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    name text NOT NULL,
    source_type text NOT NULL,
    source_id text,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT message_servers_pkey PRIMARY KEY (id)
);
CREATE INDEX message_servers_created_at_idx ON elizasql.message_servers (created_at, id);

CREATE TABLE elizasql.message_server_agents (
    message_server_id uuid NOT NULL,
    agent_id uuid NOT NULL,
    CONSTRAINT message_server_agents_pkey PRIMARY KEY (message_server_id, agent_id),
    CONSTRAINT message_server_agents_message_server_fkey FOREIGN KEY (message_server_id)
    REFERENCES elizasql.message_servers (id) ON DELETE CASCADE,
    CONSTRAINT message_server_agents_agent_fkey FOREIGN KEY (agent_id)
    REFERENCES elizasql.agents (id) ON DELETE CASCADE
);
CREATE INDEX message_server_agents_agent_idx ON elizasql.message_server_agents (agent_id);

CREATE TABLE elizasql.channels (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    message_server_id uuid NOT NULL,
    name text NOT NULL,
    type text NOT NULL,
    source_type text,
    source_id text,
    topic text,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT channels_pkey PRIMARY KEY (id),
    CONSTRAINT channels_message_server_fkey FOREIGN KEY (message_server_id)
    REFERENCES elizasql.message_servers (id) ON DELETE CASCADE
);
CREATE INDEX channels_message_server_idx ON elizasql.channels (message_server_id, created_at, id);
-- Two users have one direct channel of the name DM-<user>-<user> on a server. Direct channels of other names may be
-- many: clients open a new one, with a title of its own, for each conversation.
CREATE UNIQUE INDEX channels_dm_key ON elizasql.channels (message_server_id, name)
WHERE type = 'DM' AND name ~ '^DM-[0-9a-f-]{36}-[0-9a-f-]{36}$';

CREATE TABLE elizasql.channel_participants (
    channel_id uuid NOT NULL,
    entity_id uuid NOT NULL,
    CONSTRAINT channel_participants_pkey PRIMARY KEY (channel_id, entity_id),
    CONSTRAINT channel_participants_channel_fkey FOREIGN KEY (channel_id)
    REFERENCES elizasql.channels (id) ON DELETE CASCADE
);

CREATE TABLE elizasql.central_messages (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    channel_id uuid NOT NULL,
    author_id uuid NOT NULL,
    content text NOT NULL,
    raw_message jsonb,
    in_reply_to_root_message_id uuid,
    source_type text,
    source_id text,
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT central_messages_pkey PRIMARY KEY (id),
    CONSTRAINT central_messages_channel_fkey FOREIGN KEY (channel_id)
    REFERENCES elizasql.channels (id) ON DELETE CASCADE,
    CONSTRAINT central_messages_reply_fkey FOREIGN KEY (in_reply_to_root_message_id)
    REFERENCES elizasql.central_messages (id) ON DELETE SET NULL
);
CREATE INDEX central_messages_channel_idx ON elizasql.central_messages (channel_id, created_at DESC, id DESC);
-- Most messages are no replies: they stay out of the index.
CREATE INDEX central_messages_reply_idx ON elizasql.central_messages (in_reply_to_root_message_id, created_at, id)
WHERE in_reply_to_root_message_id IS NOT NULL;

-- Makes the given users the participants of a channel whose row the caller has locked.
--
-- A function, because a statement does not see participants that were committed while it waited for that lock, and the
-- inner statements of a volatile function do: of two concurrent replacements the later one stands, not a mixture.
CREATE FUNCTION elizasql.replace_channel_participants(given_channel uuid, given_entities uuid[])
RETURNS void LANGUAGE plpgsql VOLATILE STRICT AS $$
BEGIN
    -- As a set, not "<> ALL": that compares everyone with everyone, a minute for 100,000.
    DELETE FROM elizasql.channel_participants
    WHERE channel_id = given_channel AND entity_id = ANY (ARRAY(
        SELECT entity_id FROM elizasql.channel_participants WHERE channel_id = given_channel
        EXCEPT
        SELECT unnest(given_entities)
    ));
    INSERT INTO elizasql.channel_participants (channel_id, entity_id)
    SELECT given_channel, given.id FROM unnest(given_entities) AS given (id) ORDER BY given.id
    ON CONFLICT (channel_id, entity_id) DO NOTHING;
END
$$;

-- Ends the participation of the given users in a channel, and gives how many took part.
--
-- Whoever changes participants locks the channel first, so that no two of them wait for each other. A function for the
-- same reason as above: who came while it waited for that lock is removed, too.
CREATE FUNCTION elizasql.remove_channel_participants(given_channel uuid, given_entities uuid[])
RETURNS bigint LANGUAGE plpgsql VOLATILE STRICT AS $$
DECLARE
    removed bigint;
BEGIN
    PERFORM FROM elizasql.channels WHERE id = given_channel FOR NO KEY UPDATE;
    DELETE FROM elizasql.channel_participants
    WHERE channel_id = given_channel AND entity_id = ANY (given_entities);
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END
$$;

-- migrate:down
DROP FUNCTION elizasql.remove_channel_participants(uuid, uuid[]);
DROP FUNCTION elizasql.replace_channel_participants(uuid, uuid[]);
DROP TABLE elizasql.central_messages;
DROP TABLE elizasql.channel_participants;
DROP TABLE elizasql.channels;
DROP TABLE elizasql.message_server_agents;
DROP TABLE elizasql.message_servers;
