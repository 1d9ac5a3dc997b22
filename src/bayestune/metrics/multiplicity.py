"""Several tests at once: p-values corrected for their number."""

from collections.abc import Mapping


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's corrected p-values: whoever rejects those below α is wrong anywhere with chance ≤ α.

    The k-th smallest of m, p_(k), becomes max over j ≤ k of min(1, (m − j + 1) p_(j)).

    Args:
        p_values: by the name of the test.

    Returns:
        The corrected ones by name, the smallest first.

    >>> holm({"a": 0.5, "b": 0.01, "c": 0.04})
    {'b': 0.03, 'c': 0.08, 'a': 0.5}

    Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    adjusted = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        adjusted[name] = largest
    return adjusted
