"""`Calls`: what a loop calls, on a model as it is or flattened (`flat.py`)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from jaxtyping import Array, Int

from v4jax.cache import HybridCache
from v4jax.model.speculation import GREEDY, Choice, Drafts, Verified

if TYPE_CHECKING:
    from v4jax.model.transformer import Transformer


class Calls:
    """Checks arguments and runs a pass of the whole model, compiled for each new shape."""

    @property
    def _checks(self) -> "Transformer":
        """The model that checks arguments."""
        raise NotImplementedError

    def _compiled(self, name: str, donate: bool = False) -> Callable:
        """Returns a pass of `passes.py` by name, bound to the weights; it may consume its cache."""
        raise NotImplementedError

    def extend(
        self,
        tokens: Int[Array, "b t"],
        cache: HybridCache,
        lengths: Int[Array, "b"] | None = None,
        logits: Literal["all", "last"] = "all",
        *,
        donate: bool = False,
        trusted: bool = False,
    ) -> tuple[Array, HybridCache]:
        """Appends tokens to every sequence; returns their logits and the new cache.

        One token is decode, many are prefill; any chunking gives the same result.

        Args:
          lengths: how many of the t tokens are real, per sequence (0 … t); the rest is padding on
            the right, and its logits mean nothing. None: all.
          logits: "all" returns [b, t, v]; "last" returns [b, v], of the last real token (of the
            first token where there is none: discard it). They are NaN where a number of any of the
            sequence's real tokens is not finite, though the last one may not show it.
          donate: reuses the buffers of `cache`, which must not be used afterwards; for loops.
          trusted: leaves the values of tokens and lengths unchecked. Checking them waits for the
            device; a loop that produced them can dispatch the next step early.

        Raises:
          ShapeError: an argument has the wrong shape, dtype or values.
          CacheError: a sequence would exceed its capacity, or the cache belongs to another model.
        """
        tokens, lengths = self._checks.check_extend(tokens, cache, lengths, logits, trusted)
        return self._compiled("extend", donate)(tokens, cache, lengths, logits)

    def draft(
        self,
        last: Int[Array, "b"],
        cache: HybridCache,
        choice: Choice = GREEDY,
        *,
        count: int | None = None,
        trusted: bool = False,
    ) -> Drafts:
        """Returns drafts of the tokens that follow `last`, which follows what `cache` holds.

        A DSpark module drafts several tokens, a serial MTP block one.

        Args:
          choice: how each row's token is chosen; by default the most probable one.
          count: how many tokens to draft; None: as many as the module has rows. Fewer are the first
            ones of all.
          trusted: as for `extend`.

        Raises:
          ConfigError: the model drafts nothing, or fewer than `count` tokens.
          ShapeError: `last` is no vector of ids.
          CacheError: the cache belongs to another model, or has another batch.
        """
        last, count = self._checks.check_draft(last, cache, count, trusted)
        return self._compiled("draft")(last, cache, choice, count)

    def verify(
        self,
        last: Int[Array, "b"],
        drafts: Drafts,
        cache: HybridCache,
        choice: Choice = GREEDY,
        lengths: Int[Array, "b"] | None = None,
        *,
        donate: bool = False,
        trusted: bool = False,
    ) -> tuple[Verified, HybridCache]:
        """Checks drafts in one pass; the new cache holds `last` and the drafts that are accepted.

        Greedily, a sequence gets the tokens that greedy decoding gives it. A choice by
        `accept_by_rejection` gives them the distribution of sampling from the model.

        Args:
          drafts: what `draft` returned, or the first columns of it.
          choice: how drafts are accepted; the one that they were drafted with.
          lengths: how many of [last, drafts …] are real, per sequence (0 … drafts + 1); a sequence
            of 0 stays as it is, and what is said about it means nothing. None: all.
          donate, trusted: as for `extend`.

        Raises:
          ShapeError: an argument has the wrong shape, dtype or values.
          CacheError: there are more drafts than the cache can take back, a sequence would exceed
            its capacity, or the cache belongs to another model.
        """
        last, lengths = self._checks.check_verify(last, drafts, cache, lengths, trusted)
        return self._compiled("verify", donate)(last, drafts, cache, lengths, choice)
