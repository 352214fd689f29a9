"""The methods in NumPy float64, from the papers' formulas: slow, short, and sharing nothing with
the library.

A tree is a dict of arrays by name. A group is a list of places `(name, index)` whose numbers share
one size.
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
        return [
            tree({k: v for k, v in leaves.items() if name_of(k) == name})[0]
            for name in sorted(names)
        ]

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
    """Brock et al. 2021: whole vectors; dense [in, out] by column; convolutions by last axis."""
    if sum(n != 1 for n in shape) <= 1:
        return range(len(shape))
    return [0] if len(shape) in (2, 3) else range(len(shape) - 1)


leaf = along(lambda shape: range(len(shape)))
unit = along(fan_in)
element = along(lambda shape: [])


# Responses of one number whose group has this size, and may have this limit.


def power_half(x, size, limit):
    return x * (limit / size) ** 0.5 if size > limit else x


def rescale(x, size, limit):
    return x * limit / size if size > limit else x


def clamp(x, size, limit):
    return x * limit / abs(x) if size > limit and abs(x) > limit else x


def smooth(x, size, limit):
    if limit == 0:
        return x * 0
    return x / math.sqrt(1 + (size / limit) ** 2)


def drop(x, size, limit):
    return x * 0 if size > limit else x


def normalize(x, size, limit):
    return x * limit / size if size > 0 and limit < math.inf else x


def band(x, size, limit, low=0.5):
    return x * min(max(size, low * limit), limit) / size if size > 0 and limit < math.inf else x


def automatic(x, size, limit, gamma=0.01):
    """AUTO-S of Bu et al. 2022."""
    return x * limit / (size + gamma) if limit < math.inf else x


def psac(x, size, limit, r=0.1):
    """Xia et al. 2022."""
    return x * limit / (size + r / (size + r)) if limit < math.inf else x


# Methods.


def clip(leaves, groups, norm, limit_of, response=rescale):
    """Every method: `limit_of` gets the places of a group and returns its limit."""
    out = {
        name: np.array(leaf, complex if np.iscomplexobj(leaf) else float)
        for name, leaf in leaves.items()
    }
    for places in groups(leaves):
        size = norm([leaves[name][i] for name, i in places])
        for name, i in places:
            out[name][i] = response(out[name][i], size, limit_of(places))
    return out


def clip_by_value(leaves, limit):
    return clip(leaves, element, linf, lambda places: limit, clamp)


def clip_between(leaves, low, high):
    return {
        name: np.minimum(np.maximum(np.asarray(leaf, float), low), high)
        for name, leaf in leaves.items()
    }


def clip_by_norm(leaves, max_norm, norm=l2):
    return clip(leaves, leaf, norm, lambda places: max_norm)


def clip_by_global_norm(leaves, max_norm, norm=l2):
    return clip(leaves, tree, norm, lambda places: max_norm)


def clip_by_block_rms(leaves, max_rms):
    return clip(leaves, leaf, rms, lambda places: max_rms)


def adaptive_grad_clip(leaves, params, ratio=0.01, floor=1e-3, groups=unit, norm=l2):
    return clip(
        leaves,
        groups,
        norm,
        lambda places: ratio * max(norm([params[name][i] for name, i in places]), floor),
    )


# Rules that learn: the limits `[steps]` of one group from its sizes `[steps]`. Step 0 is the first.


def autoclip(sizes, q=0.1, window=None):
    """Seetharaman et al. 2020: a quantile of all sizes so far, or of the last ones, the current one
    among them.
    """
    return [np.quantile(sizes[: t + 1][-(window or len(sizes)) :], q) for t in range(len(sizes))]


def lagged_quantile(sizes, q, window):
    """TRELLIS: a quantile of the last sizes before the current one, once there are so many."""
    return [
        np.quantile(sizes[t - window : t], q) if t >= window else math.inf
        for t in range(len(sizes))
    ]


def quantile_clip(sizes, q=0.9, rate=0.2, initial=None):
    """Andrew et al. 2019, geometric: C <- C exp(-eta (b - q)), where b tells whether the size was
    at most C.
    """
    limit, limits = initial or sizes[0], []
    for size in sizes:
        limits.append(limit)
        limit = limit * math.exp(-rate * ((1 if size <= limit else 0) - q))
    return limits


def zclip(sizes, z=2.5, decay=0.97, warmup=25, max_norm=math.inf, option="adaptive_scaling"):
    """Kumar et al. 2025: limited to mu + z0^2 sigma / z from z0 on; first mu, then sigma about it,
    see the size so cut. The released code also has mu, or mu + z0 sigma ("percentile").
    """
    limits = [math.inf] * warmup
    mean, variance = np.mean(sizes[:warmup]), np.var(sizes[:warmup])
    for size in sizes[warmup:]:
        deviation = math.sqrt(variance)
        score = (size - mean) / deviation
        to = {"adaptive_scaling": z**2 / max(score, z), "mean": 0, "percentile": z}[option]
        limits.append(mean + to * deviation if score > z else math.inf)
        cut = min(size, limits[-1])
        mean = decay * mean + (1 - decay) * cut
        variance = decay * variance + (1 - decay) * (cut - mean) ** 2
    return [min(limit, max_norm) for limit in limits]


def relative_ema(sizes, ratio=2.0, decay=0.95):
    """OLMo, before its core: a multiple of the average of clipped sizes, which starts as the first
    size.
    """
    average, limits = sizes[0], []
    for size in sizes:
        limits.append(ratio * average)
        average = decay * average + (1 - decay) * min(size, limits[-1])
    return limits


def history_clip(sizes, deviations=3.0, window=128, warmup=64):
    """Levanter: mean + k std (ddof 0) of the last raw sizes before the current one, if they are
    enough.
    """
    past = [sizes[max(t - window, 0) : t] for t in range(len(sizes))]
    return [
        np.mean(last) + deviations * np.std(last) if len(last) >= warmup else math.inf
        for last in past
    ]


def log_norm_clip(sizes, deviations=2.0, decay=0.95):
    """TensorFlow's contrib with a global step: averages of log and log^2 with the current size;
    from a trigger on, e^mean.
    """
    mean, square, limits = 0.0, 0.0, []
    for n, size in enumerate(sizes):
        kept = min(decay, n / (n + 1))
        mean = kept * mean + (1 - kept) * math.log(size)
        square = kept * square + (1 - kept) * math.log(size) ** 2
        trigger = math.exp(mean + deviations * math.sqrt(max(1e-8, square - mean**2)))
        limits.append(math.exp(mean) if size >= trigger else math.inf)
    return limits


def growth_clip(sizes, factor=1.01):
    """Fira: at most a multiple of the norm that the last step was clipped to; the first is free."""
    limits = [math.inf]
    for last in sizes[:-1]:
        limits.append(factor * min(last, limits[-1]))
    return limits


def spam_clip(sizes, factor=5000.0, decay=0.999, warmup=20):
    """SPAM: g^2 at most theta v, where v is the average of clipped squares so far, from zero; free
    at first. The reference code counts steps from 1 and clips unless its count is below 20.
    """
    v, limits = 0.0, []
    for t, size in enumerate(sizes):
        limits.append(math.sqrt(factor * v) if t + 1 >= warmup else math.inf)
        v = decay * v + (1 - decay) * min(size, limits[-1]) ** 2
    return limits


def gradient_stabilizer(sizes, decay=0.6, square_decay=0.999):
    """GradientStabilizer: the norm becomes m / sqrt(v), as in Adam, of raw norms with the current
    one.
    """
    m, v, limits = 0.0, 0.0, []
    for t, size in enumerate(sizes, start=1):
        m = decay * m + (1 - decay) * size
        v = square_decay * v + (1 - square_decay) * size**2
        limits.append(m / (1 - decay**t) / math.sqrt(v / (1 - square_decay**t)))
    return limits


def adagc(sizes, factor=1.05, decay=0.98, warmup=100, max_norm=1.0):
    """AdaGC, of all leaves `[steps, leaves]` at once: by the global norm at first, while gamma is
    the least clipped norm.
    """
    gamma, limits = np.full(sizes.shape[1], math.inf), []
    for t, now in enumerate(sizes):
        limits.append(now * min(1, max_norm / math.hypot(*now)) if t < warmup else factor * gamma)
        clipped = np.minimum(now, limits[-1])
        gamma = np.minimum(gamma, clipped) if t < warmup else decay * gamma + (1 - decay) * clipped
    return np.array(limits)


def each(rule):
    """The rule of one group for several: limits `[steps, groups]` from sizes `[steps, groups]`."""
    return lambda sizes: np.stack([rule(column) for column in sizes.T], axis=1)


def measured(stream, groups, norm=l2):
    """For leaves `[steps, ...]`, of each group the places, its numbers `[steps, places]`, and its
    sizes `[steps]`.
    """
    found = []
    for places in groups({name: leaf[0] for name, leaf in stream.items()}):
        numbers = np.stack(
            [np.asarray(stream[name], float)[(slice(None), *i)] for name, i in places], axis=1
        )
        found.append((places, numbers, np.array([norm([row]) for row in numbers])))
    return found


def learned(stream, found, rule, response=rescale):
    """The leaves `[steps, ...]` clipped, each of the `measured` groups to its limits."""
    out = {name: np.full(np.shape(leaf), np.nan) for name, leaf in stream.items()}
    limits = rule(np.stack([sizes for _, _, sizes in found], axis=1))
    for (places, numbers, sizes), limit in zip(found, limits.T, strict=True):
        clipped = np.vectorize(response, otypes=[float])(numbers, sizes[:, None], limit[:, None])
        for (name, i), column in zip(places, clipped.T, strict=True):
            out[name][(slice(None), *i)] = column
    return out


# Methods that need the elements, of one tree.


def clippy(leaves, params, relative=0.1, absolute=1e-7, groups=leaf):
    """Tang et al. 2023: one factor until no |u_j| is over r |w_j| + a."""
    out = {name: np.array(leaf, float) for name, leaf in leaves.items()}
    for places in groups(leaves):
        moves = [
            (abs(out[name][i]), relative * abs(float(params[name][i])) + absolute)
            for name, i in places
        ]
        factor = min([1.0, *[budget / move for move, budget in moves if move > 0]])
        for name, i in places:
            out[name][i] *= factor
    return out


def u_clip(trees, clip, decay=1.0):
    """Elesedy and Hutter 2023, of a list of trees: u = clip(g + d), then d becomes a share of g + d
    - u.
    """
    carried, out = {name: 0.0 for name in trees[0]}, []
    for grads in trees:
        total = {name: np.asarray(leaf, float) + carried[name] for name, leaf in grads.items()}
        out.append(clip(total))
        carried = {name: decay * (total[name] - out[-1][name]) for name in total}
    return out


# Examples: each clipped by itself, then the mean.


def aggregate(
    examples,
    groups,
    limit_of,
    response=rescale,
    *,
    norm=l2,
    reduce="mean",
    mask=None,
    weights=None,
    center=None,
    iterate=1,
):
    """The mean, sum, or mean of what is kept of examples, trees in float64."""
    names = list(examples[0])
    there = [True] * len(examples) if mask is None else mask
    weight = [1.0] * len(examples) if weights is None else weights
    middle = {name: 0.0 for name in names} if center is None else center
    for _ in range(iterate):
        total = {name: 0.0 for name in names}
        divisor = {name: 0.0 for name in names}
        for i, one in enumerate(examples):
            finite = all(np.isfinite(leaf).all() for leaf in one.values())
            if not there[i] or (not finite and reduce == "kept"):
                continue
            if not finite:
                divisor = {name: divisor[name] + weight[i] for name in names}
                continue
            shifted = {name: one[name] - middle[name] for name in names}
            clipped = clip(shifted, groups, norm, limit_of, response)
            dropped = {
                places[0][0]
                for places in groups(shifted)
                if norm([shifted[name][k] for name, k in places]) > limit_of(places)
                and all(clipped[name][k] == 0 for name, k in places)
            }
            dropped = {
                name for places in groups(shifted) if places[0][0] in dropped for name, _ in places
            }
            for name in names:
                total[name] = total[name] + weight[i] * clipped[name]
                if reduce != "kept" or name not in dropped:
                    divisor[name] += weight[i]
        if reduce == "sum":
            return total
        middle = {name: middle[name] + total[name] / (divisor[name] or 1.0) for name in names}
    return middle


# Limits of weights, from the formulas of those who have them. A matrix is [inputs, units].


def keras_max_norm(w, limit=2.0):
    """Keras `MaxNorm(limit, axis=0)`."""
    norms = np.sqrt(np.sum(w**2, axis=0, keepdims=True))
    return w * np.clip(norms, 0, limit) / (1e-7 + norms)


def keras_unit_norm(w):
    """Keras `UnitNorm(axis=0)`."""
    return w / (1e-7 + np.sqrt(np.sum(w**2, axis=0, keepdims=True)))


def keras_min_max_norm(w, low=0.0, high=1.0, rate=1.0):
    """Keras `MinMaxNorm(low, high, rate, axis=0)`."""
    norms = np.sqrt(np.sum(w**2, axis=0, keepdims=True))
    wanted = rate * np.clip(norms, low, high) + (1 - rate) * norms
    return w * wanted / (1e-7 + norms)


def h2o_max_w2(w, max_w2):
    """H2O: the squares of the weights into a neuron sum up to `max_w2` at most."""
    w = np.array(w, float)
    for unit in range(w.shape[1]):
        r2 = math.fsum(x * x for x in w[:, unit].tolist())
        if r2 > max_w2:
            w[:, unit] *= math.sqrt(max_w2 / r2)
    return w


def kept_by_projection(params, updates, project):
    """The steps after which the weights are projected: u' = project(p + u) - p."""
    moved = {name: np.asarray(params[name], float) + updates[name] for name in params}
    kept = project(moved)
    return {name: kept[name] - np.asarray(params[name], float) for name in params}


def qk_clip(layer, logits, tau=100.0, alpha=0.5):
    """Kimi K2, algorithm 1, for heads with keys of their own."""
    layer = {side: {k: np.array(x, float) for k, x in w.items()} for side, w in layer.items()}
    for head, largest in enumerate(np.asarray(logits, float)):
        gamma = tau / max(largest, tau)
        for side, power in ("query", alpha), ("key", 1 - alpha):
            for weights in layer[side].values():
                weights[..., head, :] *= gamma**power
    return layer
