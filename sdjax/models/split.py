"""Weights that the devices of a mesh store in parts, and use whole.

The mesh is that of the context in which a program is traced, see `runtime.devices.within`.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def is_split_over(axis: str) -> bool:
    """Whether the mesh has an axis of this name with several devices."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1


def is_stored_in_parts() -> bool:
    """Whether weights are stored in parts, which `whole` puts together.

    If layers are split over `tensor` too, the compiler decides what to exchange.
    """
    return is_split_over("fsdp") and not is_split_over("tensor")


def whole(weights: Array) -> Array:
    """Returns weights of a layer, with all their parts on each device (Rajbhandari et al. 2020, ZeRO, section 5.3).

    Left alone, the compiler divides the work of the layers as their weights are stored, and exchanges activations and
    the borders of feature maps in many small pieces. The gradient goes back to the parts as the compiler chooses.
    """
    return _whole(weights) if is_stored_in_parts() else weights


@jax.custom_vjp
def _whole(weights: Array) -> Array:
    return jax.lax.with_sharding_constraint(weights, P())


_whole.defvjp(lambda weights: (_whole(weights), None), lambda _, gradient: (gradient,))
