"""Errors as OpenAI's clients expect them: the body, and the headers that say whether to try again."""

import math

from fastapi.responses import JSONResponse

from azu.errors import AzuError


def refusal(error: AzuError, *, may_be_charged: bool = False) -> JSONResponse:
    """Return an error's response.

    OpenAI's clients send a request again by themselves after 408, 409, 429 and 5xx; where something may have
    been charged for it they are told not to.
    """
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if may_be_charged:
        headers["x-should-retry"] = "false"
    return JSONResponse(error.to_openai(), error.status, headers)
