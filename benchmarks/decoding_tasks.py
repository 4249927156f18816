"""Prompts for ``benchmarks/decoding.py``: the six task types of Spec-Bench (Xia et al., 2401.07851) in miniature.

News items come from a package (``zoo.data``); questions, problems and requests are our own. What heads are trained on
shares nothing with what is measured: other items, other topics.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, product

from zoo.data import load_texts

Prompts = dict[str, list[str]]

CHAT = (
    "Write a short letter to a friend about a walk along the coast in autumn.",
    "What should I think about before I adopt a dog?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Describe a small market town on a Saturday morning, as in a travel guide.",
    "Give me seven ideas for a rainy afternoon with two children.",
    "Explain to a ten-year-old why the moon changes its shape.",
    "Write a polite e-mail asking a colleague to move a meeting from Monday to Wednesday.",
    "Compare travelling by train and travelling by car, with the good and the bad sides of each.",
    "List the steps of baking a simple loaf of bread, one line each.",
)
QUESTIONS = (
    "What is the capital of Australia, and why was it built?",
    "Who wrote Pride and Prejudice, and what is it about?",
    "Which planet of the solar system is the largest, and what is it made of?",
    "What causes the tides of the sea?",
    "When did the Second World War end in Europe?",
    "What is photosynthesis?",
    "What does the heart do in the human body?",
    "Why do leaves change their colour in autumn?",
    "What is the difference between a virus and a bacterium?",
)
PROBLEMS = (
    "A baker makes 12 trays of 15 rolls and sells 134 of the rolls. How many are left?",
    "A train leaves at 9:40 and arrives at 13:15. How long does the journey take?",
    "Anna has three times as many books as Ben. Together they have 48. How many has each?",
    "A garden is 14 metres long and 9 metres wide. What are its area and its perimeter?",
    "A coat costs 80 dollars and is reduced by 25 percent. What does it cost now?",
    "Four painters need six days for a house. How many days do three painters need?",
    "What is 17 times 23?",
    "A tank holds 240 litres and loses 8 litres an hour. After how many hours is it half empty?",
    "The sum of three consecutive numbers is 72. Which numbers are they?",
)
LANGUAGES = ("French", "German", "Spanish")

TOPICS = (
    "bees", "bicycles", "volcanoes", "chess", "rivers", "libraries", "bridges", "soup", "owls", "maps", "glass",
    "clocks", "deserts", "violins", "lighthouses", "snow", "gardens", "coffee", "ships", "numbers",
)  # fmt: skip
REQUESTS = (
    "Explain in a few sentences what is interesting about {}.",
    "Write a short story about {}.",
    "Give me five facts about {}.",
)


def tasks() -> Prompts:
    """Nine prompts per task type."""
    news = load_texts("news", "heldout")
    return {
        "chat": list(CHAT),
        "translation": [
            f"Translate into {LANGUAGES[place % 3]}:\n\n{beginning(item, 40)}"
            for place, item in enumerate(news[:9])
        ],
        "summarisation": [f"Summarise this text in a few sentences.\n\n{item}" for item in news[10:19]],
        "qa": list(QUESTIONS),
        "maths": [f"{problem} Think step by step." for problem in PROBLEMS],
        "rag": [retrieval_prompt(item, news[29:]) for item in news[20:29]],
    }


def varied(prompts: Prompts, count: int) -> list[tuple[str, str]]:
    """The first ``count`` prompts, each with its task, taking one task after the other."""
    turns = zip(*([(task, prompt) for prompt in found] for task, found in prompts.items()), strict=True)
    return list(chain.from_iterable(turns))[:count]


def beginning(text: str, words: int) -> str:
    """The first sentences of a text, up to that many words (one sentence at least)."""
    kept: list[str] = []
    for sentence in text.split(". "):
        if kept and len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return ". ".join(kept).rstrip(".") + "."


def retrieval_prompt(item: str, others: Sequence[str], passages: int = 3, words: int = 80) -> str:
    """A question about a news item, which stands among the ``others`` that share the most words with it."""
    vocabulary = set(item.lower().split())
    nearest = sorted(others, key=lambda other: -len(vocabulary & set(other.lower().split())))
    shown = [beginning(text, words) for text in (*nearest[: passages - 1], item)]
    numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(shown, start=1))
    topic = " ".join(item.split()[:8])
    return f"{numbered}\n\nUse the passages above to answer: what is reported about '{topic}'?"


def lessons(count: int, seed: int = 0) -> list[str]:
    """Prompts whose answers heads are trained on: requests, translations, summaries and sums, mixed."""
    news = load_texts("news", "calibration")
    draw = random.Random(seed)
    found = [request.format(topic) for request, topic in product(REQUESTS, TOPICS)]
    found += [
        f"Translate into {LANGUAGES[n % 3]}:\n\n{beginning(item, 40)}" for n, item in enumerate(news[:30])
    ]
    found += [f"Summarise this text in a few sentences.\n\n{item}" for item in news[30:60]]
    found += [
        f"What is {draw.randint(11, 99)} times {draw.randint(3, 19)}? Think step by step." for _ in range(20)
    ]
    draw.shuffle(found)
    return found[:count]
