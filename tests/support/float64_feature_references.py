"""Independent float64 references of the feature losses: loops over samples, pixels and channels, as the papers' formulas."""

import math

import numpy as np

_WORD = 1 << 64


def numeric_slope(function, array, direction, *, step=1e-6):
    """Compute the derivative of a function of an array along a direction, by a central difference."""
    return (function(array + step * direction) - function(array - step * direction)) / (2 * step)


def reference_pool(feature, height, width):
    """Average maps [B, D, H, W] over equal windows."""
    n, d, h, w = feature.shape
    return feature.reshape(n, d, height, h // height, width, w // width).mean((3, 5))


def common_size(student, target):
    size = min(student.shape[2], target.shape[2]), min(student.shape[3], target.shape[3])
    return reference_pool(student, *size), reference_pool(target, *size)


def reference_cosine(student, target):
    """Compute the mean of 1 - cosine over the pixels of two maps."""
    student, target = common_size(student, target)
    distances = []
    for s, t in zip(student, target, strict=True):
        for y, x in np.ndindex(s.shape[1:]):
            one, other = s[:, y, x], t[:, y, x]
            distances.append(1 - one @ other / math.sqrt((one @ one) * (other @ other)))
    return sum(distances) / len(distances)


def reference_attention(feature, p):
    """Compute the attention maps [B, 1, H, W] of length 1."""
    attention = np.zeros((len(feature), 1, *feature.shape[2:]))
    for sample, channel, y, x in np.ndindex(feature.shape):
        attention[sample, 0, y, x] += abs(feature[sample, channel, y, x]) ** p
    return np.stack([each / math.sqrt((each**2).sum()) for each in attention])


def reference_at(student, attention, p):
    """Compute the mean distance between the student's attention maps and those of the teacher, [B, 1, H, W]."""
    # A factor for each sample changes nothing, so that the student's map may be normalized before it is pooled.
    student, attention = common_size(reference_attention(student, p), attention)
    distances = [
        math.sqrt((((s / math.sqrt((s**2).sum())) - (t / math.sqrt((t**2).sum()))) ** 2).sum())
        for s, t in zip(student, attention, strict=True)
    ]
    return sum(distances) / len(distances)


def reference_sp(student, target):
    """Compute the squared Frobenius norm of the difference of the similarity matrices, divided by B^2."""

    def similarities(feature):
        flat = feature.reshape(len(feature), -1)
        products = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in flat] for one in flat]
        return [[each / math.sqrt(sum(value**2 for value in row)) for each in row] for row in products]

    rows = zip(similarities(student), similarities(target), strict=True)
    return sum((s - t) ** 2 for row in rows for s, t in zip(*row, strict=True)) / len(student) ** 2


def _huber(one, other):
    difference = abs(one - other)
    return 0.5 * difference**2 if difference <= 1 else difference - 0.5


def reference_rkd(student, target, lambda_d, lambda_a):
    """Compute the distance-wise and angle-wise losses of the pooled maps; means over all pairs and triples."""

    def relations(feature):
        points = feature.mean((2, 3))
        samples = range(len(points))
        distances = {(i, j): math.dist(points[i], points[j]) for i in samples for j in samples if i != j}
        mean = sum(distances.values()) / len(distances)
        cosines = {}
        for i, j, k in np.ndindex((len(points),) * 3):
            if i not in (j, k):
                one, other = points[j] - points[i], points[k] - points[i]
                cosines[i, j, k] = one @ other / math.sqrt((one @ one) * (other @ other))
        return {pair: distance / mean for pair, distance in distances.items()}, cosines

    (student_distances, student_angles), (target_distances, target_angles) = relations(student), relations(target)
    distance = sum(_huber(student_distances[pair], target_distances[pair]) for pair in target_distances)
    angle = sum(_huber(student_angles[triple], target_angles[triple]) for triple in target_angles)
    return lambda_d * distance / len(student) ** 2 + lambda_a * angle / len(student) ** 3


def reference_pkt(student, target):
    """Compute the divergence of the neighbor probabilities of the pooled maps, averaged over the samples."""

    def probabilities(feature):
        points = feature.mean((2, 3))
        kernel = np.zeros((len(points), len(points)))
        for i, j in np.ndindex(kernel.shape):
            if i != j:
                cosine = points[i] @ points[j] / math.sqrt((points[i] @ points[i]) * (points[j] @ points[j]))
                kernel[i, j] = (1 + cosine) / 2
        return kernel / kernel.sum(1, keepdims=True)

    p, q = probabilities(target), probabilities(student)
    divergences = [p[i, j] * math.log(p[i, j] / q[i, j]) for i, j in np.ndindex(p.shape) if i != j]
    return sum(divergences) / len(p)


def reference_hcl(student, target):
    """Compute the weighted mean of the errors of square maps in full size and of 4x4, 2x2, 1x1 means."""
    student, target = common_size(student, target)
    total, weights, weight = ((student - target) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            difference = reference_pool(student, size, size) - reference_pool(target, size, size)
            total, weights = total + weight * (difference**2).mean(), weights + weight
    return total / weights


def reference_conv(feature, weight, bias=None):
    """Compute a convolution with a kernel of odd size, stride 1 and zero padding that keeps the size."""
    n, _, h, w = feature.shape
    radius = weight.shape[2] // 2
    padded = np.pad(feature, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    result = np.zeros((n, len(weight), h, w))
    for sample, out, y, x in np.ndindex(result.shape):
        window = padded[sample, :, y : y + 2 * radius + 1, x : x + 2 * radius + 1]
        result[sample, out, y, x] = (window * weight[out]).sum() + (0 if bias is None else bias[out])
    return result


def reference_batchnorm(feature, weight, bias, *, epsilon=1e-5):
    """Normalize each channel by the statistics of the batch."""
    result = np.zeros_like(feature)
    for channel in range(feature.shape[1]):
        values = feature[:, channel]
        result[:, channel] = weight[channel] * (values - values.mean()) / math.sqrt(values.var() + epsilon) + bias[channel]
    return result


def reference_fusion(state, feature, deeper):
    """Fuse a map with the deeper fused map, by the tensors of a fusion module; return (compared map, fused map)."""
    fused = reference_batchnorm(
        reference_conv(feature, state["reduce.0.weight"]), state["reduce.1.weight"], state["reduce.1.bias"]
    )
    if deeper is not None:
        repeats = fused.shape[2] // deeper.shape[2]
        deeper = np.kron(deeper, np.ones((repeats, repeats)))
        logits = reference_conv(np.concatenate([fused, deeper], 1), state["attention.weight"], state["attention.bias"])
        shares = 1 / (1 + np.exp(-logits))
        fused = shares[:, :1] * fused + shares[:, 1:] * deeper
    expanded = reference_conv(fused, state["expand.0.weight"])
    return reference_batchnorm(expanded, state["expand.1.weight"], state["expand.1.bias"]), fused


def reference_review(states, student, target):
    """Compute the review loss of maps by layer, from shallow to deep, by the tensors of each fusion module."""
    fused, total = None, 0.0
    for layer in reversed(list(student)):
        compared, fused = reference_fusion(states[layer], student[layer], fused)
        total += reference_hcl(compared, target[layer])
    return total


def reference_words(seed, draw, index, count):
    """Compute random integers below 2^53, [B, count], with Python's unbounded integers."""
    words = np.zeros((len(index), count), dtype=np.int64)
    for sample, number in np.ndindex(words.shape):
        state = int(index[sample]) * 0x9FB21C651E98DF25 + draw * 0xD6E8FEB86659FD93 + seed * 0xA24BAED4963EE407
        state = (state + number * 0x9E3779B97F4A7C15) % _WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % _WORD
        state ^= state >> 31
        words[sample, number] = state >> 11
    return words


def reference_mask(seed, draw, index, pixels, probability):
    """Compute the kept pixels of samples, bool [B, pixels]."""
    return reference_words(seed, draw, index, pixels) / 2**53 >= probability


def reference_mgd(state, student, target, kept):
    """Compute the loss of one layer by the tensors of its projector (`align`) and its generator (`0`, `2`)."""
    if "align.weight" in state:
        student = reference_conv(student, state["align.weight"], state["align.bias"])
    student, target = common_size(student, target)
    masked = student * kept.reshape(len(student), 1, *student.shape[2:])
    hidden = np.maximum(reference_conv(masked, state["0.weight"], state["0.bias"]), 0)
    generated = reference_conv(hidden, state["2.weight"], state["2.bias"])
    return ((generated - target) ** 2).sum() / len(student)


def reference_embeddings(state, student, teacher):
    """Compute the embeddings of length 1 of student and teacher, [2][B, E], by the tensors of a layer of `crd`."""
    found = []
    for name, feature in (("embed_s", student), ("embed_t", teacher)):
        embedded = feature.mean((2, 3)) @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        found.append(np.stack([each / math.sqrt(each @ each) for each in embedded]))
    return found


def reference_crd(state, student, teacher, rows, negatives, *, temperature, z=None):
    """Compute the loss of one layer by its tensors, and the constants Z of both banks: those given, else an estimate."""
    samples, count, total, constants = state["memory"].shape[1], len(negatives[0]), 0.0, []
    for bank, anchors in zip(state["memory"], reversed(reference_embeddings(state, student, teacher)), strict=True):
        columns = [[row, *drawn] for row, drawn in zip(rows, negatives, strict=True)]
        scores = [
            [math.exp(anchor @ bank[row] / temperature) for row in own] for anchor, own in zip(anchors, columns, strict=True)
        ]
        constants.append(samples * np.mean(scores) if z is None else z[len(constants)])
        for own in scores:
            shares = [score / constants[-1] / (score / constants[-1] + count / samples) for score in own]
            total -= (math.log(shares[0]) + sum(math.log(1 - share) for share in shares[1:])) / len(scores)
    return total, constants
