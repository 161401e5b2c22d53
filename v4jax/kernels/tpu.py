"""What the Pallas kernels for TPUs share: registers, VMEM, and facts about chips."""

import dataclasses

import jax.numpy as jnp

from v4jax.kernels.dispatch import Target

# A register of 32-bit values.
SUBLANES, LANES = 8, 128
# Rows of a register of bfloat16, of which two share a word.
PACKED_ROWS = 16
# Bytes of the smallest VMEM (64 MiB) that a kernel may use; the compiler needs the rest.
VMEM_BYTES = 60 * 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """What kernels need to know about a chip.

    cast: the e4m3 format that it converts in one to three steps, or None. A TPU v6 needs eight
      for e4m3fn. Its own format has bias 11 instead of 7: a code's value is a 16th, and −0 is NaN.
    modern: whether its vector unit computes in bfloat16, two values per lane, and its matrix units
      are 256 wide. Loading weights into such a unit takes as long as 256 rows.
    """

    cast: jnp.dtype | None = None
    modern: bool = False

    @property
    def cast_bias(self) -> int:
        """The bias of the format `cast`."""
        return 11 if self.cast == jnp.float8_e4m3b11fnuz else 7


_CHIPS = {
    "TPU v6": Chip(jnp.dtype(jnp.float8_e4m3b11fnuz), modern=True),
    "TPU7": Chip(jnp.dtype(jnp.float8_e4m3fn), modern=True),
}


def chip_of(target: Target) -> Chip:
    """Returns the facts about the target's chip; for an unknown chip, those of an older one."""
    kind = target.device_kind
    return next((chip for name, chip in _CHIPS.items() if kind.startswith(name)), Chip())
