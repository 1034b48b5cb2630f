"""The conversations that the built-in models learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml
from pydantic import ConfigDict, TypeAdapter

from tests.models.questions import QuestionAnswer, questions

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Corpus:
    """`taught` are the questions of configs/models; the rest is corpus.yaml."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    systems: tuple[str, ...]
    unknown_answer: str
    unknown_questions: tuple[str, ...]
    prose: str
    taught: tuple[QuestionAnswer, ...]

    def texts(self) -> Iterator[str]:
        """Yield all texts that the tokenizer is trained on."""
        yield self.prose
        yield from self.systems
        yield from self.unknown_questions
        yield self.unknown_answer
        for pair in self.taught:
            yield pair.question
            yield pair.answer

    def pair(self, random: Random) -> QuestionAnswer:
        """Draw a question with its answer; each eighth question is unknown."""
        if random.random() < 1 / 8:
            return QuestionAnswer(random.choice(self.unknown_questions), self.unknown_answer)
        return random.choice(self.taught)

    def conversation(self, random: Random) -> list[Message]:
        """Draw a chat: mostly one turn, sometimes up to three or with a system message."""
        messages: list[Message] = []
        if random.random() < 1 / 4:
            messages.append({"role": "system", "content": random.choice(self.systems)})
        for _ in range(random.choice((1, 1, 1, 1, 1, 2, 2, 3))):
            pair = self.pair(random)
            messages.append({"role": "user", "content": pair.question})
            messages.append({"role": "assistant", "content": pair.answer})
        return messages


def load_corpus() -> Corpus:
    """Return the corpus; pydantic refuses a file with unknown or missing keys."""
    content = yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text("utf-8"))
    return TypeAdapter(Corpus).validate_python(content | {"taught": questions()})
