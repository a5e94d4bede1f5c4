"""What sniff did not capture, or not as one might think: counted, and told in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Missed:
    """Counts of calls, where nothing else is said.

    Attributes:
        passed_over: those that go on with a cache which was filled elsewhere.
        failed: those that raised.
        elsewhere: those in other threads, or of copies of the model.
        unseen: forwards that reached the layers without a call that could be heard.
        repeats: those that were taken to go on with the one before, since they repeat it and have a token more.
        repeated_rows: captured rows that are the same as another one of their call.
        shared_rows: rows that are the same as another one of their call and count with it.
        taken_back_tokens: captured tokens that a cache has lost since.
    """

    passed_over: int = 0
    passed_over_tokens: int = 0
    failed: int = 0
    elsewhere: int = 0
    unseen: int = 0
    repeats: int = 0
    repeated_rows: int = 0
    shared_rows: int = 0
    taken_back_tokens: int = 0

    def notes(self) -> list[str]:
        """One for each count that is not 0."""
        passed_over = f"{_counted(self.passed_over, 'call')} of {_counted(self.passed_over_tokens, 'token')}"
        said = {
            f"passed over {passed_over} that go on with a cache filled elsewhere: open sniff before the "
            "prompt": self.passed_over,
            f"took {_counted(self.repeats, 'call')} that repeated the one before and had a token more for the same "
            "texts, going on": self.repeats,
            f"kept nothing of {_counted(self.failed, 'call')} that raised an error": self.failed,
            f"did not hear {_counted(self.elsewhere, 'call')} from other threads or of copies of the model: sniff in "
            "the thread that calls": self.elsewhere,
            f"did not hear {_counted(self.unseen, 'forward')} past the model's own call, as model.model.forward(...) "
            "is: call the model": self.unseen,
            f"captured {_counted(self.repeated_rows, 'row')} that repeated another row of the same call: "
            "each is a document": self.repeated_rows,
            f"took {_counted(self.shared_rows, 'row')} that repeated another row of the same prompt for one document "
            "with it, as of beams": self.shared_rows,
            f"took back {_counted(self.taken_back_tokens, 'token')} that the cache lost again, as it does wrong "
            "guesses of assisted decoding": self.taken_back_tokens,
        }
        return [text for text, count in said.items() if count]


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
