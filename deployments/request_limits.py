"""What the network's owner lets one request ask for; beyond that a parameter is refused by its name."""

from azu.config.policy import Limits
from azu.errors import InvalidRequest
from deployments.openai import ChatRequest, CompletionRequest


def check_limits(body: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """Raise InvalidRequest that names the first parameter beyond its limit."""
    counted = {
        "n": (body.n or 1, limits.max_choices),
        "stop": (len(body.stop), limits.max_stop_strings),
        "stop_token_ids": (len(body.stop_token_ids or ()), limits.max_stop_strings),
        "logit_bias": (len(body.logit_bias or ()), limits.max_logit_bias),
    }
    if isinstance(body, ChatRequest):
        counted["messages"] = (len(body.messages), limits.max_messages)
        counted["tools"] = (len(body.tools or ()), limits.max_tools)
    for param, (asked, most) in counted.items():
        if asked > most:
            raise InvalidRequest(f"{param}: {asked}, where at most {most} are taken here", param=param)
    longest = max(map(len, body.stop), default=0)
    if longest > limits.max_stop_characters:
        raise InvalidRequest(
            f"stop: {longest} characters, where at most {limits.max_stop_characters} are taken here",
            param="stop",
        )
