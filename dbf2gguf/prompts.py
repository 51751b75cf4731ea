"""Prompts for self-written calibration text: many subjects times a few forms.

They only set the subject and the kind of text; what is written is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable

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


ENGLISH = (
    "All human beings are born free and equal in dignity and rights. They are endowed with "
    "reason and conscience and should act towards one another in a spirit of brotherhood."
)
"""Article 1 of the Universal Declaration of Human Rights, which LANGUAGES has, too."""

LANGUAGES = {
    "Spanish": (
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados "
        "como están de razón y conciencia, deben comportarse fraternalmente los unos con los "
        "otros.",
        (
            "La historia de",
            "Érase una vez",
            "El pueblo está situado en",
            "Según los científicos,",
            "Pregunta: ¿Qué es la democracia?\nRespuesta:",
            "Querida María:\n\n",
            "Para preparar este plato se necesitan",
            "Nació en",
        ),
    ),
    "French": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont "
        "doués de raison et de conscience et doivent agir les uns envers les autres dans un "
        "esprit de fraternité.",
        (
            "L'histoire de",
            "Il était une fois",
            "La ville est située dans",
            "Selon les chercheurs,",
            "Question : Qu'est-ce que la démocratie ?\nRéponse :",
            "Chère Marie,\n\n",
            "Pour préparer ce plat, il faut",
            "Il est né à",
        ),
    ),
    "German": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
        "Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit "
        "begegnen.",
        (
            "Die Geschichte der",
            "Es war einmal",
            "Der Ort liegt in",
            "Nach Angaben der Forscher",
            "Frage: Was ist Demokratie?\nAntwort:",
            "Liebe Maria,\n\n",
            "Für dieses Gericht braucht man",
            "Er wurde geboren in",
        ),
    ),
    "Portuguese": (
        "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados "
        "de razão e de consciência, devem agir uns para com os outros em espírito de "
        "fraternidade.",
        (
            "A história de",
            "Era uma vez",
            "A cidade está localizada em",
            "Segundo os cientistas,",
            "Pergunta: O que é a democracia?\nResposta:",
            "Querida Maria,\n\n",
            "Para preparar este prato, são necessários",
            "Nasceu em",
        ),
    ),
    "Italian": (
        "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono "
        "dotati di ragione e di coscienza e devono agire gli uni verso gli altri in spirito "
        "di fratellanza.",
        (
            "La storia di",
            "C'era una volta",
            "Il paese si trova in",
            "Secondo gli scienziati,",
            "Domanda: Che cos'è la democrazia?\nRisposta:",
            "Cara Maria,\n\n",
            "Per preparare questo piatto servono",
            "Nacque a",
        ),
    ),
    "Russian": (
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
        "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
        (
            "История",
            "Жили-были",
            "Город расположен в",
            "По словам учёных,",
            "Вопрос: Что такое демократия?\nОтвет:",
            "Дорогая Мария!\n\n",
            "Чтобы приготовить это блюдо, нужно",
            "Он родился в",
        ),
    ),
    "Chinese": (
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
        (
            "历史上，",
            "从前，",
            "这座城市位于",
            "据科学家介绍，",
            "问题：什么是民主？\n回答：",
            "亲爱的妈妈：\n\n",
            "做这道菜需要",
            "他出生于",
        ),
    ),
    "Japanese": (
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない"
        "。",
        (
            "歴史的に、",
            "昔々、",
            "この町は",
            "研究者によると、",
            "質問：民主主義とは何ですか。\n回答：",
            "お母さんへ\n\n",
            "この料理を作るには、",
            "彼は",
        ),
    ),
    "Korean": (
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
        "인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 "
        "한다.",
        (
            "역사적으로",
            "옛날 옛적에",
            "이 도시는",
            "연구자들에 따르면",
            "질문: 민주주의란 무엇입니까?\n답변:",
            "사랑하는 어머니께\n\n",
            "이 요리를 만들려면",
            "그는",
        ),
    ),
    "Arabic": (
        "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم "
        "أن يعامل بعضهم بعضًا بروح الإخاء.",
        (
            "تاريخ",
            "كان يا ما كان",
            "تقع المدينة في",
            "وفقا للباحثين،",
            "سؤال: ما هي الديمقراطية؟\nجواب:",
            "عزيزتي مريم،\n\n",
            "لتحضير هذا الطبق نحتاج إلى",
            "ولد في",
        ),
    ),
    "Hindi": (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त "
        "है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव "
        "से बर्ताव करना चाहिए।",
        (
            "इतिहास में",
            "एक समय की बात है",
            "यह शहर",
            "वैज्ञानिकों के अनुसार",
            "प्रश्न: लोकतंत्र क्या है?\nउत्तर:",
            "प्रिय माँ,\n\n",
            "इस व्यंजन को बनाने के लिए",
            "उनका जन्म",
        ),
    ),
}
"""The same article, and openings of texts."""

PREMIUM = 1.7
"""Tokens for a token of English, below which a tokenizer was made for a language (the measure is that of
arXiv:2305.15425). SmolLM2, trained on English, has 1.8 to 6; Gemma 3 1.0 to 1.5."""

WORDLIKE = 3
"""Characters of a token of English, at least: these two have 5."""


def _subjects() -> list[str]:
    return [subject for subject in SUBJECTS if subject]


def openings() -> list[str]:
    """First words of texts, every subject in every form that has one; repeats left out."""
    texts = [form.format(s=s, S=s[0].upper() + s[1:]) for s in _subjects() for form in OPENINGS]
    return list(dict.fromkeys(texts)) + [t for t in OPENINGS if "{" not in t] * 12


def chat_questions() -> list[str]:
    """Questions and requests of a user."""
    return [form.format(s=s) for s in _subjects() for form in QUESTIONS] + list(PLAIN_QUESTIONS) * 8


def foreign_openings(count_tokens: Callable[[str], int]) -> list[str]:
    """Of texts in the languages that a tokenizer was made for, beside English. One that takes English apart
    into letters, too, was made for none."""
    english = count_tokens(ENGLISH)
    most = PREMIUM * english if len(ENGLISH) >= WORDLIKE * english else 0
    return [text for same, some in LANGUAGES.values() if count_tokens(same) < most for text in some]
