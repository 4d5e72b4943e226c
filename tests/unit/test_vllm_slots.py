"""eigentrack.vllm.slots: every row of every answer goes into its own request's window, once."""

import random
from dataclasses import dataclass, field

import pytest

from eigentrack.vllm.slots import Slots


@dataclass(eq=False)
class Request:
    """A request as a scheduler sees it: `tokens` known so far, of which `computed` are in the cache."""

    name: str
    prompt: int
    wanted: int
    tokens: int = 0
    computed: int = 0
    reached: int = 0  # the largest it has been
    begun: bool = False
    pushed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    @property
    def over(self) -> bool:
        return self.tokens == self.prompt + self.wanted


def test_each_position_of_each_answer_is_pushed_once_and_slots_are_never_shared() -> None:
    choose = random.Random(1)
    slots = Slots(6)
    waiting = [Request(f"r{i}", choose.randint(1, 20), choose.randint(1, 15)) for i in range(200)]
    running: list[Request] = []
    owner: dict[int, str] = {}
    clean = set(range(slots.count))
    finished: list[str] = []
    done: list[Request] = []
    while waiting or running:
        slots.end(finished)
        owner = {slot: name for slot, name in owner.items() if name not in finished}
        finished = []
        if running and choose.random() < 0.15:  # preempted: it waits first, and a part of it may be found in the cache
            request = running.pop(choose.randrange(len(running)))
            request.computed = choose.randint(0, request.tokens - 1)
            waiting.insert(0, request)
        elif waiting and len(running) < slots.count:
            request = waiting.pop(0)
            if not request.begun:
                request.begun, request.computed = True, choose.randint(0, request.prompt - 1)
                slots.begin(request.name, request.prompt)
            running.append(request)
        choose.shuffle(running)
        scheduled = {r.name: choose.randint(1, r.tokens - r.computed) for r in running}
        computed = {r.name: r.computed for r in running}
        push = slots.push([r.name for r in running], scheduled, computed)
        assert not push.lost
        packed = [(r, position) for r in running for position in range(r.computed, r.computed + scheduled[r.name])]
        assert len(set(push.slots)) == len(push.slots)
        assert not set(push.emptied) & set(owner)
        clean |= set(push.emptied)
        for name, row, slot in zip(push.requests, push.rows, push.slots, strict=True):
            request, position = packed[row]
            assert request.name == name
            assert owner.get(slot) == name or slot in clean
            owner[slot] = name
            clean.discard(slot)
            request.pushed.append(position)
        for request in list(running):
            request.computed += scheduled[request.name]
            request.reached = max(request.reached, request.computed)
            request.tokens += request.computed == request.tokens
            if request.over or choose.random() < 0.02:
                running.remove(request)
                finished.append(request.name)
                done.append(request)
    slots.end(finished)
    for request in done:
        assert request.pushed == list(range(request.prompt, request.reached)), request.name
    assert sum(len(request.pushed) for request in done) > 500
    assert slots.in_use == 0 and sorted(slots._free) == list(range(6))


def test_prompts_take_no_slot() -> None:
    slots = Slots(1)
    slots.begin("a", 10)
    assert not slots.push(["a"], {"a": 10}, {"a": 0}).rows
    assert slots.in_use == 0
    assert slots.push(["a"], {"a": 1}, {"a": 10}).slots == [0]
    assert slots.in_use == 1


def test_a_slot_is_emptied_by_the_next_push_that_brings_rows() -> None:
    slots = Slots(2)
    slots.begin("a", 1)
    slots.begin("b", 5)
    slots.push(["a"], {"a": 1}, {"a": 1})
    slots.end(["a"])
    assert slots.push(["b"], {"b": 5}, {"b": 0}).emptied == []
    assert slots.push(["b"], {"b": 1}, {"b": 5}).emptied == [0]
    assert slots.push(["b"], {"b": 1}, {"b": 6}).emptied == []


def test_the_lowest_free_slot_is_taken() -> None:
    slots = Slots(4)
    for name in "abcde":
        slots.begin(name, 1)
    assert slots.push("abcd", dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 1)).slots == [0, 1, 2, 3]
    slots.end(["b", "a", "d"])
    assert slots.push("ce", {"c": 1, "e": 1}, {"c": 2, "e": 1}).slots == [2, 0]


def test_where_none_is_free_the_one_that_waits_longest_is_not_watched_any_more() -> None:
    slots = Slots(2)
    for name in "abc":
        slots.begin(name, 1)
    slots.push(["b", "a"], {"a": 1, "b": 1}, {"a": 1, "b": 1})
    slots.push(["a"], {"a": 1}, {"a": 2})
    push = slots.push(["a", "c"], {"a": 1, "c": 1}, {"a": 3, "c": 1})
    assert push.lost == ["b"]
    assert push.requests == ["a", "c"] and push.emptied == [push.slots[1]]
    assert not slots.push(["b"], {"b": 3}, {"b": 0}).requests


def test_one_that_runs_never_loses_its_slot() -> None:
    slots = Slots(2)
    for name in "abc":
        slots.begin(name, 1)
    slots.push(["a", "b"], {"a": 1, "b": 1}, {"a": 1, "b": 1})
    push = slots.push(["c", "a"], {"a": 1, "c": 1}, {"a": 2, "c": 1})
    assert push.lost == ["b"] and push.requests == ["c", "a"]


def test_rows_that_were_never_seen_end_the_watching() -> None:
    slots = Slots(2)
    slots.begin("a", 4)
    slots.push(["a"], {"a": 1}, {"a": 4})
    push = slots.push(["a"], {"a": 2}, {"a": 5})
    assert push.lost == ["a"] and not push.rows and slots.in_use == 0
    assert not slots.push(["a"], {"a": 1}, {"a": 7}).lost


def test_a_name_that_comes_again_begins_anew() -> None:
    slots = Slots(2)
    slots.begin("a", 1)
    slots.push(["a"], {"a": 1}, {"a": 1})
    slots.begin("a", 5)
    assert slots.in_use == 0
    assert slots.push(["a"], {"a": 1}, {"a": 5}).requests == ["a"]


@pytest.mark.parametrize("unknown", ["warm-up", "embedding"])
def test_requests_without_a_prompt_are_passed_over(unknown: str) -> None:
    slots = Slots(2)
    slots.begin("a", 2)
    push = slots.push([unknown, "a"], {unknown: 7, "a": 1}, {unknown: 0, "a": 2})
    assert push.requests == ["a"] and push.rows == [7]
