"""LoRA, DoRA and their relatives: their formulas, and functions that make, merge and add adapter trees.

An adapter changes the kernel W of one layer to `W + scale * down up` (LoRA, Hu et al. 2021, eq. 3). Given a layer's
input x and its output y, `adapted` computes what the changed kernel would give, without forming it. `merge` forms it.

The adapter of one layer is a dict of arrays:

    linear       down [in, R]           up [R, out]   scale []
    convolution  down [kh, kw, in, R]   up [R, out]   scale []

DoRA adds `magnitude` [out]: each output's weight vector is scaled to this norm (Liu et al. 2024, eq. 5). A leading axis
on every array gives each example of a batch its adapter, see `stack`.

LyCORIS (Yeh et al. 2024) has other adapters. Their changes of W [.., in, out] are:

    LoHa     down, up, down_2 [.., in, R], up_2 [R, out]            scale * (down up) * (down_2 up_2), by elements
    LoKr     w1 [c, a]   w2 [.., d, b]; in = c d, out = a b         scale * kron(w1, w2)
    GLoRA    down, up, gate_down [in, R], gate_up [R, in]           scale * (down up + gate_down gate_up W)
    full     diff [.., in, out]                                     scale * diff

Either factor of LoKr may be a product: w1 of `w1_down` [c, R] and `w1_up` [R, a], w2 of `w2_down` [.., d, R] and
`w2_up` [R, b]. LoHa and LoKr can be trained, GLoRA and full differences only merged.

Any of them may have a `magnitude`, which is [in, 1] if it scales the weights of each input (such a layer is only
merged), and `bias` [out], which is added to the layer's bias. A norm is adapted by `diff` and `bias` alone.

An adapter tree has the nesting of the parameters that it adapts, with the adapter of a layer where the parameters have
`kernel` and `bias`. The layers of `sdjax.models` find it in the Flax collection `lora`.
"""

from sdjax.lora.first import NEW, TARGETS, factors, init, targets
from sdjax.lora.formulas import (
    CHANGES,
    adaptable,
    adapted,
    changes,
    delta,
    dora_norm,
    form,
    kind,
    merge,
    merge_leaf,
    outputs,
    rank,
)
from sdjax.lora.several import add, join, map_layers, split, stack, stacked, with_dropout

__all__ = [
    "CHANGES",
    "NEW",
    "TARGETS",
    "adaptable",
    "adapted",
    "add",
    "changes",
    "delta",
    "dora_norm",
    "factors",
    "form",
    "init",
    "join",
    "kind",
    "map_layers",
    "merge",
    "merge_leaf",
    "outputs",
    "rank",
    "split",
    "stack",
    "stacked",
    "targets",
    "with_dropout",
]
