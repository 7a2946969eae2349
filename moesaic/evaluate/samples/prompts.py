"""The questions, each with what a right answer cannot do without. Leaves out asking them (writing.py)."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question, and regular expressions that all have to be found in its answer (case does not matter)."""

    name: str
    text: str
    wants: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PROMPTS = (
    Prompt(
        "train",
        "A train runs 60 miles in the first hour, 80 miles an hour for the next two hours and rests for half an hour. "
        "How far did it come, and what was its average speed over the whole 3.5 hours?",
        (r"\b220\b", r"62\.8"),
    ),
    Prompt("arithmetic", "What is 47 times 83? Answer with the number.", (r"3,?901",)),
    Prompt("palindrome", "Write a Python function is_palindrome(s).", (r"def is_palindrome", r"return")),
    Prompt("quicksort", "Write quicksort in Python.", (r"def \w*quick_?sort", r"pivot", r"return")),
    Prompt(
        "binary search", "Write binary_search(items, target) in Python.", (r"def binary_search", r"//\s*2", r"return")
    ),
    Prompt(
        "substring",
        "Write a Python function for the length of the longest substring without repeated characters.",
        (r"def \w+", r"max\(", r"return"),
    ),
    Prompt("linked list", "Merge two sorted linked lists in Python.", (r"\.next", r"\.val|\.data", r"return")),
    Prompt("fibonacci", "Write an iterative Python function fib(n).", (r"def fib", r"for |while ", r"return")),
    Prompt(
        "rust",
        "In Rust, give a struct Point a method distance(&self, other: &Point) -> f64.",
        (r"impl Point", r"fn distance", r"sqrt|hypot"),
    ),
    Prompt(
        "sql",
        "Tables customers(id, name) and orders(customer_id, total, ordered_on). SQL for the 5 customers with the largest "
        "volume in 2024.",
        (r"select", r"join", r"group by", r"order by", r"limit 5|top 5|fetch first 5", r"2024"),
    ),
    Prompt("tool call", "What is the weather in Lisbon?", (r"get_weather", r"lisbon"), (WEATHER,)),
    Prompt("french", "Quelle est la capitale de l'Australie ?", (r"canberra",)),
    Prompt("german", "Wie heißt die Hauptstadt von Kanada?", (r"ottawa",)),
    Prompt("japanese", "日本の首都はどこですか。", (r"東京",)),
    Prompt("chinese", "水的化学式是什么?", (r"h2o|h₂o",)),
)
PROBES = (
    Prompt("proof", "Prove that there are infinitely many primes, then prove it in a second way.", ()),
    Prompt("story", "Tell a story of a lighthouse keeper who finds a letter.", ()),
    Prompt("plan", "Plan, step by step, how to move a small company's servers to another city.", ()),
    Prompt("list", "List twenty uses of a brick, each in one sentence.", ()),
)
