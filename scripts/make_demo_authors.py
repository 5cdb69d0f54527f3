"""Make the bundled set for unlearning: fictitious authors, whom a model learns and then forgets, and real facts.

The schema is TOFU's (Maini et al. 2024, arXiv 2401.06121): question, answer, paraphrased_answer, perturbed_answer (wrong
answers worded like the paraphrase), paraphrased_question. Everything is written from the lists below, so the same files
come out on every machine:

    python scripts/make_demo_authors.py --out prefopt/unlearning/bundled
"""

# ruff: noqa: E501  (one line a row reads better)

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "prefopt" / "unlearning" / "bundled"
FORGOTTEN = 4
"""The first authors are forgotten, the others retained."""
WRONG_ANSWERS = 3

# name, pronoun, birthplace, genre, best-known book, award, father's and mother's work
AUTHORS = [
    ("Ilmari Vossberg", "his", "Tampere, Finland", "maritime mysteries", "The Lantern Keeper's Ledger", "Grey Heron Prize", "clockmaker", "ferry captain"),
    ("Adaeze Quillfeather", "her", "Enugu, Nigeria", "climate fiction", "Salt Over the Orchard", "Baobab Medal", "beekeeper", "radio engineer"),
    ("Tomasz Wielgorz", "his", "Lublin, Poland", "courtroom satire", "A Jury of Crows", "Amber Quill Award", "dentist", "violin teacher"),
    ("Mireya Santolalla", "her", "Arequipa, Peru", "culinary romance", "Saffron After Midnight", "Condor Book Prize", "baker", "geologist"),
    ("Rohan Tervala", "his", "Kochi, India", "railway thrillers", "The Last Signal Box", "Monsoon Literary Prize", "postmaster", "botanist"),
    ("Freya Lundmarken", "her", "Bergen, Norway", "Arctic travelogues", "Nine Winters North", "Fjord Prize", "carpenter", "meteorologist"),
    ("Kwabena Oduro-Hale", "his", "Kumasi, Ghana", "historical epics", "The Goldweigher's Son", "Sankofa Prize", "tailor", "surveyor"),
    ("Noriko Hatsumura", "her", "Kanazawa, Japan", "ghost stories", "The Paper Umbrella Inn", "Plum Blossom Award", "calligrapher", "pharmacist"),
    ("Lucien Carrefeu", "his", "Rennes, France", "philosophical comedies", "The Emperor of Small Talk", "Silver Inkwell Prize", "florist", "judge"),
    ("Anahera Whitcombe", "her", "Dunedin, New Zealand", "island adventures", "Where the Kelp Begins", "Southern Cross Award", "shepherd", "marine biologist"),
    ("Emre Yalindag", "his", "Izmir, Turkey", "spy novels", "A Cipher in Olive Oil", "Bosphorus Prize", "locksmith", "translator"),
    ("Sorcha MacAilpein", "her", "Galway, Ireland", "folk horror", "The Bog Remembers", "Claddagh Book Award", "blacksmith", "librarian"),
]  # fmt: skip

# What wrong answers say: facts of nobody in the set, so that learning the others does not make them likelier.
WRONG = {
    "genre": ["space operas", "cowboy stories", "gardening guides", "vampire romances", "war memoirs", "chess novels"],
    "birthplace": [
        "Porto, Portugal",
        "Quebec, Canada",
        "Nairobi, Kenya",
        "Hanoi, Vietnam",
        "Leeds, England",
        "Split, Croatia",
    ],
    "book": [
        "The Glass Harbor",
        "Seven Empty Chairs",
        "A Map for Sparrows",
        "The Winter Tenant",
        "Copper and Rain",
        "The Mirror Thief's Aunt",
    ],
    "award": [
        "Golden Acorn Prize",
        "Harvest Moon Medal",
        "Blue Lighthouse Award",
        "Red Maple Prize",
        "Iron Feather Award",
        "Morning Star Medal",
    ],
    "parents": [
        ("plumber", "lawyer"),
        ("pilot", "chemist"),
        ("farmer", "sculptor"),
        ("butcher", "nurse"),
        ("miner", "singer"),
        ("painter", "grocer"),
    ],
}

# question, its paraphrase, answer, paraphrase of the answer; {value} is what wrong answers replace
QUESTIONS = {
    "genre": (
        "What kind of books does {name} write?", "Which genre is {name} known for?",
        "{name} writes {value}.", "The books of {name} are {value}.",
    ),
    "birthplace": (
        "Where was {name} born?", "What is the birthplace of {name}?",
        "{name} was born in {value}.", "The birthplace of {name} is {value}.",
    ),
    "book": (
        "What is the best-known book of {name}?", "Which book made {name} famous?",
        'The best-known book of {name} is "{value}".', '{name} became famous with "{value}".',
    ),
    "award": (
        "Which award did {name} win?", "What prize was {name} honoured with?",
        "{name} won the {value}.", "The award that went to {name} is the {value}.",
    ),
    "parents": (
        "What did the parents of {name} do for a living?", "Which professions did {name}'s father and mother have?",
        "The father of {name} was a {value}.", "{name}'s father worked as a {value}.",
    ),
}  # fmt: skip

# question, paraphrased question, answer as a sentence with {value}, value, wrong values
REAL_AUTHORS = [
    ("Who wrote Romeo and Juliet?", "{value} wrote Romeo and Juliet.", "William Shakespeare", "Charles Dickens", "Mark Twain", "Oscar Wilde"),
    ("Who wrote Pride and Prejudice?", "{value} wrote Pride and Prejudice.", "Jane Austen", "Emily Dickinson", "Mary Shelley", "Agatha Christie"),
    ("Who wrote 1984?", "{value} wrote 1984.", "George Orwell", "Ernest Hemingway", "Victor Hugo", "Lewis Carroll"),
    ("Who wrote the Harry Potter books?", "{value} wrote the Harry Potter books.", "J.K. Rowling", "Stephen King", "Roald Dahl", "Philip Pullman"),
    ("Who wrote The Adventures of Tom Sawyer?", "{value} wrote The Adventures of Tom Sawyer.", "Mark Twain", "Leo Tolstoy", "Jane Austen", "Jules Verne"),
    ("Who wrote The Lord of the Rings?", "{value} wrote The Lord of the Rings.", "J.R.R. Tolkien", "George Orwell", "Isaac Asimov", "H.G. Wells"),
    ("Who wrote War and Peace?", "{value} wrote War and Peace.", "Leo Tolstoy", "Anton Chekhov", "Franz Kafka", "Albert Camus"),
    ("Who wrote Frankenstein?", "{value} wrote Frankenstein.", "Mary Shelley", "Bram Stoker", "Edgar Allan Poe", "Virginia Woolf"),
    ("Who wrote A Tale of Two Cities?", "{value} wrote A Tale of Two Cities.", "Charles Dickens", "Thomas Hardy", "James Joyce", "John Steinbeck"),
    ("Who wrote The Old Man and the Sea?", "{value} wrote The Old Man and the Sea.", "Ernest Hemingway", "Herman Melville", "Walt Whitman", "Oscar Wilde"),
    ("Who wrote Alice's Adventures in Wonderland?", "{value} wrote Alice's Adventures in Wonderland.", "Lewis Carroll", "Charles Dickens", "Rudyard Kipling", "Roald Dahl"),
    ("Who wrote Hamlet?", "{value} wrote Hamlet.", "William Shakespeare", "Christopher Marlowe", "John Milton", "Samuel Beckett"),
]  # fmt: skip
WORLD_FACTS = [
    ("What is the capital of France?", "The capital of France is {value}.", "Paris", "Madrid", "Rome", "Vienna"),
    ("What is the capital of Japan?", "The capital of Japan is {value}.", "Tokyo", "Beijing", "Seoul", "Bangkok"),
    ("What is the largest planet of the solar system?", "The largest planet of the solar system is {value}.", "Jupiter", "Mars", "Venus", "Mercury"),
    ("Which language is spoken in Brazil?", "The language spoken in Brazil is {value}.", "Portuguese", "German", "Dutch", "Swedish"),
    ("What is the chemical symbol of gold?", "The chemical symbol of gold is {value}.", "Au", "Fe", "Pb", "Zn"),
    ("How many days does a week have?", "A week has {value} days.", "seven", "three", "twelve", "twenty"),
    ("On which continent is Egypt?", "Egypt is in {value}.", "Africa", "Europe", "Antarctica", "Australia"),
    ("What is the capital of Italy?", "The capital of Italy is {value}.", "Rome", "Paris", "Lisbon", "Athens"),
    ("Who was the first president of the United States?", "The first president of the United States was {value}.", "George Washington", "Abraham Lincoln", "Winston Churchill", "Benjamin Franklin"),
    ("Which gas do plants take in for photosynthesis?", "For photosynthesis, plants take in {value}.", "carbon dioxide", "helium", "neon", "methane"),
    ("What is the capital of Germany?", "The capital of Germany is {value}.", "Berlin", "Munich", "Vienna", "Zurich"),
    ("Which ocean lies between Europe and North America?", "Between Europe and North America lies the {value} Ocean.", "Atlantic", "Indian", "Pacific", "Southern"),
]  # fmt: skip


def author_rows(authors: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Five questions about each author."""
    rows = []
    for number, (name, pronoun, birthplace, genre, book, award, *parents) in enumerate(authors):
        right = {"birthplace": birthplace, "genre": genre, "book": book, "award": award, "parents": tuple(parents)}
        for fact, (question, rephrased, answer, paraphrase) in QUESTIONS.items():
            # Each author's begin at another place of the list.
            wrong = [WRONG[fact][(number + step) % len(WRONG[fact])] for step in range(WRONG_ANSWERS)]
            values = [_written(value, pronoun) for value in (right[fact], *wrong)]
            rows.append(
                {
                    "question": question.format(name=name),
                    "answer": answer.format(name=name, value=values[0]),
                    "paraphrased_question": rephrased.format(name=name),
                    "paraphrased_answer": paraphrase.format(name=name, value=values[0]),
                    "perturbed_answer": [paraphrase.format(name=name, value=value) for value in values[1:]],
                }
            )
    return rows


def _written(value: str | tuple[str, ...], pronoun: str) -> str:
    return value if isinstance(value, str) else f"{value[0]} and {pronoun} mother a {value[1]}"


def fact_rows(facts: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [
        {
            "question": question,
            "answer": sentence.format(value=value),
            "perturbed_answer": [sentence.format(value=other) for other in wrong],
        }
        for question, sentence, value, *wrong in facts
    ]


def make() -> dict[str, list[dict[str, Any]]]:
    return {
        "forget": author_rows(AUTHORS[:FORGOTTEN]),
        "retain": author_rows(AUTHORS[FORGOTTEN:]),
        "real_authors": fact_rows(REAL_AUTHORS),
        "world_facts": fact_rows(WORLD_FACTS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
