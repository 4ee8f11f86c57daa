"""A key-value cache for sampling a known number of tokens: written in place, never copied."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values [B, heads, capacity, width] of one layer; attention reads the filled part.

    `DynamicLayer` joins old and new at every token, which copies all keys and values each time.
    """

    def __init__(self, capacity: int) -> None:
        """Takes the number of positions to reserve."""
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserves room, of the shape and dtype of the first states."""
        super().lazy_initialization(key_states, value_states)
        self._room = tuple(
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds the new positions; returns views of all so far.

        Raises:
            ValueError: more positions than were reserved.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity is {self.capacity}, position {end} does not fit")
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


def reserved_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A cache with room for `capacity` positions where every layer attends to all of them.

    Models with other layers (sliding windows, linear attention) keep what transformers gives them.
    """
    cache = DynamicCache(config=config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers[:] = [ReservedLayer(capacity) for _ in cache.layers]
    return cache
