"""Independent float64 references of the losses in numpy, with logits and labels to compare them on."""

from math import exp, log, sqrt

import numpy as np
import torch

GENERATOR = np.random.default_rng(0)
STUDENT = 3 * GENERATOR.standard_normal((6, 5))
TEACHER = 3 * GENERATOR.standard_normal((6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])
MIXED = np.array(
    [[0.25, 0, 0, 0.75, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0], [0.125, 0, 0.875, 0, 0]]
)
"""Mixed labels; two samples have no label."""


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_kl(student, teacher, temperature, t_squared):
    """Compute the KL divergence of logits [B, C], and its gradient with respect to the student's logits."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    scale = temperature**2 if t_squared else 1.0
    return scale * (p * (np.log(p) - np.log(q))).sum() / len(p), scale * (q - p) / temperature / len(p)


def reference_cross_entropy(student, labels, smoothing):
    """Compute the cross-entropy of logits [B, C], and its gradient with respect to the logits.

    Labels are classes [B], or probabilities [B, C] with zeros for a sample without a label.
    """
    classes = student.shape[1]
    probabilities = np.eye(classes)[labels] if labels.ndim == 1 else labels
    is_labeled = probabilities.sum(1, keepdims=True)
    target = probabilities * (1 - smoothing) + is_labeled * smoothing / classes
    q = softmax(student)
    return -(target * np.log(q)).sum() / len(q), (is_labeled * q - target) / len(q)


def numeric_gradient(function, student, step=1e-5):
    """Compute the gradient of a reference with respect to the student's logits by central differences."""
    gradient = np.empty_like(student)
    for position in np.ndindex(*student.shape):
        higher, lower = student.copy(), student.copy()
        higher[position] += step
        lower[position] -= step
        gradient[position] = (function(higher) - function(lower)) / (2 * step)
    return gradient


def softened(logits, temperature):
    """Return the probabilities of one sample, as a list."""
    exponentials = [exp((value - max(logits)) / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p, q):
    """Return KL(p || q) of two lists of probabilities."""
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def reference_reverse_kl(student, teacher, temperature):
    """Compute KL(student || teacher), without the factor T^2."""
    pairs = [(softened(s, temperature), softened(t, temperature)) for s, t in zip(student, teacher, strict=True)]
    return sum(divergence(q, p) for q, p in pairs) / len(pairs)


def reference_js(student, teacher, temperature):
    """Compute the Jensen-Shannon divergence, without the factor T^2."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = softened(s, temperature), softened(t, temperature)
        mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        total += (divergence(p, mean) + divergence(q, mean)) / 2
    return total / len(student)


def reference_logit_mse(student, teacher):
    """Compute the mean over samples and classes of the squared difference of the logits."""
    return sum((s - t) ** 2 for s, t in zip(student.ravel(), teacher.ravel(), strict=True)) / student.size


def reference_standardized(logits):
    """Compute the z-scores of each sample, with the authors' epsilon."""
    rows = []
    for row in logits:
        mean = sum(row) / len(row)
        deviation = sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
        rows.append([(value - mean) / (1e-7 + deviation) for value in row])
    return np.array(rows)


def reference_dkd(student, teacher, labels, temperature, alpha, beta):
    """Compute the decoupled loss; a sample without a label has the NCKD of all classes."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = softened(s, temperature), softened(t, temperature)
        others = [c for c in range(len(s)) if c != label]
        p_other, q_other = sum(p[c] for c in others), sum(q[c] for c in others)
        if label >= 0:
            total += alpha * divergence([p[label], p_other], [q[label], q_other])
        total += beta * divergence([p[c] / p_other for c in others], [q[c] / q_other for c in others])
    return temperature**2 * total / len(student)


def reference_dist(student, teacher, temperature, beta, gamma):
    """Compute the correlation loss with numpy's correlation of each row and each column."""
    q = np.array([softened(row, temperature) for row in student])
    p = np.array([softened(row, temperature) for row in teacher])
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def reference_nkd(student, teacher, labels, temperature, gamma):
    """Compute the normalized loss; a sample without a label has the cross-entropy of all classes alone."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        if label >= 0:
            total -= softened(t, 1.0)[label] * log(softened(s, 1.0)[label])
        others = [c for c in range(len(s)) if c != label]
        q, p = softened([s[c] for c in others], temperature), softened([t[c] for c in others], temperature)
        total -= gamma * temperature**2 * sum(b * log(a) for a, b in zip(q, p, strict=True))
    return total / len(student)


def value_and_gradient(function, student, dtype=torch.float64):
    """Compute the value of a loss, and its gradient with respect to the student's tensor."""
    leaf = torch.tensor(student, dtype=dtype, requires_grad=True)
    value = function(leaf)
    value.backward()
    return value.item(), leaf.grad.double().numpy()
