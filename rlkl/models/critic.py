"""The value function: a linear head on the policy's trunk, or on a trunk of its own."""

import torch
from torch import Tensor, nn

from rlkl.models.language_model import response_hidden


class Critic(nn.Module):
    """V(h_t) = w · hidden_t + b, in the units of the return, at the prefix before each token.

    On the policy's trunk it costs nothing beside the policy's own pass; with `trunk` (a separate
    causal LM, trained with it) it does not pull at the policy's features. The head starts at zero,
    so that the first advantages are the returns themselves.
    """

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None) -> None:
        """Args: width of the trunk that is read, and that trunk where it is not the policy's."""
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, policy_hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [B, T] in float32.

        Args:
            policy_hidden: the policy's hidden states at the response's prefixes, [B, T, H].
            input_ids: [B, P + T], read by a separate trunk only.
            attention_mask: [B, P + T].
        """
        hidden = policy_hidden
        if self.trunk is not None:
            hidden = response_hidden(self.trunk, input_ids, attention_mask, policy_hidden.shape[1])
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)
