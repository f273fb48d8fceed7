"""Functions that are linear in each of several arguments: derivatives of any order, forwards and backwards.

`jax.custom_vjp` gives a function a fast backward pass and takes forward mode away, and with it Hessian-vector products.
A function that is linear in an argument needs no such bargain: its derivative in that argument is the function itself,
so all that has to be told is its transpose, in terms of functions of the same kind. That is a primitive of JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Arguments = Sequence[tuple[Array, ...]]
Others = Sequence[Any]  # the same where a cotangent is asked for, with None in the place of that argument


class Multilinear:
    """`f(arguments, structure, **static)`, linear in each of its arguments; arguments and result are tuples of arrays.

    Args:
        name: shown in equations.
        compute: the function. `structure` is a pytree of whole numbers, the static values are hashable.
        transposes: by the number of an argument, `transpose(results, arguments, structure, **static)`, which gives the
            tuple of that argument's cotangents; where it stands in `arguments` there is None.
        batch: the batching rule, by the signature of JAX; the default computes all members side by side, which leaves
            the gradient of a `vmap` (not the `vmap` of a gradient) to JAX's own derivatives.
        tangents: by the number of an argument, `tangent(moved, arguments, structure, **static)`, where the derivative
            along `moved` is not the function with `moved` in the argument's place. An argument with a rule here may
            be one in which the function is not linear, if nobody transposes in it.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[..., tuple[Array, ...]],
        transposes: Mapping[int, Callable[..., tuple[Array, ...]]],
        batch: Callable[..., Any] | None = None,
        tangents: Mapping[int, Callable[..., tuple[Array, ...]]] | None = None,
    ) -> None:
        self._compute, self._transposes, self._tangents = compute, transposes, tangents or {}
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        self._primitive.def_impl(jax.jit(self._run, static_argnames=("tree", "static")))
        self._primitive.def_abstract_eval(self._shapes)
        mlir.register_lowering(self._primitive, mlir.lower_fun(self._run, multiple_results=True))
        ad.primitive_jvps[self._primitive] = self._jvp
        ad.primitive_transposes[self._primitive] = self._transpose
        batching.primitive_batchers[self._primitive] = batch or self._side_by_side

    def __call__(self, arguments: Arguments, structure: Any, **static: Any) -> tuple[Array, ...]:
        """Apply the function."""
        operands, tree = jax.tree.flatten((tuple(arguments), structure))
        return tuple(self._primitive.bind(*operands, tree=tree, static=tuple(sorted(static.items()))))

    def _run(self, *operands: Array, tree: Any, static: tuple[Any, ...]) -> list[Array]:
        arguments, structure = jax.tree.unflatten(tree, operands)
        return list(self._compute(arguments, structure, **dict(static)))

    def _shapes(self, *operands: Any, tree: Any, static: tuple[Any, ...]) -> list[Any]:
        given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        results = jax.eval_shape(partial(self._run, tree=tree, static=static), *given)
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in results]

    def _jvp(self, primals: Any, tangents: Any, *, tree: Any, static: tuple[Any, ...]) -> tuple[Any, Any]:
        arguments, structure = jax.tree.unflatten(tree, primals)
        moved, _ = jax.tree.unflatten(tree, tangents)
        terms = []
        for number, zeros_or_tangents in enumerate(moved):
            if not all(type(t) is ad.Zero for t in zeros_or_tangents):
                along = tuple(ad.instantiate_zeros(t) for t in zeros_or_tangents)
                rule: Callable[..., Any] = self._tangents.get(number, partial(self._replaced, number))
                terms.append(rule(along, arguments, structure, **dict(static)))
        total = terms[0] if len(terms) == 1 else tuple(a + b for a, b in zip(*terms, strict=True))
        return list(self(arguments, structure, **dict(static))), list(total)

    def _replaced(self, number: int, moved: Any, arguments: Arguments, structure: Any, **static: Any) -> Any:
        return self((*arguments[:number], moved, *arguments[number + 1 :]), structure, **static)

    def _transpose(self, results: Any, *operands: Any, tree: Any, static: tuple[Any, ...]) -> list[Any]:
        arguments, structure = jax.tree.unflatten(tree, operands)
        is_asked = [any(ad.is_undefined_primal(x) for x in argument) for argument in arguments]
        number = is_asked.index(True)
        known = [None if asked else argument for asked, argument in zip(is_asked, arguments, strict=True)]
        pulls = self._transposes[number]([ad.instantiate_zeros(r) for r in results], known, structure, **dict(static))
        given = iter(pulls)
        cotangents = [
            [next(given) if asked else None for _ in argument]
            for asked, argument in zip(is_asked, arguments, strict=True)
        ]
        flat = [cotangent for argument in cotangents for cotangent in argument]
        return flat + [None] * (len(operands) - len(flat))

    def _side_by_side(self, operands: Any, axes: Any, *, tree: Any, static: tuple[Any, ...]) -> tuple[Any, Any]:
        results = jax.vmap(partial(self._run, tree=tree, static=static), in_axes=tuple(axes))(*operands)
        return results, [0] * len(results)
