"""A key-value cache that writes into memory allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from torch import Tensor


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, each a view of a buffer of shape (batch, heads, capacity, head size).

    `DynamicLayer` concatenates, which copies the whole cache at every token; this one writes the new token only.
    ``keys`` and ``values`` stay views of the filled part, so everything inherited keeps its meaning.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, tokens, head size) and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self._key_buffer = key_states.new_empty(batch, heads, self.capacity, width)
            self._value_buffer = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        length = self.get_seq_length()
        self._key_buffer = self._key_buffer[indices]
        self._value_buffer = self._value_buffer[indices]
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]


def make_cache(config: object, capacity: int) -> Cache:
    """A cache for ``capacity`` tokens: preallocated where every layer sees the whole past, else the library's own.

    Layers with a sliding window or a recurrent state keep their own bookkeeping, which a plain buffer would break.
    """
    cache = DynamicCache(config=config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    return cache
