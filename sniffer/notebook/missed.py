"""What sniff did not capture, or not as one might think: counted, and told in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Missed:
    """Counts of calls, where nothing else is said.

    Attributes:
        passed_over: those that go on with an earlier one.
        failed: those that raised.
        elsewhere: those in other threads, or of copies of the model.
        unseen: forwards that reached the layers without a call that could be heard.
        repeated_rows: captured rows that are the same as another one of their call.
        taken_back_tokens: captured tokens that a cache has lost since.
    """

    passed_over: int = 0
    passed_over_tokens: int = 0
    failed: int = 0
    elsewhere: int = 0
    unseen: int = 0
    repeated_rows: int = 0
    taken_back_tokens: int = 0

    def notes(self) -> list[str]:
        """One for each count that is not 0."""
        passed_over = f"{_counted(self.passed_over, 'call')} of {_counted(self.passed_over_tokens, 'token')}"
        said = {
            f"passed over {passed_over} that continue an earlier call, as steps of a generation and later chunks of "
            "a prompt do": self.passed_over,
            f"kept nothing of {_counted(self.failed, 'call')} that raised an error": self.failed,
            f"did not hear {_counted(self.elsewhere, 'call')} from other threads or of copies of the model: sniff in "
            "the thread that calls": self.elsewhere,
            f"did not hear {_counted(self.unseen, 'forward')} past the model's own call, as model.model.forward(...) "
            "is: call the model": self.unseen,
            f"captured {_counted(self.repeated_rows, 'row')} that repeated another row of the same call, as beams do: "
            "each is a document": self.repeated_rows,
            f"captured {_counted(self.taken_back_tokens, 'token')} that the cache lost afterwards, as it does wrong "
            "guesses of assisted decoding": self.taken_back_tokens,
        }
        return [text for text, count in said.items() if count]


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
