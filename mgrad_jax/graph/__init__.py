"""Sparse graphs: built once on the host, passed to compiled functions as arguments, propagated with `propagate`."""

from mgrad_jax.graph.attention import edge_dot, edge_softmax
from mgrad_jax.graph.gather import gather_rows
from mgrad_jax.graph.items import blend_graphs, knn_graph, knn_indices
from mgrad_jax.graph.kernels import gpu_product
from mgrad_jax.graph.propagation import lightgcn_mean, propagate, propagate_bipartite, sum_of_layers
from mgrad_jax.graph.sparse import (
    SparseGraph,
    Transpose,
    replace_values,
    sparse_graph,
    with_transpose,
)
from mgrad_jax.graph.user_item import (
    BipartiteEdges,
    bipartite_edges,
    drop_entries,
    keep_edges,
    mean_bipartite,
    normalized_bipartite,
    prune_edges,
)
from mgrad_jax.graph.users import UserGraph, UserSample, mix_neighbours, nearest_users, sample_user_graph

__all__ = [
    "BipartiteEdges",
    "SparseGraph",
    "Transpose",
    "UserGraph",
    "UserSample",
    "bipartite_edges",
    "blend_graphs",
    "drop_entries",
    "edge_dot",
    "edge_softmax",
    "gather_rows",
    "gpu_product",
    "keep_edges",
    "knn_graph",
    "knn_indices",
    "lightgcn_mean",
    "mean_bipartite",
    "mix_neighbours",
    "nearest_users",
    "normalized_bipartite",
    "propagate",
    "propagate_bipartite",
    "prune_edges",
    "replace_values",
    "sample_user_graph",
    "sparse_graph",
    "sum_of_layers",
    "with_transpose",
]
