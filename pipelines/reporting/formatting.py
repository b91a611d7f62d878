"""Numbers, sizes and times as text for people."""

from __future__ import annotations

from datetime import UTC, datetime

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """With a sign (a typographic minus), and without negative zero."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def compact(value: float) -> str:
    """The shortest form, as in a configuration: for limits and learning rates."""
    return f"{value:g}"


def with_error(mean: float | None, error: float | None, digits: int) -> str:
    """A mean and its standard error, which is omitted for a single run and for whole numbers such as bytes."""
    if mean is None:
        return NONE
    text = f"{mean:,.{digits}f}"
    return text if error is None or not digits else f"{text} ± {error:.{digits}f}"


def interval(value: dict[str, float] | None) -> str:
    """Text of an interval with `mean`, `low` and `high`."""
    return NONE if value is None else f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def probability(value: float | None) -> str:
    """A p-value, which may be very small, to two significant digits."""
    return NONE if value is None else f"{value:.2g}"


def moment(seconds: float) -> str:
    """Unix seconds as a UTC date and time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
