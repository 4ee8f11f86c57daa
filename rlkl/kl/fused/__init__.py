"""Per-token statistics of a policy and its reference from hidden states, without [N, V] logits.

The exact token KL needs two next-token distributions. Here the tokens are walked in chunks: a
chunk's logits are multiplied into two [chunk, V] buffers, reduced to four numbers per token,
overwritten in place by the gradient of the logits, and multiplied back into the gradients of hidden
states and head. Memory beyond inputs and their gradients is O(chunk · V), for any number of tokens;
gradients of 16-bit inputs are summed in float32, which holds twice the gradients' size besides,
until backward has rounded them.

With a, b the logits of policy and reference, p the policy's softmax and t = (b − a) − E_p[b − a],

    D_KL(policy ‖ ref) = log E_p[eᵗ] = log(1 + E_p[φ(t)]),    φ(t) = eᵗ − 1 − t ≥ 0
    ∂D_KL/∂a           = −p ⊙ t
    log q(y)           = log p(y) + t_y − D_KL
    ∂log p(y)/∂a       = onehot(y) − p,        ∂H/∂a = −p ⊙ (log p + H)

The first line is Σ p·d + Σ p·expm1(−d), with d = log p − log q = D_KL − t, solved for the constant:
the reference's normaliser is never formed, and an error δ of the mean E_p[b − a] enters the KL only
as δ·D_KL + δ²/2. Identical models give t = 0, hence exactly 0 in value and gradient.

Statistics without gradient need no whole rows: `tiles` sums them over parts of the vocabulary.

`functions` is the public part, `problem` checks, `heads` multiplies, `engine` sweeps over chunks,
`buffers` holds their logits, `generators` has the other divergences, `workers` the threads,
`precision` what products may round, `openblas` the products of one thread where torch's are slow.
The passes over rows are written three times, as the same two functions: `numba_rows` (float32 on a
CPU), `triton_rows` (GPU) and `torch_rows` (float64, and where a compiler is missing).
"""

from rlkl.kl.fused.functions import (
    fused_divergence,
    fused_logp_loss,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
)
from rlkl.kl.fused.generators import TopK
from rlkl.kl.fused.heads import LowRank, ModuleHead, OutputHead, head_logits
from rlkl.kl.fused.records import TokenLogp, TokenStats

__all__ = [
    "LowRank",
    "ModuleHead",
    "OutputHead",
    "TokenLogp",
    "TokenStats",
    "TopK",
    "fused_divergence",
    "fused_logp_loss",
    "fused_token_logp",
    "fused_token_loss",
    "fused_token_stats",
    "head_logits",
]
