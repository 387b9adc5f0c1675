"""A tiny JEPA of a moving dot, without TAR and with it: `python examples/jepa.py`, a few seconds on a CPU.

A joint embedding predictive architecture learns to predict the representation of the next frame instead of its pixels.
A loss of variance and covariance (VICReg) keeps the representations distinct. The predicted representations are
`(batch, channels, time, height, width)`. TAR along the third axis keeps neighbours in time close. eb_jepa adds the same
term, `(x[1:] - x[:-1]).pow(2).mean()` along time.

With TAR the predicted paths are straighter, which helps to plan along them: their mean cosine grows by 0.23 ± 0.01
(mean and standard error over the seeds 0 to 4). TAR does not help to read the position of the dot: the error grows by
0.05 ± 0.03 pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import fused_ar_tar

BATCH, TIME, SIZE, CHANNELS, STEPS, BETA = 16, 12, 16, 8, 150, 1.0


def videos(count: int) -> tuple[Tensor, Tensor]:
    """Return noisy videos of a dot that bounces off the walls, `(count, 1, time, size, size)`, and its positions."""
    position, velocity = torch.rand(count, 1, 2), (torch.rand(count, 1, 2) - 0.5) * 0.3
    path = position + velocity * torch.arange(TIME).view(1, -1, 1)
    path = 1 - (path % 2 - 1).abs()  # from 0 to 1, and back
    grid = torch.linspace(0, 1, SIZE)
    near = [(-((grid - path[..., axis, None]) ** 2) * 100).exp() for axis in range(2)]
    frames = near[0].unsqueeze(-1) * near[1].unsqueeze(-2)
    return (frames + 0.2 * torch.randn_like(frames)).unsqueeze(1), path


class JEPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        frame, two = (1, 3, 3), (2, 3, 3)  # kernels over one time step, and over two
        self.encoder = nn.Sequential(
            nn.Conv3d(1, 16, frame, (1, 2, 2), (0, 1, 1)),
            nn.GELU(),
            nn.Conv3d(16, CHANNELS, frame, (1, 2, 2), (0, 1, 1)),
        )
        self.predictor = nn.Sequential(
            nn.Conv3d(CHANNELS, 32, two, padding=(0, 1, 1)), nn.GELU(), nn.Conv3d(32, CHANNELS, 1)
        )

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the representations, and predictions from the third frame on, each from the two frames before it."""
        found = self.encoder(frames)
        return found, self.predictor(found[:, :, :-1])


def spread(found: Tensor) -> Tensor:
    """Penalize channels that vary too little, or that vary together."""
    samples = found.movedim(1, -1).flatten(0, -2)
    samples = samples - samples.mean(0)
    covariance = samples.T @ samples / (len(samples) - 1)
    deviations = covariance.diagonal().clamp(min=1e-4).sqrt()
    return F.relu(1 - deviations).mean() + (covariance - covariance.diagonal().diag()).square().sum() / CHANNELS


def straightness(path: Tensor) -> Tensor:
    """Return the mean cosine between changes that follow each other: 1 on a straight line."""
    changes = path.movedim(2, 1).flatten(2).diff(dim=1)
    return F.cosine_similarity(changes[:, 1:], changes[:, :-1], dim=-1).mean()


def train(beta: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = JEPA()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    print(f"{'with TAR' if beta else 'without TAR'}: beta {beta:g}")
    for step in range(STEPS):
        frames, _ = videos(BATCH)
        found, predicted = model(frames)
        loss = F.mse_loss(predicted, found[:, :, 2:]) + spread(found)
        # AR is measured, but its coefficient is 0.
        terms = fused_ar_tar(predicted, predicted, 0.0, beta, time_dim=2, return_terms=True)
        optimizer.zero_grad()
        (loss + terms.penalty).backward()
        optimizer.step()
        if step % 30 == 0 or step == STEPS - 1:
            print(f"step {step:3}  loss {loss:.3f}  ar {terms.ar:.3f}  tar {terms.tar:.4f}")
    with torch.no_grad():
        frames, path = videos(256)
        _, predicted = model(frames)
        inputs = F.pad(predicted.movedim(2, 1).flatten(2).flatten(0, 1), (0, 1), value=1.0)
        wanted = path[:, 2:].flatten(0, 1)
        train_on, test_on = inputs.chunk(2), wanted.chunk(2)
        weights = torch.linalg.lstsq(train_on[0], test_on[0]).solution
        miss = (train_on[1] @ weights - test_on[1]).norm(dim=1).mean() * (SIZE - 1)
    print(f"the position is read from the prediction to within {miss:.2f} pixels; ", end="")
    print(f"straightness of predicted paths {straightness(predicted):.2f}\n")


if __name__ == "__main__":
    train(0.0)
    train(BETA)
