"""Dates that satisfy a condition such as `strftime('%Y', day) = '2010'`, and dates that just miss it."""

import re
from datetime import datetime, timedelta

_FIELDS = {"%Y": "(?P<year>[0-9]{4})", "%m": "(?P<month>[0-9]{1,2})", "%d": "(?P<day>[0-9]{1,2})"}
_FIELDS |= {"%H": "(?P<hour>[0-9]{1,2})", "%M": "(?P<minute>[0-9]{1,2})", "%S": "(?P<second>[0-9]{1,2})"}
_FIELDS |= {"%w": "(?P<weekday>[0-6])", "%j": "(?P<yearday>[0-9]{1,3})", "%F": "(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"}


def dates_by_format(date_format: str, literal: int | float | str, operator: str) -> tuple[list[str], list[str]] | None:
    """Dates for which `strftime(date_format, day) operator literal` holds, and these with their neighbours."""
    if len(date_format) > 20 or not 0 <= len(str(literal)) <= 20:
        return None
    parts = re.split("(%.)", date_format)
    if len(set(parts) & set(_FIELDS)) != sum(part in _FIELDS for part in parts):
        return None
    match = re.fullmatch("".join(_FIELDS.get(part, re.escape(part)) for part in parts), str(literal))
    if not match or not (field := match.lastgroup):
        return None
    try:
        dates = [_date_from(match.groupdict(), field, by) for by in (-1, 0, 1)]
    except (ValueError, OverflowError):
        return None
    timed = field in ("hour", "minute", "second")
    below, same, above = ([str(date if timed else date.date()) for date in group] for group in dates)
    hits = {"<": below, "<=": below + same, ">": above, ">=": same + above, "<>": below + above, "!=": below + above}
    return hits.get(operator, same), below + same + above


def _date_from(fields: dict[str, str], last: str, by: int) -> list[datetime]:
    """Two dates with these fields, of which the last is changed by `by`."""
    if "date" in fields:
        return [datetime.fromisoformat(fields["date"]) + timedelta(days=by)]
    given = {name: int(value) for name, value in fields.items()}
    if last in ("year", "month"):
        given[last] += by
        by = 0
    if not 1 <= given.get("month", 1) <= 12:  # January has no month before it in the same year
        given["month"] = 6
    dates = []
    for month, day in ((1, 1), (12, 28)):
        start = datetime(given.get("year", 2011), given.get("month", month), given.get("day", day))
        start += timedelta(**{f"{unit}s": given.get(unit, 0) for unit in ("hour", "minute", "second")})
        if "yearday" in given:
            start = start.replace(month=1, day=1) + timedelta(days=given["yearday"] - 1)
        if "weekday" in given:
            start += timedelta(days=(given["weekday"] - start.isoweekday()) % 7)
        unit = f"{last}s" if last in ("hour", "minute", "second") else "days"
        dates.append(start + timedelta(**{unit: by}))
    return dates


def dates_with(literal: str) -> tuple[list[str], list[str]] | None:
    """Dates in and around the year of `strftime('%Y', day) = '2010'` or the month of `day LIKE '2010-07-%'`.

    A column of dates is filled with dates alone where the literal allows it, since queries may rely on that.
    """
    year = re.fullmatch(r"%?([12][0-9]{3})-?%?", literal)
    month = re.fullmatch(r"(?:[12][0-9]{3}|%|____)?-?([0-9]{2})-?%?", literal)
    if year:
        number = int(year[1])
        return [f"{number}-01-01", f"{number}-12-31"], [f"{number - 1}-12-31", f"{number + 1}-01-01"]
    if month and not 1 <= int(month[1]) <= 12:  # `substr(day, 9) = '15'`
        day = int(month[1])
        return ([f"2011-07-{day}"], [f"2011-07-{day - 1}", f"2011-07-{day + 1}"]) if 13 <= day <= 30 else None
    if month:
        in_year = literal[:4] if literal[:4].isdecimal() else "2011"
        others = (max(1, int(month[1]) - 1), min(int(month[1]) + 1, 12))
        return [f"{in_year}-{month[1]}-04"], [f"{in_year}-{other:02d}-04" for other in others]
    return None
