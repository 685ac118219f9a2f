"""Losses as pure functions of logits or features and labels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Cross-entropy ignores one value of the target, by default -100, and a class 100 positions before the current
# ones would be shifted to just that value. No class is shifted to this one.
_NEVER = -(2**62)


def local_cross_entropy(logits: Tensor, labels: Tensor, first_class: int) -> Tensor:
    """Return the mean cross-entropy of logits (B, C) over the C classes of one experience, for labels (B,).

    Classes of other experiences do not enter the softmax. The value is that of a cross-entropy over all
    classes seen in which every older logit is minus infinity, so older heads get no gradient.

    Source: the loss of InfLoRA and its relatives, https://arxiv.org/abs/2404.00228.

    Args:
        logits: One column for each class of the experience.
        labels: Positions in the class order, from ``first_class`` to ``first_class + C - 1``.
        first_class: Position of the first column.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    >>> local_cross_entropy(logits, torch.tensor([10, 11]), first_class=10)
    tensor(0.6931)
    """
    return F.cross_entropy(logits, labels - first_class, ignore_index=_NEVER)


def cosface(
    cosines: Tensor, labels: Tensor, first_class: int, *, scale: float = 20.0, margin: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy of scaled cosines (B, C) in which the own class gives up a margin.

    The logit of a class is ``scale · cos``, and that of the image's own class ``scale · (cos - margin)``: its
    cosine has to exceed every other by the margin before the loss counts the image as well placed.

    Source: CosFace, https://arxiv.org/abs/1801.09414; over the classes of one experience as in LoDA,
    https://arxiv.org/abs/2603.00191.

    Args:
        cosines: One column for each class of the experience, in [-1, 1].
        labels: Positions in the class order, from ``first_class`` to ``first_class + C - 1``.
        first_class: Position of the first column.
        scale: Factor of the cosines, the inverse of a temperature.
        margin: Difference of cosines that the own class gives up.

    >>> cosines = torch.tensor([[0.5, 0.4]])
    >>> cosface(cosines, torch.tensor([10]), first_class=10, margin=0.1)
    tensor(0.6931)
    """
    classes = torch.arange(cosines.shape[1], device=cosines.device)
    own = labels[:, None] - first_class == classes
    return local_cross_entropy(scale * torch.where(own, cosines - margin, cosines), labels, first_class)


def decoupled_margin(
    features: Tensor,
    prototypes: Tensor,
    margin: float = 0.2,
    reduction: Literal["nearest", "all"] = "nearest",
) -> Tensor:
    """Return by how much features (B, d) are nearer to old prototypes (P, d) than a margin, on average.

    With ``nearest`` it is the mean over the features of [max_p cos(f, p) - margin]₊; with ``all``, the mean
    over the features of the mean of cos(f, p) - margin over those prototypes that are too near. Both are 0 if
    no prototype is too near, or if there is none.

    It is decoupled from classification: prototypes are constants, labels and heads are not used, and the
    gradient only turns a feature away from what it is too near to, whatever the feature's length.

    Source: the Decoupled Margin Loss of JANUS-LoRA, https://arxiv.org/abs/2605.28495. We know its purpose,
    that it has a margin, and that it acts between new features and stored prototypes of old classes. We infer
    from the paper's plots that it works on angles, and the value of the margin, as the height to which they
    fall; the hinge is a reconstruction.

    Args:
        features: Features of the images of a batch, all of new classes.
        prototypes: A mean feature for each old class.
        margin: Cosine above which a prototype is too near.
        reduction: Which prototypes count for a feature: the ``nearest``, or ``all`` that are too near.

    >>> features = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> decoupled_margin(features, torch.tensor([[0.6, 0.8], [1.0, 0.0]]), margin=0.5)
    tensor(0.4000)
    """
    excess = F.relu(cosine_similarities(features, prototypes.detach()) - margin)
    if reduction == "nearest":
        return F.pad(excess, (0, 1)).amax(dim=1).mean()  # the zero is for no prototype at all
    return (excess.sum(dim=1) / (excess > 0).sum(dim=1).clamp(min=1)).mean()


def augmented_triplet(features: Tensor, labels: Tensor, prototypes: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean triplet loss of features (B, d) in which old prototypes (P, d) count as negatives.

    All vectors are scaled to length one. A feature's positive is the farthest of its own class in the batch,
    its negative the nearest of another class in the batch or among the prototypes, and its loss is

        [ d(f, positive) - d(f, negative) + margin ]₊,    d the Euclidean distance.

    A feature that has no other of its class is its own positive, at distance 0; without a negative the loss
    is 0. Prototypes are constants.

    Source: the augmented triplet loss of LoRA-DRS, https://arxiv.org/abs/2503.18985; its margins are 1 on
    CIFAR-100 and 2 on ImageNet-R, where every triplet counts.

    Args:
        features: Features of the images of a batch.
        labels: Their classes (B,), none of which has a prototype.
        prototypes: A mean feature for each old class.
        margin: By how much a negative should be farther than a positive.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> augmented_triplet(features, torch.tensor([4, 4]), torch.tensor([[0.0, -3.0]]))
    tensor(0.7071)
    """
    with torch.autocast(features.device.type, enabled=False):
        points, fixed = F.normalize(_precise(features)), F.normalize(_precise(prototypes.detach()))
        # Through a matrix product, distances between close features would lose most of their digits.
        among = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        to_old = torch.cdist(points, fixed, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[:, None] == labels
        positive = among.masked_fill(~same, 0).amax(dim=1)
        negative = torch.cat([among.masked_fill(same, torch.inf), to_old], dim=1).amin(dim=1)
        return F.relu(positive - negative + margin).mean()


def cosine_similarities(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine (B, P) between each of features (B, d) and each of prototypes (P, d), in float32.

    Under mixed precision too; two inputs in float64 stay in float64.

    >>> cosine_similarities(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([[0.6000, 0.8000]])
    """
    # Half precision would round cosines to multiples of 1/256, coarser than what separates two classes.
    with torch.autocast(features.device.type, enabled=False):
        one, other = _precise(features), _precise(prototypes)
        dtype = torch.promote_types(one.dtype, other.dtype)
        return F.linear(F.normalize(one.to(dtype)), F.normalize(other.to(dtype)))


def danger_score(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the mean over features (B, d) of the cosine to the nearest of old prototypes (P, d).

    Source: the diagnostic of JANUS-LoRA, https://arxiv.org/abs/2605.28495.

    Raises:
        ValueError: If there is no prototype.

    >>> danger_score(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor(0.9000)
    """
    if not len(prototypes):
        raise ValueError("There is no old prototype: compute the score from the second experience on.")
    return cosine_similarities(features, prototypes).amax(dim=1).mean()


def _precise(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
