"""`Transformer`: the whole model and the calls a user makes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from v4jax.cache import HybridCache, init_cache
from v4jax.cache.hybrid import cache_axes
from v4jax.config import ModelConfig, Numerics
from v4jax.config.overrides import override
from v4jax.costs.flops import reading_work
from v4jax.errors import CacheError, ConfigError, ShapeError
from v4jax.kernels import Target
from v4jax.model import passes
from v4jax.model.calls import Calls
from v4jax.model.draft import Drafter
from v4jax.model.flat import FlatTransformer
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.mtp import MTP
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare, Storage
from v4jax.model.stack import Stack
from v4jax.model.weights import variables
from v4jax.parallel import Layout
from v4jax.parallel.global_arrays import values_of
from v4jax.parallel.shard import check_batch, entry_shards, make_arrays
from v4jax.parallel.weight_sharding import annotate_shardings
from v4jax.shapes import as_integers, check_shape


class Transformer(Calls, nnx.Module):
    """DeepSeek-V4: embedding, layers over residual streams, collapse, head, and the MTP blocks.

    The module is a pytree: pass it through `jax.jit` like any other argument. `__call__` and
      `extend` are compiled
    for each new shape; inside a transformation use them as they are.

    >>> logits = model(tokens)
    >>> cache = model.init_cache(batch=1, max_tokens=65536)
    >>> logits, cache = model.extend(tokens, cache, logits="last")

    Attributes:
      layout: on a mesh, where the weights lie; None on one device.
      target: the devices that its programs are made for, and implementations that are asked for:
        `model.target = model.target.using(indexer="portable")`. None: a model of shapes, which is
        only counted.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        *,
        storage: Storage = "float32",
        rngs: nnx.Rngs | None,
        target: Target | None = None,
    ):
        declare = Declare(config, storage, rngs)
        self.config, self.numerics, self.folder = config, numerics, None
        self.layout: Layout | None = None
        # Shapes must not start JAX's backends: what plans and lists works where there are none.
        self.target = Target.here() if target is None and rngs is not None else target
        vocab = (config.vocab_size, config.hidden_size)
        self.embed = declare.matrix("bfloat16", vocab, ("vocab", "embed"))
        self.stack = Stack(config, numerics, storage, rngs)
        self.collapse = HyperHead(declare, config)
        self.norm = RMSNorm(declare, config.hidden_size, "embed", config.rms_norm_eps)
        self.head = declare.matrix("bfloat16", vocab, ("vocab", "embed"))
        self.mtp = nnx.List(MTP(declare, config, layer, numerics) for layer in config.mtp_layers)
        self.drafter = None if config.draft is None else Drafter(declare, config, numerics)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("config", "numerics") and name in vars(self) and value != vars(self)[name]:
            raise ConfigError(
                f"model.{name} says how the model was built, and its layers would not follow "
                "another one; model.override(index_topk=64) makes a model of the same weights, "
                "and so does load(…, numerics=…, overrides=…), for single layers, too"
            )
        super().__setattr__(name, value)

    def override(self, **values: Any) -> "Transformer":
        """Returns a model of the same weights with other values of the configuration.

        >>> narrow = model.override(sliding_window=64, layers={3: {"index_topk": 16}})

        Raises:
          ConfigError: a name, a layer or a value is bad (`config.overrides`), or the weights do not
            fit: `load` with the same overrides then reads them as they must be grouped.
        """
        config = override(self.config, values)
        made = abstract_transformer(config, self.numerics, target=self.target)
        new, old = variables(made), variables(self)
        shapes = {name: variable.get_value().shape for name, variable in new.items()}
        if shapes != {name: variable.get_value().shape for name, variable in old.items()}:
            raise ConfigError(
                f"override({', '.join(map(str, values))}) changes which layers are stored together "
                "or what weights there are; load(…, overrides=…) reads what fits"
            )
        made.folder, made.layout = self.folder, self.layout
        for name, variable in old.items():
            new[name].set_value(variable.get_value())
        return made if self.layout is None else annotate_shardings(made, self.layout)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Returns the next token's logits at every position of sequences that start at 0.

        Raises:
          ShapeError: tokens are no integers [batch, tokens], empty, or outside the vocabulary.
        """
        return passes.forward(self, self._check_tokens(tokens))

    def predict_ahead(self, tokens: Int[Array, "b t"]) -> Float[Array, "b u v"]:
        """Returns the first MTP block's logits [b, t−1, v]: row u predicts token u+2.

        Raises:
          ConfigError: the model has no MTP block.
          ShapeError: as `__call__`, or fewer than two tokens.
        """
        tokens = self._check_tokens(tokens)
        if not self.mtp:
            raise ConfigError(
                "model.num_nextn_predict_layers is 0: this model has no MTP block; "
                "load a checkpoint that has one"
            )
        if tokens.shape[1] < 2:
            raise ShapeError(f"tokens must hold at least 2 tokens for MTP, got {tokens.shape[1]}")
        return passes.forward_drafts(self, tokens)

    def init_cache(self, batch: int, max_tokens: int) -> HybridCache:
        """Returns empty caches for `batch` sequences of up to `max_tokens` tokens each.

        Raises:
          CacheError: a size is out of range.
        """
        sizes = batch, max_tokens, entry_shards(self.layout)
        check_batch(self.layout, batch)
        return make_arrays(
            lambda: init_cache(self.config, self.numerics, *sizes), cache_axes, self.layout
        )

    @property
    def _checks(self) -> "Transformer":
        return self

    def _compiled(self, name: str, donate: bool = False) -> Callable:
        return partial(getattr(passes, f"{name}_donating" if donate else name), self)

    @property
    def draft_tokens(self) -> int:
        """How many tokens `draft` proposes at most; 0 where nothing drafts."""
        return self.config.draft_tokens

    def check_draft(self, last, cache, count, trusted: bool) -> tuple[Array, int]:
        """Returns the tokens and the count of `draft`, or raises what it raises."""
        if not self.draft_tokens:
            raise ConfigError(
                "this model has neither draft module nor MTP block; the released checkpoints do"
            )
        if count is not None and not 1 <= count <= self.draft_tokens:
            raise ConfigError(
                f"count must be 1 … {self.draft_tokens}, the tokens that the model drafts, "
                f"got {count}"
            )
        return self._check_last(last, cache, trusted), count or self.draft_tokens

    def check_verify(self, last, drafts, cache, lengths, trusted: bool) -> tuple[Array, Array]:
        """Returns the tokens and the lengths of `verify`, or raises what it raises."""
        last = self._check_last(last, cache, trusted)
        batch, count = cache.batch, drafts.tokens.shape[-1]
        check_shape("drafts.tokens", drafts.tokens, (batch, count))
        check_shape("drafts.logits", drafts.logits, (batch, count, self.config.vocab_size))
        if not 1 <= count <= cache.spare:
            raise CacheError(
                f"drafts must be 1 … {cache.spare} tokens, as many as the cache can take back, got "
                f"{count}; verify what `draft` returned"
            )
        self._check_tokens(drafts.tokens, trusted)
        return last, self._check_lengths(lengths, cache, count + 1, trusted)

    def check_extend(self, tokens, cache, lengths, logits, trusted: bool) -> tuple[Array, Array]:
        """Returns the tokens and lengths of `extend` as arrays, or raises what it raises."""
        tokens = self._check_tokens(tokens, trusted)
        if logits not in ("all", "last"):
            raise ShapeError(f"logits must be 'all' or 'last', got {logits!r}")
        batch, count = tokens.shape
        self._check_cache(cache)
        if cache.batch != batch:
            raise CacheError(
                f"tokens have batch {batch} but the cache holds {cache.batch} sequences; "
                f"make it with init_cache({batch}, …)"
            )
        return tokens, self._check_lengths(lengths, cache, count, trusted)

    def flatten(self) -> FlatTransformer:
        """Returns the model as it is now, for loops over `extend`, `draft` and `verify`.

        >>> extend = model.flatten().extend
        >>> while ...:
        ...     logits, cache = extend(tokens, cache, logits="last", donate=True)
        """
        return FlatTransformer(self)

    def count_reading(self) -> Callable[[int, int], tuple[float, float]]:
        """Returns (first, end) → operations of reading tokens; see `costs.flops.reading_work`."""
        from v4jax.model.inventory import take_inventory  # which is made of abstract models

        return reading_work(take_inventory(self.config))

    def _check_tokens(self, tokens, trusted: bool = False) -> Array:
        tokens = as_integers("tokens", tokens)
        check_shape("tokens", tokens, (None, None))
        if 0 in tokens.shape:
            raise ShapeError(f"tokens must hold at least one token, got shape {list(tokens.shape)}")
        if not (trusted or isinstance(tokens, jax.core.Tracer)):
            host = np.asarray(tokens)
            bad = host[(host < 0) | (host >= self.config.vocab_size)]
            if bad.size:
                raise ShapeError(
                    f"tokens must be ids 0 … {self.config.vocab_size - 1}, got {bad[0]}; "
                    "was the text encoded with another tokenizer?"
                )
        return jnp.asarray(tokens, jnp.int32)

    def _check_last(self, last, cache, trusted: bool) -> Array:
        """Returns `last` [b], one token for each sequence of `cache`."""
        last = as_integers("last", last)
        check_shape("last", last, (None,))
        last = self._check_tokens(last[:, None], trusted)[:, 0]
        self._check_cache(cache)
        if last.shape[0] != cache.batch:
            raise CacheError(
                f"last must have one token for each of {cache.batch} sequences, got {last.shape[0]}"
            )
        return last

    def _check_cache(self, cache):
        if not isinstance(cache, HybridCache):
            raise CacheError(
                f"cache must be a HybridCache, got {type(cache).__name__}; make it with "
                "this model's init_cache"
            )
        cache.check_fits(self.config, self.numerics, entry_shards(self.layout))

    def _check_lengths(self, lengths, cache: HybridCache, count: int, trusted: bool) -> Array:
        """Returns how many of `count` tokens are real, [b]; they fit into the cache."""
        lengths = np.full(cache.batch, count, np.int32) if lengths is None else lengths
        lengths = as_integers("lengths", lengths)
        check_shape("lengths", lengths, (cache.batch,))
        if not trusted:
            self._check_room(cache, lengths, count)
        return jnp.asarray(lengths, jnp.int32)

    def _check_room(self, cache: HybridCache, lengths, count: int):
        if any(isinstance(x, jax.core.Tracer) for x in (cache.lengths, lengths)):
            return  # values are unknown under a transformation; its caller checks
        lengths, used = np.asarray(lengths), values_of(cache.lengths)
        if lengths.min() < 0 or lengths.max() > count:
            raise ShapeError(
                f"lengths must be 0 … {count} (the tokens given), got {lengths.tolist()}"
            )
        over = np.flatnonzero(used + lengths > cache.capacity)
        if over.size:
            slot = over[0]
            raise CacheError(
                f"sequence {slot} holds {used[slot]} tokens and gets {lengths[slot]} more, "
                f"but the cache was made for {cache.capacity}; "
                "make it larger with init_cache(batch, max_tokens)"
            )


def abstract_transformer(
    config: ModelConfig,
    numerics: Numerics,
    *,
    storage: Storage = "released",
    target: Target | None = None,
) -> Transformer:
    """Returns the model with shapes in place of arrays: nothing is allocated.

    Args:
      target: what its programs are made for; None where it is only counted.
    """
    return Transformer(config, numerics, storage=storage, rngs=None, target=target)
