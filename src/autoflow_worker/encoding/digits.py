"""The digits of an integer, however many: Python's own conversion takes the square of the time."""

from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, Inexact, localcontext
from typing import Final

_EXACT: Final = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[Inexact])
_FEW_BITS: Final = 2_000
"""Up to which `Decimal` itself is as quick."""


def digits_of(number: int) -> str:
    """Return what `str(number)` would; it refuses to, from 4,301 digits on."""
    powers: dict[int, Decimal] = {}

    def power_of_two(bits: int) -> Decimal:
        if bits not in powers:
            half = bits // 2
            small = bits <= _FEW_BITS
            powers[bits] = (
                Decimal(1 << bits) if small else power_of_two(half) * power_of_two(bits - half)
            )
        return powers[bits]

    # By halves: `decimal` is quick at multiplying large numbers, and slow at converting them.
    def convert(part: int, bits: int) -> Decimal:
        if bits <= _FEW_BITS:
            return Decimal(part)
        low = bits // 2
        high = part >> low
        return convert(part - (high << low), low) + convert(high, bits - low) * power_of_two(low)

    with localcontext(_EXACT):
        digits = str(convert(abs(number), number.bit_length()))
    return f"-{digits}" if number < 0 else digits
