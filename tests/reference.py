"""The classic methods in NumPy float64, from the papers' formulas: slow, short, and sharing nothing with the library.

A tree is a dict of arrays by name. A group is a list of places `(name, index)` whose numbers share one size.
"""

import math

import numpy as np

# Norms of a list of arrays.


def magnitudes(arrays):
    return [abs(x) for array in arrays for x in np.asarray(array, complex).ravel().tolist()]


def l1(arrays):
    return math.fsum(magnitudes(arrays))


def l2(arrays):
    return math.hypot(*magnitudes(arrays))


def linf(arrays):
    return max(magnitudes(arrays), default=0.0)


def lp(p):
    def norm(arrays):
        top = linf(arrays) or 1.0
        return top * math.fsum((x / top) ** p for x in magnitudes(arrays)) ** (1 / p)

    return linf if p == math.inf else norm


def rms(arrays):
    return l2(arrays) / math.sqrt(len(magnitudes(arrays)) or 1)


# Scopes: which places share a size.


def tree(leaves):
    return [[(name, i) for name, leaf in leaves.items() for i in np.ndindex(np.shape(leaf))]]


def group(name_of):
    def groups(leaves):
        names = {name_of(name) for name in leaves} - {None}
        return [tree({k: v for k, v in leaves.items() if name_of(k) == name})[0] for name in sorted(names)]

    return groups


def along(axes_of):
    """Places that differ only along `axes_of(shape)`."""

    def groups(leaves):
        found = {}
        for name, leaf in leaves.items():
            axes = axes_of(np.shape(leaf))
            for i in np.ndindex(np.shape(leaf)):
                unit = tuple(n for axis, n in enumerate(i) if axis not in axes)
                found.setdefault((name, unit), []).append((name, i))
        return list(found.values())

    return groups


def fan_in(shape):
    """Brock et al. 2021: vectors whole; dense [in, out] by column; convolutions by their last axis."""
    if sum(n != 1 for n in shape) <= 1:
        return range(len(shape))
    return [0] if len(shape) in (2, 3) else range(len(shape) - 1)


leaf = along(lambda shape: range(len(shape)))
unit = along(fan_in)
element = along(lambda shape: [])


# Responses of one number whose group has this size, and may have this limit.


def rescale(x, size, limit):
    return x * limit / size if size > limit else x


def clamp(x, size, limit):
    return x * limit / abs(x) if size > limit and abs(x) > limit else x


def smooth(x, size, limit):
    if limit == 0:
        return x * 0
    return x / math.sqrt(1 + (size / limit) ** 2)


def zero(x, size, limit):
    return x * 0 if size > limit else x


def normalize(x, size, limit):
    return x * limit / size if size > 0 and limit < math.inf else x


def band(x, size, limit, low=0.5):
    return x * min(max(size, low * limit), limit) / size if size > 0 and limit < math.inf else x


# Methods.


def clip(leaves, groups, norm, limit_of, response=rescale):
    """Every method: `limit_of` gets the places of a group and returns its limit."""
    out = {name: np.array(leaf, complex if np.iscomplexobj(leaf) else float) for name, leaf in leaves.items()}
    for places in groups(leaves):
        size = norm([leaves[name][i] for name, i in places])
        for name, i in places:
            out[name][i] = response(out[name][i], size, limit_of(places))
    return out


def clip_by_value(leaves, limit):
    return clip(leaves, element, linf, lambda places: limit, clamp)


def clip_between(leaves, low, high):
    return {name: np.minimum(np.maximum(np.asarray(leaf, float), low), high) for name, leaf in leaves.items()}


def clip_by_norm(leaves, max_norm, norm=l2):
    return clip(leaves, leaf, norm, lambda places: max_norm)


def clip_by_global_norm(leaves, max_norm, norm=l2):
    return clip(leaves, tree, norm, lambda places: max_norm)


def clip_by_block_rms(leaves, max_rms):
    return clip(leaves, leaf, rms, lambda places: max_rms)


def adaptive_grad_clip(leaves, params, ratio=0.01, floor=1e-3, groups=unit, norm=l2):
    return clip(leaves, groups, norm, lambda places: ratio * max(norm([params[name][i] for name, i in places]), floor))
