"""Calls of the methods about what agents share, messaging, and about agents as such.

`test_isolation` has those of the methods about an agent's own.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

from elizasql import Agent, Channel, ChannelMessage, DatabaseAdapter, MessageServer

# The methods without one, but for `is_ready`, which asks nothing that could be wrong.
WITHOUT_A_LIMIT = {"close", "transaction", "with_entity_context", "wait_for_tasks"}


async def share(db: DatabaseAdapter) -> dict[str, Any]:
    """Make a message server with a channel and a message with a reply, and another agent; give the ids."""
    ids: dict[str, Any] = {name: uuid4() for name in ("server", "channel", "message", "reply", "other")}
    ids |= {"agent": db.agent_id, "people": [uuid4(), uuid4()]}
    place = {"channel_id": ids["channel"], "author_id": ids["people"][0]}
    await db.create_agent(Agent(id=ids["other"], name="other"))
    await db.create_message_server(MessageServer(id=ids["server"], name="server", source_type="test"))
    await db.create_channel(
        Channel(id=ids["channel"], message_server_id=ids["server"], name="channel", type="GROUP"), ids["people"]
    )
    await db.create_message(ChannelMessage(id=ids["message"], content="one", **place))
    await db.create_message(
        ChannelMessage(id=ids["reply"], content="two", in_reply_to_root_message_id=ids["message"], **place)
    )
    await db.add_agent_to_message_server(ids["server"], db.agent_id)
    return ids


def shared_calls(ids: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give the arguments of each method, in an order in which none takes away what the next ones need.

    Args:
        ids: As `share` gave them.
    """
    server = {"name": "another", "source_type": "test"}
    message = {"channel_id": ids["channel"], "author_id": uuid4(), "content": "three"}
    new = [uuid4(), uuid4()]
    at_server, in_channel = {"server_id": ids["server"]}, {"channel_id": ids["channel"]}
    return {
        "add_agent_to_message_server": {**at_server, "agent_id": ids["other"]},
        "add_channel_participants": {**in_channel, "entity_ids": new},
        "cleanup_agents": {"older_than": timedelta(days=36_500)},
        "count_agents": {},
        "create_agent": {"agent": {"id": uuid4(), "name": "new"}},
        "create_agents": {"agents": [{"id": id, "name": "new"} for id in new]},
        "create_channel": {
            "channel": {"message_server_id": ids["server"], "name": "new", "type": "GROUP"},
            "participant_ids": new,
        },
        "create_message": {"message": message},
        "create_message_server": {"server": server},
        "create_message_servers": {"servers": [server, server]},
        "create_messages": {"messages": [message, message]},
        "ensure_agent_exists": {"agent": {"name": "here"}},
        "ensure_embedding_dimension": {"dimension": 384},
        "find_or_create_dm_channel": {"user1_id": new[0], "user2_id": new[1], **at_server},
        "get_agent": {"agent_id": ids["other"]},
        "get_agent_run_summaries": {},
        "get_agents": {"limit": 5},
        "get_agents_by_ids": {"agent_ids": [ids["agent"], ids["other"]]},
        "get_agents_for_message_server": at_server,
        "get_channel_details": in_channel,
        "get_channel_participants": in_channel,
        "get_channels_for_message_server": at_server,
        "get_embedding_dimension": {},
        "get_message_by_id": {"message_id": ids["message"]},
        "get_message_server_by_id": at_server,
        "get_message_servers": {},
        "get_messages_for_channel": in_channel,
        "get_replies": {"message_id": ids["message"]},
        "is_channel_participant": {**in_channel, "entity_id": ids["people"][0]},
        "update_agent": {"agent_id": ids["other"], "agent": {"name": "renamed"}},
        "update_agents": {"agents": [{"id": ids["other"], "name": "renamed"}]},
        "update_channel": {**in_channel, "updates": {"name": "renamed"}, "participant_ids": [*ids["people"], *new]},
        "update_message": {"message_id": ids["message"], "updates": {"content": "four"}},
        "upsert_agents": {"agents": [{"id": ids["other"], "name": "again"}, {"id": uuid4(), "name": "new"}]},
        "delete_message": {"message_id": ids["reply"]},
        "delete_messages": {"message_ids": [ids["message"]]},
        "remove_agent_from_message_server": {**at_server, "agent_id": ids["agent"]},
        "remove_channel_participants": {**in_channel, "entity_ids": ids["people"]},
        "delete_channel": in_channel,
        "delete_agent": {"agent_id": ids["other"]},
        "delete_agents": {"agent_ids": [new[0]]},
    }
