"""The rules of docs/candidates.md that run.py compares; caches.py carries them out."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
    """One change, or several, of E (eviction) or W (weighted-kv)."""

    name: str
    host: str | None = None  # "RULE, positions"
    bound: float = 0  # g, in per cent, that it is kept above
    positions: str = "text"
    # What becomes of the victim's value: None drops it; else its share of w_j in the merge.
    merge: float | None = None
    toward: str = "right"  # or "cheaper", "key": the neighbour merged into
    state: str = "keep"  # or "add", "max", "mean": r's average after a merge
    gate: tuple[str, float] | None = None  # merged only where the cosine is above
    # w is multiplied by a distance: of v to o ("value", or by the metrics "output"
    # and "loss"), or of the merged value to o ("merged").
    error: str | None = None
    prior: float = 0
    age: int = 0
    decay: float = 1
    recent: int | None = None  # half of the budget, less the sinks
    budgets: str = "even"
    lends: str | None = None  # "layer" or "model": who shares the budget
    floor: float = 0.2  # a head keeps this share of its budget
    most: float = 3  # and has at most so many times the mean
    moves: int = 4  # budget tokens that change heads in a step ("model")

    def kind(self):
        """Rules of a kind run the same operations."""
        return (
            self.lends or "",
            self.moves if self.lends == "model" else 0,
            self.merge is not None,
            self.toward != "right",
            self.gate is not None,
            self.error or "",
        )


# The best of the single changes to when attention counts.
LATE = dict(prior=32, age=64, decay=0.997)


def rules():
    E, W, EC = "E, text", "W, text", "E, cache"
    w = dict(host=W, merge=1.0)
    yield Rule("E", positions="cache")
    yield Rule("E", EC, 10)
    yield Rule("W", positions="cache", merge=1.0)
    yield Rule("W", "W, cache", 10, merge=1.0)
    # C6, C9, lighter merges, gates, C3
    for state in ("add", "max", "mean"):
        yield Rule(f"W, state {state}", **w, state=state)
    for toward in ("cheaper", "key"):
        yield Rule(f"W, toward {toward}", **w, toward=toward)
    for share in (1 / 2, 1 / 4):
        yield Rule(f"W, weight {share}", W, 1, merge=share)
    for what, least in (("value", 0.5), ("value", 0.8), ("key", 0.8)):
        yield Rule(f"W, {what}s alike {least}", **w, bound=1, gate=(what, least))
    yield Rule("W, error of merging", **w, bound=1, error="merged")
    yield Rule("W, late", **w, bound=2, **LATE)
    # C3, C4, C5
    for error in ("value", "output", "loss"):
        yield Rule(f"E, error by {error}", E, 1, error=error)
    yield Rule("E, prior 32", E, 1, prior=32)
    yield Rule("E, prior 128", E, 1, prior=128)
    yield Rule("E, late", E, 2, **LATE)
    yield Rule("E, late, error by output", E, 2, **LATE, error="output")
    # C7
    for floor in (0.2, 0.5):
        yield Rule(f"E, lends in a layer, floor {floor}", E, 3, lends="layer", floor=floor)
    yield Rule("E, lends in a layer, recent 64", E, 3, lends="layer", recent=64)
    yield Rule("E, lends in a layer", EC, 3, positions="cache", lends="layer")
    for error in ("output", "loss"):
        yield Rule(f"E, lends in the model by {error}", E, 3, lends="model", error=error)
    # C8
    for budgets in ("pyramid", "inverse"):
        yield Rule(f"E, {budgets}", E, 2, budgets=budgets)
    for by in ("residual", "loss"):
        yield Rule(f"E, layers by {by}", E, 5, budgets=f"layers by {by}")
        yield Rule(f"E, heads by {by}", E, 5, budgets=f"heads by {by}")
    yield Rule("E, heads by loss", EC, 5, positions="cache", budgets="heads by loss")
    # What combines, against the aim.
    aim = dict(host=EC, bound=50)
    for by in ("residual", "loss"):
        yield Rule(f"E, heads by {by}, late", **aim, budgets=f"heads by {by}", **LATE)
        yield Rule(f"E, parts by {by}, late", **aim, budgets=f"parts by {by}", **LATE)
    yield Rule("E, layers by loss, late", **aim, budgets="layers by loss", **LATE)
    yield Rule("E, heads by root of loss, late", **aim, budgets="heads by root of loss", **LATE)
    for error in ("output", "loss"):
        yield Rule(
            f"E, parts by loss, late, error by {error}",
            **aim,
            budgets="parts by loss",
            **LATE,
            error=error,
        )
    lends = dict(**aim, **LATE, lends="layer")
    yield Rule("E, lends in a layer, late", **lends)
    yield Rule("E, layers by loss, lends, late", **lends, budgets="layers by loss")
    yield Rule("E, heads by loss, lends, late", **lends, budgets="heads by loss", floor=0.5)
    yield Rule(
        "E, heads by loss, lends, late, error by output",
        **lends,
        budgets="heads by loss",
        floor=0.5,
        error="output",
    )
    yield Rule(
        "E, lends in the model by loss, late",
        **aim,
        **LATE,
        lends="model",
        error="loss",
        moves=8,
    )
    yield Rule(
        "E, heads by loss, lends in the model, late",
        **aim,
        **LATE,
        budgets="heads by loss",
        lends="model",
        error="loss",
        floor=0.5,
    )
    yield Rule("E, heads by loss, late", EC, 50, positions="cache", budgets="heads by loss", **LATE)
    yield Rule("W, heads by loss, late", **aim, merge=1.0, budgets="heads by loss", **LATE)
    yield Rule(
        "W, heads by loss, late, weight 0.25",
        **aim,
        merge=1 / 4,
        budgets="heads by loss",
        **LATE,
    )
    yield Rule(
        "W, heads by loss, late, values alike 0.8",
        **aim,
        merge=1.0,
        gate=("value", 0.8),
        budgets="heads by loss",
        **LATE,
    )


def even(rule):
    return rule.budgets == "even" and rule.lends is None
