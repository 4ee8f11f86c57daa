"""Randomness that depends on where it is used, not on what was drawn before."""

import numpy as np
import torch


def generator_of(device: torch.device | str, seed: int, *place: int) -> torch.Generator:
    """A generator for one place, such as a step and a purpose, under a seed.

    The numbers are hashed together: a CPU's generator reads 32 bits of its seed alone, so that of
    two numbers packed into one only the lower would count.

    Args:
        device: where the generator draws.
        seed: of the run; any integer.
        place: integers ≥ 0. Another place is another stream.

    Example:
        >>> def draw(*key: int) -> int:
        ...     return int(torch.randint(10_000, (), generator=generator_of("cpu", *key)))
        >>> draw(0, 5) == draw(0, 5), draw(0, 5) == draw(1, 5), draw(0, 5) == draw(0, 5, 0)
        (True, False, False)
    """
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=place)
    hashed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(hashed)
