"""Every key of the jobs in Redis.

`azu:job:{id}`         hash: `job` (JSON), `state`, `attempts`, `delivered` (completion tokens written),
                       `queue_id` (its entry in the queue), later `cancelled`, `ending` (JSON of the
                       outcome that is being settled) and `outcome` (JSON).
`azu:job:{id}:tokens`  stream: entry `{n}-0` ends with completion token n and belongs to one `choice`
                       (`tokens`, `logprobs`, `top`: one word per token, separated by spaces; `finish`: why
                       the choice ended, and `work`: who ran it, or nothing); `{n}-1` carries the `outcome`
                       after token n. Expires some time after the outcome.
`azu:job:{id}:lost`    marks a job that was reserved for but never written down, so that it never is; expires.
`azu:jobs:queue`       stream of `job` ids, read by the consumer group `schedulers`; an entry lives until
                       its job is done.
`azu:jobs:of:{addr}`   sorted set of an address's job ids by their time of creation.
`azu:jobs:cancelled`   stream of `job` ids that were given up, the latest ones.
`azu:jobs:wake:{name}` stream that tells one reader to look at its list of streams again; expires.
"""

QUEUE = "azu:jobs:queue"
GROUP = "schedulers"
CANCELLED = "azu:jobs:cancelled"


def job_key(job_id: str) -> str:
    """Return the key of a job's record."""
    return f"azu:job:{job_id}"


def tokens_key(job_id: str) -> str:
    """Return the key of a job's token stream."""
    return f"azu:job:{job_id}:tokens"


def lost_key(job_id: str) -> str:
    """Return the key that marks a job as given up for lost."""
    return f"azu:job:{job_id}:lost"


def address_key(address: str) -> str:
    """Return the key of an address's jobs."""
    return f"azu:jobs:of:{address}"


def wake_key(name: str) -> str:
    """Return the key that wakes a reader."""
    return f"azu:jobs:wake:{name}"
