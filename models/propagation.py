"""Light graph convolution, the propagation that most of the recommenders share."""

from __future__ import annotations

from jaxtyping import Array, Float

from mgrad_jax.graph import SparseGraph, propagate


def lightgcn_layers(graph: SparseGraph, x: Float[Array, "nodes dim"], n_layers: int) -> Float[Array, "nodes dim"]:
    """Mean over layers 0..L of the propagated embeddings, `1 / (L + 1) sum_l A^l x` (He et al. 2020, LightGCN).

    Args:
        graph: A, (nodes, nodes), usually the symmetrically normalised user-item graph.
        x: layer 0, users first, then items.
        n_layers: L; 0 gives `x` back.
    """
    total = layer = x
    for _ in range(n_layers):
        layer = propagate(graph, layer)
        total = total + layer
    return total / (n_layers + 1)
