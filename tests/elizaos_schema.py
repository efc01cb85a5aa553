"""The tables that @elizaos/plugin-sql 1.7.2 makes, and the names of 1.6: read off databases that they made."""

TABLES = """
CREATE TABLE servers (id uuid PRIMARY KEY, created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE agents (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), enabled boolean NOT NULL DEFAULT TRUE,
    server_id uuid, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
    name text NOT NULL, username text, system text DEFAULT '', bio jsonb DEFAULT '[]',
    message_examples jsonb NOT NULL DEFAULT '[]', post_examples jsonb NOT NULL DEFAULT '[]',
    topics jsonb NOT NULL DEFAULT '[]', adjectives jsonb NOT NULL DEFAULT '[]', knowledge jsonb NOT NULL DEFAULT '[]',
    plugins jsonb NOT NULL DEFAULT '[]', settings jsonb NOT NULL DEFAULT '{}', style jsonb NOT NULL DEFAULT '{}');
CREATE TABLE worlds (id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE, name text NOT NULL, metadata jsonb,
    message_server_id uuid, created_at timestamp NOT NULL DEFAULT now());
CREATE TABLE rooms (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), agent_id uuid REFERENCES agents ON DELETE CASCADE,
    source text NOT NULL, type text NOT NULL, message_server_id uuid, world_id uuid, name text, metadata jsonb,
    channel_id text, created_at timestamp NOT NULL DEFAULT now());
CREATE TABLE entities (id uuid PRIMARY KEY, agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE,
    created_at timestamp NOT NULL DEFAULT now(), names text[] NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}');
CREATE TABLE components (id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    entity_id uuid NOT NULL REFERENCES entities ON DELETE CASCADE,
    agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE,
    room_id uuid NOT NULL REFERENCES rooms ON DELETE CASCADE,
    world_id uuid REFERENCES worlds ON DELETE CASCADE, source_entity_id uuid REFERENCES entities ON DELETE CASCADE,
    type text NOT NULL, data jsonb DEFAULT '{}', created_at timestamp NOT NULL DEFAULT now());
CREATE TABLE participants (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), created_at timestamptz NOT NULL DEFAULT now(),
    entity_id uuid REFERENCES entities ON DELETE CASCADE, room_id uuid REFERENCES rooms ON DELETE CASCADE,
    agent_id uuid REFERENCES agents ON DELETE CASCADE, room_state text);
CREATE TABLE memories (id uuid PRIMARY KEY, type text NOT NULL, created_at timestamp NOT NULL DEFAULT now(),
    content jsonb NOT NULL, entity_id uuid REFERENCES entities ON DELETE CASCADE,
    agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE, room_id uuid REFERENCES rooms ON DELETE CASCADE,
    world_id uuid, "unique" boolean NOT NULL DEFAULT TRUE, metadata jsonb NOT NULL DEFAULT '{}');
CREATE TABLE embeddings (id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    memory_id uuid REFERENCES memories ON DELETE CASCADE, created_at timestamp NOT NULL DEFAULT now(),
    dim_384 vector(384), dim_512 vector(512), dim_768 vector(768), dim_1024 vector(1024), dim_1536 vector(1536),
    dim_3072 vector(3072));
CREATE TABLE relationships (id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now(),
    source_entity_id uuid NOT NULL REFERENCES entities ON DELETE CASCADE,
    target_entity_id uuid NOT NULL REFERENCES entities ON DELETE CASCADE,
    agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE, tags text[], metadata jsonb,
    UNIQUE (source_entity_id, target_entity_id, agent_id));
CREATE TABLE logs (id uuid NOT NULL DEFAULT gen_random_uuid(), created_at timestamptz NOT NULL DEFAULT now(),
    entity_id uuid NOT NULL REFERENCES entities ON DELETE CASCADE, body jsonb NOT NULL, type text NOT NULL,
    room_id uuid NOT NULL REFERENCES rooms ON DELETE CASCADE);
CREATE TABLE cache (key text NOT NULL, agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE,
    value jsonb NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), expires_at timestamptz,
    PRIMARY KEY (key, agent_id));
CREATE TABLE tasks (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text NOT NULL, description text, room_id uuid,
    world_id uuid, entity_id uuid, agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE,
    tags text[] DEFAULT '{}', metadata jsonb DEFAULT '{}', created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now());
CREATE TABLE message_servers (id uuid PRIMARY KEY, name text NOT NULL, source_type text NOT NULL, source_id text,
    metadata jsonb, created_at timestamp NOT NULL DEFAULT now(), updated_at timestamp NOT NULL DEFAULT now());
CREATE TABLE message_server_agents (message_server_id uuid NOT NULL REFERENCES message_servers ON DELETE CASCADE,
    agent_id uuid NOT NULL REFERENCES agents ON DELETE CASCADE, PRIMARY KEY (message_server_id, agent_id));
CREATE TABLE channels (id text PRIMARY KEY,
    message_server_id uuid NOT NULL REFERENCES message_servers ON DELETE CASCADE,
    name text NOT NULL, type text NOT NULL, source_type text, source_id text, topic text, metadata jsonb,
    created_at timestamp NOT NULL DEFAULT now(), updated_at timestamp NOT NULL DEFAULT now());
CREATE TABLE channel_participants (channel_id text NOT NULL REFERENCES channels ON DELETE CASCADE,
    entity_id text NOT NULL, PRIMARY KEY (channel_id, entity_id));
CREATE TABLE central_messages (id text PRIMARY KEY, channel_id text NOT NULL REFERENCES channels ON DELETE CASCADE,
    author_id text NOT NULL, content text NOT NULL, raw_message jsonb,
    in_reply_to_root_message_id text REFERENCES central_messages ON DELETE SET NULL, source_type text, source_id text,
    metadata jsonb, created_at timestamp NOT NULL DEFAULT now(), updated_at timestamp NOT NULL DEFAULT now());
"""

# The columns that 1.6.1 to 1.6.4 call otherwise.
_RENAMED = {
    "worlds": "agent_id created_at",
    "rooms": "agent_id world_id channel_id created_at",
    "components": "entity_id agent_id room_id world_id source_entity_id created_at",
    "participants": "entity_id room_id agent_id room_state",
    "memories": "created_at entity_id agent_id room_id world_id",
    "relationships": "source_entity_id target_entity_id agent_id",
    "logs": "entity_id room_id",
    "tasks": "room_id world_id entity_id",
}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


# Makes of these tables those of 1.6.1.
AS_IN_1_6 = [
    *(
        f'ALTER TABLE {table} RENAME COLUMN {name} TO "{_camel(name)}"'
        for table, names in _RENAMED.items()
        for name in names.split()
    ),
    'ALTER TABLE rooms ADD COLUMN "serverId" text; UPDATE rooms SET "serverId" = message_server_id::text',
    "ALTER TABLE rooms DROP COLUMN message_server_id",
    'ALTER TABLE worlds ADD COLUMN "serverId" text; UPDATE worlds SET "serverId" = \'guild 7\'',
    "ALTER TABLE worlds DROP COLUMN message_server_id",
    "ALTER TABLE channels RENAME COLUMN message_server_id TO server_id",
    "ALTER TABLE channel_participants RENAME COLUMN entity_id TO user_id",
    "ALTER TABLE message_server_agents RENAME TO server_agents",
    "ALTER TABLE server_agents RENAME COLUMN message_server_id TO server_id",
    "ALTER TABLE agents DROP COLUMN server_id",
    "DROP TABLE servers",
]
