"""The user graph: exact against brute force, the fill-up's distribution, the cache, and the published file."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrad_jax.data import Interactions, demo_interactions, user_graph
from mgrad_jax.data.user_graph import build_user_graph, cache_directory, read_published_user_graph
from mgrad_jax.errors import UserError
from mgrad_jax.graph import UserGraph, mix_neighbours, nearest_users, sample_user_graph


def interactions(train: np.ndarray, n_users: int, n_items: int) -> Interactions:
    train = np.asarray(train, np.int32).reshape(-1, 2)
    return Interactions("made-up", n_users, n_items, train, train[:0], train[:0])


def random_interactions(seed: int, n_users: int = 60, n_items: int = 40, n: int = 300) -> Interactions:
    """Popular and unpopular items, repeated pairs, and users without training rows (the last two)."""
    rng = np.random.default_rng(seed)
    items = np.minimum(rng.exponential(n_items / 4, n).astype(int), n_items - 1)
    return interactions(np.stack([rng.integers(0, n_users - 2, n), items], axis=1), n_users, n_items)


def brute_force(data: Interactions, k: int) -> UserGraph:
    dense = np.zeros((data.n_users, data.n_items), int)
    dense[data.train[:, 0], data.train[:, 1]] = 1
    common = dense @ dense.T
    np.fill_diagonal(common, 0)
    neighbours, shared = np.zeros((2, data.n_users, k), np.int32)
    for user, counts in enumerate(common):
        best = [v for v in np.argsort(-counts, kind="stable") if counts[v] > 0][:k]
        neighbours[user, : len(best)], shared[user, : len(best)] = best, counts[best]
    return UserGraph(neighbours, shared)


def assert_same(a: UserGraph, b: UserGraph) -> None:
    np.testing.assert_array_equal(a.neighbours, b.neighbours)
    np.testing.assert_array_equal(a.shared, b.shared)


# The graph


@pytest.mark.parametrize("block", [1, 37, 1 << 18])
@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_brute_force_whatever_the_block(seed: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgrad_jax.graph.users._BLOCK", block)
    data = random_interactions(seed)
    assert_same(build_user_graph(data, k), brute_force(data, k))


def test_most_shared_come_first_and_equals_by_id() -> None:
    train = [(0, 0), (0, 1), (0, 1), (3, 0), (1, 0), (2, 0), (2, 1), (4, 5)]
    graph = build_user_graph(interactions(train, 6, 6), 2)
    np.testing.assert_array_equal(graph.neighbours[0], [2, 1])
    np.testing.assert_array_equal(graph.shared[0], [2, 1])
    np.testing.assert_array_equal(graph.shared[4:], 0)


@pytest.mark.parametrize("train", [[], [(2, 3)], [(0, 0), (1, 1), (2, 2)]])
def test_users_who_share_nothing_have_no_neighbours(train: list[tuple[int, int]]) -> None:
    # Below `build_user_graph`, for there is no dataset without training rows.
    graph = nearest_users(np.array(train, np.int64).reshape(-1, 2), 4, 4, 3)
    assert graph.neighbours.shape == graph.shared.shape == (4, 3)
    assert not graph.shared.any()


def test_k_below_one_is_a_user_error() -> None:
    with pytest.raises(UserError, match="k is 0"):
        build_user_graph(random_interactions(0), 0)


# An epoch's sample


def test_long_lists_stay_and_short_ones_repeat_their_own_members() -> None:
    graph = brute_force(random_interactions(0), 40)
    sample = sample_user_graph(jax.random.key(0), jax.tree.map(jnp.asarray, graph))
    for user, (neighbours, weights) in enumerate(zip(np.asarray(sample.neighbours), sample.weights, strict=True)):
        n = np.count_nonzero(graph.shared[user])
        own = dict(zip(graph.neighbours[user, :n].tolist(), graph.shared[user, :n].tolist(), strict=True))
        if not own:
            np.testing.assert_array_equal(weights, 0)
            continue
        np.testing.assert_array_equal(neighbours[:n], list(own))
        assert set(neighbours) == set(own)
        raw = np.exp([own[v] for v in neighbours])
        np.testing.assert_allclose(weights, raw / raw.sum(), rtol=1e-5)


def test_fill_up_is_a_polya_urn() -> None:
    """Two members and three draws: the first member gets 0 to 3 of them with equal probability (a coin: 1 3 3 1)."""
    n = 20_000
    graph = UserGraph(
        jnp.tile(jnp.asarray([[7, 9, 0, 0, 0]]), (n, 1)), jnp.tile(jnp.asarray([[1, 1, 0, 0, 0]]), (n, 1))
    )
    sample = sample_user_graph(jax.random.key(1), graph)
    repeats = np.sum(np.asarray(sample.neighbours)[:, 2:] == 7, axis=1)
    np.testing.assert_allclose(np.bincount(repeats, minlength=4) / n, 0.25, atol=0.015)
    np.testing.assert_allclose(sample.weights, 0.2, rtol=1e-6)


def test_large_counts_do_not_overflow() -> None:
    graph = UserGraph(jnp.asarray([[1, 2], [0, 0], [0, 0]]), jnp.asarray([[500, 1], [500, 0], [1, 0]]))
    weights = sample_user_graph(jax.random.key(0), graph).weights
    np.testing.assert_allclose(weights, [[1, 0], [0.5, 0.5], [0.5, 0.5]], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_mixing_equals_the_dense_product_in_value_and_gradient() -> None:
    data = random_interactions(2)
    graph = jax.tree.map(jnp.asarray, build_user_graph(data, 8))
    sample = sample_user_graph(jax.random.key(0), graph, jnp.float64)
    dense = (
        jnp.zeros((data.n_users, data.n_users))
        .at[jnp.arange(data.n_users)[:, None], sample.neighbours]
        .add(sample.weights)
    )
    x, users = jax.random.normal(jax.random.key(1), (data.n_users, 3)), jnp.asarray([4, 0, 4])
    np.testing.assert_allclose(mix_neighbours(sample, x), dense @ x, atol=1e-12)
    np.testing.assert_allclose(mix_neighbours(sample, x, users), (dense @ x)[users], atol=1e-12)
    for chosen, matrix in ((None, dense), (users, dense[users])):
        gradient = jax.jit(jax.grad(lambda x, chosen=chosen: jnp.sum(mix_neighbours(sample, x, chosen) ** 2)))(x)
        np.testing.assert_allclose(gradient, 2 * matrix.T @ (matrix @ x), atol=1e-12)


# The cache


def test_a_graph_is_stored_once_and_read_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_interactions(0)
    graph = build_user_graph(data, 5, cache=tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert file.name.startswith("user_graph-")
    monkeypatch.setattr(user_graph, "nearest_users", None)  # building again would fail
    assert_same(build_user_graph(data, 5, cache=tmp_path / "new"), graph)


def test_the_file_name_follows_interactions_and_k(tmp_path: Path) -> None:
    data = random_interactions(0)
    shuffled = dataclasses.replace(data, train=data.train[::-1])
    changed = dataclasses.replace(data, train=data.train[1:])
    larger = dataclasses.replace(data, n_users=data.n_users + 1)
    for n, (variant, k) in enumerate([(data, 5), (data, 6), (changed, 5), (larger, 5)], 1):
        assert_same(build_user_graph(variant, k, cache=tmp_path), brute_force(variant, k))
        assert len(list(tmp_path.iterdir())) == n
    build_user_graph(shuffled, 5, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == n


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other array", "out of range", "directory"])
def test_a_damaged_file_is_built_anew(damage: str, tmp_path: Path) -> None:
    data = random_interactions(0)
    graph = build_user_graph(data, 5, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 3] ^= 0xFF
        file.write_bytes(content)
    elif damage == "other array":
        np.savez(file, neighbours=graph.neighbours[:, :2], shared=graph.shared[:, :2])
    elif damage == "out of range":
        np.savez(file, neighbours=graph.neighbours + 1000, shared=graph.shared)
    else:
        file.unlink()
        file.mkdir()
        assert_same(build_user_graph(data, 5, cache=tmp_path, write=False), graph)
        return
    assert_same(build_user_graph(data, 5, cache=tmp_path, write=False), graph)
    assert_same(build_user_graph(data, 5, cache=tmp_path), graph)
    np.testing.assert_array_equal(np.load(file)["shared"], graph.shared)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_reading_only_writes_nothing(tmp_path: Path) -> None:
    build_user_graph(random_interactions(0), 5, cache=tmp_path / "absent", write=False)
    assert not (tmp_path / "absent").exists()


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file cannot hold the user graph .*; choose another cache directory"):
        build_user_graph(random_interactions(0), 5, cache=tmp_path / "file")


def test_the_cache_of_a_dataset_is_its_directory(tmp_path: Path) -> None:
    data = random_interactions(0)
    assert cache_directory(data) is None
    assert cache_directory(demo_interactions()) is None
    (tmp_path / "x.inter").touch()
    for source in (tmp_path, tmp_path / "x.inter"):
        assert cache_directory(dataclasses.replace(data, source=str(source))) == tmp_path


# The published file


def published(data: Interactions, file: Path, order: int = -1) -> dict[int, list[list[float]]]:
    """A file as the published preprocessing writes it, with equals by falling id."""
    graph = brute_force(data, data.n_users)
    lists = {}
    for user in range(data.n_users):
        n = np.count_nonzero(graph.shared[user])
        ids, counts = graph.neighbours[user, :n], graph.shared[user, :n]
        place = np.lexsort((order * ids, -counts))
        lists[user] = [ids[place].tolist(), counts[place].astype(float).tolist()]
    np.save(file, np.array(lists, dtype=object), allow_pickle=True)
    return lists


def test_published_order_among_equals_is_kept_and_cached(tmp_path: Path) -> None:
    data, file = random_interactions(0), tmp_path / "user_graph_dict.npy"
    lists = published(data, file)
    graph = read_published_user_graph(file, data, 4, cache=tmp_path / "cache")
    for user, (ids, counts) in lists.items():
        n = min(4, len(ids))
        np.testing.assert_array_equal(graph.neighbours[user, :n], ids[:4])
        np.testing.assert_array_equal(graph.shared[user, :n], counts[:4])
    assert_same(build_user_graph(data, 4, cache=tmp_path / "cache"), graph)
    assert not np.array_equal(graph.neighbours, build_user_graph(data, 4).neighbours)
    published(data, file, order=1)
    assert_same(read_published_user_graph(file, data, 4), build_user_graph(data, 4))


def test_a_published_file_of_other_interactions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "user_graph_dict.npy"
    published(random_interactions(0), file)
    with pytest.raises(UserError, match=r"the neighbours of user \d+ are not those of memory \(such users: \d+\)"):
        read_published_user_graph(file, random_interactions(1))


def test_a_published_file_with_a_wrong_member_is_refused(tmp_path: Path) -> None:
    data, file = random_interactions(0), tmp_path / "user_graph_dict.npy"
    lists = published(data, file)
    user = max(lists, key=lambda u: len(lists[u][0]))
    for wrong in (user, lists[user][0][1], data.n_users, -1):
        changed = {**lists, user: [[wrong, *lists[user][0][1:]], lists[user][1]]}
        np.save(file, np.array(changed, dtype=object), allow_pickle=True)
        with pytest.raises(UserError, match=f"the neighbours of user {user} are not those"):
            read_published_user_graph(file, data)


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("intruded",)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no array",
        {0: [["a"], [1.0]]},
        {0: 5},
        {"x": [[1], [1.0]]},
        [1, 2],
        Intruder(),
        {10**6: [[1], [1.0]]},
    ],
    ids=lambda content: "intruder" if isinstance(content, Intruder) else repr(content),
)
def test_a_published_file_that_is_none_is_a_user_error(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "user_graph_dict.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        array = np.empty((), object)
        array[()] = content
        np.save(file, array, allow_pickle=True)
    with pytest.raises(UserError, match=r"user_graph_dict\.npy .*; give a published user_graph_dict\.npy"):
        read_published_user_graph(file, random_interactions(0))
    assert not (tmp_path / "intruded").exists()


class Huge:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return np.ndarray, ((10**12,), "f8")


class HugeState:
    def __reduce__(self) -> tuple[object, ...]:
        state = (1, (10**12,), np.dtype("f8"), False, b"")
        return np.ndarray, (0,), state


def numbers_of_numpy(lists: dict[int, list[list[float]]]) -> dict[int, list[np.ndarray]]:
    return {user: [np.array(ids, np.int64), np.array(counts, np.float32)] for user, (ids, counts) in lists.items()}


def test_lists_may_be_arrays(tmp_path: Path) -> None:
    data, file = random_interactions(0), tmp_path / "user_graph_dict.npy"
    lists = published(data, file, order=1)
    np.save(file, np.array(numbers_of_numpy(lists), dtype=object), allow_pickle=True)
    assert_same(read_published_user_graph(file, data, 4), build_user_graph(data, 4))


@pytest.mark.parametrize(
    "content", [{0: Huge()}, {0: HugeState()}, {0: [np.ones(3, "c8"), [1]]}], ids=["call", "state", "type"]
)
def test_a_pickle_takes_no_more_memory_than_its_file(content: object, tmp_path: Path) -> None:
    file = tmp_path / "user_graph_dict.npy"
    np.save(file, np.array(content, dtype=object), allow_pickle=True)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read as a user graph"):
            read_published_user_graph(file, random_interactions(0))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("user", "entry", "reason"),
    [
        (-1, [[1], [1]], "names user -1 of 60"),
        (10**30, [[1], [1]], "names user 10+"),
        ("0", [[1], [1]], "names user '0'"),
        (0, [[1.7], [1]], "no whole number"),
        (0, [[10**30], [1]], "no whole number"),
        (0, [[1, 2], [1]], "holds no user"),
        (0, [1, 1], "holds no user"),
    ],
)
def test_an_entry_that_is_none_is_refused(tmp_path: Path, user: object, entry: object, reason: str) -> None:
    file = tmp_path / "user_graph_dict.npy"
    lists = published(random_interactions(0), file)
    np.save(file, np.array({**lists, user: entry}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=rf"{reason}.*; give a published user_graph_dict\.npy"):
        read_published_user_graph(file, random_interactions(0))


def test_k_beyond_any_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"k is 10000000000; for 60 users give at most"):
        build_user_graph(random_interactions(0), 10**10)


def test_graphs_can_be_pickled() -> None:
    graph = build_user_graph(random_interactions(0), 3)
    assert_same(pickle.loads(pickle.dumps(graph)), graph)
