"""What makes a round of the masking GCN fast: vertex features that are formed only where a non-linearity needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class AffineFeatures:
    """Vertex features of one masked layer in the form y[r, c] = x[r, c] M + source[c] + target[r].

    A linear round on them changes M, source and target alone, all of them small: the features of the vertices are
    formed when a non-linearity needs them.
    """

    x: Tensor  # (batch, m, n, in)
    source_sums: Tensor  # of x over the weights of each source neuron, (batch, n, in)
    target_sums: Tensor  # of x over the weights of each target neuron, (batch, m, in)
    matrix: Tensor | None = None  # M, (in, features); without it y is x
    source: Tensor | None = None  # (batch, n, features)
    target: Tensor | None = None  # (batch, m, features)

    @staticmethod
    def of(x: Tensor) -> AffineFeatures:
        return AffineFeatures(x, x.sum(1), x.sum(2))

    def formed(self) -> Tensor:
        """y, (batch, m, n, features)."""
        return self.x if self.matrix is None else self.x @ self.matrix + self.source[:, None] + self.target[:, :, None]

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of y over the weights of each source neuron (batch, n, features) and target neuron (batch, m, features)."""
        if self.matrix is None:
            return self.source_sums, self.target_sums
        m, n = self.x.shape[1:3]
        of_source = self.source_sums @ self.matrix + m * self.source + self.target.sum(1, keepdim=True)
        of_target = self.target_sums @ self.matrix + n * self.target + self.source.sum(1, keepdim=True)
        return of_source, of_target

    def transformed(self, matrix: Tensor, source: Tensor, target: Tensor) -> AffineFeatures:
        """y[r, c] M' + source'[c] + target'[r], with an M' (features, out)."""
        if self.matrix is not None:
            source = self.source @ matrix + source
            target = self.target @ matrix + target
            matrix = self.matrix @ matrix
        return replace(self, matrix=matrix, source=source, target=target)

    def relu(self) -> Tensor:
        """relu(y), (batch, m, n, features)."""
        if self.matrix is None:
            return self.x.relu()
        return AffineReLU.apply(self.x, self.matrix, self.source, self.target)


class AffineReLU(torch.autograd.Function):
    """relu(x[r, c] M + source[c] + target[r]): the only work of the GCN that touches every vertex.

    Graph by graph, so that its tensors stay in the cache; and without the copies of autograd's own formulas. Where
    nothing of a graph is above 0, the gradient passes as if all were: a GCN without biases that died would stay dead.
    """

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
        output = x.new_empty(*x.shape[:3], matrix.shape[1])
        for x_of, source_of, target_of, y in zip(x, source, target, output):
            torch.add(source_of, target_of[:, None], out=y)
            y.flatten(0, 1).addmm_(x_of.flatten(0, 1), matrix).relu_()
        context.save_for_backward(x, matrix, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, matrix, output = context.saved_tensors
        of_x = x.new_empty(x.shape) if context.needs_input_grad[0] else None
        of_matrix = torch.zeros_like(matrix)
        of_source, of_target = [], []
        for index, (x_of, y) in enumerate(zip(x, output)):
            of_y = torch.ops.aten.threshold_backward(gradient[index], y, 0) if y.any() else gradient[index]
            flat = of_y.flatten(0, 1)
            # A gradient x^T g is formed twice as fast as g^T x.
            of_matrix.addmm_(x_of.flatten(0, 1).T, flat)
            of_source.append(of_y.sum(0))
            of_target.append(of_y.sum(1))
            if of_x is not None:
                torch.mm(flat, matrix.T, out=of_x[index].flatten(0, 1))
        return of_x, of_matrix, torch.stack(of_source), torch.stack(of_target)
