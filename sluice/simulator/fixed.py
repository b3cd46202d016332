"""Decimal text as integers of 1e-8, the scale in which the exchange prints prices and sizes."""

from functools import lru_cache

ONE = 100_000_000


@lru_cache(maxsize=1 << 16)
def text(value: int) -> str:
    """Print `value` (units of 1e-8) with eight decimals: `text(150_000)` is `"0.00150000"`."""
    if value < 0:
        return "-" + text(-value)
    return f"{value // ONE}.{value % ONE:08d}"


@lru_cache(maxsize=1 << 16)
def parse(printed: str) -> int:
    """Read a plain decimal of at most eight decimals into units of 1e-8.

    Raises:
        ValueError: The text is no such number.
    """
    whole, _, fraction = printed.partition(".")
    if len(fraction) > 8 and fraction[8:].strip("0"):  # noqa: PLR2004 - the exchange's scale
        raise ValueError(f"more than eight decimals: {printed!r}")
    return int(whole) * ONE + int(fraction[:8].ljust(8, "0"))


def product(price: int, quantity: int) -> int:
    """Multiply a price by a quantity, all in units of 1e-8 (rounded down)."""
    return price * quantity // ONE
