"""The targets and the loss: standardised teacher tokens, three token losses, their sum over teachers and nested dims.

    y_t     = standardise(tokens of teacher t)                Standardizer: measured once, before training, then frozen
    h_{t,m} = the adaptor head of teacher t at dim m          student.adapt, one for the summary and one for the patches
    L_{t,m} =       1 - cos(h_{t,m}(z_summary[:m]), y_summary)    distillation_loss; cos is the cosine similarity
            + 0.9 * (1 - cos(h_{t,m}(z_patch[:m]),  y_patch))
            + 0.1 * smooth_l1(h_{t,m}(z_patch[:m]), y_patch)
    L       = sum over teachers t and nested dims m of w_m * L_{t,m},   w_m = 1    nested_loss, which train.py minimises
Losses are float32 under any autocast. Sources: RADIO (arXiv 2312.06709) for the token losses, PHI-S (2410.01680), and
Matryoshka (2205.13147) for the sum. The weights are our choice, not checked against the paper's method section."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student import InputError

Tokens = dict[str, Tensor]  # {"summary": (B, D), "patches": (B, N, D)}


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix (n, n) of entries +-1, H H^T = n I, in float64. InputError where n has no construction here."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if (q := n - 1) in (
        11,
        19,
    ):  # Paley, from the quadratic residues modulo q: those i with i^(q // 2) = 1
        chi = torch.tensor(
            [1.0 if pow(i, q // 2, q) == 1 else -1.0 for i in range(q)], dtype=torch.float64
        )
        return F.pad(
            torch.stack([chi.roll(i) for i in range(q)]), (1, 0, 1, 0), value=1
        )  # row i, column j: chi[j - i]
    if n % 2:
        raise InputError(
            "no Hadamard matrix of this width (only 2^k, 12 * 2^k, 20 * 2^k); use --standardize channel"
        )
    return torch.kron(torch.tensor([[1, 1], [1, -1]]), hadamard(n // 2))  # Sylvester's doubling


class Standardizer(nn.Module):
    """One teacher's tokens of one kind, (..., D) -> y_t (..., D) with mean 0 and comparable scale; frozen buffers.
        y_t = R (y - mean) / scale
    "phi-s":   R = H U^T, scale = sqrt(mean(l)) (one number), H a normalised Hadamard matrix, C = U diag(l) U^T.
               Every channel of y_t then has variance exactly 1, without blowing up a near-dead channel or direction.
    "channel": R = I, scale = each channel's standard deviation.       "none": y_t = y."""

    def __init__(self, dim: int, mode: str = "phi-s"):
        super().__init__()
        self.mode = mode
        hadamard(
            dim if mode == "phi-s" else 1
        )  # refuses a width that has none before anything slow starts
        self.mean, self.rotation, self.scale = map(
            nn.Buffer, (torch.zeros(dim), torch.eye(dim), torch.ones(dim))
        )

    def set(self, mean: Tensor, covariance: Tensor, name: str = "teacher") -> None:
        """Derive the buffers from mean (D,) and covariance (D, D), both float64. InputError: a constant teacher."""
        variances = covariance.diagonal()
        if not torch.isfinite(covariance).all() or variances.mean() <= 0:
            raise InputError(f"{name}: its outputs are constant or not finite: check its weights")
        rms = variances.mean().sqrt()  # = sqrt(mean(l)): the trace is the sum of the eigenvalues
        if self.mode == "phi-s":
            H = hadamard(len(mean)).to(mean) / len(mean) ** 0.5
            self.rotation.copy_(
                (H @ torch.linalg.eigh(covariance).eigenvectors.T).float()
            )  # R = H U^T
            self.scale.fill_(rms.item())
        elif self.mode == "channel":
            self.scale.copy_(
                variances.sqrt().clamp(min=1e-6 * rms).float()
            )  # a dead channel is not blown up
        self.mean.copy_(mean.float() * (self.mode != "none"))

    def forward(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return (y.float() - self.mean) @ self.rotation.T / self.scale


class Standardizers(nn.ModuleDict):  # {teacher: {"summary": Standardizer, "patches": Standardizer}}
    def __init__(self, teacher_dims: dict[str, int], mode: str = "phi-s"):
        kinds = ("summary", "patches")
        super().__init__(
            {
                t: nn.ModuleDict({k: Standardizer(D, mode) for k in kinds})
                for t, D in teacher_dims.items()
            }
        )

    @torch.no_grad()
    def measure(self, batches) -> None:
        """Set every standardiser from batches of raw outputs {teacher: tokens}; moments are summed in float64."""
        moments = {(t, kind): (0, 0.0, 0.0) for t in self for kind in self[t]}
        for outputs in batches:
            for (t, kind), (count, first, second) in moments.items():
                y = outputs[t][kind].flatten(0, -2)  # (B, D) or (B * N, D)
                y = (y.cpu() if y.device.type == "mps" else y).double()  # MPS has no float64
                moments[t, kind] = (count + len(y), first + y.sum(0), second + y.T @ y)
        for (t, kind), (count, first, second) in moments.items():
            mean = first / count
            self[t][kind].set(mean, second / count - mean.outer(mean), f"teacher {t}, {kind}")

    def forward(self, outputs: dict[str, Tokens]) -> dict[str, Tokens]:
        return {
            t: {kind: self[t][kind](y) for kind, y in tokens.items()}
            for t, tokens in outputs.items()
        }


def distillation_loss(
    adapted: dict[str, Tokens], targets: dict[str, Tokens]
) -> tuple[Tensor, dict]:
    """The sum over teachers t of L_{t,m}, at one dim m. adapted: h_{t,m}(z[:m]); targets: y_t, float32; both are
    {teacher: {"summary": (B, D_t), "patches": (B, N, D_t)}}. -> (loss, parts: {teacher: {name: value}} for the log)."""
    loss, parts = 0.0, {}
    for t, y in targets.items():
        h = adapted[t]
        summary_cos = F.cosine_similarity(h["summary"].float(), y["summary"], dim=-1).mean()
        patch_cos = F.cosine_similarity(h["patches"].float(), y["patches"], dim=-1).mean()
        patch_l1 = F.smooth_l1_loss(h["patches"].float(), y["patches"])
        loss = loss + (1 - summary_cos) + 0.9 * (1 - patch_cos) + 0.1 * patch_l1  # L_{t,m}
        part = {
            "summary_cos": summary_cos,
            "patch_cos": patch_cos,
            "patch_l1": patch_l1,
            "spread": spread(h, y),
        }
        parts[t] = {name: value.detach() for name, value in part.items()}
    return loss, parts


def spread(h: Tokens, y: Tokens) -> Tensor:
    """Watched, no part of the loss: the deviation of predictions h over the batch, mean of all channels, over that of
    their targets y; the smaller of the ratios for summary and first patch. 0: a dead head, the same for every tile."""
    pairs = (
        (h["summary"], y["summary"]),
        (h["patches"][:, 0], y["patches"][:, 0]),
    )  # each (B, D_t)
    return torch.fmin(
        *[
            a.float().std(0, unbiased=False).mean() / b.std(0, unbiased=False).mean()
            for a, b in pairs
        ]
    )


def nested_loss(
    student: nn.Module, tokens: Tokens, targets: dict[str, Tokens]
) -> tuple[Tensor, dict]:
    """L = sum over nested dims m and teachers t of L_{t,m}: every prefix of the embedding has to do the whole job.
    tokens: the student's z, {"summary": (B, D), "patches": (B, N, D)}. -> (L, {m: parts of distillation_loss at m})."""
    losses, parts = zip(
        *[distillation_loss(student.adapt(tokens, m), targets) for m in student.nested_dims]
    )
    return sum(losses), dict(zip(student.nested_dims, parts))  # w_m = 1


class Distiller(
    nn.Sequential
):  # of a student: with the loss in its forward, as DDP wraps and --compile compiles it
    def forward(self, images: Tensor, targets: dict[str, Tokens]) -> tuple[Tensor, dict]:
        return nested_loss(self[0], self[0](images), targets)
