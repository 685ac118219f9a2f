"""Descriptors of image patches in closed form: the targets of the pre-training.

Patches of generated scenes are normalised, whitened and clustered into a dictionary. The description of an
image is the resemblance of its patches to each entry and to its negative, averaged over each cell of a coarse
grid, and whitened over scenes. It is made from formulas and generated scenes only.

Source: https://proceedings.mlr.press/v15/coates11a.html for dictionary and pooling;
https://arxiv.org/abs/2112.09133 for predicting descriptors rather than pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

_PATCH, _STRIDE = 6, 2  # pixels
_CELLS = 4  # along a side; divides the number of tokens along it
_CONTRAST = 10 / 255  # added to the standard deviation of a patch, so that noise in flat patches stays small
_WHITENING = 0.1  # added to the variance of each direction of patches; the mean variance is one
_THRESHOLD = 0.5
_SAMPLED = 40_000  # patches that the dictionary is made from
_ROUNDS = 8  # of k-means
_BATCH = 100


class Descriptors(nn.Module):
    """Descriptions of images by a dictionary of patches, which :meth:`fit` makes.

    The description of an image is the mean over the tokens of a transformer of the target of each token.

    Args:
        entries: Number of patches in the dictionary.
        dim: Dimensions of a description: the strongest directions over scenes.
        side: Number of tokens along a side of the image.
    """

    filters: Tensor
    bias: Tensor
    mean: Tensor
    projection: Tensor
    deviation: Tensor

    def __init__(self, entries: int, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("filters", torch.zeros(entries, 3, _PATCH, _PATCH))
        self.register_buffer("bias", torch.zeros(entries, 1, 1))
        self.register_buffer("mean", torch.zeros(side**2, 1, 2 * entries))
        self.register_buffer("projection", torch.zeros(side**2, 2 * entries, dim))
        self.register_buffer("deviation", torch.zeros(dim))

    def fit(self, scenes: Tensor, generator: Generator) -> None:
        """Make dictionary and whitening from ``scenes`` (N, 3, H, W), uint8."""
        patches = _normalised(_sampled_patches(scenes, generator))
        centre = patches.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - centre).T))
        whitening = vectors * (values + _WHITENING).rsqrt() @ vectors.T
        filters = _clustered((patches - centre) @ whitening, len(self.filters), generator) @ whitening
        self.bias.copy_((filters @ centre)[:, None, None])
        # Removing the mean of a filter removes the mean of every patch.
        self.filters.copy_((filters - filters.mean(dim=1, keepdim=True)).view_as(self.filters))
        batches = scenes.split(_BATCH)
        total = torch.stack([self.resemblance(batch).sum(dim=1, keepdim=True) for batch in batches]).sum(
            dim=0
        )
        self.mean.copy_(total / len(scenes))
        cells = torch.cat([self._cells(self.resemblance(batch) - self.mean) for batch in batches])
        white = _whitening(cells, len(self.deviation)).view(_CELLS**2, -1, len(self.deviation))
        self.projection.copy_(white[self._cell_of_token()] * _CELLS**2)
        some = torch.cat([self(batch) for batch in batches[:10]])
        self.deviation.copy_(some.std(dim=(0, 1)))

    @torch.no_grad()
    def resemblance(self, images: Tensor) -> Tensor:
        """Return the resemblance of patches to the dictionary at each token (tokens, B, 2 · entries)."""
        pixels = images.float() / 255
        mean = F.avg_pool2d(pixels.mean(dim=1, keepdim=True), _PATCH, _STRIDE)
        power = F.avg_pool2d(pixels.square().mean(dim=1, keepdim=True), _PATCH, _STRIDE)
        deviation = (power - mean.square()).clamp(min=0).sqrt() + _CONTRAST
        responses = F.conv2d(pixels, self.filters, stride=_STRIDE) / deviation - self.bias
        signed = torch.cat([(responses - _THRESHOLD).relu(), (-responses - _THRESHOLD).relu()], dim=1)
        return F.adaptive_avg_pool2d(signed, self.side).flatten(2).sqrt().permute(2, 0, 1)

    def _cell_of_token(self) -> Tensor:
        """Return the cell of each token (side²,)."""
        places = torch.arange(self.side, device=self.mean.device) * _CELLS // self.side
        return (places[:, None] * _CELLS + places).flatten()

    def _cells(self, tokens: Tensor) -> Tensor:
        """Return the means (B, cells² · d) over each cell of ``tokens`` (side², B, d)."""
        per_cell = self.side**2 // _CELLS**2
        sums = tokens.new_zeros(_CELLS**2, *tokens.shape[1:]).index_add_(0, self._cell_of_token(), tokens)
        return (sums / per_cell).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the target of each token (B, tokens, dim) for images (B, 3, H, W), uint8."""
        return torch.bmm(self.resemblance(images) - self.mean, self.projection).transpose(0, 1)


def _whitening(points: Tensor, dim: int) -> Tensor:
    """Return the matrix (d, dim) that whitens ``points`` (n, d) of mean zero to ``dim`` dimensions."""
    # There are fewer points than dimensions, so the eigenvectors of their Gram matrix give the directions.
    values, vectors = torch.linalg.eigh(points @ points.T / len(points))
    directions = F.normalize(points.T @ vectors[:, -dim:], dim=0)
    whitening: Tensor = directions * values[-dim:].rsqrt()
    return whitening


def _sampled_patches(scenes: Tensor, generator: Generator) -> Tensor:
    """Draw patches (P, 3 · patch²) in [0, 1]."""
    windows = scenes.unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)
    number, _, rows, columns = windows.shape[:4]
    device = generator.device
    which = [
        torch.randint(end, (_SAMPLED,), generator=generator, device=device) for end in (number, rows, columns)
    ]
    chosen: Tensor = windows[which[0], :, which[1], which[2]]
    return chosen.flatten(1).float() / 255


def _normalised(patches: Tensor) -> Tensor:
    deviation = patches.std(dim=1, keepdim=True, correction=0)
    return (patches - patches.mean(dim=1, keepdim=True)) / (deviation + _CONTRAST)


def _clustered(points: Tensor, clusters: int, generator: Generator) -> Tensor:
    """Return the unit directions (clusters, d) of clusters of ``points`` (n, d), by spherical k-means."""
    drawn = torch.randperm(len(points), generator=generator, device=generator.device)[:clusters]
    directions = F.normalize(points[drawn])
    for _ in range(_ROUNDS):
        likeness = points @ directions.T
        nearest = likeness.abs().argmax(dim=1)
        pull = points * likeness.gather(1, nearest[:, None])
        # The direction of an empty cluster stays.
        directions = F.normalize(
            1e-6 * directions + torch.zeros_like(directions).index_add_(0, nearest, pull)
        )
    return directions
