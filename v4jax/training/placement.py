"""Where the state and the batches of a run lie on a mesh.

Moments lie like the weights they belong to; everything small is whole on every device. Shapes are
enough: the same functions place a run of this machine and one that is only planned.
"""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.model import Transformer
from v4jax.parallel import Layout
from v4jax.training.batch import Batch
from v4jax.training.step import TrainState, init_state
from v4jax.training.trainable import trained_specs


def make_state(
    frozen: Transformer, weights: dict, biases: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns `init_state(…)`, every array made on the devices that hold it."""
    if frozen.layout is None:
        return init_state(weights, biases, optimizer)
    abstract = abstract_state(frozen, weights, biases, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda weights, biases: init_state(weights, biases, optimizer), out_shardings=shardings
    )
    return make(weights, biases)


def abstract_state(
    frozen: Transformer, weights: dict, biases: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated."""
    state = jax.eval_shape(lambda w, b: init_state(w, b, optimizer), weights, biases)
    if frozen.layout is None:
        return state
    specs = trained_specs(frozen)

    def place(path, leaf):
        # Wherever a leaf stands under the name of a weight, it is that weight or a moment of it.
        names = [entry.key for entry in path if getattr(entry, "key", None) in specs]
        sharding = NamedSharding(frozen.layout.mesh, specs[names[-1]] if names else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(layout: Layout) -> NamedSharding:
    """Returns how stacked batches [n, b, t] lie: rows over `data`, tokens over `SEQUENCE`."""
    axes = (layout.array_axes("train", name) or None for name in ("batch", "tokens"))
    return NamedSharding(layout.mesh, P(None, *axes))


def row_shares(layout: Layout | None) -> tuple[int, int]:
    """Returns which share of a batch's rows this process needs, and how many shares there are.

    Processes whose devices hold other tokens of the same rows read the same share.
    """
    count = jax.process_count()
    if layout is None or count == 1:
        return 0, 1
    shares = min(layout.mesh.shape["data"], count)
    return jax.process_index() * shares // count, shares


def put_batches(batches: Batch, layout: Layout | None) -> Batch:
    """Returns host arrays [n, b, t] of this process' rows as arrays of the whole batch."""
    if layout is None:
        return jax.tree.map(jax.numpy.asarray, batches)
    sharding = batch_sharding(layout)
    index, shares = row_shares(layout)

    def put(array: np.ndarray):
        number, rows, tokens = array.shape
        first = index * rows

        def read(where):
            start, stop, _ = where[1].indices(rows * shares)
            return array[where[0], start - first : stop - first, where[2]]

        return jax.make_array_from_callback((number, rows * shares, tokens), sharding, read)

    return jax.tree.map(put, batches)
