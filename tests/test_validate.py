import ast
import functools
import inspect
import math
import pathlib
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from jax.experimental import sparse

import optaxclip
from optaxclip import _validate, norms, scopes, thresholds
from optaxclip.thresholds import fixed

GROWTH = thresholds.growth()
CLIP_STATE = optaxclip.clip_by_global_norm(1.0).init(np.ones(1))
RELATIVE = norms.relative_linf(0.1, 1e-7)
STEEP = fixed.scheduled(optax.linear_schedule(1.0, 0.1, 10))
# What each function of `_validate` refuses, and in which words.
REFUSALS = {
    "matrix_axes": [
        (
            ("w", 0, 2),
            {},
            TypeError,
            "axes must return (row axes, column axes), got 0 for the leaf 'w'; return two tuples "
            "such as ((0,), (1, 2))",
        ),
        (
            ("w", ((0,), (0, 1)), 2),
            {},
            ValueError,
            "axes must be different axes from 0 to 1, got ((0,), (0, 1)) for the leaf 'w'; count "
            "them from the front, without those of batch_axes",
        ),
    ],
    "bounds_elements": [
        (
            (norms.l2(), False),
            {},
            ValueError,
            "response=responses.clamp cuts elements, so the norm must be norms.linf(), got "
            "norms.l2(); pass norm=norms.linf(), scope=scopes.element(), or another response",
        )
    ],
    "zero_inside": [
        (
            ("low", 0.1, 1),
            {},
            ValueError,
            "low must be in [-inf, 0], got 0.1; pass a number inside, or limit weights in place of "
            "gradients with keep_params(clip_by_value(low, high)) as the last part of the chain",
        )
    ],
    "in_order": [
        ((1.0, 0.1), {}, ValueError, "low must be at most high, got 1.0 and 0.1; swap them")
    ],
    "parts": [
        (
            ("w", (3,), [("attention", 1.0, 0.5)]),
            {},
            TypeError,
            "parts must return (layer, head axis, exponent) for 'w', got ('attention', 1.0, 0.5); "
            'return one such as ("attention", 1, 0.5), or a list of these, each with a slice of '
            "the last axis as a fourth, or None",
        ),
        (
            ("w", (3,), [("attention", 1, 0.5)]),
            {},
            ValueError,
            "parts chose the head axis 1 for 'w' of shape (3,); return an axis that it has, or "
            "None to leave it alone",
        ),
    ],
    "has_heads": [
        (
            ({}, ["w"]),
            {},
            ValueError,
            "parts must name the query and key weights, got None for all of ['w']; pass "
            "parts=(path, leaf) -> (layer, head axis, exponent)",
        )
    ],
    "logits": [
        (
            (None, {"attn": [2]}),
            {},
            TypeError,
            "logits must be a dict with the largest logit of each head by layer, for ['attn'], "
            "got None; call update(updates, state, params, logits={layer: [heads]})",
        ),
        (
            ({"other": 1}, {"attn": [2]}),
            {},
            ValueError,
            "logits must have the layers ['attn'], got ['other']; add ['attn'], or pass parts that "
            "leave them alone",
        ),
        (
            ({"attn": np.ones(3)}, {"attn": [2]}),
            {},
            ValueError,
            "logits must be numbers by query head, got the shape (3,) for 'attn', whose "
            "weights have [2] heads; take the largest over batch, queries and keys",
        ),
    ],
    "one_source": [
        (
            (1,),
            {},
            ValueError,
            "sizes and measured are both given, got measured=int; "
            "pass the sizes, or the tree to measure",
        )
    ],
    "given_sizes": [
        (
            ({"a": 1.0}, ["a", "b"]),
            {},
            ValueError,
            "sizes must have one number for each of the groups ['a', 'b'], got ['a']; "
            "add or remove groups",
        ),
        (
            ("5", ["tree"]),
            {},
            TypeError,
            "sizes must be numbers, got '5'; pass a number, a dict by group or an array",
        ),
        (
            ({"a": 1j}, ["a"]),
            {},
            TypeError,
            "sizes must have a real number for each group, got 1j for 'a'; pass its norm",
        ),
        (
            (np.ones(3), ["a", "b"]),
            {},
            ValueError,
            "sizes must be one number for each of the 2 groups, got the shape (3,); "
            "telemetry.group_names has their order",
        ),
    ],
    "given_block": [
        (
            ("w", "5", (1, 3)),
            {},
            TypeError,
            "sizes must be arrays, got '5' at 'w'; pass a tree of numbers",
        ),
        (
            ("w", np.ones(4), (1, 3)),
            {},
            ValueError,
            "sizes must broadcast against the sizes of each leaf, got the shape (4,) for 'w', "
            "whose sizes have the shape (1, 3); keep the axes measured together with length 1",
        ),
    ],
    "units": [
        (
            ("w", (16, 1), ("x",)),
            {},
            ValueError,
            "scope must say what a unit of the leaf 'w' is, whose part here has the shape (16, 1): "
            "a length of 1 may be one device's share of a longer axis; "
            "pass scopes.unit(axes=...), such as axes=0",
        )
    ],
    "stack": [
        (
            ("tree", (2,), (4,)),
            {},
            ValueError,
            "batch_axes must give stacks of one length in the group 'tree', got (2,) and (4,); "
            "give each its own group, or return None for a leaf that is no stack",
        )
    ],
    "boundaries": [
        (
            (2.0, [1]),
            {},
            TypeError,
            "thresholds must be a list, got 2.0 (float); pass one such as [0.1, 1.0]",
        ),
        (
            ([1.0, 2.0], 1),
            {},
            TypeError,
            "boundaries must be a list, got 1 (int); pass one such as [1000]",
        ),
        (
            ([1.0, 2.0], []),
            {},
            ValueError,
            "boundaries must be one fewer than thresholds, got 0 for 2; "
            "pass the step at which each threshold but the first begins",
        ),
        (
            ([1.0, 2.0, 3.0], [2, 1]),
            {},
            ValueError,
            "boundaries must be in ascending order, got [2, 1]; "
            "sort them, and the thresholds with them",
        ),
    ],
    "only_with": [
        (
            ("n", 2.0, 1.0, 'mode="a"', False),
            {},
            ValueError,
            'n needs mode="a", got n=2.0 without it; leave it out',
        )
    ],
    "number": [
        (("c", -1.0), {}, ValueError, "c must be in [0, inf], got -1.0; pass a number inside"),
        (
            ("c", np.float32(-1)),
            {},
            ValueError,
            "c must be in [0, inf], got -1.0; pass a number inside",
        ),
        (
            ("c", jnp.array(-1.0)),
            {},
            ValueError,
            "c must be in [0, inf], got -1.0; pass a number inside",
        ),
        (("c", math.nan), {}, ValueError, "c must be in [0, inf], got nan; pass a number inside"),
        (
            ("c", jnp.array(jnp.nan)),
            {},
            ValueError,
            "c must be in [0, inf], got nan; pass a number inside",
        ),
        (
            ("c", 1.5),
            {"high": 1.0},
            ValueError,
            "c must be in [0, 1], got 1.5; pass a number inside",
        ),
        (
            ("c", 0.0),
            {"high": 1.0, "exclusive": True},
            ValueError,
            "c must be in (0, 1), got 0.0; pass a number inside",
        ),
        (
            ("c", 1.0),
            {"high": 1.0, "exclusive": True},
            ValueError,
            "c must be in (0, 1), got 1.0; pass a number inside",
        ),
        (
            ("c", "1.0"),
            {},
            TypeError,
            "c must be a real number, got '1.0' (str); pass a float such as 1.0",
        ),
        (
            ("c", "1.0"),
            {"others": ", or a schedule"},
            TypeError,
            "c must be a real number, got '1.0' (str); pass a float such as 1.0, or a schedule",
        ),
        (
            ("c", None),
            {},
            TypeError,
            "c must be a real number, got None (NoneType); pass a float such as 1.0; "
            'float("inf") as a threshold means no clipping',
        ),
        (
            ("c", None),
            {"low": -math.inf, "high": 0.0},
            TypeError,
            "c must be a real number, got None (NoneType); pass a float such as 1.0; "
            'float("-inf") as a threshold means no clipping',
        ),
        (
            ("c", None),
            {"low": 1.0},
            TypeError,
            "c must be a real number, got None (NoneType); pass a float such as 1.0",
        ),
        (
            ("c", jnp.bfloat16(0.999) * jnp.ones((), jnp.bfloat16)),
            {"high": 1.0, "exclusive": True},
            ValueError,
            "c must be in (0, 1), got 1.0; pass a number inside that bfloat16 has not rounded; "
            "with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32",
        ),
        (
            ("c", True),
            {},
            TypeError,
            "c must be a real number, got True (bool); pass a float such as 1.0",
        ),
        (
            ("c", np.True_),
            {},
            TypeError,
            "c must be a real number, got np.True_ (bool); pass a float such as 1.0",
        ),
        (
            ("c", np.array(True)),
            {},
            TypeError,
            "c must be a real number, got array(True) (ndarray); pass a float such as 1.0",
        ),
        (
            ("c", 1j),
            {},
            TypeError,
            "c must be a real number, got 1j (complex); pass a float such as 1.0",
        ),
        (
            ("c", np.array(1j)),
            {},
            TypeError,
            "c must be a real number, got array(0.+1.j) (ndarray); pass a float such as 1.0",
        ),
        (
            ("c", [1.0]),
            {},
            TypeError,
            "c must be a real number, got [1.0] (list); pass a float such as 1.0",
        ),
        (
            ("c", np.ones(2)),
            {},
            ValueError,
            "c must be one number, got an array of shape (2,); give groups limits of their own "
            "with a dict and scopes.group, "
            "or try several at once with jax.vmap",
        ),
    ],
    "returned": [
        (
            ("schedule", "a"),
            {},
            TypeError,
            "schedule must return a number for each step, got 'a'; pass a schedule such as "
            "optax.linear_schedule(1.0, 0.1, 1000), or a rule that was made, such as "
            "thresholds.ema(2.0)",
        ),
    ],
    "count": [
        (
            ("n", 1.0),
            {},
            TypeError,
            "n must be an integer, got 1.0 (float); pass a count such as 1",
        ),
        (
            ("n", True),
            {},
            TypeError,
            "n must be an integer, got True (bool); pass a count such as 1",
        ),
        (
            ("n", None),
            {"low": 5},
            TypeError,
            "n must be an integer, got None (NoneType); pass a count such as 5",
        ),
        (("n", 0), {}, ValueError, "n must be at least 1, got 0; pass a larger count"),
        (
            ("n", np.int64(-1)),
            {"low": 0},
            ValueError,
            "n must be at least 0, got -1; pass a larger count",
        ),
        (("n", 6), {"high": 5}, ValueError, "n must be at most 5, got 6; pass a smaller count"),
        (
            ("n", np.int64(1)),
            {"low": 0, "high": 0},
            ValueError,
            "n must be at most 0, got 1; pass a smaller count",
        ),
        (("n", 0), {"high": 5}, ValueError, "n must be at least 1, got 0; pass a larger count"),
        (
            ("n", 2.0),
            {"high": 5},
            TypeError,
            "n must be an integer, got 2.0 (float); pass a count such as 1",
        ),
        (
            ("n", 2.0),
            {"traced": True},
            TypeError,
            "n must be an integer, got 2.0 (float); pass a count such as 1",
        ),
        (
            ("n", np.array(True)),
            {"traced": True},
            TypeError,
            "n must be an integer, got array(True) (ndarray); pass a count such as 1",
        ),
        (
            ("n", np.array(2)),
            {},
            TypeError,
            (
                "n must be a Python value, got array(2); convert it, or with "
                'optax.inject_hyperparams pass static_args="n"'
            ),
        ),
        (
            ("n", np.ones(2)),
            {"traced": True},
            ValueError,
            "n must be one count, got an array of shape (2,); try several at once with jax.vmap",
        ),
        (
            ("n", jnp.array(0.5)),
            {"traced": True},
            ValueError,
            "n must be at least 1, got 0.5; pass a larger count",
        ),
        (
            ("n", np.array(np.nan)),
            {"traced": True},
            ValueError,
            "n must be at least 1, got nan; pass a larger count",
        ),
        (
            ("n", jnp.array(6)),
            {"high": 5, "traced": True},
            ValueError,
            "n must be at most 5, got 6; pass a smaller count",
        ),
    ],
    "option": [
        (
            ("o", "c", ("a", "b")),
            {},
            ValueError,
            "o must be one of 'a', 'b', got 'c'; choose one of these",
        )
    ],
    "part": [
        (
            ("p", 3, optaxclip.Norm, "norms.l2()"),
            {},
            TypeError,
            "p must be a Norm, got 3; pass one such as norms.l2()",
        )
    ],
    "transform": [
        (
            ("inner", value),
            {},
            TypeError,
            f"inner must be a GradientTransformation, got {value!r}; "
            "pass one such as optax.adam(1e-3), or anything with its init and update",
        )
        for value in (1.0, None, optax.adam, optax.MultiSteps)
    ],
    "function": [
        (("f", 3, "len"), {}, TypeError, "f must be a function, got 3; pass one such as len"),
        *[
            (
                ("f", function, "len"),
                {"takes": takes},
                TypeError,
                f"f must take {many}, got a function of {signature}; pass one such as len",
            )
            for function, takes, many, signature in [
                (lambda x, y: x, 1, "one argument", "(x, y)"),
                (lambda x, *, y: x, 1, "one argument", "(x, *, y)"),
                (lambda x, y=2: x, 3, "3 arguments", "(x, y=2)"),
                (len, 2, "2 arguments", "(obj, /)"),
            ]
        ],
    ],
    "rule": [
        (
            ("rule", 3),
            {},
            TypeError,
            "rule must be a Threshold, got 3; pass one such as thresholds.ema(2.0)",
        ),
        *[
            (
                ("rule", GROWTH._replace(**{name: lambda sizes, state: sizes})),
                {},
                TypeError,
                f"rule.{name} must take {many}, got a function of (sizes, state); pass one such as "
                f"lambda {arguments}: ...",
            )
            for name, many, arguments in [
                ("init", "one argument", "sizes"),
                ("limit", "3 arguments", "sizes, state, context"),
                ("learn", "4 arguments", "sizes, clipped_sizes, state, context"),
            ]
        ],
    ],
    "limits": [
        (
            (value, (2, 3)),
            {},
            error,
            f"limit must return numbers that broadcast against the sizes, (2, 3), but got {found}; "
            "return one for each size, or one for all",
        )
        for value, error, found in [
            (None, TypeError, "None"),
            ((1.0, 2.0), TypeError, "(1.0, 2.0)"),
            (np.ones(2), ValueError, "shape (2,)"),
            (np.ones((1, 2, 3)), ValueError, "shape (1, 2, 3)"),
        ]
    ],
    "response": [
        (
            (value, (2,)),
            {},
            TypeError,
            f"response must return a gradient of the same shape, (2,), but got {found}; return one "
            f"such as gradient * factor",
        )
        for value, found in [(None, "None"), (np.ones(1), "shape (1,)"), ([1.0, 2.0], "[1.0, 2.0]")]
    ],
    "state": [
        (
            (value, optaxclip.ClipState),
            {},
            TypeError,
            f"state must be the ClipState that init returned, got {found}; {advice}",
        )
        for advice, values in {
            (
                "pass the state of this very transform (a chain has a tuple of states, and "
                "is updated as a whole)"
            ): [
                ((CLIP_STATE, optax.EmptyState()), "tuple"),
                (((CLIP_STATE,), ()), "tuple"),
                (optax.ScaleByScheduleState(0), "ScaleByScheduleState"),
                (np.ones(1), "ndarray"),
            ],
            "restore with the state of init as the target, or start from init if the checkpoint "
            "has no such state "
            "(the order is update(updates, state, params))": [
                ((), "tuple"),
                (((), np.ones(1)), "tuple"),
                ([np.ones(1)], "list"),
                ({"step": 0}, "dict"),
                (optax.EmptyState(), "EmptyState"),
                (None, "NoneType"),
            ],
        }.items()
        for value, found in values
    ],
    "static": [
        (
            ("axes", value),
            {},
            TypeError,
            (
                f"axes must be a Python value, got {value!r}; convert it, or with "
                'optax.inject_hyperparams pass static_args="axes"'
            ),
        )
        for value in (np.array(0), jnp.array(0))
    ],
    "called": [
        (
            ("threshold", value),
            {},
            TypeError,
            f"threshold must be a threshold, got a function: {found} was not called; pass {advice}",
        )
        for value, found, advice in [
            (thresholds.ema, "thresholds.ema", "thresholds.ema()"),
            (thresholds.quantile, "thresholds.quantile", "thresholds.quantile(...)"),
            (
                functools.partial(thresholds.at_most, bound=1.0),
                "thresholds.at_most",
                "thresholds.at_most(...)",
            ),
            (optaxclip.per_example.quantile, "per_example.quantile", "per_example.quantile()"),
        ]
    ],
    "keywords": [
        (
            ("zclip", {"zz": 1}, ["z", "decay"]),
            {},
            TypeError,
            "zclip() got an unexpected keyword argument 'zz'; it takes z, decay",
        )
    ],
    "not_a_transform": [
        (
            ("opt_state", value),
            {},
            TypeError,
            f"opt_state must be a state, got the {found} that makes it; pass the state that init "
            f"or update returned",
        )
        for value, found in [
            (optax.sgd(1.0), "GradientTransformationExtraArgs"),
            (optax.GradientTransformation(len, len), "GradientTransformation"),
            (optax.MultiSteps(optax.sgd(1.0), 2), "MultiSteps"),
        ]
    ],
    "sparse": [
        (
            ("a/b", kind.fromdense(jnp.eye(2))),
            {},
            TypeError,
            f"updates must be a tree of dense arrays, got a {kind.__name__} at 'a/b'; pass its "
            f"todense(), "
            "or clip the data of its sum_duplicates()",
        )
        for kind in (sparse.BCOO, sparse.BCSR, sparse.CSR, sparse.CSC, sparse.COO)
    ],
    "group_name": [
        (
            ("a/b", ["a"]),
            {},
            TypeError,
            "name_of must return a name for 'a/b', got ['a']; return a string, or None to leave "
            "the leaf alone",
        )
    ],
    "axes_of": [
        (
            ("axes", axes, "a/b"),
            {},
            TypeError,
            f"axes must return axes for 'a/b', got {axes!r}; return an integer, several in a "
            f"tuple, or None",
        )
        for axes in ["0", 1.0, True, (0, "1"), {0}]
    ],
    "leaf": [
        (
            ("a/b", "text"),
            {},
            TypeError,
            "updates must be a tree of arrays, got 'text' at 'a/b'; take it out, or hide it with "
            "optax.masked",
        )
    ],
    "same_structure": [
        (
            ([1, 2], jax.tree.structure({"a": 1})),
            {},
            ValueError,
            "params has another structure than updates, got ['[0]', '[1]'] in params alone and "
            "[\"['a']\"] in updates alone; "
            "pass the params that these are updates of",
        )
    ],
    "names": [
        (
            (["a", "b", "c"], ["a"]),
            {},
            ValueError,
            "threshold has limits for ['b', 'c'], but the tree has only the groups ['a']; remove "
            "or rename them",
        ),
        (
            (["a"], ["a", "c", "b"]),
            {},
            ValueError,
            "threshold has no limit for the groups ['b', 'c']; add one for each, float('inf') for "
            "no limit",
        ),
        (
            (["a"], ["a", "tree"]),
            {},
            ValueError,
            "threshold has limits for ['a'], and only the groups ['tree'] (the leaves under no "
            "key) have none; add one for each, float('inf') for no limit",
        ),
    ],
    "weights": [
        (
            ("weights", np.ones(2), 3),
            {},
            ValueError,
            "weights must have shape (3,), got (2,); pass one for each example, such as the number "
            "of its samples",
        ),
        (
            ("weights", np.ones(3, bool), 3),
            {},
            TypeError,
            "weights must be real numbers, got bool; pass one for each example, such as the number "
            "of its samples, and a mask for what is no example",
        ),
        (
            ("weights", np.array([1.0, -1.0]), 2),
            {},
            ValueError,
            "weights must not be negative or NaN, got [ 1. -1.]; pass one for each example, such "
            "as the number of its samples",
        ),
    ],
    "center": [
        (
            (np.ones(2), {"a": np.ones(2)}),
            {},
            ValueError,
            "center must have the structure of the gradient, PyTreeDef({'a': *}), got "
            "PyTreeDef(*); pass a tree like the result, such as the last one",
        ),
        (
            ({"a": np.ones(3)}, {"a": np.ones(2)}),
            {},
            ValueError,
            "center has shape (3,) at ['a'], where the gradient has shape (2,); pass a tree like "
            "the result, such as the last one",
        ),
    ],
    "reduction": [
        (
            ("sum", True, None),
            {},
            ValueError,
            "reduce must be 'mean' or 'kept' with a center or iterate, got 'sum'; a center is "
            "added to a mean",
        ),
        (
            ("kept", False, len),
            {},
            ValueError,
            "reduce='kept' counts examples by group of whole leaves, got a finer scope; pass "
            "scopes.tree(), scopes.group() or scopes.leaf()",
        ),
    ],
    "sensitivity": [
        (
            ("reduce", False, "mean"),
            {},
            ValueError,
            "sensitivity() needs reduce='sum', got 'mean'; the divisor of a mean depends on who is "
            "in the batch",
        )
    ],
    "one_limit": [
        (
            ("threshold", "a/b", ["a/b"]),
            {},
            ValueError,
            "threshold has two limits for 'a/b', got it as a key with a slash and as nested keys; "
            "keep one",
        )
    ],
    "params_given": [
        (
            (None,),
            {},
            ValueError,
            "this threshold is relative to the parameters, got params=None; call update(updates, "
            "state, params)",
        ),
        (
            (None, "keep_params limits the weights after the step"),
            {},
            ValueError,
            "keep_params limits the weights after the step, got params=None; call update(updates, "
            "state, params)",
        ),
        (
            (None, 'of="ratio" needs the parameters'),
            {},
            ValueError,
            'of="ratio" needs the parameters, got params=None; call update(updates, state, params)',
        ),
    ],
    "parameter": [
        (
            ("a/b", np.ones(3), (2,)),
            {},
            ValueError,
            "params has shape (3,) at 'a/b', where updates has shape (2,); pass the params that "
            "these are updates of",
        ),
        (
            ("a", None, ()),
            {},
            ValueError,
            "params has nothing at 'a', where updates has shape (); pass the params that these are "
            "updates of",
        ),
        (
            ("a", optax.MaskedNode(), ()),
            {},
            ValueError,
            "params has nothing at 'a', where updates has shape (); pass the params that these are "
            "updates of",
        ),
    ],
    "same_groups": [
        (
            (["a", "c"], ["a", "b", "d"]),
            {},
            ValueError,
            "updates has 2 groups, but state was made for 3, got ['c'] only in updates and ['b', "
            "'d'] only in state; "
            "call init on a tree with the same leaves, or update(updates, state, params) if some "
            "gradients are None",
        ),
        (
            (["a", "b"], ("b", "a")),
            {},
            ValueError,
            "updates has 2 groups, but state was made for 2, got the same ones in another order; "
            "call init on a tree with the same leaves, or update(updates, state, params) if some "
            "gradients are None",
        ),
    ],
    "state_tree": [
        (
            (jax.tree.structure({"a": 1}), {"b": 1}),
            {},
            ValueError,
            "updates has another structure than the tree that state was made for, got "
            "PyTreeDef({'a': *}); "
            "call init on a tree with the same leaves, or update(updates, state, params) if some "
            "gradients are None",
        )
    ],
    "whole": [
        (
            ("sharded_over", (2, 3), ("x",)),
            {},
            ValueError,
            "sharded_over must be given for a scope finer than a leaf, where a leaf of shape (2, "
            "3) is split along ('x',), "
            "got None; pass those mapped axes along which the numbers that share a size are split, "
            "() for none, "
            "or a tree of such choices",
        )
    ],
    "not_split": [
        (
            ("a/b", ("x",)),
            {},
            ValueError,
            "updates has at 'a/b' a matrix that is split along ('x',), of which no device knows "
            "the singular values; "
            "clip under jit, or gather it first with jax.lax.all_gather",
        )
    ],
    "not_relative": [
        (
            ("threshold", thresholds.relative_to_params(0.1), "loss"),
            {},
            ValueError,
            (
                'threshold is relative to the parameters, got it with watch="loss"; pass '
                'watch="norm" or another rule'
            ),
        )
    ],
    "loss": [
        (
            (None,),
            {},
            ValueError,
            (
                'watch="loss" needs the loss, got none; call update(updates, '
                "state, params, value=loss)"
            ),
        ),
        (
            (np.ones(3),),
            {},
            ValueError,
            "value must be one number, got an array of shape (3,); pass the mean of the loss",
        ),
    ],
    "watched": [
        (
            ("threshold", {"norm": 1.0}, ("loss",)),
            {},
            ValueError,
            'threshold is a dict, got it with watch="loss"; pass watch="both", or one threshold',
        ),
        (
            ("threshold", {"norm": 1.0, "size": 2.0}, ("norm", "loss")),
            {},
            ValueError,
            "threshold must have the keys 'norm' and 'loss', got ['norm', 'size']; pass a "
            "threshold for each, float('inf') for no limit",
        ),
    ],
    "signed": [
        (
            ("threshold", thresholds.ema(2.0)),
            {},
            ValueError,
            "threshold must take a loss of either sign, got thresholds.ema(2.0), which needs "
            "positive sizes; pass a number, a schedule, thresholds.zscore(4.0), "
            "thresholds.window_zscore(6.0) or thresholds.quantile(0.99, 1000), or set signed=True "
            "if a rule of yours does",
        )
    ],
    "no_functions": [
        (
            ("threshold", {"a": len}),
            {},
            TypeError,
            f"threshold must be a number, got {{'a': {len!r}}}; "
            "a backward pass has neither steps nor memory, so pass a number such as schedule(step)",
        )
    ],
    "in_backward_pass": [
        (
            ("threshold", rule),
            {},
            TypeError,
            f"threshold must be a number or a rule such as thresholds.ranked(8), got {rule!r}; "
            "a backward pass has neither steps nor memory, so pass a number such as schedule(step)",
        )
        for rule in (thresholds.ema(), thresholds.relative_to_params(0.1), STEEP)
    ],
    "absolute": [
        (
            ("norm", RELATIVE),
            {},
            TypeError,
            f"norm must not be relative to parameters, got {RELATIVE!r}; pass one such as "
            f"norms.l2()",
        )
    ],
    "mapped": [
        (
            ("sharded_over", ("y",), ("x", "z")),
            {},
            ValueError,
            "sharded_over must name mapped axes, got ('y',) where ('x', 'z') are mapped; pass some "
            "of ('x', 'z'), "
            "or () if every device has the whole of each leaf",
        ),
        (
            ("sharded_over", ("y",), ()),
            {},
            ValueError,
            "sharded_over must name mapped axes, got ('y',) where none are mapped; call this in "
            "shard_map, pmap or vmap "
            "with this axis_name, or leave sharded_over out, which is right under jit",
        ),
    ],
    "tracked": [
        (
            ("sharded_over", None, ("x",)),
            {},
            ValueError,
            "sharded_over must be given where JAX does not track what differs between devices "
            "(pmap, or shard_map with "
            "check_vma=False), got None; pass those of ('x',) over which each leaf is sharded or, "
            "for gradients that "
            "pmean made equal on all devices, sharded_over=()",
        )
    ],
    "not_mapped": [
        (
            ("scope", ("x",)),
            {},
            ValueError,
            "scope must not be finer than a leaf in a shard_map or pmap over ('x',), got one that "
            "is; "
            "clip the examples under jit, or by leaves",
        )
    ],
    "one_run": [
        (
            ("opt_state", (3,)),
            {},
            ValueError,
            "opt_state must be of one run, got one that is vmapped over (3,); "
            "pass one of them with jax.tree.map(lambda x: x[0], opt_state)",
        )
    ],
    "same_on_all": [
        (
            ("value", ("x",)),
            {},
            ValueError,
            "value must be the same on all devices, got one that varies along ('x',); pass "
            "jax.lax.pmean of it",
        )
    ],
    "memoryless": [
        (
            ("threshold", thresholds.relative_to_params(0.1)),
            {},
            TypeError,
            "threshold must be the same for all groups, got a rule that uses the parameters; pass "
            "a number or a schedule",
        ),
        (
            ("threshold", thresholds.growth()),
            {},
            TypeError,
            "threshold must be the same for all groups, got a rule that learns; pass a number or a "
            "schedule",
        ),
    ],
    "without_memory": [
        (
            ("threshold", GROWTH),
            {},
            TypeError,
            f"threshold must not learn from single sizes, got {GROWTH!r}; pass a number, a "
            f"schedule, or a rule for batches "
            "such as per_example.quantile(0.5)",
        )
    ],
    "batch": [
        (
            ("batch", tree),
            {},
            ValueError,
            f"batch must be arrays whose first axis is that of the examples, got shapes {shapes}; "
            f"pass whole batches",
        )
        for tree, shapes in [
            ({}, "{}"),
            ([1.0, 2.0], "{'[0]': (), '[1]': ()}"),
            ([np.ones((2, 3)), 1.0], "{'[0]': (2, 3), '[1]': ()}"),
            ({"x": np.ones((2, 3)), "y": np.ones(3)}, """{"['x']": (2, 3), "['y']": (3,)}"""),
        ]
    ],
    "mask": [
        (
            ("mask", value, 2),
            {},
            ValueError,
            f"mask must be bool of shape (2,), got {found}; pass True for each example that is "
            f"there",
        )
        for value, found in [
            (np.ones(3, bool), "bool of shape (3,)"),
            (np.ones(2, np.int32), "int32 of shape (2,)"),
            (True, "bool of shape ()"),
        ]
    ],
    "divided": [
        (
            ("microbatch", 4, 6),
            {},
            ValueError,
            "microbatch must divide the batch, got 4 for 6 examples; pass another, or pad and mask "
            "the batch",
        )
    ],
    "not_both": [
        (
            ("limit", 1.0, "low", -1.0, "pass one"),
            {},
            TypeError,
            "limit and low are both given, got 1.0 and -1.0; pass one",
        )
    ],
    "real": [
        (
            (np.dtype("complex64"),),
            {},
            TypeError,
            "bounds that differ by sign need real updates, got complex64; "
            "cut complex numbers by magnitude with clip_by_value(limit)",
        )
    ],
    "scope_given": [
        (
            (None,),
            {},
            TypeError,
            "clip() needs a scope: scopes.tree() for the global norm, scopes.element() for values "
            "(optax.clip is optaxclip.clip_by_value)",
        )
    ],
    "renamed": [
        (
            ("clip", {"axis_name": "batch"}),
            {},
            TypeError,
            "clip() got axis_name='batch'; the argument is sharded_over: the mapped axes over "
            "which each leaf is sharded, or "
            "sharded_over=() for gradients that pmean made equal on all devices",
        )
    ],
}
ACCEPTED = {
    "weights": [(("weights", [1, 2, 0], 3), {})],
    "center": [(({"a": np.ones(2), "n": 0}, {"a": np.ones(2), "n": np.ones(3, int)}), {})],
    "sensitivity": [(("norm", True, None), {})],
    "reduction": [(("sum", False, len), {}), (("kept", True, None), {})],
    "one_limit": [(("threshold", "a/b", ["a"]), {})],
    "zero_inside": [(("low", -1.0, 1), {}), (("high", 0.0, -1), {})],
    "in_order": [((0.1, 0.1), {}), ((0.1, optax.constant_schedule(0.0)), {})],
    "parts": [
        (("w", (3, 2), [("attention", -2, "key", slice(1))]), {}),
        (("w", (3,), []), {}),
    ],
    "has_heads": [(({"attn": [2]}, ["w"]), {})],
    "logits": [(({"attn": np.ones(4), "other": 1}, {"attn": [2, 4]}), {})],
    "one_source": [((None,), {})],
    "given_sizes": [
        ((5.0, ["tree"]), {}),
        ((5.0, []), {}),
        (([5.0, 1], ["a", "b"]), {}),
        (({"a": 1, "b": 2.0}, ["b", "a"]), {}),
    ],
    "given_block": [(("w", np.ones((1, 3)), (1, 3)), {}), (("w", 2.0, (1, 3)), {})],
    "units": [(("w", (16, 1), ()), {})],
    "stack": [(("tree", (2,), (2,)), {})],
    "boundaries": [(([1.0, 2.0], [3]), {}), (([1.0], []), {}), (([1.0] * 3, [2, 2]), {})],
    "only_with": [(("n", 1.0, 1.0, "x", False), {}), (("n", 2.0, 1.0, "x", True), {})],
    "number": [
        (("c", x), {})
        for x in (0, 1.0, math.inf, np.float32(1), np.int64(1), np.array(1), jnp.array(1.0))
    ],
    "returned": [(("s", x), {}) for x in (1, 1.0, np.float32(1), np.ones(()), jnp.ones(()))],
    "count": [
        (("n", 1), {}),
        (("n", np.int32(1)), {}),
        (("n", 0), {"low": 0}),
        (("n", 5), {"high": 5}),
        (("n", 1), {"high": 5}),
        *[
            (("n", x), {"high": 5, "traced": True})
            for x in (1, np.int32(1), np.array(1), jnp.array(2.5), np.array(5))
        ],
    ],
    "option": [(("o", "a", ("a", "b")), {})],
    "part": [(("p", norms.l2(), optaxclip.Norm, ""), {})],
    "transform": [
        (("inner", x), {}) for x in (optax.adam(1.0), optax.MultiSteps(optax.adam(1.0), 2))
    ],
    "function": [
        (("f", len, ""), {}),
        *[
            (("f", function, ""), {"takes": 2})
            for function in (lambda x, y: x, lambda x, y=1, z=2: x, lambda *xs: xs, min)
        ],
    ],
    "rule": [(("rule", GROWTH), {}), (("rule", fixed.constant(1.0)), {})],
    "limits": [
        ((x, (2, 3)), {})
        for x in (1, 1.0, np.float32(1), np.ones(3), jnp.ones((1, 3)), jnp.ones((2, 3)))
    ],
    "response": [((np.ones(2), (2,)), {}), ((1.0, ()), {}), ((jnp.ones(()), ()), {})],
    "state": [
        ((optax.EmptyState(), optax.EmptyState), {}),
        ((CLIP_STATE, optaxclip.ClipState), {}),
    ],
    "static": [(("axes", x), {}) for x in (0, None, (0, 1), len, np.int64(1))],
    "called": [
        (("threshold", x), {})
        for x in (1.0, None, GROWTH, optax.constant_schedule(1.0), lambda step: 1.0, len)
    ],
    "keywords": [(("zclip", {"z": 1}, ["z", "decay"]), {}), (("zclip", {}, []), {})],
    "not_a_transform": [
        (("opt_state", x), {}) for x in (CLIP_STATE, {}, None, {"tx": optax.sgd(1.0)})
    ],
    "sparse": [(("a", x), {}) for x in (1.0, None, np.ones(2), jnp.ones(2))],
    "group_name": [(("a/b", name), {}) for name in ("a", None, 3, ("a", 1))],
    "axes_of": [
        (("axes", axes, "a/b"), {}) for axes in (0, -1, np.int64(1), (), (0, 1), [0], range(2))
    ],
    "leaf": [
        (("a", x), {})
        for x in (1, 1.0, 1j, True, np.float32(1), jnp.ones(2), np.ones(2), jax.random.key(0))
    ],
    "same_structure": [(({"a": [1, 2]}, jax.tree.structure({"a": 1})), {})],
    "names": [((["b", "a"], ["a", "b", "a"]), {}), (([], []), {})],
    "params_given": [((np.ones(2),), {}), (([],), {}), ((1.0, "reason"), {}), (([], "reason"), {})],
    "parameter": [(("a", np.ones((2, 3)), (2, 3)), {}), (("a", 1.0, ()), {})],
    "same_groups": [((["a", "b"], ("a", "b")), {}), ((["a"], None), {})],
    "state_tree": [((jax.tree.structure({"a": 1}), {"a": [1, 2]}), {})],
    "whole": [(("sharded_over", (2, 3), ()), {})],
    "not_split": [(("a", ()), {})],
    "not_relative": [(("threshold", fixed.constant(1.0), "loss"), {})],
    "loss": [((1.0,), {}), ((np.float32(-1), "both"), {})],
    "watched": [(("threshold", {"loss": 1.0, "norm": 1.0}, ("norm", "loss")), {})],
    "signed": [(("threshold", thresholds.zscore()), {}), (("t", fixed.constant(1.0)), {})],
    "no_functions": [(("threshold", {"a": 1.0, "b": np.float32(2)}), {})],
    "in_backward_pass": [(("threshold", thresholds.ranked(2)), {})],
    "absolute": [(("norm", norms.l2()), {})],
    "mapped": [(("sharded_over", (), ("x",)), {}), (("sharded_over", (), ()), {})],
    "tracked": [(("sharded_over", (), ("x",)), {}), (("sharded_over", ("x",), ("x",)), {})],
    "not_mapped": [(("scope", ()), {})],
    "one_run": [(("opt_state", ()), {})],
    "same_on_all": [(("value", ()), {}), (("value", None), {})],
    "memoryless": [(("threshold", fixed.constant(1.0)), {})],
    "without_memory": [
        (("threshold", fixed.constant(1.0)), {}),
        (("threshold", thresholds.relative_to_params(0.1)), {}),
    ],
    "batch": [(("batch", {"x": np.ones((4, 3)), "y": jnp.ones(4), "none": None}), {})],
    "mask": [(("mask", np.ones(2, bool), 2), {}), (("mask", jnp.zeros(0, bool), 0), {})],
    "divided": [(("microbatch", 3, 6), {})],
    "not_both": [(("a", -1.0, "b", None, "c"), {}), (("a", None, "b", -1.0, "c"), {})],
    "real": [((np.dtype("float16"),), {})],
    "scope_given": [((scopes.tree(),), {})],
    "bounds_elements": [((norms.l2(), True), {})],
    "matrix_axes": [(("w", ((0,), (1, 2)), 3), {}), (("b", ((), (0,)), 1), {})],
    "renamed": [(("clip", {"sharded_over": "x"}), {})],
}
RETURNED = {"batch": 4, "divided": 2, "same_structure": [[1, 2]]}  # by all others, nothing
SOURCE = pathlib.Path(optaxclip.__file__).parent


def exactly(words):
    return f"^{re.escape(words)}$"


@pytest.mark.parametrize(
    "name, args, options, error, words",
    [(name, *one) for name, all in REFUSALS.items() for one in all],
)
def test_refusals_say_what_it_was_and_what_to_do(name, args, options, error, words):
    with pytest.raises(error, match=exactly(words)):
        getattr(_validate, name)(*args, **options)


@pytest.mark.parametrize(
    "name, args, options", [(name, *one) for name, all in ACCEPTED.items() for one in all]
)
def test_what_is_right_is_accepted(name, args, options):
    assert getattr(_validate, name)(*args, **options) == RETURNED.get(name)


def test_a_traced_number_passes_unless_its_type_or_shape_is_wrong():
    jax.jit(lambda x: _validate.number("c", x))(-1.0)
    with pytest.raises(
        ValueError, match=r"^c must be one number, got an array of shape \(2,\); give groups"
    ):
        jax.jit(lambda x: _validate.number("c", x))(np.ones(2))
    for wrong in 1j, True:
        with pytest.raises(TypeError, match="^c must be a real number, got "):
            jax.jit(lambda x: _validate.number("c", x))(wrong)


KEYWORDS = {
    "clip": lambda **o: optaxclip.clip(1.0, scopes.tree(), **o),
    "clip_by_global_norm": lambda **o: optaxclip.clip_by_global_norm(1.0, **o),
    "spectral_clip": lambda **o: optaxclip.spectral_clip(1.0, **o),
    "clip_cotangent": lambda **o: optaxclip.clip_cotangent(1.0, 1.0, **o),
    "skip_nonfinite": lambda **o: optaxclip.skip_nonfinite(optax.sgd(1.0), **o),
    "skip_spikes": lambda **o: optaxclip.skip_spikes(optax.sgd(1.0), 1.0, **o),
    "monitor": lambda **o: optaxclip.telemetry.monitor(**o),
    "aggregate": lambda **o: optaxclip.per_example.aggregate(1.0, **o),
    "clipped_grad": lambda **o: optaxclip.per_example.clipped_grad(lambda p, x: p, 1.0, **o),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_axis_name_is_refused_by_every_function_that_has_sharded_over(name):
    with pytest.raises(
        TypeError, match=r"\(\) got axis_name='batch'; the argument is sharded_over: "
    ):
        KEYWORDS[name](axis_name="batch")


def test_a_scope_has_to_be_chosen():
    with pytest.raises(
        TypeError,
        match=(
            r"^clip\(\) needs a scope: scopes.tree\(\) for the global norm, "
            r"scopes.element\(\) for"
        ),
    ):
        optaxclip.clip(1.0)


# Construction: each argument of each row

THRESHOLDS = {
    "threshold": [
        lambda value: optaxclip.clip(value, scopes.tree()),
        fixed.constant,
        fixed.as_threshold,
        fixed.as_thresholds,
        lambda value: thresholds.at_most(value, 1.0),
        lambda value: thresholds.at_least(value, 1.0),
    ],
    "bound": [
        lambda value: thresholds.at_most(1.0, value),
        lambda value: thresholds.at_least(1.0, value),
    ],
    "thresholds[0]": [lambda value: thresholds.join([value, 1.0], [1])],
    "thresholds[1]": [lambda value: thresholds.join([1.0, value], [1])],
    "limit": [optaxclip.clip_by_value],
    "high": [
        lambda value: optaxclip.clip_by_value(low=-1.0, high=value).init(jnp.ones(1)),
    ],
    "max_norm": [optaxclip.clip_by_norm, optaxclip.clip_by_global_norm],
    "max_rms": [optaxclip.clip_by_block_rms],
    "ratio": [optaxclip.adaptive_grad_clip, thresholds.relative_to_params],
    "floor": [
        lambda value: optaxclip.adaptive_grad_clip(floor=value),
        lambda value: thresholds.relative_to_params(0.1, floor=value),
    ],
    "threshold['a']": [
        lambda value: optaxclip.clip({"a": value, "b": 1.0}, scopes.tree()),
        lambda value: fixed.as_thresholds({"a": value}),
    ],
    "max_norm['a']": [
        lambda value: optaxclip.clip_by_norm({"a": value}),
        lambda value: optaxclip.clip_by_global_norm({"a": value}),
    ],
    "limit['a']": [lambda value: optaxclip.clip_by_value({"a": value})],
    "max_rms['a']": [lambda value: optaxclip.clip_by_block_rms({"a": value})],
}
BAD_NUMBERS = [
    (-0.5, ValueError, r"must be in \[0, inf\], got -0\.5; pass a number inside"),
    (-math.inf, ValueError, r"must be in \[0, inf\], got -inf; pass a number inside"),
    (math.nan, ValueError, r"must be in \[0, inf\], got nan; pass a number inside"),
    (
        np.ones(2),
        ValueError,
        (
            r"must be one number, got an array of shape \(2,\); give groups limits of "
            "their own with a dict"
        ),
    ),
    ("1.0", TypeError, r"must be a real number, got '1\.0' \(str\); pass a float such as 1\.0"),
    (
        None,
        TypeError,
        (
            r"must be a real number, got None \(NoneType\); pass a float .*; float\(.inf.\) "
            "as a threshold means"
        ),
    ),
    (True, TypeError, r"must be a real number, got True \(bool\); pass a float such as 1\.0"),
    (1j, TypeError, r"must be a real number, got 1j \(complex\); pass a float such as 1\.0"),
    ([1.0], TypeError, r"must be a real number, got \[1\.0\] \(list\); pass a float such as 1\.0"),
]


@pytest.mark.parametrize(
    "value, error, words", BAD_NUMBERS, ids=[str(value) for value, *_ in BAD_NUMBERS]
)
@pytest.mark.parametrize("name, makers", THRESHOLDS.items(), ids=list(THRESHOLDS))
def test_every_limit_is_checked_when_it_is_made(name, makers, value, error, words):
    for make in makers:
        with pytest.raises(error, match=f"^{re.escape(name)} {words}"):
            make(value)


def test_both_bounds_are_checked():
    weights = "or limit weights in place of gradients with keep_params(clip_by_value(low, high))"
    for low, words, advice in (
        (0.5, "got 0.5", f"pass a number inside, {weights} as the last part of the chain"),
        (math.nan, "got nan", "pass a number inside"),
        (math.inf, "got inf", "pass a number inside"),
    ):
        for make in (
            (lambda low: optaxclip.clip_by_value(low, 1.0)),
            (lambda low: optaxclip.clip_by_value(low=low, high=1.0)),
        ):
            with pytest.raises(
                ValueError, match=exactly(f"low must be in [-inf, 0], {words}; {advice}")
            ):
                make(low).init(jnp.ones(3))
    with pytest.raises(TypeError, match="^low must be a real number, got '-1' "):
        optaxclip.clip_by_value("-1", 1.0)
    with pytest.raises(TypeError, match="^low must be a real number, got None "):
        optaxclip.clip_by_value(high=1.0)
    with pytest.raises(TypeError, match="^high must be a real number, got None "):
        optaxclip.clip_by_value(low=-1.0)
    with pytest.raises(TypeError, match="^limit must be a real number, got None "):
        optaxclip.clip_by_value()


@pytest.mark.parametrize("returned", ["a", None, [1.0], fixed.constant(1.0)])
def test_a_schedule_returns_numbers(returned):
    clip = optaxclip.clip(lambda step: returned, scopes.tree())
    state = clip.init(jnp.ones(3))
    words = (
        f"schedule must return a number for each step, got {returned!r}; pass a schedule such as "
    )
    with pytest.raises(TypeError, match="^" + re.escape(words)):
        clip.update(jnp.ones(3), state)
    with pytest.raises(TypeError, match="^" + re.escape(words)):
        jax.jit(clip.update)(jnp.ones(3), state)


def test_three_bounds_are_one_too_many():
    with pytest.raises(TypeError, match="limit"):
        optaxclip.clip_by_value(1.0, 2.0, low=-1.0)
    with pytest.raises(TypeError, match="limit and low are both given, got 1.0 and -1.0"):
        optaxclip.clip_by_value(1.0, low=-1.0)
    with pytest.raises(TypeError, match="^high must be a real number, got None "):
        optaxclip.clip_by_value(low=-1.0)


def test_agc_takes_axes_or_a_scope():
    with pytest.raises(
        TypeError,
        match="^axes and scope are both given, got 0 and scopes.leaf.*; pass scope=scopes.unit",
    ):
        optaxclip.adaptive_grad_clip(0.1, axes=0, scope=optaxclip.scopes.leaf())


def test_bounds_that_differ_by_sign_refuse_complex_updates():
    for grads in jnp.array([1j]), {"a": jnp.ones(2), "b": jnp.array([1j])}:
        with pytest.raises(
            TypeError,
            match=(
                "^bounds that differ by sign need real updates, got complex64; cut complex numbers"
            ),
        ):
            optaxclip.clip_by_value(-1.0, 1.0).init(grads)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (
            lambda: optaxclip.clip(1.0, scope="tree"),
            TypeError,
            "scope must be a Scope, got 'tree'; pass one such as scopes.tree()",
        ),
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), norm=2),
            TypeError,
            "norm must be a Norm, got 2; pass one such as norms.l2()",
        ),
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), response="clamp"),
            TypeError,
            "response must be a function, got 'clamp'; pass one such as responses.rescale",
        ),
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), nonfinite="skip"),
            ValueError,
            "nonfinite must be one of 'propagate', 'zero', 'raise', got 'skip'; choose one of "
            "these",
        ),
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), record="no"),
            ValueError,
            "record must be one of True, False, 'full', got 'no'; choose one of these",
        ),
        (lambda: norms.lp(0.5), ValueError, "p must be in [1, inf], got 0.5; pass a number inside"),
        (
            lambda: norms.lp(math.nan),
            ValueError,
            "p must be in [1, inf], got nan; pass a number inside",
        ),
        (
            lambda: norms.lp("2"),
            TypeError,
            "p must be a real number, got '2' (str); pass a float such as 1.0",
        ),
        (
            lambda: scopes.group("encoder"),
            TypeError,
            "name_of must be a function, got 'encoder'; pass one such as lambda path: "
            'path.split("/")[0]',
        ),
        (
            lambda: fixed.scheduled(1.0),
            TypeError,
            "schedule must be a function, got 1.0; pass one such as optax.linear_schedule(1.0, "
            "0.1, 1000)",
        ),
        (
            lambda: thresholds.join([1.0, 1.0], [1.5]),
            TypeError,
            "boundaries[0] must be an integer, got 1.5 (float); pass a count such as 1",
        ),
        (
            lambda: thresholds.join([1.0, 1.0], [True]),
            TypeError,
            "boundaries[0] must be an integer, got True (bool); pass a count such as 1",
        ),
        (
            lambda: thresholds.join([1.0, 1.0], [-1]),
            ValueError,
            "boundaries[0] must be at least 0, got -1; pass a larger count",
        ),
    ],
)
def test_every_other_argument_is_checked_when_it_is_made(make, error, words):
    with pytest.raises(error, match=exactly(words)):
        make()


def test_parts_that_were_not_called_are_refused():
    for name, part, example in (
        ("scope", scopes.tree, "scopes.tree()"),
        ("norm", norms.l2, "norms.l2()"),
    ):
        with pytest.raises(
            TypeError,
            match=(
                f"^{name} must be a {name.title()}, got <function .*>; pass one such as "
                f"{re.escape(example)}$"
            ),
        ):
            optaxclip.clip(1.0, **{"scope": scopes.tree(), name: part})


@pytest.mark.parametrize("axes", ["0", 1.5, True, (0, 1.5), (True,), {0}])
@pytest.mark.parametrize(
    "name, make", [("axes", scopes.unit), ("batch_axes", scopes.unit), ("batch_axes", scopes.leaf)]
)
def test_axes_are_checked_when_they_are_given(name, make, axes):
    words = (
        f"{name} must be axes or a function (path, leaf) -> axes, got {axes!r}; "
        "pass one such as (0, 1)"
    )
    with pytest.raises(TypeError, match=exactly(words)):
        make(**{name: axes})


def test_rows_check_the_keywords_of_clip():
    makers = [
        optaxclip.clip_by_norm,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_block_rms,
        optaxclip.adaptive_grad_clip,
    ]
    for make in [
        *makers,
        optaxclip.clip_by_value,
        lambda c, **options: optaxclip.clip_by_value(-c, c, **options),
    ]:
        for option, value, error in (
            ("nonfinite", "x", ValueError),
            ("response", 3, TypeError),
            ("scope", 3, TypeError),
        ):
            with pytest.raises(error, match=f"^{option} must be .*got '?{value}'?; "):
                make(1.0, **{option: value})
        with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
            make(1.0, treshold=2.0)


@pytest.mark.parametrize(
    "name", [name for name, value in vars(thresholds).items() if inspect.isfunction(value)]
)
def test_a_rule_that_was_not_called_is_refused_at_once(name):
    rule, words = (
        getattr(thresholds, name),
        rf"thresholds\.{name} was not called; pass thresholds\.{name}\(",
    )
    for argument, make in [
        ("threshold", lambda: optaxclip.clip(rule, scopes.tree())),
        ("threshold['a']", lambda: optaxclip.clip({"a": rule}, scopes.tree())),
        ("max_norm", lambda: optaxclip.clip_by_norm(rule)),
        ("bound", lambda: thresholds.at_most(1.0, rule)),
        ("low", lambda: optaxclip.clip_by_value(rule, 1.0)),
        ("threshold", lambda: optaxclip.skip_spikes(optax.sgd(1.0), rule)),
        ("schedule", lambda: fixed.scheduled(rule)),
    ]:
        with pytest.raises(
            TypeError, match=rf"^{re.escape(argument)} must be a threshold, got a function: {words}"
        ):
            make()


ROWS = [
    name
    for name in dir(optaxclip)
    if getattr(getattr(optaxclip, name), "__module__", None) == "optaxclip.methods"
]


@pytest.mark.parametrize("name", ["clip", *ROWS])
def test_none_as_a_threshold_is_told_how_to_switch_clipping_off(name):
    make = getattr(optaxclip, name)
    first = next(iter(inspect.signature(make).parameters))
    with pytest.raises(
        TypeError,
        match=(
            rf"^{first} must be .*, got None .*float\(\"inf\"\) as a "
            "threshold means no clipping$"
        ),
    ):
        make(**{first: None} | ({"scope": scopes.tree()} if name == "clip" else {}))


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_keyword_is_refused_in_the_name_of_the_row(name):
    make = getattr(optaxclip, name)
    given = {
        p.name: 1.0 for p in inspect.signature(make).parameters.values() if p.default is p.empty
    }
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'clipping'"
    ):
        make(**given, clipping=0.1)


# On update

GRADS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    "make",
    [
        optaxclip.adaptive_grad_clip,
        lambda: optaxclip.clip(
            thresholds.at_most(thresholds.relative_to_params(0.1), 1.0), scopes.tree()
        ),
    ],
)
@pytest.mark.parametrize(
    "params, words",
    [
        (
            None,
            "this threshold is relative to the parameters, got params=None; call update(updates, "
            "state, params)",
        ),
        (
            {**GRADS, "b": None},
            "params has nothing at 'b', where updates has shape (3,); pass the params that these "
            "are updates of",
        ),
        (
            {**GRADS, "b": optax.MaskedNode()},
            "params has nothing at 'b', where updates has shape (3,); pass the params that these "
            "are updates of",
        ),
        (
            {**GRADS, "a": jnp.ones((3, 2))},
            "params has shape (3, 2) at 'a', where updates has shape (2, 3); pass the params that "
            "these are updates of",
        ),
    ],
)
def test_parameters_are_checked_when_a_limit_needs_them(make, params, words):
    clip = make()
    with pytest.raises(ValueError, match=exactly(words)):
        clip.update(GRADS, clip.init(GRADS), params)


@pytest.mark.parametrize(
    "params, found",
    [
        ({"a": jnp.ones((2, 3))}, """[] in params alone and ["['b']"] in updates alone"""),
        ({**GRADS, "c": jnp.ones(1)}, """["['c']"] in params alone and [] in updates alone"""),
        ([1, 2], """['[0]', '[1]'] in params alone and ["['a']", "['b']"] in updates alone"""),
    ],
)
def test_parameters_have_the_structure_of_the_updates(params, found):
    clip = optaxclip.adaptive_grad_clip()
    words = (
        f"params has another structure than updates, got {found}; pass the params that "
        "these are updates of"
    )
    with pytest.raises(ValueError, match=exactly(words)):
        clip.update(GRADS, clip.init(GRADS), params)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), response=lambda gradient, size: gradient),
            "response must take 3 arguments, got",
        ),
        (
            lambda: optaxclip.clip(1.0, scopes.tree(), response=lambda gradient, size, limit: None),
            "response must return a gradient",
        ),
        (
            lambda: optaxclip.clip(
                1.0, scopes.tree(), response=lambda gradient, size, limit: gradient[:1]
            ),
            "response must return a gradient",
        ),
        (
            lambda: optaxclip.clip(lambda: 1.0, scopes.tree()),
            "schedule must take one argument, got",
        ),
        (
            lambda: optaxclip.clip(lambda step: jnp.ones(3), scopes.tree()),
            "limit must return numbers that broadcast against the sizes, (1,)",
        ),
        (
            lambda: optaxclip.clip_by_value(lambda step: "a", 1.0),
            "schedule must return a number for each step, got 'a'",
        ),
        (
            lambda: optaxclip.clip(GROWTH._replace(init=lambda: 1.0), scopes.tree()),
            "threshold.init must take one argument, got",
        ),
        (
            lambda: optaxclip.clip({"tree": GROWTH._replace(limit=len)}, scopes.tree()),
            "threshold['tree'].limit must take 3 arguments",
        ),
        (
            lambda: optaxclip.clip(GROWTH._replace(limit=lambda *seen: None), scopes.tree()),
            "limit must return numbers that broadcast",
        ),
        (
            lambda: optaxclip.clip(
                {"tree": GROWTH._replace(limit=lambda *seen: None)}, scopes.tree()
            ),
            "limit must return numbers that broadcast",
        ),
        (
            lambda: optaxclip.clip(1.0, scope=scopes.group(lambda path, leaf: path)),
            "name_of must take one argument, got",
        ),
        (
            lambda: optaxclip.clip(1.0, scope=scopes.group(lambda path: [path])),
            "name_of must return a name for 'a', got ['a']",
        ),
        (
            lambda: optaxclip.clip(1.0, scope=scopes.unit(lambda path: 0)),
            "axes must take 2 arguments, got a function of (path)",
        ),
        (
            lambda: optaxclip.clip(1.0, scope=scopes.unit(lambda path, leaf: "a")),
            "axes must return axes for 'a', got 'a'",
        ),
        (
            lambda: optaxclip.clip(1.0, scope=scopes.leaf(batch_axes=lambda path, leaf: 0.5)),
            "batch_axes must return axes for 'a', got 0.5",
        ),
    ],
)
def test_functions_take_and_return_what_they_should(make, words):
    def step():
        clip = make()
        return clip.update(GRADS, clip.init(GRADS))

    for run in step, jax.jit(step):
        with pytest.raises((TypeError, ValueError), match="^" + re.escape(words)):
            run()


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: optaxclip.clip(1.0, scopes.tree()), "ClipState"),
        (
            lambda: optaxclip.error_feedback(optaxclip.clip(1.0, scopes.tree())),
            "ErrorFeedbackState",
        ),
        (lambda: optaxclip.skip_nonfinite(optax.sgd(1.0)), "GuardState"),
        (lambda: optaxclip.skip_spikes(optax.sgd(1.0), 1.0), "GuardState"),
        (lambda: optaxclip.scale_by_stable_adam(), "PreconditionedState"),
    ],
)
def test_a_state_of_another_transform_is_refused(make, kind):
    transform = make()
    chained = optax.chain(transform, optax.sgd(1.0)).init(GRADS)
    restored = flax.serialization.to_state_dict(transform.init(GRADS))
    before = optax.clip_by_global_norm(1.0).init(GRADS)
    for state, found, advice in [
        (chained, "tuple", "pass the state of this very transform"),
        (
            optax.scale_by_adam().init(GRADS),
            "ScaleByAdamState",
            "pass the state of this very transform",
        ),
        (GRADS, "dict", "restore with the state of init as the target"),
        (restored, "dict", "restore with the state of init as the target"),
        (before, "EmptyState", "restore with the state of init as the target"),
        (
            jax.tree.leaves(transform.init(GRADS)),
            "list",
            "restore with the state of init as the target",
        ),
        (
            tuple(jax.tree.leaves(transform.init(GRADS))),
            "tuple",
            "restore with the state of init as the target",
        ),
    ]:
        for update in transform.update, jax.jit(transform.update):
            with pytest.raises(
                TypeError,
                match=f"^state must be the {kind} that init returned, got {found}; {advice}",
            ):
                update(GRADS, state, GRADS)


def test_a_tree_is_of_arrays():
    clip = optaxclip.clip(1.0, scopes.tree())
    for tree in {"a": "text"}, {"a": object()}:
        with pytest.raises(
            TypeError,
            match="^updates must be a tree of arrays, got .* at 'a'; take it out, or hide it",
        ):
            clip.init(tree)
        with pytest.raises(
            TypeError,
            match="^updates must be a tree of arrays, got .* at 'a'; take it out, or hide it",
        ):
            clip.update(tree, clip.init(GRADS))


SPARSE = {
    "BCOO": sparse.BCOO(
        (jnp.array([3.0, 4.0, 1.0]), jnp.array([[0], [0], [2]])), shape=(3,)
    ),  # [7, 0, 1], of size 7.07
    "BCSR": sparse.BCSR.fromdense(jnp.eye(3)),
    "CSR": sparse.CSR.fromdense(jnp.eye(3)),
    "CSC": sparse.CSC.fromdense(jnp.eye(3)),
    "COO": sparse.COO.fromdense(jnp.eye(3)),
    "csr_array": scipy.sparse.csr_array(np.eye(3)),
    "dia_matrix": scipy.sparse.dia_matrix(np.eye(3)),
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(
    "make",
    [
        lambda: optaxclip.clip(1.0, scopes.tree()),
        lambda: optaxclip.clip_by_value(1.0),
        lambda: optaxclip.spectral_clip(1.0),
        lambda: optaxclip.error_feedback(optaxclip.clip_by_norm(1.0)),
        lambda: optaxclip.skip_nonfinite(optax.sgd(1.0)),
        lambda: optaxclip.skip_spikes(optax.sgd(1.0), 1.0),
        lambda: optaxclip.telemetry.monitor(),
    ],
)
def test_sparse_leaves_are_refused(make, kind):
    transform, grads = make(), {"a": {"b": SPARSE[kind]}, "c": jnp.ones(2)}
    state = transform.init(jax.tree.map(jnp.ones_like, {"a": {"b": jnp.ones(3)}, "c": jnp.ones(2)}))
    words = (
        f"updates must be a tree of dense arrays, got a {kind} at 'a/b'; pass its "
        "todense(), or clip the data of its sum_"
    )
    with pytest.raises(TypeError, match="^" + re.escape(words)):
        transform.update(grads, state)


def test_parameters_are_not_looked_at_where_no_limit_needs_them():
    clip = optaxclip.clip(1.0, scopes.tree())
    for params in None, {"other": jnp.ones(1)}:
        clip.update(GRADS, clip.init(GRADS), params)


def test_a_gradient_may_be_none_where_the_parameters_say_what_it_was():
    clip, grads = optaxclip.clip(1.0, scope=scopes.leaf()), {"a": GRADS["a"], "b": None}
    assert clip.update(grads, clip.init(GRADS), GRADS)[0]["b"] is None
    words = (
        "updates has 1 groups, but state was made for 2, got [] only in updates and ['b'] only in "
        "state; "
        "call init on a tree with the same leaves, "
        "or update(updates, state, params) if some gradients are None"
    )
    with pytest.raises(ValueError, match=exactly(words)):
        clip.update(grads, clip.init(GRADS))


# Nothing is forgotten


def test_every_function_of_validate_is_in_the_tables_above():
    functions = {
        name
        for name, value in vars(_validate).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert (
        functions - {"checks_keywords", "is_sparse", "is_beyond_zero"}
        == set(REFUSALS)
        == set(ACCEPTED)
    )


def raises(path):
    """All refusals; to say that a law is broken, as `optaxclip.testing` does, is none."""
    nodes = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and node.exc
    ]
    return [node for node in nodes if "AssertionError" not in ast.unparse(node)]


def test_every_refusal_of_validate_has_a_case_above():
    trees = [ast.parse(path.read_text()) for path in (SOURCE / "_validate").glob("*.py")]
    functions = [
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in REFUSALS
    ]
    assert {function.name for function in functions} == set(REFUSALS)
    for function in functions:
        expected = sum(isinstance(node, ast.Raise) for node in ast.walk(function))
        kinds = {
            (error, words.split(" got ")[0].split(" has ")[-1][:15])
            for _, _, error, words in REFUSALS[function.name]
        }
        assert len(kinds) >= max(expected, 1), function.name


def test_all_refusals_are_in_validate_but_those_of_axes_and_of_what_is_drawn():
    elsewhere = [
        path.name
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name != "_validate"
        for _ in raises(path)
    ]
    others = [name for name in elsewhere if name != "plots.py"]  # tested in `test_plots.py`
    # tested above, in `test_sharding.py` and `test_scopes.py`
    assert others == [
        "_layout.py",
        "scopes.py",
        "scopes.py",
    ]


def test_every_refusal_gives_the_value_and_advice():
    for path in SOURCE.rglob("*.py"):
        for node in raises(path):
            words = ast.unparse(node)
            gives = re.search(r"\bgot\b|\bhas\b|\bchose\b", words) and ";" in words
            assert gives or words.startswith("raise TypeError('clip() needs a scope:"), words
