"""The method: what the student has to predict, and how far off it is at every nested dim.

    z         tokens of the student: one summary (CLS) and N patches, of width D
    z[:m]     the first m channels of each token
    h_{t,m}   the adaptors of teacher t at dim m, a head for the summary and one for the patches:
              they predict teacher t's tokens from z[:m]
    y_t       teacher t's tokens, standardised: statistics are measured once, then frozen

    L_{t,m} =       1 - cos(h_{t,m}(z_summary[:m]), y_summary)         cos: cosine similarity
            + 0.9 * (1 - cos(h_{t,m}(z_patch[:m]), y_patch))
            + 0.1 * smooth_l1(h_{t,m}(z_patch[:m]), y_patch)

    L       = sum over nested dims m and teachers t of w_m L_{t,m}     w_m = 1

`Standardizers` makes y_t, student.Adaptors makes h_{t,m}, `token_loss` is L_{t,m}, `nested_loss` is
L, which train.py minimises. Targets and loss are float32, whatever the models compute in;
statistics are summed in float64.

Sources: RADIO (arXiv 2312.06709) for the token losses, PHI-S (2410.01680) for the targets,
Matryoshka (2205.13147) for the sum.
The weights are our choice, not checked against the paper's method section.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student import InputError, Tokens  # Tokens: {"summary": (B, D), "patches": (B, N, D)}

# ---- the targets: teachers' tokens, standardised ----


class Standardizer(nn.Module):
    """One teacher's summary, or its patches: y (..., D) -> R (y - mean) / scale (..., D), float32.

    "phi-s":    The covariance of y is C = U diag(lambda) U^T, with eigenvalues lambda. R = H U^T:
                channel j of U^T y has the variance lambda_j. H is a normalised Hadamard matrix, its
                entries are all +-1 / sqrt(D), so every channel of H U^T y has the same variance,
                sum_j lambda_j / D = mean(lambda). ONE division by scale = sqrt(mean(lambda)) makes
                it 1, and no nearly dead channel or direction is blown up.
    "channel":  R = I, scale = the standard deviation of each channel.
    "none":     y as it is.

    mean (D,), rotation R (D, D) and scale (D,) are buffers: `set` fills them, nothing trains them.
    InputError: "phi-s" for a width that has no Hadamard matrix. ValueError: another mode.
    """

    def __init__(self, dim: int, mode: str = "phi-s"):
        super().__init__()
        self.mode = mode
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("rotation", torch.eye(dim))
        self.register_buffer("scale", torch.ones(dim))
        if mode == "phi-s":
            hadamard(dim)  # refuses an impossible width now, before anything slow starts
        elif mode not in ("channel", "none"):
            raise ValueError(f"no way to standardise is called {mode!r}")

    def set(self, mean: Tensor, covariance: Tensor, name: str = "teacher") -> None:
        """Fill the buffers; mean (D,) and covariance (D, D) come in float64.

        InputError: the teacher's outputs do not vary, or are not finite.
        """
        variances = covariance.diagonal()
        mean_variance = variances.mean()  # = mean(lambda): trace(C) is the sum of the eigenvalues
        if not torch.isfinite(covariance).all() or mean_variance <= 0:
            raise InputError(
                f"{name}: its outputs are constant or not finite; "
                "check its weights, or raise --stats-tiles"
            )
        if self.mode == "none":
            return
        self.mean.copy_(mean)
        if self.mode == "channel":
            # A dead channel, whose variance may even be below 0 by rounding, is not blown up
            dead = variances < 1e-12 * mean_variance
            self.scale.copy_(torch.where(dead, mean_variance, variances).sqrt())
            return
        D = len(mean)
        H = hadamard(D).to(mean.device) / D**0.5
        U = torch.linalg.eigh(covariance).eigenvectors
        self.rotation.copy_(H @ U.T)
        self.scale.fill_(mean_variance.sqrt().item())

    def forward(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return (y.float() - self.mean) @ self.rotation.T / self.scale


class Standardizers(nn.ModuleDict):
    """{teacher: {"summary": Standardizer, "patches": Standardizer}}, from {teacher: D_t}."""

    def __init__(self, teacher_dims: dict[str, int], mode: str = "phi-s"):
        super().__init__()
        for t, D_t in teacher_dims.items():
            summary = Standardizer(D_t, mode)
            patches = Standardizer(D_t, mode)
            self[t] = nn.ModuleDict({"summary": summary, "patches": patches})

    @torch.no_grad()
    def measure(self, batches: Iterable[dict[str, Tokens]]) -> None:
        """Set every standardiser from batches of raw outputs {teacher: tokens}.

        InputError: a teacher's outputs do not vary, or are not finite.
        """
        moments = {}
        for outputs in batches:
            for t, tokens in outputs.items():
                for kind, y in tokens.items():
                    moments.setdefault((t, kind), Moments()).add(y)
        for t in self:
            for kind in self[t]:
                seen = moments[t, kind]
                self[t][kind].set(seen.mean(), seen.covariance(), name=f"teacher {t}, {kind}")

    def forward(self, outputs: dict[str, Tokens]) -> dict[str, Tokens]:
        """Raw outputs {teacher: tokens} -> targets y_t of the same shapes, in float32."""
        targets = {}
        for t, tokens in outputs.items():
            targets[t] = {kind: self[t][kind](y) for kind, y in tokens.items()}
        return targets


class Moments:
    """Sums over tokens (..., D) in float64: what their mean (D,) and covariance (D, D) need."""

    def __init__(self):
        self.count = 0
        self.first = 0.0  # sum of y, (D,)
        self.second = 0.0  # sum of y y^T, (D, D)

    def add(self, y: Tensor) -> None:
        y = y.flatten(0, -2)  # (B, D) or (B * N, D)
        if y.device.type == "mps":
            y = y.cpu()  # Apple's GPU has no float64
        y = y.double()
        self.count += len(y)
        self.first = self.first + y.sum(0)
        self.second = self.second + y.T @ y

    def mean(self) -> Tensor:
        return self.first / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.second / self.count - mean.outer(mean)


# ---- the loss ----


def cosine(h: Tensor, y: Tensor) -> Tensor:
    """Cosine similarity of tokens, (..., D_t) and (..., D_t) -> (...).

    Written out, because F.cosine_similarity takes several times as long on a CPU, most of it
    backwards.
    """
    products = (h * y).sum(-1)
    lengths = h.norm(dim=-1) * y.norm(dim=-1)
    return products / lengths.clamp_min(1e-8)  # a token of zeros has cosine 0


def token_loss(h: Tokens, y: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """L_{t,m}: how far the predictions h of one teacher at one dim are from its targets y.

    h and y: {"summary": (B, D_t), "patches": (B, N, D_t)}; h in any floating dtype, y in float32.
    -> (0-dim loss, parts {name: 0-dim tensor} for the log). The names of parts are free: train.py
    writes them all to log.jsonl; the screen has room for those that end in "_cos".
    """
    summary_cos = cosine(h["summary"].float(), y["summary"]).mean()
    patch_cos = cosine(h["patches"].float(), y["patches"]).mean()
    patch_l1 = F.smooth_l1_loss(h["patches"].float(), y["patches"])
    loss = (1 - summary_cos) + 0.9 * (1 - patch_cos) + 0.1 * patch_l1
    return loss, {"summary_cos": summary_cos, "patch_cos": patch_cos, "patch_l1": patch_l1}


def nested_loss(
    predictions: dict[int, dict[str, Tokens]], targets: dict[str, Tokens]
) -> tuple[Tensor, dict[str, Tensor]]:
    """L: every prefix of the embedding has to predict every teacher.

    predictions: {m: {teacher: h_{t,m}(z[:m])}}, as student.Adaptors makes them
    targets: {teacher: y_t}, as Standardizers makes them
    -> (0-dim loss, terms {"TEACHER/NAME@M": 0-dim tensor without gradient}); train.py logs them all
    """
    loss = 0.0
    terms = {}
    for m in predictions:
        w_m = 1.0  # the weight of dim m
        for t, y in targets.items():
            h = predictions[m][t]
            loss_tm, parts = token_loss(h, y)
            loss = loss + w_m * loss_tm
            for name, value in parts.items():
                terms[f"{t}/{name}@{m}"] = value.detach()
    return loss, terms


# ---- Hadamard matrices, which PHI-S needs; not needed to follow the rest ----


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix: H (n, n) of +1 and -1 with H H^T = n I, in float64.

    n is 2^k, 12 * 2^k or 20 * 2^k, the widths that teachers have. InputError: any other n.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n in (12, 20):
        return paley(n - 1)
    if n % 2 == 1:
        raise InputError(
            "--standardize phi-s: a teacher's width must be 2^k, 12 * 2^k or 20 * 2^k; "
            "use --standardize channel"
        )
    H = hadamard(n // 2)
    top = torch.cat([H, H], dim=1)
    bottom = torch.cat([H, -H], dim=1)
    return torch.cat([top, bottom])  # Sylvester's doubling


def paley(q: int) -> Tensor:
    """Paley's Hadamard matrix (q + 1, q + 1), for the primes q = 11 and 19.

    Any two rows of the inner block have the inner product -1, which the border of ones makes 0;
    that needs a prime q with q % 4 == 3.
    """
    chi = -torch.ones(q, dtype=torch.float64)  # -1, but +1 at the squares modulo q other than 0
    for i in range(1, q):
        chi[i * i % q] = 1
    H = torch.ones(q + 1, q + 1, dtype=torch.float64)  # a border of ones
    for i in range(q):
        H[i + 1, 1:] = chi.roll(i)  # and inside it, row i, column j: chi[j - i]
    return H
