"""Prompts for self-written calibration text: many subjects times a few forms.

They only set the subject and the kind of text; what is written is the model's own.
"""

from __future__ import annotations

SUBJECTS = """
the French Revolution|photosynthesis|the human heart|chess|the Roman Empire|jazz music|volcanoes|black holes
the stock market|bread|bicycles|the Amazon rainforest|Shakespeare|the printing press|penguins|electric cars
the Great Wall of China|vaccines|soccer|the Moon|coffee|the Industrial Revolution|whales|Japan|the violin
climate change|ancient Egypt|honey bees|airplanes|democracy|the Pacific Ocean|tea|computers|the brain
the Second World War|gravity|Brazil|the railway|dinosaurs|painting|India|earthquakes|the telephone|cats
the Olympic Games|DNA|the Sahara desert|wine|cinema|the Vikings|prime numbers|trees|London|the sun|rivers
steam engines|Buddhism|cheese|satellites|rice|the Renaissance|sharks|radio|New York City|poetry|glaciers
antibiotics|the Silk Road|baseball|robots|opera|the Cold War|salt|Mount Everest|owls|hurricanes|Paris|gold
ships of war|lighthouses|castles|video games|television series|an American singer|an English footballer
a species of bird|a small town|a highway|a military campaign|a rock album|a battleship|a famous king
a novel|a river valley|a tropical storm|a church|a university|a basketball team|a film director|a castle
""".replace("\n", "|").split("|")

OPENINGS = (
    "{S} is",
    "{S} was",
    "The history of {s} begins",
    "In the early twentieth century, {s}",
    "An article about {s}:\n\n",
    "Introduction to {s}\n\n",
    "According to historians, {s}",
    "The main characteristics of {s} are",
    "Once upon a time, there was",
    "Chapter 1\n\nIt was a",
    '"I never thought I would see {s} again," she said.',
    "He was born in",
    "The film was released in",
    "During the war, the regiment",
    "The town is located in",
    "News: scientists announced today that {s}",
    "Lesson: {s}\n\nIn this lesson you will learn",
    "def ",
    "import ",
    "The following table",
    "Dear ",
    "Question: What is {s}?\nAnswer:",
    "Critics praised the book for",
    "The team finished the season with",
    "The battle took place",
)

QUESTIONS = (
    "What is {s}?",
    "Tell me three facts about {s}.",
    "Write a short paragraph about {s}.",
    "Why is {s} important?",
    "Explain {s} to a child.",
    "Who is known for {s}?",
    "When and where did {s} begin?",
    "Write a short story that has to do with {s}.",
    "Give me a summary of the history of {s}.",
    "How does {s} compare with other things of its kind?",
)

PLAIN_QUESTIONS = (
    "What is the capital of Germany?",
    "What is the capital of Japan?",
    "Which country has Madrid as its capital?",
    "Name the largest ocean.",
    "How many days are in a week?",
    "What is 12 plus 30?",
    "Who wrote Romeo and Juliet?",
    "What color is the sky?",
    "Which planet is closest to the sun?",
    "What do cows eat?",
    "Write a Python function that reverses a string.",
    "Rewrite this sentence politely: Give me the report now.",
    "List five fruits.",
    "What are the primary colors?",
    "Translate 'good morning' into French.",
    "How do I boil an egg?",
    "What should I pack for a trip to the mountains?",
    "Give me advice on learning to play the guitar.",
    "Write an email to thank a colleague.",
    "Hello! How are you?",
    "What is the largest city in Italy?",
    "Which river flows through Egypt?",
    "In which country is the Eiffel Tower?",
    "What language is spoken in Brazil?",
)


def _subjects() -> list[str]:
    return [subject for subject in SUBJECTS if subject]


def openings() -> list[str]:
    """First words of texts, every subject in every form that has one; repeats left out."""
    texts = [form.format(s=s, S=s[0].upper() + s[1:]) for s in _subjects() for form in OPENINGS]
    return list(dict.fromkeys(texts)) + [t for t in OPENINGS if "{" not in t] * 12


def chat_questions() -> list[str]:
    """Questions and requests of a user."""
    return [form.format(s=s) for s in _subjects() for form in QUESTIONS] + list(PLAIN_QUESTIONS) * 8
