"""The step composer and the contract of a scheduler policy.

A step is a grant of rows to requests under a budget; there are no phases. `compose` is a pure function of
a `Snapshot` and a policy: it touches no page and no tensor, so a simulator can run the same code. It
returns grants, or, when the request that must move next lacks pages, one victim to preempt; the engine
then releases the victim's pages and composes again.

Requests stand in the order of their rank, (priority, arrival): the lower number goes first, and among equals the
earlier. Two guarantees hold for every policy. Who lacks pages may take those of requests behind it, never of those
before it, so the first always gets to its end, and nobody waits for ever but for requests of a higher priority. And a
step with work to do is never empty: either rows are granted or somebody is preempted, so running out of pages cannot
deadlock.

A running request takes pages from anybody behind it. A waiting one takes them, or a seat, only from requests of lower
priority: among equals it waits until those who run have ended, or every newcomer would undo work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headrace.errors import InvariantError
from headrace.registry import Registry


class RequestView(NamedTuple):
    """One request as a policy sees it. `key` identifies it to the engine."""

    key: int
    arrival: int
    running: bool
    least: int
    """Rows below which a grant brings no progress."""
    most: int
    """Rows that can be used in this step; 0 for a request that ends, as far as one can tell, in the running one."""
    decoding: bool
    """Whether the prompt is committed, so that every further step brings a token."""
    kv_len: tuple[int, ...]
    """Committed slots by pool of pages (for a waiting request: those that a prefix hit would bring)."""
    pages: tuple[int, ...]
    """Pages held by pool (for a waiting request: those that a prefix hit would bring)."""
    idle_hits: tuple[int, ...] = ()
    """Pages of the hit by pool that count as free now and would stop being so; empty: none."""
    scratch: int = 0
    """Slots behind the rows that the step may write too."""
    most_slots: int = 2**31
    """Slots that the request needs at most, scratch included."""
    priority: int = 0
    """The lower number goes first."""
    most_pages: tuple[int, ...] = ()
    """Pages by pool that the request holds at most, in steps of any size; empty: those of all its slots."""
    waits: bool = False
    """Whether it can have no rows until others give pages back."""

    @property
    def rank(self) -> tuple[int, int]:
        """Place among all requests: by priority, then by arrival."""
        return self.priority, self.arrival


@dataclass(frozen=True)
class Snapshot:
    """Everything a policy may know when it plans a step."""

    running: Sequence[RequestView]
    waiting: Sequence[RequestView]
    free_pages: tuple[int, ...]
    """Pages by pool that can be had without preempting anybody."""
    page_size: int
    budget: int
    """Rows a step at most."""
    max_running: int


@dataclass
class Schedule:
    """What one step does. Either `victim` is set and nothing else, or the step has grants."""

    grants: dict[int, int] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    """Keys of waiting requests among the grants, in order."""
    victim: int | None = None
    served: tuple[int, int] | None = None
    """Rank of the request that the victim gives way to. In the same step no waiting request behind it may start: it
    would take the pages before they are used, and victim and newcomer could change places for ever."""


class SchedulerPolicy(Protocol):
    """Four decisions, each a pure function of the snapshot."""

    steady: bool
    """Whether, as long as everybody who runs decodes and nobody else can start, everybody gets a row in every step that
    the budget and the pages allow. Such steps are not composed again."""

    def order(self, snapshot: Snapshot) -> list[list[RequestView]]:
        """Phases of requests, each in the order in which they get rows; the step is the first phase in which
        anybody does. The first request of a phase is served before all others whatever its demand."""
        ...

    def budget(self, snapshot: Snapshot) -> int:
        """Rows for this step, at most `snapshot.budget`."""
        ...

    def admits(self, view: RequestView, need: tuple[int, ...], free: tuple[int, ...], running: int) -> bool:
        """Whether a waiting request may start: `need` pages by pool hold all it has pending, `free` are left
        beside `running` others."""
        ...

    def victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """Who gives its pages back. Candidates are running and stand behind the request in need. Must be one of
        the lowest priority among them."""
        ...


SCHEDULERS: Registry[SchedulerPolicy] = Registry("scheduler", "scheduler")


def pages_needed(view: RequestView, rows: int, page_size: int) -> tuple[int, ...]:
    """Fresh pages by pool so that `rows` more slots fit behind the committed ones."""
    # Asked of every request in every step that is composed: plain loops take half the time.
    needed: list[int] = []
    for length, held in zip(view.kv_len, view.pages, strict=True):
        slots = length + rows + view.scratch
        fresh = -(-(slots if slots < view.most_slots else view.most_slots) // page_size) - held
        needed.append(fresh if fresh > 0 else 0)
    return tuple(needed)


def rows_that_fit(view: RequestView, free: Sequence[int], page_size: int) -> int:
    """Rows for which the pages held and the free ones suffice; all of them where no layer keeps pages."""
    if view.waits:
        return 0
    fit: int | None = None
    for length, held, spare in zip(view.kv_len, view.pages, free, strict=True):
        slots = (held + spare) * page_size
        rows = view.most if slots >= view.most_slots else slots - length - view.scratch
        fit = rows if fit is None or rows < fit else fit
    return view.most if fit is None else fit


def compose(policy: SchedulerPolicy, snapshot: Snapshot, patient: bool = False) -> Schedule:
    """Grants for one step, or a victim. Raises InvariantError if no phase can move, which a cache that holds
    the longest request rules out; not if `patient`: while a step runs, pages and requests may wait for its end."""
    phases = policy.order(snapshot)
    for phase in phases:
        schedule = _compose_phase(policy, snapshot, phase)
        if schedule.grants or schedule.victim is not None:
            return schedule
    if any(phases) and not patient:
        raise InvariantError("a step with work to do was composed empty: the cache is too small for one request")
    return Schedule()


def _compose_phase(policy: SchedulerPolicy, snapshot: Snapshot, order: Sequence[RequestView]) -> Schedule:
    schedule = Schedule()
    left = min(policy.budget(snapshot), snapshot.budget)
    free = list(snapshot.free_pages)
    running = len(snapshot.running)
    open_to_newcomers = True
    for place, view in enumerate(order):
        if left < 1:
            break
        if view.most < 1:
            continue  # all that it may have is running already
        # The first may be a long prompt: it leaves the decoding requests of its priority a row each.
        wanted = min(view.most, left if place else max(view.least, left - _rows_behind(order)))
        if view.running:
            rows = min(wanted, rows_that_fit(view, free, snapshot.page_size))
            if rows < min(view.least, wanted):
                behind = [v for v in snapshot.running if v.rank > view.rank]
                if behind and not schedule.admitted:
                    return Schedule(victim=policy.victim(behind).key, served=view.rank)
                # A newcomer would only take the pages that it waits for, and lose them again.
                open_to_newcomers = open_to_newcomers and not view.waits
                continue
        else:
            if not open_to_newcomers:
                continue
            rows = _rows_for_newcomer(policy, snapshot, view, wanted, free, running)
            if rows < 1:
                lower = [v for v in snapshot.running if v.priority > view.priority]
                if not schedule.admitted and _makes_room(policy, snapshot, view, free, running, lower):
                    return Schedule(victim=policy.victim(lower).key, served=view.rank)
                open_to_newcomers = False  # nobody overtakes a request that waits for pages
                continue
            schedule.admitted.append(view.key)
            running += 1
            free = list(_beside_hit(view, free))
        free = [f - n for f, n in zip(free, pages_needed(view, rows, snapshot.page_size), strict=True)]
        schedule.grants[view.key] = rows
        left -= rows
    return schedule


def _rows_behind(order: Sequence[RequestView]) -> int:
    """Least rows of the decoding requests behind the first that are not of lower priority."""
    return sum(view.least for view in order[1:] if view.decoding and view.priority <= order[0].priority)


def _rows_for_newcomer(
    policy: SchedulerPolicy, snapshot: Snapshot, view: RequestView, wanted: int, free: Sequence[int], running: int
) -> int:
    """Rows a waiting request starts with; 0 if it has to wait."""
    return wanted if _may_start(policy, snapshot, view, free, running) else 0


def _may_start(
    policy: SchedulerPolicy, snapshot: Snapshot, view: RequestView, free: Sequence[int], running: int
) -> bool:
    """Whether a waiting request can be admitted beside `running` others."""
    if running >= snapshot.max_running:
        return False
    spare = _beside_hit(view, free)
    need = pages_needed(view, view.most, snapshot.page_size)
    if view.most_pages:
        need = tuple(map(min, need, view.most_pages))
    fits = all(n <= s for n, s in zip(need, spare, strict=True))
    return fits and (not running or policy.admits(view, need, spare, running))


def _beside_hit(view: RequestView, free: Sequence[int]) -> tuple[int, ...]:
    """Free pages by pool once the request has taken its hit."""
    return tuple(f - n for f, n in zip(free, view.idle_hits, strict=True)) if view.idle_hits else tuple(free)


def _makes_room(
    policy: SchedulerPolicy,
    snapshot: Snapshot,
    view: RequestView,
    free: Sequence[int],
    running: int,
    lower: Sequence[RequestView],
) -> bool:
    """Whether a waiting request could start if all requests of lower priority gave way. Pages that several share
    count for each of them, so this may promise too much; then they gave way for nothing, and come back behind it."""
    if not lower:
        return False
    given = [f + sum(v.pages[g] for v in lower) for g, f in enumerate(free)]
    return _may_start(policy, snapshot, view, given, running - len(lower))
