"""The errors v4jax raises on bad input: the rule, the value received, the remedy.

`assert` elsewhere marks what only a bug of ours could break; everything a user can cause is one of
these.
"""


class V4JaxError(Exception):
    """Base of every error that v4jax raises on purpose."""


class ConfigError(V4JaxError, ValueError):
    """A configuration value breaks a rule; the message starts with the field's path."""


class CheckpointError(V4JaxError, ValueError):
    """A checkpoint is missing, truncated or mis-shaped; the message names tensor and file."""


class ShapeError(V4JaxError, ValueError):
    """An array argument has the wrong shape or dtype; the message names the argument."""


class CacheError(V4JaxError, ValueError):
    """A sequence does not fit its cache, or a cache does not belong to this model."""


class RequestError(V4JaxError, ValueError):
    """One request (document, question, sampling option) is bad; other requests go on."""


class NonFiniteError(RequestError):
    """The model computed NaN or infinity for one request; other requests go on."""


class ConversationError(RequestError):
    """A list of messages cannot be rendered; the message names the position in the list."""


class DataError(V4JaxError, ValueError):
    """A training example cannot be used; the message names file and line where it has them."""


class CompletionError(V4JaxError, ValueError):
    """A model's output does not follow the wire format; the message quotes the place."""


class UnsupportedError(V4JaxError, NotImplementedError):
    """An implementation asked for by name cannot run here; the message gives the reason."""


class TrainingError(V4JaxError, RuntimeError):
    """A training run cannot go on; the message says why and which checkpoint is good."""
