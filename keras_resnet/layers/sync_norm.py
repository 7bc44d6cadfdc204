"""Batch norm in training over the images of all processes of a group, on torch.

torch has it for accelerators alone. For a CPU, over gloo, it is here, with the same arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def sync_batch_norm(x, mean, variance, gamma, beta, training: bool, momentum, epsilon) -> Any:
    """`torch.nn.functional.batch_norm` in training, with the statistics of all processes.

    `x` are maps `(n, channels, height, width)`; n may be 0 in some processes. The running mean and
    variance are moved, by torch's momentum. `training` is true, for the signature's sake.
    """
    if x.device.type == "cpu":
        return _SyncNorm.apply(x, mean, variance, gamma, beta, momentum, epsilon)
    from torch.nn.modules._functions import SyncBatchNorm  # what torch.nn.SyncBatchNorm runs

    group = dist.group.WORLD
    size = dist.get_world_size()
    return SyncBatchNorm.apply(x, gamma, beta, mean, variance, epsilon, momentum, group, size)


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, running_mean, running_variance, gamma, beta, momentum, epsilon):
        dtype = running_mean.dtype
        channels = x.shape[1]
        mine = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if x.numel():
            moments = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
            mine = torch.cat([*moments, moments[0].new_tensor([x.numel() // channels])]).double()
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        variances, means, counts = torch.stack(rows).split([channels, channels, 1], 1)
        total = counts.sum().clamp(min=1)
        mean = (means * counts).sum(0) / total
        # That of all is the mean of the parts' own, and of the squares of how far they are off.
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        running_mean.lerp_(mean.to(dtype), momentum)
        unbiased = variance * (total / (total - 1).clamp(min=1))
        running_variance.lerp_(unbiased.to(dtype), momentum)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, gamma, mean, (variance + epsilon).rsqrt(), total)
        return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gamma, mean, inverse, total = ctx.saved_tensors
        wide = (slice(None), None, None)
        dy = dy.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean[wide]) * inverse[wide]
        sums = torch.stack([dy.sum((0, 2, 3)), (dy * normal).sum((0, 2, 3))])
        d_beta, d_gamma = sums.clone()
        dist.all_reduce(sums)
        shift, slope = (sums / total.to(sums.dtype))[:, wide[0], None, None]
        scale = inverse if gamma is None else inverse * gamma
        dx = scale[wide] * (dy - shift - normal * slope)
        return dx.to(x.dtype), None, None, None if gamma is None else d_gamma, d_beta, None, None
